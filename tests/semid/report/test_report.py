from __future__ import annotations

import html
import json
import re
import shutil
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.offline
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid.arrow import to_lists, write_parquet
from semid.artifacts import read_artifact, write_artifact
from semid.catalog import SemanticCatalog
from semid.errors import SemidError
from semid.evaluation import write_metrics
from semid.report import write_report
from semid.report.catalog import Items, tree
from semid.report.map import item_map
from semid.tokenizers import level_health

EVIL = "<script>alert('title')</script>"
PNG = b"\x89PNG\r\n\x1a\nrest of a picture"
CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 2, 0], [1, 0, 0]], np.int32)
ROWS: list[dict[str, Any]] = [
    {"model": "popularity", "recall@10": 0.01, "ndcg@10": 0.005, "coverage@10": 0.2},
    {"model": "semid", "recall@10": 0.06, "ndcg@10": 0.03, "code_recall@10": 0.07},
    {"model": "oracle", "recall@10": 0.10, "ndcg@10": 0.04},
]


@pytest.fixture
def run(tmp_path):
    return _make_run(tmp_path / "demo")


def _make_run(run: Path, rows: list[dict] | None = None) -> Path:
    run.mkdir()
    provenance = {"dataset": "Tiny & Co", "beam size": 50, "minutes": {"generator": 1.5}}
    _write_json(run / "metrics.json", {"split": "test", "rows": rows or ROWS, "provenance": provenance})
    recommendations = [{"item_id": i, "score": -s, "codes": []} for i, s in [("i1", 1.25), ("i2", 2.5), ("gone", 3.0)]]
    _write_json(
        run / "examples.json",
        [{"user": "u<7>", "history": ["i0", "i3"], "target": "i2", "recommendations": recommendations}],
    )
    titles = [EVIL, "Night cream", "Day cream", "Shampoo", None]
    categories = [["All", "Skin"], ["All", "Skin"], ["All", "Skin"], ["All", "Hair"], ["All", "Hair"]]
    items = {
        "item_id": _ids(5),
        "title": titles,
        "categories": categories,
        "image": [PNG, None, b"no image", None, None],
    }
    with write_artifact(run / "dataset", kind="dataset", config={"name": "tiny"}) as folder:
        pq.write_table(pa.table(items), folder / "items.parquet")
    with write_artifact(run / "catalog", kind="catalog", config={"tokenizer": {}}) as folder:
        catalog = SemanticCatalog(pa.array(_ids(5)), CODES, (2, 4, 2), tie_break=True)
        catalog.write(folder / "catalog.parquet")
        stated = level_health(catalog) | {"collision_rate_before": 0.4, "largest_group_before": 2}
        _write_json(folder / "health.json", stated)
    _write_model(run, [{"step": 10 * n, "loss": 3.0 / n, "validation/ndcg@10": 0.01 * n} for n in range(1, 4)])
    return run


