"""Encoding on a Dask cluster of real processes: the codes of one process, though a worker is killed at its work."""

import importlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, Future

from quantizers import tie_break
from semid.bulk import cluster, encode_files, write_catalog
from semid.bulk.cluster import encode_on_cluster
from semid.bulk.encoding import Done, Job
from semid.catalog import SemanticCatalog
from semid.cli import main
from semid.data import Dataset
from semid.errors import SemidError
from semid.tokenizers import RQKmeansConfig, SemanticTokenizer, TokenizerConfig, tokenize

DIM, ROWS, FILES = 8, 60, 6

# A file system for the workers, loaded at their start: who opens the file `stalls` first says so through a pipe, with
# its process, and reads it never; who opens `breaks` loses the connection.
STALLING = """
import os, threading
import fsspec
from fsspec.implementations.local import LocalFileSystem

class Stalling(LocalFileSystem):
    protocol = "stalling"

    def _open(self, path, *arguments, **options):
        if path.endswith("items/stalls.parquet"):
            try:
                os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                with open({pipe!r}, "w") as pipe:
                    pipe.write(str(os.getpid()))
                threading.Event().wait()
        if path.endswith("items/breaks.parquet"):
            raise ConnectionResetError("connection reset")
        return super()._open(path, *arguments, **options)

fsspec.register_implementation("stalling", Stalling, clobber=True)
"""


def _items(seed: int) -> pa.Table:
    """Items of a few clusters, so that codes collide; ids that do not come in order; vectors of no use before those
    that the tokenizer is fitted to."""
    rng = np.random.default_rng(seed)
    x = rng.integers(4, size=(ROWS, 1)) + rng.normal(scale=0.01, size=(ROWS, DIM))
    flat = pa.array(x.astype(np.float32).reshape(-1))
    ids = [f"{number * 7919 % 1000:03d}-{seed}" for number in range(ROWS)]
    vectors = pa.FixedSizeListArray.from_arrays(flat, DIM)
    return pa.table({"item_id": ids, "other": vectors, "content": vectors})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A catalogue, and files of items: of one of them the workers' file system knows."""
    home = tmp_path_factory.mktemp("cluster")
    items = _items(0)
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": items["item_id"][:3], "position": [0, 1, 2]})
    dataset = Dataset.build(items.select(["item_id"]), interactions, name="tiny")
    vectors = items["content"].combine_chunks().flatten().to_numpy().reshape(ROWS, DIM)
    config = TokenizerConfig(RQKmeansConfig((3, 2), iterations=3))
    tokenize(dataset.with_vectors("content", vectors), config, out=home / "catalog")
    (home / "items").mkdir()
    for number in range(FILES):
        name = "stalls" if number == 2 else f"part{number}"
        pq.write_table(_items(number), home / f"items/{name}.parquet")
    return home


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def scheduler(home):
    """A scheduler and two workers, each a process; the scheduler's address."""
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    (home / "stalling.py").write_text(STALLING.format(marker=str(home / "marker"), pipe=str(home / "pipe")))
    os.mkfifo(home / "pipe")
    quiet = {"stdout": subprocess.DEVNULL, "cwd": home, "text": True}
    started = [
        subprocess.Popen(
            [*dask, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"], stderr=subprocess.PIPE, **quiet
        )
    ]
    try:
        address = next(line.split()[-1] for line in started[0].stderr if "Scheduler at:" in line)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1"]
        options = ["--no-dashboard", "--host", "127.0.0.1", "--preload", str(home / "stalling.py")]
        started += [subprocess.Popen([*worker, *options], stderr=subprocess.DEVNULL, **quiet) for _ in range(2)]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=300)
        yield address
    finally:
        for process in started:
            _stop(process)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def encoded(home, scheduler):
    """The files encoded here and, with the workers, there, where the one that holds `stalls` is killed."""
    files, killed = [str(path) for path in sorted((home / "items").iterdir())], []
    tokenizer = SemanticTokenizer.from_pretrained(home / "catalog")

    def kill() -> None:
        killed.append(int((home / "pipe").read_text()))  # there once a worker is at the file
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        importlib.import_module("stalling")
    inputs = [f"stalling://{file}" for file in files]
    there = encode_files(tokenizer, inputs, f"stalling://{home}/there", scheduler=scheduler)
    assert len(killed) == 1
    return encode_files(tokenizer, files, home / "here"), there


