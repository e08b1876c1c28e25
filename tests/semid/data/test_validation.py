import io
import re
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from semid.data import load_image
from semid.data.validation import checked_items, checked_tables
from semid.errors import SemidError

ITEMS = {"item_id": ["a", "b", "c"], "title": ["x", "y", "z"]}
INTERACTIONS = {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "a"], "timestamp": [1, 2, 3]}


def check(items=None, interactions=None):
    items = pa.table(ITEMS if items is None else items)
    interactions = pa.table(INTERACTIONS if interactions is None else interactions)
    return checked_tables(items, interactions, "I.csv", "X.csv")


def faults_of(items=None, interactions=None):
    with pytest.raises(SemidError) as caught:
        check(items, interactions)
    return str(caught.value).splitlines()


def image_bytes(kind="PNG", size=(8, 6)):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)).save(buffer, kind)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that says it is that large; the checksums are right, the pixels are not there."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (head, b"IDAT")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_good_tables_pass_with_normalized_types():
    items = ITEMS | {
        "item_id": pa.array([7, 8, 9], pa.int32()),
        "tags": [["p", "q"], [], None],
        "price": [1.5, None, 2.0],
        "half": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float16(), 2)),
        "single": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
        "double": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
        "brand": pa.array(["k", "k", None]).dictionary_encode(),
        "nothing": pa.nulls(3),
    }
    interactions = {
        "user_id": [1, 2, 3],
        "item_id": [7, 8, 9],
        "timestamp": [1.0, 2.0, 3.0],
        "event": pa.array(["buy", None, "buy"]).dictionary_encode(),
        "weight": [1, 2, 3],
    }
    items, interactions = check(items, interactions)
    assert {field.name: str(field.type) for field in items.schema} == {
        "item_id": "string",
        "title": "string",
        "tags": "list<item: string>",
        "price": "double",
        "half": "fixed_size_list<item: halffloat>[2]",
        "single": "fixed_size_list<item: float>[2]",
        "double": "fixed_size_list<item: float>[2]",
        "brand": "string",
    }
    assert items["double"].to_pylist() == [[1, 2], [3, 4], [5, 6]]
    assert {field.name: str(field.type) for field in interactions.schema} == {
        "user_id": "string",
        "item_id": "string",
        "timestamp": "int64",
        "event": "string",
        "weight": "float",
    }


def test_all_faults_of_both_tables_are_in_one_error():
    items = {"item_id": ["a", "", "a", None], "vector": [[1.0, 2.0], [1.0], [1.0, 2.0], [3.0, 4.0]]}
    interactions = {
        "user_id": ["u", None, "v", ""],
        "item_id": ["a", "zz", None, "a"],
        "timestamp": [1.0, 1e12, None, 4.0],
        "weight": [1.0, np.nan, np.inf, 2.0],
    }
    assert faults_of(items, interactions) == [
        "I.csv: row 4, column 'item_id': is null; fill it in or drop the row",
        "I.csv: row 2, column 'item_id': is empty; fill it in or drop the row",
        "I.csv: row 2, column 'vector': vector of 1 numbers, expected 2 as in row 1; make all equal",
        "I.csv: row 3, column 'item_id': 'a' occurs in an earlier row too; keep one row per item",
        "X.csv: row 2, column 'user_id': is null; fill it in or drop the row",
        "X.csv: row 4, column 'user_id': is empty; fill it in or drop the row",
        "X.csv: row 3, column 'item_id': is null; fill it in or drop the row",
        "X.csv: row 3, column 'timestamp': is null; fill it in or drop the row",
        "X.csv: row 2, column 'timestamp': 1000000000000.0 lies beyond the year 9999; timestamps are in seconds: "
        "divide milliseconds by 1000",
        "X.csv: row 2, column 'weight': nan is no finite float32; fix it or drop the row",
        "X.csv: row 3, column 'weight': inf is no finite float32; fix it or drop the row",
        "X.csv: row 2, column 'item_id': item 'zz' is not in I.csv; add it or drop the row",
    ]