def _write_model(run: Path, records: list[dict]) -> None:
    with write_artifact(run / "model", kind="model", config={}) as folder:
        (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _ids(count: int) -> list[str]:
    return [f"i{n}" for n in range(count)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _page(*runs: Path) -> str:
    """The page as written, less the library."""
    text = write_report(runs, runs[0].parent / "report.html").read_text()
    library = plotly.offline.get_plotlyjs()
    assert text.count(library) == 1
    return text.replace(library, "")


def _figures(page: str) -> list[dict]:
    return [json.loads(html.unescape(text)) for text in re.findall(r"data-figure='([^']*)'", page)]


def _headings(page: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", page)


def _facts(page: str) -> list[str]:
    return re.findall(r'<dl class="facts">(.*?)</dl>', page, re.DOTALL)


def _table_rows(page: str) -> list[list[str]]:
    """Cells of the metric tables' rows, without tags."""
    bodies = re.findall(r"<table>.*?<tbody>(.*?)</tbody>", page, re.DOTALL)
    rows = [row for body in bodies for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)]
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_items_of_a_run_without_a_dataset_are_those_of_the_dataset_that_is_given(run, tmp_path):
    dataset = shutil.move(run / "dataset", tmp_path / "elsewhere")
    assert "Night cream" not in _page(run)
    page = write_report([run], tmp_path / "report.html", dataset=dataset).read_text()
    assert all(text in page for text in ("Night cream", "data:image/png;base64,", "mixed or other"))
    with pytest.raises(SemidError, match="expected an artifact of kind 'dataset', found 'catalog'"):
        write_report([run], tmp_path / "report.html", dataset=run / "catalog")


def test_metrics_are_ranked_beside_their_share_of_the_oracle(run):
    page = _page(run)
    assert "<h1>Tiny &amp; Co</h1>" in page
    assert "semid leads with NDCG@10 0.0300, 75% of what the oracle reaches, 500% above popularity." in page
    dash = "\N{EN DASH}"
    assert _table_rows(page) == [
        ["semid", "0.0600", "0.0300", dash, "75%"],
        ["popularity", "0.0100", "0.0050", "0.2000", "12%"],
        ["oracle", "0.1000", "0.0400", dash, "100%"],
    ]
    assert re.search(r"<summary>Further figures</summary>.*Code-level recall@10.*0\.0700", page, re.DOTALL)
    assert page.count('<tr class="best">') == 2
    assert re.search(r"beam size</dt><dd>50<.*minutes</dt><dd>generator 1.5<", page, re.DOTALL)
    dots = [figure for figure in _figures(page) if figure["kind"] == "dots"]
    assert [figure["title"] for figure in dots] == ["Recall@10", "NDCG@10"]
    assert dots[0]["labels"] == ["oracle", "popularity", "semid"]
    assert dots[0]["errors"] == [None, None, None]


USERS = pa.table(
    {
        "user": ["u0", "u1", "u2", "u3"],
        "target": ["i0", "i1", "i2", "i3"],
        "activity": pa.array(["low", "low", "high", "high"]).dictionary_encode(),
        "popularity": pa.array(["cold", "low", "mid", "high"]).dictionary_encode(),
        "recall@10:semid": pa.array([1, 1, 1, 0], pa.float32()),
        "recall@10:popularity": pa.array([0, 0, 0, 1], pa.float32()),
        "ndcg@10:semid": pa.array([1, 0.5, 0.5, 0], pa.float32()),
        "ndcg@10:popularity": pa.array([0, 0, 0, 1], pa.float32()),
    }
)
MEASURED = [
    {"model": "semid", "recall@10": 0.75, "ndcg@10": 0.5, "ndcg@10/activity_low": 0.75, "ndcg@10/activity_high": 0.25},
    {
        "model": "popularity",
        "recall@10": 0.25,
        "ndcg@10": 0.25,
        "ndcg@10/activity_low": 0,
        "ndcg@10/activity_high": 0.5,
    },
]


def test_every_users_figures_give_intervals_groups_and_paired_differences(run, tmp_path):
    write_metrics(run / "metrics.json", "test", MEASURED, {"dataset": "tiny"}, users=USERS)
    page = _page(run)
    (recall,) = [f for f in _figures(page) if f["kind"] == "dots" and f["title"] == "Recall@10"]
    deviation = 1.96 * np.std([1, 1, 1, 0]) / 2
    np.testing.assert_allclose(recall["errors"], [deviation, deviation])
    (groups,) = [f for f in _figures(page) if f["kind"] == "groups"]
    assert (groups["title"], groups["labels"]) == ("NDCG@10 by length of the history", ["low", "high"])
    assert [(s["name"], s["values"]) for s in groups["series"]] == [("semid", [0.75, 0.25]), ("popularity", [0, 0.5])]
    np.testing.assert_allclose(groups["series"][0]["errors"], [1.96 * 0.25 / 2**0.5] * 2)
    (pair,) = re.findall(r'<table class="pairwise">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", pair)
    assert cells[0] == "popularity"
    assert cells[1].startswith("+0.5000 [")
    assert cells[2].startswith("+0.2500 [")
    assert cells[3:] == ["3", "1"]
    other = _make_run(tmp_path / "other", [{"model": "bigram", "recall@10": 0.5, "ndcg@10": 0.4}])
    renamed = ["bigram" if name.endswith("popularity") else "semid" for name in USERS.column_names[4:]]
    names = [f"{old.split(':')[0]}:{new}" for old, new in zip(USERS.column_names[4:], renamed, strict=True)]
    one = [{"model": "bigram", "recall@10": 0.5, "ndcg@10": 0.4}]
    theirs = USERS.rename_columns([*USERS.column_names[:4], *names])
    write_metrics(other / "metrics.json", "test", one, {"dataset": "tiny"}, users=theirs)
    assert "bigram (other)</th><td>+0.5000" in _page(run, other)  # the same users, so that runs can be paired
    strangers = theirs.set_column(0, "user", pa.array(["v0", "v1", "v2", "v3"]))
    write_metrics(other / "metrics.json", "test", one, {"dataset": "tiny"}, users=strangers)
    assert "bigram (other)</th><td>+0" not in _page(run, other)


def test_intervals_and_gains_count_a_user_of_several_targets_once(run):
    def shown() -> tuple[list, list]:
        page = _page(run)
        (pair,) = re.findall(r'<table class="pairwise">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
        errors = [f["errors"] for f in _figures(page) if f["kind"] == "dots"]
        errors += [series["errors"] for f in _figures(page) if f["kind"] == "groups" for series in f["series"]]
        return errors, re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", pair)

    write_metrics(run / "metrics.json", "test", MEASURED, {"dataset": "tiny"}, users=USERS)
    errors, cells = shown()
    eightfold = USERS.take(np.repeat(np.arange(4), 8))
    write_metrics(run / "metrics.json", "test", MEASURED, {"dataset": "tiny"}, users=eightfold)
    np.testing.assert_allclose(np.concatenate(shown()[0]), np.concatenate(errors))
    assert shown()[1] == cells
    strangers = eightfold.set_column(0, "user", pa.array([f"v{n}" for n in range(32)]))
    write_metrics(run / "metrics.json", "test", MEASURED, {"dataset": "tiny"}, users=strangers)
    assert max(shown()[0][0]) < 0.4 * max(errors[0])  # control: 32 users
    assert shown()[1][3:] == ["24", "8"]


def _lists(**values: float) -> dict[str, Any]:
    return {name: {"value": value, "low": value - 0.25, "high": value + 0.5} for name, value in values.items()}


def test_metrics_of_lists_have_a_table_with_intervals_and_figures_against_accuracy(run):
    assert "Lists of" not in _page(run)
    rows = [{"model": "semid", **_lists(novelty=7.0, diversity=0.5)}, {"model": "oracle", **_lists(novelty=6.0)}]
    about = {"k": 10, "tags": None, "vectors": "content", "codes_of": "semid"}
    write_metrics(run / "metrics.json", "test", ROWS, {"dataset": "tiny"}, lists=about | {"rows": rows})
    page = _page(run)
    dash = "\N{EN DASH}"
    assert "<h4>Lists of 10</h4>" in page
    assert "Vectors: column content; Codes: those of semid." in page
    (table,) = re.findall(r'<table class="lists">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    cells = [re.sub("<[^>]*>", " ", cell).split() for cell in re.findall(r"<t[hd].*?</t[hd]>", table, re.DOTALL)]
    assert cells[:3] == [["semid"], ["7.000", f"6.750{dash}7.500"], ["0.500", f"0.250{dash}1.000"]]
    assert cells[3:] == [["oracle"], ["6.000", f"5.750{dash}6.500"], [dash]]  # popularity has none
    novelty, diversity = (figure for figure in _figures(page) if figure["kind"] == "plane")
    assert (novelty["title"], novelty["names"], novelty["x"]) == ("NDCG@10 by novelty", ["semid", "oracle"], [7.0, 6.0])
    assert (novelty["y"], novelty["below"], novelty["above"]) == ([0.03, 0.04], [0.25, 0.25], [0.5, 0.5])
    assert (diversity["names"], diversity["oracle"]) == (["semid"], [False])
    assert (novelty["colors"], diversity["colors"]) == ([0, None], [0])
    rows = [{"model": "semid", **_lists(novelty=7.0)}, {"model": "popularity", **_lists(novelty=8.0, diversity=0.5)}]
    longer = [row | {"recall@20": 0.5, "ndcg@20": row["ndcg@10"]} for row in ROWS]
    write_metrics(run / "metrics.json", "test", ROWS, {"dataset": "tiny"})
    twenty = about | {"k": 20, "rows": rows}
    write_metrics(run / "metrics_k20.json", "test", longer, {"dataset": "tiny"}, lists=twenty)
    ten = about | {"k": 10, "rows": rows[:1]}
    write_metrics(run / "metrics_k10.json", "test", ROWS, {"dataset": "tiny"}, lists=ten)
    page = _page(run)
    assert re.findall(r"<h4>Lists of (\d+)</h4>", page) == ["10", "20"]  # none for the file without any
    planes = [(f["title"], f["names"], f["colors"]) for f in _figures(page) if f["kind"] == "plane"]
    shorter, name = "semid (metrics)", "semid (metrics_k20)"
    assert planes == [
        ("NDCG@10 by novelty", [shorter], [0]),
        ("NDCG@20 by novelty", [name, "popularity (metrics_k20)"], [0, 1]),
        ("NDCG@20 by diversity", ["popularity (metrics_k20)"], [1]),
    ]
    about["rows"] = [{"model": "semid", "novelty": {"value": 7.0}}]
    write_metrics(run / "metrics.json", "test", ROWS, {}, lists=about)
    with pytest.raises(SemidError, match=r"metrics.json: not the metrics of lists of an evaluation"):
        _page(run)


def test_users_that_are_not_those_of_the_metrics_are_refused(run):
    write_metrics(run / "metrics.json", "test", MEASURED, {}, users=USERS.drop_columns(["target"]))
    with pytest.raises(SemidError, match=r"users.parquet: lacks the column 'target'; evaluate again"):
        _page(run)
    write_metrics(run / "metrics.json", "test", MEASURED, {}, users=USERS.select(["user", "target"]))
    with pytest.raises(SemidError, match=r"users.parquet: lacks columns such as ndcg@10:MODEL; evaluate again"):
        _page(run)
    odd = USERS.set_column(2, "activity", pa.array(["low", "low", "high", "huge"]))
    write_metrics(run / "metrics.json", "test", MEASURED, {}, users=odd)
    with pytest.raises(SemidError, match=r"users.parquet: expected groups low, mid, high; evaluate again"):
        _page(run)
    write_metrics(run / "metrics.json", "test", MEASURED, {}, users=USERS)
    assert _page(run)  # control
    pq.write_table(USERS.slice(1), run / "users.parquet")
    with pytest.raises(SemidError, match=r"users.parquet: not what was written with the metrics next to it"):
        _page(run)


def test_gains_losses_and_shares_of_the_item_graph_are_shown(run):
    (example,) = json.loads((run / "examples.json").read_text())
    against = {"model": "bigram", "metric": "ndcg@10", "ours": 1.0, "theirs": 0.25}
    example |= {"against": against}
    example["recommendations"][0]["graph_share"] = 0.75
    _write_json(run / "examples.json", [example, example | {"against": against | {"ours": 0.0}}])
    page = _page(run)
    assert "gain: NDCG@10 1.0000, bigram 0.2500" in page
    assert "loss: NDCG@10 0.0000, bigram 0.2500" in page
    assert page.count('title="item graph 75%"') == 2


def test_settings_in_which_runs_differ_are_listed(run, tmp_path):
    other = _make_run(tmp_path / "other")
    assert "What the runs differ in" not in _page(run, other)
    shutil.rmtree(other / "model")
    with write_artifact(other / "model", kind="model", config={"generator": {"training": {"epochs": 9}}}) as folder:
        (folder / "history.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    page = _page(run, other)
    dash = "\N{EN DASH}"
    assert f"model/generator.training.epochs</th><td>{dash}</td><td>9</td>" in page


def test_a_map_of_the_items_is_drawn_where_umap_is_installed(run, monkeypatch):
    assert "Map of the items" not in _page(run)  # five items have no neighborhoods, and there is no UMAP
    shutil.rmtree(run / "dataset")
    shutil.rmtree(run / "catalog")
    vectors = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    columns = {"item_id": _ids(20), "title": [f"t{n}" for n in range(20)], "category": [[7], [8]] * 10}
    with write_artifact(run / "dataset", kind="dataset", config={"name": "tiny"}) as folder:
        write_parquet(pa.table({**columns, "text_lsa": to_lists(vectors)}), folder / "items.parquet")
    codes = (np.arange(20)[:, None] // np.array([5, 1])).astype(np.int32) % np.array([4, 5], np.int32)
    with write_artifact(run / "catalog", kind="catalog", config={"tokenizer": {}}) as folder:
        SemanticCatalog(pa.array(_ids(20)), codes, (4, 5)).write(folder / "catalog.parquet")

    class Umap:
        def __init__(self, **settings: Any) -> None:
            assert settings["random_state"] == 0

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            np.testing.assert_array_equal(x, vectors)
            return x[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
    few = SemanticCatalog(pa.array(_ids(15)), codes[:15], (4, 5))
    assert item_map(Items.read(run / "dataset" / "items.parquet"), few) is None
    by_code, by_category = (f for f in _figures(_page(run)) if f["kind"] == "map")
    assert by_code["colors"] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert by_category["colors"] == [0, 1] * 10
    assert (by_code["text"][3], by_code["x"][3]) == ("t3", round(float(vectors[3, 0]), 3))


def test_every_section_is_there_and_in_order(run):
    page = _page(run)
    expected = ["Metrics", "Training", "Codebook usage", "Semantic-ID tree", "Example users", "Artifacts"]
    assert _headings(page) == expected
    for kind in ("dataset", "catalog"):
        assert read_artifact(run / kind, kind).digest in page
    assert "collision rate before</dt><dd>40.0%" in page.lower()
    curves = [figure for figure in _figures(page) if figure["kind"] == "curves"]
    assert [(f["title"], f["curves"][0]["name"], f["curves"][0]["x"]) for f in curves] == [
        ("Loss", "Loss", [10, 20, 30]),
        ("NDCG@10", "NDCG@10", [10, 20, 30]),
    ]


def test_each_stage_of_an_end_to_end_run_has_its_curves(run):
    records = [
        {"stage": "joint", "step": 10, "loss/generation": 6.0, "bank/agreement": 0.9},
        {"stage": "joint", "step": 10, "validation/ndcg@10": 0.1, "validation/churn/level_0": 0.2},
        {"stage": "generator.1", "step": 5, "loss": 7.0},
    ]
    _write_model(run, records)
    page = _page(run)
    assert re.findall("<h3>(Model.*?)</h3>", page) == ["Model: joint", "Model: generator.1"]
    curves = [figure for figure in _figures(page) if figure["kind"] == "curves"]
    titles = ["Loss generation", "NDCG@10", "Bank agreement", "Churn level 0", "Loss"]
    assert [figure["title"] for figure in curves] == titles


def test_codebook_usage_is_counted_from_the_codes(run):
    page = _page(run)
    first = next(figure for figure in _figures(page) if figure["kind"] == "usage")
    assert (first["x"], first["y"], first["even"]) == ([0, 1, 2], [3, 2, 2], 2.5)
    perplexity = np.exp(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4)))
    assert f"2 of 2 used (100.0%), 0 dead, perplexity {perplexity:.1f}" in page
    assert "3 of 4 used (75.0%), 1 dead" in page
    assert "Level c (tie-break)" in page


def test_an_example_marks_the_hit_and_the_shared_codes(run):
    page = _page(run)
    assert "target at rank 2" in page
    hits = re.findall(r'class="item hit" title="(\w+)"', page)
    assert hits == ["i2", "i2"]  # the target itself and its place among the recommendations
    assert "<code><b>&lt;a_0&gt;</b>&lt;b_0&gt;&lt;c_1&gt;</code>" in page  # i1 shares the first code of i2
    assert "\N{MINUS SIGN}2.50" in page
    assert 'title="gone"' in page  # an item that neither catalogue nor dataset has is shown by its id


def test_examples_show_the_codes_that_their_model_was_trained_on(run):
    shutil.rmtree(run / "model")
    with write_artifact(run / "model", kind="model", config={}) as folder:
        catalog = SemanticCatalog(pa.array(_ids(5)), CODES[[0, 3, 2, 1, 4]], (2, 4, 2), tie_break=True)
        catalog.write(folder / "catalog.parquet")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["provenance"]["models"] = {"runs/demo/model": read_artifact(run / "model", "model").digest}
    _write_json(run / "metrics.json", metrics)
    assert re.search(r'title="i1">.*?<code>&lt;a_1&gt;&lt;b_2&gt;&lt;c_0&gt;</code>', _page(run), re.DOTALL)


def test_a_folder_that_is_being_written_is_no_artifact(run):
    hidden = run / ".catalog.writing-vm-1"
    shutil.copytree(run / "model", hidden)
    (hidden / "manifest.json").unlink()
    assert ".catalog.writing" not in _page(run)


def test_titles_cannot_inject_markup(run):
    page = _page(run)
    assert EVIL not in page
    assert "&lt;script&gt;alert(&#39;title&#39;)&lt;/script&gt;" in page
    assert "User u&lt;7&gt;" in page
    labels = next(figure for figure in _figures(page) if figure["kind"] == "tree")["labels"]
    assert html.escape(EVIL, quote=False) in labels  # plotly reads tags in labels


class _Loads(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_loads_nothing(run):
    page = _page(run)
    loads = _Loads()
    loads.feed(page)
    assert loads.addresses  # the one PNG; what is no image is left out
    assert {address.partition(",")[0] for address in loads.addresses} == {"data:image/png;base64"}
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("missing", "headings"),
    [
        ("examples.json", {"Example users"}),
        ("catalog", {"Codebook usage", "Semantic-ID tree"}),
        ("model", {"Training"}),
        ("dataset", set()),
        ("catalog/health.json", {"Codebook usage"}),
    ],
)
def test_a_missing_file_drops_its_section(run, missing, headings):
    before = set(_headings(_page(run)))
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if path.parent != run:  # an artifact that lacks a file would be refused as damaged
        with write_artifact(path.parent, kind="catalog", config={"tokenizer": {}}) as folder:
            shutil.copy(path.parent / "catalog.parquet", folder)
    assert before - set(_headings(_page(run))) == headings


def test_metrics_alone_make_a_page(run):
    for path in run.iterdir():
        if path.name != "metrics.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert _headings(_page(run)) == ["Metrics"]


def test_a_run_of_several_catalogues_under_other_names_shows_them_as_artifacts_only(run):
    (run / "catalog").rename(run / "codes-text_0")
    shutil.copytree(run / "codes-text_0", run / "codes-text_1")
    page = _page(run)
    assert _headings(page) == ["Metrics", "Training", "Example users", "Artifacts"]
    assert re.findall(r"demo/([\w-]+)</th>", page) == ["codes-text_0", "codes-text_1", "dataset", "model"]


def test_nested_provenance_is_readable(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["provenance"] = {
        "dataset": "Tiny",
        "split": "test",
        "exclude_seen": False,
        "split_rule": {"type": "LeaveOneOut"},
        "seeds": [0, 1],
        "minutes": [{"codes-text": 1.23456, "sasrec": 0.5}, {"codes-text": 2.0, "sasrec": 1234.5}],
        "tercile_bounds": {"activity": [3, 5], "popularity": [1, 2000]},
        "models": {"runs/elsewhere/sasrec": "0123456789abcdef" * 4},
    }
    _write_json(run / "metrics.json", metrics)
    assert dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", _facts(_page(run))[0])) == {
        "split rule": "type LeaveOneOut",
        "seeds": "0, 1",
        "minutes": "codes-text 1.235, sasrec 0.5; codes-text 2, sasrec 1,234",
        "tercile bounds": "activity (3, 5), popularity (1, 2,000)",
        "models": "runs/elsewhere/sasrec 0123456789abcdef",
    }


def test_missing_metrics_name_the_file_and_its_command(run, tmp_path):
    (run / "metrics.json").unlink()
    for dataset in (f"{run}/dataset", "DATASET"):
        with pytest.raises(SemidError) as error:
            write_report([run], tmp_path / "report.html")
        command = f"semid evaluate --model {run}/model --dataset {dataset} --split test"
        assert str(error.value) == f"{run}/metrics.json: no such file; `{command}` writes it"
        if (run / "dataset").exists():
            (run / "dataset").rename(run / "elsewhere")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "metrics",
    [
        *([], {"rows": []}, {"rows": [{"recall@10": 0.1}]}, {"rows": [{"model": ["semid"]}]}),
        {"rows": [{"model": "semid"}], "lists": {"k": 10, "rows": [{"model": {}}]}},
    ],
)
def test_metrics_of_another_form_are_refused(run, tmp_path, metrics):
    _write_json(run / "metrics.json", metrics)
    with pytest.raises(SemidError, match=r"metrics\.json: (expected|not the metrics of lists)"):
        write_report([run], tmp_path / "report.html")


def test_an_example_without_a_target_is_refused(run, tmp_path):
    _write_json(run / "examples.json", [{"user": "u1", "history": [], "recommendations": []}])
    with pytest.raises(SemidError, match=r"examples\.json: an example lacks the key 'target'"):
        write_report([run], tmp_path / "report.html")


def test_runs_share_a_table_but_seen_and_unseen_do_not(run, tmp_path):
    excluded = [row | {"seen": "excluded", "ndcg@10": 2 * row["ndcg@10"]} for row in ROWS]
    other = _make_run(tmp_path / "other", [ROWS[0], ROWS[1] | {"ndcg@10": 0.035}, ROWS[2], *excluded])
    page = _page(run, other)
    # Without the option nothing is said: models of data where nothing repeats leave seen items out by themselves.
    headings = ["Tiny &amp; Co, test split", "Tiny &amp; Co, test split, seen items excluded"]
    assert re.findall(r"<h3>(Tiny[^<]*)</h3>", page) == headings
    models = [row[0] for row in _table_rows(page)]
    assert models == ["semid (other)", "semid (demo)", "popularity", "oracle", "semid", "popularity", "oracle"]


def test_a_run_that_is_not_tested_yet_is_shown_by_its_validation(run):
    (run / "metrics.json").rename(run / "metrics_validation.json")
    metrics = json.loads((run / "metrics_validation.json").read_text())
    _write_json(run / "metrics_validation.json", metrics | {"split": "validation"})
    page = _page(run)
    assert re.findall(r"<h3>(Tiny [^<]*)</h3>", page) == ["Tiny &amp; Co, validation split"]
    assert "metrics_validation.json" not in _facts(page)[0]  # "what differs in" that file: it is the first here


def test_files_of_other_kinds_join_the_page_in_tables_of_their_own(run):
    provenance = {"dataset": "Tiny & Co", "beam size": 20, "minutes": {"generator": 1.5}, "split": "validation"}
    rows = [row | {"ndcg@10": 0.5} for row in ROWS]
    _write_json(run / "metrics_validation.json", {"split": "validation", "rows": rows, "provenance": provenance})
    excluded = [row | {"seen": "excluded"} for row in ROWS]
    _write_json(run / "metrics_seen_excluded.json", {"split": "test", "rows": excluded})
    asked = [row | {"asked": "event=own", "catalog": "0123456789ab"} for row in ROWS]
    _write_json(run / "metrics_catalog_asked_event-own.json", {"split": "test", "rows": asked})
    _write_json(run / "metrics.validation.json", {})  # no such file of ours
    page = _page(run)
    assert re.findall(r"<h3>(Tiny [^<]*)</h3>", page) == [
        "Tiny &amp; Co, test split",
        "Tiny &amp; Co, test split, asked for event=own, catalogue 0123456789ab",
        "Tiny &amp; Co, test split, seen items excluded",
        "Tiny &amp; Co, validation split",
    ]
    assert [row[0] for row in _table_rows(page)[:12]].count("semid") == 4
    facts = [re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text) for text in _facts(page)]
    assert facts[:2] == [
        [("beam size", "50"), ("minutes", "generator 1.5")],
        [("what differs in", "metrics_validation.json"), ("beam size", "20")],
    ]


def test_a_row_that_two_files_of_a_run_share_is_shown_once_and_others_name_their_file(run):
    shutil.copy(run / "metrics.json", run / "metrics_again.json")
    assert [row[0] for row in _table_rows(_page(run))] == ["semid", "popularity", "oracle"]
    rows = [row | ({"ndcg@10": 0.02} if row["model"] == "semid" else {}) for row in ROWS]
    _write_json(run / "metrics_beam10.json", {"split": "test", "rows": rows})
    names = [row[0] for row in _table_rows(_page(run))]
    assert names == ["semid (metrics)", "semid (metrics_beam10)", "popularity", "oracle"]


def test_models_are_ranked_at_the_main_cutoff(run):
    keys = ("ndcg@10/activity_low", "ndcg@5", "ndcg@100", "ndcg@20")
    values = {"a": 0.2, "b": 0.1}
    rows = [{"model": name, **dict.fromkeys(keys, value), "ndcg@100": 1 - value} for name, value in values.items()]
    _write_json(run / "metrics.json", {"split": "test", "rows": rows})
    assert "b leads with NDCG@100 0.9000" in _page(run)
    _write_json(run / "metrics.json", {"split": "test", "rows": [row | {"ndcg@10": row["ndcg@20"]} for row in rows]})
    assert "a leads with NDCG@10 0.2000" in _page(run)


def test_a_damaged_file_of_another_kind_is_refused(run, tmp_path):
    _write_json(run / "metrics_validation.json", {"rows": []})
    with pytest.raises(SemidError, match=r"metrics_validation\.json: expected"):
        write_report([run], tmp_path / "report.html")


def test_a_history_cut_short_by_a_kill_is_read_and_a_broken_one_refused(run, tmp_path):
    (run / "model").rename(run / "model.checkpoints")
    (run / "model.checkpoints" / "manifest.json").unlink()
    (run / "model.checkpoints" / "request.json").write_text("{}")
    file = run / "model.checkpoints" / "history.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 40, "lo')
    losses = next(figure for figure in _figures(_page(run)) if figure["title"] == "Loss")
    assert losses["curves"][0]["x"] == [10, 20, 30]
    assert "<h3>Model.checkpoints (unfinished)</h3>" in _page(run)
    file.write_text('{"step": 1, "lo\n' + whole)
    with pytest.raises(SemidError, match=r"history\.jsonl, line 1: not valid JSON"):
        write_report([run], tmp_path / "report.html")


def test_a_damaged_artifact_is_refused(run, tmp_path):
    (run / "catalog" / "health.json").write_text("{}")
    with pytest.raises(SemidError, match=r"health\.json: content does not match its sha256"):
        write_report([run], tmp_path / "report.html")


def test_json_of_another_type_is_refused_by_name(run, tmp_path):
    log = run / "model.checkpoints" / "history.jsonl"
    log.parent.mkdir()
    (log.parent / "request.json").write_text("{}")
    for file, value, message in (
        (run / "metrics.json", {"split": "test", "rows": ROWS, "provenance": ["", ""]}, "expected objects under prov"),
        (run / "metrics.json", {"split": "test", "rows": ROWS, "files": [1]}, "expected objects under provenance"),
        (run / "examples.json", {"user": "u"}, "not the examples of an evaluation"),
        (run / "examples.json", [{"history": [2.5], "target": "i1", "recommendations": []}], "not the examples"),
        (run / "examples.json", [{"history": [], "target": "i1", "recommendations": 1}], "not the examples"),
        (log, [1], "line 1: not a record"),
        (log, {"stage": [], "loss": 1.0}, "line 1: not a record"),
    ):
        before = file.read_bytes() if file.exists() else b'{"loss": 1.0}\n'
        _write_json(file, value)
        with pytest.raises(SemidError, match=f"^{re.escape(str(file))}.*{message}"):
            write_report([run], tmp_path / "report.html")
        file.write_bytes(before)
        write_report([run], tmp_path / "report.html")  # control


def test_halves_of_characters_are_shown_as_question_marks(run):
    _write_json(run / "metrics.json", {"split": "test", "rows": [{**ROWS[0], "model": "half \ud800"}]})
    assert _table_rows(_page(run))[0][0] == "half ?"


def test_damaged_metrics_and_examples_are_refused(run, tmp_path):
    examples = json.loads((run / "examples.json").read_text())
    write_metrics(run / "metrics.json", "test", ROWS, {}, examples=examples)
    write_report([run], tmp_path / "report.html")  # control
    whole = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(whole.replace("0.06", "0.07"))
    with pytest.raises(SemidError, match=r"metrics\.json: content does not match its own digest"):
        write_report([run], tmp_path / "report.html")
    (run / "metrics.json").write_text(whole)
    for damage in (lambda file: file.write_text(file.read_text().replace("i2", "i1")), Path.unlink):
        damage(run / "examples.json")
        with pytest.raises(SemidError, match=r"examples\.json: not what was written with the metrics"):
            write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize("name", ["dataset", "catalog", "model"])
def test_a_folder_that_lost_its_manifest_is_refused(run, tmp_path, name):
    (run / name / "manifest.json").unlink()
    with pytest.raises(SemidError, match=rf"{name}/manifest\.json: no such file"):
        write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize("kept", ["catalog.parquet", "weights"])
def test_a_model_without_manifest_and_log_is_refused(run, tmp_path, kept):
    """It is known by its codes, or as one that was measured; notes next to it are nobody's artifact."""
    (run / "notes").mkdir()
    (run / "sasrec").mkdir()
    (run / "sasrec" / kept).write_bytes(b"")
    metrics = json.loads((run / "metrics.json").read_text())
    if kept == "weights":
        write_report([run], tmp_path / "report.html")
        metrics["provenance"]["models"] = {"runs/demo/sasrec": "0" * 64, ".": "0" * 64}
        _write_json(run / "metrics.json", metrics)
    with pytest.raises(SemidError, match=r"sasrec/manifest\.json: no such file"):
        write_report([run], tmp_path / "report.html")


def test_no_runs_and_a_folder_as_output_are_refused(run, tmp_path):
    with pytest.raises(SemidError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(SemidError, match="is a folder"):
        write_report([run], tmp_path)
    before = (run / "metrics.json").read_bytes()
    with pytest.raises(SemidError, match=r"metrics\.json: the report is an HTML page, and would replace a result file"):
        write_report([run], run / "metrics.json")
    assert (run / "metrics.json").read_bytes() == before


def test_the_report_replaces_an_older_one_and_leaves_nothing_else(run, tmp_path):
    out = tmp_path / "new" / "report.html"
    assert write_report([run], out) == write_report(run, out) == out
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(("num_items", "limit"), [(5, 100), (3_000, 300), (3_000, 20), (40, 1)])
def test_the_tree_is_bounded_and_its_tiles_add_up(num_items, limit):
    codes = np.random.default_rng(0).integers(0, 32, (num_items, 3)).astype(np.int32)
    drawn = tree(SemanticCatalog(pa.array(_ids(num_items)), codes, (32, 32, 32)), Items(), limit)
    figure = drawn["figure"]
    value = dict(zip(figure["ids"], figure["values"], strict=True))
    assert len(value) == len(figure["ids"]) == drawn["tiles"] <= limit
    assert value["all"] == num_items
    below: dict[str, int] = {}
    for parent, count in zip(figure["parents"], figure["values"], strict=True):
        below[parent] = below.get(parent, 0) + count
    assert all(below[parent] == value[parent] for parent in below if parent)
    assert drawn["cut"] == (num_items > limit)


def test_tiles_take_the_color_of_the_category_that_dominates(run):
    figure = next(figure for figure in _figures(_page(run)) if figure["kind"] == "tree")
    colors = dict(zip(figure["ids"], figure["colors"], strict=True))
    assert colors["all/a_0"] == "var(--tile-0)"  # all Skin
    assert colors["all/a_1"] == "var(--tile-1)"  # all Hair


def _learn(run: Path, levels: int, *, content_only: bool) -> None:
    """Give the run's catalogue a health.json that says what its codes know of the users."""
    ramp = [(n + 1) / 10 for n in range(levels)]
    codes = {"neighbors_sharing": ramp[::-1], "popularity_explained": ramp, "usage": [0.5] * levels}
    found: dict[str, Any] = {"codes": codes}
    if content_only:
        found["content_only"] = {
            "neighbors_sharing": [value / 2 for value in ramp[::-1]],
            "popularity_explained": [-0.1, *ramp[1:]],
            "usage": [0.25] * levels,
        }
    level = {"size": 2, "counts": [3, 2], "used": 2, "perplexity": 2.0, "gini": 0.25}
    stated = [{"level": n, **level} for n in range(levels + 1)]  # the last is the tie-break level
    shutil.rmtree(run / "catalog")
    with write_artifact(run / "catalog", kind="catalog", config={"tokenizer": {}}) as folder:
        SemanticCatalog(pa.array(_ids(5)), CODES, (2, 4, 2), tie_break=True).write(folder / "catalog.parquet")
        _write_json(
            folder / "health.json", {"items": 5, "levels": stated, "collisions": "min-cost", "collaborative": found}
        )


def _learned(page: str) -> list[list[str]]:
    section = page.partition('<section id="learned">')[2].partition("</section>")[0]
    return _table_rows(section.replace('<table class="levels">', "<table>"))


def test_codes_stand_beside_content_only(run):
    _learn(run, 2, content_only=True)
    page = _page(run)
    dash, times = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
    ratio = f"2.00{times}"
    assert _learned(page) == [
        ["a", "20%", "10%", ratio, "0.100", "\N{MINUS SIGN}0.100", dash, "50%", "25%", ratio, "0.250"],
        ["b", "10%", "5%", ratio, "0.200", "0.200", f"1.00{times}", "50%", "25%", ratio, "0.250"],
    ]
    assert "Collision policy</dt><dd>min-cost<" in page
    sharing, explained = (figure for figure in _figures(page) if figure["kind"] == "levels")
    assert [(line["name"], line["y"]) for line in sharing["lines"]] == [
        ("demo", [0.2, 0.1]),
        ("demo: content only", [0.1, 0.05]),
    ]
    assert explained["labels"] == ["a", "b"]


def test_an_unaligned_run_stands_beside_an_aligned_one_level_by_level(run, tmp_path):
    aligned, older = _make_run(tmp_path / "aligned"), _make_run(tmp_path / "older")
    _learn(run, 2, content_only=False)
    _learn(aligned, 3, content_only=True)
    rows = _learned(_page(run, aligned, older))
    assert [row[0] for row in rows] == ["a · demo", "a · aligned", "b · demo", "b · aligned", "c · aligned"]
    assert rows[0][1:4] == ["20%", "\N{EN DASH}", "\N{EN DASH}"]
    assert rows[1][1:4] == ["30%", "15%", "2.00\N{MULTIPLICATION SIGN}"]


def test_runs_that_share_their_content_only_codes_share_its_line(run, tmp_path):
    other = _make_run(tmp_path / "other")
    for one in (run, other):
        _learn(one, 2, content_only=True)
    sharing = next(figure for figure in _figures(_page(run, other)) if figure["kind"] == "levels")
    assert [line["series"] for line in sharing["lines"]] == [0, None, 1]


def test_without_content_only_there_are_no_columns_for_it(run):
    assert "What the codes know of users" not in _headings(_page(run))
    _learn(run, 2, content_only=False)
    page = _page(run)
    assert "What the codes know of users" in _headings(page)
    assert _learned(page)[0] == ["a", "20%", "0.100", "50%", "0.250"]


def test_of_many_levels_the_table_shows_some(run):
    _learn(run, 20, content_only=False)
    assert [row[0] for row in _learned(_page(run))] == ["a", "b", "d", "h", "p", "t"]


@pytest.mark.parametrize(
    ("provenance", "names", "lead"),
    [
        ({"dataset": "Another"}, ["Tiny &amp; Co", "Another"], "Tiny &amp; Co, Another"),
        (
            {"dataset": "Tiny & Co", "users": 4},  # such as another seed's world
            ["Tiny &amp; Co (demo)", "Tiny &amp; Co (other)"],
            "Tiny &amp; Co",
        ),
    ],
)
def test_only_runs_of_one_dataset_are_compared(run, tmp_path, provenance, names, lead):
    other = _make_run(tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    _write_json(other / "metrics.json", metrics | {"provenance": provenance})
    for one in (run, other):
        _learn(one, 1, content_only=False)
    page = _page(run, other)
    assert f"<h1>{lead}</h1>" in page
    assert re.findall("<h3>([^<]*), test split</h3>", page) == names
    assert re.findall("<h3>((?:Tiny|Another)[^<]*)</h3>", page.partition('id="learned"')[2]) == names
    assert len([figure for figure in _figures(page) if figure["kind"] == "levels"]) == 4


def test_two_datasets_of_one_name_in_a_run_are_told_apart_by_their_files(run):
    about = {"split": "test", "provenance": {"dataset": "Tiny & Co", "users": 4}}
    _write_json(run / "metrics_other_dataset.json", {**about, "rows": ROWS})
    names = re.findall(r"<h3>Tiny &amp; Co \(([^<]*)\), test split", _page(run))
    assert names == ["demo/metrics.json", "demo/metrics_other_dataset.json"]
