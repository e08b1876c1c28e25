"""URLs as places: read and written through a copy here, whole or not at all, and refused before work."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest
from remote import Store

from semid import artifacts
from semid.artifacts import remote
from semid.artifacts.locks import Owner
from semid.artifacts.manifests import MANIFEST
from semid.artifacts.processes import in_use
from semid.errors import SemidError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["memory", "store"])
def there(request, tmp_path):
    """URL of an empty folder."""
    yield f"memory://bucket/{tmp_path.name}" if request.param == "memory" else f"store://{tmp_path}/there"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def write(place, *, text="x", seed=0, names=("a.txt", "sub/b.txt")):
    with artifacts.write_artifact(place, kind="model", config={}, seed=seed) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def listing(url):
    fs, root = remote.locate(url)
    return sorted(name.removeprefix(f"{root}/") for name in fs.find(root))


def forget(cache):
    """Another machine has no copies."""
    shutil.rmtree(cache)


def counted(monkeypatch):
    """Names of the files that are downloaded from now on."""
    found, download = [], fsspec.AbstractFileSystem.get_file

    def get_file(self, name, *args, **options):
        found.append(os.path.basename(name))
        return download(self, name, *args, **options)

    for kind in (fsspec.AbstractFileSystem, Store, fsspec.get_filesystem_class("memory")):
        monkeypatch.setattr(kind, "get_file", get_file)
    return found


def test_an_artifact_is_written_there_and_read_elsewhere(there, cache, monkeypatch):
    write(f"{there}/m")
    assert listing(there) == ["m/a.txt", f"m/{MANIFEST}", "m/sub/b.txt"]
    forget(cache)
    downloads = counted(monkeypatch)
    folder = artifacts.fetched(f"{there}/m")
    assert artifacts.read_artifact(folder, "model").seed == 0
    assert (folder / "sub" / "b.txt").read_text() == "x"
    assert sorted(downloads) == ["a.txt", "b.txt", MANIFEST]
    artifacts.fetched(f"{there}/m")
    assert len(downloads) == 3  # nothing changed


def test_a_changed_artifact_is_fetched_again_and_what_it_lacks_goes(there, cache):
    write(f"{there}/m")
    artifacts.fetched(f"{there}/m")
    mine = cache.rename(cache.with_name("mine"))
    write(f"{there}/m", text="new", names=("a.txt",))  # from elsewhere
    forget(cache)
    mine.rename(cache)
    folder = artifacts.fetched(f"{there}/m")
    assert listing(f"{there}/m") == ["a.txt", MANIFEST]
    assert artifacts.read_artifact(folder, "model")
    assert (folder / "a.txt").read_text() == "new"
    assert not (folder / "sub").exists()


def test_copies_that_were_not_read_for_longest_make_room(there, cache, monkeypatch):
    for name in ("a", "b"):
        write(f"{there}/{name}")
    folder = artifacts.fetched(f"{there}/a")
    work = artifacts.place(f"{there}/m.checkpoints") / "step"
    work.parent.mkdir()
    work.write_text("x")
    monkeypatch.setattr(remote, "LIMIT", 0)
    artifacts.fetched(f"{there}/b")
    assert artifacts.read_artifact(folder, "model")  # this process read it
    (marker,) = (cache / "semid" / "urls" / ".users").iterdir()
    for file in [*folder.rglob("*"), work]:  # as if an earlier one had
        os.utime(file, (1, 1))
    other = marker.with_name(marker.name.rpartition("-")[0] + "-1")  # a process that lives, and began before
    other.touch()
    os.utime(other, (0, 0))
    artifacts.fetched(f"{there}/b")
    assert (folder / MANIFEST).exists()
    other.rename(marker.with_name(marker.name.rpartition("-")[0] + "-999999999"))  # one that has ended
    arriving = marker.parent.with_name(".arriving")
    for process in (1, 999999999):  # a download of one that lives, and of one that was killed
        (arriving / f"tmp{in_use('arriving', process)}").touch()
    copy = artifacts.fetched(f"{there}/b")
    assert not any(file.is_file() for file in folder.rglob("*"))
    assert [file.name for file in marker.parent.iterdir()] == [marker.name]
    assert [file.name for file in arriving.iterdir()] == [f"tmp{in_use('arriving', 1)}"]
    assert artifacts.read_artifact(copy, "model")
    assert work.exists()
    assert artifacts.read_artifact(artifacts.fetched(f"{there}/a"), "model")  # fetched again


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_is_refused(there):
    write(f"{there}/m")
    folder = artifacts.fetched(f"{there}/m")
    (folder / "a.txt").write_text("y")
    artifacts.read_artifact(artifacts.fetched(f"{there}/m"), "model")
    fs, root = remote.locate(f"{there}/m/a.txt")
    fs.pipe_file(root, b"y")
    with pytest.raises(SemidError, match=r"a\.txt: content does not match its sha256"):
        artifacts.read_artifact(artifacts.fetched(f"{there}/m"), "model")


def test_what_is_there_counts_and_not_the_copy(there, cache, caplog):
    caplog.set_level("INFO", "semid")
    write(f"{there}/m", seed=3)
    forget(cache)
    wanted = {"kind": "model", "config": {}, "parents": {}}
    assert artifacts.is_current(f"{there}/m", **wanted, seed=3)
    assert f"{there}/m: this model exists" in caplog.text
    with pytest.raises(SemidError, match="in use by a model of other settings"):
        artifacts.is_current(f"{there}/m", **wanted, seed=4)
    fs, root = remote.locate(there)
    fs.rm(root, recursive=True)
    assert not artifacts.is_current(f"{there}/m", **wanted, seed=3)


def test_an_upload_that_was_cut_short_is_not_seen_and_is_done_again(there, cache, monkeypatch):
    put = remote._put

    def fail(fs, content, name, mode="overwrite"):
        if name.endswith(MANIFEST):
            raise OSError("connection lost")
        put(fs, content, name, mode)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_put", fail)
        with pytest.raises(SemidError, match=r"m: cannot be written \(connection lost\);"):
            write(f"{there}/m")
    assert {"a.txt", "sub/b.txt"} < set(listing(f"{there}/m"))
    assert not list(cache.rglob("a.txt"))
    with pytest.raises(SemidError, match="no such artifact"):
        artifacts.read_manifest(artifacts.fetched(f"{there}/m"))
    write(f"{there}/m", names=("c.txt",))
    assert listing(f"{there}/m") == ["c.txt", MANIFEST]


def test_files_are_written_there_and_read_back(there, cache):
    file = artifacts.try_file(f"{there}/deep/metrics.json")
    assert listing(there) == []
    file.parent.mkdir(parents=True)
    artifacts.write_json(file, {"a": 1})
    assert listing(there) == ["deep/metrics.json"]
    forget(cache)
    assert artifacts.read_json(artifacts.fetched(f"{there}/deep/metrics.json")) == {"a": 1}
    with pytest.raises(SemidError, match="no such file"):
        artifacts.read_json(artifacts.fetched(f"{there}/none.json"))


def test_a_file_is_written_once(there, cache):
    for text in ("first", "second"):
        with (
            pytest.raises(FileExistsError)
            if text == "second"
            else artifacts.write_once(artifacts.resolved(f"{there}/000001.parquet")) as temporary
        ):
            if text == "first":
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(text)
                continue
            forget(cache)  # another machine
            file = artifacts.resolved(f"{there}/000001.parquet")
            file.parent.mkdir(parents=True)
            with artifacts.write_once(file) as temporary:
                temporary.write_text(text)
    assert artifacts.fetched(f"{there}/000001.parquet").read_text() == "first"


def test_somebody_elses_files_are_not_overwritten(there):
    fs, root = remote.locate(f"{there}/m/precious.txt")
    fs.makedirs(os.path.dirname(root), exist_ok=True)
    fs.pipe_file(root, b"x")
    with pytest.raises(SemidError, match="in use by something that is no model artifact"):
        write(f"{there}/m")
    assert listing(there) == ["m/precious.txt"]


def test_a_lock_is_seen_elsewhere_and_taken_over_from_the_dead(there, cache):
    lock = artifacts.resolved(f"{there}/.m.lock")
    elsewhere = replace(Owner.this(), host="h", boot="b")
    with artifacts.locked(lock, lock.with_name("m")):
        assert listing(there) == [".m.lock"]
    assert listing(there) == []
    remote.write_object(lock, json.dumps(asdict(elsewhere)).encode())
    with (
        pytest.raises(SemidError, match=f"in use by process .* on h since .*delete {re.escape(there)}/.m.lock"),
        artifacts.locked(lock, lock.with_name("m")),
    ):
        pass
    remote.write_object(lock, json.dumps(asdict(replace(Owner.this(), pid=999999999))).encode())
    with artifacts.locked(lock, lock.with_name("m")):
        pass
    assert listing(there) == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nosuch://bucket/m", "Protocol not known: nosuch"),
        ("store:///refused/m", r"store:///refused/m: cannot be written \(403, billing account disabled\); check"),
        ("memory://bucket/a/../b", "a name that no file can have"),
    ],
)
def test_what_cannot_be_written_is_said_before_work_in_one_line(url, why, monkeypatch):
    monkeypatch.setattr(Store, "refused", "/refused")
    monkeypatch.setattr(Store, "makedirs", lambda *_, **__: None)
    for attempt in (artifacts.try_folder, artifacts.try_file):
        with pytest.raises(SemidError, match=why) as refusal:
            attempt(url)
        assert "\n" not in str(refusal.value)


def test_a_package_that_is_absent_is_named(monkeypatch):
    def absent(path):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr(remote, "url_to_fs", absent)
    with pytest.raises(SemidError, match="s3://bucket/m: Please install s3fs"):
        artifacts.try_folder("s3://bucket/m")


@pytest.mark.parametrize("url", ["memory://b/x", "gs://bucket/a/b", "hdfs:///user/x"])
def test_a_url_and_its_copy_name_each_other(url, monkeypatch):
    monkeypatch.setattr(remote, "locate", lambda url: None)
    assert remote.url_of(artifacts.place(url)) == url
    assert artifacts.shown(f"{artifacts.place(url)}: damaged") == f"{url}: damaged"


def test_paths_here_stay_paths(tmp_path):
    assert artifacts.place(tmp_path) == artifacts.fetched(str(tmp_path)) == tmp_path
    assert artifacts.place(f"file://{tmp_path}") == tmp_path
    assert [artifacts.place(path) for path in ("a:b/c", "a@1", "x//y")] == [Path("a:b/c"), Path("a@1"), Path("x/y")]
    assert remote.url_of(tmp_path) is None


def test_a_path_of_the_users_home_is_that_at_every_door(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for door in (
        artifacts.place,
        artifacts.fetched,
        artifacts.local_folder,
        lambda path: artifacts.local_only(path, ""),
    ):
        assert door("~/m") == door(Path("~/m")) == tmp_path / "m"
        assert door("./~/m") == Path("./~/m")  # a folder of that name
        with pytest.raises(SemidError, match="'~nobody-of-this-name/m': there is no such home"):
            door("~nobody-of-this-name/m")


def test_a_path_that_was_a_url_is_one():
    assert artifacts.as_url(Path("memory://b/x")) == "memory://b/x"


def test_names_that_would_leave_the_copy_are_refused(cache):
    fs = fsspec.filesystem("memory")
    fs.store["/bucket/m/../../../x"] = fs.open("/bucket/m/a", "wb")
    try:
        with pytest.raises(SemidError, match="a name that no file can have"):
            artifacts.fetched("memory://bucket/m")
    finally:
        fs.store.clear()


def test_what_must_be_here_is_refused_a_url(tmp_path):
    assert artifacts.local_only(tmp_path, "it spills there") == tmp_path
    for path in ("memory://bucket/m", artifacts.place("memory://bucket/m")):
        with pytest.raises(SemidError, match="memory://bucket/m: it spills there, and needs a folder of this machine"):
            artifacts.local_only(path, "it spills there")
