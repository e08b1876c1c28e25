"""Files as others write them: their values come back, or the line that is at fault is named."""

import gzip
import json
import re
from datetime import date

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid.data import Dataset, as_table, read_table, table_kind
from semid.data.tables import table_digest
from semid.errors import SemidError

ITEMS = pa.table({"item_id": list("abc"), "title": ["x", "y", "z"]})
INTERACTIONS = pa.table({"user_id": ["u"] * 3, "item_id": list("abc"), "timestamp": [1, 2, 3]})


def _read(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path).to_pydict()


@pytest.mark.parametrize(
    ("content", "ids", "titles"),
    [
        ('item_id\ttitle\na\t"Heroes" live\nb\t"two\nc\t"three"\n', "abc", ['"Heroes" live', '"two', '"three"']),
        ('item_id\ttitle\na\t"say ""x"""\nb\t"1\n2"\nc\t"p\tq"\n', "abc", ['say "x"', "1\n2", "p\tq"]),
        ('"item_id"\t"title"\n"a"\t"x"\n', "a", ["x"]),
        ('item_id\ttitle\r\na\t5" tape\r\n', "a", ['5" tape']),
    ],
    ids=["none", "needed", "all", "inside"],
)
def test_tsv_has_quotes_only_where_the_file_shows_them(tmp_path, content, ids, titles):
    assert _read(tmp_path / "i.tsv", content) == {"item_id": list(ids), "title": titles}


def test_a_quote_that_swallows_lines_of_csv_is_named(tmp_path):
    good = 'item_id,title\na,"x ""y"", z"\nb,"two\nlines"\n'
    assert _read(tmp_path / "i.csv", good) == {"item_id": ["a", "b"], "title": ['x "y", z', "two\nlines"]}
    for bad in ('c,"three\nd,four\n', 'c,"three\nd,"e" five\n'):
        with pytest.raises(SemidError, match=r"i.csv: line 5: a field begins with a quote and does not end with it"):
            _read(tmp_path / "i.csv", good + bad)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_of_csv_is_named(tmp_path, separator):
    assert _read(tmp_path / "i.csv", "\ufeffitem_id,title\na,b;c|d\te\n")["title"] == ["b;c|d\te"]  # control
    with pytest.raises(SemidError, match=re.escape(f"i.csv: {separator!r} stands between the columns' names")):
        _read(tmp_path / "i.csv", f"item_id{separator}price\na{separator}1,50\n")


def test_strings_of_jsonl_that_look_like_dates_are_strings(tmp_path):
    rows = [
        {"item_id": f"2024-01-0{day}", "tags": ["2001-01-01"], "more": {"on": "1999-12-31"}, "year": day}
        for day in (1, 2)
    ]
    assert _read(tmp_path / "i.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == {
        name: [row[name] for row in rows] for name in rows[0]
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_lines_of_any_length_are_read(tmp_path, suffix):
    long = "x" * 2_500_000
    content = f'item_id,title\na,"{long}"\nb,y\n' if suffix == "csv" else ""
    content = content or f'{{"item_id": "a", "title": "{long}"}}\n{{"item_id": "b", "title": "y"}}\n'
    assert _read(tmp_path / f"i.{suffix}", content) == {"item_id": ["a", "b"], "title": [long, "y"]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"a": 1}\n{"a": \n', "line 2: no JSON object"),
        ('{"a": "x"}\n{"a": "x\\ud800"}\n', r"line 2: holds half a character .*: '\\ud800'"),
        ('{"a": 1}\n\n{"a": "x"}\n', "line 3: 'a' is string, in line 1 number; write all alike"),
        ('{"a": [1, 2]}\n{"a": [{"b": 1}, "x"]}\n', r"line 2: 'a\[\]' is object, in line 1 number"),
        ('[{"a": 1}]\n', "line 1: expected an object"),
        ("null\n", "line 1: expected an object"),  # Arrow's reader ends the process
        (b'{"a": 1}\n{"a": "\xe9"}\n', r"line 2: byte 16 \(0xe9\) is not UTF-8"),
        (b'{"a": 1}\n{"\xe9": 1}\n', r"line 2: byte 11 \(0xe9\) is not UTF-8"),
    ],
)
def test_the_bad_line_of_jsonl_is_named(tmp_path, content, named):
    with pytest.raises(SemidError, match=rf"i.jsonl: not readable as jsonl \({named}"):
        _read(tmp_path / "i.jsonl", content)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, suffix, encoding):
    separator = {"csv": ",", "tsv": "\t"}.get(suffix)
    text = f"item_id{separator}title\na{separator}é\n" if separator else '{"item_id": "a", "title": "é"}\n'
    assert _read(tmp_path / f"i.{suffix}", text.encode(encoding)) == {"item_id": ["a"], "title": ["é"]}


