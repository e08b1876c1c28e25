"""Versions of a catalogue against a plain replay, files that do not fit, and a process killed at every step."""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid import artifacts
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.catalog.changes import ChangeKind
from semid.catalog.updates import remove
from semid.catalog.versions import (
    Difference,
    Version,
    apply,
    commit,
    compact,
    current,
    diff,
    history,
    open_for_change,
    revert,
    vectors,
    verify,
)
from semid.cli import main
from semid.config import to_dict
from semid.errors import SemidError
from semid.recommender import ModelSpec
from seq_models import DenseConfig, RQTransformerConfig

SIZES = (4, 3, 2)
ALL = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
ROOT = Path(__file__).parents[3]


def _catalog(names="abcdef", *, first=0, tie_break=True) -> SemanticCatalog:
    return SemanticCatalog(pa.array(list(names)), ALL[first : first + len(names)], SIZES, tie_break)


def _artifact(path, catalog: SemanticCatalog | None = None, tokenizer: bytes = b"any") -> Path:
    with artifacts.write_artifact(path, kind="catalog", config={}) as folder:
        (catalog or _catalog()).write(folder / CATALOG_FILE)
        (folder / "tokenizer.safetensors").write_bytes(tokenizer)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return _artifact(tmp_path / "catalog")


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values)), values.shape[1])


def _table(names, codes, **columns) -> pa.Table:
    return pa.table({"item_id": list(names), "codes": _lists(np.asarray(codes, np.int32)), **columns})


def _append(folder, names, codes=None, **columns) -> Version:
    before = current(folder)
    codes = ALL[len(before.catalog) :][: len(names)] if codes is None else codes
    return commit(folder, before, ChangeKind.APPEND, _table(names, codes, **columns))


def _remove(folder, names) -> Version:
    return commit(folder, current(folder), ChangeKind.REMOVE, pa.table({"item_id": list(names)}))


def _five_changes(folder) -> Path:
    """Five versions: two appends, a removal of old and new, a return, another removal."""
    _append(folder, "gh")
    _append(folder, "ij")
    _remove(folder, "bh")
    _append(folder, "bk", [ALL[1], ALL[10]])
    _remove(folder, "k")
    return folder


def _same(one: SemanticCatalog, other: SemanticCatalog) -> bool:
    return one.digest == other.digest and (one.tie_break, one.num_active) == (other.tie_break, other.num_active)


def test_every_version_is_what_its_changes_say(folder):
    base = SemanticCatalog.load(folder)
    _five_changes(folder)
    active = ["abcdef", "abcdefgh", "abcdefghij", "acdefgij", "abcdefgijk", "abcdefgij"]
    for version, names in enumerate(active):
        found = SemanticCatalog.load(folder, version)
        assert sorted(found.item_ids.filter(pa.array(found.active)).to_pylist()) == sorted(names)
        np.testing.assert_array_equal(found.codes, ALL[: len(found)])  # nobody's codes moved, whoever came and went
        assert found.item_ids.to_pylist() == list("abcdefghijk")[: len(found)]
        assert (found.level_sizes, found.tie_break) == (SIZES, True)
    assert _same(SemanticCatalog.load(folder), SemanticCatalog.load(folder, 5))
    assert not _same(SemanticCatalog.load(folder), SemanticCatalog.load(folder, 4))
    assert _same(SemanticCatalog.load(folder, 0), base)
    assert verify(folder).number == 5
    artifacts.read_artifact(folder, "catalog")  # sealed as it was


def test_a_removed_item_is_found_by_its_id_alone(folder, tmp_path):
    _remove(folder, "b")
    found = SemanticCatalog.load(folder)
    assert found.find(ALL[1]).tolist() == []
    assert SemanticCatalog.load(folder, 0).find(ALL[1]).tolist() == [1]  # control
    assert found.lookup(["b"]).tolist() == [ALL[1].tolist()]
    found.write(tmp_path / "x.parquet")
    again = SemanticCatalog.read(tmp_path / "x.parquet")
    assert _same(again, found)
    np.testing.assert_array_equal(again.removed, found.removed)


