import io
import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet
import pytest
from PIL import Image

from semid.artifacts import sha256
from semid.data import Dataset, GlobalTime, LeaveOneOut, read_table
from semid.errors import SemidError

ITEMS = {"item_id": ["007", "08", "9"], "title": ["x, y", 'say "z"', "two\nlines"], "price": [1.5, None, 3.0]}
INTERACTIONS = {
    "user_id": ["01", "01", "01", "2"],
    "item_id": ["007", "08", "9", "08"],
    "timestamp": [30, 20, 10, 5],
    "event": ["1", "2", "1", "2"],
}


def write(table, path):
    if path.suffix in (".parquet", ".pq"):
        pa.parquet.write_table(pa.table(table), path)
    elif path.suffix in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        pa.csv.write_csv(pa.table(table), path, pa.csv.WriteOptions(delimiter=separator))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in pa.table(table).to_pylist()))
    return path


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".parquet", ".pq", ".csv", ".tsv", ".jsonl", ".ndjson"])
def test_every_format_gives_the_same_dataset(tmp_path, suffix):
    paths = [write(table, tmp_path / f"{name}{suffix}") for name, table in (("i", ITEMS), ("x", INTERACTIONS))]
    dataset = Dataset.from_tables(*paths, name="shop")
    assert dataset.items.to_pydict() == ITEMS
    assert dataset.users.to_pylist() == ["01", "2"]
    assert dataset.user.tolist() == [0, 0, 0, 1]
    assert dataset.item.tolist() == [2, 1, 0, 1]
    assert dataset.time.tolist() == [10, 20, 30, 5]
    assert dataset.event.to_pylist() == ["1", "2", "1", "2"]
    assert (dataset.name, dataset.time_unit, dataset.split_rule) == ("shop", "seconds", LeaveOneOut())
    assert dataset.source == {"type": "tables", "sha256": {"items": sha256(paths[0]), "interactions": sha256(paths[1])}}


def test_csv_ids_are_strings_and_empty_fields_null(tmp_path):
    path = tmp_path / "i.csv"
    path.write_text('item_id,brand,year\n007,NA,1999\n"",,\n')
    assert read_table(path).to_pydict() == {"item_id": ["007", None], "brand": ["NA", None], "year": [1999, None]}


