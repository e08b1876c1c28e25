"""The command line from two Parquet files to a report, and what every kind of bad input is answered with."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from quantizers import OverusedGumbel, Schedule
from semid import artifacts
from semid.catalog import SemanticCatalog, read_tokens
from semid.cli import main
from semid.cli.evaluate import hints, metrics_table
from semid.cli.tokenize import Tokenize
from semid.cli.verbosity import LOGGER, log_lines
from semid.config import choices
from semid.data import Dataset
from semid.recommender import Recommender
from semid.tokenizers import CooccurrenceConfig, LetterConfig, SemanticTokenizer, TokenizerMethod

ITEMS = 40
TOKENIZER = "rq-vae --level-sizes 6 4 --hidden 8 --latent 4 --epochs 2 --batch-size 16"
GENERATOR = "--max-history 6 --row-length 8 --epochs 2 --batch-size 8"
BACKBONE = "--dim 8 --heads 2 --layers 1 --hidden 8"


def run(line: str, **paths: Path) -> None:
    """`semid` with these words; `{name}` stands for a path, whatever it is made of."""
    main([word.format(**paths) for word in line.split()])


def _write_tables(folder: Path) -> None:
    rng = np.random.default_rng(0)
    titles = [f"word{row % 5} thing{row % 3} plain" for row in range(ITEMS)]
    pq.write_table(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "title": titles}), folder / "I.parquet")
    rows = [(f"u{u}", f"i{(u + rng.integers(4)) % ITEMS}", at) for u in range(24) for at in range(rng.integers(4, 9))]
    users, items, times = zip(*rows, strict=True)
    interactions = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    pq.write_table(interactions, folder / "X.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with dataset, catalogue, model and metrics."""
    home = tmp_path_factory.mktemp("run")
    _write_tables(home)
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {h}/dataset --text-vectors 6", h=home)
    run(f"tokenize --dataset {{h}}/dataset --out {{h}}/catalog {TOKENIZER}", h=home)
    run(f"train --dataset {{h}}/dataset --catalog {{h}}/catalog --out {{h}}/model {GENERATOR} "
        f"rq-transformer {BACKBONE}", h=home)  # fmt: skip
    run("evaluate --model {h}/model --dataset {h}/dataset --split test --beam-size 20", h=home)
    return home


def _tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_stage_leaves_its_artifact_and_no_other_file(home):
    kinds = {"dataset": "dataset", "catalog": "catalog", "model": "model"}
    made = {name: artifacts.read_artifact(home / name, kind) for name, kind in kinds.items()}
    assert made["catalog"].parents == {"dataset": made["dataset"].digest}
    assert made["model"].parents == {name: made[name].digest for name in ("dataset", "catalog")}
    files = {"I.parquet", "X.parquet", "dataset", "catalog", "model", "metrics.json", "examples.json", "users.parquet"}
    assert {path.name for path in home.iterdir()} - {"report.html"} == files
    dataset = Dataset.load(home / "dataset")
    assert dataset.vectors("text_lsa").shape == (ITEMS, 6)
    assert SemanticCatalog.read(home / "catalog" / "catalog.parquet").item_ids.equals(dataset.item_ids)


def test_metrics_have_the_form_that_the_report_reads(home):
    metrics = json.loads((home / "metrics.json").read_text())
    assert metrics["split"] == "test"
    assert [row["model"] for row in metrics["rows"]] == ["semid", "popularity", "bigram"]
    for row in metrics["rows"]:
        assert {"recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr", "coverage@10", "valid"} <= set(row)
        assert 0 <= row["recall@5"] <= row["recall@10"] <= 1
        assert "seen" not in row
    assert [row["model"] for row in metrics["lists"]["rows"]] == ["semid", "popularity", "bigram"]
    assert {"novelty", "diversity", "code_diversity", "serendipity"} <= set(metrics["lists"]["rows"][0])
    assert metrics["provenance"]["models"] == {
        str(home / "model"): artifacts.read_artifact(home / "model", "model").digest
    }
    users = json.loads((home / "examples.json").read_text())
    assert {"user", "history", "target", "recommendations"} == set(users[0])
    values = {row["model"]: row["ndcg@10"] for row in metrics["rows"]}
    per_user = pq.read_table(home / "users.parquet")
    for name, value in values.items():
        np.testing.assert_allclose(per_user[f"ndcg@10:{name}"].to_numpy().mean(), value, atol=1e-6)
    rival = max(("popularity", "bigram"), key=lambda name: values[name])
    compared = [user["against"] for user in users if "against" in user]
    assert compared
    assert all(one["model"] == rival and one["ours"] != one["theirs"] for one in compared)


def test_figures_without_seen_items_say_so(home, tmp_path, capsys):
    run("evaluate --model {h}/model --dataset {h}/dataset --split validation --ks 3 --exclude-seen --beam-size 20 "
        "--out {t}/new/m.json", h=home, t=tmp_path)  # fmt: skip
    metrics = json.loads((tmp_path / "new" / "m.json").read_text())
    assert metrics["split"] == "validation"
    assert all(row["seen"] == "excluded" for row in metrics["rows"])
    for user in json.loads((tmp_path / "new" / "examples_m.json").read_text()):
        assert not {entry["item_id"] for entry in user["recommendations"]} & set(user["history"])
    printed = capsys.readouterr().out
    assert "R@3" in printed  # not cut off at 80 characters
    assert "…" not in printed


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--split validation", "metrics_validation.json"),
        ("--exclude-seen", "metrics_seen_excluded.json"),
        ("--split validation --exclude-seen", "metrics_validation_seen_excluded.json"),
    ],
)
def test_figures_of_other_kinds_have_files_of_their_own(home, tmp_path, options, name):
    shutil.copytree(home / "model", tmp_path / "model")
    run(f"evaluate --model {{t}}/model --dataset {{h}}/dataset --beam-size 20 {options}", h=home, t=tmp_path)
    users = f"users_{Path(name).stem}.parquet"
    assert {path.name for path in tmp_path.iterdir()} == {"model", name, users}  # examples go with metrics.json