def test_removed_items_count_in_the_digest_only_where_there_are_any():
    plain = _catalog()
    none = SemanticCatalog(plain.item_ids, plain.codes, SIZES, True, np.zeros(6, bool))
    some = SemanticCatalog(plain.item_ids, plain.codes, SIZES, True, np.arange(6) == 2)
    assert (none.removed, none.digest) == (None, plain.digest)
    assert some.digest != plain.digest
    with pytest.raises(SemidError, match="all 6 are removed"):
        SemanticCatalog(plain.item_ids, plain.codes, SIZES, True, np.ones(6, bool))
    with pytest.raises(SemidError, match="expected removed as booleans, one for each of 6 items, got bool "):
        SemanticCatalog(plain.item_ids, plain.codes, SIZES, True, np.ones(5, bool))


def test_the_history_is_a_chain(folder):
    _five_changes(folder)
    entries = history(folder)
    kinds = ["tokenize", "append", "append", "remove", "append", "remove"]
    assert [entry.kind for entry in entries] == kinds
    assert [entry.items for entry in entries] == [6, 2, 2, 2, 2, 1]
    assert (
        [entry.active for entry in entries]
        == [6, 8, 10, 8, 10, 9]
        == [SemanticCatalog.load(folder, v).num_active for v in range(6)]
    )
    digests = [entry.digest for entry in entries]
    assert len(set(digests)) == 6
    assert digests[0] == artifacts.read_artifact(folder, "catalog").digest
    headers = [_header(folder / f"changes/00000{v}.parquet") for v in range(1, 6)]
    assert [header["parent"] for header in headers] == digests[:-1]
    assert [header["digest"] for header in headers] == digests[1:]


def _header(file: Path) -> dict:
    return json.loads(pq.read_schema(file).metadata[b"semid.change"])


def test_a_change_reads_with_parquet_alone(folder):
    _append(folder, "gh", v=_lists(np.arange(4, dtype=np.float32).reshape(2, 2)))
    file = pq.ParquetFile(folder / "changes/000001.parquet", page_checksum_verification=True)
    table = file.read()
    assert table.to_pydict() == {"item_id": ["g", "h"], "codes": ALL[6:8].tolist(), "v": [[0, 1], [2, 3]]}
    assert table.schema.field("codes").type == pa.list_(pa.int32(), 3)
    header = _header(folder / "changes/000001.parquet")
    assert (header["version"], header["kind"], header["level_sizes"]) == (1, "append", [4, 3, 2])
    assert header["created"].endswith("+00:00")


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        (ChangeKind.APPEND, _table("a", ALL[9:10]), r"item 'a' \(row 1\) is in the catalogue already: no append"),
        (ChangeKind.APPEND, _table("gg", ALL[9:11]), r"item 'g' \(row 2\) is in the catalogue already"),
        (ChangeKind.APPEND, _table("g", [[0, 3, 0]]), r"item g \(row 1\): code 3 at level 1 is outside 0\.\.2"),
        (ChangeKind.APPEND, _table("g", [[0, 0]]), "expected 3 codes an item, got 2"),
        (ChangeKind.APPEND, _table("b", ALL[9:10]), r"item 'b' \(row 1\) comes back with other codes"),
        (ChangeKind.REMOVE, pa.table({"item_id": ["x"]}), r"item 'x' \(row 1\) is not in the catalogue: no remove"),
        (ChangeKind.REMOVE, pa.table({"item_id": ["b"]}), r"item 'b' \(row 1\) is not in the catalogue"),
        (ChangeKind.REMOVE, pa.table({"item_id": ["c", "c"]}), r"item 'c' \(row 2\) is not in the catalogue"),
        (ChangeKind.REMOVE, pa.table({"item_id": list("acdef")}), "all 6 are removed"),
    ],
)
def test_a_change_that_does_not_fit_is_not_written(folder, kind, table, message):
    before = _remove(folder, "b")
    with pytest.raises(SemidError, match=message):
        commit(folder, before, kind, table)
    assert os.listdir(folder / "changes") == ["000001.parquet"]
    commit(folder, before, ChangeKind.APPEND, _table("bg", ALL[[1, 9]]))  # control