def test_five_examples_of_a_kind_then_a_count():
    lines = faults_of(interactions=INTERACTIONS | {"user_id": ["u"] * 9, "item_id": ["q"] * 9, "timestamp": range(9)})
    assert [line.split(",")[0] for line in lines[:5]] == [f"X.csv: row {row}" for row in range(1, 6)]
    assert lines[5:] == ["X.csv: column 'item_id': ... and 4 more rows like these"]


@pytest.mark.parametrize("rows", [["a", "b", "a", "a", "b"], ["", "a", None, "a", "c"], ["a", "b", "c", "d", "e"]])
def test_duplicates_are_the_rows_after_the_first(rows):
    expected = [i for i, row in enumerate(rows) if row and row in rows[:i]]
    try:
        checked_items(pa.table({"item_id": rows}), "I")
        lines = []
    except SemidError as error:
        lines = [line for line in str(error).splitlines() if "earlier row" in line]
    assert lines == [
        f"I: row {i + 1}, column 'item_id': {rows[i]!r} occurs in an earlier row too; keep one row per item"
        for i in expected
    ]


@pytest.mark.parametrize(
    ("items", "interactions", "expected"),
    [
        ({"sku": ["a"]}, None, r"I.csv: column 'item_id' ?: is missing; found sku; add .* \(--columns item_id=NAME"),
        (None, {"item_id": ["a"], "timestamp": [1]}, "X.csv: column 'user_id': is missing; found item_id, timestamp"),
        (None, {"user_id": ["u"], "item_id": ["a"]}, "X.csv: neither column 'timestamp' .seconds. nor 'position' has"),
        (None, {"buyer": ["u"], "sku": ["a"]}, "'position' has values; found buyer, sku; add or rename one .--columns"),
        (None, INTERACTIONS | {"timestamp": pa.nulls(3)}, "neither column 'timestamp'"),
        ({"item_id": pa.array([], pa.string())}, None, "I.csv: has no rows; expected at least one"),
        (None, {k: pa.array([], pa.string()) for k in INTERACTIONS}, "X.csv: has no rows; expected at least one"),
        (ITEMS | {"item_id": [1.0, 2.0, 3.0]}, None, "column 'item_id': expected strings or integers, got double"),
        (None, INTERACTIONS | {"user_id": [True] * 3}, "column 'user_id': expected strings or integers, got bool"),
        (None, INTERACTIONS | {"timestamp": ["x"] * 3}, "row 1, .*: 'x' is no time; expected seconds .* ISO-8601 text"),
        (None, INTERACTIONS | {"timestamp": ["2020-01-01", "", "1 May"]}, "row 2, column 'timestamp': '' is no time"),
        (None, INTERACTIONS | {"timestamp": ["2020-01-01", "2020-13-01", None]}, "'2020-13-01'.* or datetimes$"),
        (None, INTERACTIONS | {"timestamp": ["2020-01-01", None, "2020-01-02"]}, "row 2, column 'timestamp': is null"),
        (None, INTERACTIONS | {"timestamp": [True] * 3}, "column 'timestamp': expected seconds since .* got bool"),
        (None, INTERACTIONS | {"timestamp": [1.5, np.nan, 2.0]}, "row 2, column 'timestamp': is null"),
        (None, INTERACTIONS | {"position": [1.0, 2.5, 3.0]}, "row 2, column 'position': 2.5 is not a whole number"),
        (None, INTERACTIONS | {"timestamp": [1, 2, 1_700_000_000_000]}, "row 3, .* divide milliseconds by 1000"),
        (
            None,
            INTERACTIONS | {"timestamp": [1, 2, 20240131120000]},
            "row 3, .* 20240131120000 reads as the digits of a ",
        ),
        (None, INTERACTIONS | {"timestamp": ["202401311200"] * 3}, "row 1, .* 202401311200 reads as the digits of a "),
        (None, INTERACTIONS | {"timestamp": [1.0, 2.0, np.inf]}, "row 3, column 'timestamp': inf lies beyond"),
        (None, INTERACTIONS | {"position": [0, None, 2]}, "row 2, column 'position': is null"),
        (
            None,
            INTERACTIONS | {"position": pa.array([0, 1, 2**63], pa.uint64())},
            "row 3, column 'position': 9223372036854775808 takes more than the 63 bits of a position",
        ),
        (
            None,
            INTERACTIONS | {"timestamp": pa.array([0, 2**64 - 1, None], pa.uint64())},
            "row 2, column 'timestamp': 18446744073709551615 lies beyond the year 9999",
        ),
        (None, INTERACTIONS | {"weight": [b"1"] * 3}, "column 'weight': expected numbers, got binary"),
        (None, INTERACTIONS | {"weight": ["1", "0.5", "NULL"]}, "row 3, column 'weight': 'NULL' is no number"),
        (None, INTERACTIONS | {"weight": ["1", None, "x"]}, "row 2, column 'weight': is null"),  # next to the other
        (None, INTERACTIONS | {"position": ["1", "2", "x"]}, "row 3, column 'position': 'x' is no number"),
        (None, INTERACTIONS | {"timestamp": ["1700000000", "NULL", "17.5"]}, "row 2, column 'timestamp': 'NULL' is no"),
        (
            None,
            INTERACTIONS | {"timestamp": ["1", "2", "2024-05-31"]},
            "row 3, .*'2024-05-31', and other rows are a numb",
        ),
        (None, INTERACTIONS | {"timestamp": ["2024-05-31", "2023-02-30", "9999-12-31"]}, "row 2.*2023-02-30"),
        (None, INTERACTIONS | {"weight": [1.0, 1e300, None]}, "row 2, column 'weight': 1e.300 is no finite float32"),
        (None, INTERACTIONS | {"event": [1.5] * 3}, "column 'event': expected strings or integers, got double"),
        (ITEMS | {"image": ["p", "q", "r"]}, None, "column 'image': expected the bytes of PNG or JPEG files, got stri"),
        (ITEMS | {"v": [[1.0], None, [2.0]]}, None, "row 2, column 'v': has no vector"),
        (ITEMS | {"v": [[1.0], [np.nan], [2.0]]}, None, "row 2, column 'v': vector holds a NaN, infinite or null"),
        (ITEMS | {"v": [[1.0], [2.0], [None]]}, None, "row 3, column 'v': vector holds a NaN, infinite or null"),
        (ITEMS | {"v": [[1e300], [2.0], [3.0]]}, None, "row 1, column 'v': vector holds a NaN, infinite or null"),
        (ITEMS | {"v": pa.array([[]] * 3, pa.list_(pa.float32()))}, None, "column 'v': vectors are empty"),
    ],
)
def test_each_fault_is_named(items, interactions, expected):
    check()
    assert any(re.search(expected, line) for line in faults_of(items, interactions)), faults_of(items, interactions)


