import json
import os
import platform
import resource
import signal

import numpy as np
import pytest

from semid import artifacts
from semid.artifacts import (
    is_current,
    load_metadata,
    load_tensors,
    read_artifact,
    read_json,
    replacing,
    save_tensors,
    write_artifact,
    write_json,
    writing,
)
from semid.artifacts.processes import in_use
from semid.errors import SemidError


def write(path, *, text="x", kind="model", config=None, parents=None, seed=0):
    with write_artifact(path, kind=kind, config=config or {"epochs": 3}, parents=parents, seed=seed) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text("b")
    return read_artifact(path, kind)


def current(path, *, kind="model", config=None, parents=None, seed=0):
    return is_current(path, kind=kind, config=config or {"epochs": 3}, parents=parents or {}, seed=seed)


def change_manifest(path, **changes):
    file = path / "manifest.json"
    file.write_text(json.dumps(artifacts.sealed(artifacts.read_sealed(file) | changes)))


def test_what_is_written_is_read(tmp_path):
    parent = write(tmp_path / "parent", kind="catalog")
    manifest = write(tmp_path / "deep" / "model", parents={"catalog": parent.digest}, seed=7)
    assert (manifest.kind, manifest.config, manifest.seed) == ("model", {"epochs": 3}, 7)
    assert manifest.parents == {"catalog": parent.digest}
    assert sorted(manifest.files) == ["a.txt", "sub/b.txt"]
    assert manifest.packages["numpy"] == np.__version__
    assert (tmp_path / "deep" / "model" / "a.txt").read_text() == "x"
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_after_an_exception_nothing_is_left(tmp_path):
    def fail():
        with write_artifact(tmp_path / "m", kind="model", config={}) as folder:
            (folder / "a.txt").write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert os.listdir(tmp_path) == []


def test_after_an_exception_the_older_artifact_stands(tmp_path):
    before = write(tmp_path / "m", text="old")

    def fail():
        with write_artifact(tmp_path / "m", kind="model", config={"epochs": 3}, seed=0) as folder:
            (folder / "a.txt").write_text("new")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert read_artifact(tmp_path / "m", "model") == before
    assert os.listdir(tmp_path) == ["m"]


def test_nothing_stands_at_the_path_before_all_is_written(tmp_path):
    with write_artifact(tmp_path / "m", kind="model", config={}) as folder:
        (folder / "a.txt").write_text("x")
        assert not (tmp_path / "m").exists()
    assert (tmp_path / "m" / "manifest.json").is_file()


def test_an_artifact_of_the_same_kind_is_replaced_whole(tmp_path):
    write(tmp_path / "m", text="old")
    with write_artifact(tmp_path / "m", kind="model", config={}) as folder:
        (folder / "c.txt").write_text("new")
    assert sorted(os.listdir(tmp_path / "m")) == ["c.txt", "manifest.json"]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("name", ["notes.txt", ".git/HEAD", "other/manifest.json"])
def test_an_artifact_with_files_of_others_in_its_folder_is_not_replaced(tmp_path, name):
    write(tmp_path / "m")
    (tmp_path / "m" / "config.yaml").write_text("epochs: 3")  # the command's options, which go with it
    (tmp_path / "m" / "empty").mkdir()
    write(tmp_path / "m", text="new")
    file = tmp_path / "m" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(SemidError, match=rf"m: the model there would be replaced, and with it {name}, which is not"):
        write(tmp_path / "m")
    assert file.read_text() == "mine"
    assert (tmp_path / "m" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
def test_changed_and_missing_files_are_named(tmp_path, name):
    write(tmp_path / "m")
    path = tmp_path / "m" / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]))
    with pytest.raises(SemidError, match=f"{name}: content does not match its sha256 in manifest.json"):
        read_artifact(tmp_path / "m", "model")
    path.unlink()
    with pytest.raises(SemidError, match=f"{name}: listed in manifest.json but missing"):
        read_artifact(tmp_path / "m", "model")


