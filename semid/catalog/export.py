"""Export of a catalogue to other formats, and import of codes made by other tools.

Exports contain only active items, in row order, and are written atomically.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from semid import artifacts
from semid.arrow import to_lists
from semid.catalog.catalog import SemanticCatalog, code_tokens, file_metadata, level_name
from semid.config import enum_member
from semid.data import as_ids, read_text
from semid.errors import SemidError, refuse_path

SCHEMA_VERSION = 1

_TOKEN = re.compile(r"<([a-z]+)_([0-9]{1,7})>")
# Items per block of an Arrow table or of strings.
_BLOCK = 1 << 18
# Tokens of a tokenizer without a base, in addition to the codes.
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# A word in no vocabulary (a hieroglyph): a tokenizer without an unknown token fails only at such words.
_UNKNOWN = "\N{EGYPTIAN HIEROGLYPH A001}"


class Format(enum.Enum):
    """Formats of `semid export`."""

    PARQUET = "parquet"  # item_id, codes as a fixed-size list of int32, tokens as one string; see `_write_parquet`
    JSON = "json"  # {"item id": ["<a_12>", "<b_7>", ...]}: the index.json of LC-Rec and MiniOneRec
    TSV = "tsv"  # lines of item id, tab, "<a_12><b_7>"; without a header
    HF_TOKENS = "hf-tokens"  # {"added_tokens": [...], "items": {"item id": "<a_12><b_7>..."}} for tokenizer.add_tokens
    HF_TOKENIZER = "hf-tokenizer"  # the tokenizer.json of Hugging Face with the code tokens added
    TRIE = "trie"  # the trie's arrays as safetensors; see `_write_trie`


def export(
    catalog: SemanticCatalog,
    format: Format | str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    version: int = 0,
    digest: str | None = None,
) -> None:
    """Write `catalog` to the file `out`, atomically.

    `version` and `digest` are recorded: those that `semid catalog history` shows; by default 0, and the digest of ids
    and codes.
    `base` is a `tokenizer.json`, or a folder with one, to which HF_TOKENIZER adds the code tokens; without it, the
    tokenizer has only these. Raises SemidError if `out` is a folder, for an unsuitable base, and for item ids that the
    format cannot represent.
    """
    refuse_path(catalog, "SemanticCatalog.load")
    format, out = enum_member(Format, format, "format"), artifacts.try_file(out)
    if base is not None and format is not Format.HF_TOKENIZER:
        raise SemidError(f"a base tokenizer is for the format hf-tokenizer, not for {format.value}; leave out the base")
    start = None if base is None else artifacts.fetched(base)
    write: dict[Format, Callable[[SemanticCatalog, Path], None]] = {
        Format.PARQUET: lambda catalog, file: _write_parquet(catalog, file, version, digest or catalog.digest),
        Format.JSON: _write_json,
        Format.TSV: _write_tsv,
        Format.HF_TOKENS: _write_hf_tokens,
        Format.HF_TOKENIZER: lambda catalog, file: _write_tokenizer(catalog, file, start),
        Format.TRIE: lambda catalog, file: _write_trie(catalog, file, version, digest or catalog.digest),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.replacing(out) as temporary:
        write[format](catalog, temporary)


def _active_rows(catalog: SemanticCatalog) -> Int[np.ndarray, " n"]:
    """The item rows of an export."""
    return np.flatnonzero(catalog.active)


def _blocks(catalog: SemanticCatalog) -> Iterator[tuple[pa.Array, Int[np.ndarray, "n level"], pa.Array]]:
    """Item ids, codes and token strings of the active items, in blocks."""
    rows = _active_rows(catalog)
    names = [pa.array(tokens) for tokens in code_tokens(catalog.level_sizes)]
    for start in range(0, len(rows), _BLOCK):
        some = rows[start : start + _BLOCK]
        codes = catalog.codes[some].astype(np.int32)
        tokens = [of.take(pa.array(column)) for of, column in zip(names, codes.T, strict=True)]
        yield catalog.item_ids.take(pa.array(some)), codes, pc.binary_join_element_wise(*tokens, "")


def _write_parquet(catalog: SemanticCatalog, file: Path, version: int, digest: str) -> None:
    """Columns item_id, codes (fixed-size list of int32), tokens (string), pages with checksums.

    The metadata hold, as strings: semid.schema_version, semid.level_sizes (separated by commas), semid.tie_break (0 or
    1), semid.version, the catalogue version's number, and semid.catalog, its digest. `SemanticCatalog.read` reads it.
    Memory does not grow with the items.
    """
    metadata = {
        "semid.schema_version": str(SCHEMA_VERSION),
        **file_metadata(catalog.level_sizes, tie_break=catalog.tie_break, source_columns={}),
        "semid.version": str(version),
        "semid.catalog": digest,
    }
    columns = {"item_id": catalog.item_ids.type, "codes": pa.list_(pa.int32(), catalog.num_levels)}
    schema = pa.schema({**columns, "tokens": pa.string()}, metadata)
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for item_ids, codes, tokens in _blocks(catalog):
            lists = to_lists(codes)
            writer.write_table(pa.table([item_ids, lists, tokens], schema=schema))


def _write_json(catalog: SemanticCatalog, file: Path) -> None:
    rows = _active_rows(catalog)
    items = catalog.item_ids.take(pa.array(rows)).to_pylist()
    artifacts.write_json(file, dict(zip(items, catalog.tokens_of(rows), strict=True)))


def _write_hf_tokens(catalog: SemanticCatalog, file: Path) -> None:
    added = [token for level in code_tokens(catalog.level_sizes) for token in level]
    items = {item: text for ids, _, texts in _blocks(catalog) for item, text in _pairs(ids, texts)}
    artifacts.write_json(file, {"added_tokens": added, "items": items})


def _write_tsv(catalog: SemanticCatalog, file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for item_ids, _, tokens in _blocks(catalog):
            if (odd := item_ids.filter(pc.match_substring_regex(item_ids, "[\t\r\n]"))) and len(odd):
                raise SemidError(
                    f"item id {odd[0].as_py()!r} holds a tab or a line break, which a TSV file cannot; export as "
                    "parquet or json"
                )
            lines.writelines(f"{item}\t{text}\n" for item, text in _pairs(item_ids, tokens))


def _pairs(item_ids: pa.Array, tokens: pa.Array) -> Iterable[tuple[str, str]]:
    return zip(item_ids.to_pylist(), tokens.to_pylist(), strict=True)


def _write_tokenizer(catalog: SemanticCatalog, file: Path, base: Path | None) -> None:
    """Every code becomes one token, matched in any context: "<a_12><b_7>" has two. They are not special tokens, so that
    decoders show them."""
    try:
        from tokenizers import AddedToken, Tokenizer
    except ImportError:
        raise SemidError(
            "the format hf-tokenizer needs the package tokenizers; pip install 'semid[encoders]'"
        ) from None
    tokenizer = Tokenizer.from_str(_code_vocabulary()) if base is None else _base_tokenizer(base, Tokenizer.from_str)
    tokens = [token for level in code_tokens(catalog.level_sizes) for token in level]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(str(file))


def _base_tokenizer(base: Path, read: Callable[[str], Any]) -> Any:
    """The tokenizer of a tokenizer.json. Raises SemidError naming the file if the library cannot read it, or reads it
    but fails at an unknown word."""
    file = base / "tokenizer.json" if base.is_dir() else base
    text = json.dumps(artifacts.read_json(file))
    try:
        tokenizer = read(text)
        tokenizer.encode(_UNKNOWN)
        return tokenizer
    except Exception as error:  # the library raises nothing narrower
        raise SemidError(
            f"{file}: not a tokenizer.json that the package tokenizers can use ({error}); name the one of the language "
            "model, or leave out the base"
        ) from None


def _code_vocabulary() -> str:
    """A word-level tokenizer with the usual special tokens, whose decoder joins tokens without spaces."""
    special = [
        {"id": row, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for row, token in enumerate(_SPECIAL)
    ]
    vocabulary = {token: row for row, token in enumerate(_SPECIAL)}
    parts = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": _SPECIAL[-1]},
    }
    return json.dumps(parts)


def _write_trie(catalog: SemanticCatalog, file: Path, version: int, digest: str) -> None:
    """The prefix tree of the codes (`seq_models.CodeTrie`) as safetensors, every range written out.

    Nodes are numbered per level, in order of their codes; the root is node 0 before level 0.

    - `child_start.L`, int32 [nodes before level L, plus 1]: node n before level L has the children `child_start.L[n]`
      to `child_start.L[n + 1]` (excluded), nodes of level L;
    - `tokens.L`, uint8, uint16 or int32 [nodes of level L]: the code of each;
    - `leaf_start`, int32 [nodes of the last level, plus 1]: leaf n holds the positions `leaf_start[n]` to
      `leaf_start[n + 1]` (excluded);
    - `item_rows`, int32 [items]: by position, the item; items of one leaf in order of their numbers;
    - `item_id_start`, int64 [items plus 1], and `item_id_bytes`, uint8: item i has the id
      `item_id_bytes[item_id_start[i]:item_id_start[i + 1]]`, in UTF-8; it is the i-th of the other formats.

    The header's metadata hold, as strings: format "semid.trie", schema_version, level_sizes (separated by commas),
    tie_break (0 or 1), version, the catalogue version's number, and catalog, its digest.
    """
    rows = _active_rows(catalog)
    from seq_models import CodeTrie  # here, so that catalogues are read without JAX

    trie = CodeTrie.from_codes(catalog.codes[rows], catalog.level_sizes)
    tensors: dict[str, Any] = {"leaf_start": trie.leaf_start, "item_rows": trie.item_rows}
    for level, (tokens, start) in enumerate(zip(trie.tokens, trie.child_start, strict=True)):
        tensors |= {f"tokens.{level}": tokens, f"child_start.{level}": start}
    before = {f"child_start.{level}": n for level, n in enumerate((1, *map(len, trie.tokens)))}
    before["leaf_start"] = before.pop(f"child_start.{catalog.num_levels}")
    for name, nodes in before.items():
        if tensors[name] is None:  # node n has member n
            tensors[name] = np.arange(nodes + 1, dtype=np.int32)
    ids = catalog.item_ids.cast(pa.large_binary()).take(pa.array(rows))
    _, offsets, data = ids.buffers()
    tensors["item_id_start"] = np.frombuffer(offsets, np.int64)[: len(ids) + 1]
    tensors["item_id_bytes"] = np.frombuffer(data or b"", np.uint8)[: tensors["item_id_start"][-1]]
    metadata = {
        "format": "semid.trie",
        "schema_version": str(SCHEMA_VERSION),
        "level_sizes": ",".join(map(str, catalog.level_sizes)),
        "tie_break": str(int(catalog.tie_break)),
        "version": str(version),
        "catalog": digest,
    }
    artifacts.save_tensors(file, tensors, metadata=metadata)


def read_tokens(
    path: str | Path, *, level_sizes: Sequence[int] | None = None, tie_break: bool = False
) -> SemanticCatalog:
    """A catalogue from token strings: an `index.json` of LC-Rec or MiniOneRec, the `hf-tokens` form, or (by its suffix
    .tsv) lines of item id and token string.

    Without `level_sizes`, the size of a level is its largest code plus one. Raises SemidError naming the file, the item
    (and line) and what is wrong with its tokens; with `tie_break` also for two items of equal codes.
    """
    path = artifacts.fetched(path)
    items: list[str] = []
    codes: list[list[int]] = []
    levels = len(level_sizes or ())
    is_tsv = path.name.removesuffix(".gz").endswith(".tsv")
    if path.suffix in (".parquet", ".pq", ".csv"):
        raise SemidError(f"{path}: expected token strings in an index.json, or a .tsv of item id, tab and token string")
    for where, item, text in _tsv_items(path) if is_tsv else _json_items(path):
        if not item:
            raise SemidError(f"{where}: an id is empty; name the item or leave it out")
        row = _codes(where, text)
        if len(row) != (levels or len(codes[0] if codes else row)):
            asked = f"there are {levels} level sizes" if levels else f"the first item has {len(codes[0])}"
            raise SemidError(f"{where} has {len(row)} codes where {asked}")
        items.append(item)
        codes.append(row)
    array = np.array(codes, np.int32)
    sizes = tuple(level_sizes) if level_sizes else tuple((array.max(axis=0) + 1).tolist())
    try:
        catalog = SemanticCatalog(as_ids(items), array, sizes, tie_break)
    except SemidError as error:
        raise SemidError(f"{path}: {error}") from None
    if tie_break and (pair := catalog.equal_codes()):
        raise SemidError(
            f"{path}: items {pair[0]!r} and {pair[1]!r} have the same codes, so the last level does not tell items "
            "apart; leave out tie_break (--tie-break), or number such items there"
        )
    return catalog


def _json_items(path: Path) -> Iterator[tuple[str, str, str]]:
    """Location, item id and token string of every item."""
    data = _read_json(path)
    items = data.get("items") if isinstance(data, dict) else None
    items = items if isinstance(items, dict) else data  # in an index.json, "items" is an item id
    if not isinstance(items, dict) or not items:
        raise SemidError(f"{path}: expected an object from item ids to code tokens, got {json.dumps(data)[:40]}")
    for item, tokens in items.items():
        text = "".join(map(str, tokens)) if isinstance(tokens, list) else str(tokens)
        yield f"{path}: item {item!r}", item, text


def _read_json(path: Path) -> Any:
    """Read JSON and refuse repeated names in objects, as the tokens of a repeated item would be lost silently."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise SemidError(f"{path}: item {name!r} is given twice; ids must be unique")
            found[name] = value
        return found

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except SemidError:
        raise
    except (ValueError, RecursionError) as error:
        raise SemidError(f"{path}: not valid JSON ({error})") from None


def _tsv_items(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        item, *tokens = line.removesuffix("\r").split("\t")
        if len(tokens) != 1:
            raise SemidError(
                f"{path}: line {number}: expected an item id, a tab and code tokens such as <a_12><b_7>, got "
                f"{line[:40]!r}"
            )
        yield f"{path}: line {number}: item {item!r}", item, tokens[0]


def _codes(where: str, text: str) -> list[int]:
    found = _TOKEN.findall(text)
    if not found or "".join(f"<{name}_{code}>" for name, code in found) != text:
        raise SemidError(f"{where}: {text!r} is no sequence of code tokens such as <a_12><b_7>")
    for level, (name, _) in enumerate(found):
        if name != level_name(level):
            raise SemidError(f"{where}: level {level} should be <{level_name(level)}_...>, got <{name}_...>")
    return [int(code) for _, code in found]
