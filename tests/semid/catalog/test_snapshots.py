"""Snapshots and reverts against a plain replay, and every byte of a catalogue flipped: named or harmless."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid.arrow import to_lists
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.catalog.changes import ChangeKind, list_files, snapshot_file
from semid.catalog.versions import Version, apply, commit, compact, current, history, revert, vectors, verify
from semid.cli import main
from semid.errors import SemidError

SIZES = (4, 3, 2)
ALL = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
V = np.arange(24, dtype=np.float32).reshape(12, 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    with artifacts.write_artifact(tmp_path / "catalog", kind="catalog", config={}) as folder:
        SemanticCatalog(pa.array(list("abcdef")), ALL[:6], SIZES, True).write(folder / CATALOG_FILE)
        (folder / "tokenizer.safetensors").write_bytes(b"any")
    return tmp_path / "catalog"


def _change(folder: Path, kind: ChangeKind, names: str, *, sources=(), **columns: np.ndarray) -> Version:
    rows = [ord(name) - ord("a") for name in names]
    table = pa.table({"item_id": list(names)})
    if kind.has_codes:
        table = table.append_column("codes", to_lists(ALL[rows]))
    for name, values in columns.items():
        table = table.append_column(name, to_lists(values))
    return commit(folder, current(folder), kind, table, sources=sources)


def _changes(folder: Path) -> Path:
    """Appends, removals of old and new, a return, an update of content, columns of several widths and types."""
    _change(folder, ChangeKind.APPEND, "gh", sources=["s1"], v=V[:2], w=V[:2, :1].astype(np.float16))
    _change(folder, ChangeKind.REMOVE, "bh")
    _change(folder, ChangeKind.APPEND, "bi", sources=["s2", "s3"], v=V[2:4])
    _change(folder, ChangeKind.UPDATE, "gja", v=V[4:7], w=V[4:7])
    return folder


def _state(folder: Path | str) -> tuple:
    found = current(folder)
    marks = found.catalog.active.tolist()
    return found.number, found.digest, found.catalog.digest, found.sources, marks, found.catalog.item_ids.to_pylist()


def test_a_snapshot_is_what_the_changes_come_to_and_is_read_in_their_place(folder, monkeypatch):
    _changes(folder)
    before, log = _state(folder), history(folder)
    given = {name: vectors(folder, [name], pa.array(list(items))) for name, items in (("v", "ghijab"), ("w", "gja"))}
    assert compact(folder).number == 4
    assert (_state(folder), history(folder), _state(f"{folder}@2")[0]) == (before, log, 2)
    for name, items in (("v", "ghijab"), ("w", "gja")):
        np.testing.assert_array_equal(vectors(folder, [name], pa.array(list(items))), given[name])
    with pytest.raises(SemidError, match=r"snapshots/000004\.parquet: item i has no vectors 'w'"):
        vectors(folder, ["w"], pa.array(["i"]))
    assert verify(folder).digest == before[1]
    (folder / "changes/000002.parquet").unlink()
    assert _state(folder) == before  # neither it nor those before the last are read
    with pytest.raises(SemidError, match=r"000002\.parquet: is missing"):
        verify(folder)


def test_life_goes_on_after_a_snapshot_and_replicas_follow(folder, tmp_path):
    replica = Path(shutil.copytree(folder, tmp_path / "replica"))
    _changes(folder)
    compact(folder)
    _change(folder, ChangeKind.REMOVE, "gi")
    _change(folder, ChangeKind.APPEND, "k", v=V[7:8])
    for file in sorted((folder / "changes").iterdir()):
        apply(replica, file)
    assert _state(folder) == _state(replica)
    compact(replica)
    compact(folder)
    assert _state(folder) == _state(replica)
    assert [snapshot_file(folder, 4).exists(), snapshot_file(folder, 6).exists()] == [True, True]  # others may read it
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["k", "g"])), V[[7, 4]])
    assert verify(folder).number == verify(replica).number == 6
    with pytest.raises(SemidError, match="is a snapshot of version 6; apply the changes themselves"):
        apply(replica, folder / "snapshots/000006.parquet")
    _change(folder, ChangeKind.REMOVE, "k")
    compact(folder)
    assert list_files(folder).snapshots == [6, 7]


def test_an_item_with_vectors_of_another_width_since_harms_no_other_item(folder):
    _change(folder, ChangeKind.APPEND, "gh", v=V[:2])
    _change(folder, ChangeKind.UPDATE, "g", v=np.ones((1, 3)))
    with pytest.raises(SemidError, match=r"000001\.parquet: has vectors of 2 dimensions, later changes of 3 \('v'\)"):
        vectors(folder, ["v"], pa.array(["g", "h"]))
    compact(folder)
    _change(folder, ChangeKind.UPDATE, "g", v=V[2:3])
    np.testing.assert_array_equal(vectors(folder, ["v"], pa.array(["g", "h"])), V[[2, 1]])


def test_snapshots_of_lists_with_short_offsets_are_read(folder):
    """As they were written until there could be more numbers than 2^31."""
    _changes(folder)
    items = pa.array(list("ghijab"))
    before, given = compact(folder).digest, vectors(folder, ["v"], items)
    file = snapshot_file(folder, 4)
    table = pa.parquet.read_table(file)
    assert table.schema.field("v").type == pa.large_list(pa.float32())
    schema = pa.schema([(one.name, pa.list_(pa.float32()) if one.name in "vw" else one.type) for one in table.schema])
    pa.parquet.write_table(table.cast(schema).replace_schema_metadata(table.schema.metadata), file)
    assert verify(folder).digest == before
    np.testing.assert_array_equal(vectors(folder, ["v"], items), given)


def test_a_snapshot_of_another_catalogue_is_refused(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    _change(other, ChangeKind.APPEND, "i")
    _change(folder, ChangeKind.APPEND, "g")
    compact(other)
    shutil.copytree(other / "snapshots", folder / "snapshots")
    with pytest.raises(
        SemidError, match=r"snapshots/000001\.parquet: is not a snapshot of version 1 of this catalogue"
    ):
        current(folder)
    shutil.rmtree(folder / "snapshots")
    assert current(folder).number == 1  # control


@pytest.mark.parametrize("version", range(5))
def test_a_revert_has_the_items_of_that_version_and_no_code_changes(folder, version):
    _changes(folder)
    compact(folder)
    last, target = current(folder).catalog, current(folder, version).catalog
    made = revert(folder, version)
    assert made.number == (5 if version < 4 else 4)
    active = made.catalog.item_ids.filter(pa.array(made.catalog.active)).to_pylist()
    assert active == target.item_ids.filter(pa.array(target.active)).to_pylist()
    np.testing.assert_array_equal(made.catalog.codes, last.codes)
    assert verify(folder).catalog.digest == current(folder).catalog.digest == made.catalog.digest
    assert history(folder)[-1].active == target.num_active
    compact(folder)
    assert revert(folder, 4).catalog.digest == last.digest


def test_the_loss_of_the_last_change_is_found(folder):
    _changes(folder)
    (folder / "changes/000004.parquet").rename(folder / "gone")
    for use in (current, verify, SemanticCatalog.load, lambda f: _change(f, ChangeKind.REMOVE, "c")):
        with pytest.raises(SemidError, match=r"000004\.parquet: is missing; restore it from a copy"):
            use(folder)
    (folder / "gone").rename(folder / "changes/000004.parquet")
    (folder / "head.json").unlink()
    assert current(folder).number == 4  # control: without the head all is as it was


def test_flipped_bytes_are_named_or_harmless(folder):
    """Of every file: each byte of small ones, and a sample of large ones."""
    _changes(folder)
    compact(folder)
    _change(folder, ChangeKind.REMOVE, "c")
    expected, items = _state(folder), pa.array(list("ghijab"))
    given = vectors(folder, ["v"], items)
    rng, harmless, messages = np.random.default_rng(0), 0, list[str]()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for at in rng.choice(len(content), min(25, len(content)), replace=False).tolist():
            flipped = bytearray(content)
            flipped[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            try:
                assert _state(folder) == expected, (file, at)
                np.testing.assert_array_equal(vectors(folder, ["v"], items), given)
                harmless += 1
            except SemidError as error:
                messages.append(str(error))
        file.write_bytes(content)
    assert [one for one in messages if "\n" in one or not re.search(r"(parquet|json|safetensors): ", one)] == []
    assert len(messages) > harmless > 0
    assert _state(folder) == expected


def test_many_changes_load_at_once_when_compacted(folder):
    """A year of hourly changes takes under a second so: here a month's, in less than a twelfth and some slack."""
    before = current(folder)
    for at in range(60):
        kind = ChangeKind.REMOVE if at % 2 == 0 else ChangeKind.APPEND
        table = pa.table({"item_id": ["a"]})
        table = table if kind is ChangeKind.REMOVE else table.append_column("codes", to_lists(ALL[:1]))
        before = commit(folder, before, kind, table)

    def opened() -> int:
        count, real = [0], pa.parquet.ParquetFile
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pa.parquet, "ParquetFile", lambda *a, **k: (count.append(0), real(*a, **k))[1])
            current(folder)
        return len(count) - 1

    assert opened() == 60
    compact(folder)
    assert opened() == 2  # the snapshot, and the header of the change that it stands for


def test_the_command_line_reverts_and_compacts(folder, capsys):
    _changes(folder)
    for words, expected in (
        (["revert", "--to", "1"], "version 5: the items of version 1, 8 in all"),
        (["revert", "--to", "1"], "version 5: nothing to do, has the items of version 1, 8 in all"),
        (["compact"], "version 5: one file for 5 changes"),
    ):
        main(["catalog", words[0], "--catalog", str(folder), *words[1:]])
        assert expected in " ".join(capsys.readouterr().out.split())