def test_of_two_at_once_one_is_told_to_run_again(folder):
    before = current(folder)
    commit(folder, before, ChangeKind.REMOVE, pa.table({"item_id": ["a"]}))
    with pytest.raises(SemidError, match=r"000001\.parquet: another process made this version in the meantime; run"):
        commit(folder, before, ChangeKind.REMOVE, pa.table({"item_id": ["b"]}))
    assert SemanticCatalog.load(folder).active.tolist() == [False, *[True] * 5]
    assert os.listdir(folder / "changes") == ["000001.parquet"]


def test_a_replica_follows(folder, tmp_path):
    replica = Path(shutil.copytree(folder, tmp_path / "replica"))
    _five_changes(folder)
    files = sorted((folder / "changes").iterdir())
    for version, file in enumerate(files, 1):
        assert apply(replica, file).number == version
    assert verify(replica).digest == verify(folder).digest
    assert _same(SemanticCatalog.load(replica), SemanticCatalog.load(folder))


def test_a_change_that_is_not_the_next_one_is_refused(folder, tmp_path):
    replica = Path(shutil.copytree(folder, tmp_path / "replica"))
    parted = Path(shutil.copytree(folder, tmp_path / "parted"))
    tokenizer = _artifact(tmp_path / "tokenizer", tokenizer=b"another")
    other = _artifact(tmp_path / "other", _catalog("abcdeX"))
    _five_changes(folder)
    file = "changes/00000{}.parquet".format
    apply(replica, folder / file(1))
    expects = f"{replica} is at version 1 and expects version 2"
    with pytest.raises(SemidError, match=re.escape(f"version 1 was applied before; {expects}")):
        apply(replica, folder / file(1))
    with pytest.raises(SemidError, match=re.escape(f"makes version 3, out of order; {expects}: apply that first")):
        apply(replica, folder / file(3))
    _remove(parted, "a")
    with pytest.raises(SemidError, match="version 1 is another change than the one that stands here: the copies part"):
        apply(parted, folder / file(1))
    with pytest.raises(
        SemidError, match=r"000002\.parquet: follows a version 1 of digest \w{12}, but that of .*parted"
    ):
        apply(parted, folder / file(2))
    with pytest.raises(SemidError, match=r"follows a version 0 of digest .*: another catalogue, or the copies parted"):
        apply(other, folder / file(1))
    with pytest.raises(SemidError, match="made with another tokenizer"):
        apply(tokenizer, folder / file(1))
    with pytest.raises(SemidError, match=r"x\.parquet: is missing"):
        apply(replica, tmp_path / "x.parquet")
    with pytest.raises(SemidError, match=r"catalog\.parquet: not a change of a catalogue"):
        apply(replica, folder / CATALOG_FILE)
    assert [current(one).number for one in (replica, parted, other, tokenizer)] == [1, 1, 0, 0]
    apply(replica, folder / file(2))  # control


def _rewrite(file: Path, edit) -> None:
    """The file with its table and header as `edit` leaves them."""
    table = pq.read_table(file)
    header = json.loads(table.schema.metadata[b"semid.change"])
    table = edit(table, header) or table
    pq.write_table(table.replace_schema_metadata({b"semid.change": json.dumps(header)}), file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, h: t.set_column(1, "codes", _lists(ALL[[20, 21]])), "column 'codes' is not what was written"),
        (lambda t, h: t.set_column(0, "item_id", [["x", "h"]]), "column 'item_id' is not what was written"),
        (lambda t, h: t.drop_columns("codes"), "column 'codes' is not what was written"),
        (lambda t, h: h.update(created="2020-01-01T00:00:00+00:00"), "its header does not match its digest"),
        (lambda t, h: h.update(version=2), "its header does not match its digest"),
        (lambda t, h: h.update(more=2), "its header is not of schema version 2"),
        (lambda t, h: h.update(schema_version=3), "schema version 3 is newer than 2; upgrade semid"),
        (lambda t, h: h.clear(), "not a change of a catalogue"),
    ],
)
def test_an_edited_change_is_found(folder, edit, message):
    _append(folder, "gh")
    file = folder / "changes/000001.parquet"
    content = file.read_bytes()
    _rewrite(file, edit)
    for use in (SemanticCatalog.load, verify):
        with pytest.raises(SemidError, match=rf"000001\.parquet: {message}"):
            use(folder)
    file.write_bytes(content)
    verify(folder)