@pytest.mark.parametrize("name", ["item_id", "title"])
def test_columns_of_one_name_are_named(name):
    table = pa.table(ITEMS)
    with pytest.raises(SemidError, match=f"^I: column '{name}': occurs more than once; rename or drop one$"):
        checked_items(table.append_column(name, table[name]), "I")


def test_half_precision_infinity_is_found_across_chunks():
    def column(last):
        chunks = [np.zeros(4, np.float16), np.array([1, last], np.float16)]
        return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(chunk), 2) for chunk in chunks])

    assert checked_items(pa.table(ITEMS | {"v": column(2)}), "I")["v"].to_pylist()[2] == [1, 2]
    with pytest.raises(SemidError, match=r"^I: row 3, column 'v': vector holds a NaN, infinite or null number"):
        checked_items(pa.table(ITEMS | {"v": column(np.inf)}), "I")


def test_a_sliced_table_keeps_its_rows():
    table = pa.table({"item_id": ["x", "a", "b"], "v": [[9.0], [1.0], [2.0]]}).slice(1)
    assert checked_items(table, "I").to_pydict() == {"item_id": ["a", "b"], "v": [[1.0], [2.0]]}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_every_unit_become_seconds(unit):
    times = pa.array([5, 6, 7]).cast(pa.timestamp("s")).cast(pa.timestamp(unit, tz="UTC" if unit == "us" else None))
    interactions = check(interactions=INTERACTIONS | {"timestamp": times})[1]
    assert interactions["timestamp"].to_pylist() == [5, 6, 7]
    assert not {"position", "ticks"} & set(interactions.column_names)


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.string(), pa.string_view()])
def test_positions_of_19_digits_keep_their_order(kind):
    positions = [2**63 - 1, 2**63 - 2, 7]
    interactions = check(interactions=INTERACTIONS | {"position": pa.array(positions).cast(pa.string()).cast(kind)})[1]
    assert interactions["position"].to_pylist() == positions


