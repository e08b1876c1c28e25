"""Encoding on a Dask cluster: a file is a task, and every worker process builds the tokenizer once.

Dask manages the tasks in memory, reassigns those of dead workers, and retries failures.
"""

from __future__ import annotations

import contextlib
import functools
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import cast

from distributed import Client, Future, WorkerPlugin, as_completed, get_worker
from distributed.comm.core import CommClosedError

from semid.bulk.encoding import Done, Job, encode_file, failed
from semid.config import from_dict, to_dict
from semid.errors import SemidError
from semid.tokenizers import SemanticTokenizer, TokenizerConfig

_ADDRESS = re.compile(r"(tcp|tls|ucx)://[^/\s]+:[0-9]+")


class Carrier(WorkerPlugin):
    """Sends a tokenizer, in plain values, to every worker of a cluster, including those that join later."""

    def __init__(self, tokenizer: SemanticTokenizer) -> None:
        self.name = f"semid-tokenizer-{uuid.uuid4().hex}"
        self._config, self._tensors = to_dict(tokenizer.config), tokenizer.tensors()
        self._columns, self._encoders = tokenizer.columns, tokenizer.encoders
        self._source_columns = dict(tokenizer.source_columns)

    @functools.cached_property
    def tokenizer(self) -> SemanticTokenizer:
        """Built at its first use in a process."""
        config = from_dict(TokenizerConfig, self._config)
        return SemanticTokenizer.from_tensors(
            config,
            self._tensors,
            columns=self._columns,
            encoders=self._encoders,
            source_columns=self._source_columns,
            where=self.name,
        )


def encode_on_cluster(
    tokenizer: SemanticTokenizer,
    jobs: Sequence[Job],
    *,
    scheduler: str,
    retries: int,
    on_progress: Callable[[int, int], None],
    timeout: float = 10.0,
) -> Iterator[tuple[Job, Done]]:
    """Encode on a cluster: yield the outcome of every job in the order in which the workers of `scheduler` finish them.

    Raises SemidError for an invalid address, if no scheduler answers within `timeout` seconds, and if it disappears.
    """
    with _connect(scheduler, timeout) as client:
        _check_workers(client)
        try:
            with _carried(tokenizer, client) as name:
                futures = client.map(_encode, jobs, plugin=name, retries=retries, pure=False)
                job_of = dict(zip(futures, jobs, strict=True))
                del futures  # the cluster drops the result of a task without references
                for future in as_completed(list(job_of), loop=client.loop):
                    job = job_of.pop(future)
                    done = _done(job, future)
                    if not done.fault:
                        on_progress(done.items, 1)
                    yield job, done
        except CommClosedError:
            message = f"the scheduler at {scheduler} went away; what was encoded is kept, run it again for the rest"
            raise SemidError(message) from None


@contextlib.contextmanager
def _carried(tokenizer: SemanticTokenizer, client: Client) -> Iterator[str]:
    """Yield the plugin name under which the workers have the tokenizer."""
    carrier = Carrier(tokenizer)
    client.register_plugin(carrier)
    try:
        yield carrier.name
    finally:
        client.unregister_worker_plugin(carrier.name)


def _connect(scheduler: str, timeout: float) -> Client:
    if not _ADDRESS.fullmatch(scheduler):
        raise SemidError(f"scheduler {scheduler!r}: expected local, or an address such as tcp://10.0.0.1:8786")
    try:
        return Client(scheduler, timeout=timeout, set_as_default=False)
    except (OSError, TimeoutError):
        message = f"no Dask scheduler answers at {scheduler} (waited {timeout:g} s); is `dask scheduler` running there?"
        raise SemidError(message) from None


def _check_workers(client: Client) -> None:
    """Warn if there are no workers yet. Raises SemidError for a worker with another semid, whose codes may differ."""
    own, found = version("semid"), client.run(version, "semid", on_error="return")
    if not found:
        warnings.warn("the scheduler has no workers yet; waiting for some", stacklevel=3)
    for worker, there in found.items():
        if there != own:
            raise SemidError(f"worker {worker}: expected semid {own} as here, found {there!r}; install the same there")


def _encode(job: Job, *, plugin: str) -> Done:
    return encode_file(cast(Carrier, get_worker().plugins[plugin]).tokenizer, job)


def _done(job: Job, future: Future) -> Done:
    """The result of a finished task; a fault if all tries failed, the workers died, or the scheduler is gone."""
    while future.status == "lost":  # the worker with the result died, and the scheduler repeats the task
        future.exception()  # waits for the repetition
    if future.status == "finished":
        return future.result()
    if future.status == "error":
        return Done(fault=failed(job, future.exception()))
    return Done(fault=f"{job.source}: not encoded to {job.output} (its task was {future.status}; run it again)")