def test_damage_and_gaps_are_found(folder):
    _append(folder, "gh", v=_lists(np.arange(400, dtype=np.float32).reshape(2, 200)))
    _append(folder, "i")
    first, second = (folder / f"changes/00000{version}.parquet" for version in (1, 2))
    content = first.read_bytes()
    for at in (*range(0, len(content), 97), len(content) - 1):
        first.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            verify(folder)
        except SemidError as error:
            assert "000001.parquet" in str(error)  # noqa: PT017 (a byte that means nothing may pass)
        else:
            assert pq.read_table(first).to_pydict()["v"][1][199] == 399
    first.write_bytes(content[:100])
    with pytest.raises(SemidError, match=r"000001\.parquet: not a readable Parquet file"):
        SemanticCatalog.load(folder)
    first.unlink()
    with pytest.raises(SemidError, match=r"000001\.parquet: is missing; restore it from a copy"):
        SemanticCatalog.load(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(SemidError, match=r"000001\.parquet: makes version 2 of \w+, expected version 1 of \w+"):
        history(folder)
    first.write_bytes(content)
    assert verify(folder).number == 2
    assert SemanticCatalog.load(folder, 1).num_active == 8
    with pytest.raises(SemidError, match="has versions 0 to 2, and not 3"):
        SemanticCatalog.load(folder, 3)


def test_codes_of_two_items_are_found_where_a_level_tells_them_apart(folder, tmp_path):
    _append(folder, "gh", ALL[[8, 2]])
    with pytest.raises(SemidError, match="items c and h have the same codes"):
        verify(folder)
    other = _artifact(tmp_path / "other", _catalog(tie_break=False))
    _append(other, "gh", ALL[[8, 2]])
    verify(other)  # control


def test_vectors_are_those_last_given(folder):
    v, w = np.arange(12, dtype=np.float16).reshape(6, 2), np.arange(6, dtype=np.float32).reshape(6, 1)
    _append(folder, "gh", v=_lists(v[:2]), w=_lists(w[:2]))
    _remove(folder, "g")
    _append(folder, "ig", [ALL[8], ALL[6]], v=_lists(v[2:4]), w=_lists(w[2:4]))
    found = vectors(folder, ["w", "v"], pa.array(["i", "g", "h"]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate([w, v], axis=1)[[2, 3, 1]])
    with pytest.raises(SemidError, match=r"000001\.parquet: item h has no vectors 'x', which the model reads"):
        vectors(folder, ["v", "x"], pa.array(["h"]))
    with pytest.raises(SemidError, match="no change appended item i"):
        vectors(folder, ["v"], pa.array(["h", "i"]), version=2)
    # A change without a column is passed over where another has it; an item that is gone may lack all.
    _remove(folder, "gi")
    _append(folder, "gj", [ALL[6], ALL[9]], v=_lists(v[4:]))
    np.testing.assert_array_equal(vectors(folder, ["w"], pa.array(["g", "h"])), w[[3, 1]])
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["g", "j"])), v[4:])
    with pytest.raises(SemidError, match=r"000005\.parquet: item j has no vectors 'w', which .*; append it with that"):
        vectors(folder, ["w"], pa.array(["g", "j"]))
    gone = np.array([False, True])
    np.testing.assert_array_equal(vectors(folder, ["w"], pa.array(["g", "j"]), removed=gone), [w[3], [0]])
    np.testing.assert_array_equal(vectors(folder, ["w"], pa.array(["j", "i"]), removed=gone[::-1] | gone), [[0], w[2]])
    assert vectors(folder, ["w"], pa.array(["j"]), removed=gone[1:]).shape == (1, 0)
    _append(folder, "k", w=_lists(v[:1]))
    with pytest.raises(SemidError, match=r"000003\.parquet: has vectors of 1 dimensions, later changes of 2 \('w'\)"):
        vectors(folder, ["w"], pa.array(["g", "k"]))


