"""Items appended to a catalogue against a search of every free code, and bad input named by file, column and row."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantizers import ProductKMeans, ResidualKMeans
from semid import artifacts
from semid.catalog import CATALOG_FILE, Collisions, Known, SemanticCatalog, extend, remove, updates
from semid.catalog.versions import compact, current, history, revert, vectors, verify
from semid.cli import main
from semid.config import to_dict
from semid.data import Standardizer
from semid.errors import SemidError
from semid.tokenizers import ProductConfig, RQKmeansConfig, SemanticTokenizer, TokenizerConfig

SIZES, DIM, NUMBERS = (3, 4), 2, 2
TIE_BREAK = (Collisions.TIE_BREAK, Collisions.POPULARITY)
UNIQUE = (*TIE_BREAK, Collisions.MIN_COST)


def append(folder: Path, inputs: list | Path) -> updates.Appended:
    return updates.append(folder, inputs, tokenizer=SemanticTokenizer.from_pretrained(folder))


def _books() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [
        rng.normal(scale=scale, size=(size, DIM)).astype(np.float32) for scale, size in zip((4, 1), SIZES, strict=True)
    ]


def _points(n: int, seed: int) -> np.ndarray:
    """Crowded round two of the first codes."""
    rng = np.random.default_rng(seed)
    return (_books()[0][rng.integers(2, size=n)] + rng.normal(size=(n, DIM))).astype(np.float32)


def _names(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{row}" for row in range(n)]


def _by_brute_force(codes: list, x: np.ndarray, policy: Collisions) -> tuple | None:
    """The first free codes of a newcomer among all that there are: own first, then by distance, then by number."""
    first, second = (book.astype(np.float64) for book in _books())
    own = int(((x - first) ** 2).sum(1).argmin())
    costs = ((x - first[own] - second) ** 2).sum(1)
    last = np.argsort(costs, kind="stable").tolist()
    if policy is Collisions.ALLOWED:
        return (own, last[0])
    numbers = [(number,) for number in range(NUMBERS)] if policy in TIE_BREAK else [()]
    free = [(own, code, *number) for code, number in itertools.product(last, numbers)]
    free = [one for one in free if one not in codes]
    return free[0] if free else (own, last[0]) if policy is Collisions.SINKHORN else None


def _start(policy: Collisions) -> tuple[SemanticCatalog, np.ndarray]:
    """Six items that this policy has placed one by one."""
    points, codes = _points(6, seed=0), []
    for x in points:
        codes.append(_by_brute_force(codes, x, policy))
    sizes = (*SIZES, NUMBERS) if policy in TIE_BREAK else SIZES
    return SemanticCatalog(pa.array(_names("i", 6)), np.array(codes, np.int32), sizes, policy in TIE_BREAK), points


def _tokenizer(policy: Collisions, columns=None) -> SemanticTokenizer:
    model = ResidualKMeans(tuple(map(jnp.asarray, _books())))
    config = TokenizerConfig(RQKmeansConfig(SIZES), columns=columns, collisions=policy)
    return SemanticTokenizer(config, Standardizer(np.zeros(DIM, np.float32), np.ones(DIM, np.float32)), model)


def _make(path: Path, policy: Collisions = Collisions.TIE_BREAK, columns=None) -> Path:
    tokenizer = _tokenizer(policy, columns)
    with artifacts.write_artifact(path, kind="catalog", config={"tokenizer": to_dict(tokenizer.config)}) as folder:
        _start(policy)[0].write(folder / CATALOG_FILE)
        tokenizer.write(folder)
    return path


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values)), values.shape[1])


def _file(path: Path, ids: list[str], points: np.ndarray, **more: np.ndarray) -> Path:
    pq.write_table(pa.table({"item_id": ids, "v": _lists(points), **{k: _lists(v) for k, v in more.items()}}), path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return _make(tmp_path / "catalog")


@pytest.mark.parametrize("policy", Collisions)
def test_each_policy_takes_the_best_free_codes_and_moves_nobody(tmp_path, policy):
    """Appended in three batches with removals between, until no codes are left: every row equals the brute force."""
    folder, points = _make(tmp_path / "catalog", policy), _points(40, seed=2)
    before = SemanticCatalog.load(folder)
    codes = [tuple(row) for row in before.codes.tolist()]
    sizes, full, at = [5, 3, 2, 30], False, 0
    for batch, size in enumerate(sizes):
        names, own = _names(f"b{batch}-", size), points[at : at + size]
        at += size
        expected = list(codes)
        for x in own:
            expected.append(_by_brute_force(expected, x, policy))
        file = _file(tmp_path / f"{batch}.parquet", names, own)
        if None in expected:
            item = expected.index(None) - len(codes)
            message = rf"{batch}\.parquet: column 'item_id', row {item + 1}: item 'b{batch}-{item}': no codes are left"
            with pytest.raises(SemidError, match=message):
                append(folder, [file])
            full = True
            break
        moved = sum(
            tuple(e[:2]) != _by_brute_force([], x, policy)[:2] for e, x in zip(expected[len(codes) :], own, strict=True)
        )
        made = append(folder, [file])
        assert (made.new, made.restored, made.moved, made.version.number) == (size, 0, moved, 2 * batch + 1)
        codes = expected
        assert list(map(tuple, SemanticCatalog.load(folder).codes.tolist())) == codes
        remove(folder, [names[0], f"i{batch}"])  # their codes stay taken
    assert full == (policy in UNIQUE)  # control: the crowd was large enough
    found = verify(folder).catalog
    np.testing.assert_array_equal(found.codes[: len(before)], before.codes)
    assert (len(set(codes)) == len(codes)) == (policy in UNIQUE)


def test_product_codes_have_no_last_residual_to_move(tmp_path):
    model = ProductKMeans(jnp.asarray([[[0.0], [9.0]], [[0.0], [9.0]]]), jnp.eye(2))
    config = TokenizerConfig(ProductConfig((2, 2)), collisions=Collisions.TIE_BREAK)
    tokenizer = SemanticTokenizer(config, Standardizer(np.zeros(2, np.float32), np.ones(2, np.float32)), model)
    with artifacts.write_artifact(tmp_path / "c", kind="catalog", config={"tokenizer": to_dict(config)}) as folder:
        SemanticCatalog(pa.array(["a", "b"]), np.array([[0, 0, 0], [1, 1, 0]], np.int32), (2, 2, 2), True).write(
            folder / CATALOG_FILE
        )
        tokenizer.write(folder)
    x = np.zeros((2, 2), np.float32)
    append(tmp_path / "c", [_file(tmp_path / "1.parquet", ["c"], x[:1])])
    assert SemanticCatalog.load(tmp_path / "c").lookup(["c"]).tolist() == [[0, 0, 1]]
    with pytest.raises(SemidError, match=r"item 'd': no codes are left next to .*fit a new tokenizer"):
        append(tmp_path / "c", [_file(tmp_path / "2.parquet", ["d"], x[:1])])


def test_codes_depend_on_the_order_of_rows_and_not_on_files(tmp_path):
    points, names = _points(9, seed=3), _names("n", 9)
    one, two = (_make(tmp_path / name) for name in ("one", "two"))
    append(one, [_file(tmp_path / "all.parquet", names, points)])
    append(two, [_file(tmp_path / f"{at}.parquet", names[at : at + 3], points[at : at + 3]) for at in (0, 3, 6)])
    assert SemanticCatalog.load(one).digest == SemanticCatalog.load(two).digest


def test_who_was_removed_comes_back_with_the_old_codes(folder, tmp_path):
    points = _points(3, seed=4)
    append(folder, [_file(tmp_path / "1.parquet", _names("n", 3), points)])
    before = SemanticCatalog.load(folder)
    remove(folder, ["n1", "i2"])
    elsewhere = _books()[0][[2, 2, 2]]  # other vectors, whose codes would be others
    made = append(folder, [_file(tmp_path / "2.parquet", ["i2", "m", "n1"], elsewhere)])
    assert (made.new, made.restored) == (1, 2)
    after = verify(folder).catalog
    assert after.removed is None
    np.testing.assert_array_equal(after.codes[:9], before.codes)
    assert after.item_ids[9].as_py() == "m"
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["n0", "n1"])), [points[0], elsewhere[2]])


@pytest.mark.parametrize("recorded", [True, False])
def test_the_columns_of_an_artifact_are_read_and_none_are_guessed(tmp_path, recorded):
    tokenizer = replace(_tokenizer(Collisions.ALLOWED), columns=("v", "w") if recorded else ())
    config = {"tokenizer": to_dict(tokenizer.config)}
    with artifacts.write_artifact(tmp_path / "c", kind="catalog", config=config) as folder:
        _start(Collisions.ALLOWED)[0].write(folder / CATALOG_FILE)
        tokenizer.write(folder)
    points = _points(3, seed=5)
    columns = {"w": _lists(points[:, 1:]), "v": _lists(points[:, :1])}  # in another order
    pq.write_table(pa.table({"item_id": ["x", "y", "z"], **columns}), tmp_path / "1.parquet")
    if recorded:
        append(tmp_path / "c", [tmp_path / "1.parquet"])
        np.testing.assert_array_equal(SemanticCatalog.load(tmp_path / "c").codes[6:], tokenizer.encode(points))
    else:
        with pytest.raises(SemidError, match=r"1.parquet: has vector columns w, v, and .* name them as columns"):
            append(tmp_path / "c", [tmp_path / "1.parquet"])


def test_vectors_that_only_models_read_are_kept(tmp_path):
    folder = _make(tmp_path / "catalog", columns=("v",))
    points, other = _points(2, seed=5), np.arange(6, dtype=np.float16).reshape(2, 3)
    append(folder, [_file(tmp_path / "1.parquet", ["x", "y"], points, w=other)])
    np.testing.assert_array_equal(vectors(folder, ["w", "v"], pa.array(["y"])), [[*other[1], *points[1]]])
    assert pq.read_table(folder / "changes/000001.parquet").column_names == ["item_id", "codes", "v", "w"]


def test_vectors_of_lists_without_a_width_are_kept(tmp_path):
    """As pandas writes them; the first row says how wide the others must be."""
    folder, file = _make(tmp_path / "catalog", columns=("v",)), tmp_path / "1.parquet"
    points, more = _points(2, seed=5), {"w": [[1.0, 2, 3], [4.0, 5, 6]]}
    for bad, message in (([[1.0, 2], [3.0]], "row 2: expected a vector of 2 dimensions, got 1"),
                         ([None, [3.0]], "row 1: expected a vector, got nothing; leave the item or")):  # fmt: skip
        pq.write_table(pa.table({"item_id": ["x", "y"], "v": points.tolist(), "w": bad}), file)
        with pytest.raises(SemidError, match=rf"1\.parquet: column 'w', {message}"):
            append(folder, [file])
    pq.write_table(pa.table({"item_id": ["x", "y"], "v": points.tolist(), **more}), file)
    append(folder, [file])
    np.testing.assert_array_equal(vectors(folder, ["w", "v"], pa.array(["y"])), [[4, 5, 6, *points[1]]])


def _bad(values: np.ndarray, row: int, value: float) -> np.ndarray:
    values = values.copy()
    values[row, 1] = value
    return values


@pytest.mark.parametrize(
    ("ids", "points", "message"),
    [
        (["x", "i3"], _points(2, 0), r"f\.parquet: column 'item_id', row 2: item 'i3' is in the catalogue already"),
        (["x", "y", "x"], _points(3, 0), r"row 3: item 'x' is given twice, before as .*f\.parquet: .*row 1: item 'x'"),
        (["x"], np.ones((1, 3), np.float32), r"f\.parquet: expected vector columns of 2 dimensions in all, got v: 3"),
        (["x", "y"], _bad(_points(2, 0), 1, np.nan), r"f\.parquet: column 'v', row 2: expected a finite vector"),
        (["x", "y"], _bad(_points(2, 0), 0, np.inf), r"f\.parquet: column 'v', row 1: expected a finite vector"),
        (["x", None], _points(2, 0), r"f\.parquet: row 2, column 'item_id': is null"),
        ([], _points(0, 0), r"f\.parquet: no item to append"),
    ],
)
def test_bad_items_are_named_and_nothing_is_written(folder, tmp_path, ids, points, message):
    with pytest.raises(SemidError, match=message):
        append(folder, [_file(tmp_path / "f.parquet", ids, points)])
    assert not (folder / "changes").exists()
    append(folder, _file(tmp_path / "f.parquet", ["x", "y"], _points(2, 0)))  # control: one file alone


@pytest.mark.parametrize("name", ["codes", "active"])
def test_vectors_of_a_name_that_catalogues_use_are_refused(folder, tmp_path, name):
    file = _file(tmp_path / "f.parquet", ["x"], _points(1, 0), **{name: np.ones((1, 2), np.float32)})
    with pytest.raises(SemidError, match=rf"f\.parquet: column '{name}' has the name of a catalogue's own; rename"):
        updates.append(folder, [file], tokenizer=_tokenizer(Collisions.TIE_BREAK), columns="v")
    assert not (folder / "changes").exists()


def test_faults_of_a_second_file_are_found_there(folder, tmp_path, monkeypatch):
    good = _file(tmp_path / "good.parquet", ["x", "y"], _points(2, 0))
    with pytest.raises(
        SemidError, match=r"bad\.parquet: column 'item_id', row 1: item 'y' is given twice, .*good\.parq"
    ):
        append(folder, [good, _file(tmp_path / "bad.parquet", ["y"], _points(1, 0))])
    with pytest.raises(SemidError, match=r"none\.parquet: no such file"):
        append(folder, [good, tmp_path / "none.parquet"])
    with pytest.raises(SemidError, match="no file: no item to append"):
        append(folder, [])
    with monkeypatch.context() as patch:
        patch.setattr(updates.storage, "sha256", create_autospec(updates.storage.sha256, side_effect=OSError()))
        with pytest.raises(SemidError, match=r"good\.parquet: not readable \(OSError\); check the file"):
            append(folder, [good])
    tabled = _make(tmp_path / "tabled", columns=("v",))
    wide = _file(tmp_path / "wide.parquet", ["z"], _points(1, 0), w=np.ones((1, 1), np.float32))
    with pytest.raises(
        SemidError, match=r"wide\.parquet: has vectors \{'v': 2, 'w': 1\}, but .*good\.parquet has \{'v': 2\}"
    ):
        append(tabled, [good, wide])


def test_a_catalogue_without_tokenizer_takes_nothing(tmp_path):
    with artifacts.write_artifact(tmp_path / "c", kind="catalog", config={"imported": "x"}) as folder:
        _start(Collisions.ALLOWED)[0].write(folder / CATALOG_FILE)
    with pytest.raises(SemidError, match="its codes were imported, there is no tokenizer"):
        append(tmp_path / "c", [_file(tmp_path / "f.parquet", ["x"], _points(1, 0))])
    assert remove(tmp_path / "c", ["i0"]).number == 1  # which needs none


def test_codes_of_another_tokenizer_are_refused(folder, tmp_path):
    own, file = SemanticTokenizer.from_pretrained(folder), _file(tmp_path / "f.parquet", ["x"], _points(1, 0))
    other = replace(own, standardizer=Standardizer(np.ones(DIM, np.float32), np.ones(DIM, np.float32)))
    with pytest.raises(SemidError, match="catalog: its codes are not of this tokenizer; append with its own"):
        updates.append(folder, [file], tokenizer=other)
    assert updates.append(folder, [file], tokenizer=own).new == 1  # control


def test_what_cannot_be_removed_is_named(folder):
    remove(folder, ["i1"])
    for ids, message in [
        (["i0", "i1"], r"item id 'i1' \(entry 1\) was removed before"),
        (["i0", "i2", "i0"], r"item id 'i0' \(entry 2\) is given twice"),
        (["q"], r"item id 'q' \(entry 0\) is not among"),
        ([], "expected at least one item to remove, got none"),
        ([f"i{row}" for row in (0, 2, 3, 4, 5)], "needs at least one item; all 6 are removed"),
    ]:
        with pytest.raises(SemidError, match=message):
            remove(folder, ids)
    assert current(folder).number == 1


def test_the_command_appends_what_a_pattern_finds(folder, tmp_path, capsys):
    for at in (0, 1):
        _file(tmp_path / f"new-{at}.parquet", [f"n{at}"], _points(1, seed=at))
    inputs = (f"{tmp_path}/new-*.parquet", f"{tmp_path}/new-1.parquet")  # the second is found by the first
    main(["catalog", "append", "--catalog", str(folder), "--input", *inputs])
    assert "version 1: 2 items appended" in " ".join(capsys.readouterr().out.split())
    assert SemanticCatalog.load(folder).item_ids[6:].to_pylist() == ["n0", "n1"]
    main(["catalog", "append", "--catalog", str(folder), "--input", f"{tmp_path}/new-*.parquet"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("appended before, as version 1; left out") == 2
    assert "version 1: 0 items appended" in printed
    _file(tmp_path / "new-2.parquet", ["n0"], _points(1, seed=2))
    with pytest.raises(SystemExit):
        main(["catalog", "append", "--catalog", str(folder), "--input", f"{tmp_path}/new-*.parquet"])
    printed = capsys.readouterr().err
    assert "item 'n0' is in the catalogue already" in printed
    assert printed.count("\n") == 1


# What is there already.


def _append(folder: Path, *files: Path, known: Known | str) -> updates.Appended:
    return updates.append(folder, list(files), tokenizer=SemanticTokenizer.from_pretrained(folder), known=known)


def test_known_items_are_refused_skipped_or_given_new_content(folder, tmp_path):
    points = _points(8, seed=4)
    before = SemanticCatalog.load(folder)
    append(folder, [_file(tmp_path / "1.parquet", ["n0", "n1"], points[:2])])
    codes = SemanticCatalog.load(folder).lookup(["n0", "i3"])
    more = [
        _file(tmp_path / "2.parquet", ["n0", "n2"], points[2:4]),
        _file(tmp_path / "3.parquet", ["n2"], points[4:5]),
    ]
    with pytest.raises(SemidError, match=r"2\.parquet: column 'item_id', row 1: item 'n0' is in the catalogue already"):
        _append(folder, *more, known=Known.ERROR)
    made = _append(folder, *more, known=Known.SKIP)
    assert (made.version.number, made.new, made.skipped, made.updated) == (2, 1, 2, 0)
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["n0", "n2"])), points[[0, 3]])
    nothing = _append(folder, _file(tmp_path / "4.parquet", ["i1", "n2"], points[:2]), known=Known.SKIP)
    assert (nothing.version.number, nothing.skipped) == (2, 2)  # no version without a change
    update = _file(tmp_path / "5.parquet", ["n0", "i3", "n3"], points[5:])
    made = _append(folder, update, known=Known.UPDATE)
    assert (made.new, made.updated, made.restored) == (1, 2, 0)
    np.testing.assert_array_equal(SemanticCatalog.load(folder).lookup(["n0", "i3"]), codes)
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["n0", "n3"])), points[[5, 7]])
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["n0"]), version=2), points[:1])
    assert verify(folder).catalog.num_active == len(before) + 4
    with pytest.raises(SemidError, match=r"item 'n9' is given twice, before as .*row 1: item 'n9'"):
        _append(folder, _file(tmp_path / "6.parquet", ["n9", "n9"], points[:2]), known=Known.UPDATE)


def test_known_items_are_treated_by_the_value_of_the_policy_too(folder, tmp_path):
    file = _file(tmp_path / "f.parquet", ["i0", "n"], _points(2, seed=5))
    with pytest.raises(SemidError, match="item 'i0' is in the catalogue already"):
        _append(folder, file, known="error")
    with pytest.raises(SemidError, match="known: expected one of error, skip, update, got 'ignore'"):
        _append(folder, file, known="ignore")
    made = _append(folder, file, known="skip")
    assert (made.new, made.skipped, made.updated) == (1, 1, 0)


@pytest.mark.parametrize("known", Known)
def test_a_file_that_was_appended_before_is_left_out_whatever_its_name(folder, tmp_path, known):
    points = _points(4, seed=5)
    file = _file(tmp_path / "1.parquet", ["n0", "n1"], points[:2])
    append(folder, [file])
    remove(folder, ["n1"])
    again, new = tmp_path / "again.parquet", _file(tmp_path / "2.parquet", ["n2", "n1"], points[2:])
    again.write_bytes(file.read_bytes())
    made = _append(folder, again, known=known)
    assert (made.version.number, made.applied) == (2, {str(again): 1})
    assert SemanticCatalog.load(folder).num_active == 7  # what was removed since stays so
    made = _append(folder, again, new, known=known)
    assert (made.new, made.restored, made.skipped, made.applied) == (1, 1, 0, {str(again): 1})  # n1, by the new file
    compact(folder)
    assert _append(folder, file, new, known=known).applied == {str(file): 1, str(new): 3}
    revert(folder, 0)
    made = _append(folder, again, known=known)  # nothing of it is there: it is not what it was
    assert (made.restored, made.applied) == (2, {})


def test_of_files_that_were_appended_before_only_the_ids_are_read(tmp_path, monkeypatch):
    folder, points, lines = _make(tmp_path / "catalog", columns=("v",)), _points(3, seed=5), tmp_path / "2.jsonl"
    old = _file(tmp_path / "1.parquet", ["n0"], points[:1])
    lines.write_text(json.dumps({"item_id": "n1", "v": points[1].tolist()}) + "\n")
    append(folder, [old, lines])
    wide = _file(tmp_path / "3.parquet", ["n2"], points[2:], w=np.ones((1, 3), np.float32))  # which the others lack
    opened = create_autospec(updates.VectorFile.open, side_effect=updates.VectorFile.open)
    monkeypatch.setattr(updates.VectorFile, "open", opened)
    made = _append(folder, old, lines, wide, known=Known.SKIP)
    assert (made.new, made.applied) == (1, {str(old): 1, str(lines): 1})
    assert [call.args[0] for call in opened.call_args_list] == [str(wide)]


@pytest.mark.parametrize(
    ("write", "because"),
    [
        (lambda f: remove(f, ["i0"]), "a new version follows the current one"),
        (lambda f: append(f, []), "a new version follows the current one"),
        (compact, "a snapshot is of the current version"),
        (history, "the history is of all versions"),
        (verify, "all versions are verified"),
    ],
)
def test_a_version_is_read_and_not_written_to(folder, tmp_path, write, because):
    append(folder, [_file(tmp_path / "1.parquet", ["n0"], _points(1, seed=4))])
    at = f"{folder}@0"
    assert len(SemanticCatalog.load(at)) == len(current(at).catalog) == 6
    assert SemanticTokenizer.from_pretrained(at).dim == DIM
    with pytest.raises(SemidError, match=rf"catalog@0: {because}; leave out @0"):
        write(at)
    with pytest.raises(SemidError, match="names version 0, and version 1 is asked for"):
        SemanticCatalog.load(at, 1)
    with pytest.raises(SemidError, match="catalog@x: expected FOLDER or FOLDER@VERSION"):
        SemanticCatalog.load(f"{folder}@x")
    folder.rename(at)  # a folder's own name counts
    assert len(SemanticCatalog.load(at)) == 7


def test_a_catalogue_is_extended_in_memory_by_codes_of_a_tokenizer():
    """The third number of a group is its last; removed items stay removed, and keep their numbers."""
    codes = np.array([[0, 0, 0], [0, 0, 2], [1, 0, 0]], np.int32)
    removed = np.array([False, True, False])
    catalog = SemanticCatalog(pa.array(["a", "b", "c"]), codes, (2, 2, 3), tie_break=True, removed=removed)
    later = extend(catalog, ["d", 7], np.array([[0, 0], [1, 0]]))
    assert later.item_ids.to_pylist() == ["a", "b", "c", "d", "7"]
    assert later.codes.tolist() == [*codes.tolist(), [0, 0, 1], [1, 0, 1]]
    assert later.active.tolist() == [True, False, True, True, True]
    plain = SemanticCatalog(pa.array(["a"]), codes[:1, :2], (2, 2))
    assert extend(plain, ["b"], np.array([[0, 0]])).codes.tolist() == [[0, 0], [0, 0]]
    for ids, given, said in (
        (["d", "c"], [[0, 0], [1, 1]], r"item id 'c' \(entry 1\) is in the catalogue already"),
        (["d", "d"], [[0, 0], [1, 1]], "item id 'd' appears more than once"),
        (["d", "e"], [[0, 0], [0, 0]], r"item id 'e' \(entry 1\): 3 items have its codes, and no number is left"),
        (["d"], [[0, 0, 1]], r"expected codes of shape \(1, 2\) \(items, levels\) as integers, got int64 \(1, 3\)"),
        (["d"], [[0.5, 0]], r"as integers, got float64 \(1, 2\)"),
    ):
        with pytest.raises(SemidError, match=said):
            extend(catalog, ids, np.array(given))
