"""One rule of ids: what is one and what is none, alike for columns of files and for Python values."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid.data import Dataset, VectorFile, as_ids, as_masks, parse_ids, read_id_file
from semid.errors import SemidError
from semid.evaluation.held_out import examples_from_table

IDS = ["1", "2", "3"]


class Ranker:
    item_ids = pa.array(IDS)


def _prepared(values, _):
    interactions = pa.table({"user_id": ["u"] * len(values), "item_id": values, "position": range(len(values))})
    return Dataset.from_tables(pa.table({"item_id": values}), interactions, name="t").item_ids.to_pylist()


def _vector_file(values, folder):
    pq.write_table(pa.table({"item_id": values, "v": [[1.0, 2.0]] * len(values)}), folder / "v.parquet")
    file = VectorFile.open(str(folder / "v.parquet"), dim=2, id_column="item_id", columns=())
    return next(file.blocks(8)).item_ids.to_pylist()


def _targets(values, _):
    table = pa.table({"history": [["1"]] * len(values), "target": values})
    return [IDS[row] for row in examples_from_table(Ranker(), table, drop_unknown=False).examples.targets]


def _histories(values, _):
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    table = pa.table({"history": lists, "target": ["1"]})
    return [IDS[row] for row in examples_from_table(Ranker(), table, drop_unknown=False).examples.histories.items]


def _python(values, _):
    return as_ids(values.to_pylist()).to_pylist()


DOORS = [_prepared, _vector_file, _targets, _histories, _python]
VIEWS = pa.array(IDS).cast(pa.string_view())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "values",
    [
        pa.array(IDS),
        pa.array([1, 2, 3]),
        pa.array([1, 2, 3], pa.uint8()),
        pa.array(IDS, pa.large_string()),
        pa.array(IDS).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.uint32()), VIEWS),  # a categorical of polars
    ],
    ids=lambda values: str(values.type)[:30],
)
def test_strings_and_integers_are_ids_at_every_door(door, values, tmp_path):
    if door is _vector_file and pa.types.is_dictionary(values.type):
        values = values.cast(pa.string()).dictionary_encode() if values.type.value_type == pa.string() else VIEWS
    assert door(values, tmp_path) == IDS


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("values", "named"),
    [
        (pa.array([1.0]), r"1\.0|double"),
        (pa.array([12345678901234567.0]), "double|float"),
        (pa.array([True]), "bool"),
        (pa.array(["1", None]), "null|None"),
        (pa.array(["1", ""]), "empty|''"),
        (pa.array([b"1"]), "bytes|binary"),
        (pa.array([0], pa.timestamp("s")), "timestamp|datetime"),
    ],
    ids=str,
)
def test_anything_else_is_refused_at_every_door(door, values, named, tmp_path):
    if door is _python and values.to_pylist() == ["1", ""]:
        return  # Python looks ids up, and no item is called ""
    with pytest.raises(SemidError, match=named) as caught:
        door(values, tmp_path)
    assert "\n" not in str(caught.value) or door is _prepared


def test_python_values_are_read_by_position_and_named_by_value():
    for values in (pd.Series([1, 2, 3], index=[5, 1, 0]), np.array([1, 2, 3]), np.array(IDS), range(1, 4), iter(IDS)):
        assert as_ids(values).to_pylist() == IDS
    assert as_ids(pd.Series(pd.Categorical(IDS))).to_pylist() == IDS
    assert as_ids({"2"}).to_pylist() == ["2"]
    assert as_ids([]).to_pylist() == []
    with pytest.raises(SemidError, match="item ids: entry 1 is nan of type float"):
        as_ids(pd.Series(["a", np.nan], index=[7, 9]))
    with pytest.raises(SemidError, match=r"item ids \(history 3\): entry 1 holds half a character .*: '\\ud800'"):
        as_ids(["a", "\ud800"], what="item ids (history 3)")
    for wrong in (None, 3.5, float("nan")):
        with pytest.raises(SemidError, match=f"expected a list of item ids, got {wrong}"):
            as_ids(wrong)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a, b c ,d", ["a", "b c", "d"]),
        ("", []),
        ('["a,b", " c ", 7]', ["a,b", " c ", "7"]),
        (' ["[x]"]', ["[x]"]),
        ("[]", []),
    ],
)
def test_ids_in_a_line_are_separated_by_commas_or_a_json_list(text, ids):
    assert parse_ids(text) == ids


@pytest.mark.parametrize("text", ["[x]", '["a"', "[1.5]", "[null]", "[" * 100_000])
def test_a_bracket_begins_a_json_list_of_ids_or_nothing(text):
    with pytest.raises(SemidError, match=r"expected ids as a JSON list, such as \[\"i1\""):
        parse_ids(text)


def test_a_file_of_ids_keeps_what_belongs_to_them(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes("\ufeff a\r\nb\u2028c\r\n\r\n  \nd,e".encode())
    assert read_id_file(file) == [" a", "b\u2028c", "d,e"]
    file.write_bytes("a\r\nb\r\n".encode("utf-16"))  # as PowerShell writes
    assert read_id_file(file) == ["a", "b"]
    file.write_bytes("a\ncafé\n".encode("latin-1"))
    with pytest.raises(SemidError, match=r"ids.txt: line 2: byte 5 \(0xe9\) is not UTF-8; convert the file to UTF-8"):
        read_id_file(file)
    with pytest.raises(SemidError, match=r"none.txt: no such file; check the path"):
        read_id_file(tmp_path / "none.txt")


def test_a_table_of_ids_is_read_as_tables_are(tmp_path, caplog):
    caplog.set_level("INFO", "semid")
    file = tmp_path / "stock.csv"
    file.write_text("price,item_id\n1,007\n2,b c\n")
    assert read_id_file(file) == ["007", "b c"]
    assert caplog.messages == ["not used: price"]
    file.write_text("item_id\na\n\n")
    assert read_id_file(file) == ["a"]
    assert len(caplog.messages) == 1
    file.write_text("sku,name,title\n007,b,c\n")
    assert read_id_file(file, columns={"item_id": "sku", "title": "name"}) == ["007"]
    assert caplog.messages[1:] == ["not used: name, title"]  # by their names in the file
    file.write_text("id\na\n")
    with pytest.raises(SemidError, match=r"stock.csv: column 'item_id': missing; found id; rename one"):
        read_id_file(file)
    file.write_text("item_id,item_id\na,b\n")
    with pytest.raises(SemidError, match=r"stock.csv: column 'item_id' occurs more than once; rename or drop one"):
        read_id_file(file)
    file.write_text("item_id,price\n,1\n")
    with pytest.raises(SemidError, match=r"stock.csv: row 1, column 'item_id': is null"):
        read_id_file(file)


def test_masks_are_booleans_by_row():
    assert as_masks([True, False], num_items=2, num_histories=3).tolist() == [[True, False]]
    assert as_masks(np.eye(2, dtype=bool), num_items=2, num_histories=2).shape == (2, 2)
    for wrong, got in ((["a", "b"], r"<U1 \[2\]"), ([[True], [True, False]], "object"), (np.ones(3, bool), "bool")):
        with pytest.raises(SemidError, match=rf"booleans \[2 items\] .* got {got}.*; a Recommender makes it"):
            as_masks(wrong, num_items=2, num_histories=1)
