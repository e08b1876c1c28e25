"""Streaming encoding: the codes of `encode`, whatever the files look like, and bad input named by file, column, row."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from quantizers import ProductKMeans, ResidualKMeans, tie_break
from semid import artifacts
from semid.bulk import collisions, encode_files, write_catalog
from semid.catalog import Collisions, SemanticCatalog
from semid.cli import main
from semid.data import Dataset, Standardizer, storage
from semid.errors import SemidError
from semid.tokenizers import (
    RQVAE,
    ProductConfig,
    RQKmeansConfig,
    RQVaeConfig,
    SemanticTokenizer,
    TokenizerConfig,
    tokenize,
)
from semid.tokenizers.tokenizer import _encode

DIM, ROWS = 8, 100


def _vectors(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2, 3, size=(rows, DIM)).astype(np.float32)


def _models() -> dict[str, tuple]:
    key, x = jax.random.key(0), jnp.asarray(_vectors())
    rqvae = RQVaeConfig(level_sizes=(4, 5), hidden=(8,), latent=4)
    return {
        "rq-vae": (rqvae, RQVAE(rqvae, dim=DIM, rngs=nnx.Rngs(0))),
        "rq-k-means": (
            RQKmeansConfig((4, 5)),
            ResidualKMeans.fit(x, level_sizes=(4, 5), iterations=3, key=key),
        ),
        "opq": (
            ProductConfig((4, 4)),
            ProductKMeans.fit(x, level_sizes=(4, 4), iterations=3, rotation_rounds=1, key=key),
        ),
    }


@pytest.fixture(scope="module", params=["rq-vae", "rq-k-means", "opq"])
def any_tokenizer(request) -> SemanticTokenizer:
    method, model = _models()[request.param]
    return SemanticTokenizer(TokenizerConfig(method), Standardizer.fit([_vectors()]), model)


@pytest.fixture(scope="module")
def tokenizer() -> SemanticTokenizer:
    method, model = _models()["rq-k-means"]
    return SemanticTokenizer(TokenizerConfig(method), Standardizer.fit([_vectors()]), model)


def _lists(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _write(path, vectors: np.ndarray, *, row_group_size: int | None = None, **columns) -> None:
    columns = columns or {"v": _lists(vectors)}
    table = pa.table({"item_id": [f"{path.stem}-{row}" for row in range(len(vectors))], **columns})
    pq.write_table(table, path, row_group_size=row_group_size)


def test_codes_are_those_of_encode_standardized_by_hand(any_tokenizer):
    x = _vectors()
    by_hand = np.asarray(any_tokenizer.model.encode(jnp.asarray(any_tokenizer.standardizer(x))))
    np.testing.assert_array_equal(any_tokenizer.encode(x), by_hand)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(any_tokenizer.encode(half), any_tokenizer.encode(half.astype(np.float32)))
    for wrong, got in ((x[0], r"float32 \[8\]"), (x.astype(object), rf"object \[{len(x)}, 8\]")):
        with pytest.raises(SemidError, match=rf"vectors \[items, 8\] of numbers, got {got}; give a row per item"):
            any_tokenizer.encode(wrong)


@pytest.mark.parametrize("rows", [ROWS, 32, 31, 1, 0])
@pytest.mark.parametrize("row_group_size", [None, 7])
def test_files_of_any_length_get_the_codes_of_encode(any_tokenizer, tmp_path, rows, row_group_size):
    x = _vectors(rows)
    _write(tmp_path / "part.parquet", x, row_group_size=row_group_size)
    seen = []
    done = encode_files(
        any_tokenizer,
        [tmp_path / "part.parquet"],
        tmp_path / "codes",
        block=32,
        on_progress=lambda items, files: seen.append((items, files)),
    )
    table = pq.read_table(tmp_path / "codes/part.parquet", page_checksum_verification=True)
    assert table["item_id"].to_pylist() == [f"part-{row}" for row in range(rows)]
    assert table["codes"].to_pylist() == any_tokenizer.encode(x).tolist()
    assert done == ([str(tmp_path / "codes/part.parquet")], rows, [])
    assert [sum(of) for of in zip(*seen, strict=True)] == [rows, 1]


def test_an_output_reads_as_a_catalog(tokenizer, tmp_path):
    _write(tmp_path / "part.parquet", _vectors())
    encode_files(tokenizer, tmp_path / "part.parquet", tmp_path / "codes")
    catalog = SemanticCatalog.read(tmp_path / "codes/part.parquet")
    assert (catalog.level_sizes, catalog.tie_break) == ((4, 5), False)
    np.testing.assert_array_equal(catalog.lookup(["part-3"]), tokenizer.encode(_vectors()[3:4]))


@pytest.mark.parametrize("kind", ["half", "lists", "double", "two columns", "integer ids", "dictionary ids"])
def test_columns_of_other_types_get_the_same_codes(tokenizer, tmp_path, kind):
    x = _vectors().astype(np.float16).astype(np.float32)
    columns = {
        "half": {"v": _lists(x.astype(np.float16))},
        "lists": {"v": pa.array(x.tolist(), pa.list_(pa.float32()))},
        "double": {"v": _lists(x.astype(np.float64))},
        "two columns": {"v": _lists(x[:, :3]), "w": _lists(x[:, 3:].astype(np.float16))},
        "integer ids": {"v": _lists(x), "item_id": pa.array(range(ROWS))},
        "dictionary ids": {"v": _lists(x), "item_id": pa.array([f"d{row}" for row in range(ROWS)]).dictionary_encode()},
    }[kind]
    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({"item_id": [str(row) for row in range(ROWS)], "title": ["t"] * ROWS, **columns}), file)
    fitted = dataclasses.replace(tokenizer, columns=("v", "w") if "w" in columns else ("v",))
    encode_files(fitted, [file], tmp_path / "codes", block=32)
    table = pq.read_table(tmp_path / "codes/part.parquet")
    assert table["codes"].to_pylist() == tokenizer.encode(x).tolist()
    assert table["item_id"].type == pa.string()


def test_the_tokenizers_columns_are_taken_unless_others_are_named(tokenizer, tmp_path):
    x, other = _vectors(), _vectors(seed=1)
    _write(tmp_path / "part.parquet", x, other=_lists(other), v=_lists(x))
    named = dataclasses.replace(tokenizer, config=dataclasses.replace(tokenizer.config, columns=("v",)))
    encode_files(named, [tmp_path / "part.parquet"], tmp_path / "codes")
    encode_files(named, [tmp_path / "part.parquet"], tmp_path / "other", columns="other")
    codes = [pq.read_table(tmp_path / name / "part.parquet")["codes"].to_pylist() for name in ("codes", "other")]
    assert codes == [tokenizer.encode(x).tolist(), tokenizer.encode(other).tolist()]
    with pytest.raises(SemidError, match=r"8 dimensions in all, got other: 8, v: 8"):
        encode_files(tokenizer, [tmp_path / "part.parquet"], tmp_path / "all", columns=["other", "v"])
    with pytest.raises(SemidError, match="vector column 'v' is named twice; name it once"):
        encode_files(tokenizer, [tmp_path / "part.parquet"], tmp_path / "all", columns=["v", "v"])


def test_columns_of_another_order_get_the_codes_of_the_order_that_was_fitted(tmp_path):
    x, file = _vectors(), tmp_path / "swapped.parquet"
    items = pa.table({"item_id": [f"i{row}" for row in range(ROWS)]})
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    dataset = Dataset.build(items, interactions, name="two").with_vectors("v", x[:, :4]).with_vectors("w", x[:, 4:])
    config = TokenizerConfig(RQKmeansConfig((4, 5), iterations=3))
    codes = tokenize(dataset, config, out=tmp_path / "catalog").codes[:, :-1]
    _write(file, x, w=_lists(x[:, 4:]), v=_lists(x[:, :4]))
    loaded = SemanticTokenizer.from_pretrained(tmp_path / "catalog")
    assert loaded.columns == ("v", "w")
    found = pq.read_table(encode_files(loaded, [file], tmp_path / "codes").outputs[0])["codes"].to_pylist()
    assert found == codes.tolist()
    wrong = encode_files(loaded, [file], tmp_path / "wrong", columns=["w", "v"]).outputs[0]
    assert pq.read_table(wrong)["codes"].to_pylist() != found  # control: the order matters
    older = dataclasses.replace(loaded, columns=())  # as an artifact without the record loads
    with pytest.raises(SemidError, match=r"swapped.parquet: has vector columns w, v, and .* name them as columns"):
        encode_files(older, [file], tmp_path / "older")
    encode_files(older, [file], tmp_path / "older", columns=["v", "w"])
    assert pq.read_table(tmp_path / "older/swapped.parquet")["codes"].to_pylist() == found
    _write(tmp_path / "alone.parquet", x, v=_lists(x))  # of the right width in all
    with pytest.raises(SemidError, match=r"alone.parquet: column 'w' is missing; found item_id, v"):
        encode_files(loaded, [tmp_path / "alone.parquet"], tmp_path / "alone")
    write_catalog([wrong], tmp_path / "all", tokenizer=tmp_path / "catalog")
    assert SemanticTokenizer.from_pretrained(tmp_path / "all").columns == ("v", "w")


def test_a_stopped_call_goes_on_with_the_files_it_lacks(tokenizer, tmp_path):
    files = [tmp_path / f"{name}.parquet" for name in "abc"]
    for seed, file in enumerate(files):
        _write(file, _vectors(seed=seed))

    def stop_in_b(items: int, files: int) -> None:
        nonlocal left
        left -= items
        if left < 0:
            raise KeyboardInterrupt

    left = ROWS + 50
    with pytest.raises(KeyboardInterrupt):
        encode_files(tokenizer, files, tmp_path / "codes", block=32, on_progress=stop_in_b)
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["a.parquet"]
    done = encode_files(tokenizer, files, tmp_path / "codes", block=32)
    assert done[1:] == (2 * ROWS, [str(files[0])])
    for seed, file in enumerate(files):
        codes = pq.read_table(tmp_path / "codes" / file.name)["codes"].to_pylist()
        assert codes == tokenizer.encode(_vectors(seed=seed)).tolist()
    assert encode_files(tokenizer, files, tmp_path / "codes")[1:] == (0, [str(file) for file in files])


def test_what_stands_already_is_never_overwritten(tokenizer, tmp_path):
    file = tmp_path / "a.parquet"
    _write(file, _vectors())
    encode_files(tokenizer, [file], tmp_path / "codes")
    _write(tmp_path / "b.parquet", _vectors())
    _write(tmp_path / "codes/b.parquet", _vectors())
    with pytest.raises(SemidError, match=r"codes/b.parquet: exists, and was not written by `semid tokenize`"):
        encode_files(tokenizer, [tmp_path / "b.parquet"], tmp_path / "codes")
    with pytest.raises(SemidError, match=r"a.parquet: its codes would be written to this very file"):
        encode_files(tokenizer, [file], tmp_path / "codes/..")
    moved = dataclasses.replace(tokenizer.standardizer, mean=tokenizer.standardizer.mean + 1)
    with pytest.raises(SemidError, match="made by another tokenizer or of another input"):
        encode_files(dataclasses.replace(tokenizer, standardizer=moved), [file], tmp_path / "codes")
    (tmp_path / "more").mkdir()
    _write(tmp_path / "more/a.parquet", _vectors())
    with pytest.raises(SemidError, match="would both be written to"):
        encode_files(tokenizer, [file, tmp_path / "more/a.parquet"], tmp_path / "both")
    with artifacts.write_artifact(tmp_path / "model", kind="model", config={}):
        pass
    with pytest.raises(SemidError, match=r"model: is an artifact of semid; choose another folder .* \(--out\)"):
        encode_files(tokenizer, [file], tmp_path / "model")


def _with(value: float) -> np.ndarray:
    x = _vectors()
    x[41, 6] = value
    return x


def _ragged(width: int | None) -> pa.Array:
    rows = _vectors().tolist()
    rows[41] = None if width is None else rows[41][:width]
    return pa.array(rows, pa.list_(pa.float32()))


def _null_inside() -> pa.Array:
    rows = _vectors().tolist()
    rows[41][6] = None
    return pa.array(rows, pa.list_(pa.float32(), DIM))


BAD = {
    "nan": ({"v": _lists(_with(np.nan))}, r"bad.parquet: column 'v', row 42: .* NaN or infinity"),
    "infinity": ({"v": _lists(_with(-np.inf).astype(np.float16))}, r"bad.parquet: column 'v', row 42: .* NaN or inf"),
    "nan in the second": (
        {"v": _lists(_vectors()[:, :5]), "w": _lists(_with(np.nan)[:, 5:])},
        r"bad.parquet: column 'w', row 42: .* NaN or infinity",
    ),
    "short row": ({"v": _ragged(5)}, r"bad.parquet: column 'v', row 42: expected a vector of 8 dimensions, got 5"),
    "null row": ({"v": _ragged(None)}, r"bad.parquet: column 'v', row 42: .* got nothing"),
    "null inside": ({"v": _null_inside()}, r"bad.parquet: column 'v', row 42: a dimension is null"),
    "wrong width": ({"v": _lists(_vectors()[:, :5])}, r"bad.parquet: expected .* of 8 dimensions in all, got v: 5"),
    "no vectors": ({"title": pa.array(["t"] * ROWS)}, r"bad.parquet: expected .* of 8 dimensions in all, got none"),
    "two without width": ({"v": _ragged(8), "w": _ragged(8)}, r"columns \['v', 'w'\] have no fixed width"),
    "no id": (
        {"v": _lists(_vectors()), "item_id": pa.array([*"a" * 41, None, *"b" * 58])},
        r"bad.parquet: row 42, column 'item_id': is null",
    ),
    "binary ids": (
        {"v": _lists(_vectors()), "item_id": pa.array([["a"]] * ROWS)},
        r"bad.parquet: column 'item_id': expected strings or integers, got list",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_named(tokenizer, tmp_path, fault):
    columns, message = BAD[fault]
    _write(tmp_path / "bad.parquet", _vectors(), **columns)
    fitted = dataclasses.replace(tokenizer, columns=tuple(name for name in columns if name in "vw"))
    with pytest.raises(SemidError, match=message):
        encode_files(fitted, [tmp_path / "bad.parquet"], tmp_path / "codes", block=32)
    assert not list(tmp_path.glob("codes/*"))


@pytest.mark.parametrize("name", ["item_id", "v", "w"])
def test_columns_of_one_name_are_named(tokenizer, tmp_path, name):
    table = pa.table({"item_id": ["a"], "v": _lists(_vectors()[:1]), "w": [1]})
    pq.write_table(table.append_column(name, table[name]), tmp_path / "bad.parquet")
    with pytest.raises(SemidError, match=f"bad.parquet: column '{name}' occurs more than once; rename or drop one"):
        encode_files(tokenizer, [tmp_path / "bad.parquet"], tmp_path / "codes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_column": "asin"}, r"good.parquet: column 'asin' is missing; found item_id, v"),
        ({"columns": ["w"]}, r"good.parquet: column 'w' is missing; found item_id, v"),
        ({"columns": ["item_id"]}, r"good.parquet: column 'item_id': expected lists of numbers, got string"),
    ],
)
def test_a_column_that_is_not_there_is_named(tokenizer, tmp_path, options, message):
    _write(tmp_path / "good.parquet", _vectors())
    with pytest.raises(SemidError, match=message):
        encode_files(tokenizer, [tmp_path / "good.parquet"], tmp_path / "codes", **options)


def test_what_is_no_parquet_file_is_named(tokenizer, tmp_path):
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(SemidError, match=r"text.parquet: not a readable Parquet file"):
        encode_files(tokenizer, [tmp_path / "text.parquet"], tmp_path / "codes")
    with pytest.raises(SemidError, match=r"none.parquet: no such file"):
        encode_files(tokenizer, [tmp_path / "none.parquet"], tmp_path / "codes")


def test_an_unreadable_file_among_others_is_named_and_the_others_kept(tokenizer, tmp_path):
    names = [f"{number}.parquet" for number in range(6)]
    for number, name in enumerate(names):
        _write(tmp_path / name, _vectors(seed=number))
    (tmp_path / names[1]).write_text("no")
    cut = (tmp_path / names[3]).read_bytes()
    (tmp_path / names[3]).write_bytes(cut[: len(cut) // 2])
    damaged = bytearray((tmp_path / names[4]).read_bytes())
    damaged[100:2000] = bytes(1900)  # the footer still reads
    (tmp_path / names[4]).write_bytes(damaged)
    with pytest.raises(SemidError) as caught:
        encode_files(tokenizer, [tmp_path / name for name in names], tmp_path / "codes")
    first, *lines = str(caught.value).splitlines()
    assert first == "3 of 6 files failed, the codes of the others are kept:"
    assert [line.strip().partition(":")[0] for line in lines] == [str(tmp_path / names[n]) for n in (1, 3, 4)]
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {names[n] for n in (0, 2, 5)}


@pytest.mark.parametrize("retries", [0, 1])
def test_a_file_that_cannot_be_read_just_now_is_tried_again(tokenizer, tmp_path, monkeypatch, retries):
    _write(tmp_path / "a.parquet", _vectors())
    open_parquet, calls = storage.open_parquet, []

    def unsteady(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("connection reset")
        return open_parquet(path)

    monkeypatch.setattr(storage, "open_parquet", unsteady)
    if retries:
        assert encode_files(tokenizer, [tmp_path / "a.parquet"], tmp_path / "codes", retries=1).items == ROWS
        (tmp_path / "text.parquet").write_text("no")
        calls[:] = [""] * 2
        with pytest.raises(SemidError, match="not a readable Parquet file"):
            encode_files(tokenizer, [tmp_path / "text.parquet"], tmp_path / "codes", retries=1)
        assert len(calls) == 3  # what it holds is the same the next time
    else:
        with pytest.raises(SemidError, match=r"a.parquet: not encoded to .*codes/a.parquet .*connection reset"):
            encode_files(tokenizer, [tmp_path / "a.parquet"], tmp_path / "codes", retries=0)
    assert [path.name for path in tmp_path.glob("codes/*")] == ["a.parquet"] * retries


def test_what_a_killed_run_left_is_removed_and_nothing_else(tokenizer, tmp_path):
    _write(tmp_path / "a.parquet", _vectors())
    (tmp_path / "codes").mkdir()
    for name in (".a.parquet.writing-0", ".b.parquet.writing-0", ".a.parquet"):
        (tmp_path / "codes" / name).touch()
    encode_files(tokenizer, [tmp_path / "a.parquet"], tmp_path / "codes")
    left = {path.name for path in (tmp_path / "codes").iterdir()}
    assert left == {"a.parquet", ".b.parquet.writing-0", ".a.parquet"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """A catalogue folder, and the dataset's items as a Parquet file."""
    home = tmp_path_factory.mktemp("catalog")
    items = pa.table({"item_id": [f"i{row}" for row in range(ROWS)]})
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    dataset = Dataset.build(items, interactions, name="tiny").with_vectors("content", _vectors())
    config = TokenizerConfig(RQKmeansConfig((4, 5), iterations=3))
    codes = tokenize(dataset, config, out=home / "catalog").codes
    pq.write_table(dataset.items, home / "items.parquet")
    with artifacts.write_artifact(home / "model", kind="model", config={}):
        pass
    return home, codes[:, :-1]


