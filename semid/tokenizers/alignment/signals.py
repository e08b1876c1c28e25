"""Tables that alignments read, computed from a dataset's training interactions once, before training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from semid.data import Dataset
from semid.errors import SemidError
from semid.graphs import (
    CoConsumption,
    PpmiConfig,
    Signal,
    interactions_matrix,
    sample_partners,
    standardize_known,
    user_vectors,
)
from semid.tokenizers.alignment.base import AlignmentConfig, Signals


def read_signals(
    dataset: Dataset,
    alignments: Sequence[AlignmentConfig],
    signal: Signal,
    x: Float[np.ndarray, "items dim"],
    *,
    seed: int,
    co_consumption: CoConsumption | None = None,
) -> Signals:
    """Tables that the alignments need, from training interactions (and a vector column) alone.

    `co_consumption` shares its draws with others of the same seed. Without alignments nothing is computed.
    Raises SemidError naming the signal that the dataset cannot give.
    """
    if not alignments:
        return Signals()
    if len({type(config) for config in alignments}) < len(alignments):
        raise SemidError("an alignment is named twice; name each once and set its weight")
    windows = [config.co_consumption_window for config in alignments if config.co_consumption_window is not None]
    window = windows[0] if windows else PpmiConfig().window
    drawn = co_consumption or CoConsumption(dataset.splits.train, num_items=dataset.num_items, seed=seed)
    reader = _Reader(dataset, signal, x, drawn, window=window, seed=seed)
    needed = {"known"}.union(*(config.needs for config in alignments))
    tables = {name: getattr(reader, name) for name in Signals._fields if name in needed}
    floats = {name: value.astype(np.float32) for name, value in tables.items() if value.dtype.kind == "f"}
    return Signals(**{name: jnp.asarray(value) for name, value in (tables | floats).items()})


class _Reader:
    """The tables of `Signals`, each computed when it is read first."""

    def __init__(
        self,
        dataset: Dataset,
        signal: Signal,
        x: Float[np.ndarray, "items dim"],
        drawn: CoConsumption,
        *,
        window: int,
        seed: int,
    ) -> None:
        self.drawn = drawn
        self.dataset, self.signal, self.x, self.window, self.seed = dataset, signal, x, window, seed
        self.train, self.num_items, self.num_users = dataset.splits.train, dataset.num_items, dataset.num_users

    @functools.cached_property
    def _clicks(self) -> Any:
        return interactions_matrix(self.train, num_items=self.num_items, num_users=self.num_users)

    @functools.cached_property
    def _popularity(self) -> Int[np.ndarray, " items"]:
        return np.diff(self._clicks.tocsc().indptr)

    @property
    def known(self) -> Bool[np.ndarray, " items"]:
        return self._popularity > 0

    @functools.cached_property
    def vectors(self) -> Float[np.ndarray, "items signal"]:
        return standardize_known(self.signal.item_vectors(self.dataset, seed=self.seed), self.known)

    @functools.cached_property
    def partners(self) -> Int[np.ndarray, "items sample"]:
        return self.drawn.partners(self.window)

    @property
    def partner_log_share(self) -> Float[np.ndarray, " items"]:
        return _log_share(self.partners, self.num_items)

    @functools.cached_property
    def consumers(self) -> Int[np.ndarray, "items sample"]:
        return sample_partners(self._clicks.T, seed=self.seed)

    @property
    def consumer_log_share(self) -> Float[np.ndarray, " users"]:
        return _log_share(self.consumers, self.num_users)

    @property
    def users(self) -> Float[np.ndarray, "users dim"]:
        return user_vectors(self.train, self.x, num_users=self.num_users)

    @property
    def user_vectors(self) -> Float[np.ndarray, "users signal"]:
        return user_vectors(self.train, self.vectors, num_users=self.num_users)

    @property
    def log_popularity(self) -> Float[np.ndarray, " items"]:
        return np.log1p(self._popularity)

    @property
    def log_activity(self) -> Float[np.ndarray, " users"]:
        return np.log1p(np.diff(self._clicks.indptr))


def _log_share(drawn: Int[np.ndarray, "n sample"], size: int) -> Float[np.ndarray, " size"]:
    """Log of the share of each index among all that were drawn: the correction of in-batch negatives (log-Q)."""
    counts = np.bincount(drawn[drawn >= 0], minlength=size)
    return np.log(np.maximum(counts, 1) / max(counts.sum(), 1))