def test_iso_times_in_csv_are_seconds(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("user_id,item_id,timestamp\nu,007,1970-01-02 00:00:00\nu,08,1970-01-01 00:00:01\n")
    dataset = Dataset.from_tables(pa.table(ITEMS), path, name="t", split_rule=GlobalTime())
    assert dataset.time.tolist() == [1, 86400]
    assert dataset.split_rule == GlobalTime()


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("fraction", ["", ".5"])
def test_iso_times_are_the_same_in_every_format(tmp_path, suffix, fraction):
    times = [f"2020-01-0{4 - day}T01:02:03{fraction}" for day in range(4)]
    path = write(INTERACTIONS | {"timestamp": times}, tmp_path / f"x{suffix}")
    dataset = Dataset.from_tables(pa.table(ITEMS), path, name="t")
    day = 86_400
    first = 1_577_836_800 + 3_723  # 2020-01-01 01:02:03
    assert dataset.time.tolist() == [first + day, first + 2 * day, first + 3 * day, first]


def test_times_of_one_second_are_ordered_by_what_was_cut():
    times = pd.DataFrame(INTERACTIONS | {"timestamp": [1.7e9 + 0.75, 1.7e9 + 0.25, 1.7e9 + 0.5, 1.7e9]})
    dataset = Dataset.from_tables(pd.DataFrame(ITEMS), times, name="t")
    assert dataset.item.tolist() == [1, 2, 0, 1]
    assert set(dataset.time.tolist()) == {1_700_000_000}


@pytest.mark.parametrize("column", ["title", "name", "text", "brand", "description", "category"])
def test_numbers_in_text_columns_of_csv_are_text(tmp_path, column):
    path = tmp_path / "i.csv"
    path.write_text(f"item_id,{column},year\n007,1984,1949\n08,300,\n9,,2007\n")
    dataset = Dataset.from_tables(path, pa.table(INTERACTIONS), name="t")
    assert dataset.items.to_pydict() == {
        "item_id": ["007", "08", "9"],
        column: ["1984", "300", None],
        "year": [1949, None, 2007],
    }
    assert dataset.text_columns == [column]


def test_dataframes_and_arrow_tables_are_one_dataset():
    frames = [
        pd.DataFrame(table, index=[5 * i for i in range(len(table["item_id"]))]) for table in (ITEMS, INTERACTIONS)
    ]
    frames[1]["timestamp"] = pd.to_datetime(frames[1]["timestamp"], unit="s")
    frames[0]["vector"] = [np.array([i, 1.0]) for i in range(3)]
    from_pandas = Dataset.from_tables(*frames, name="shop")
    vector = pa.array([[i, 1.0] for i in range(3)])
    from_arrow = Dataset.from_tables(pa.table(ITEMS | {"vector": vector}), pa.table(INTERACTIONS), name="shop")
    assert from_pandas.items.equals(from_arrow.items)
    assert from_pandas.items.column_names == ["item_id", "title", "price", "vector"]
    for field in ("user", "item", "time"):
        np.testing.assert_array_equal(getattr(from_pandas, field), getattr(from_arrow, field))
    assert from_pandas.source == {"type": "tables", "sha256": {}}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("i.parquet", None, "no such file; check the path"),
        ("i.csv", b"", "not readable as csv .Empty CSV file.*check the file"),
        ("i.csv", b"item_id,title\na\n", "not readable as csv .*; check the file"),
        ("i.csv", b"item_id,color\na,\xff\xfe\n", r"line 2: byte 16 \(0xff\) is not UTF-8; convert the file to UTF-8"),
        ("i.csv", b"item_id,title\n\xff,a\n", r"line 2: byte 14 \(0xff\) is not UTF-8"),
        ("i.parquet", b"PAR1 not really", "not readable as parquet .*; check the file"),
        ("i.jsonl", b"{]", "not readable as jsonl .*; check the file"),
        ("i.xlsx", b"PK", "unknown suffix '.xlsx'; expected .parquet, .csv, .tsv, .jsonl or .ndjson"),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SemidError, match=expected) as caught:
        Dataset.from_tables(path, pa.table(INTERACTIONS), name="t")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_faults_name_the_files_given(tmp_path):
    paths = [write({"item_id": ["a", "a"]}, tmp_path / "i.csv"), write(INTERACTIONS, tmp_path / "x.csv")]
    with pytest.raises(SemidError) as caught:
        Dataset.from_tables(*paths, name="t")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{paths[0]}: row 2, column 'item_id': 'a' occurs")
    assert lines[1] == f"{paths[1]}: row 1, column 'item_id': item '007' is not in {paths[0]}; add it or drop the row"


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_vectors_from_npy(tmp_path, kind):
    vectors = np.arange(12, dtype=kind).reshape(3, 4)
    np.save(tmp_path / "v.npy", vectors)
    dataset = Dataset.from_tables(
        pa.table(ITEMS), pa.table(INTERACTIONS), name="t", vectors={"text": tmp_path / "v.npy"}
    )
    np.testing.assert_array_equal(dataset.vectors("text"), vectors)
    assert dataset.items.schema.field("text").type.value_type == (pa.float16() if kind == np.float16 else pa.float32())
    assert dataset.source["sha256"] == {"vectors.text": sha256(tmp_path / "v.npy")}


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (np.zeros((4, 2), np.float32), r"expected floats \[3, dim\], a row for each item, got float32 \[4, 2\]"),
        (np.zeros(3, np.float32), r"got float32 \[3\]"),
        (np.zeros((3, 2), int), r"got int64 \[3, 2\]"),
        (np.full((3, 2), 1e300), "row 3, column 'v': vector holds a NaN or infinite number; fix it or drop the item"),
        (np.full((3, 2), np.nan, np.float32), "row 1, column 'v': vector holds a NaN"),
        (np.array([None, 1, 2]), "not readable as .npy"),
        (None, "not readable as .npy .*No such file"),
    ],
)
def test_bad_vector_files_are_faults_among_the_others(tmp_path, vectors, expected):
    path = tmp_path / "v.npy"
    if vectors is not None:
        np.save(path, vectors)
    with pytest.raises(SemidError, match=re.escape(f"{path}: ") + ".*" + expected) as caught:
        Dataset.from_tables(
            pa.table(ITEMS), pa.table(INTERACTIONS | {"user_id": [""] * 4}), name="t", vectors={"v": path}
        )
    others = [line for line in str(caught.value).splitlines() if not line.startswith(f"{path}: ")]
    assert others[-1] == "interactions: row 4, column 'user_id': is empty; fill it in or drop the row"
    assert len(others) == 4


def test_image_paths_become_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = write(ITEMS | {"image_path": ["a.png", None, str(tmp_path / "a.png")]}, tmp_path / "i.csv")
    dataset = Dataset.from_tables(path, pa.table(INTERACTIONS), name="t")
    assert dataset.items["image"].to_pylist() == [png(), None, png()]
    assert dataset.text_columns == ["title"]
    assert Dataset.from_tables(path, pa.table(INTERACTIONS), name="t").source == dataset.source
    Image.new("RGB", (4, 4), (30, 20, 10)).save(tmp_path / "a.png")
    other = Dataset.from_tables(path, pa.table(INTERACTIONS), name="t")
    changed = {key for key, value in other.source["sha256"].items() if value != dataset.source["sha256"][key]}
    assert changed == {"image"}


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_paths_that_are_all_empty_leave_the_images(kind):
    items = pa.table(ITEMS | {"image_path": pa.nulls(3, kind), "image": [png(), None, png()]})
    dataset = Dataset.from_tables(items, pa.table(INTERACTIONS), name="t")
    assert dataset.items["image"].to_pylist() == [png(), None, png()]
    without = Dataset.from_tables(items.drop_columns("image"), pa.table(INTERACTIONS), name="t")
    assert without.items.column_names == ["item_id", "title", "price"]


