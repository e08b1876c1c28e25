"""Places of output: tried before work, links followed, folders that cannot be replaced filled."""

import errno
import os
import shutil
import subprocess

import pytest

from semid import artifacts
from semid.artifacts import places
from semid.artifacts.manifests import MANIFEST
from semid.artifacts.places import Place
from semid.artifacts.processes import in_use
from semid.errors import SemidError

DEAD = "999999999"  # no process has this number


def write(path, *, text="x", seed=0):
    with artifacts.write_artifact(path, kind="model", config={}, seed=seed) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text("b")
    return artifacts.read_artifact(artifacts.resolved(path), "model")


@pytest.fixture
def volume(tmp_path):
    """A mount point of 1 MiB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A folder in one that takes no names, as a user who is not root meets it."""
    folder = tmp_path / "read-only" / "m"
    folder.mkdir(parents=True)
    make = places._try

    def refuse(path):
        if path.parent == folder.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path)

    monkeypatch.setattr(places, "_try", refuse)
    return folder


@pytest.fixture(params=["volume", "here", "read_only"])
def fixed(request):
    """A folder that no other can replace."""
    return request.getfixturevalue(request.param)


def test_a_place_is_tried_and_nothing_is_left(tmp_path):
    assert artifacts.try_folder(tmp_path / "deep" / "m") == Place(tmp_path / "deep" / "m", inside=False)
    assert artifacts.try_file(tmp_path / "deep" / "f.json") == tmp_path / "deep" / "f.json"
    assert os.listdir(tmp_path) == []


def test_home_dots_and_links_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "ahead").symlink_to(tmp_path / "disk" / "later")
    expected = {"~/m": "home/m", "./x/../m": "m", "link": "disk", "link/m": "disk/m", "ahead": "disk/later"}
    for given, path in expected.items():
        assert artifacts.try_folder(given).path == tmp_path / path
    (tmp_path / "last.json").symlink_to(tmp_path / "disk" / "last.json")
    assert artifacts.try_file("last.json") == tmp_path / "disk" / "last.json"
    with pytest.raises(SemidError, match="'~nobody-of-this-name/m': no path to write to"):
        artifacts.try_folder("~nobody-of-this-name/m")


def test_an_artifact_is_written_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "m")
    for text in ("first", "second"):
        write(tmp_path / "link", text=text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "m" / "a.txt").read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert os.listdir(tmp_path / "disk") == ["m"]


@pytest.mark.parametrize("attempt", [artifacts.try_folder, artifacts.try_file])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f/m", r"f: is a file, and .*f/m should go below it; choose another path \(--out\)"),
        ("x" * 250, r"xxx: cannot be written \(File name too long\); choose another path \(--out\)"),
        ("circle/m", r"circle/m'?: (no path to write to|cannot be written) \(.*; choose another path \(--out\)"),
        ("/proc/m", r"/proc/m: cannot be written \(.*\); choose another path \(--out\)"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, attempt, name, message):
    (tmp_path / "f").touch()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(SemidError, match=message) as caught:
        attempt(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(SemidError, match="is a folder; name the file to write"):
        artifacts.try_file(tmp_path)


def test_a_file_of_an_artifact_is_not_written_over(tmp_path):
    write(tmp_path / "m")
    for name in ("a.txt", "sub/b.txt", MANIFEST):
        with pytest.raises(
            SemidError, match=rf"m/{name}: is a file of the artifact .*m; choose another path \(--out\)"
        ):
            artifacts.try_file(tmp_path / "m" / name)
    (tmp_path / MANIFEST).write_text("[]")  # of something else
    for name in ("m/c.txt", "a.txt", MANIFEST):
        assert artifacts.try_file(tmp_path / name) == tmp_path / name


def test_a_full_disk_is_named(volume):
    (volume / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(SemidError, match=r"m: cannot be written \(No space left on device\); choose another path"):
        artifacts.try_folder(volume / "m")
    (volume / "filler").unlink()
    assert artifacts.try_folder(volume / "m") == Place(volume / "m", inside=False)


def test_a_folder_that_cannot_be_replaced_is_filled(fixed):
    place = artifacts.output_folder(fixed, kind="model")
    assert place == Place(fixed, inside=True)
    assert place.checkpoints == fixed / ".checkpoints"
    (fixed / "lost+found").mkdir()
    for text in ("first", "second"):
        write(fixed, text=text)
        assert (fixed / "a.txt").read_text() == text
    assert sorted(os.listdir(fixed)) == ["a.txt", "lost+found", "manifest.json", "sub"]


def test_a_bound_folder_is_a_mount_point(tmp_path):
    for name in ("source", "a b"):
        (tmp_path / name).mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "source", tmp_path / "a b"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        write(tmp_path / "a b")
    finally:
        subprocess.run(["umount", tmp_path / "a b"], check=True)
    assert (tmp_path / "source" / MANIFEST).is_file()


def test_another_content_of_a_fixed_folder_is_refused(here):
    (here / "diary.txt").write_text("mine")
    with pytest.raises(SemidError, match="here: output folder in use by something that is no model artifact"):
        write(here)
    assert os.listdir(here) == ["diary.txt"]


def test_after_an_exception_a_fixed_folder_is_as_before(here):
    before = write(here)

    def fail():
        with artifacts.write_artifact(here, kind="model", config={}) as folder:
            (folder / "a.txt").write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert artifacts.read_artifact(here, "model") == before
    assert sorted(os.listdir(here)) == ["a.txt", "manifest.json", "sub"]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_files_move_up_is_made_good(here, tmp_path, moved, older):
    """`moved` files of a sealed folder stand in the one above; the manifest does not."""
    sealed = write(tmp_path / "sealed", text="new")
    if older:
        write(here, text="old")
        if moved:
            shutil.rmtree(here / "sub")
            for name in ("a.txt", MANIFEST):
                (here / name).unlink()
    leftover = here / f".{in_use('writing', DEAD)}"
    shutil.move(tmp_path / "sealed", leftover)
    for name in list(sealed.files)[:moved]:
        (here / name).parent.mkdir(exist_ok=True)
        (leftover / name).rename(here / name)
    if moved:
        with pytest.raises(SemidError, match=r"the artifact is unfinished; run the command that writes it again"):
            artifacts.read_artifact(here, "model")
    assert artifacts.is_current(here, kind="model", config={}, parents={}, seed=0)
    assert artifacts.read_artifact(here, "model") == sealed
    assert sorted(os.listdir(here)) == ["a.txt", "manifest.json", "sub"]


@pytest.mark.parametrize("name", [".checkpoints", f".writing-elsewhere-{DEAD}", f".{in_use('writing', DEAD)}"])
def test_what_was_begun_in_a_folder_goes_on_there(tmp_path, name):
    (tmp_path / "m" / name).mkdir(parents=True)
    assert artifacts.output_folder(tmp_path / "m", kind="model").inside == (".checkpoints" in name or "else" in name)
    write(tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == sorted({"a.txt", "manifest.json", "sub"} | {name} & {".checkpoints"})


def test_a_finished_artifact_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    write(tmp_path / "m")
    monkeypatch.setattr(places, "_try", lambda path: pytest.fail("tried"))
    assert artifacts.is_current(tmp_path / "m", kind="model", config={}, parents={}, seed=0)