def test_a_dataset_is_given_the_rows_that_it_has(folder):
    _five_changes(folder)
    for names in ("abcdef", "abcdefgh"):
        found = SemanticCatalog.load(folder).select(pa.array(list(names)))
        assert _same(found, _catalog(names))
    mixed = SemanticCatalog.load(folder).select(pa.array(list("gca")))  # in another order, and without all others
    assert (mixed.item_ids.to_pylist(), mixed.codes.tolist()) == (list("gca"), ALL[[6, 2, 0]].tolist())
    with pytest.raises(SemidError, match="item id 'X' \\(entry 2\\) is not among the catalogue's"):
        SemanticCatalog.load(folder).select(pa.array(list("abX")))


def test_differences_are_those_counted_by_hand():
    old = SemanticCatalog(pa.array(list("abcde")), ALL[:5], SIZES, False, np.array([0, 0, 0, 0, 1], bool))
    codes = ALL[[0, 2, 3, 1]]  # of a, d, c and x
    codes[1] = (1, *ALL[3][1:])
    new = SemanticCatalog(pa.array(list("adcx")), codes, SIZES, False)
    found = diff(old, new)
    assert (found.appended, found.removed, found.common) == (["x"], ["b"], 3)
    # a stays, d changes its first code alone, c was ALL[2] = 0,1,0 and is ALL[3] = 0,1,1: its last
    assert found.changed_by_level == pytest.approx((1 / 3, 0, 1 / 3))
    assert found.changed == pytest.approx(2 / 3)
    assert diff(old, old) == Difference([], [], 4, 0.0, (0.0, 0.0, 0.0))
    shorter = diff(old, SemanticCatalog(old.item_ids, ALL[:5, :2], SIZES[:2], False))
    assert (shorter.appended, shorter.changed, shorter.changed_by_level) == (["e"], 1.0, (0.0, 0.0, 1.0))
    assert diff(old, SemanticCatalog(pa.array(["z"]), ALL[:1, :2], SIZES[:2], False)).changed == 0.0  # of no item
    apart = diff(old, SemanticCatalog(pa.array(["z"]), ALL[:1], SIZES, False))
    assert (apart.common, apart.changed, apart.changed_by_level) == (0, 0.0, ())