def test_missing_images_are_faults_among_the_others(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    table = ITEMS | {"image_path": ["a.png", "b.png", None]}
    path = write(table | {"item_id": ["007", "08", "08"]}, tmp_path / "i.parquet")
    with pytest.raises(SemidError) as caught:
        Dataset.from_tables(path, pa.table(INTERACTIONS | {"item_id": ["007"] * 4}), name="t")
    assert [line.removeprefix(f"{path}: row ").split(";")[0] for line in str(caught.value).splitlines()] == [
        "2, column 'image_path': no such file: b.png",
        "1, column 'image': not a readable PNG or JPEG image",
        "3, column 'item_id': '08' occurs in an earlier row too",
    ]


def test_other_objects_are_refused():
    with pytest.raises(SemidError, match="expected a path, a pandas DataFrame or an Arrow table, got list"):
        Dataset.from_tables([1, 2], pa.table(INTERACTIONS), name="t")
    mixed = pd.DataFrame({"item_id": ["a", 1, 2.5]})
    with pytest.raises(SemidError, match="DataFrame that Arrow cannot hold"):
        Dataset.from_tables(mixed, pa.table(INTERACTIONS), name="t")


ASINS = pa.table({"asin": ["007", "b"], "name": ["one thing", "two things"], "item_id": ["x", "y"]})
BOUGHT = pa.table({"who": ["u"] * 3, "asin": ["007", "b", "007"], "timestamp": [1, 2, 3]})
MAPPED = {"item_id": "asin", "user_id": "who", "title": "name"}


def test_columns_of_other_names_are_mapped(tmp_path):
    items = ASINS.drop_columns(["item_id"])
    dataset = Dataset.from_tables(items, BOUGHT, name="d", columns=MAPPED)
    assert dataset.item_ids.to_pylist() == ["007", "b"]
    assert dataset.items["title"].to_pylist() == ["one thing", "two things"]
    pa.csv.write_csv(items, tmp_path / "items.csv")
    of_file = Dataset.from_tables(tmp_path / "items.csv", BOUGHT, name="d", columns=MAPPED)
    assert of_file.item_ids.to_pylist() == ["007", "b"]  # a string, as item_id would be
    assert of_file.source["columns"] == MAPPED


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"asin": "brand"}, "no table has a column 'brand'; write brand=asin, the name in semid first"),
        ({"item_id": "asn"}, r"columns item_id=asn: no table has a column 'asn'; did you mean 'asin'\?"),
        ({"item_id": "asin"}, "columns item_id=asin: the items have a column 'item_id' too; leave one out"),
        ({"title": "name", "text": "name"}, "columns title=name text=name: one column has one name in semid; leave"),
    ],
)
def test_columns_that_do_not_fit_are_named(columns, message):
    with pytest.raises(SemidError, match=message):
        Dataset.from_tables(ASINS, BOUGHT, name="d", columns=columns)


class _Lazy:
    """A lazy frame: it has no table until it is collected."""

    def collect(self):
        return pa.RecordBatchReader.from_batches(BOUGHT.schema, BOUGHT.to_batches())


def test_whatever_speaks_arrow_is_a_table(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    items = ASINS.drop_columns(["item_id"])
    expected = Dataset.from_tables(items, BOUGHT, name="d", columns=MAPPED)
    spark = tmp_path / "spark"
    spark.mkdir()
    pa.parquet.write_table(BOUGHT, spark / "part-0.parquet")
    for name in ("_SUCCESS", ".part-0.parquet.crc"):
        (spark / name).touch()
    for interactions in (_Lazy(), pa.dataset.dataset(BOUGHT), duckdb.from_arrow(BOUGHT), spark):
        made = Dataset.from_tables(items, interactions, name="d", columns=MAPPED)
        np.testing.assert_array_equal(made.item, expected.item)
        assert made.num_users == expected.num_users == 1


def test_polars_frames_are_tables_lazy_or_not_with_categoricals():
    polars = pytest.importorskip("polars")
    items = ASINS.drop_columns(["item_id"])
    expected = Dataset.from_tables(items, BOUGHT, name="d", columns=MAPPED)
    frame = polars.from_arrow(BOUGHT)
    categorical = frame.cast({"asin": polars.Categorical, "who": polars.Enum(["u"])})
    for interactions in (frame, frame.lazy().filter(polars.col("timestamp") > 0), categorical, categorical.lazy()):
        made = Dataset.from_tables(polars.from_arrow(items), interactions, name="d", columns=MAPPED)
        assert made.item_ids.to_pylist() == expected.item_ids.to_pylist()
        np.testing.assert_array_equal(made.item, expected.item)
    numbers = frame.with_columns(polars.Series("asin", [1.5, 2.0, 1.5]))
    with pytest.raises(SemidError, match="interactions: column 'item_id': expected strings or integers, got double"):
        Dataset.from_tables(polars.from_arrow(items), numbers, name="d", columns=MAPPED)