def test_what_was_measured_before_is_read(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("semid.evaluation.compare", lambda *_, **__: pytest.fail("measured again"))
    line = "evaluate --model {h}/model --dataset {h}/dataset --split test --beam-size 20"
    before = _tree(home)
    run(line, h=home)
    printed = capsys.readouterr().out
    assert f"{home}/metrics.json: measured before" in printed
    row = json.loads((home / "metrics.json").read_text())["rows"][0]
    assert f"{row['recall@10']:.4f}" in printed
    deviation = float(np.std(pq.read_table(home / "users.parquet")["recall@10:semid"].to_numpy()))
    half = 1.96 * deviation / math.sqrt(len(pq.read_table(home / "users.parquet")))
    assert f"semid: R@10 {row['recall@10']:.4f} ± {half:.4f}, N@10 {row['ndcg@10']:.4f} ± " in " ".join(printed.split())
    assert _tree(home) == before
    for other in (line.replace("20", "21"), f"{line} --ks 5"):  # controls: another request, and a file that is gone
        shutil.copy(home / "metrics.json", tmp_path / "m.json")
        with pytest.raises(pytest.fail.Exception):
            run(f"{other} --out {{t}}/m.json", h=home, t=tmp_path)
    with pytest.raises(pytest.fail.Exception):
        run(f"{line} --out {{t}}/m.json", h=home, t=tmp_path)  # without its examples


@pytest.mark.filterwarnings("ignore:level . has .* codes, not 16")
def test_what_the_data_choose_is_printed_and_recorded(home, tmp_path, capsys, monkeypatch):
    run("tokenize --dataset {h}/dataset --out {t}/c rq-kmeans", h=home, t=tmp_path)
    assert f"by {ITEMS} items: method.level_sizes: [] -> [16, 16, 16]\n" in capsys.readouterr().out
    recorded = artifacts.read_artifact(tmp_path / "c", "catalog").config["tokenizer"]["method"]
    assert recorded["level_sizes"] == [16, 16, 16]
    made: list[dict] = []

    def stage(request, *_, **__):
        made.append(request.settings)
        return Recommender.from_pretrained(home / "model")

    monkeypatch.setattr("semid.generators.training.run_stage", stage)
    run("train --dataset {h}/dataset --catalog {h}/catalog --out {t}/m", h=home, t=tmp_path)
    generator = made[-1]["generator"]
    assert (generator["training"]["epochs"], generator["model"]["backbone"]["dropout"]) == (216.0, 0.3)
    printed = " ".join(capsys.readouterr().out.split())
    chosen = "model.backbone.dropout: None -> 0.3, objective.repeats: None -> True, training.epochs: None -> 216.0"
    assert f"by 104 training interactions, targets seen before: 40 of 80: {chosen}" in printed
    named = "--epochs 2 --dropout 0.5 --repeats True"
    run(f"train --dataset {{h}}/dataset --catalog {{h}}/catalog --out {{t}}/m {named}", h=home, t=tmp_path)
    assert "training interactions" not in capsys.readouterr().out


def test_models_below_the_baselines_are_told_what_to_try():
    rows = [
        {"model": name, "ndcg@5": 0.9, "ndcg@10": value}
        for name, value in {"a": 0.1, "b": 0.25, "c": 0.3, "popularity": 0.2, "bigram": 0.3, "oracle": 0.25}.items()
    ]
    first, second = hints(rows, (5, 10))
    assert first.startswith("a: NDCG@10 0.1000 is below popularity (0.2000) and bigram (0.3000); try more --epochs, ")
    assert first.endswith("a smaller --dim, or other --features")  # a dense model
    with_codes = hints([{**row, "code_recall@10": 0.5} for row in rows], (5, 10))
    assert with_codes[0].endswith("where many items share codes, or `semid train sasrec`")
    assert second.startswith("b: NDCG@10 0.2500 is below bigram (0.3000); try")
    assert hints(rows[2:], (5, 10)) == []
    graph = {"model": "item graph", "ndcg@10": 0.28}
    unmixed, _ = hints([*rows, graph], (5, 10))
    assert "and item graph (0.2800); mix it with the graph (`semid train --graph`), or try more --epochs" in unmixed
    mixed = hints([*rows, {"model": "a alone", "ndcg@10": 0.05}, graph], (5, 10))
    assert [("is below" in line, "--graph" in line) for line in (*mixed[:1], mixed[-1])] == [(True, False)] * 2
    assert hints([{"model": "m", "ndcg@3": 0.1}, {"model": "popularity", "ndcg@3": 0.2}], (1, 3))[0].startswith(
        "m: NDCG@3"
    )


def test_a_figure_of_no_example_is_an_empty_cell():
    row = {"model": "m", "recall@3": 0.5, "ndcg@3": 0.5, "mrr": 0.25, "coverage@3": 0.0}  # no item was asked for
    assert [list(column.cells) for column in metrics_table([row], (3,)).columns[-3:]] == [["0.2500"], ["0.0000"], [""]]


def test_a_model_of_the_hub_is_named_like_a_folder(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(home / "model"))
    line = "recommend --model {m} --history i1 -k 2 --beam-size 20"
    run(line, m=home / "model")
    expected = capsys.readouterr().out
    run(line, m="org/name")
    assert capsys.readouterr().out == expected
    assert "name a file with --out" in fails(capsys, "evaluate --model org/name --dataset {h}/dataset", h=home)
    run("package --model org/name --out {t}/package", t=tmp_path)
    assert artifacts.read_artifact(tmp_path / "package", "model")


def test_two_models_of_one_kind_are_told_apart(home, tmp_path):
    for name in ("a/model", "b/model"):
        shutil.copytree(home / "model", tmp_path / name)
    run(
        "evaluate --model {t}/a/model {t}/b/model --dataset {h}/dataset --beam-size 20 --out {t}/m.json",
        h=home,
        t=tmp_path,
    )
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["model"] for row in rows[:2]] == [str(tmp_path / "a/model"), str(tmp_path / "b/model")]
    assert {**rows[0], "model": ""} == {**rows[1], "model": ""}


def test_recommend_prints_what_the_library_recommends(home, capsys):
    top = Recommender.from_pretrained(home / "model").recommend([["i1", "i2"]], k=3, beam_size=20, exclude_seen=True)
    run("recommend --model {h}/model --history i1,i2 -k 3 --beam-size 20 --exclude-seen", h=home)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "<a_" in line]
    assert len(lines) == 3
    for line, item_id, score in zip(lines, top.item_ids[0], top.scores[0], strict=True):
        assert f" {item_id} " in line
        assert f"{score:.3f}" in line


def test_an_empty_history_is_answered(home, capsys):
    run("recommend --model {h}/model --history= -k 4 --beam-size 20", h=home)
    assert capsys.readouterr().out.count("<a_") == 4


def test_unknown_items_are_counted_and_dropped_on_request(home, capsys):
    run("recommend --model {h}/model --history i1,zz,yy -k 2 --beam-size 20 --skip-unknown", h=home)
    printed = capsys.readouterr().out
    assert "dropped 2 unknown of 3 items of the history" in printed
    run("recommend --model {h}/model --history i1 -k 2 --beam-size 20", h=home)
    assert printed.endswith(capsys.readouterr().out)