def test_a_newer_schema_is_refused(tmp_path):
    write(tmp_path / "m")
    change_manifest(tmp_path / "m", schema_version=artifacts.SCHEMA_VERSION + 1)
    with pytest.raises(SemidError, match=r"schema version 2 is newer than 1; upgrade semid to read it"):
        read_artifact(tmp_path / "m", "model")


def test_wrong_kind_no_artifact_and_no_manifest_are_told_apart(tmp_path):
    write(tmp_path / "m")
    with pytest.raises(SemidError, match="m: expected an artifact of kind 'dataset', found 'model'; check the path"):
        read_artifact(tmp_path / "m", "dataset")
    write(tmp_path / "g", kind="graph")
    with pytest.raises(SemidError, match="found 'graph'; an item graph is measured by `semid evaluate`"):
        read_artifact(tmp_path / "g", "model")
    with pytest.raises(SemidError, match="nowhere: no such artifact"):
        read_artifact(tmp_path / "nowhere", "model")
    change_manifest(tmp_path / "m", surprise=1)
    with pytest.raises(SemidError, match=r"manifest.json: not a manifest of semid"):
        read_artifact(tmp_path / "m", "model")
    (tmp_path / "m" / "manifest.json").write_text("{")
    with pytest.raises(SemidError, match=r"manifest.json: not valid JSON"):
        read_artifact(tmp_path / "m", "model")
    (tmp_path / "m" / "manifest.json").unlink()
    with pytest.raises(SemidError, match=r"manifest.json: no such file; expected a folder that semid wrote$"):
        read_artifact(tmp_path / "m", "model")
    with pytest.raises(SemidError, match=rf"expected a folder that semid wrote, such as {tmp_path}/g$"):
        read_artifact(tmp_path, "model")


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "m").mkdir()
    write(tmp_path / "m")  # an empty folder may be filled
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(SemidError, match=f"{name}: output folder in use by something that is no model artifact"):
            write(tmp_path / name)
    with pytest.raises(SemidError, match="m: output folder in use by a model artifact; choose another path"):
        write(tmp_path / "m", kind="dataset")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"
    assert read_artifact(tmp_path / "m", "model").config == {"epochs": 3}


def test_current_is_the_same_kind_config_parents_and_seed(tmp_path):
    assert not current(tmp_path / "m")
    write(tmp_path / "m")
    assert current(tmp_path / "m")


def test_what_an_artifact_is_made_of_is_not_its_place(tmp_path):
    """Nobody is told to delete it."""
    teacher = write(tmp_path / "m")
    with pytest.raises(SemidError, match=r"m: is what the new model is made of; choose another path \(--out\)$"):
        current(tmp_path / "m", parents={"teacher": teacher.digest})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"config": {"epochs": 4}}, r"in use by a model of other settings \(epochs: 3 -> 4\)"),
        ({"config": {"epochs": 3, "rate": {"x": 1}}}, r"\(rate: None -> \{'x': 1\}\)"),
        ({"seed": 1}, r"\(seed: 0 -> 1\)"),
        ({"kind": "catalog"}, "output folder in use by a model artifact"),
    ],
)
def test_a_differing_request_is_refused_and_the_difference_named(tmp_path, change, expected):
    write(tmp_path / "m")
    with pytest.raises(SemidError, match=expected):
        current(tmp_path / "m", **change)


def test_a_setting_written_as_an_integer_is_the_float(tmp_path):
    write(tmp_path / "m", config={"epochs": 36})
    assert current(tmp_path / "m", config={"epochs": 36.0, "added": None})
    with pytest.raises(SemidError, match=r"\(epochs: 36 -> 36.5\)"):
        current(tmp_path / "m", config={"epochs": 36.5})


def test_a_parent_with_other_content_makes_a_difference(tmp_path):
    old, new = (write(tmp_path / text, kind="catalog", text=text) for text in ("old", "new"))
    assert old.fingerprint == new.fingerprint
    assert old.digest != new.digest
    write(tmp_path / "m", parents={"catalog": old.digest})
    assert current(tmp_path / "m", parents={"catalog": old.digest})
    with pytest.raises(SemidError, match=rf"\(parents.catalog: '{old.digest[:36]}... -> '{new.digest[:36]}...\)"):
        current(tmp_path / "m", parents={"catalog": new.digest})