def _encoded(home, folder) -> tuple[SemanticTokenizer, list[str]]:
    """The tokenizer of `home`, and files of codes of three times as many items."""
    tokenizer, inputs = SemanticTokenizer.from_pretrained(home / "catalog"), []
    for seed, name in enumerate(("x", "B", "ä")):
        inputs.append(f"{folder}/{name}.parquet")
        fs, path = storage.locate(inputs[-1])
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with fs.open(path, "wb") as file:
            pq.write_table(
                pa.table({"item_id": [f"{name}{n}" for n in range(ROWS)], "content": _lists(_vectors(seed=seed))}), file
            )
    return tokenizer, encode_files(tokenizer, inputs, f"{folder}/codes").outputs


@pytest.mark.parametrize("collisions", [Collisions.TIE_BREAK, Collisions.ALLOWED])
def test_the_catalog_of_many_files_is_in_order_of_ids_and_ties_are_broken_in_it(
    catalog, tmp_path, collisions, caplog, monkeypatch
):
    monkeypatch.setattr("semid.catalog.collisions._LARGE", 0.2)  # of 5 codes
    home, _ = catalog
    tokenizer, files = _encoded(home, tmp_path)
    write_catalog(files, tmp_path / "all", tokenizer=home / "catalog", collisions=collisions)
    table = pa.concat_tables([pq.read_table(file) for file in files])
    order = sorted(range(len(table)), key=lambda row: table["item_id"][row].as_py().encode())
    codes = np.array(table["codes"].to_pylist(), np.int32)[order]
    found = SemanticCatalog.read(tmp_path / "all/catalog.parquet")
    broken = tie_break(codes)
    assert broken.level_size > 1
    tied = collisions is Collisions.TIE_BREAK
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    largest = found.item_ids.filter(broken.codes[:, -1] == broken.level_size - 1).to_pylist()
    assert any(f"{broken.level_size} items, such as {item}, share all codes" in str(warned) for item in largest) == tied
    np.testing.assert_array_equal(found.codes, broken.codes if tied else codes)
    assert found.item_ids.to_pylist() == [table["item_id"][row].as_py() for row in order]
    assert (found.level_sizes, found.tie_break) == ((4, 5, broken.level_size) if tied else (4, 5), tied)
    again = SemanticTokenizer.from_pretrained(tmp_path / "all")
    assert again.config.collisions is collisions
    np.testing.assert_array_equal(again.encode(_vectors()), tokenizer.encode(_vectors()))
    parents = artifacts.read_artifact(tmp_path / "all", "catalog").parents
    assert parents == {"tokenizer": artifacts.read_artifact(home / "catalog", "catalog").digest}
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "catalog.parquet",
        "manifest.json",
        "tokenizer.safetensors",
    }


