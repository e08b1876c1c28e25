"""The catalogue in others' formats and back."""

import dataclasses
import gzip
import json
import re
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tokenizers

from semid.catalog import Format, SemanticCatalog, export, read_tokens
from semid.errors import SemidError

CATALOG = SemanticCatalog(pa.array(["x", "y", "ü/3"]), np.array([[3, 0], [0, 1], [2, 0]], np.int32), (5, 2))


def _same(a: SemanticCatalog, b: SemanticCatalog) -> bool:
    return a.item_ids.equals(b.item_ids) and np.array_equal(a.codes, b.codes) and a.level_sizes == b.level_sizes


def test_json_is_the_index_of_lc_rec(tmp_path):
    export(CATALOG, Format.JSON, tmp_path / "index.json")
    written = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert written == {"x": ["<a_3>", "<b_0>"], "y": ["<a_0>", "<b_1>"], "ü/3": ["<a_2>", "<b_0>"]}


def test_a_format_is_named_by_its_value_too(tmp_path):
    export(CATALOG, "tsv", tmp_path / "tokens.tsv")
    assert _same(read_tokens(tmp_path / "tokens.tsv", level_sizes=(5, 2)), CATALOG)
    with pytest.raises(SemidError, match=r"format: expected one of parquet, json, tsv, .*, got 'csv'"):
        export(CATALOG, "csv", tmp_path / "tokens.csv")


def test_hf_tokens_list_every_token_of_every_level(tmp_path):
    export(CATALOG, Format.HF_TOKENS, tmp_path / "tokens.json")
    written = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert written["items"] == {"x": "<a_3><b_0>", "y": "<a_0><b_1>", "ü/3": "<a_2><b_0>"}
    assert written["added_tokens"] == [*(f"<a_{code}>" for code in range(5)), "<b_0>", "<b_1>"]


def test_tsv_is_item_id_and_token_string(tmp_path):
    export(CATALOG, Format.TSV, tmp_path / "tokens.tsv")
    assert (tmp_path / "tokens.tsv").read_bytes().decode() == "x\t<a_3><b_0>\ny\t<a_0><b_1>\nü/3\t<a_2><b_0>\n"
    rows = duckdb.sql(f"from read_csv('{tmp_path}/tokens.tsv', delim='\t', header=false, quote='')").fetchall()
    assert rows == [("x", "<a_3><b_0>"), ("y", "<a_0><b_1>"), ("ü/3", "<a_2><b_0>")]


@pytest.mark.parametrize(
    ("format", "name"),
    [(Format.JSON, "new/tokens.json"), (Format.HF_TOKENS, "new/tokens.json"), (Format.TSV, "new/tokens.tsv")],
)
def test_tokens_come_back_with_the_level_sizes_given(tmp_path, format, name):
    export(CATALOG, format, tmp_path / name)
    assert _same(read_tokens(tmp_path / name, level_sizes=(5, 2)), CATALOG)
    inferred = read_tokens(tmp_path / name, tie_break=True)
    assert (inferred.level_sizes, inferred.tie_break) == ((4, 2), True)  # no item has the code 4


def test_parquet_comes_back_whole(tmp_path):
    export(CATALOG, Format.PARQUET, tmp_path / "catalog.parquet")
    assert _same(SemanticCatalog.read(tmp_path / "catalog.parquet"), CATALOG)


def test_parquet_is_read_by_others(tmp_path, monkeypatch):
    """In row groups of two items: by pyarrow, checksums verified, and by SQL."""
    monkeypatch.setattr(sys.modules[export.__module__], "_BLOCK", 2)
    file = tmp_path / "catalog.parquet"
    export(CATALOG, Format.PARQUET, file)
    table = pq.read_table(file, page_checksum_verification=True)
    assert pq.ParquetFile(file).num_row_groups == 2
    assert table.schema.field("codes").type == pa.list_(pa.int32(), 2)
    assert table.to_pylist() == [
        {"item_id": "x", "codes": [3, 0], "tokens": "<a_3><b_0>"},
        {"item_id": "y", "codes": [0, 1], "tokens": "<a_0><b_1>"},
        {"item_id": "ü/3", "codes": [2, 0], "tokens": "<a_2><b_0>"},
    ]
    metadata = {key: value for key, value in table.schema.metadata.items() if key.startswith(b"semid.")}
    expected = {
        "schema_version": "1",
        "version": "0",
        "level_sizes": "5,2",
        "tie_break": "0",
        "catalog": CATALOG.digest,
    }
    assert metadata == {f"semid.{key}".encode(): value.encode() for key, value in expected.items()}
    query = f"select item_id, tokens from '{file}' where codes[1] >= 2 order by codes[1]"
    assert duckdb.sql(query).fetchall() == [("ü/3", "<a_2><b_0>"), ("x", "<a_3><b_0>")]
    assert _same(SemanticCatalog.read(file), CATALOG)


