"""`semid graph` and what the other commands do with it: teach, mix, measure, explain; and what is refused."""

import json

import numpy as np
import pytest

from semid import artifacts
from semid.cli.evaluate import Evaluate, _names, _parts
from semid.data import Dataset
from semid.graphs import ItemGraph, ItemGraphConfig
from semid.recommender import Recommender
from tests.semid.cli.test_main import BACKBONE, GENERATOR, _write_tables, run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with dataset, catalogue, graph, teacher, and a model taught by graph and teacher and mixed with both."""
    home = tmp_path_factory.mktemp("graph")
    _write_tables(home)
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {h}/dataset --text-vectors 6", h=home)
    run("tokenize --dataset {h}/dataset --out {h}/catalog rq-kmeans --level-sizes 6 4", h=home)
    run("graph --dataset {h}/dataset --out {h}/graph --tune --neighbors 3", h=home)
    data = "--dataset {h}/dataset --catalog {h}/catalog"
    run(f"train {data} --out {{h}}/teacher {GENERATOR} sasrec {BACKBONE}", h=home)
    run(f"train {data} --out {{h}}/model --teacher {{h}}/teacher --graph {{h}}/graph --teacher-graph 0.5 "
        f"{GENERATOR} rq-transformer {BACKBONE}", h=home)  # fmt: skip
    return home


def test_the_model_says_what_it_was_made_from(home):
    manifest = artifacts.read_artifact(home / "model", "model")
    made = {name: artifacts.read_manifest(home / name).digest for name in ("dataset", "catalog", "graph")}
    assert {name: manifest.parents[name] for name in made} == made
    assert len(manifest.parents["teacher"]) == 64
    model, graph = Recommender.from_pretrained(home / "model"), ItemGraph.load(home / "graph")
    assert graph.config.neighbors == 3
    assert model.graph.config == graph.config
    assert 0 <= model.spec.graph_weight <= 0.9


def test_the_model_its_parts_and_the_graph_are_measured(home, capsys):
    run("evaluate --model {h}/model {h}/teacher --dataset {h}/dataset --beam-size 20", h=home)
    rows = [row["model"] for row in json.loads((home / "metrics.json").read_text())["rows"]]
    assert rows == ["semid", "sasrec-content", "semid alone", "item graph", "popularity", "bigram"]
    run("evaluate --model {h}/graph --dataset {h}/dataset --out {h}/alone.json", h=home)
    alone = json.loads((home / "alone.json").read_text())["rows"]
    assert [row["model"] for row in alone] == ["item graph", "popularity", "bigram"]
    whole = {row["model"]: row for row in json.loads((home / "metrics.json").read_text())["rows"]}
    assert alone[0]["ndcg@10"] == whole["item graph"]["ndcg@10"]
    examples = json.loads((home / "examples_alone.json").read_text())
    scores = [entry["score"] for example in examples for entry in example["recommendations"]]
    assert (None in scores, any(score is not None for score in scores)) == (True, True)  # where no edges lead
    capsys.readouterr()
    run("recommend --model {h}/model --history i1,i2 -k 3 --explain", h=home)
    assert "of the graph" in capsys.readouterr().out


def test_no_two_models_share_a_name_and_no_graph_is_measured_twice(home):
    model, teacher = (Recommender.from_pretrained(home / name) for name in ("model", "teacher"))
    graph, other = ItemGraph.load(home / "graph"), ItemGraph.fit(Dataset.load(home / "dataset"), ItemGraphConfig())
    kinds = {"x/semid": teacher, "y": teacher, "z": model, "popularity": model, "g": graph}
    assert _names(kinds) == {"x/semid": "x/semid", "y": "y", "z": "z", "popularity": "popularity", "g": "item graph"}
    assert _names({"popularity": model, "x": teacher}) == {"popularity": "semid", "x": "sasrec-content"}
    assert list(_parts({"semid": model, "item graph": graph})) == ["semid alone"]
    own = f"item graph {model.graph.digest[:8]}"
    assert list(_parts({"semid": model, "item graph": other})) == ["semid alone", own]
    assert list(_parts({"semid": model, "sasrec": teacher})) == ["semid alone", "item graph"]


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ({}, ""),
        ({"split": "validation", "exclude_seen": True}, "_validation_seen_excluded"),
        ({"catalog": "c", "other_dataset": True}, "_catalog_other_dataset"),
        ({"condition": ("group=brand-7", "event=own")}, "_asked_event-own_group-brand-7"),
        ({"condition": ("text=A b",)}, "_asked_text-a-b-94580053"),
    ],
)
def test_figures_of_another_kind_have_a_file_of_their_own(options, suffix):
    assert Evaluate(model=("m",), dataset="d", **options)._suffix == suffix


def test_words_that_are_spelled_alike_have_files_of_their_own():
    words = ("text=A b", "text=a-b", "text=a b", "group=日", "text=" + "a" * 300)
    names = {Evaluate(model=("m",), dataset="d", condition=(word,))._suffix for word in words}
    assert len(names) == len(words)
    assert max(map(len, names)) < 64


def test_a_graph_that_validation_leaves_without_new_items_says_so(home, tmp_path, capsys, monkeypatch):
    chosen = {"content": (6.0,), "smoothing": (1.0,), "new_items": (0.0,), "degree_power": (0.5,), "recency": (0.5,)}
    monkeypatch.setattr("semid.graphs.tuning._GRID", chosen)
    monkeypatch.setattr(
        "semid.graphs.tuning._Scores", lambda *_: lambda config: np.array([float(not config.new_items)])
    )
    for options, hints in (("--tune", 1), ("--tune --new-items 1", 0), ("--new-items 0", 0)):
        run(f"graph --dataset {{h}}/dataset --out {{t}}/{len(options)} {options}", h=home, t=tmp_path)
        assert capsys.readouterr().out.count("nothing leads to new items at new_items 0.0") == hints


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("graph --dataset {h}/dataset --out {t}/g --columns text", "no vector column 'text' for content edges"),
        ("graph --dataset {h}/dataset --out {t}/g --recency 2", "expected recency in [0, 1], got 2.0"),
        ("recommend --model {h}/teacher --history i1 --explain", "the model has no item graph"),
        (
            "train --dataset {h}/dataset --catalog {h}/catalog --out {t}/m --teacher {h}/teacher --teacher-graph 0.5",
            "teacher_graph 0.5 needs an item graph; give one (--graph)",
        ),
        (
            "train --dataset {o}/dataset --catalog {h}/catalog --out {t}/m --other-dataset --graph {h}/graph",
            "graph: trained on dataset digest",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(home, tmp_path_factory, tmp_path, capsys, line, message):
    other = tmp_path_factory.getbasetemp() / "other"
    if "{o}" in line:
        run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {o}/dataset --name other "
            "--text-vectors 6", h=home, o=other)  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(line, h=home, t=tmp_path, o=other)
    assert ended.value.code not in (0, None)
    said = capsys.readouterr()
    assert message in (said.err + said.out).replace("\n", " ")
    assert not list(tmp_path.iterdir())