def test_the_catalog_does_not_depend_on_the_order_of_the_files_and_is_written_once(catalog, tmp_path, caplog):
    caplog.set_level("INFO", "semid")
    home, _ = catalog
    _, files = _encoded(home, tmp_path)
    write_catalog(files, tmp_path / "one", tokenizer=home / "catalog")
    write_catalog(files[::-1], tmp_path / "two", tokenizer=home / "catalog")
    one, two = (artifacts.read_artifact(tmp_path / name, "catalog") for name in ("one", "two"))
    assert one.digest == two.digest
    write_catalog(files, tmp_path / "two", tokenizer=home / "catalog")
    assert "skipped" in caplog.text
    for same in (tmp_path / "codes", f"{tmp_path}/codes/*.parquet"):  # the folder of encode_files, or a pattern
        write_catalog(same, tmp_path / "two", tokenizer=home / "catalog")
    write_catalog([files[0], *files[:1]], tmp_path / "first", tokenizer=home / "catalog")
    write_catalog(files[0], tmp_path / "first", tokenizer=home / "catalog")
    assert len(SemanticCatalog.load(tmp_path / "first")) == ROWS
    with pytest.raises(SemidError, match="in use by a catalog of other settings"):
        write_catalog(files[:2], tmp_path / "two", tokenizer=home / "catalog")


