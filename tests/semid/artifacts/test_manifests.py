"""Manifests as anybody may have written them: names, types, sizes, links and devices."""

import hashlib
import json
import os
import shutil

import pytest

from semid import artifacts
from semid.artifacts import Origin, manifests, writing
from semid.artifacts.manifests import MANIFEST
from semid.errors import SemidError


@pytest.fixture
def folder(tmp_path):
    with artifacts.write_artifact(tmp_path / "m", kind="model", config={}) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text("a")
        (folder / "sub" / "b.txt").write_text("b")
    return tmp_path / "m"


def forge(folder, **changes):
    """Change a manifest as an attacker would: with its digest."""
    values = artifacts.read_sealed(folder / MANIFEST) | changes
    made = artifacts.sha256_json([values[name] for name in ("kind", "schema_version", "config", "parents", "seed")])
    values["digest"] = artifacts.sha256_json([made, values["files"]])
    (folder / MANIFEST).write_text(json.dumps(artifacts.sealed(values)))


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_artifact_that_changes_while_it_is_read_is_refused(folder, change):
    def load() -> None:
        with artifacts.opened(folder, "model") as origin:
            shutil.rmtree(folder)
            if change == "replaced":
                with artifacts.write_artifact(folder, kind="model", config={"of": "another"}) as new:
                    (new / "a.txt").write_text("a")
            (origin.folder / "sub" / "b.txt").read_text()  # its own error would mislead

    with pytest.raises(SemidError, match=f"{folder}: was replaced while it was read; load it again"):
        load()


def test_an_error_of_an_artifact_that_stands_is_not_hidden(folder):
    with pytest.raises(KeyError, match="own"), artifacts.opened(folder, "model"):
        raise KeyError("own")
    (folder / "a.txt").write_text("b")
    with pytest.raises(SemidError, match="content does not match"), artifacts.opened(folder, "model"):
        pass


NAMES = ("../secret", "/etc/hostname", "sub/../../secret", "./a.txt", "sub//b.txt", "", "..", "..\\secret", "a\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_outside_the_folder_is_refused(folder, name):
    (folder.parent / "secret").write_text("s")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    forge(folder, files=files)
    artifacts.read_artifact(folder, "model")  # control
    forge(folder, files=files | {name: hashlib.sha256(b"s").hexdigest()})
    with pytest.raises(SemidError) as caught:
        artifacts.read_artifact(folder, "model")
    assert str(caught.value).startswith(f"{folder / MANIFEST}: lists the file {name!r}, which is not below its folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ["a.txt"]}, "files is not"),
        ({"files": {"a.txt": 3}}, "the digest of 'a.txt' is no sha256"),
        ({"files": {"a.txt": "f" * 63}}, "the digest of 'a.txt' is no sha256"),
        ({"kind": ["model"]}, "kind is not"),
        ({"config": "x"}, "config is not"),
        ({"parents": {"dataset": 1}}, "parents has an entry that is no text"),
        ({"packages": {"jax": None}}, "packages has an entry that is no text"),
        ({"seed": "0"}, "seed is not"),
        ({"seed": True}, "seed is not"),
        ({"schema_version": 1.0}, "schema_version is not"),
        ({"devices": None}, "devices is not"),
        ({"created": 5}, "created is not"),
    ],
)
def test_entries_of_other_types_are_refused(folder, change, message):
    forge(folder, **change)
    with pytest.raises(SemidError, match=rf"manifest\.json: {message}"):
        artifacts.read_manifest(folder)


@pytest.mark.parametrize("name", ["a.txt", "sub", MANIFEST])
def test_links_are_refused(folder, name):
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(SemidError, match=rf"{name}: is a link, and an artifact has none; copy it with its links"):
        artifacts.read_artifact(folder, "model")


def test_pipes_and_folders_are_refused(folder):
    for make in (os.mkfifo, os.mkdir):
        (folder / "a.txt").unlink()
        make(folder / "a.txt")
        with pytest.raises(SemidError, match=r"a\.txt: is no regular file"):
            artifacts.read_artifact(folder, "model")


def test_a_huge_or_deep_manifest_is_refused(folder, monkeypatch):
    (folder / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(SemidError, match=r"manifest\.json: not valid JSON"):
        artifacts.read_manifest(folder)
    monkeypatch.setattr(manifests, "MAX_BYTES", 1000)
    with pytest.raises(SemidError, match=r"manifest\.json: larger than 1000 bytes"):
        artifacts.read_manifest(folder)


def test_a_snapshot_in_the_cache_of_the_hub_is_read(folder, tmp_path):
    """Its files are links to a store next to it; links to anywhere else are not followed there either."""
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, name in enumerate(("a.txt", "sub/b.txt", MANIFEST)):
        shutil.copy(folder / name, home / "blobs" / str(number))
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(home / "blobs" / str(number), (snapshot / name).parent))
    assert artifacts.read_artifact(snapshot, "model") == artifacts.read_artifact(folder, "model")
    (snapshot / "a.txt").unlink()
    (snapshot / "a.txt").symlink_to(folder / "a.txt")
    with pytest.raises(SemidError, match=r"a\.txt: is a link"):
        artifacts.read_artifact(snapshot, "model")


def test_an_origin_stays_where_it_is(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    origin = Origin(type(folder)("m"), artifacts.read_artifact("m", "model"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    origin.copy_file("sub/b.txt", tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "b.txt").read_text() == "b"


def test_a_reader_finds_an_artifact_at_every_moment(folder, monkeypatch):
    """The names of old and new are exchanged in one step."""
    exchange, seen = writing.rename, []

    def watched(*names):
        done = exchange(*names)
        seen.append((done, folder.exists()))
        return done

    monkeypatch.setattr(writing, "rename", watched)
    with artifacts.write_artifact(folder, kind="model", config={}) as other:
        (other / "c.txt").write_text("c")
    assert seen == [(True, True)]
    assert sorted(os.listdir(folder)) == ["c.txt", MANIFEST]
    assert os.listdir(folder.parent) == ["m"]