def test_latin_1_is_refused_with_its_line(tmp_path):
    for name in ("title", "color", "caf\xe9"):
        with pytest.raises(SemidError, match=r"i.csv: .*line \d: byte \d+ \(0xe9\) is not UTF-8; convert .*iconv"):
            _read(tmp_path / "i.csv", f"item_id,{name}\na,caf\xe9\n".encode("latin-1"))


def test_a_short_line_of_csv_is_named(tmp_path):
    with pytest.raises(SemidError, match=r"i.csv: .*Row #3: Expected 2 columns, got 1"):
        _read(tmp_path / "i.csv", "item_id,title\na,b\nc\n")


def test_compressed_text_is_read_by_its_suffix(tmp_path):
    content = gzip.compress(b"item_id,title\na,x\n")
    assert _read(tmp_path / "i.csv.gz", content) == {"item_id": ["a"], "title": ["x"]}
    assert table_kind(tmp_path / "i.csv.gz") == "csv"
    with pytest.raises(SemidError, match=r"i.csv.gz: not readable as csv"):
        _read(tmp_path / "i.csv.gz", content[:20])


def test_a_folder_of_parts_is_a_table(tmp_path):
    """As Spark, Dask and BigQuery write it."""
    folder = tmp_path / "items.parquet"
    folder.mkdir()
    for name, rows in (("part-0.snappy.parquet", slice(0, 1)), ("part-1.snappy.parquet", slice(1, 3))):
        pq.write_table(ITEMS[rows], folder / name)
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").touch()
    assert read_table(folder).equals(ITEMS)
    assert table_kind(folder) == "parquet"
    first = Dataset.from_tables(folder, INTERACTIONS, name="t").source["sha256"]
    pq.write_table(pa.table({"item_id": ["b", "c"], "title": ["y", "w"]}), folder / "part-1.snappy.parquet")
    assert Dataset.from_tables(folder, INTERACTIONS, name="t").source["sha256"] != first
    pq.write_table(pa.table({"item_id": [True]}), folder / "part-2.parquet")
    with pytest.raises(SemidError, match=r"items.parquet: its parts are no one table"):
        read_table(folder)


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_a_column_of_parts_is_strings_where_any_part_has_such(tmp_path, suffix, separator):
    lines = ["item_id,isbn,w,day", "a,007,1,2024-01-01", "b,08X,.5,none", "c,,,"]
    for number, line in enumerate(lines[1:]):
        text = f"{lines[0]}\n{line}\n".replace(",", separator)
        (tmp_path / f"part-{number}{suffix}").write_text(text)
    table = read_table(tmp_path)
    assert table["isbn"].to_pylist() == ["007", "08X", None]
    assert table["w"].to_pylist() == [1, 0.5, None]
    assert table["day"].to_pylist() == ["2024-01-01", "none", None]


def test_parts_may_be_categorical_in_some(tmp_path):
    values = pa.array(["x", "y"])
    kinds = [pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.string_view(), pa.large_string()]
    for number, kind in enumerate(kinds):
        pq.write_table(pa.table({"item_id": [1, 2], "brand": values.cast(kind)}), tmp_path / f"{number}.parquet")
    assert read_table(tmp_path)["brand"].to_pylist() == ["x", "y"] * 4


def test_partitions_of_a_folder_are_columns(tmp_path):
    """As Spark and Hive write them."""
    days = {"2024-05-01": "a", "2024-05-02": "b", "__HIVE_DEFAULT_PARTITION__": "c"}
    for row, (day, item) in enumerate(days.items()):
        folder = tmp_path / f"day={day}" / f"shop={row}" / "name=7%2F8" / "price=x"
        folder.mkdir(parents=True)
        (folder / "part-0.csv").write_text(f"item_id,price\n{item},1.5\n")
        (folder / "_SUCCESS").touch()
    assert read_table(tmp_path).to_pydict() == {
        "item_id": ["a", "b", "c"],
        "price": [1.5] * 3,  # the file's own
        "name": ["7/8"] * 3,
        "shop": [0, 1, 2],
        "day": [date(2024, 5, 1), date(2024, 5, 2), None],
    }
    assert read_table(folder).column_names == ["item_id", "price"]  # a folder of parts, wherever it is
    first = table_digest(tmp_path)
    (folder / "part-0.csv").write_text("item_id,price\nd,1.5\n")
    assert table_digest(tmp_path) != first


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(SemidError, match="has no files; expected a file, or a folder of parts"):
        read_table(tmp_path)
    (tmp_path / "day=1").mkdir()
    with pytest.raises(SemidError, match="has no files"):
        read_table(tmp_path)
    (tmp_path / "day=1" / "more").mkdir()
    with pytest.raises(SemidError, match="day=1: holds the folder more, which is no partition such as day=1"):
        read_table(tmp_path)
    Dataset.from_tables(ITEMS, INTERACTIONS, name="t").save(tmp_path / "dataset")
    with pytest.raises(SemidError, match="is an artifact of semid, not a table"):
        read_table(tmp_path / "dataset")