def test_names_of_files_are_no_patterns_and_those_of_folders_no_columns(catalog, tmp_path, monkeypatch):
    home, _ = catalog
    _, files = _encoded(home, tmp_path)
    odd = tmp_path / "codes=1" / "items[1].parquet"
    odd.parent.mkdir()
    for path, source in ((odd, files[0]), (odd.with_name("items1.parquet"), files[1])):
        path.write_bytes(Path(source).read_bytes())
    write_catalog(files[:1], tmp_path / "plain", tokenizer=home / "catalog")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_catalog([str(odd)], tmp_path / "odd", tokenizer=f"{home}/catalog@0", temp_directory="~/codes")
    one, two = (SemanticCatalog.read(tmp_path / name / "catalog.parquet") for name in ("plain", "odd"))
    assert one.digest == two.digest
    with pytest.raises(SemidError, match=r"appears 2 times, in .*codes/x\.parquet, .*codes=1/items\[1\]\.parquet;"):
        write_catalog([files[0], str(odd)], tmp_path / "both", tokenizer=home / "catalog")


def test_paths_are_those_of_any_file_system(catalog, tmp_path):
    home, _ = catalog
    tokenizer, files = _encoded(home, "memory://bulk")
    _, local = _encoded(home, tmp_path)
    assert files == [f"memory:///bulk/codes/{name}.parquet" for name in ("x", "B", "ä")]
    assert storage.find("memory://bulk/codes/*.parquet") == sorted(files)
    write_catalog(files, tmp_path / "far", tokenizer=home / "catalog")
    write_catalog(local, tmp_path / "near", tokenizer=home / "catalog")
    far, near = (SemanticCatalog.read(tmp_path / name / "catalog.parquet") for name in ("far", "near"))
    assert far.digest == near.digest
    inputs = [f"memory://bulk/{name}.parquet" for name in ("x", "B", "ä")]
    done = encode_files(tokenizer, inputs, "memory://bulk/codes")
    assert done == (files, 0, [f"memory:///bulk/{name}.parquet" for name in ("x", "B", "ä")])
    with pytest.raises(SemidError, match=r"far://a.parquet: Protocol not known: far"):
        encode_files(tokenizer, ["far://a.parquet"], "memory://bulk/codes")


