"""Tables of results: by hand, against the page of the project, and with what sets rows apart."""

import copy
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.provenance import code
from experiments.table import collected, entries, joined, main, markdown, rewritten
from semid import __version__
from semid.config import to_dict
from semid.data import GlobalTime, HeldOutItems, LeaveOneOut
from semid.errors import SemidError

DOCS = Path(__file__).parents[2] / "docs"
USERS = 40


def record(name, seed, recall, *, row=None, dataset="d", **about):
    values = {f"{metric}@{k}": float(np.mean(recall)) for metric in ("recall", "ndcg") for k in (5, 10)}
    values |= {"coverage@10": 0.5, "gini@10": 0.25}
    stages = {name: {"model": {"folder": "x", "minutes": 2.0 + (seed or 0), "semid": __version__, "commit": "abc1234"}}}
    provenance = {
        "measured": f"2026-01-0{(seed or 0) + 1}T00:00:00+00:00",
        "semid": __version__,
        "commit": "abc1234",
        "machine": {"processor": "Abacus", "cores": 2, "devices": "1 x cpu"},
        "budget": "full",
        "changed": "",
        "stages": stages,
        "evaluation": {
            "dataset": "toys",
            "tie_rule": "interactions of equal time in source order",
            "split_rule": {"type": "LeaveOneOut"},
        },
        **about,
    }
    test = {"included": values, "excluded": values}
    rows = {row or name: {"test": test, "recall@10": [float(value) for value in recall]}}
    request = {"experiment": name, "seed": seed, "dataset": dataset, "model": "m", "beam_size": 50}
    return {"request": request, "result": {"rows": rows, "provenance": provenance}}


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    graph = rng.random(USERS) < 0.4
    models = [graph | (rng.random(USERS) < 0.2) for _ in range(2)]
    return [record("item-graph", None, graph), *(record("default", seed, of) for seed, of in enumerate(models))]


def test_means_deviations_and_the_difference_of_users_by_hand(records):
    graph, *models = [np.array(one["result"]["rows"][one["request"]["experiment"]]["recall@10"]) for one in records]
    by_row = {entry["row"]: entry for entry in entries(records, "item-graph")}
    assert by_row["item-graph"]["difference"] is None
    difference = by_row["default"]["difference"]
    assert difference["mean"] == pytest.approx((np.mean(models, axis=0) - graph).mean())
    assert 0 < difference["low"] < difference["mean"] < difference["high"]
    assert by_row["default"]["minutes"] == [2.0, 3.0]
    lines = markdown(joined([], by_row.values()), "toys").splitlines()
    means = [model.mean() for model in models]
    cell = f"{np.mean(means):.4f} ± {np.std(means, ddof=1):.4f}".replace("0.", ".")
    shown = next(line for line in lines if line.startswith("| semid, defaults |"))
    assert shown.split(" | ")[1:3] == ["0, 1", cell]
    assert "| 2.5 | abc1234 |" in shown
    assert lines[-1] == "Machine: Abacus, 2 cores, 1 x cpu. Test was read once per model, 2026-01-01 to 2026-01-02."


def test_worlds_of_their_own_are_compared_over_all_users(records):
    worlds = [
        record(name, seed, [seed] * (5 + seed), dataset=f"d{seed}") for name in ("bigram", "default") for seed in (0, 1)
    ]
    for one in worlds:
        one["result"]["provenance"]["evaluation"]["dataset"] = "simulated"
    difference = {entry["row"]: entry for entry in entries(worlds, "bigram")}["default"]["difference"]
    assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)
    worlds[0]["request"]["dataset"] = "another world of seed 0"
    worlds[2]["result"]["rows"]["default"]["recall@10"] = [1.0] * 5  # it has no pair, so that only seed 1 counts
    difference = {entry["row"]: entry for entry in entries(worlds, "bigram")}["default"]["difference"]
    assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)


