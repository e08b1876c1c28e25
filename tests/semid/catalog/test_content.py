"""Items by their raw columns at every door after `prepare`: the encoders of the dataset go with the tokenizer."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from semid.bulk import encode_files, write_catalog
from semid.catalog import Collisions, SemanticCatalog, append
from semid.catalog.versions import vectors
from semid.data import Dataset, read_id_file, read_table
from semid.encoders import restore_encoders, with_text_vectors
from semid.errors import SemidError
from semid.tokenizers import RQKmeansConfig, SemanticTokenizer, TokenizerConfig, tokenize

DIM = 4
CONFIG = TokenizerConfig(RQKmeansConfig((3, 3)), collisions=Collisions.ALLOWED)
WORDS = ["red", "blue", "green", "matte", "gloss", "oil", "motor", "gear", "novel", "author", "ink", "story"]


def _texts(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 4, replace=False)) for _ in range(n)]


TITLES, NEW = _texts(20, 0), _texts(5, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    items = pa.table({"item_id": [f"i{row}" for row in range(20)], "title": TITLES, "brand": ["b"] * 20})
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    made = with_text_vectors(Dataset.build(items, interactions, name="words"), dim=DIM)
    folder = tmp_path_factory.mktemp("data") / "dataset"
    made.save(folder)
    return Dataset.load(folder)


@pytest.fixture
def folder(dataset, tmp_path) -> Path:
    tokenize(dataset, CONFIG, out=tmp_path / "catalog")
    return tmp_path / "catalog"


def _write(path: Path, ids: list[str], titles: list[str]) -> Path:
    table = pa.table({"item_id": ids, "title": titles, "brand": ["b"] * len(ids), "price": [1.5] * len(ids)})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def _vectors(dataset: Dataset, titles: list[str]) -> np.ndarray:
    """What a dataset of the old and the new items, encoded by hand with the old words, has."""
    return restore_encoders(dataset.encoders)["text_lsa"].encode(
        pa.table({"title": titles, "brand": ["b"] * len(titles)})
    )


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_new_items_are_appended_by_their_texts(dataset, folder, tmp_path, suffix):
    names = [f"n{row}" for row in range(len(NEW))]
    tokenizer = SemanticTokenizer.from_pretrained(folder)
    assert append(folder, [_write(tmp_path / f"new{suffix}", names, NEW)], tokenizer=tokenizer).new == len(NEW)
    expected = _vectors(dataset, NEW)
    codes = SemanticCatalog.load(folder).lookup(names)
    np.testing.assert_array_equal(codes, tokenizer.encode(expected))
    np.testing.assert_array_equal(vectors(folder, ["text_lsa"], pa.array(names)), expected)  # for models that read them


def test_a_table_of_items_is_encoded_as_their_vectors_are(dataset, folder):
    tokenizer, expected = SemanticTokenizer.from_pretrained(folder), dataset.vectors("text_lsa")
    raw = dataset.items.drop_columns(["text_lsa"])
    for items in (raw, raw.to_pandas(), dataset.items):
        np.testing.assert_array_equal(tokenizer.content_vectors(items), expected)
        np.testing.assert_array_equal(tokenizer.encode(items), tokenizer.encode(expected))
    given = raw.append_column("text_lsa", dataset.items["text_lsa"].combine_chunks().take(pa.array([3] * 20)))
    np.testing.assert_array_equal(tokenizer.content_vectors(given), expected[[3] * 20])  # vectors that are there count
    with pytest.raises(
        SemidError, match="items: column 'brand', from which 'text_lsa' is computed, is missing; found item_"
    ):
        tokenizer.encode(raw.drop_columns(["brand"]))


def test_files_of_texts_are_encoded_and_their_catalogue_has_the_encoders_too(dataset, folder, tmp_path):
    names = [f"n{row}" for row in range(len(NEW))]
    inputs = [_write(tmp_path / "a.parquet", names[:3], NEW[:3]), _write(tmp_path / "b.jsonl", names[3:], NEW[3:])]
    tokenizer = SemanticTokenizer.from_pretrained(folder)
    encoded = encode_files(tokenizer, inputs, tmp_path / "codes")
    assert [Path(path).name for path in encoded.outputs] == ["a.parquet", "b.parquet"]
    write_catalog(encoded.outputs, tmp_path / "all", tokenizer=folder, collisions=CONFIG.collisions)
    codes = SemanticCatalog.load(tmp_path / "all").lookup(names)
    np.testing.assert_array_equal(codes, tokenizer.encode(_vectors(dataset, NEW)))
    more = _write(tmp_path / "c.csv", ["m"], NEW[:1])
    append(tmp_path / "all", [more], tokenizer=SemanticTokenizer.from_pretrained(tmp_path / "all"))
    assert SemanticCatalog.load(tmp_path / "all").lookup(["m"])[0].tolist() == codes[0].tolist()


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_folder_as_spark_writes_it_is_read_at_every_door(dataset, folder, tmp_path, caplog, suffix):
    """Parts, and partitions whose value is a text that the encoder reads; what is not used is said once."""
    caplog.set_level("INFO", "semid")
    names = [f"n{row}" for row in range(len(NEW))]
    parts = tmp_path / "new" / "brand=b"
    parts.mkdir(parents=True)
    for part, rows in enumerate((slice(0, 2), slice(2, 5))):
        file = _write(parts / f"part-{part}{suffix}", names[rows], NEW[rows])
        table = read_table(file).drop_columns(["brand"])
        pq.write_table(table, file) if suffix == ".parquet" else pyarrow.csv.write_csv(table, file)
    (tmp_path / "new" / "_SUCCESS").touch()
    tokenizer = SemanticTokenizer.from_pretrained(folder)
    expected = tokenizer.encode(_vectors(dataset, NEW))
    assert append(folder, [tmp_path / "new"], tokenizer=tokenizer).new == len(NEW)
    np.testing.assert_array_equal(SemanticCatalog.load(folder).lookup(names), expected)
    assert caplog.messages == ["not used: price"]
    caplog.clear()
    outputs = encode_files(tokenizer, [tmp_path / "new"], tmp_path / "codes").outputs
    assert [Path(path).name for path in outputs] == ["brand=b-part-0.parquet", "brand=b-part-1.parquet"]
    codes = pa.concat_tables([pq.read_table(path, partitioning=None) for path in outputs])["codes"]
    np.testing.assert_array_equal(codes.to_pylist(), expected)
    assert caplog.messages == ["not used: price"]


def test_texts_without_a_known_word_are_named(folder, tmp_path):
    file = _write(tmp_path / "new.csv", ["x", "y"], ["unheardof", NEW[0]])
    with pytest.warns(UserWarning, match=r"new\.csv: 1 of 2 items have nothing in title, brand that the encoder of 't"):
        append(folder, [file], tokenizer=SemanticTokenizer.from_pretrained(folder))


def test_texts_for_a_tokenizer_without_encoders_are_refused(dataset, tmp_path):
    bare = dataset.replace(encoders=())
    tokenize(bare, CONFIG, out=tmp_path / "catalog")
    file = _write(tmp_path / "new.csv", ["x"], NEW[:1])
    with pytest.raises(SemidError, match=r"new\.csv: column 'text_lsa' is missing; found item_id, title, brand, price"):
        append(tmp_path / "catalog", [file], tokenizer=SemanticTokenizer.from_pretrained(tmp_path / "catalog"))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_later_files_may_name_columns_as_the_datasets_own_tables_do(dataset, tmp_path, suffix):
    """Catalogue and tokenizer know them from `prepare --columns`; digits stay texts, the dataset's names come first."""
    folder, names = tmp_path / "catalog", {"item_id": "sku", "title": "name", "user_id": "customer"}
    tokenize(dataset.replace(source={"type": "tables", "columns": names}), CONFIG, out=folder)
    ids, theirs = ["007", "008"], pa.table({"sku": ["007", "008"], "name": NEW[:2], "brand": ["b"] * 2})
    tokenizer = SemanticTokenizer.from_pretrained(folder)
    expected = tokenizer.encode(_vectors(dataset, NEW[:2]))
    np.testing.assert_array_equal(tokenizer.encode(theirs), expected)
    np.testing.assert_array_equal(tokenizer.encode(theirs.append_column("title", pa.array(NEW[2:4]))),
                                  tokenizer.encode(_vectors(dataset, NEW[2:4])))  # fmt: skip
    file = _write(tmp_path / f"new{suffix}", ids, NEW[:2])
    table = read_table(file).rename_columns({"item_id": "sku", "title": "name"})
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        pq.write_table(table, file) if suffix == ".parquet" else pyarrow.csv.write_csv(table, file)
    encoded = encode_files(tokenizer, [file], tmp_path / "codes")
    assert pq.read_table(encoded.outputs[0]).to_pydict() == {"item_id": ids, "codes": expected.tolist()}
    write_catalog(encoded.outputs, tmp_path / "all", tokenizer=folder, collisions=CONFIG.collisions)
    for catalog in (folder, tmp_path / "all"):
        assert SemanticCatalog.load(catalog).source_columns == names
    assert append(folder, [file], tokenizer=tokenizer).new == 2
    np.testing.assert_array_equal(SemanticCatalog.load(folder).lookup(ids), expected)
    assert SemanticCatalog.load(folder).source_columns == names
    assert read_id_file(file, columns=names) == ids
    pq.write_table(table.drop_columns(["sku"]), tmp_path / "bad.parquet")
    with pytest.raises(SemidError, match=r"bad\.parquet: column 'item_id' \(or 'sku'\) is missing; found name, brand"):
        append(folder, [tmp_path / "bad.parquet"], tokenizer=tokenizer)