def test_faults_of_many_files_are_named(catalog, tokenizer, tmp_path):
    home, _ = catalog
    _, files = _encoded(home, tmp_path)
    pq.write_table(pq.read_table(tmp_path / "B.parquet").slice(7, 1), tmp_path / "more.parquet")
    loaded = SemanticTokenizer.from_pretrained(home / "catalog")
    more = encode_files(loaded, [tmp_path / "more.parquet"], tmp_path / "codes").outputs
    with pytest.raises(SemidError, match=r"item id 'B7' appears 2 times, in .*codes/B.parquet, .*codes/more.parquet"):
        write_catalog(files + more, tmp_path / "all", tokenizer=home / "catalog")
    other = encode_files(tokenizer, [tmp_path / "more.parquet"], tmp_path / "other").outputs
    with pytest.raises(SemidError, match=r"other/more.parquet: its codes are not of this catalogue's tokenizer"):
        write_catalog(other, tmp_path / "all", tokenizer=home / "catalog")
    with pytest.raises(SemidError, match="take tie-break or allowed"):
        write_catalog(files, tmp_path / "all", tokenizer=home / "catalog", collisions=Collisions.MIN_COST)
    assert not [path for path in tmp_path.iterdir() if "all" in path.name]
    with pytest.raises(SemidError, match=r"all: not written; DuckDB, .* beyond memory_limit 1KB .--mem.*: .*[Mm]emory"):
        write_catalog(files, tmp_path / "all", tokenizer=home / "catalog", memory_limit="1KB")
    assert not [path for path in tmp_path.iterdir() if "all" in path.name]
    write_catalog(files, tmp_path / "all", tokenizer=home / "catalog")