# A disk that is full, and a process that is killed.


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [(os, "mkdir", 0), (os, "fsync", 0), (pq, "write_table", 0), (os, "fsync", 1), (os, "link", 0)],
)
def test_a_step_that_fails_leaves_the_old_version(folder, monkeypatch, module, name, after):
    """From the call `after` so many on, the disk is full."""
    original, calls = getattr(module, name), []

    def fails(*args, **options):
        calls.append(name)
        if len(calls) <= after:
            return original(*args, **options)
        if name == "write_table":
            Path(args[1]).write_bytes(b"PAR1 half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        message = r"000001\.parquet: .*No space left on device.*: version 1 is not written; nothing changed$"
        with pytest.raises(SemidError, match=message):
            _remove(folder, "a")
    assert SemanticCatalog.load(folder).num_active == 6
    assert not [*folder.glob("changes/*")]
    assert _remove(folder, "a").number == 1  # with space on the disk again


def test_a_version_that_is_whole_but_not_flushed_says_so(folder, monkeypatch):
    calls, fsync = [], os.fsync

    def fails(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # the new folder's parent, the file, and then the list of its names
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(SemidError, match="version 1 stands, but may not outlive a power failure"):
        _remove(folder, "a")
    assert verify(folder).catalog.num_active == 5


# Imports the base modules alone, as `semid` itself would import JAX; each child works on a copy of its own.
CHILDREN = """
import os, resource, signal, sys
import pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from semid.catalog.changes import ChangeKind
from semid.catalog.updates import remove
from semid.catalog.versions import commit, current
assert "jax" not in sys.modules
STEPS = [(os, "mkdir"), (pq, "write_table"), (os, "fsync"), (os, "link"), (os, "unlink"), (os, "replace")]

def killed_at(point):
    count = 0
    def killer(original, name):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == point:
                if name == "write_table":  # in the middle of it
                    original(*args, **options)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        return call
    for module, name in STEPS:
        setattr(module, name, killer(getattr(module, name), name))

def limited_to(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def change(folder):
    items = pa.table({"item_id": [f"x{row}" for row in range(200)], "codes": CODES})
    commit(folder, current(folder), ChangeKind.APPEND, items)

CODES = pa.FixedSizeListArray.from_arrays(pa.array([0, 1, 0] * 200, pa.int32()), 3)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    what, _, value = folder.name.partition("-")
    child = os.fork()
    if not child:
        {"kill": killed_at, "limit": limited_to}[what](int(value))
        try:
            change(folder)
            print(folder.name, "done", flush=True)
        except ValueError as error:
            print(folder.name, error, flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        print(folder.name, "signal", os.WTERMSIG(status), flush=True)
"""


def test_a_process_killed_at_every_step_or_out_of_disk_leaves_a_whole_version(tmp_path):
    home, limits = tmp_path / "copies", (0, 50, 200, 500, 900, 1200)
    folder = _artifact(tmp_path / "plain", _catalog(tie_break=False))
    names = [f"kill-{point}" for point in range(1, 12)] + [f"limit-{size}" for size in (*limits, 1_000_000)]
    for name in names:
        shutil.copytree(folder, home / name)
    done = subprocess.run([sys.executable, "-c", CHILDREN, str(home)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    # mkdir, fsync of its parent, write, fsync, link: killed before each; then before unlink and the folder's fsync, and
    # before the head is replaced and its temporary name unlinked
    steps = {name: told[name] for name in names[:11]}
    assert [what == "signal 9" for what in steps.values()] == [True] * 9 + [False] * 2
    for name in names[:11]:
        found = verify(home / name)
        stands = int(name.partition("-")[2]) > 5  # the link makes the version
        assert (found.number, len(found.catalog)) == ((1, 206) if stands else (0, 6))
        open_for_change(home / name)  # as the same command does, which finds nothing to do where the version stands
        files = [path.relative_to(home / name) for path in sorted((home / name).rglob("*")) if path.is_file()]
        assert [str(path) for path in files if "change" in str(path) or "head" in str(path)] == (
            ["changes/000001.parquet", "head.json"] if stands else []
        )
        _remove(home / name, "a")  # and life goes on
    assert [path.name for path in (home / "kill-4/changes").iterdir()] == ["000001.parquet"]  # what was left is gone
    for size in limits:
        assert re.search(r"000001\.parquet: .*File too large.* is not written; nothing changed$", told[f"limit-{size}"])
        assert [*(home / f"limit-{size}" / "changes").iterdir()] == []
        assert verify(home / f"limit-{size}").number == 0
    assert told["limit-1000000"] == "done"  # control


# The command line.


def _run(line: str, capsys, **paths) -> str:
    main([word.format(**paths) for word in line.split()])
    return " ".join(capsys.readouterr().out.split())


def test_the_command_line_tells_the_catalogues_life(folder, tmp_path, capsys):
    replica = Path(shutil.copytree(folder, tmp_path / "replica"))
    (tmp_path / "gone.txt").write_text("b\n\nc\n")
    assert "version 1: 3 items removed" in _run(
        "catalog remove --catalog {c} --items a --file {t}/gone.txt", capsys, c=folder, t=tmp_path
    )
    _append(folder, "gh")
    assert "version 2, 5 items" in _run("catalog history --catalog {c}", capsys, c=folder)
    assert "version 2: whole; 5 items, 3 removed" in _run("catalog verify --catalog {c}", capsys, c=folder)
    printed = _run("catalog apply --catalog {r} --change {c}/1.parquet {c}/2.parquet".replace("{c}/", "{c}/00000"),
                   capsys, r=replica, c=folder / "changes")  # fmt: skip
    assert "version 2: applied" in printed
    printed = _run("catalog diff {c}@0 {c}", capsys, c=folder)
    assert "appended 2 items: g, h" in printed
    assert "removed 3 items: a, b, c" in printed
    assert printed.endswith("0.0% of 3 items changed codes")


def test_models_that_no_longer_fit_are_named(folder, tmp_path, capsys):
    refit = _artifact(tmp_path / "refit", _catalog(first=8))
    _append(folder, "gh")
    backwards = SemanticCatalog.load(folder, 0).arranged(pa.array(list("fedcba")))
    first, last, codes = SemanticCatalog.load(folder, 0), SemanticCatalog.load(folder), RQTransformerConfig()
    models = (("before", backwards, codes), ("after", last, codes), ("dense", first, DenseConfig()))
    for name, catalog, kind in models:
        with artifacts.write_artifact(tmp_path / name, kind="model", config={}) as model:
            catalog.write(model / CATALOG_FILE)
            spec = ModelSpec(kind, SIZES, len(catalog), 0, max_history=4)
            artifacts.write_json(model / "config.json", to_dict(spec))
    printed = _run("catalog diff {c} {r} --model {t}/before {t}/after", capsys, c=folder, r=refit, t=tmp_path)
    assert "before: no longer fits: 6 of 6 items have other codes, item f <a_2><b_0><c_1> instead of" in printed
    assert "after: no longer fits: 2 of 8 items are not in it, such as item g" in printed
    assert printed.endswith("100.0% of 6 items changed codes; 2 of 2 models no longer fit")
    printed = _run("catalog diff {c}@0 {c} --model {t}/before {t}/after", capsys, c=folder, t=tmp_path)
    assert printed.endswith("0.0% of 6 items changed codes; 0 of 2 models no longer fit")
    printed = _run("catalog diff {c}@0 {c} --model {t}/dense", capsys, c=folder, t=tmp_path)
    assert "dense: no longer fits: it learned a vector of each of its 6 items and has none for the 2 app" in printed
    _remove(folder, "gh")
    assert "dense: fits" in _run("catalog diff {c}@0 {c} --model {t}/dense", capsys, c=folder, t=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("catalog diff {c}@x {c}", "expected FOLDER or FOLDER@VERSION"),
        ("catalog diff {c} {c}@7", "has versions 0 to 0, and not 7"),
        ("catalog remove --catalog {c}", "expected at least one item to remove, got none"),
        ("catalog remove --catalog {c} --items a a", "item id 'a' (entry 1) is given twice"),
        ("catalog remove --catalog {c} --items q", "item id 'q' (entry 0) is not among the catalogue's 6 items"),
        ("catalog history --catalog {c}/none", "no such artifact"),
        (
            "catalog append --catalog {c} --input {c}/catalog.parquet",
            "there is no tokenizer; encode with what made the codes",
        ),
    ],
)
def test_bad_commands_get_one_line(folder, capsys, line, message):
    with pytest.raises(SystemExit) as stopped:
        _run(line, capsys, c=folder)
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (folder / "changes").exists()


VERBS = {  # each with what only its work would find
    "remove": (lambda folder: remove(folder, ["nobody"]), "changes/000006"),
    "revert": (lambda folder: revert(folder, 99), "changes/000006"),
    "apply": (lambda folder: apply(folder, folder / "nothing.parquet"), "changes/000006"),
    "compact": (compact, "snapshots/000005"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_place_of_a_change_is_tried_before_the_work(folder, monkeypatch, verb):
    _five_changes(folder)
    call, file = VERBS[verb]

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.places, "_try", refuse)
        with pytest.raises(SemidError, match=f"{file}.parquet: cannot be written .Read-only file system"):
            call(folder)
        assert verify(folder).number == 5  # reading needs no place
        assert len(history(folder)) == 6
    assert remove(folder, ["a"]).number == 6  # control
    assert compact(folder).number == 6