@pytest.mark.parametrize(("format", "name"), [("json", "c.json"), ("hf-tokens", "c.json"), ("tsv", "c.tsv")])
def test_exported_codes_come_back_as_a_catalogue(home, tmp_path, format, name):
    run(f"export --catalog {{h}}/catalog --format {format} --out {{t}}/{name}", h=home, t=tmp_path)
    run(f"import-codes --codes {{t}}/{name} --dataset {{h}}/dataset --out {{t}}/c --tie-break", h=home, t=tmp_path)
    ours, theirs = (SemanticCatalog.read(folder / "catalog.parquet") for folder in (home / "catalog", tmp_path / "c"))
    assert theirs.item_ids.equals(ours.item_ids)
    assert theirs.tie_break
    np.testing.assert_array_equal(theirs.codes, ours.codes)


def test_imported_codes_follow_the_items_of_the_dataset(home, tmp_path, capsys):
    """The index is in another order, and knows an item more: the rows are the dataset's."""
    run("export --catalog {h}/catalog --format json --out {t}/codes.json", h=home, t=tmp_path)
    index = json.loads((tmp_path / "codes.json").read_text())
    shuffled = {"more": index["i0"]} | {key: index[key] for key in sorted(index, reverse=True)}
    (tmp_path / "codes.json").write_text(json.dumps(shuffled))
    run("import-codes --codes {t}/codes.json --dataset {h}/dataset --out {t}/c", h=home, t=tmp_path)
    assert f"left out 1 items of {tmp_path}/codes.json that the dataset does not have" in capsys.readouterr().out
    ours, theirs = (SemanticCatalog.read(folder / "catalog.parquet") for folder in (home / "catalog", tmp_path / "c"))
    np.testing.assert_array_equal(theirs.codes, ours.codes)


def test_a_history_of_unknown_items_alone_is_answered_with_popularity(home, capsys):
    run("recommend --model {h}/model --history zz,yy -k 2 --beam-size 20 --skip-unknown", h=home)
    head, _, table = capsys.readouterr().out.partition("no known item left: the most popular of training\n")
    assert head == "dropped 2 unknown of 2 items of the history\n"
    run("recommend --model {h}/model --history= -k 2 --beam-size 20 --skip-unknown", h=home)
    assert capsys.readouterr().out == table


def test_parquet_export_is_the_catalogue(home, tmp_path, capsys):
    run("export --catalog {h}/catalog --format parquet --out {t}/[red]:x:.parquet", h=home, t=tmp_path)
    out = tmp_path / "[red]:x:.parquet"  # what rich would take for markup
    assert capsys.readouterr().out == f"wrote {out}: version 0, 40 items\n"  # on one line, however long
    read, made = (SemanticCatalog.read(f) for f in (out, home / "catalog" / "catalog.parquet"))
    np.testing.assert_array_equal(read.codes, made.codes)
    run("export --catalog {h}/catalog --format json --out {t}/c.json", h=home, t=tmp_path)
    assert read_tokens(tmp_path / "c.json").item_ids.equals(made.item_ids)


@pytest.mark.usefixtures("unchecked")
def test_a_program_is_written(home, tmp_path, capsys):
    run("export-program --model {h}/model --out {t}/program -k 3 --beam-size 20 --platforms cpu", h=home, t=tmp_path)
    assert f"program: {tmp_path}/program" in capsys.readouterr().out
    manifest = artifacts.read_artifact(tmp_path / "program", "program")
    assert manifest.config == {"k": 3, "beam_size": 20, "platforms": ["cpu"]}
    assert manifest.parents == {"model": artifacts.read_artifact(home / "model", "model").digest}


def test_the_report_is_one_file(home, capsys):
    run("report {h}", h=home)
    assert f"wrote {home}/report.html" in capsys.readouterr().out
    assert "popularity" in (home / "report.html").read_text()


def test_stages_that_are_current_are_skipped_and_say_so(home, capsys):
    before = _tree(home)
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {h}/dataset --text-vectors 6", h=home)
    run(f"tokenize --dataset {{h}}/dataset --out {{h}}/catalog {TOKENIZER}", h=home)
    run(f"train --dataset {{h}}/dataset --catalog {{h}}/catalog --out {{h}}/model {GENERATOR} "
        f"rq-transformer {BACKBONE}", h=home)  # fmt: skip
    printed = capsys.readouterr()
    for kind in ("dataset", "catalog", "model"):
        line = f"{home}/{kind}: this {kind} exists, made with the same settings and inputs; skipped"
        assert line in printed.err
        assert line not in printed.out
    run(f"--quiet tokenize --dataset {{h}}/dataset --out {{h}}/catalog {TOKENIZER}", h=home)
    assert capsys.readouterr().err == ""
    assert _tree(home) == before