def test_a_changed_page_is_noticed(tmp_path):
    file = tmp_path / "catalog.parquet"
    export(CATALOG, Format.PARQUET, file)
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(file, page_checksum_verification=True)


@pytest.mark.parametrize("base", [None, "file", "folder"])
def test_a_tokenizer_has_one_token_a_code(tmp_path, base):
    if base is not None:
        _write_base(tmp_path / "base" / "tokenizer.json")
        base = tmp_path / "base" / "tokenizer.json" if base == "file" else tmp_path / "base"
    export(CATALOG, Format.HF_TOKENIZER, tmp_path / "tokenizer.json", base=base)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = [*(f"<a_{code}>" for code in range(5)), "<b_0>", "<b_1>"]
    ids = [tokenizer.token_to_id(token) for token in tokens]
    first = 4 if base is None else 9  # behind what the base has
    assert ids == list(range(first, first + 7))
    for text in ("<a_3><b_0>", "<a_0><b_1>"):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert [tokens[i - first] for i in encoded.ids] == [text[:5], text[5:]]
        assert tokenizer.decode(encoded.ids).replace(" ", "") == text  # codes are no special tokens: they are shown
    if base is None:
        assert tokenizer.decode(tokenizer.encode("<bos><a_3><b_0><eos>").ids) == "<a_3><b_0>"
        assert tokenizer.encode("<a_5>").ids == [tokenizer.token_to_id("<unk>")]
    else:
        assert tokenizer.encode("the user likes <a_3><b_0>").ids == [1, 2, 3, ids[3], ids[5]]


def _write_base(file: Path) -> None:
    """A tokenizer of a language model: nine words of lower case."""
    words = ["<unk>", "the", "user", "likes", "item", "a", "b", "3", "0"]
    model = tokenizers.models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    file.parent.mkdir()
    tokenizer.save(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "base.json: no such file"), ("{", "base.json: not valid JSON"), ('{"a": 1}', "base.json: not a tokenizer")],
)
def test_a_base_of_no_use_is_named(tmp_path, content, message):
    base, out = tmp_path / "base.json", tmp_path / "tokenizer.json"
    if content is not None:
        base.write_text(content)
    with pytest.raises(SemidError, match=message):
        export(CATALOG, Format.HF_TOKENIZER, out, base=base)
    assert set(tmp_path.iterdir()) <= {base}


def test_a_base_that_lacks_the_unknown_token_that_it_names_is_refused(tmp_path):
    _write_base(tmp_path / "base" / "tokenizer.json")
    file, out = tmp_path / "base" / "tokenizer.json", tmp_path / "tokenizer.json"
    export(CATALOG, Format.HF_TOKENIZER, out, base=file)  # control
    out.unlink()
    file.write_text(re.sub(r'"unk_token": *"<unk>"', '"unk_token": "<gone>"', file.read_text()))
    with pytest.raises(SemidError, match=r"tokenizer\.json: not a tokenizer.json that .* can use \(.*Missing \[UNK\]"):
        export(CATALOG, Format.HF_TOKENIZER, out, base=file)
    assert not out.exists()


def test_a_base_is_for_a_tokenizer(tmp_path):
    with pytest.raises(SemidError, match="is for the format hf-tokenizer, not for json"):
        export(CATALOG, Format.JSON, tmp_path / "index.json", base=tmp_path)


