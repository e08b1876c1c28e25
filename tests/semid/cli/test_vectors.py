"""`semid vectors` and what the other commands do with the column that it makes."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid.catalog import SemanticCatalog
from semid.cli import app
from semid.data import Dataset
from semid.graphs import LightGCNConfig, PpmiConfig
from tests.semid.cli.test_main import _write_tables, run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("vectors")
    _write_tables(home)
    run("prepare parquet --items {h}/I.parquet --interactions {h}/X.parquet --out {h}/dataset --text-vectors 6", h=home)
    return home


def test_a_fused_column_is_tokenized_and_takes_new_items_by_their_texts(home, capsys):
    run("vectors --dataset {h}/dataset --out {h}/fused fuse --epochs 2 --column text_lsa --signal lightgcn", h=home)
    assert "made 128-d vectors of text_lsa (text_lsa_fuse)" in capsys.readouterr().out
    dataset = Dataset.load(home / "fused")
    assert dataset.vector_columns == ["text_lsa", "text_lsa_fuse"]
    assert dataset.source["text_lsa_fuse"]["signal"]["type"] == "LightGCNConfig"
    manifest = json.loads((home / "fused" / "manifest.json").read_text())
    assert manifest["parents"] == {"dataset": Dataset.load(home / "dataset").digest}
    run("tokenize --dataset {h}/fused --out {h}/catalog --columns text_lsa_fuse rq-kmeans --level-sizes 6 4", h=home)
    pq.write_table(pa.table({"item_id": ["new"], "title": ["word1 thing2 plain"]}), home / "N.parquet")
    run("catalog append --catalog {h}/catalog --input {h}/N.parquet", h=home)
    assert "new" in SemanticCatalog.load(home / "catalog").item_ids.to_pylist()


@pytest.mark.parametrize(
    ("way", "width"),
    [("fuse --epochs 1 --signal text_lsa", 12), ("smooth --layers 1", 6), ("alpharec --dim 3 --epochs 1", 3)],
)
def test_other_ways(home, tmp_path, way, width):
    run(f"vectors --dataset {{h}}/dataset --out {{t}}/out {way}", h=home, t=tmp_path)
    name = f"text_lsa_{way.split()[0]}"
    assert Dataset.load(tmp_path / "out").vectors(name).shape == (40, width)


@pytest.mark.parametrize("signal", ["freedom", "alpharec"])
def test_signals_that_read_content_read_the_column_that_is_named(signal):
    words = ["vectors", "--dataset", "d", "--out", "o", "fuse", "--column", "seen"]
    assert app.parse([*words, "--signal", signal]).way.plain().signal.column == "seen"
    assert app.parse(words).way.plain().signal == PpmiConfig()
    assert app.parse([*words, "--signal", "lightgcn"]).way.plain().signal == LightGCNConfig()  # it refuses a column


def test_a_column_that_is_not_there_is_named(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("vectors --dataset {h}/dataset --out {t}/out smooth --column text", h=home, t=tmp_path)
    assert "no vector column 'text'" in capsys.readouterr().err


def test_a_signal_that_is_not_there_is_answered_with_those_that_are(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("vectors --dataset {h}/dataset --out {t}/out fuse --signal lightgnc", h=home, t=tmp_path)
    said = capsys.readouterr().err
    assert "has no vector column 'lightgnc' (it has text_lsa), nor is that another signal (alpharec, bm3, cm3, " in said
    assert said.endswith("lightgcn, mmhcl, ppmi); did you mean 'lightgcn'?\n")
