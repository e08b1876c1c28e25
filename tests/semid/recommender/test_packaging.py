"""Handing over: the folder alone suffices, its card says what is true, and nothing is half-written or mixed up."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from semid import artifacts
from semid.artifacts import Manifest
from semid.catalog import SemanticCatalog
from semid.cli import main
from semid.data import Dataset
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.recommender import Recommender, hub
from semid.recommender import packaging as handover
from semid.recommender.card import markdown, model_card, plain
from semid.tokenizers import SemanticTokenizer

ROOT = Path(__file__).parents[3]
ITEMS = 40
HISTORIES = [["i1", "i2"], [], ["i30"]]
FILES = {
    *("config.json", "model.safetensors", "items.safetensors", "catalog.parquet", "README.md", "manifest.json"),
    *("tokenizer.safetensors", "tokenizer.config.json", "dataset.json", "training.json"),
    "encoders/text_lsa.safetensors",
}


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def run(line: str, **paths: Path) -> None:
    """`semid` with these words; `{name}` stands for a path, whatever it is made of."""
    main([word.format(**paths) for word in line.split()])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with dataset, catalogue, model, metrics, and what was handed over."""
    home = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    titles = [f"word{row % 5} thing{row % 3} plain" for row in range(ITEMS)]
    pq.write_table(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "title": titles}), home / "I.parquet")
    rows = [(f"u{u}", f"i{rng.integers(ITEMS)}", at) for u in range(24) for at in range(rng.integers(4, 9))]
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), home / "X.parquet")
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {h}/dataset --text-vectors 6", h=home)
    run("tokenize --dataset {h}/dataset --out {h}/catalog rq-kmeans --level-sizes 6 4 --iterations 2", h=home)
    run("train --dataset {h}/dataset --catalog {h}/catalog --out {h}/model --max-history 6 --row-length 8 --epochs 1 "
        "--batch-size 8 rq-transformer --dim 8 --heads 2 --layers 1 --hidden 8", h=home)  # fmt: skip
    run("evaluate --model {h}/model --dataset {h}/dataset --beam-size 20", h=home)
    run("package --model {h}/model --metrics {h}/metrics.json --license apache-2.0 --out {h}/handed_over", h=home)
    return home


@pytest.fixture(scope="module")
def folder(home) -> Path:
    return home / "handed_over"


@pytest.fixture(scope="module")
def recommender(home) -> Recommender:
    return Recommender.from_pretrained(home / "model")


def _front(card: str) -> dict:
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def test_the_folder_holds_what_is_needed_and_no_state_of_training(home, folder):
    assert _files(folder) == FILES | {"metrics.json"}
    manifest, trained = (artifacts.read_artifact(path, "model") for path in (folder, home / "model"))
    assert manifest.parents == {**trained.parents, "model": trained.digest}
    assert json.loads((folder / "training.json").read_text())["digest"] == trained.digest
    assert (manifest.seed, manifest.config, manifest.devices) == (trained.seed, trained.config, trained.devices)
    assert str(home) not in "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))