def test_a_simulated_world_and_k_means_and_sasrec(tmp_path, capsys):
    run("prepare simulated --out {t}/d --num-items 120 --num-users 60 --seed 3 --events", t=tmp_path)
    assert set(Dataset.load(tmp_path / "d").event.to_pylist()) == {"exposure", "click", "buy"}
    run("tokenize --dataset {t}/d --out {t}/c rq-kmeans --level-sizes 6 5", t=tmp_path)
    train = f"train --dataset {{t}}/d --catalog {{t}}/c {GENERATOR}"
    run(f"{train} --out {{t}}/ids --features sasrec {BACKBONE}", t=tmp_path)
    run(f"{train} --out {{t}}/content sasrec {BACKBONE}", t=tmp_path)
    run("evaluate --model {t}/ids {t}/content --dataset {t}/d --event-values click 1 buy 2.5", t=tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    rows = {row["model"]: row for row in written["rows"]}
    assert list(rows) == ["sasrec", "sasrec-content", "popularity", "bigram", "oracle"]
    assert rows["oracle"]["recall@10"] > rows["popularity"]["recall@10"]
    assert written["values"]["values"] == {"buy": 2.5, "click": 1.0, "exposure": 0.0}
    assert sum(written["values"]["targets"].values()) == 60
    assert [row["model"] for row in written["values"]["rows"]] == list(rows)
    assert all(0 <= row["value_score"] <= 1 for row in written["values"]["rows"])
    printed = capsys.readouterr().out
    assert "dataset simulated" in printed
    assert "targets by value: buy 2.5, click 1, exposure 0" in printed


@pytest.mark.parametrize("family", ["encoder-decoder --kv-heads 1", "flat --remat full", "hybrid --temperature 0.1"])
def test_other_families_and_a_teacher(home, tmp_path, family):
    options = GENERATOR.replace("--row-length 8", "--row-length 9").replace("--batch-size 8", "--batch-size 16")
    train = f"train --dataset {{h}}/dataset --catalog {{h}}/catalog {options}"
    run(f"{train} --out {{t}}/teacher sasrec {BACKBONE}", h=home, t=tmp_path)
    taught = "--normalization children --label-smoothing 0.1 --distillation 0.2 --accumulate 2 --fsdp 2"
    run(f"{train} --out {{t}}/m --teacher {{t}}/teacher {taught} {family} {BACKBONE}", h=home, t=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "m" / "history.jsonl").read_text().splitlines()]
    assert all(math.isfinite(r["loss/distillation"]) for r in records if "loss" in r)
    run("evaluate --model {t}/m --dataset {h}/dataset --beam-size 20", h=home, t=tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert rows[0]["model"] == family.split()[0]


def test_only_what_the_files_leave_is_recommended(home, tmp_path, capsys):
    (tmp_path / "stock.txt").write_text("i3\ni5\n\ni7\n")
    (tmp_path / "sold.txt").write_text("i5\n")
    line = "recommend --model {h}/model --history i1,i3 --allow {t}/stock.txt"
    for options, expected in (("", {"i3", "i5", "i7"}), (" --deny {t}/sold.txt --exclude-seen", {"i7"})):
        run(line + options, h=home, t=tmp_path)
        assert set(re.findall(r"\bi\d+\b", capsys.readouterr().out)) == expected
    (tmp_path / "sold.txt").write_text("i3\ni5\ni7\n")
    run(line + " --deny {t}/sold.txt", h=home, t=tmp_path)
    assert "no item is left to recommend" in capsys.readouterr().out
    (tmp_path / "stock.txt").write_text("i3\nnew\n")
    run(line + " --skip-unknown", h=home, t=tmp_path)
    shown = capsys.readouterr().out
    assert "dropped 1 unknown of 2 items of" in shown
    assert "i3" in shown


def test_a_tokenizer_aligned_with_a_trained_model(home, tmp_path, capsys):
    train = f"train --dataset {{h}}/dataset --catalog {{h}}/catalog {GENERATOR}"
    run(f"{train} --out {{t}}/teacher sasrec {BACKBONE}", h=home, t=tmp_path)
    line = (
        "tokenize --dataset {h}/dataset --out {t}/c --fsdp 2 --collisions popularity --alignment letter cooccurrence "
        "--signal model --teacher {t}/teacher --letter.weight.value 0.2 --letter.temperature 0.5 "
        f"--cooccurrence.weight.value 0.4 --cooccurrence.weight.initial 0 {TOKENIZER} --log-every 1"
    )
    run(line, h=home, t=tmp_path)
    assert "after popularity 0.0%" in " ".join(capsys.readouterr().out.split())
    made = artifacts.read_artifact(tmp_path / "c", "catalog")
    assert set(made.parents) == {"dataset", "teacher"}
    assert made.parents["teacher"] == artifacts.read_artifact(tmp_path / "teacher", "model").digest
    config = SemanticTokenizer.from_pretrained(tmp_path / "c").config
    assert config.alignment == (
        LetterConfig(Schedule(0.2), temperature=0.5),
        CooccurrenceConfig(Schedule(0.4, initial=0.0)),
    )
    assert config.columns == ("text_lsa",)  # the teacher's vectors are no content
    assert set(artifacts.read_json(tmp_path / "c" / "health.json")["collaborative"]) == {"codes", "content_only"}
    records = (tmp_path / "c" / "history.jsonl").read_text()
    assert "alignment/letter" in records
    assert "alignment/cooccurrence" in records
    run(line, h=home, t=tmp_path)
    assert "this catalog exists, made with the same settings and inputs; skipped" in capsys.readouterr().err


@pytest.mark.parametrize("method", choices(TokenizerMethod))
def test_every_quantizer_of_every_tokenizer_is_a_command(capsys, method):
    def told(words: str) -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            run(f"tokenize --out o {words} --help")
        return capsys.readouterr().out

    quantizers = re.findall(r"[a-z-]+", "".join(re.findall(r"\[\{(.+)\}\]\n", told(method))))
    assert ("gumbel" in quantizers) == (method == "rq-vae")
    for quantizer in quantizers:
        assert "--temperature.value" in told(f"{method} {quantizer}")


def test_schedules_have_options_of_their_own_next_to_those_of_training(monkeypatch):
    given: list[Tokenize] = []
    monkeypatch.setattr(Tokenize, "run", lambda self: given.append(self))
    run("tokenize --out o rq-vae --epochs 3 --learning-rate 0.5 overused-gumbel --threshold 2 --scale.value 0.1 "
        "--scale.initial 4 --temperature.until 0.5")  # fmt: skip
    method = given[0].config.method
    assert (method.training.epochs, method.training.optimizer.learning_rate) == (3, 0.5)
    expected = OverusedGumbel(threshold=2, scale=Schedule(0.1, initial=4), temperature=Schedule(1.0, until=0.5))
    assert method.assignments == (expected,)


def test_lists_are_limited_by_group_and_drawn_by_seed(home, tmp_path, capsys):
    titles = dict(zip(*pq.read_table(home / "I.parquet").to_pydict().values(), strict=True))

    def listed(options: str) -> list[str]:
        capsys.readouterr()
        run(f"recommend --model {{h}}/model --history i1 -k 6 --beam-size 20 {options}", h=home, t=tmp_path)
        return re.findall(r"│ (i\d+) +│", capsys.readouterr().out)

    for items in ("{h}/dataset", "{h}/I.parquet"):
        found = listed(f"--at-most title=1 --items {items}")
        assert len({titles[item] for item in found}) == len(found) == 6
    draws = [listed(f"--sample --temperature 2 --seed {seed}") for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert listed("--sample --temperature 1e-5") == listed("")


def test_later_files_may_name_columns_as_the_tables_that_were_prepared_do(home, tmp_path, capsys):
    names = {"item_id": "sku", "title": "name", "user_id": "customer"}
    for table in ("I", "X"):
        read = pq.read_table(home / f"{table}.parquet")
        own = [names.get(name, name) for name in read.column_names]
        pyarrow.csv.write_csv(read.rename_columns(own), tmp_path / f"{table}.csv")
    run("prepare csv --items {t}/I.csv --interactions {t}/X.csv --out {t}/dataset --text-vectors 6 --columns "
        + " ".join(f"{own}={theirs}" for own, theirs in names.items()), t=tmp_path)  # fmt: skip
    run("tokenize --dataset {t}/dataset --out {t}/catalog rq-kmeans --level-sizes 6 4", t=tmp_path)
    (tmp_path / "new.csv").write_text("sku,name\nn1,word1 thing2\nn2,word4 thing0\n")
    (tmp_path / "some.csv").write_text("sku,boost,maker\ni3,2,a\ni4,1e9,a\ni5,1,b\n")
    run("catalog append --catalog {t}/catalog --input {t}/new.csv", t=tmp_path)
    run("catalog remove --catalog {t}/catalog --file {t}/some.csv", t=tmp_path)
    catalog = SemanticCatalog.load(tmp_path / "catalog")
    assert catalog.item_ids.filter(pa.array(~catalog.active)).to_pylist() == ["i3", "i4", "i5"]
    assert catalog.find_rows(["n1", "n2"])[1].all()

    recommender = Recommender.from_pretrained(home / "model")
    recommender.catalog = replace(recommender.catalog, source_columns=catalog.source_columns | {"brand": "maker"})
    recommender.save_pretrained(tmp_path / "model")  # the catalogue of the model has them
    for options, expected in (
        ("--allow {t}/some.csv", {"i3", "i4", "i5"}),
        ("--allow {t}/some.csv --deny {t}/some.csv", set()),
        ("--allow {t}/some.csv --boosts {t}/some.csv --at-most brand=1 --items {t}/some.csv", {"i4", "i5"}),
        ("--allow {t}/some.csv --boosts {t}/some.csv --at-most maker=1 --items {t}/some.csv", {"i4", "i5"}),
    ):
        capsys.readouterr()
        run(f"recommend --model {{t}}/model --history i1 --beam-size 40 {options}", t=tmp_path)
        assert set(re.findall(r"│ (i\d+) +│", capsys.readouterr().out)) == expected, options


def test_a_teacher_of_another_split_is_refused(home, tmp_path, capsys):
    """The same items and interactions, but what is test here was trained on there."""
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {t}/d --text-vectors 6 "
        "global-time", h=home, t=tmp_path)  # fmt: skip
    capsys.readouterr()
    line = "tokenize --dataset {t}/d --out {t}/c --alignment letter --signal model --teacher {h}/model"
    assert f"{home}/model: trained on dataset digest" in fails(capsys, line, h=home, t=tmp_path)
    dataset = Dataset.load(home / "dataset")
    dataset.with_vectors("teacher", np.ones((dataset.num_items, 2), np.float32)).save(tmp_path / "t")
    said = fails(capsys, line.replace("{t}/d", "{t}/t"), h=home, t=tmp_path)
    assert "has a vector column 'teacher', the name of those of --teacher; rename it" in said


def fails(capsys, line: str, **paths: Path) -> str:
    """The one line on stderr of a command that exits with 1 and writes nothing under any of the paths."""
    before = [_tree(path) for path in paths.values()]
    with pytest.raises(SystemExit) as exit:
        run(line, **paths)
    error = capsys.readouterr().err
    assert exit.value.code == 1, error
    assert error.startswith("semid: ")
    assert error.count("\n") == 1, error
    assert [_tree(path) for path in paths.values()] == before
    return error


TRAIN = "train --dataset {h}/dataset --catalog {h}/catalog --out {t}/"
TOKENIZE = "tokenize --dataset {h}/dataset --out "
PREPARE = "prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out "
BAD = [
    ("recommend --model {h}/model --history i1,zz", r"unknown item id 'zz' \(1 of 2 unknown\).*--skip-unknown"),
    ("recommend --model {h}/model --history i1 -k 0", "expected k and beam_size of at least 1, got 0 and 50"),
    ("recommend --model {h}/model --history i1 --at-most title", "--at-most title: expected COLUMN=NUMBER, a whole"),
    ("recommend --model {h}/model --history i1 --items {h}/dataset", "--items has the groups of --at-most"),
    ("recommend --model {h}/model --history i1 --temperature 2", "are for random lists; add --sample"),
    ("recommend --model {h}/model --history i1 --seed 2", "--temperature and --seed are for random lists"),
    ("recommend --model {h}/model --history i1 --at-most title=0", "expected COLUMN=NUMBER, a whole number from 1"),
    ("recommend --model {h}/model --history i1 --at-most title=2 title=3", "title=3: title is given already .2.; give"),
    ("recommend --model {h}/model --history i1 --at-most title=1", "by 'title', and it has none; .*--items"),
    ("recommend --model {h}/model --history i1 --at-most titl=1 --items {h}/dataset", "did you mean 'title'"),
    ("recommend --model {h}/model --history i1 --sample --temperature 0", "expected a temperature above 0, got 0.0"),
    ("recommend --model {h}/catalog --history i1", "expected an artifact of kind 'model', found 'catalog'"),
    ("recommend --model {h}/nowhere --history i1", "nowhere: no such artifact"),
    ("tokenize --dataset {h}/nowhere --out {t}/c", "nowhere: no such artifact"),
    (TOKENIZE + "{h}/catalog --seed 9", r"in use by a catalog of other settings \(seed: 0 -> 9"),
    (TOKENIZE + "{h}/model", r"in use by a model artifact; choose another path \(--out\)"),
    (TOKENIZE + "{h}", "output folder in use by something that is no catalog artifact"),
    (TOKENIZE + "{h}/I.parquet/c", "I.parquet: is a file, and .* should go below it"),
    (TOKENIZE + "{t}/c --columns nope", "no vector column 'nope' in dataset 'dataset'"),
    (TOKENIZE + "{t}/c --alignment letter --signal model", "--signal model and --teacher FOLDER go together"),
    (TOKENIZE + "{t}/c --alignment letter --teacher {h}/model", "--signal model and --teacher FOLDER go together"),
    (TOKENIZE + "{t}/c --alignment das --letter.weight.value 5", "--letter.weight is for --alignment letter; give"),
    (TOKENIZE + "{t}/c --alignment letter --lightgcn.dim 9", r"--lightgcn.dim is for --signal lightgcn with --align"),
    (TOKENIZE + "{t}/c --ppmi.dim 9", r"--ppmi.dim is for --signal ppmi with --alignment das\|distill\|letter\|match;"),
    (TOKENIZE + "{t}/c --alignment letter --signal alpharec --alpharec.seed 3", "a signal is trained with --seed"),
    (TOKENIZE + "{t}/c --signal lightgcn --alignment cooccurrence", "--signal lightgcn is for das, distill, letter,"),
    (TOKENIZE + "{t}/c --signal model --teacher {h}/model", "--teacher is for das, distill, letter, match; name one"),
    (TOKENIZE + "{t}/c --alignment letter --signal model --teacher {h}/model",
     r"teacher .--teacher.: expected item vectors of a dense .* got a generator of codes, RQ-.*; name one"),
    (TOKENIZE + "{t}/c --alignment letter --signal model --teacher {h}/catalog",
     "expected an artifact of kind 'model', found 'catalog'"),
    (TOKENIZE + "{t}/c --alignment letter das letter " + TOKENIZER, "an alignment is named twice"),
    (TOKENIZE + "{t}/c --alignment letter " + TOKENIZER, "expected dim of 1 to .*, got 64; lower dim or take"),
    (TOKENIZE + "{t}/c --alignment letter rq-kmeans", "alignment .--alignment. is for .* and rq-kmeans does not; take"),
    (TOKENIZE + "{t}/c opq --level-sizes 4 4 4 4", "4 product codes cannot share 6 content dimensions equally"),
    (TOKENIZE + "{t}/c --collisions min-cost rq-kmeans --level-sizes 2 4",
     "items share all codes but the last .* or choose the collision policy tie-break"),
    (TRAIN + "m --row-length 4", "row_length, got 20 and 4"),
    (TRAIN + "a[0]/m sasrec --dim 8 --layers 1", "cannot go below a path with"),
    (TRAIN + "m --features nope", "no vector column 'nope'"),
    (TRAIN + "m --teacher {h}/model",
     r"got a generator of codes, RQ-Transformer of .*/model; name a teacher .* sasrec` wrote .--teacher"),
    ("train --dataset {h}/dataset --catalog {h}/model --out {t}/m",
     "expected an artifact of kind 'catalog', found 'model'"),
    ("evaluate --model --dataset {h}/dataset", "expected at least one model folder after --model, got none"),
    ("evaluate --model {h}/nowhere --dataset {h}/dataset", "nowhere: no such artifact"),
    ("evaluate --model {h}/model --dataset {h}/dataset --ks 0 --out {t}/new/m.json", "expected ks and batch_size"),
    ("evaluate --model {h}/model --dataset {h}/dataset --tags titel --out {t}/m.json", "no column 'titel' among"),
    ("evaluate --model {h}/model --dataset {h}/dataset --out {t}", "is a folder; name the file to write"),
    ("export --catalog {h}/catalog --format json --out {t}", "is a folder; name the file to write"),
    ("export --catalog {h}/catalog --format json --out {h}/I.parquet/x", "I.parquet"),
    ("export --catalog {h}/catalog --format tsv --base {t}/b --out {t}/o", "is for .* hf-tokenizer, not for tsv"),
    ("export --catalog {h}/catalog --format hf-tokenizer --base {t}/b --out {t}/o", "b: no such file"),
    ("export-program --model {h}/catalog --out {t}/p", "expected an artifact of kind 'model', found 'catalog'"),
    ("export-program --model {h}/model --out {h}/model", "in use by a model artifact"),
    ("export-program --model {h}/model --out {t}/p -k 0", "expected k and beam_size of at least 1, got 0 and 50"),
    ("export-program --model {h}/model --out {t}/p --sequences image={h}/catalog", "come with their catalogue: give"),
    ("import-codes --codes {h}/I.parquet --dataset {h}/dataset --out {t}/c",
     "I.parquet: expected token strings in an index.json"),
    ("import-codes --codes {h}/metrics.json --dataset {h}/dataset --out {t}/c",
     "metrics.json: item 'split': 'test' is no"),
    ("evaluate --model {h}/model --dataset {h}/dataset --out {t}/m.json --event-values click 1",
     "has no events that could have values; it needs a column 'event'"),
    ("report", "expected at least one run folder"),
    ("report {t}", "metrics.json: no such file; `semid evaluate"),
    ("prepare simulated --out {t}/d --num-items 3", "expected 72 items or more .*, got 3"),
    ("prepare simulated --out {t}/d --position-bias 1", "--position-bias needs clicks and purchases; add --events"),
    ("prepare simulated --out {t}/d --events --position-bias -1", "position_bias: expected 0 .none. or more, got -1"),
    (PREPARE + "{t}/d --text-vectors -1", "expected text_vectors of 0 .* or more, got -1"),
    (PREPARE + "{t}/d --columns title=a title=b", "--columns title=b: title is given already .a.; give it once"),
    (PREPARE + "{t}/d --encoder-tokens 9", "--encoder-tokens is for text encoders; name one after --encoder"),
    ("prepare tencentgr --release 1m --manual-dir {t} --out {t}/d --seed 1", "--seed is for a random choice of users"),
    ("prepare tencentgr --release 1m --manual-dir {t} --out {t}/d --item-ids {t}/i", "--item-ids is for embeddings"),
    (PREPARE + "{h}/dataset --text-vectors 5",
     r"in use by a dataset of other settings \(source.text_lsa.dim: 6 -> 5\)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[f"{line.split()[0]}-{n}" for n, (line, _) in enumerate(BAD)])
def test_bad_input_is_one_line_and_writes_nothing(home, tmp_path, capsys, line, message):
    assert re.search(message, fails(capsys, line, h=home, t=tmp_path))


WRITING = {
    "prepare simulated --out {t}/f/d": "semid.data.simulated.simulate",
    TOKENIZE + "{t}/f/c": "semid.tokenizers.SemanticTokenizer.fit_columns",
    "tokenize --catalog {h}/catalog --input {h}/v.parquet --out {t}/f/codes": "semid.bulk.scheduling.encode_file",
    TRAIN + "f/m": "semid.generators.training.fit_generator",
    "evaluate --model {h}/model --dataset {h}/dataset --out {t}/f/m.json": "semid.evaluation.compare",
    "export --catalog {h}/catalog --format json --out {t}/f/e": "semid.catalog.SemanticCatalog.tokens_of",
    "export-program --model {h}/model --out {t}/f/p": "semid.recommender.stablehlo.as_program",
    "import-codes --codes {h}/codes.tsv --dataset {h}/dataset --out {t}/f/c": "semid.cli.export._write_imported",
    "package --model {h}/model --out {t}/f/p": "semid.recommender.packaging.model_card",
    "report {h} --out {t}/f/r.html": "semid.report.page._section",
}


@pytest.mark.parametrize("line", WRITING, ids=[line.split()[0] for line in WRITING])
def test_the_place_is_tried_before_the_work(home, tmp_path, capsys, monkeypatch, line):
    monkeypatch.setattr(WRITING[line], lambda *_, **__: pytest.fail("the work was begun"))
    (tmp_path / "f").touch()
    if not (home / "codes.tsv").exists():
        run("export --catalog {h}/catalog --format tsv --out {h}/codes.tsv", h=home)
        capsys.readouterr()
    assert re.search(r"/f: is a file, and .*/f/.* should go below it", fails(capsys, line, h=home, t=tmp_path))


def test_figures_are_printed_though_they_cannot_be_written(home, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "write_json", full)
    with pytest.raises(SystemExit):
        run("evaluate --model {h}/model --dataset {h}/dataset --beam-size 20 --out {t}/m.json", h=home, t=tmp_path)
    assert re.search(r"semid +0\.\d{4}", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_home_and_links_of_every_output_are_followed(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    run("package --model {h}/model --out ~/link", h=home)
    run("export --catalog {h}/catalog --format tsv --out ~/link/codes.tsv", h=home)
    assert {"manifest.json", "codes.tsv"} <= {path.name for path in (tmp_path / "disk").iterdir()}
    assert (tmp_path / "link").is_symlink()


def test_an_empty_dataset(home, tmp_path, capsys):
    pq.write_table(pq.read_table(home / "X.parquet")[:0], tmp_path / "X.parquet")
    line = "prepare parquet --items {h}/I.parquet --interactions {t}/X.parquet --out {t}/d"
    assert "X.parquet: has no rows; expected at least one" in fails(capsys, line, h=home, t=tmp_path)


def test_an_empty_catalogue(home, tmp_path, capsys):
    (tmp_path / "codes.json").write_text("{}")
    line = "import-codes --codes {t}/codes.json --dataset {h}/dataset --out {t}/c"
    assert "codes.json: expected an object from item ids to code tokens, got {}" in fails(
        capsys, line, h=home, t=tmp_path
    )


def test_codes_that_lack_an_item(home, tmp_path, capsys):
    (tmp_path / "codes.json").write_text(json.dumps({f"i{row}": "<a_1>" for row in range(ITEMS - 1)}))
    line = "import-codes --codes {t}/codes.json --dataset {h}/dataset --out {t}/c"
    expected = f"codes.json: has no codes for 1 of the dataset's {ITEMS} items, such as 'i{ITEMS - 1}'; add them"
    assert expected in fails(capsys, line, h=home, t=tmp_path)


@pytest.mark.parametrize("kind", ["dataset", "catalog", "model"])
def test_a_changed_byte_and_a_newer_schema(home, tmp_path, capsys, kind):
    commands = {
        "dataset": "tokenize --dataset {t}/x --out {t}/out",
        "catalog": "train --dataset {h}/dataset --catalog {t}/x --out {t}/out",
        "model": "recommend --model {t}/x --history i1",
    }
    shutil.copytree(home / kind, tmp_path / "x")
    covered = [path for path in (tmp_path / "x").rglob("*") if path.name not in ("manifest.json", "config.yaml")]
    for file in sorted(path for path in covered if path.is_file()):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        error = fails(capsys, commands[kind], h=home, t=tmp_path)
        assert f"{file.name}: content does not match its sha256 in manifest.json" in error
        file.write_bytes(content)
    manifest = tmp_path / "x" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    assert "schema version 99 is newer than" in fails(capsys, commands[kind], h=home, t=tmp_path)


def test_a_catalogue_of_another_dataset(home, tmp_path, capsys):
    run("prepare simulated --out {t}/d --num-items 120 --num-users 60", t=tmp_path)
    capsys.readouterr()
    line = "train --dataset {t}/d --catalog {h}/catalog --out {t}/m"
    assert "made from dataset digest" in fails(capsys, line, h=home, t=tmp_path)
    line += " --other-dataset"
    assert "the catalogue's 40 items are not all of the dataset's 120" in fails(capsys, line, h=home, t=tmp_path)
    line = "evaluate --model {h}/model --dataset {t}/d --other-dataset --out {t}/m.json"
    assert "are not in the model's catalogue" in fails(capsys, line, h=home, t=tmp_path)


def test_a_model_is_measured_on_another_dataset_only_when_asked(home, tmp_path, capsys):
    """The same items and interactions, split otherwise: what is test here was trained on there."""
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {t}/d --text-vectors 6 "
        "global-time", h=home, t=tmp_path)  # fmt: skip
    trained, other = (
        artifacts.read_artifact(folder, "dataset").digest for folder in (home / "dataset", tmp_path / "d")
    )
    capsys.readouterr()
    line = "evaluate --model {h}/model --dataset {t}/d --beam-size 20 --out {t}/m.json"
    error = fails(capsys, line, h=home, t=tmp_path)
    assert f"{home}/model: trained on dataset digest {trained[:16]}, not on {tmp_path}/d of {other[:16]}" in error
    assert "--other-dataset" in error
    run(line + " --other-dataset", h=home, t=tmp_path)
    provenance = json.loads((tmp_path / "m.json").read_text())["provenance"]
    assert provenance["trained_on_other_dataset"] == {str(home / "model"): trained}
    run("evaluate --model {h}/model --dataset {h}/dataset --beam-size 20 --other-dataset --out {t}/own.json",
        h=home, t=tmp_path)  # fmt: skip
    assert "trained_on_other_dataset" not in json.loads((tmp_path / "own.json").read_text())["provenance"]


def test_checkpoints_of_another_run(home, tmp_path, capsys):
    (tmp_path / "m.checkpoints" / "20").mkdir(parents=True)  # step 20
    request = {"config": {"generator": {"max_history": 3}}, "seed": 1}
    (tmp_path / "m.checkpoints" / "request.json").write_text(json.dumps(request))
    line = f"{TRAIN}m {GENERATOR} rq-transformer {BACKBONE}"
    assert "m.checkpoints: checkpoints of another run" in fails(capsys, line, h=home, t=tmp_path)


def test_a_dataset_without_vectors_or_text(home, tmp_path, capsys):
    pq.write_table(pq.read_table(home / "I.parquet").select(["item_id"]), tmp_path / "I.parquet")
    run("prepare parquet --items {t}/I.parquet --interactions {h}/X.parquet --out {t}/d", h=home, t=tmp_path)
    capsys.readouterr()
    assert "has no vector columns to tokenize" in fails(capsys, "tokenize --dataset {t}/d --out {t}/c", t=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokenize --dataset d --out o rq-vae --latnt 4", "--latent"),
        ("train --dataset d --catalog c --out o --epoch 3", "--epochs"),
        ("tokenize --dataset d --out o rq-vae --level-sizes 4 0", "expected level_sizes of at least 1, got (4, 0)"),
        ("tokenize --dataset d --out o opq --level-sizes 4 5", "product codes have one size"),
        ("tokenize --dataset d --out o --collisions sinkhorn opq", "product codes have none"),
        ("tokenize --dataset d --out o rq-vae --decay 1.5", "expected decay in"),
        ("tokenize --dataset d --out o --alignment leter", "letter"),
        ("train --dataset d --catalog c --out o --batch-size 0", "batch_size"),
        ("train --dataset d --catalog c --out o rq-transformer --dim 7", "dim 7 must divide"),
        ("export --catalog c --format csv --out o", "hf-tokens"),
        ("prepare simulated --out o global-time --validation 0.9 --test 0.2", "expected 0 < validation < test < 1"),
        ("tokenise", "tokenize"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_answered_with_what_does(capsys, line, message):
    with pytest.raises(SystemExit) as exit:
        run(line)
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


SOURCES = ["parquet", "csv", "jsonl", "amazon-reviews", "movielens", "simulated"]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "prepare",
        *(f"prepare {source}" for source in SOURCES),
        "tokenize",
        "tokenize rq-vae",
        "tokenize rq-kmeans",
        "tokenize opq",
        "train",
        "train rq-transformer",
        "train sasrec",
        *("evaluate", "recommend", "export", "export-program", "import-codes", "report"),
    ],
)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as exit:
        run(f"{command} --help")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: semid {command}".rstrip() in printed
    assert "noqa" not in printed
    assert "tyro" not in printed


def test_an_item_that_was_appended_is_recommended_and_one_that_was_removed_is_not(home, tmp_path, capsys):
    """By a model that reads its vectors, from the catalogue's folder alone."""
    catalog = shutil.copytree(home / "catalog", tmp_path / "catalog")
    vectors = Dataset.load(home / "dataset").vectors("text_lsa")[:1] + np.float32(0.01)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors[0]), 6)
    pq.write_table(pa.table({"item_id": ["new"], "text_lsa": lists}), tmp_path / "new.parquet")
    (tmp_path / "only.txt").write_text("new\ni3\n")
    run("catalog append --catalog {c} --input {t}/new.parquet", c=catalog, t=tmp_path)
    run("catalog remove --catalog {c} --items i3", c=catalog)
    capsys.readouterr()
    run(
        "recommend --model {h}/model --catalog {c} --history new,i3,i1 --allow {t}/only.txt",
        h=home,
        c=catalog,
        t=tmp_path,
    )
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[1:3]] for row in rows] == [["1", "new"]]
    with pytest.raises(SystemExit):  # control: the model alone does not know it
        run("recommend --model {h}/model --history new", h=home)
    run("export --catalog {c} --format json --out {t}/index.json", c=catalog, t=tmp_path)
    exported = json.loads((tmp_path / "index.json").read_text())
    assert ("new" in exported, "i3" in exported, len(exported)) == (True, False, ITEMS)
    before = artifacts.read_artifact(home / "model", "model").digest
    run(f"train --dataset {{h}}/dataset --catalog {{c}} --out {{h}}/model {GENERATOR} rq-transformer {BACKBONE}",
        h=home, c=catalog)  # fmt: skip
    assert "this model exists" in capsys.readouterr().err  # its rows are those it was trained on
    assert artifacts.read_artifact(home / "model", "model").digest == before