def test_a_worker_killed_at_its_work_changes_nothing(home, encoded):
    here, there = encoded
    assert (there.items, there.skipped) == (here.items, here.skipped) == (FILES * ROWS, [])
    assert _content(home / "there") == _content(home / "here")
    assert len(_content(home / "there")) == FILES


def test_the_catalogues_of_both_are_the_same(home, encoded):
    for name, codes in zip(("catalog_here", "catalog_there"), encoded, strict=True):
        write_catalog(codes.outputs, home / name, tokenizer=home / "catalog")
    here, there = (SemanticCatalog.read(home / name / "catalog.parquet") for name in ("catalog_here", "catalog_there"))
    assert here.digest == there.digest
    assert len(here) == FILES * ROWS
    np.testing.assert_array_equal(here.codes, tie_break(here.codes[:, :-1]).codes)
    assert here.level_sizes[-1] > 1


def test_the_command_names_what_failed_and_goes_on_with_what_it_lacks(home, scheduler, encoded, tmp_path, capsys):
    for number in range(2):
        pq.write_table(_items(number), tmp_path / f"{number}.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    line = f"tokenize --catalog {home}/catalog --out {tmp_path}/codes --scheduler {scheduler}"
    with pytest.raises(SystemExit):
        main(f"{line} --input {tmp_path}/*.parquet".split())
    *progress, first, bad = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("encoding: ", "not used: ")) for line in progress), progress
    assert first == "semid: 1 of 3 files failed, the codes of the others are kept:"
    assert f"{tmp_path}/bad.parquet: not a readable Parquet file" in bad
    pq.write_table(_items(2), tmp_path / "2.parquet")
    main(f"{line} --input {tmp_path}/[0-9].parquet".split())
    said = capsys.readouterr().out
    assert "2 files were encoded before; skipped" in said
    assert f"{tmp_path}/codes: {ROWS} items" in said.replace("\n", "")
    assert set(_content(tmp_path / "codes")) == {f"{number}.parquet" for number in range(3)}


def test_a_failure_that_is_not_the_files_is_told_after_all_tries(home, scheduler, encoded, tmp_path):
    tokenizer, source = SemanticTokenizer.from_pretrained(home / "catalog"), f"stalling://{home}/items/breaks.parquet"
    (home / "items/breaks.parquet").touch()
    with pytest.raises(SemidError, match=r"breaks.parquet: not encoded to .*codes/breaks.parquet \(\w+Error: .*reset"):
        encode_files(tokenizer, [source], tmp_path / "codes", scheduler=scheduler, retries=1)


def test_a_result_that_died_with_its_worker_is_waited_for():
    job = Job("items/a.parquet", "codes/a.parquet", "digest", "item_id", (), 8)
    future = create_autospec(Future, instance=True, status="lost")
    future.result.return_value = Done(items=3)
    future.exception.side_effect = lambda: setattr(future, "status", "finished")  # waiting for the repetition
    assert cluster._done(job, future) == Done(items=3)
    future.status = "cancelled"
    assert "its task was cancelled" in cluster._done(job, future).fault


def test_a_scheduler_that_is_not_there_is_named(home):
    tokenizer = SemanticTokenizer.from_pretrained(home / "catalog")
    with pytest.raises(SemidError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1 \(waited 0.1 s\)"):
        list(
            encode_on_cluster(
                tokenizer, [], scheduler="tcp://127.0.0.1:1", retries=0, on_progress=lambda *_: None, timeout=0.1
            )
        )