def test_damaged_text_in_parquet_is_refused(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    for table in (pa.table({"item_id": bad}), pa.table({"item_id": ["a"], "title": bad})):
        pq.write_table(table, tmp_path / "i.parquet")
        with pytest.raises(SemidError, match=r"i.parquet: not readable as parquet .*UTF8"):
            read_table(tmp_path / "i.parquet")


def test_frames_that_arrow_does_not_read_are_refused():
    class Other:
        columns = ("item_id",)

    with pytest.raises(SemidError, match="got Other; make a table of it"):
        as_table(Other())
    with pytest.raises(SemidError, match=r"DataFrame that Arrow cannot hold \(Sparse pandas data \(column weight\)"):
        as_table(pd.DataFrame({"item_id": ["a"], "weight": pd.arrays.SparseArray([1.0])}))


def test_what_nothing_reads_is_said(caplog):
    caplog.set_level("INFO", "semid")
    numbers = np.arange(3)
    items = ITEMS.append_column("price", pa.array(numbers)).append_column("empty", pa.nulls(3))
    items = items.append_column("seen", pa.array([[1], [1, 2], [3]])).append_column("v", pa.array([[1, 2]] * 3))
    interactions = INTERACTIONS.append_column("weight", pa.array(numbers)).append_column("rating", pa.array(numbers))
    interactions = interactions.append_column("event", pa.nulls(3))  # training reads events and weights, where any are
    dataset = Dataset.from_tables(items, interactions, name="t")
    assert caplog.messages == ["not used: price, empty, seen, rating, event"]
    assert dataset.vector_columns == ["v"]
    Dataset.from_tables(ITEMS, INTERACTIONS, name="t")
    assert len(caplog.messages) == 1


def test_columns_of_parquet_that_nothing_reads_stay_on_disk(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "semid")
    extra = {"a.b": [1.5, None, 2.0], "user_id.x": ["1", "2", "3"], "weight": [1, 2, 3], "by": [[1], [2], [3]]}
    table = pa.table({**extra, **INTERACTIONS.rename_columns({"user_id": "uid"}).to_pydict()})
    asked, read = [], pq.ParquetFile.read

    def watched(file, columns=None):
        asked.append(columns)
        return read(file, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", watched)
    for part in (tmp_path / "one.parquet", tmp_path / "all" / "day=3" / "0.parquet"):
        part.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, part)
    for source in (table, tmp_path / "one.parquet", tmp_path / "all"):
        found = Dataset.from_tables(ITEMS, source, name="t", columns={"user_id": "uid"})
        assert found.weight.tolist() == [1, 2, 3]
        assert found.user.tolist() == [0, 0, 0]
    assert asked == [["weight", "uid", "item_id", "timestamp"]] * 2
    unused = "not used: a.b, user_id.x, by"
    assert caplog.messages == [unused, unused, f"{unused}, day"]
    twice = pa.table([*table.columns, table["by"]], names=[*table.column_names, "by"])
    pq.write_table(twice, tmp_path / "one.parquet")
    with pytest.raises(SemidError, match=r"one.parquet: column 'by': occurs more than once"):
        Dataset.from_tables(ITEMS, tmp_path / "one.parquet", name="t", columns={"user_id": "uid"})
    with pytest.raises(
        SemidError, match=r"column 'user_id': is missing; found a\.b, user_id\.x, weight, by, uid, item_id"
    ):
        Dataset.from_tables(ITEMS, tmp_path / "all" / "day=3" / "0.parquet", name="t")


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint8()])
def test_vectors_of_integers_are_vectors(kind):
    lists = pa.array([[1, 0, 5], [0, 1, 7], [1, 1, 100]], pa.list_(kind))
    dataset = Dataset.from_tables(ITEMS.append_column("v", lists), INTERACTIONS, name="t")
    np.testing.assert_array_equal(dataset.vectors("v"), lists.to_pylist())


def test_times_that_are_text_are_read(tmp_path):
    def times(values):
        interactions = INTERACTIONS.set_column(2, "timestamp", pa.array(values))
        return Dataset.from_tables(ITEMS, interactions, name="t").time.tolist()

    assert times(["1700000000", "1700000001", "1700000002.5"]) == [1_700_000_000, 1_700_000_001, 1_700_000_002]
    assert times(["0001-01-01", "2024-01-01", "9999-12-31"])[2] == 253_402_214_400
    rows = [f"u{n % 50},{'abc'[n % 3]},{1_700_000_000 + n if n != 7777 else 'NULL'}\n" for n in range(10_000)]
    (tmp_path / "x.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    with pytest.raises(SemidError, match=r"^.*x.csv: row 7778, column 'timestamp': 'NULL' is no time[^\n]*$"):
        Dataset.from_tables(ITEMS, tmp_path / "x.csv", name="t")