def test_columns_that_parquet_cannot_hold_go(tmp_path):
    """Nothing reads them: the empty objects of JSON lines, also within others, and intervals of DuckDB."""
    odd = {"meta": [{}] * 3, "deep": [{"a": {}}] * 3, "every": [pa.MonthDayNano([1, 2, 3])] * 3}
    kept = checked_items(pa.table(ITEMS | odd | {"box": [{"a": 1}] * 3, "price": [1, 2, 3]}), "I")
    assert kept.column_names == ["item_id", "title", "box", "price"]
    pa.parquet.write_table(kept, tmp_path / "items.parquet")


def test_lists_of_categoricals_are_lists_of_texts():
    values = [["p", "q"], None, ["p", None]]
    words = pa.array(["q", "p"]).cast(pa.string_view())
    polars = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, None], pa.uint32()), words)
    parts = [
        pa.array(values).cast(pa.large_list(pa.dictionary(pa.uint32(), pa.large_string()))),
        pa.ListArray.from_arrays(pa.array([0, None, 2, 4], pa.int32()), polars),
        pa.array([["z"], *values]).cast(pa.list_(pa.dictionary(pa.int8(), pa.string())))[1:],
    ]
    for column in parts:
        found = checked_items(pa.table(ITEMS | {"tags": column}), "I")["tags"]
        assert (found.type, found.to_pylist()) == (pa.list_(pa.string()), values)


def test_dates_are_midnights():
    days = pa.array([0, 1, 2], pa.date32())
    assert check(interactions=INTERACTIONS | {"timestamp": days})[1]["timestamp"].to_pylist() == [0, 86400, 172800]


def test_timestamps_finer_than_a_second_keep_their_order_as_ticks():
    times = pa.array([-1, 1700, 1200], pa.timestamp("ms"))
    interactions = check(interactions=INTERACTIONS | {"timestamp": times})[1]
    assert interactions["timestamp"].to_pylist() == [-1, 1, 1]
    assert interactions["ticks"].to_pylist() == [-1, 1700, 1200]
    own = check(interactions=INTERACTIONS | {"timestamp": times, "position": [0, 1, 2], "ticks": [9, 9, 9]})[1]
    assert own["ticks"].to_pylist() == [-1, 1700, 1200]
    assert own["position"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_iso_8601_text_is_read_with_and_without_zone(kind):
    texts = [
        "1970-01-02",
        "1970-01-01T00:01",
        "1970-01-01 00:00:02Z",
        "1970-01-01T02:00:03+02:00",
        "1969-12-31T23-0100",
        "1970-01-01T00:00:06.000",
    ]
    columns = {"user_id": ["u"] * 6, "item_id": ["a"] * 6, "timestamp": pa.array(texts).cast(kind)}
    interactions = check(interactions=columns)[1]
    assert interactions["timestamp"].to_pylist() == [86400, 60, 2, 3, 0, 6]
    assert not {"position", "ticks"} & set(interactions.column_names)


@pytest.mark.parametrize("zone", ["", "Z"])
def test_fractions_in_text_keep_their_order_as_ticks(zone):
    texts = [f"1970-01-01T00:00:{second}{zone}" for second in ("01.7", "01.2", "00.000000001")]
    interactions = check(interactions=INTERACTIONS | {"timestamp": texts})[1]
    assert interactions["timestamp"].to_pylist() == [1, 1, 0]
    assert interactions["ticks"].to_pylist() == [1_700_000_000, 1_200_000_000, 1]


@pytest.mark.parametrize("base", [0, 1_700_000_000, -86_400])
def test_fractions_of_seconds_are_cut_and_keep_their_order_as_ticks(base):
    times = [base + 1.75, base + 1.25, base - 0.5]
    interactions = check(interactions=INTERACTIONS | {"timestamp": times})[1]
    assert interactions["timestamp"].to_pylist() == [base + 1, base + 1, base - 1]
    assert interactions["ticks"].to_pylist() == [round(time * 1e6) for time in times]
    own = check(interactions=INTERACTIONS | {"timestamp": times, "position": [0, 1, 2]})[1]
    assert own["timestamp"].to_pylist() == [base + 1, base + 1, base - 1]
    assert own["position"].to_pylist() == [0, 1, 2]


def test_floats_just_below_a_second_stay_below_it():
    whole = np.array([1.0, 5e6, 1.7e9])
    interactions = check(interactions=INTERACTIONS | {"timestamp": np.nextafter(whole, 0)})[1]
    assert interactions["timestamp"].to_pylist() == (whole - 1).tolist()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_that_decode_pass_and_null_is_no_image(kind):
    images = pa.array([image_bytes(kind), None, image_bytes(kind)], pa.binary())
    assert checked_items(pa.table(ITEMS | {"image": images}), "I")["image"].to_pylist() == images.to_pylist()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        png_header(8000, 8000),
        image_bytes("JPEG")[:-60],
        image_bytes("PNG")[:50],
        image_bytes("GIF"),
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=["empty", "text", "header alone", "cut JPEG", "cut PNG", "other format", "signature alone"],
)
def test_undecodable_images_are_faults(data):
    table = pa.table(ITEMS | {"image": pa.array([image_bytes(), data, None], pa.binary())})
    with pytest.raises(SemidError) as caught:
        checked_items(table, "I")
    assert str(caught.value) == (
        "I: row 2, column 'image': not a readable PNG or JPEG image; replace it or set it to null"
    )