def test_without_tokenizers_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SemidError, match=r"pip install 'semid\[encoders\]'"):
        export(CATALOG, Format.HF_TOKENIZER, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def _walk(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Item ids and codes in the order of the leaves, read from the arrays by their documented layout alone."""
    a = safetensors.numpy.load_file(file)
    ids, start = a["item_id_bytes"].tobytes(), a["item_id_start"]
    levels = sum(name.startswith("tokens.") for name in a)

    def below(node: int, level: int, codes: tuple[int, ...]):
        if level == levels:
            for item in a["item_rows"][a["leaf_start"][node] : a["leaf_start"][node + 1]]:
                yield ids[start[item] : start[item + 1]].decode(), codes
            return
        for child in range(a[f"child_start.{level}"][node], a[f"child_start.{level}"][node + 1]):
            yield from below(child, level + 1, (*codes, int(a[f"tokens.{level}"][child])))

    return list(below(0, 0, ()))


COLLIDING = SemanticCatalog(
    pa.array(["b", "ü", "a", "", "c"]),
    np.array([[300, 1, 1], [2, 0, 0], [300, 1, 1], [2, 1, 0], [0, 1, 1]]),
    (301, 2, 2),
)


@pytest.mark.parametrize("catalog", [CATALOG, COLLIDING], ids=["every-range-of-one", "collisions"])
def test_the_trie_is_walked_by_others(tmp_path, catalog):
    export(catalog, Format.TRIE, tmp_path / "trie.safetensors")
    order = sorted(range(len(catalog)), key=lambda row: (*catalog.codes[row], row))
    expected = [(catalog.item_ids[row].as_py(), tuple(catalog.codes[row].tolist())) for row in order]
    assert _walk(tmp_path / "trie.safetensors") == expected
    with safetensors.safe_open(tmp_path / "trie.safetensors", "numpy") as file:
        metadata = file.metadata()
    sizes = ",".join(map(str, catalog.level_sizes))
    assert metadata == {
        **{"format": "semid.trie", "schema_version": "1", "level_sizes": sizes, "tie_break": "0"},
        "version": "0",
        "catalog": catalog.digest,
    }


@pytest.mark.parametrize("item_id", ["a\tb", "a\nb", "a\rb"])
def test_item_ids_that_a_tsv_cannot_hold(tmp_path, item_id):
    catalog = SemanticCatalog(pa.array(["x", item_id]), np.zeros((2, 1), np.int32), (1,))
    with pytest.raises(SemidError, match=r"item id 'a\\.b' holds a tab or a line break"):
        export(catalog, Format.TSV, tmp_path / "tokens.tsv")
    assert list(tmp_path.iterdir()) == []
    export(catalog, Format.JSON, tmp_path / "index.json")
    assert read_tokens(tmp_path / "index.json").item_ids.equals(catalog.item_ids)


@pytest.mark.parametrize("format", Format)
def test_what_no_longer_lives_is_in_no_export(tmp_path, format):
    """Item y is gone: every format is that of the catalogue without it, but for the digest."""
    rows = np.array([0, 2])
    rest = SemanticCatalog(CATALOG.item_ids.take(pa.array(rows)), CATALOG.codes[rows], CATALOG.level_sizes)
    export(rest, format, tmp_path / "expected")
    export(CATALOG, format, tmp_path / "whole")
    gone = dataclasses.replace(CATALOG, removed=~np.isin(np.arange(len(CATALOG)), rows))
    export(gone, format, tmp_path / "active")
    expected, whole, active = ((tmp_path / name).read_bytes() for name in ("expected", "whole", "active"))
    if format is Format.PARQUET:
        expected, whole, active = (pq.read_table(tmp_path / name) for name in ("expected", "whole", "active"))
    if format is Format.TRIE:
        expected, whole, active = (_walk(tmp_path / name) for name in ("expected", "whole", "active"))
    assert active == expected
    assert (active != whole) or format is Format.HF_TOKENIZER  # which knows codes alone


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected an item id, a tab and code tokens such as <a_12><b_7>, got ''"),
        ("i <a_1>\n", "line 1: expected an item id, a tab"),
        ("i\t<a_1>\t3\n", "line 1: expected an item id, a tab"),
        ("i\t<a_1>\n\nj\t<a_1>\n", "line 2: expected an item id, a tab"),
        ("item_id\ttokens\n", "line 1: item 'item_id': 'tokens' is no sequence of code tokens"),
        ("i\t<a_1>\nj\t<a_1><b_0>\n", "line 2: item 'j' has 2 codes where the first item has 1"),
        ("i\t<a_1>\ni\t<a_2>\n", "item id 'i' appears more than once"),
    ],
)
def test_malformed_lines_are_named(tmp_path, content, message):
    file = tmp_path / "tokens.tsv"
    file.write_text(content)
    with pytest.raises(SemidError) as caught:
        read_tokens(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_lines_of_other_systems_are_read(tmp_path):
    (tmp_path / "tokens.tsv").write_bytes(b"i\t<a_1>\r\nj\t<a_0>")
    assert read_tokens(tmp_path / "tokens.tsv").codes.tolist() == [[1], [0]]
    (tmp_path / "tokens.tsv").write_bytes(b"\xff\t<a_1>")
    with pytest.raises(SemidError, match=r"tokens.tsv: line 1: byte 0 \(0xff\) is not UTF-8"):
        read_tokens(tmp_path / "tokens.tsv")


def test_a_last_level_that_tells_no_items_apart_is_no_tie_break(tmp_path):
    (tmp_path / "tokens.tsv").write_text("i\t<a_1><b_0>\nj\t<a_0><b_0>\nk\t<a_1><b_0>\n")
    assert read_tokens(tmp_path / "tokens.tsv").equal_codes() == ("i", "k")
    with pytest.raises(SemidError, match=r"tokens.tsv: items 'i' and 'k' have the same codes, .*--tie-break"):
        read_tokens(tmp_path / "tokens.tsv", tie_break=True)
    (tmp_path / "tokens.tsv").write_text("i\t<a_1><b_0>\nj\t<a_0><b_0>\nk\t<a_1><b_1>\n")
    assert read_tokens(tmp_path / "tokens.tsv", tie_break=True).equal_codes() is None


def test_an_item_may_be_called_items(tmp_path):
    catalog = dataclasses.replace(CATALOG, item_ids=pa.array(["items", "added_tokens", "z"]))
    for format in (Format.JSON, Format.HF_TOKENS):
        export(catalog, format, tmp_path / "index.json")
        assert _same(read_tokens(tmp_path / "index.json", level_sizes=(5, 2)), catalog)


def test_compressed_lines_are_read_and_other_tables_refused(tmp_path):
    (tmp_path / "tokens.tsv.gz").write_bytes(gzip.compress(b"i\t<a_1>\n"))
    assert read_tokens(tmp_path / "tokens.tsv.gz").codes.tolist() == [[1]]
    export(CATALOG, Format.PARQUET, tmp_path / "catalog.parquet")
    with pytest.raises(SemidError, match=r"catalog.parquet: expected token strings in an index.json, or a .tsv"):
        read_tokens(tmp_path / "catalog.parquet")


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path):
    (tmp_path / "c.tsv").write_bytes("\ufeffa\t<a_0>\r\nb\t<a_1>\r\n".encode())
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a": ["<a_0>"], "b": ["<a_1>"]}')
    for name in ("c.tsv", "c.json"):
        assert read_tokens(tmp_path / name).item_ids.to_pylist() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ["<a_0>"], "b": ["<a_1>"], "a": ["<a_1>"]}', "item 'a' is given twice"),
        ('{"": ["<a_0>"]}', "an id is empty"),
        (r'{"a": ["<a_0>"], "\ud800": ["<a_1>"]}', r"item ids: entry 1 holds half a character .*: '\\ud800'"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_an_index_that_is_not_one_item_a_name_is_refused(tmp_path, text, says):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(SemidError, match=rf"index.json: .*{says}"):
        read_tokens(tmp_path / "index.json")


def test_codes_beyond_the_level_sizes_given_are_refused(tmp_path):
    export(CATALOG, Format.JSON, tmp_path / "index.json")
    with pytest.raises(SemidError, match=r"index.json: item x \(row 0\): code 3 at level 0 is outside 0..2"):
        read_tokens(tmp_path / "index.json", level_sizes=(3, 2))
    with pytest.raises(SemidError, match=r"index.json: item 'x' has 2 codes where there are 3 level sizes"):
        read_tokens(tmp_path / "index.json", level_sizes=(5, 2, 1))


def test_more_levels_than_letters_come_back(tmp_path):
    many = SemanticCatalog(pa.array(["x"]), np.arange(27, dtype=np.int32)[None], (30,) * 27)
    export(many, Format.JSON, tmp_path / "index.json")
    assert "<aa_26>" in (tmp_path / "index.json").read_text()
    np.testing.assert_array_equal(read_tokens(tmp_path / "index.json").codes, many.codes)