def test_a_damaged_artifact_is_not_current(tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m" / "a.txt").write_text("y")
    with pytest.raises(SemidError, match=r"a.txt: content does not match"):
        current(tmp_path / "m")


DEAD, ALIVE = "999999999", "1"  # no process has the first number, every system the second


def left(path, use, process=DEAD):
    """Where a process of this host keeps what it has under way for `path`."""
    return path.with_name(f".{path.name}.{in_use(use, process)}")


@pytest.mark.parametrize("attempt", [write, current])
def test_an_artifact_that_stepped_aside_before_a_kill_is_put_back(tmp_path, attempt):
    before = write(tmp_path / "m[1]", text="old")
    (tmp_path / "m[1]").rename(left(tmp_path / "m[1]", "replaced"))
    left(tmp_path / "m[1]", "writing").mkdir()
    assert current(tmp_path / "m[1]")
    assert read_artifact(tmp_path / "m[1]", "model") == before
    attempt(tmp_path / "m[1]")
    assert os.listdir(tmp_path) == ["m[1]"]


def test_an_artifact_that_was_replaced_before_a_kill_goes(tmp_path):
    write(tmp_path / "m", text="old")
    (tmp_path / "m").rename(left(tmp_path / "m", "replaced"))
    write(tmp_path / "new", text="new")
    (tmp_path / "new").rename(tmp_path / "m")
    assert current(tmp_path / "m")
    assert (tmp_path / "m" / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("use", ["writing", "replaced"])
def test_what_may_still_be_in_use_is_left_alone(tmp_path, use):
    alive, dead = (left(tmp_path / "m", use, process) for process in (ALIVE, DEAD))
    on_another_host = tmp_path / f".m.{use}-elsewhere-{DEAD}"
    for folder in (alive, dead, on_another_host):
        folder.mkdir()
    write(tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"m", alive.name, on_another_host.name}


def test_an_interrupt_between_the_renames_brings_the_older_artifact_back(tmp_path, monkeypatch):
    before = write(tmp_path / "m", text="old")
    rename = os.replace

    def interrupted(source, target):
        if ".writing-" in source.name and target == tmp_path / "m":
            assert not target.exists()
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(writing, "rename", lambda *_: False)  # where the system cannot exchange two names
    monkeypatch.setattr(writing.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", text="new")
    assert read_artifact(tmp_path / "m", "model") == before
    assert os.listdir(tmp_path) == ["m"]


def test_names_of_files_under_way_are_safe_whatever_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "my host-1/é.local")
    assert in_use("writing", 7) == "writing-my_host_1__.local-7"
    write(tmp_path / "m")


def test_digests_ignore_the_order_of_keys_and_the_time(tmp_path):
    first = write(tmp_path / "a", config={"x": 1, "y": 2})
    second = write(tmp_path / "b", config={"y": 2, "x": 1})
    change_manifest(tmp_path / "b", created="2001-01-01T00:00:00+00:00")
    assert first.digest == second.digest == read_artifact(tmp_path / "b", "model").digest
    assert first.digest != write(tmp_path / "c", config={"x": 1, "y": 3}).digest


def test_tensors_round_trip(tmp_path):
    tensors = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "strided": np.arange(12, dtype=np.int32).reshape(3, 4).T,
        "empty": np.zeros((0, 3), np.float16),
        "flag": np.array([True, False]),
    }
    tmp_path.chmod(0o755)
    save_tensors(tmp_path / "t.safetensors", tensors)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644  # who may read the folder may read the file
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_unreadable_tensors_are_named(tmp_path):
    with pytest.raises(SemidError, match=r"t.safetensors: no such file"):
        load_tensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(SemidError, match=r"t.safetensors: not a readable safetensors file"):
        load_tensors(tmp_path / "t.safetensors")


def test_json_is_written_whole_and_refuses_nan(tmp_path):
    path = tmp_path / "v.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1, 2.5, None]}
    assert os.listdir(tmp_path) == ["v.json"]


def test_a_file_is_no_artifact(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(SemidError, match="f"):
        read_artifact(tmp_path / "f", "model")


@pytest.mark.parametrize("text", ["[]", "3", '{"schema_version": "x"}', '{"schema_version": null}', "\xff"])
def test_a_manifest_of_another_form(tmp_path, text):
    write(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(SemidError, match=r"manifest.json: not"):
        read_artifact(tmp_path / "m", "model")


def test_a_changed_manifest_is_refused(tmp_path):
    write(tmp_path / "m")
    file = tmp_path / "m" / "manifest.json"
    file.write_text(file.read_text().replace('"epochs": 3', '"epochs": 4'))
    with pytest.raises(SemidError, match=r"manifest.json"):
        read_artifact(tmp_path / "m", "model")


def test_an_empty_folder_is_not_current(tmp_path):
    (tmp_path / "m").mkdir()
    assert not is_current(tmp_path / "m", kind="model", config={}, parents={}, seed=0)


def test_output_below_a_file(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(SemidError):
        write(tmp_path / "f" / "m")


def _interrupted(path):
    path.write_text("half")
    raise RuntimeError("while it was written")


def test_what_killed_writers_of_files_left_goes_with_the_next_write(tmp_path):
    file = tmp_path / "v.json"
    dead, alive, other = left(file, "writing.5"), left(file, "writing.5", ALIVE), left(tmp_path / "w.json", "writing.5")
    for leftover in (dead, alive, other):
        leftover.touch()
    with pytest.raises(RuntimeError, match="while it was written"), replacing(file) as temporary:
        _interrupted(temporary)
    write_json(file, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"v.json", alive.name, other.name}


def test_a_file_that_is_written_whole_within_another_writing_has_one_name_that_a_kill_can_leave(tmp_path):
    with replacing(tmp_path / "v.json") as temporary:
        with replacing(temporary) as inner:
            assert inner == temporary
            inner.write_text("half")
            assert [path.name for path in tmp_path.iterdir()] == [temporary.name]
        write_json(temporary, 1)
        assert [path.name for path in tmp_path.iterdir()] == [temporary.name]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("v.json", "1\n")]


def test_tensors_that_do_not_fit_the_disk_are_named_and_the_older_file_stays(tmp_path):
    file, small = tmp_path / "t.safetensors", {"a": np.zeros(1)}
    save_tensors(file, small, metadata={"x": "y"})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk
    try:
        with pytest.raises(SemidError, match=r"t\.safetensors: cannot be written \(.*too large"):
            save_tensors(file, {"a": np.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["t.safetensors"]
    assert load_tensors(file) == small
    assert load_metadata(file) == {"x": "y"}


@pytest.mark.parametrize("entry", ["created", "packages", "devices", "seed"])
def test_no_entry_of_a_manifest_can_change(tmp_path, entry):
    write(tmp_path / "m", seed=7)
    file = tmp_path / "m" / "manifest.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values))
    read_artifact(tmp_path / "m", "model")  # control
    file.write_text(json.dumps(values | {entry: {"seed": 8, "packages": {}}.get(entry, "")}))
    with pytest.raises(SemidError, match=r"manifest\.json: content does not match its own digest"):
        read_artifact(tmp_path / "m", "model")


def test_a_sealed_file_is_read_without_its_digest_and_one_without_a_digest_as_it_is(tmp_path):
    content = {"rows": [{"k": 1}], "by": {10: 0.5, 9: 1e-7}}
    write_json(tmp_path / "a.json", artifacts.sealed(content))
    write_json(tmp_path / "b.json", content)
    for name in ("a.json", "b.json"):
        assert artifacts.read_sealed(tmp_path / name) == {"rows": [{"k": 1}], "by": {"10": 0.5, "9": 1e-7}}
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("0.5", "0.6"))
    with pytest.raises(SemidError, match=r"a\.json: content does not match its own digest"):
        artifacts.read_sealed(tmp_path / "a.json")
