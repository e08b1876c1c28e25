"""Streaming encoding: the codes of `encode`, whatever the files look like, and bad input named by file, column, row."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from quantizers import ProductKMeans, ResidualKMeans
from semid.autoencoder import RQVAE
from semid.bulk import count_items, encode_files
from semid.catalog import SemanticCatalog
from semid.cli import main
from semid.data.dataset import Dataset
from semid.data.features import Standardizer
from semid.errors import SemidError
from semid.tokenizer import (
    ProductConfig,
    RQKmeansConfig,
    RQVaeConfig,
    SemanticTokenizer,
    TokenizerConfig,
    _encode,
    tokenize,
)

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


@pytest.mark.parametrize("rows", [ROWS, 32, 31, 1, 0])
@pytest.mark.parametrize("row_group_size", [None, 7])
def test_files_of_any_length_get_the_codes_of_encode(any_tokenizer, tmp_path, rows, row_group_size):
    x = _vectors(rows)
    _write(tmp_path / "part.parquet", x, row_group_size=row_group_size)
    seen = []
    done = encode_files(any_tokenizer, [tmp_path / "part.parquet"], tmp_path / "codes", block=32, on_items=seen.append)
    table = pq.read_table(tmp_path / "codes/part.parquet", page_checksum_verification=True)
    assert table["item_id"].to_pylist() == [f"part-{row}" for row in range(rows)]
    expected = any_tokenizer.encode(x).tolist() if rows else []
    assert table["codes"].to_pylist() == expected
    assert done == (rows, [])
    assert sum(seen) == rows


def test_an_output_reads_as_a_catalog(tokenizer, tmp_path):
    _write(tmp_path / "part.parquet", _vectors())
    encode_files(tokenizer, [tmp_path / "part.parquet"], tmp_path / "codes")
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
    encode_files(tokenizer, [file], tmp_path / "codes", block=32)
    table = pq.read_table(tmp_path / "codes/part.parquet")
    assert table["codes"].to_pylist() == tokenizer.encode(x).tolist()
    assert table["item_id"].type == pa.string()


def test_the_tokenizers_columns_are_taken_unless_others_are_named(tokenizer, tmp_path):
    x, other = _vectors(), _vectors(seed=1)
    _write(tmp_path / "part.parquet", x, other=_lists(other), v=_lists(x))
    named = dataclasses.replace(tokenizer, config=dataclasses.replace(tokenizer.config, columns=("v",)))
    encode_files(named, [tmp_path / "part.parquet"], tmp_path / "codes")
    encode_files(named, [tmp_path / "part.parquet"], tmp_path / "other", columns=["other"])
    codes = [pq.read_table(tmp_path / name / "part.parquet")["codes"].to_pylist() for name in ("codes", "other")]
    assert codes == [tokenizer.encode(x).tolist(), tokenizer.encode(other).tolist()]
    with pytest.raises(SemidError, match=r"8 dimensions in all, got other: 8, v: 8"):
        encode_files(tokenizer, [tmp_path / "part.parquet"], tmp_path / "all")


def test_a_stopped_call_goes_on_with_the_files_it_lacks(tokenizer, tmp_path):
    files = [tmp_path / f"{name}.parquet" for name in "abc"]
    for seed, file in enumerate(files):
        _write(file, _vectors(seed=seed))

    def stop_in_b(items: int) -> None:
        nonlocal left
        left -= items
        if left < 0:
            raise KeyboardInterrupt

    left = ROWS + 50
    with pytest.raises(KeyboardInterrupt):
        encode_files(tokenizer, files, tmp_path / "codes", block=32, on_items=stop_in_b)
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["a.parquet"]
    done = encode_files(tokenizer, files, tmp_path / "codes", block=32)
    assert done == (2 * ROWS, files[:1])
    for seed, file in enumerate(files):
        codes = pq.read_table(tmp_path / "codes" / file.name)["codes"].to_pylist()
        assert codes == tokenizer.encode(_vectors(seed=seed)).tolist()
    assert encode_files(tokenizer, files, tmp_path / "codes") == (0, files)
    assert count_items(files) == 3 * ROWS


def test_what_stands_already_is_never_overwritten(tokenizer, tmp_path):
    file = tmp_path / "a.parquet"
    _write(file, _vectors())
    encode_files(tokenizer, [file], tmp_path / "codes")
    with pytest.raises(SemidError, match="not written by `semid encode`"):
        encode_files(tokenizer, [file], tmp_path)  # into the folder of the inputs
    moved = dataclasses.replace(tokenizer.standardizer, mean=tokenizer.standardizer.mean + 1)
    with pytest.raises(SemidError, match="made by another tokenizer or of another input"):
        encode_files(dataclasses.replace(tokenizer, standardizer=moved), [file], tmp_path / "codes")
    (tmp_path / "more").mkdir()
    _write(tmp_path / "more/a.parquet", _vectors())
    with pytest.raises(SemidError, match="would both be written to"):
        encode_files(tokenizer, [file, tmp_path / "more/a.parquet"], tmp_path / "both")


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
        r"bad.parquet: column 'item_id', row 42: the id is missing",
    ),
    "binary ids": (
        {"v": _lists(_vectors()), "item_id": pa.array([["a"]] * ROWS)},
        r"bad.parquet: column 'item_id': expected strings, got list",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_named(tokenizer, tmp_path, fault):
    columns, message = BAD[fault]
    _write(tmp_path / "bad.parquet", _vectors(), **columns)
    with pytest.raises(SemidError, match=message):
        encode_files(tokenizer, [tmp_path / "bad.parquet"], tmp_path / "codes", block=32)
    assert not list(tmp_path.glob("codes/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_column": "asin"}, r"good.parquet: column 'asin' is missing; found item_id, v"),
        ({"columns": ["w"]}, r"good.parquet: column 'w' is missing; found item_id, v"),
        ({"columns": ["item_id"]}, r"good.parquet: column 'item_id': expected lists of floats, got string"),
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
        count_items([tmp_path / "none.parquet"])


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """A catalogue folder, and the dataset's items as a Parquet file."""
    home = tmp_path_factory.mktemp("catalog")
    items = pa.table({"item_id": [f"i{row}" for row in range(ROWS)]})
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    dataset = Dataset.build(items, interactions, name="tiny").with_vectors("content", _vectors())
    config = TokenizerConfig(RQKmeansConfig((4, 5), iterations=3))
    codes = tokenize(dataset, config, out=home / "catalog", parents={}).codes
    pq.write_table(dataset.items, home / "items.parquet")
    return home, codes[:, :-1]