def test_a_flipped_bit_in_a_file_of_codes_is_named_or_harmless(catalog, tmp_path):
    home, _ = catalog
    _, files = _encoded(home, tmp_path)
    write_catalog(files, tmp_path / "whole", tokenizer=home / "catalog")
    whole, file = SemanticCatalog.load(tmp_path / "whole").digest, Path(files[0])
    content, named = file.read_bytes(), 0
    for at in np.linspace(4, len(content) - 1, 16).astype(int).tolist():
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        out = tmp_path / f"flipped-{at}"
        try:
            write_catalog(files, out, tokenizer=home / "catalog")
        except SemidError:
            named += 1
            assert not out.exists()
        else:
            assert SemanticCatalog.load(out).digest == whole, at
    assert named > 8
    middle = len(content) // 4  # in a page of data
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    with pytest.raises(SemidError, match=r"codes/x\.parquet: is damaged \(.*; delete it, and encode its items again"):
        write_catalog(files, tmp_path / "all", tokenizer=home / "catalog")


def test_a_file_of_codes_whose_column_has_other_capitals_is_named(catalog, tmp_path):
    """A flipped bit of a name, which DuckDB takes for the same."""
    home, _ = catalog
    _, files = _encoded(home, tmp_path)
    table = pq.read_table(files[0])
    for name in ("Item_id", "cOdes"):
        renamed = table.rename_columns({name.lower(): name}).replace_schema_metadata(table.schema.metadata)
        pq.write_table(renamed, files[0])
        message = rf"^{files[0]}: is damaged \(has no column '{name.lower()}'\); delete it, and encode its items again"
        with pytest.raises(SemidError, match=message):
            write_catalog(files, tmp_path / "all", tokenizer=home / "catalog")


