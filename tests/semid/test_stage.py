"""The stage protocol: made once, read again, refused for another request, and nothing left without a folder."""

import dataclasses
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from semid import artifacts
from semid import stage as stage_module
from semid.artifacts import Kind, Origin, files
from semid.artifacts.locks import Owner
from semid.bulk import encode_files
from semid.catalog import append, export, extend
from semid.data import Dataset
from semid.errors import SemidError
from semid.evaluation import baselines, compare
from semid.generators import train
from semid.graphs import SmoothConfig, add_column, fit_graph
from semid.joint import train_end_to_end
from semid.recommender import Recommender, export_program
from semid.stage import Request, run_recorded, run_stage
from semid.tokenizers import tokenize

REQUEST = Request(Kind.MODEL, {"size": 3}, {"dataset": "d" * 64}, seed=1, version=1)


@dataclasses.dataclass(frozen=True)
class Note:
    text: str
    origin: Origin | None = None

    def with_origin(self, origin: Origin) -> "Note":
        return dataclasses.replace(self, origin=origin)

    def write(self, folder) -> None:
        (folder / "note.txt").write_text(self.text)

    @classmethod
    def load(cls, path) -> "Note":
        return cls((path / "note.txt").read_text(), Origin(path, artifacts.read_artifact(path, Kind.MODEL)))


def stage(out, request: Request = REQUEST, *, text: str = "first", log: bool = False) -> Note:
    def work(folder) -> Note:
        if log:
            folder.mkdir(parents=True)
            (folder / "request.json").write_text("{}")
            (folder / "history.jsonl").write_text('{"step": 1}\n')
        return Note(text)

    return run_stage(request, out, load=Note.load, work=work, write=Note.write)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_programs_are_forgotten_where_they_hold_too_many_maps_of_memory(limit, tmp_path, monkeypatch):
    forgotten = []
    monkeypatch.setattr(stage_module.jax, "clear_caches", lambda: forgotten.append(True))
    monkeypatch.setattr(stage_module, "_MAX_MAPS", limit)
    stage(tmp_path / "a")
    run_recorded({"of": 1}, tmp_path / "r.json", lambda: 1)
    assert len(forgotten) == (2 if stage_module._MAPS.exists() and not limit else 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (tokenize, "expected a Dataset, got a path: Dataset.load('x')"),
        (fit_graph, "expected a Dataset, got a path: Dataset.load('x')"),
        (train_end_to_end, "expected a Dataset, got a path: Dataset.load('x')"),
        (partial(add_column, config=SmoothConfig()), "expected a Dataset, got a path: Dataset.load('x')"),
        (partial(train, catalog=None), "expected a Dataset, got a path: Dataset.load('x')"),
        (partial(train, None), "expected a SemanticCatalog, got a path: SemanticCatalog.load('x')"),
        (
            lambda path: train(None, None, teacher=path),
            "expected a Recommender or ItemGraph, got a path: Recommender.from_pretrained('x') or ItemGraph.load('x')",
        ),
        (lambda path: train(None, None, graph=Path(path)), "expected an ItemGraph, got a path: ItemGraph.load('x')"),
        (
            lambda path: train_end_to_end(None, teacher=path),
            "expected a Recommender, got a path: Recommender.from_pretrained('x')",
        ),
        (lambda path: train_end_to_end(None, graph=path), "expected an ItemGraph, got a path: ItemGraph.load('x')"),
        (partial(compare, {}), "expected a Dataset, got a path: Dataset.load('x')"),
        (baselines, "expected a Dataset, got a path: Dataset.load('x')"),
        (lambda path: export(path, "tsv", "y"), "expected a SemanticCatalog, got a path: SemanticCatalog.load('x')"),
        (lambda path: extend(path, [], []), "expected a SemanticCatalog, got a path: SemanticCatalog.load('x')"),
        (
            lambda path: append("y", "z", tokenizer=path),
            "expected a SemanticTokenizer, got a path: SemanticTokenizer.from_pretrained('x')",
        ),
        (
            lambda path: encode_files(path, "y", "z"),
            "expected a SemanticTokenizer, got a path: SemanticTokenizer.from_pretrained('x')",
        ),
        (
            lambda path: export_program(path, "y"),
            "expected a Recommender, got a path: Recommender.from_pretrained('x')",
        ),
        (
            partial(Recommender.with_catalog, None),
            "expected a SemanticCatalog, got a path: SemanticCatalog.load('x')",
        ),
        (partial(Recommender.with_graph, None), "expected an ItemGraph, got a path: ItemGraph.load('x')"),
    ],
)
def test_a_path_in_place_of_what_it_holds_is_answered_with_its_loader(call, message):
    with pytest.raises(SemidError, match=re.escape(message)):
        call("x")