def test_gray_of_16_bits_is_that_gray():
    gray, buffer = np.arange(256, dtype=np.uint16).reshape(16, 16), io.BytesIO()
    Image.fromarray(257 * gray).save(buffer, "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(buffer.getvalue(), size=16)), np.stack([gray] * 3, axis=-1))


@pytest.mark.parametrize("size", [(8001, 8000), (9500, 9500), (60000, 60000)])
def test_large_images_are_refused_by_their_header(size):
    table = pa.table({"item_id": ["a"], "image": pa.array([png_header(*size)], pa.binary())})
    with pytest.raises(SemidError, match="row 1, column 'image': image of more than 64,000,000 pixels; scale it down"):
        checked_items(table, "I")


SECONDS = [1_706_659_200, 1_706_745_600, 1_706_832_000]  # 2024


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            [20240131, 20240201, 19991231],
            "all timestamps lie in 1970 or before, the largest is 20240201; are they days ",
        ),
        (["20240131", "20240201", "20240202"], "all timestamps lie in 1970 or before, the largest is 20240202; "),
        (
            [19_753, 19_754, 19_755],
            "all timestamps lie in 1970 or before, the largest is 19755; are they days or hours",
        ),
        ([0, *SECONDS[1:]], "1 of 3 timestamps lie before 1971, most after 1990; does 0 stand for an unknown time?"),
        (SECONDS, None),
        (["2024-01-31", "2024-02-01", "2024-02-02"], None),
        ([1, 2, 3], None),  # a count of their own
        ([0, 10**8, 2 * 10**8], None),  # 1970 to 1976
    ],
)
def test_times_that_are_hardly_seconds_are_told(caplog, times, said):
    check(interactions=INTERACTIONS | {"timestamp": times})
    assert len(caplog.messages) == (said is not None)
    assert said is None or caplog.messages[0].startswith(f"X.csv: {said}")
    check(interactions={"user_id": ["u"], "item_id": ["a"], "position": [20240131]})
    assert len(caplog.messages) == (said is not None)


def test_a_picture_is_read_as_the_camera_was_held():
    values, buffer, exif = np.arange(18, dtype=np.uint8).reshape(2, 3, 3), io.BytesIO(), Image.Exif()
    exif[274] = 6  # orientation: turned to the left
    Image.fromarray(values).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(buffer.getvalue(), size=16)), np.rot90(values, -1))
