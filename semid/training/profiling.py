"""Wall time of a run by activity, and profiler traces of its steps."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from semid import artifacts
from semid.errors import SemidError

T = TypeVar("T")

# Steps before the traced ones: the first compiles, and the second fills queues.
_BEFORE = 2


class WallTime:
    """Wall time since its creation, by activity; time of no other activity counts as that of steps.

    Devices work asynchronously: their time is the host's waiting time, which counts as that of steps.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._start, self._spent = now, now(), dict[str, float]()

    @contextlib.contextmanager
    def spent_on(self, name: str) -> Iterator[None]:
        """Count the time of the block as `name`."""
        start = self._now()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + self._now() - start

    def timed(self, name: str, values: Iterator[T]) -> Iterator[T]:
        """The values, with the time to get each counted as `name`."""
        while True:
            with self.spent_on(name):
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    def first_timed(self, name: str, call: Callable[..., T]) -> Callable[..., T]:
        """The function, with the time of its first call counted as `name`."""
        first = True

        def timed(*arguments: Any) -> T:
            nonlocal first
            with self.spent_on(name) if first else contextlib.nullcontext():
                first = False
                return call(*arguments)

        return timed

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the wall time of steps (the goodput) and of all other activities; they sum to 1."""
        total = max(self._now() - self._start, 1e-9)
        others = {name: seconds / total for name, seconds in self._spent.items()}
        return {"steps": 1 - sum(others.values())} | others

    def __str__(self) -> str:
        parts = ", ".join(f"{share:.1%} {name}" for name, share in self.shares.items())
        return f"{timedelta(seconds=round(self._now() - self._start))}: {parts}"


class _Profile(NamedTuple):
    folder: Path
    steps: int


_CHOSEN: contextvars.ContextVar[_Profile | None] = contextvars.ContextVar("profile", default=None)


@contextlib.contextmanager
def profiled(folder: str | Path, *, steps: int = 10) -> Iterator[None]:
    """Trace some compiled steps of every training in the block, each into a folder of its own below `folder`.

    TensorBoard's profiler (xprof) opens the traces. Raises SemidError for a folder that cannot be written, or a URL.
    """
    if steps < 1:
        raise SemidError(f"expected at least 1 step to trace, got {steps}")
    artifacts.local_only(folder, "traces are written while training goes on")
    token = _CHOSEN.set(_Profile(artifacts.try_file(Path(folder) / "trace").parent, steps))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@contextlib.contextmanager
def traced_steps(title: str, *, first: int) -> Iterator[Callable[[int, T, Any], T]]:
    """Yield a hook of the training loop that traces some steps after `first`, if `profiled` is active."""
    chosen, running = _CHOSEN.get(), False
    start = first + _BEFORE

    def trace(at: int, state: T, metrics: Any) -> T:
        nonlocal running
        if chosen is not None and at in (start, start + chosen.steps):
            jax.block_until_ready(metrics)
            if at == start:
                jax.profiler.start_trace(str(chosen.folder / title.replace("/", "_")))
                running = True
            elif running:
                jax.profiler.stop_trace()
                running = False
        return state

    try:
        yield trace
    finally:
        if running:
            jax.profiler.stop_trace()
