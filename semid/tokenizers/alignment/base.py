"""The interface of alignments: a config, and the module that it builds."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from quantizers import Schedule
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Pass, Tables
from semid.training import StepContext


class Signals(NamedTuple):
    """Device tables that alignments read, None if none does. Partners and consumers are -1 for items without any."""

    known: Bool[Any, " items"] = None
    """Items with a training interaction."""
    vectors: Float[Any, "items signal"] = None
    """Collaborative vectors of the items, standardized."""
    partners: Int[Any, "items sample"] = None
    """Co-consumed items, drawn by PPMI."""
    partner_log_share: Float[Any, " items"] = None
    """Log of how often each item is drawn as a partner."""
    consumers: Int[Any, "items sample"] = None
    """Users of each item."""
    consumer_log_share: Float[Any, " users"] = None
    """Log of how often each user is drawn as a consumer."""
    users: Float[Any, "users dim"] = None
    """Mean content of each user's items."""
    user_vectors: Float[Any, "users signal"] = None
    """Mean collaborative vector of each user's items."""
    log_popularity: Float[Any, " items"] = None
    log_activity: Float[Any, " users"] = None


class Alignment(nnx.Module):
    """A collaborative loss added to reconstruction and quantization, with its own parameters."""

    @abc.abstractmethod
    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted loss of the item rows `rows`, whose pass through `model` is `items`, and metrics to log."""


class AlignmentConfig(abc.ABC):
    """Settings of an alignment. A new one is a file here with config and module, exported in `semid.tokenizers`."""

    name: ClassVar[str]
    """Name on the command line, and of its options there."""
    needs: ClassVar[frozenset[str]]
    """Fields of `Signals` that it reads besides `known`."""
    weight: Schedule

    @property
    def co_consumption_window(self) -> int | None:
        """Positions of a history within which items are co-consumed; None: no window of its own."""
        return None

    @abc.abstractmethod
    def build(self, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int) -> Alignment:
        """Build the module that aligns an autoencoder of settings `method` on content of `dim` dimensions."""


def draw_entries(
    table: Int[Array, "items sample"], rows: Int[Array, " n"], key: Array
) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """One random entry of each row, and a mask of the rows that have any."""
    entries = table[rows, jax.random.randint(key, rows.shape, 0, table.shape[1])]
    return jnp.maximum(entries, 0), entries >= 0


def is_entry(entries: Int[Array, "n sample"], candidates: Int[Array, " m"]) -> Bool[Array, "n m"]:
    """Mask of the candidates that are among each row's entries."""
    return (entries[:, None, :] == candidates[None, :, None]).any(-1)