def test_the_command_encodes_a_pattern_with_a_catalogues_tokenizer(catalog, tmp_path, capsys):
    home, codes = catalog
    line = ["encode", "--catalog", str(home / "catalog"), "--input", str(home / "*.parquet"), "--out", str(tmp_path)]
    main(line)
    assert pq.read_table(tmp_path / "items.parquet")["codes"].to_pylist() == codes.tolist()
    said = capsys.readouterr().out
    assert re.search(r": 100 items, [\d,]+ items per second", said)
    assert "skipped" not in said
    main(line)
    assert "1 files were encoded before; skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "{home}/none*.parquet"], r"none\*.parquet: no such file"),
        (["--input", "{home}/items.parquet", "--columns", "title"], "column 'title' is missing"),
    ],
)
def test_the_command_answers_bad_input_with_one_line(catalog, tmp_path, capsys, options, message):
    home, _ = catalog
    words = ["encode", "--catalog", str(home / "catalog"), "--out", str(tmp_path / "codes")]
    with pytest.raises(SystemExit):
        main(words + [option.format(home=home) for option in options])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "codes").exists()


def test_blocks_of_all_files_share_one_program(tokenizer, tmp_path):
    files = [tmp_path / f"{rows}.parquet" for rows in (5, 31, 64)]
    for file in files:
        _write(file, _vectors(int(file.stem)), row_group_size=9)
    before = _encode._cache_size()
    encode_files(tokenizer, files, tmp_path / "codes", block=24)
    assert _encode._cache_size() == before + 1