def test_it_is_made_once_and_read_again(tmp_path, caplog):
    caplog.set_level("INFO", "semid")
    first = stage(tmp_path / "a")
    again = stage(tmp_path / "a", text="never made")
    assert (first.text, again.text) == ("first", "first")
    assert "skipped" in caplog.text
    assert first.origin.digest == again.origin.digest == artifacts.read_artifact(tmp_path / "a", "model").digest
    manifest = first.origin.manifest
    assert (manifest.config, manifest.parents, manifest.seed) == ({"size": 3, "stage_version": 1}, REQUEST.parents, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"size": 4}}, "size: 3 -> 4"),
        ({"parents": {"dataset": "e" * 64}}, "parents.dataset: 'ddd"),
        ({"seed": 2}, "seed: 1 -> 2"),
        ({"version": 2}, "stage_version: 1 -> 2"),
    ],
)
def test_another_request_is_refused_and_says_what_differs(tmp_path, change, message):
    stage(tmp_path / "a")
    with pytest.raises(SemidError, match=message):
        stage(tmp_path / "a", dataclasses.replace(REQUEST, **change))
    assert stage(tmp_path / "a").text == "first"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert stage(None, log=True) == Note("first")
    assert list(tmp_path.iterdir()) == []


def test_the_history_goes_with_the_artifact_and_the_checkpoints_go(tmp_path):
    stage(tmp_path / "a", log=True)
    assert (tmp_path / "a" / "history.jsonl").read_text() == '{"step": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_result_is_worked_out_once_per_request(tmp_path):
    file, calls = tmp_path / "deep" / "r.json", []

    def work() -> dict[str, int]:
        calls.append(1)
        return {"answer": 42}

    assert [run_recorded({"seed": 1}, file, work) for _ in range(2)] == [{"answer": 42}] * 2
    assert len(calls) == 1
    with pytest.raises(SemidError, match=r"result of another request \(seed: 1 -> 2\)"):
        run_recorded({"seed": 2}, file, work)
    file.write_text(json.dumps({"rows": []}))
    with pytest.raises(SemidError, match="is not a result file of semid"):
        run_recorded({"seed": 1}, file, work)


def test_a_file_is_hashed_once_per_process_while_it_stays_as_it_is(tmp_path):
    stage(tmp_path / "a")
    before = files._sha256.cache_info().misses
    for _ in range(3):
        Note.load(tmp_path / "a")
    assert files._sha256.cache_info().misses <= before + 1
    (tmp_path / "a" / "note.txt").write_text("FIRST")
    with pytest.raises(SemidError, match=r"note\.txt: content does not match its sha256"):
        Note.load(tmp_path / "a")


def test_a_changed_file_is_not_copied(tmp_path):
    origin = stage(tmp_path / "a").origin
    origin.copy_file("note.txt", tmp_path / "b")
    assert (tmp_path / "b" / "note.txt").read_text() == "first"
    (tmp_path / "a" / "note.txt").write_text("other")
    with pytest.raises(SemidError, match=r"note\.txt: changed since .* was loaded; load it again"):
        origin.copy_file("note.txt", tmp_path / "c")
    (tmp_path / "a" / "note.txt").unlink()
    with pytest.raises(SemidError, match=r"note\.txt: gone since"):
        origin.copy_file("note.txt", tmp_path / "d")


def test_a_dataset_knows_what_its_added_columns_are_from(tmp_path):
    items = pa.table({"item_id": [f"i{row}" for row in range(24)], "title": ["a title"] * 24})
    interactions = pa.table({"user_id": ["u"] * 5, "item_id": [f"i{row}" for row in range(5)], "position": range(5)})
    world = Dataset.build(items, interactions, name="world")
    stored = world.save(tmp_path / "dataset")
    assert stored.parents == {"dataset": artifacts.read_artifact(tmp_path / "dataset", "dataset").digest}
    vectors, origin = np.ones((24, 2), np.float32), stage(tmp_path / "a").origin
    taught = stored.with_vectors("teacher", vectors, origin=origin)
    assert taught.parents == stored.parents | {"teacher": origin.digest}
    plain = [stored.with_vectors("v", value * vectors).parents["v"] for value in (1, 1, 2)]
    assert plain[0] == plain[1] != plain[2]
    in_memory = [world.digest, world.replace(name=world.name).digest, world.replace(name="other").digest]
    assert in_memory[0] == in_memory[1] != in_memory[2]
    assert stored.replace(name="other").origin is None


def never(_) -> Note:
    pytest.fail("the work was begun")


def test_the_place_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for run in (
        lambda: run_stage(REQUEST, tmp_path / "file" / "a", load=Note.load, work=never, write=Note.write),
        lambda: run_recorded({"seed": 1}, tmp_path / "file" / "r.json", lambda: never(None)),
    ):
        with pytest.raises(SemidError, match=r"file: is a file, and .* should go below it"):
            run()
    assert stage(tmp_path / "deep" / "a").text == "first"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_second_run_of_the_same_folder_is_refused_while_the_first_works(tmp_path, seed):
    refused = rf"a: in use by process {os.getpid()} on .*; wait for it, or choose another path \(--out\)"
    other = dataclasses.replace(REQUEST, seed=seed)

    def work(_) -> Note:
        with pytest.raises(SemidError, match=refused):
            run_stage(other, tmp_path / "a", load=Note.load, work=never, write=Note.write)
        return Note("first")

    assert run_stage(REQUEST, tmp_path / "a", load=Note.load, work=work, write=Note.write).text == "first"
    assert os.listdir(tmp_path) == ["a"]

    def record() -> int:
        with pytest.raises(SemidError, match=refused.replace("a:", r"r\.json:")):
            run_recorded({"seed": seed}, tmp_path / "r.json", lambda: never(None))
        return 1

    assert run_recorded({"seed": 1}, tmp_path / "r.json", record) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "r.json"]


