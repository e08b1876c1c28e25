"""`semid prepare`: what it refuses before it reads, vectors of text made or not, suffixes, help."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from semid.cli import main
from semid.cli.prepare import Csv, Jsonl, Parquet
from semid.data import Dataset
from semid.errors import SemidError

ENCODERS = Path(__file__).parents[1] / "encoders" / "golden"
ITEMS = {"item_id": ["a", "b", "c"], "title": ["red wine", "red wine glass", "wine glass"]}
INTERACTIONS = {"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3]}


def tables(folder, *, items=ITEMS, interactions=INTERACTIONS, suffix=".parquet"):
    """Both tables as files, by the names of the options."""
    paths = {"items": folder / f"i{suffix}", "interactions": folder / f"x{suffix}"}
    write = pa.parquet.write_table if suffix == ".parquet" else pa.csv.write_csv
    for path, table in zip(paths.values(), (items, interactions), strict=True):
        write(pa.table(table), path)
    return paths


def test_vectors_of_text_are_made_where_there_are_none(tmp_path, capsys):
    Parquet(out=tmp_path / "d", text_vectors=5, **tables(tmp_path)).run()
    assert Dataset.load(tmp_path / "d").vectors("text_lsa").shape == (3, 2)
    assert "made 2-d vectors of the items' text (text_lsa)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("titles", "why"),
    [
        (["red", "green", "blue"], "expected at least 3 texts that share 2 words, got 3 with 0 shared words; "),
        (None, "has neither vector nor text columns; add one to the items table"),
    ],
)
def test_text_that_does_not_suffice_is_a_dataset_without_vectors(tmp_path, capsys, caplog, titles, why):
    caplog.set_level("INFO", "semid")
    items = {"item_id": ["a", "b", "c"]} | ({"title": titles} if titles else {})
    source = Parquet(out=tmp_path / "d", **tables(tmp_path, items=items))
    source.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no text vectors: ")]
    assert len(lines) == 1
    assert why in lines[0]
    dataset = Dataset.load(tmp_path / "d")
    assert dataset.vector_columns == []
    assert "text_lsa" not in dataset.config["source"]
    source.run()
    assert "skipped" in caplog.text


def test_pretrained_encoders_make_columns_in_place_of_the_words(tmp_path, capsys):
    bert = Path(shutil.copytree(ENCODERS / "bert", tmp_path / "bert"))
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    words = {
        "item_id": ["a", "b", "c"],
        "title": list(json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"])[-3:],
    }
    paths = tables(tmp_path, items=words)
    line = f"prepare parquet --items {paths['items']} --interactions {paths['interactions']} --out {tmp_path}/d"
    main([*line.split(), "--encoder", str(bert), f"short={bert}", "--encoder-tokens", "3"])
    dataset = Dataset.load(tmp_path / "d")
    assert dataset.vector_columns == ["text_bert", "short"]
    assert {stored.settings["max_length"] for stored in dataset.encoders} == {3}
    assert dataset.config["source"]["short"]["pooling"] == "cls"
    assert f"made 8-d vectors of title (short) by {bert}" in " ".join(capsys.readouterr().out.split())
    main([*line.split(), "--encoder", str(bert), f"short={bert}", "--encoder-tokens", "3"])
    assert "made" not in capsys.readouterr().out  # what is there is not encoded again
    assert Dataset.load(tmp_path / "d").digest == dataset.digest
    with pytest.raises(SystemExit):
        main([*line.split(), "--encoder", str(bert), "--encoder-tokens", "3"])
    assert "in use by a dataset of other settings (source.short: " in capsys.readouterr().err
    with pytest.raises(SemidError, match=r"two have one column \(text_bert, text_bert\); name each: COLUMN=FOLDER"):
        Parquet(out=tmp_path / "e", encoder=(str(bert), str(bert)), **paths).run()
    with pytest.raises(SemidError, match="encoder nowhere: no such folder"):  # before any table is read
        Parquet(out=tmp_path / "e", encoder=("nowhere",), items=tmp_path / "no", interactions=tmp_path / "no").run()
    with pytest.raises(SemidError, match="--encoder-tokens is for text encoders; name one after --encoder"):
        Parquet(out=tmp_path / "e", encoder=(str(ENCODERS / "vit"),), encoder_tokens=3, **paths).run()


def test_ties_are_shuffled_on_request(tmp_path, capsys):
    paths = tables(tmp_path, interactions=INTERACTIONS | {"timestamp": [1, 1, 1]})
    line = f"prepare parquet --items {paths['items']} --interactions {paths['interactions']} --text-vectors 0"
    for ties in ("source", *(f"shuffled:{seed}" for seed in range(20))):
        main([*line.split(), "--out", f"{tmp_path}/{ties}", "--ties", ties])
    shown = " ".join(capsys.readouterr().out.split())
    assert "order of equal times │ in source order" in shown
    assert "order of equal times │ shuffled by seed 19" in shown
    assert Dataset.load(tmp_path / "source").item.tolist() == [0, 1, 2]
    assert len({tuple(Dataset.load(tmp_path / f"shuffled:{seed}").item.tolist()) for seed in range(20)}) == 6
    main([*line.split(), "--out", f"{tmp_path}/plain"])  # control: the default is the source's order
    assert Dataset.load(tmp_path / "plain").digest != Dataset.load(tmp_path / "shuffled:0").digest
    assert Dataset.load(tmp_path / "plain").item.tolist() == [0, 1, 2]


def test_lines_sent_twice_are_dropped_on_request(tmp_path):
    doubled = pa.concat_tables([pa.table(INTERACTIONS), pa.table(INTERACTIONS)[:1]])
    paths = tables(tmp_path, interactions=doubled)
    line = f"prepare parquet --items {paths['items']} --interactions {paths['interactions']} --text-vectors 0"
    main([*line.split(), "--out", f"{tmp_path}/all"])
    main([*line.split(), "--out", f"{tmp_path}/once", "--drop-repeated-lines"])
    assert Dataset.load(tmp_path / "all").item.tolist() == [0, 0, 1, 2]
    once = Dataset.load(tmp_path / "once")
    assert once.item.tolist() == [0, 1, 2]
    assert once.source["repeated lines left out"] == 1


@pytest.mark.parametrize("ties", ["sorted", "shuffled:", "shuffled:-1", "source:1", "shuffled:x"])
def test_unknown_tie_rules_are_named_with_the_known_ones(capsys, ties):
    with pytest.raises(SystemExit) as stop:
        main(f"prepare parquet --items i --interactions x --out d --ties {ties}".split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == f"semid prepare: ties: expected source, shuffled or shuffled:SEED, got {ties!r}\n"


def test_no_vectors_on_request(tmp_path, capsys):
    Parquet(out=tmp_path / "d", text_vectors=0, **tables(tmp_path)).run()
    assert Dataset.load(tmp_path / "d").vector_columns == []
    assert "text vectors" not in capsys.readouterr().out
    with pytest.raises(SemidError, match=r"expected text_vectors of 0 \(make none\) or more, got -1"):
        Parquet(out=tmp_path / "e", text_vectors=-1, **tables(tmp_path)).run()


def test_the_items_own_vectors_are_enough(tmp_path):
    paths = tables(tmp_path)
    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    Parquet(out=tmp_path / "d", vectors={"v": tmp_path / "v.npy"}, **paths).run()
    assert Dataset.load(tmp_path / "d").vector_columns == ["v"]


def test_an_output_folder_in_use_is_found_before_anything_is_read(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    absent = {"items": tmp_path / "no.parquet", "interactions": tmp_path / "no.parquet"}
    with pytest.raises(SemidError, match="used: output folder in use by something that is no dataset artifact"):
        Parquet(out=tmp_path / "used", **absent).run()
    with pytest.raises(SemidError, match=r"no.parquet: no such file"):
        Parquet(out=tmp_path / "free", **absent).run()


@pytest.mark.parametrize(
    ("source", "suffix", "line"),
    [
        (Csv, ".parquet", "expected .csv or .tsv; use `semid prepare parquet`, both tables of its kind"),
        (Jsonl, ".parquet", "expected .jsonl or .ndjson; use `semid prepare parquet`"),
        (Parquet, ".csv", "expected .parquet or .pq; use `semid prepare csv`"),
    ],
)
def test_files_of_another_subcommand_are_refused_by_their_suffix(tmp_path, source, suffix, line):
    paths = tables(tmp_path, suffix=suffix)
    with pytest.raises(SemidError, match=line) as caught:
        source(out=tmp_path / "d", **paths).run()
    assert str(caught.value).startswith(f"{paths['items']}: ")
    {".parquet": Parquet, ".csv": Csv}[suffix](out=tmp_path / "d", **paths).run()
    assert Dataset.load(tmp_path / "d").num_items == 3


def test_unknown_suffixes_are_named_with_the_known_ones(tmp_path):
    paths = tables(tmp_path)
    paths["items"] = paths["items"].rename(tmp_path / "i.xlsx")
    with pytest.raises(SemidError, match=r"i.xlsx: unknown suffix '.xlsx'; expected .parquet, .csv"):
        Parquet(out=tmp_path / "d", **paths).run()


def test_help_says_what_a_source_is(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    printed = capsys.readouterr().out
    assert "Where the data come from." in printed
    assert "noqa" not in printed