def test_users_of_several_targets_are_one_draw_where_results_tell_them(records):
    def differences(some):
        return {entry["row"]: entry for entry in entries(some, "item-graph")}["default"]["difference"]

    def eightfold(told):
        found = copy.deepcopy(records)
        for one in found:
            for row in one["result"]["rows"].values():
                row["recall@10"] = np.repeat(row["recall@10"], 8).tolist()
        for one in told:
            found[one]["result"]["users"] = np.repeat(np.arange(USERS), 8).tolist()
        return found

    expected = pytest.approx(differences(records))
    assert differences(eightfold([0, 1, 2])) == differences(eightfold([0])) == differences(eightfold([2])) == expected
    assert differences(eightfold([]))["low"] > differences(records)["low"]  # an earlier file
    worlds = eightfold([0, 1, 2])
    graph = copy.deepcopy(worlds[0])
    for seed, one in enumerate((worlds[0], graph)):
        one["request"] |= {"seed": seed, "dataset": f"d{seed}"}
        worlds[1 + seed]["request"]["dataset"] = f"d{seed}"
    for one in (*worlds, graph):
        one["result"]["provenance"]["evaluation"]["dataset"] = "simulated"
    apart = differences([*worlds, graph])
    for one in (*worlds, graph):
        one["result"].pop("users")
    assert apart["low"] < differences([*worlds, graph])["low"]


def test_a_row_of_another_version_budget_or_settings_says_so(records):
    changed = record("bigram", None, [0.0] * USERS, semid="0.0.9", budget="cpu", changed="beam_size: 50 -> 9")
    text = markdown(joined([], entries([*records, changed], "item-graph")), "toys")
    assert "| item bigram (semid 0.0.9, budget cpu, beam_size: 50 -> 9) |" in text
    assert "| semid, defaults |" in text
    shuffled = copy.deepcopy(records[0])
    shuffled["result"]["provenance"]["evaluation"]["tie_rule"] = "interactions of equal time shuffled by seed 0"
    assert entries([shuffled], "item-graph")[0]["dataset"] == "toys_shuffled"
    for rule, name in ((HeldOutItems(), "toys_held_out"), (GlobalTime(), "toys_global_time"), (LeaveOneOut(), "toys")):
        other = copy.deepcopy(records[0])
        other["result"]["provenance"]["evaluation"]["split_rule"] = to_dict(rule)
        assert entries([other], "item-graph")[0]["dataset"] == name


def test_two_results_of_one_seed_and_folders_without_any_are_refused(records, tmp_path):
    with pytest.raises(SemidError, match="toys: two results of default, seed 0; name one folder"):
        entries([*records, records[1]], "item-graph")
    with pytest.raises(SemidError, match="no results of experiments; run some"):
        collected([tmp_path])


@pytest.mark.parametrize(("name", "value"), [("budget", "cpu"), ("changed", "beam_size: 50 -> 9")])
def test_seeds_of_another_budget_or_other_settings_are_refused(records, name, value):
    records[2]["result"]["provenance"][name] = value
    with pytest.raises(SemidError, match=rf"toys: default: seeds differ in {name} \(seed 0: .*; seed 1: {value}\)"):
        entries(records, "item-graph")


def test_seeds_of_another_dataset_or_split_are_refused(records):
    assert [row["seeds"] for row in entries(records, "item-graph")] == [[None], [0, 1]]
    records[2]["request"]["dataset"] = "other"
    with pytest.raises(SemidError, match=r"toys: default: seeds differ in dataset \(seed 0: d; seed 1: other\); name "):
        entries(records, "item-graph")
    for one, fraction in zip(records[1:], (0.1, 0.5), strict=True):
        rule = to_dict(HeldOutItems(fraction))
        one["result"]["provenance"]["evaluation"] |= {"dataset": "simulated", "split_rule": rule}
    listed = r"\(seed 0: HeldOutItems, fraction 0.1, seed 0; seed 1: HeldOutItems, fraction 0.5, seed 0\)"
    with pytest.raises(SemidError, match=rf"simulated_held_out: default: seeds differ in split {listed}"):
        entries(records, "item-graph")
    records[2]["result"]["provenance"]["evaluation"]["split_rule"]["fraction"] = 0.1
    assert [row["seeds"] for row in entries(records, "item-graph")] == [[None], [0, 1]]


def test_a_difference_to_another_baseline_names_it(records):
    rows = entries(records, "item-graph")
    (other,) = [
        row for row in entries([records[0], record("bigram", None, [0.0] * USERS)], "bigram") if row["difference"]
    ]
    text = markdown([*rows[1:], other], "toys")
    assert "| R@10 over item-graph [95%] |" in text
    assert text.count(" over bigram |") == 1