def test_in_the_working_directory_checkpoints_lie_inside_and_what_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []

    def stopped(folder) -> Note:
        folders.append(folder)
        folder.mkdir()
        (folder / "request.json").write_text("{}")
        raise KeyboardInterrupt

    def work(folder) -> Note:
        assert (folder / "request.json").exists()
        (folder / "history.jsonl").write_text('{"step": 1}\n')
        return Note("second")

    with pytest.raises(KeyboardInterrupt):
        run_stage(REQUEST, ".", load=Note.load, work=stopped, write=Note.write)
    assert folders == [tmp_path / ".checkpoints"]
    assert os.listdir(tmp_path) == [".checkpoints"]
    monkeypatch.chdir(tmp_path.parent)  # from elsewhere, too
    assert run_stage(REQUEST, tmp_path, load=Note.load, work=work, write=Note.write).text == "second"
    assert sorted(os.listdir(tmp_path)) == ["history.jsonl", "manifest.json", "note.txt"]


def test_what_a_kill_left_next_to_a_finished_artifact_goes(tmp_path):
    stage(tmp_path / "a")
    dead = dataclasses.replace(Owner.this(), pid=999_999_999)
    (tmp_path / ".a.lock").write_text(json.dumps(dataclasses.asdict(dead)))
    (tmp_path / "a.checkpoints").mkdir()
    (tmp_path / "a.checkpoints" / "request.json").write_text("{}")
    stage(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """URL of an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield "memory://bucket"
    fsspec.filesystem("memory").store.clear()


def test_a_stage_of_a_url_is_made_once_whatever_machine_asks(bucket, tmp_path, caplog):
    caplog.set_level("INFO", "semid")
    first = stage(f"{bucket}/a", log=True)
    assert run_recorded({"seed": 1}, f"{bucket}/r.json", lambda: 7) == 7
    assert fsspec.filesystem("memory").find("/bucket") == [
        f"/bucket/{name}" for name in ("a/history.jsonl", "a/manifest.json", "a/note.txt", "r.json")
    ]
    shutil.rmtree(tmp_path / "cache")
    again = run_stage(REQUEST, f"{bucket}/a", load=Note.load, work=never, write=Note.write)
    assert (again.text, again.origin.digest) == (first.text, first.origin.digest)
    assert run_recorded({"seed": 1}, f"{bucket}/r.json", lambda: never(None)) == 7
    assert "memory://bucket/a: this model exists" in caplog.text


def test_several_processes_are_refused_a_url(bucket, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(
        SemidError, match="memory://bucket/a: several processes need a folder on a disk that they share"
    ):
        run_stage(REQUEST, f"{bucket}/a", load=Note.load, work=never, write=Note.write)


@pytest.mark.parametrize("kind", [Kind.CATALOG, Kind.MODEL, Kind.GRAPH])
def test_several_processes_train_nothing_without_a_folder(kind, monkeypatch):
    request = dataclasses.replace(REQUEST, kind=kind)
    assert stage(None, request).text == "first"
    monkeypatch.setattr("jax.process_count", lambda: 2)
    if kind is Kind.GRAPH:  # control: it has no checkpoints, and each process makes the same
        assert stage(None, request).text == "first"
        return
    with pytest.raises(
        SemidError, match=r"^several processes need one folder for the checkpoints that they share; set"
    ):
        run_stage(request, None, load=Note.load, work=never, write=Note.write)


def test_events_that_cannot_be_written_are_refused_before_any_work(bucket, tmp_path, monkeypatch):
    watched = dataclasses.replace(REQUEST, settings={"stages": [{"training": {"tensorboard": True}}]})
    make = {"load": Note.load, "write": Note.write}
    with pytest.raises(SemidError, match="memory://bucket/a: tensorboard writes its events while training goes on"):
        run_stage(watched, f"{bucket}/a", work=never, **make)
    pytest.importorskip("tensorboardX")
    assert stage(tmp_path / "a", watched).text == "first"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert stage(tmp_path / "a", watched, text="never made").text == "first"  # what is finished needs no extra
    for out in (tmp_path / "b", None):
        with pytest.raises(SemidError, match=r"needs the extra: pip install 'semid\[tensorboard\]'"):
            run_stage(watched, out, work=never, **make)
    assert stage(tmp_path / "b").text == "first"