def test_a_file_of_codes_that_duckdb_alone_cannot_read_is_named(catalog, tmp_path, monkeypatch):
    home, _ = catalog
    _, files = _encoded(home, tmp_path)
    monkeypatch.setattr(collisions, "_verify", lambda path: None)  # as of damage that Arrow does not see
    middle = Path(files[1])
    middle.write_bytes((content := middle.read_bytes())[:4] + bytes(40) + content[44:])
    with pytest.raises(SemidError, match=rf"^{files[1]}: is damaged \(.*; delete it, and encode its items again"):
        write_catalog(files, tmp_path / "all", tokenizer=home / "catalog")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("package", ["distributed", "duckdb"])
def test_a_missing_extra_is_named(catalog, tmp_path, monkeypatch, package):
    home, _ = catalog
    tokenizer, files = _encoded(home, tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "semid.bulk.cluster", raising=False)
    calls = {
        "distributed": lambda: encode_files(tokenizer, files, tmp_path / "more", scheduler="tcp://127.0.0.1:1"),
        "duckdb": lambda: write_catalog(files, tmp_path / "all", tokenizer=home / "catalog"),
    }
    with pytest.raises(SemidError, match=rf"{package}.* pip install 'semid\[distributed\]'"):
        calls[package]()


def test_the_command_encodes_a_pattern_with_a_catalogues_tokenizer(catalog, tmp_path, capsys):
    home, codes = catalog
    line = f"tokenize --catalog {home}/catalog --input {home}/*.parquet --out {tmp_path}/codes".split()
    main(line)
    assert pq.read_table(tmp_path / "codes/items.parquet")["codes"].to_pylist() == codes.tolist()
    said = capsys.readouterr().out
    assert re.search(r": 100 items, [\d,]+ items per second", said)
    assert "skipped" not in said
    main([*line, "--new-catalog", str(tmp_path / "all"), "--collisions", "tie-break"])
    assert "1 files were encoded before; skipped" in capsys.readouterr().out
    assert set(SemanticCatalog.read(tmp_path / "all/catalog.parquet").item_ids.to_pylist()) == {
        f"i{n}" for n in range(ROWS)
    }
    assert f"new-catalog: {tmp_path}/all\n" in (tmp_path / "all/config.yaml").read_text()
    assert not (tmp_path / "codes/config.yaml").exists()


