"""The catalogue: what it refuses, how it finds, and that it reads back what it wrote."""

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapes

from semid.catalog import SemanticCatalog, extend, level_name
from semid.errors import SemidError

IDS = ["a", "b", "c", "d"]
CODES = [[0, 1], [2, 0], [0, 1], [1, 1]]


def make(ids=IDS, codes=CODES, sizes=(3, 2), **options) -> SemanticCatalog:
    return SemanticCatalog(pa.array(ids, pa.string()), np.asarray(codes, np.int32), sizes, **options)


def test_a_catalogue_of_one_item_and_of_the_largest_codes_is_fine():
    assert len(make(["x"], [[2, 1]])) == 1
    assert make().num_levels == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [], "codes": np.zeros((0, 2))}, "a catalogue needs at least one item; got none"),
        ({"sizes": (3, 2, 2)}, r"expected codes of shape \(4, 3\) \(items, levels\), got \(4, 2\)"),
        ({"ids": IDS[:3], "codes": np.zeros((3, 3))}, r"expected codes of shape \(3, 2\)"),
        ({"sizes": (3, 1)}, r"item a \(row 0\): code 1 at level 1 is outside 0..0"),
        ({"codes": [[0, 0], [0, -1], [0, 0], [0, 0]]}, r"item b \(row 1\): code -1 at level 1 is outside 0..1"),
        ({"codes": [[0], [2], [0], [1]], "sizes": (3,), "tie_break": True}, "tie_break says that the last level only"),
        ({"ids": ["a", "b", "b", "d"]}, "item id 'b' appears more than once in the catalogue"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(SemidError, match=message):
        make(**arguments)


def test_ids_are_strings_and_codes_integers():
    codes = np.array(CODES)
    assert SemanticCatalog(pa.array([7, 8, 9, 10]), codes, (3, 2)).rows([9, "7"]).tolist() == [2, 0]
    with pytest.raises(SemidError, match="item ids: entry 3 is None of type NoneType; ids are strings or integers"):
        SemanticCatalog(pa.array([*"abc", None]), codes, (3, 2))
    with pytest.raises(SemidError, match="expected codes as integers, got float32; convert them"):
        SemanticCatalog(pa.array(IDS), codes.astype(np.float32), (3, 2))


def test_a_column_of_a_table_is_a_list_of_ids_and_sizes_are_any_whole_numbers():
    ids, sizes = pa.chunked_array([IDS[:2], IDS[2:]]), np.array([3, 2])
    with shapes.unchecked():
        same = SemanticCatalog(ids, np.array(CODES, np.int32), sizes)
        with pytest.raises(SemidError, match=r"expected codes as a NumPy array, got list; convert it"):
            SemanticCatalog(ids, CODES, (3, 2))
        with pytest.raises(SemidError, match=r"expected removed as a NumPy array, got list; convert it"):
            make(removed=[False] * 4)
        for wrong in (3, (3.0, 2), "32"):
            with pytest.raises(SemidError, match="expected level_sizes as whole numbers, such as"):
                make(sizes=wrong)
    assert (same.item_ids.type, same.level_sizes, same.digest) == (pa.string(), (3, 2), make().digest)
    assert same.incompatibility_with(make()) is None
    assert extend(same, ["e"], np.array([[2, 1]])).item_ids.to_pylist() == [*IDS, "e"]


def test_rows_and_lookup_follow_the_order_asked_for():
    catalog = make()
    assert catalog.rows(["d", "a", "d"]).tolist() == [3, 0, 3]
    assert catalog.lookup(["d", "b"]).tolist() == [[1, 1], [2, 0]]
    assert catalog.rows(pa.array(["c"])).tolist() == [2]
    assert catalog.rows([]).tolist() == []


def test_unknown_ids_are_named_or_marked():
    catalog = make()
    with pytest.raises(SemidError, match=r"item id 'x' \(entry 1\) is not among the catalogue's 4 items"):
        catalog.rows(["a", "x", "y"])
    with pytest.raises(SemidError, match="item id 'x'"):
        catalog.lookup(["x"])
    rows, known = catalog.find_rows(["x", "b", "y"])
    assert (rows.tolist(), known.tolist()) == ([-1, 1, -1], [False, True, False])


def test_few_ids_of_many_items_are_found_as_all_are():
    ids = [f"i{row}" for row in range(200)]
    catalog = make(ids, np.zeros((200, 2)))
    for asked, expected in ((["i7", "x", "i199"], [7, -1, 199]), ([*ids, "x"], [*range(200), -1])):
        rows, known = catalog.find_rows(asked)
        assert (rows.tolist(), rows.dtype, known.tolist()) == (expected, np.int32, [row >= 0 for row in expected])


def test_what_is_no_list_of_ids_is_refused():
    with pytest.raises(SemidError, match="expected a list of item ids, got the string 'abc'; put it in a list"):
        make().rows("abc")
    with pytest.raises(SemidError, match=r"item ids: entry 1 is 1\.0 of type float; ids are strings or integers"):
        make().rows(["a", 1.0])
    for unknown in (pd.Series(["a", "zzz", "b"], index=[1, 0, 2]), pd.Series(["a", "zzz"], index=[7, 9]), {"zzz"}):
        with pytest.raises(SemidError, match="item id 'zzz'"):
            make().rows(unknown)


def test_find_equals_a_linear_search_for_every_code_tuple():
    rng = np.random.default_rng(0)
    sizes = (3, 2, 4)
    codes = np.stack([rng.integers(size, size=40) for size in sizes], axis=1)
    catalog = make([f"i{row}" for row in range(40)], codes, sizes)
    sought = [*itertools.product(*map(range, sizes)), (5, 5, 5), (0, 0)]
    for wanted in sought:
        assert catalog.find(wanted).tolist() == [row for row, own in enumerate(codes.tolist()) if tuple(own) == wanted]
    assert max(len(catalog.find(wanted)) for wanted in sought) > 1  # some collide


def test_find_takes_what_lookup_gives():
    catalog = make()
    assert catalog.find(catalog.lookup(["c"])[0]).tolist() == [0, 2]


def test_tokens_name_levels_by_letter():
    assert make().tokens_of(np.array([1, 3])) == [["<a_2>", "<b_0>"], ["<a_1>", "<b_1>"]]


@pytest.mark.parametrize("tie_break", [False, True])
def test_what_was_written_is_read(tmp_path, tie_break):
    catalog = make(tie_break=tie_break)
    catalog.write(tmp_path / "catalog.parquet")
    read = SemanticCatalog.read(tmp_path / "catalog.parquet")
    assert read.item_ids.equals(catalog.item_ids)
    np.testing.assert_array_equal(read.codes, catalog.codes)
    assert (read.codes.dtype, read.level_sizes, read.tie_break) == (np.int32, (3, 2), tie_break)


def test_every_changed_byte_of_the_data_is_noticed_or_harmless(tmp_path):
    """Page checksums catch what changes values: what can still be read is the same, and the rest a SemidError."""
    catalog, file = make(), tmp_path / "catalog.parquet"
    catalog.write(file)
    data, refused = file.read_bytes(), 0
    for at in range(4, len(data) // 3):  # the data pages come first
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            read = SemanticCatalog.read(file)
        except SemidError:
            refused += 1
            continue
        assert read.item_ids.equals(catalog.item_ids)
        np.testing.assert_array_equal(read.codes, catalog.codes)
    assert refused > 0
    file.write_bytes(data)
    assert len(SemanticCatalog.read(file)) == 4


def _table(**columns) -> pa.Table:
    metadata = {"semid.level_sizes": "3,2"}
    return pa.table(columns).replace_schema_metadata(metadata)


PAIRS = pa.FixedSizeListArray.from_arrays(pa.array([0, 1], pa.int32()), 2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_table(item_id=["a"]), "not a catalogue of semid"),
        (pa.table({"item_id": ["a"], "codes": PAIRS}), "not a catalogue of semid"),
        (_table(item_id=["a"], codes=[[0, 1]]), "column 'codes': expected fixed-size lists of integers, got list"),
        (_table(item_id=pa.array([], pa.string()), codes=PAIRS[:0]), "needs at least one item; got none"),
    ],
)
def test_foreign_and_empty_files_are_refused(tmp_path, table, message):
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SemidError, match=message):
        SemanticCatalog.read(tmp_path / "x.parquet")


def test_the_files_above_are_refused_for_the_reason_given(tmp_path):
    pq.write_table(_table(item_id=["a"], codes=PAIRS), tmp_path / "x.parquet")
    assert SemanticCatalog.read(tmp_path / "x.parquet").codes.tolist() == [[0, 1]]


def test_a_file_that_is_absent_or_no_parquet_is_named(tmp_path):
    with pytest.raises(SemidError, match=r"x\.parquet: not a readable Parquet file"):
        SemanticCatalog.read(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("hello")
    with pytest.raises(SemidError, match=r"y\.parquet: not a readable Parquet file"):
        SemanticCatalog.read(tmp_path / "y.parquet")


def test_levels_beyond_the_alphabet_have_two_letters():
    assert [level_name(level) for level in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]
