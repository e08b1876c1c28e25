"""Locks: one process at a time, the dead ones' taken over, nothing left."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest

from semid import artifacts
from semid.artifacts import files, locks
from semid.artifacts.locks import Owner, locked
from semid.artifacts.manifests import MANIFEST
from semid.errors import SemidError


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "deep" / ".m.lock"


def attempt(lock):
    with locked(lock, lock.parent / "m"):
        return json.loads(lock.read_text())


def test_the_owner_is_named_and_nothing_is_left(lock):
    this = dataclasses.asdict(Owner.this())
    assert {**attempt(lock), "since": this["since"]} == this
    with locked(lock, lock.parent / "m"):
        with pytest.raises(SemidError, match=rf"deep/m: in use by process {os.getpid()} on .* since 20\d\d-.*; wait"):
            attempt(lock)
        assert lock.exists()
    with pytest.raises(KeyError), locked(lock, lock.parent / "m"):
        raise KeyError
    assert not lock.parent.exists()  # made for the lock alone


def test_the_lock_of_a_process_that_lives_is_refused_and_of_a_killed_one_taken_over(lock):
    program = f"""
        import pathlib, sys, time
        from semid.artifacts import locked
        with locked(pathlib.Path({str(lock)!r}), pathlib.Path("m")):
            print("held", flush=True)
            time.sleep(600)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SemidError, match=f"in use by process {other.pid} on "):
            attempt(lock)
    finally:
        other.kill()
        other.communicate()
    assert lock.exists()
    assert attempt(lock)["pid"] == os.getpid()
    assert not lock.exists()


def left(lock, **changes):
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Owner.this(), **changes))))


def test_of_another_machine_the_file_to_delete_is_named(lock):
    left(lock, host="elsewhere", boot="other")
    with pytest.raises(SemidError, match=r"on elsewhere since .*; if that no longer runs, delete .*/deep/\.m\.lock"):
        attempt(lock)
    assert lock.exists()
    for change in ({"host": "elsewhere"}, {"boot": "before"}):  # a container of this machine, and before it started
        left(lock, **change)
        attempt(lock)
    lock.write_text('{"half')
    attempt(lock)


def test_where_the_file_system_has_no_locks_the_owner_must_live(lock, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    left(lock)
    with pytest.raises(SemidError, match=f"in use by process {os.getpid()}"):
        attempt(lock)
    for change in ({"pid": 999_999_999}, {"started": "1"}):  # dead, and its number given to another
        left(lock, **change)
        attempt(lock)


def test_a_lock_that_its_owner_removes_meanwhile_is_none(lock, monkeypatch):
    """The file that was opened is no longer the one of that name: who holds it holds nothing."""
    check, times = locks._check_free, []

    def removed(file, *rest):
        check(file, *rest)
        times.append(1)
        if len(times) == 1:
            file.unlink()

    monkeypatch.setattr(locks, "_check_free", removed)
    attempt(lock)
    assert len(times) == 2


def test_two_writers_of_one_artifact(tmp_path):
    def write(path):
        with artifacts.write_artifact(path, kind="model", config={}) as folder:
            (folder / "a.txt").write_text("x")
            if path == tmp_path / "m":
                write(tmp_path / "other")
                with pytest.raises(SemidError, match=f"m: in use by process {os.getpid()}"):
                    write(tmp_path / "." / "m")

    write(tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m", "other"]
    assert (tmp_path / "m" / MANIFEST).is_file()


@pytest.mark.parametrize("has_renameat2", [True, False])
@pytest.mark.parametrize("code", [95, 1])  # not supported, not permitted
def test_files_are_written_once_where_there_are_no_hard_links(tmp_path, monkeypatch, has_renameat2, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "link", unsupported)
    if not has_renameat2:
        monkeypatch.setattr(files, "rename", lambda *_: False)

    def write(text):
        with artifacts.write_once(tmp_path / "f") as temporary:
            temporary.write_text(text)

    write("first")
    with pytest.raises(FileExistsError):
        write("second")
    assert (tmp_path / "f").read_text() == "first"
    assert os.listdir(tmp_path) == ["f"]