def test_a_generator_is_trained_on_the_catalog_of_many_files_in_the_datasets_order(catalog, tmp_path, monkeypatch):
    home, _ = catalog
    tokenizer = SemanticTokenizer.from_pretrained(home / "catalog")
    files = encode_files(tokenizer, [home / "items.parquet"], tmp_path / "codes").outputs
    write_catalog(files, tmp_path / "all", tokenizer=home / "catalog")
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    Dataset.build(pq.read_table(home / "items.parquet"), interactions, name="tiny").save(tmp_path / "dataset")
    given = []

    def capture(dataset, catalog, *_, **__):
        given.append((dataset, catalog))
        raise SemidError("that is enough")

    monkeypatch.setattr("semid.generators.training._build_untrained", capture)
    with pytest.raises(SystemExit):
        main(f"train --dataset {tmp_path}/dataset --catalog {tmp_path}/all --out {tmp_path}/model".split())
    ((dataset, found),) = given
    assert found.item_ids.equals(dataset.item_ids)
    read = SemanticCatalog.read(tmp_path / "all/catalog.parquet")
    assert not read.item_ids.equals(dataset.item_ids)
    np.testing.assert_array_equal(found.codes, read.lookup(dataset.item_ids.to_pylist()))


_JOIN = "--catalog {home}/catalog --input {home}/items.parquet --collisions tie-break --new-catalog"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--catalog {home}/catalog --input {home}/none*.parquet", r"none\*.parquet: no such file"),
        ("--catalog {home}/catalog --input {home}/items.parquet --columns title", "column 'title' is missing"),
        ("--catalog {home}/catalog", "--catalog FOLDER .the tokenizer. and --input FILES .the items. go together"),
        ("--input {home}/items.parquet", "expected either --dataset FOLDER to train on, or --catalog and --input"),
        ("--dataset {home} --catalog {home}/catalog", "expected either --dataset FOLDER to train on, or --catalog"),
        ("--dataset {home} --id-column asin", "--id-column is for encoding files with --catalog"),
        ("--catalog {home}/catalog --input {home}/items.parquet --seed 1", "--seed is for training"),
        (
            "--catalog {home}/catalog --input {home}/items.parquet --collisions allowed",
            "--collisions is for --new-catalog",
        ),
        (
            "--catalog {home}/catalog --input {home}/items.parquet --memory-limit 2GiB",
            "--memory-limit is for --new-catalog",
        ),
        ("--catalog {home}/catalog --input {home}/items.parquet rq-kmeans", "a method is for training"),
        ("--catalog {home}/catalog --input {home}/items.parquet --scheduler 10.0.0.1", "expected local, or an address"),
        (
            "--catalog {home}/catalog --input {home}/items.parquet --new-catalog {home}/new --collisions sinkhorn",
            "collisions 'sinkhorn' needs all vectors at once; for that of files take tie-break or allowed",
        ),
        (f"{_JOIN} {{home}}/new --memory-limit lots", "memory_limit 'lots' .--memory-limit.: expected .*4GiB"),
        (f"{_JOIN} {{home}}", "output folder in use by something that is no catalog artifact"),
        (f"{_JOIN} {{out}}/codes", r"codes: would hold the files of codes \(--out .*/codes\); choose a folder of its"),
        (f"{_JOIN} {{out}}", "would hold the files of codes"),
        ("--catalog {home}/catalog --input {home}/items.parquet --retries=-1", "expected 0 or more retries .--ret"),
        (f"{_JOIN} {{home}}/catalog", "catalog: in use by another catalogue"),
        (
            f"{_JOIN.replace('/catalog', '/model')} {{home}}/new",
            "expected an artifact of kind 'catalog', found 'model'",
        ),
    ],
)
def test_the_command_answers_bad_input_with_one_line(catalog, tmp_path, capsys, options, message):
    home, _ = catalog
    with pytest.raises(SystemExit):
        main(["tokenize", "--out", str(tmp_path / "codes"), *options.format(home=home, out=tmp_path).split()])
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(message, said)
    assert not (tmp_path / "codes").exists()


def test_a_catalog_of_no_files_and_of_an_unknown_policy_is_refused(catalog, tmp_path):
    for codes, policy, message in (
        ([], "allowed", "expected at least one file of codes, got none"),
        (["c.parquet"], "none", "collisions: expected one of tie-break, popularity, .*, got 'none'"),
        (["c.parquet"], "allowed", "c.parquet: no such file"),
    ):
        with pytest.raises(SemidError, match=message):
            write_catalog(codes, tmp_path / "out", tokenizer=catalog[0] / "catalog", collisions=policy)


def test_blocks_of_all_files_share_one_program(tokenizer, tmp_path):
    files = [tmp_path / f"{rows}.parquet" for rows in (5, 31, 64)]
    for file in files:
        _write(file, _vectors(int(file.stem)), row_group_size=9)
    before = _encode._cache_size()
    encode_files(tokenizer, files, tmp_path / "codes", block=24)
    assert _encode._cache_size() == before + 1