def test_it_recommends_as_the_model_does(folder, recommender):
    again = Recommender.from_pretrained(folder)
    for k, options in ((5, {}), (ITEMS, {"exclude_seen": True})):
        expected = recommender.recommend(HISTORIES, k=k, **options)
        found = again.recommend(HISTORIES, k=k, **options)
        assert found.item_ids == expected.item_ids
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_it_loads_elsewhere_on_another_number_of_devices(folder, recommender, tmp_path):
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    program = (
        "import jax, json, sys, semid\n"
        "made = semid.Recommender.from_pretrained(sys.argv[1]).recommend(json.loads(sys.argv[2]), k=5)\n"
        "print(json.dumps([jax.device_count(), made.item_ids]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, elsewhere, json.dumps(HISTORIES)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert jax.device_count() == 8
    assert json.loads(answer.stdout) == [2, recommender.recommend(HISTORIES, k=5).item_ids]


def test_its_tokenizer_encodes_as_the_original(home, folder):
    vectors = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    codes = SemanticTokenizer.from_pretrained(folder).encode(vectors)
    assert SemanticTokenizer.from_pretrained(folder).columns == ("text_lsa",)
    np.testing.assert_array_equal(codes, SemanticTokenizer.from_pretrained(home / "catalog").encode(vectors))
    known = SemanticTokenizer.from_pretrained(folder).encode(Dataset.load(home / "dataset").vectors("text_lsa"))
    np.testing.assert_array_equal(known, SemanticCatalog.read(folder / "catalog.parquet").codes[:, :2])
    assert len(np.unique(codes, axis=0)) > 3


def test_the_card_has_the_numbers_of_the_metrics_and_of_the_data(home, folder):
    card, metrics = (folder / "README.md").read_text(), json.loads((home / "metrics.json").read_text())
    front, own = _front(card), metrics["rows"][0]
    trained = artifacts.read_artifact(home / "model", "model")
    assert (front["library_name"], front["license"]) == ("semid", "apache-2.0")
    assert "pipeline_tag" not in front  # the hub has none for recommendation
    (result,) = front["model-index"][0]["results"]
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    names = [f"{name}@{k}" for k in (5, 10) for name in ("recall", "ndcg")] + ["mrr", "coverage@10"]
    assert found == {name: own[name] for name in names}
    for row in metrics["rows"]:
        shown = "**this model**" if row is own else row["model"]
        assert f"| {shown} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |\n" in card
    provenance = metrics["provenance"]
    for said in (
        f"{provenance['examples']} examples: test split of dataset, by LeaveOneOut.",
        "against the whole catalogue of 40 items: no sampled negatives",
        "Items of the history are included.",
        "Search with 20 beams.",
        f"{trained.created[:10]} on {trained.devices}, seed 0, semid",
        "One training, seed 0:",
        artifacts.read_artifact(home / "dataset", "dataset").digest,
        f"| interactions | {provenance['interactions']} |",
    ):
        assert said in card, said
    assert "simulated" not in card
    assert "No metrics" not in card


def test_the_hub_reads_the_card(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "semid"
    assert {result.metric_type for result in card.data.eval_results} >= {"recall@10", "ndcg@10"}


def test_metrics_come_from_python_too_and_stay_when_it_is_handed_on(home, folder, recommender, tmp_path):
    table = pa.table({"history": [["i1"], ["i2", "i3"]], "target": ["i3", "i1"]})
    with pytest.warns(UserWarning, match="1 of 2 targets"):
        found = evaluate(recommender, table, ks=(3,), beam_size=20, allowed=recommender.allow(["i1", "i2", "i5"]))
    assert found.provenance["popularity_of"] == "training"
    about = found.provenance["model"]
    for name, said in (("origin", "of another model"), ("catalog", "of another version of the catalogue")):
        other = replace(found, provenance=found.provenance | {"model": about | {name: "f00"}})
        with pytest.raises(SemidError, match=f"these metrics are {said}"):
            recommender.save_pretrained(tmp_path / "a", metrics=other)
    with pytest.raises(SemidError, match=r"these metrics: the model was asked for \['event'\]"):
        recommender.save_pretrained(
            tmp_path / "a", metrics=replace(found, provenance=found.provenance | {"own_conditions": ["event"]})
        )
    recommender.save_pretrained(tmp_path / "a", metrics=found)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "2 examples: held-out table of table." in card
    assert "the 3.0 items of 40 that a mask allowed" in card
    assert "1 targets could not be recommended" in card
    metrics = _front(card)["model-index"][0]["results"][0]["metrics"]
    assert {"type": "recall@3", "value": found.values["recall@3"]} in metrics
    again = Recommender.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == card
    assert artifacts.read_artifact(tmp_path / "b", "model").parents["model"] == recommender.origin.manifest.digest
    again.save_pretrained(tmp_path / "b", metrics=home / "metrics.json")  # of the model that this one was made from


def test_without_metrics_the_card_says_so(recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No metrics were given" in card
    assert set(_front(card)) == {"library_name", "tags"}
    assert _files(tmp_path / "out") == FILES


def test_metrics_of_another_model_are_refused(home, recommender, tmp_path):
    metrics = artifacts.read_sealed(home / "metrics.json")
    metrics["provenance"]["models"] = {"runs/other": "0123456789abcdef"}
    artifacts.write_json(tmp_path / "metrics.json", metrics)
    with pytest.raises(SemidError, match=r"metrics.json: measures runs/other \(0123456789ab\), not this model"):
        recommender.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")
    artifacts.write_json(tmp_path / "metrics.json", {"rows": []})
    with pytest.raises(SemidError, match="expected split, rows and provenance"):
        recommender.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")
    assert not (tmp_path / "out").exists()


def test_of_two_models_measured_together_each_gets_its_own(home, recommender, tmp_path):
    metrics = artifacts.read_sealed(home / "metrics.json")
    row, digest = metrics["rows"][0], recommender.origin.manifest.digest
    metrics["rows"].insert(0, {**row, "model": "other", "recall@5": 0.875})
    metrics["provenance"]["models"] = {"secret/other": "f00", "secret/model": digest}
    artifacts.write_json(tmp_path / "metrics.json", metrics)
    recommender.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [r["model"] for r in written["rows"]] == ["semid", "popularity", "bigram"]
    assert written["rows"][0] == row
    assert written["provenance"]["models"] == {"model": digest}
    assert list(written["provenance"]["beam_against_exact"]) == ["semid"]
    row["model"] = "secret/model"  # as `semid evaluate` names models of one kind whose folders have one name
    metrics["rows"][:2] = [{**row, "model": "secret/other/model"}, row]
    for name in ("beam_against_exact", "half_width_95"):
        own = metrics["provenance"][name].pop("semid")
        metrics["provenance"][name] |= {"secret/other/model": own, "secret/model": own}
    metrics["provenance"]["models"] = {"secret/other/model": "f00", "secret/model": digest}
    artifacts.write_json(tmp_path / "metrics.json", metrics)
    recommender.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")
    text = (tmp_path / "out" / "metrics.json").read_text()
    assert "secret" not in text
    assert list(json.loads(text)["provenance"]["half_width_95"]) == ["model"] == [json.loads(text)["rows"][0]["model"]]


def test_a_later_version_is_handed_over_with_its_own_metrics_or_none(home, tmp_path):
    catalog = shutil.copytree(home / "catalog", tmp_path / "catalog")
    run("catalog remove --catalog {c} --items i3", c=catalog)
    run("package --model {h}/handed_over --catalog {c} --out {o}", h=home, c=catalog, o=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert "recommends the 39 items of its catalogue" in card
    later = Recommender.from_pretrained(tmp_path / "out")
    assert "i3" not in later.recommend([["i1"]], k=ITEMS).item_ids[0]
    updated = Recommender.from_pretrained(home / "model", catalog=catalog)
    with pytest.raises(SemidError, match="measures another version of the catalogue"):
        updated.save_pretrained(tmp_path / "refused", metrics=home / "metrics.json")
    metrics = artifacts.read_sealed(home / "metrics.json")
    metrics["provenance"]["catalog"] = updated.catalog.digest  # as `semid evaluate --catalog` writes it
    artifacts.write_json(tmp_path / "metrics.json", metrics)
    updated.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")
    assert (tmp_path / "out" / "metrics.json").exists()
    with pytest.raises(SemidError, match="measures another version of the catalogue"):
        Recommender.from_pretrained(home / "model").save_pretrained(
            tmp_path / "refused", metrics=tmp_path / "metrics.json"
        )


def test_a_failure_in_the_middle_leaves_nothing_or_the_old_folder(recommender, tmp_path, monkeypatch):
    recommender.save_pretrained(tmp_path / "old")
    before = artifacts.read_artifact(tmp_path / "old", "model")

    def fail(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handover, "model_card", fail)  # the last file to be written
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            recommender.save_pretrained(tmp_path / name, license="mit")
    assert {path.name for path in tmp_path.iterdir()} == {"old"}
    assert artifacts.read_artifact(tmp_path / "old", "model") == before
    monkeypatch.undo()
    recommender.save_pretrained(tmp_path / "old", license="mit")  # control: it would have been replaced
    assert artifacts.read_artifact(tmp_path / "old", "model").digest != before.digest


def test_what_else_stands_there_is_never_replaced(home, recommender, tmp_path):
    with pytest.raises(SemidError, match="loaded from here; choose another folder"):
        recommender.save_pretrained(home / "model")
    shutil.copytree(home / "model", tmp_path / "other")
    with pytest.raises(SemidError, match="in use by a model that `semid train` wrote"):
        recommender.save_pretrained(tmp_path / "other")
    with pytest.raises(SemidError, match="in use by a catalog artifact"):
        recommender.save_pretrained(home / "catalog")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").touch()
    with pytest.raises(SemidError, match="in use by something"):
        recommender.save_pretrained(tmp_path / "thesis")
    assert (home / "model" / "history.jsonl").exists()


def _break(folder: Path, how: str, home: Path) -> None:
    if how == "edited":
        (folder / "metrics.json").write_text('{"rows": []}')
    elif how == "missing":
        (folder / "items.safetensors").unlink()
    else:  # sealed again by somebody who knows how
        catalog = SemanticCatalog.read(folder / "catalog.parquet")
        sizes = (*catalog.level_sizes[:-1], catalog.level_sizes[-1] + 1)
        SemanticCatalog(catalog.item_ids, catalog.codes, sizes, catalog.tie_break).write(folder / "catalog.parquet")
        made = artifacts.read_sealed(folder / "manifest.json")
        made["files"]["catalog.parquet"] = artifacts.sha256(folder / "catalog.parquet")
        made.pop("digest")
        artifacts.write_json(folder / "manifest.json", artifacts.sealed(made | {"digest": Manifest(**made).digest}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("edited", "metrics.json: content does not match its sha256"),
        ("missing", "items.safetensors: listed in manifest.json but missing"),
        ("other level sizes", "the model was trained on the codes of another catalogue"),
    ],
)
def test_a_broken_folder_gets_one_clear_line(home, folder, tmp_path, how, says, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    _break(broken, how, home)
    with pytest.raises(SystemExit):
        run("recommend --model {b} --history i1", b=broken)
    printed = capsys.readouterr().err.strip()
    assert says in printed
    assert "\n" not in printed


def test_the_card_may_be_edited_and_is_written_anew(folder, tmp_path):
    edited = shutil.copytree(folder, tmp_path / "edited")
    (edited / "README.md").write_text("# Best model ever\n")
    Recommender.from_pretrained(edited).save_pretrained(tmp_path / "on", license="apache-2.0")
    assert (tmp_path / "on" / "README.md").read_text() == (folder / "README.md").read_text()


def test_what_changed_after_loading_is_not_handed_over(home, tmp_path):
    model = Recommender.from_pretrained(shutil.copytree(home / "model", tmp_path / "model"))
    (tmp_path / "model" / "dataset.json").write_text("{}")
    with pytest.raises(SemidError, match=r"dataset\.json: changed since .* was loaded"):
        model.save_pretrained(tmp_path / "out")
    (tmp_path / "model" / "dataset.json").unlink()
    with pytest.raises(SemidError, match=r"dataset\.json: gone since .* was loaded"):
        model.save_pretrained(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_recommender_made_in_memory_is_handed_over_too(recommender, tmp_path):
    bare = recommender.with_model(recommender.model)
    bare.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not recorded." in card
    assert "this folder cannot encode new items" in card
    assert "| trained |" not in card
    again = Recommender.from_pretrained(tmp_path / "out")
    assert again.origin.manifest.parents == {"dataset": recommender.origin.manifest.parents["dataset"]}
    assert again.recommend(HISTORIES).item_ids == recommender.recommend(HISTORIES).item_ids
    with pytest.raises(SemidError, match="no tokenizer came with it; encode with what made the codes"):
        SemanticTokenizer.from_pretrained(tmp_path / "out")


NASTY = 'a|b`*_[x](y)<script>\n---\n# "q": \\ \u2028{{ evil }} \x00\x85 \U0001f600'


def test_names_break_neither_markdown_nor_yaml(folder):
    read = {name: json.loads((folder / name).read_text()) for name in ("config.json", "dataset.json", "metrics.json")}
    dataset, metrics = read["dataset.json"], read["metrics.json"]
    dataset["name"] = metrics["provenance"]["dataset"] = NASTY
    dataset["source"] = "simulated"
    dataset["statistics"][NASTY] = NASTY
    metrics["rows"][1]["model"] = NASTY
    catalog = SemanticCatalog(pa.array([NASTY, "i1"]), np.array([[0], [1]], np.int32), (2,))
    training = {"created": NASTY, "devices": NASTY, "packages": {"semid": "1", "jax": "2"}, "seed": 3}
    tokenizer = {"method": {"type": NASTY}, "columns": [NASTY]}
    options = {"spec": read["config.json"], "catalog": catalog, "parameters": 1, "training": training}
    card = model_card(**options, dataset=dataset, metrics=metrics, tokenizer=tokenizer, license=NASTY)
    front = _front(card)
    assert front["license"] == front["model-index"][0]["results"][0]["dataset"]["name"] == plain(NASTY)
    assert plain(NASTY) == 'a|b`*_[x](y)<script> --- # "q": \\ {{ evil }} \U0001f600'
    assert card.count(markdown(NASTY)) == 8
    assert "<script>" not in card.split("\n---\n", 1)[1]
    tables = [line for line in card.splitlines() if line.startswith("| a")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in tables[:1])
    assert "The data are simulated" in card
    assert "not for use" in card
    assert 'history = ["i1"]' in card  # the id that needs no quotes


def test_the_page_tells_the_truth(folder, tmp_path, monkeypatch, capsys):
    """Its code runs as it stands, its files are those there are, and its command is one."""
    page = (ROOT / "docs" / "packaging.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "package")
    pq.write_table(pa.table({"history": [["i1"], ["i9"]], "target": ["i2", "i7"]}), tmp_path / "held_out.parquet")
    names = {"vectors": np.zeros((2, 6), np.float32)}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert [len(block.split("\n\n")[-1].splitlines()) for block in blocks] == [
        4,
        1,
    ]  # five lines and two, imports included
    with pytest.warns(UserWarning, match="1 of 2 targets are not allowed"):
        exec(blocks[0], names)
    assert capsys.readouterr().out.split()[1] == "1"
    exec(blocks[1], names)
    assert names["codes"].shape == (2, 2)
    table = page[page.index("| file |") : page.index("The folder is written")]
    assert set(re.findall(r"`([\w./]+\.\w+)`", table)) == FILES | {"metrics.json"}


def test_pushing_uploads_what_saving_writes(recommender, home, monkeypatch):
    import huggingface_hub

    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["repo"] = (repo_id, options)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, **options):
            calls["upload"] = options
            calls["files"] = artifacts.read_artifact(folder_path, "model").files
            return type("Commit", (), {"commit_url": "https://hub/org/name/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    options = {"private": True, "revision": "next", "token": "t", "message": "First"}
    address = recommender.push_to_hub("org/name", metrics=home / "metrics.json", **options)
    assert address == "https://hub/org/name/commit/1"
    assert calls["repo"] == ("org/name", {"private": True, "exist_ok": True})
    deleted = calls["upload"].pop("delete_patterns")
    assert calls["upload"] == {"repo_id": "org/name", "commit_message": "First", "revision": "next"}
    assert [name for name in calls["files"] if not any(fnmatch(name, pattern) for pattern in deleted)] == ["README.md"]
    assert not any(fnmatch("LICENSE", pattern) for pattern in deleted)
    assert set(calls["files"]) == (FILES | {"metrics.json"}) - {"manifest.json"}
    for error in (OSError("403\nForbidden"), huggingface_hub.errors.HTTPError("403\nno network")):
        monkeypatch.setattr(Api, "upload_folder", lambda self, error=error, **_: (_ for _ in ()).throw(error))
        with pytest.raises(SemidError, match=r"org/name: not uploaded \(403\)$"):
            recommender.push_to_hub("org/name")


def test_a_repository_is_downloaded_where_there_is_no_such_folder(folder, recommender, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        if repo_id == "org/gone":
            raise OSError("404: no repository\nmore")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = Recommender.from_pretrained("org/name", revision="v1")
    assert found.recommend(HISTORIES).item_ids == recommender.recommend(HISTORIES).item_ids
    with pytest.raises(SemidError, match=r"^org/gone: no such folder, and not available from the hub \(404: no repo"):
        Recommender.from_pretrained("org/gone")
    assert asked == [("org/name", "v1"), ("org/gone", None)]
    (tmp_path / "runs").mkdir()
    for path in ("runs/typo", Path("org/name"), "a/b/c", "./name", "../x", "name"):  # paths, and no such folder
        with pytest.raises(SemidError, match="no such artifact"):
            Recommender.from_pretrained(path)
    with pytest.raises(SemidError, match="revision 'v1' is for repositories of the hub"):
        Recommender.from_pretrained(folder, revision="v1")
    assert len(asked) == 2


def test_without_the_extra_one_line_names_it(recommender, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SemidError, match=r"pip install 'semid\[hub\]'$"):
        recommender.push_to_hub("org/name")
    with pytest.raises(SemidError, match="org/name: no such artifact"):
        Recommender.from_pretrained("org/name")
