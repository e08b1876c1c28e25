"""The catalogue in others' formats and back."""

import json

import numpy as np
import pyarrow as pa
import pytest

from semid.catalog import SemanticCatalog
from semid.errors import SemidError
from semid.export import Format, export, read_tokens

CATALOG = SemanticCatalog(pa.array(["x", "y", "ü/3"]), np.array([[3, 0], [0, 1], [2, 0]], np.int32), (5, 2))


def _same(a: SemanticCatalog, b: SemanticCatalog) -> bool:
    return a.item_ids.equals(b.item_ids) and np.array_equal(a.codes, b.codes) and a.level_sizes == b.level_sizes


def test_json_is_the_index_of_lc_rec(tmp_path):
    export(CATALOG, Format.JSON, tmp_path / "index.json")
    written = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert written == {"x": ["<a_3>", "<b_0>"], "y": ["<a_0>", "<b_1>"], "ü/3": ["<a_2>", "<b_0>"]}


def test_hf_tokens_list_every_token_of_every_level(tmp_path):
    export(CATALOG, Format.HF_TOKENS, tmp_path / "tokens.json")
    written = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert written["items"] == {"x": "<a_3><b_0>", "y": "<a_0><b_1>", "ü/3": "<a_2><b_0>"}
    assert written["added_tokens"] == [*(f"<a_{code}>" for code in range(5)), "<b_0>", "<b_1>"]


@pytest.mark.parametrize("format", [Format.JSON, Format.HF_TOKENS])
def test_tokens_come_back_with_the_level_sizes_given(tmp_path, format):
    export(CATALOG, format, tmp_path / "new" / "tokens.json")
    assert _same(read_tokens(tmp_path / "new" / "tokens.json", level_sizes=(5, 2)), CATALOG)
    inferred = read_tokens(tmp_path / "new" / "tokens.json", tie_break=True)
    assert (inferred.level_sizes, inferred.tie_break) == ((4, 2), True)  # no item has the code 4


def test_parquet_comes_back_whole(tmp_path):
    export(CATALOG, Format.PARQUET, tmp_path / "catalog.parquet")
    assert _same(SemanticCatalog.read(tmp_path / "catalog.parquet"), CATALOG)


@pytest.mark.parametrize("format", Format)
def test_a_file_is_replaced_in_one_piece_and_nothing_else_is_left(tmp_path, format):
    out = tmp_path / "out"
    out.write_text("old")
    export(CATALOG, format, out)
    assert out.read_bytes() != b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", Format)
def test_a_folder_is_no_file(tmp_path, format):
    (tmp_path / "out").mkdir()
    with pytest.raises(SemidError, match="out: is a folder; name the file to write"):
        export(CATALOG, format, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_index_of_others_is_read(tmp_path):
    """As MiniOneRec writes it: items by number, three tokens or more, larger level numbers than there are items."""
    (tmp_path / "index.json").write_text('{"0": ["<a_102>", "<b_7>", "<c_255>"], "1": ["<a_1>", "<b_7>", "<c_0>"]}')
    read = read_tokens(tmp_path / "index.json")
    assert read.item_ids.to_pylist() == ["0", "1"]
    assert read.codes.tolist() == [[102, 7, 255], [1, 7, 0]]
    assert read.level_sizes == (103, 8, 256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected an object from item ids to code tokens, got {}"),
        ("[1]", r"expected an object from item ids to code tokens, got \[1\]"),
        ('{"items": {}}', "expected an object from item ids to code tokens"),
        ('{"i": "a_1"}', "item 'i': 'a_1' is no sequence of code tokens such as <a_12><b_7>"),
        ('{"i": []}', "item 'i': '' is no sequence of code tokens"),
        ('{"i": ["<a_1>", "?"]}', r"item 'i': '<a_1>\?' is no sequence"),
        ('{"i": ["<a_-1>"]}', "item 'i': '<a_-1>' is no sequence"),
        ('{"i": [3, 4]}', "item 'i': '34' is no sequence"),
        ('{"i": 7}', "item 'i': '7' is no sequence"),
        ('{"i": null}', "item 'i': 'None' is no sequence"),
        ('{"i": "<b_1><a_0>"}', "item 'i': level 0 should be <a_...>, got <b_...>"),
        ('{"i": "<a_1>", "j": "<a_1><b_0>"}', "item 'j' has 2 codes where the first item has 1"),
        ('{"i": "<a_99999999999>"}', "item 'i': '<a_99999999999>' is no sequence"),
        ("{", "not valid JSON"),
    ],
)
def test_malformed_tokens_are_named(tmp_path, content, message):
    file = tmp_path / "index.json"
    file.write_text(content)
    with pytest.raises(SemidError, match=message) as caught:
        read_tokens(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_beyond_the_level_sizes_given_are_refused(tmp_path):
    export(CATALOG, Format.JSON, tmp_path / "index.json")
    with pytest.raises(SemidError, match=r"item x \(row 0\): code 3 at level 0 is outside 0..2"):
        read_tokens(tmp_path / "index.json", level_sizes=(3, 2))


def test_more_levels_than_letters_come_back(tmp_path):
    many = SemanticCatalog(pa.array(["x"]), np.arange(27, dtype=np.int32)[None], (30,) * 27)
    export(many, Format.JSON, tmp_path / "index.json")
    assert "<aa_26>" in (tmp_path / "index.json").read_text()
    np.testing.assert_array_equal(read_tokens(tmp_path / "index.json").codes, many.codes)