@pytest.fixture
def bucket(home, monkeypatch, tmp_path):
    """URL of a copy of `home`, seen from a machine without any of its files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    there = fsspec.filesystem("memory")
    for file in home.rglob("*"):
        if file.is_file():
            there.pipe_file(f"/bucket/{file.relative_to(home).as_posix()}", file.read_bytes())
    yield "memory://bucket"
    there.store.clear()


def _listing(name):
    return fsspec.filesystem("memory").find(f"/bucket/{name}")


def _there(name):
    return fsspec.filesystem("memory").cat_file(f"/bucket/{name}")


def test_every_command_reads_and_writes_urls(home, bucket, capsys, tmp_path):
    tables = "--items {u}/I.parquet --interactions {u}/X.parquet"
    run(f"prepare parquet {tables} --out {{u}}/again --name dataset --text-vectors 6", u=bucket)
    assert json.loads(_there("again/manifest.json"))["digest"] == artifacts.read_manifest(home / "dataset").digest
    run(f"tokenize --dataset {{u}}/dataset --out {{u}}/catalog {TOKENIZER}", u=bucket)
    run(f"train --dataset {{u}}/dataset --catalog {{u}}/catalog --out {{u}}/model {GENERATOR} "
        f"rq-transformer {BACKBONE}", u=bucket)  # fmt: skip
    assert "memory://bucket/model: this model exists" in capsys.readouterr().err
    fsspec.filesystem("memory").rm_file("/bucket/metrics.json")
    run("evaluate --model {u}/model --dataset {u}/dataset --split test --beam-size 20", u=bucket)
    assert "wrote memory://bucket/metrics.json" in capsys.readouterr().out
    assert json.loads(_there("metrics.json"))["rows"] == json.loads((home / "metrics.json").read_text())["rows"]
    run("recommend --model {u}/model --catalog {u}/catalog --history i0,i1 -k 3", u=bucket)
    run("export --catalog {u}/catalog --format json --out {u}/deep/index.json", u=bucket)
    run("import-codes --codes {u}/deep/index.json --dataset {u}/dataset --out {u}/imported", u=bucket)
    run("catalog remove --catalog {u}/imported --items i0", u=bucket)
    run("catalog verify --catalog {u}/imported", u=bucket)
    assert "1 removed" in capsys.readouterr().out
    assert _there("imported/changes/000001.parquet")
    run("catalog append --catalog {u}/catalog --input {u}/I.parquet --known skip", u=bucket)
    run("tokenize --catalog {u}/catalog --input {u}/I.parquet --out {u}/codes --new-catalog {u}/all", u=bucket)
    assert {"catalog.parquet", "config.yaml", "manifest.json"} <= {name.split("/")[3] for name in _listing("all")}
    run("package --model {u}/model --metrics {u}/metrics.json --out {u}/package", u=bucket)
    run("recommend --model {u}/package --history i0 -k 3", u=bucket)
    run("report {u}", u=bucket)
    assert "wrote memory://bucket/report.html" in capsys.readouterr().out
    assert b"<html" in _there("report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not [name for name in _listing("") if "/." in name]


@pytest.mark.parametrize(
    "line", ["catalog verify --catalog {u}/none", "recommend --model {u}/none --history i0", "report {u}/none"]
)
def test_a_url_that_holds_nothing_is_refused_by_its_own_name(bucket, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(line, u=bucket)
    assert stopped.value.code == 1
    assert "memory://bucket/none" in (line_ := capsys.readouterr().err)
    assert line_.count("\n") == 1


def test_warnings_name_urls_and_not_their_copies(capsys):
    with log_lines():
        LOGGER.warning("%s: damaged", artifacts.place("memory://bucket/m"))
    assert capsys.readouterr().err == "semid: memory://bucket/m: damaged\n"