def test_fresh_rows_take_the_place_of_those_of_before(records):
    before = entries(records[:2], "item-graph")
    rows = joined(before, entries(records[1:], "item-graph"))
    assert [(row["row"], row["seeds"]) for row in rows] == [("default", [0, 1]), ("item-graph", [None])]


@pytest.fixture
def results(records, tmp_path):
    """A folder of finished runs."""
    for number, one in enumerate(records):
        folder = tmp_path / "run" / f"r{number}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(one))
    return tmp_path / "run"


def test_minutes_of_a_stage_that_two_runs_read_count_once(records):
    stages = records[1]["result"]["provenance"]["stages"]
    stages["teacher"] = {"codes": {**stages["default"]["model"], "folder": "y"}, "model": stages["default"]["model"]}
    assert entries(records[:2], "item-graph")[1]["minutes"] == [4.0]


def test_nothing_is_written_without_a_page_that_has_tables(results, tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(
        SemidError, match=r"page.md: no such page; make it, with <!-- table DATASET --> and <!-- end of"
    ):
        main([str(results), "--page", str(page)])
    page.write_text("# Mine\n")
    with pytest.raises(SemidError, match=r"page.md: no table; expected <!-- table DATASET --> and <!-- end of table"):
        main([str(results), "--page", str(page)])
    assert not page.with_suffix(".json").exists()
    for words in ([], ["--page", str(page)], ["--json", str(tmp_path / "no.json")]):
        with pytest.raises(SemidError, match="no rows; name folders of runs, or a page or a JSON file that has some"):
            main(words)


def test_a_page_is_written_by_one_command(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Mine\n\n<!-- table toys default item-graph -->\nformer\n<!-- end of table -->\n\nprose\n")
    main([str(results), "--page", str(page)])
    text = page.read_text()
    assert "former" not in text
    assert text.startswith("# Mine\n\n<!-- table toys default item-graph -->\n\n| model | seeds |")
    assert text.endswith("<!-- end of table -->\n\nprose\n")
    assert text.index("| semid, defaults |") < text.index("| item graph |")  # in the order of the names
    main(["--page", str(page)])
    assert page.read_text() == text
    assert capsys.readouterr().out.count("| item graph |") == 2
    with pytest.raises(
        SemidError, match="--baseline item-grap: the folders have no such row; did you mean 'item-graph'"
    ):
        main([str(results), "--baseline", "item-grap"])
    with pytest.raises(SemidError, match="--seeds is of folders of runs; name some, or leave it out"):
        main(["--page", str(page), "--seeds", "0"])
    with pytest.raises(SemidError, match="page: no table; expected <!-- table DATASET -->"):
        rewritten("# Mine\n", [], where="page")


def test_a_dataset_without_the_named_experiments_is_left_out(records, tmp_path, capsys):
    worlds = entries([*records, record("bigram", None, [0.0] * USERS)], "item-graph")
    (other,) = (entry | {"dataset": "games"} for entry in worlds if entry["experiment"] == "bigram")
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [*worlds, other]}))
    main(["--json", str(file), "--experiments", "default"])
    shown = capsys.readouterr().out
    assert "semid, defaults" in shown
    assert "games" not in shown
    main(["--json", str(file), "--experiments", "bigram"])
    assert "games" in capsys.readouterr().out
    with pytest.raises(
        SemidError, match="no rows of dataset 'toys' and tiger; there are those of item-graph, default, "
    ):
        main(["--json", str(file), "--experiments", "tiger"])


def test_the_tables_of_the_project_are_those_of_its_results():
    page, rows = (DOCS / "results.md").read_text(), json.loads((DOCS / "results.json").read_text())["rows"]
    assert rewritten(page, rows, where="results.md") == page


def test_an_archive_of_a_commit_knows_it(tmp_path):
    """`git archive` fills the place in provenance.py, and a checkout's is read from git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert code()["commit"].startswith(head[:7])
    archive = subprocess.run([*git, "archive", "HEAD", "experiments/provenance.py"], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        text = files.extractfile("experiments/provenance.py").read().decode()
    assert f'_ARCHIVED = "{head}"' in text
