"""Collaborative alignment: losses that teach the tokenizer, in the very steps that train it, what users do with items.

A signal is read from the training interactions once (`Signals`); each alignment is a config block and the module that
it makes, with the heads and embeddings that are trained along and left behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from quantizers import Schedule, debias_loss, debiased_click_loss, info_nce
from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.graphs import (
    LightGCNConfig,
    cooccurrence,
    interactions_matrix,
    ppmi,
    ppmi_vectors,
    sample_partners,
    train_lightgcn,
    user_vectors,
)
from semid.tokenizers.rqvae import RQVAE, Alignment, Pass, RQVaeConfig, Tables, autoencoder_loss
from semid.training import StepContext

# Partners and consumers kept of each item: drawn once on the host, one of them taken in every step.
_SAMPLES = 32


@dataclass(frozen=True)
class PpmiConfig:
    """Item vectors from co-occurrence: PPMI and truncated SVD (Levy, Goldberg & Dagan, 2015)."""

    dim: int = 64
    """Dimensions of the vectors."""
    window: int = 5
    """Positions of a history within which two items co-occur."""


@dataclass(frozen=True)
class VectorColumn:
    """Item vectors that the dataset has as a column, such as those of a trained SASRec."""

    name: str
    """The column."""


Signal = PpmiConfig | LightGCNConfig | VectorColumn


@dataclass(frozen=True)
class LetterConfig:
    """Item-to-item: each quantized vector, projected, finds its own collaborative vector (LETTER, arXiv 2405.07314)."""

    weight: Schedule = Schedule(1.0)
    """Weight of the loss."""
    temperature: float = 0.5
    """Of the cosines. Lower ones tell single items apart, which takes codes from what groups of items share."""


@dataclass(frozen=True)
class DistillConfig:
    """Item-to-item, by regression: each quantized vector, projected, is to equal its own collaborative vector."""

    weight: Schedule = Schedule(1.0)
    """Weight of the mean squared error, beside a weight of 1 of the content's."""


@dataclass(frozen=True)
class CooccurrenceConfig:
    """Co-consumed items: each quantized vector finds that of an item of the same users, drawn by PPMI."""

    weight: Schedule = Schedule(0.3)
    """Weight of the loss."""
    temperature: float = 0.1
    """Of the cosines."""
    window: int = 5
    """Positions of a history within which two items are co-consumed."""


@dataclass(frozen=True)
class DasConfig:
    """Dual views, users quantized too, against interests rid of popularity (DAS, arXiv 2508.10584)."""

    weight: Schedule = Schedule(0.1)
    """Weight of each of the six views: user-item, same entity and co-occurrence, from either side."""
    temperature: float = 0.07
    """Of the cosines."""
    click: float = 0.1
    """Weight of the click model whose interests and properties are aligned with."""
    debias: float = 0.1
    """Weight of keeping popularity and conformity apart from them."""


AlignmentConfig = LetterConfig | DistillConfig | CooccurrenceConfig | DasConfig


class Signals(NamedTuple):
    """Device tables; what no alignment reads is None. `partners` and `consumers` are -1 where an item has none."""

    known: Bool[Any, " items"] = None
    vectors: Float[Any, "items signal"] = None
    partners: Int[Any, "items sample"] = None
    partner_log_share: Float[Any, " items"] = None
    consumers: Int[Any, "items sample"] = None
    consumer_log_share: Float[Any, " users"] = None
    users: Float[Any, "users dim"] = None
    user_vectors: Float[Any, "users signal"] = None
    log_popularity: Float[Any, " items"] = None
    log_activity: Float[Any, " users"] = None


def make_signals(
    dataset: Dataset,
    alignments: Sequence[AlignmentConfig],
    signal: Signal,
    x: Float[np.ndarray, "items dim"],
    *,
    seed: int,
) -> Signals:
    """All that the alignments read, from training interactions (and a vector column) alone.

    Nothing is read for no alignments. Raises SemidError naming the signal that the dataset cannot give.
    """
    if not alignments:
        return Signals()
    train, items, users = dataset.splits.train, dataset.num_items, dataset.num_users
    clicks = interactions_matrix(train, num_items=items, num_users=users)
    popularity, activity = np.diff(clicks.tocsc().indptr), np.diff(clicks.indptr)
    found: dict[str, np.ndarray] = {"known": popularity > 0}
    kinds = {type(config) for config in alignments}
    if len(kinds) < len(alignments):
        raise SemidError("an alignment is named twice; name each once and set its weight")
    if kinds & {LetterConfig, DistillConfig, DasConfig}:
        found["vectors"] = standardized(item_vectors(dataset, train, signal, seed=seed), found["known"])
    if DasConfig in kinds:
        found["consumers"] = sample_partners(clicks.T.tocsr(), samples=_SAMPLES, seed=seed)
        found["consumer_log_share"] = _log_share(found["consumers"], users)
        found["users"] = user_vectors(train, x, num_users=users)
        found["user_vectors"] = user_vectors(train, found["vectors"], num_users=users)
        found["log_popularity"], found["log_activity"] = np.log1p(popularity), np.log1p(activity)
    windows = [config.window for config in alignments if isinstance(config, CooccurrenceConfig)]
    window = windows[0] if windows else PpmiConfig().window
    if CooccurrenceConfig in kinds or DasConfig in kinds:
        found["partners"] = co_consumed(train, num_items=items, window=window, seed=seed)
        found["partner_log_share"] = _log_share(found["partners"], items)
    floats = {name: value.astype(np.float32) for name, value in found.items() if value.dtype.kind == "f"}
    return Signals(**{name: jnp.asarray(value) for name, value in (found | floats).items()})


def item_vectors(dataset: Dataset, train: Histories, signal: Signal, *, seed: int) -> Float[np.ndarray, "items signal"]:
    """The collaborative item vectors that `signal` names. Raises SemidError naming what the dataset lacks."""
    if isinstance(signal, VectorColumn):
        if signal.name not in dataset.vector_columns:
            raise SemidError(
                f"dataset {dataset.name!r} has no vector column {signal.name!r} to align with (it has "
                f"{', '.join(dataset.vector_columns) or 'none'}); name one of them, or another signal"
            )
        return dataset.vectors(signal.name)
    if isinstance(signal, PpmiConfig):
        return ppmi_vectors(train, num_items=dataset.num_items, dim=signal.dim, window=signal.window, seed=seed)
    users = dataset.num_users
    return train_lightgcn(train, num_items=dataset.num_items, num_users=users, config=signal, seed=seed).items


def standardized(vectors: Float[np.ndarray, "n dim"], known: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
    """Zero mean and unit variance by dimension over the known items (around a common mean all cosines are near 1); zero
    for the others."""
    deviation = vectors[known].std(0)
    scaled = (vectors - vectors[known].mean(0)) / np.where(deviation > 1e-8, deviation, np.inf)
    return np.where(known[:, None], scaled, 0)


def co_consumed(train: Histories, *, num_items: int, window: int, seed: int) -> Int[np.ndarray, "items sample"]:
    """Items within `window` positions of each item in a training history, drawn with PPMI weights; -1: there are none.

    Raises SemidError when no item has one.
    """
    partners = sample_partners(
        ppmi(cooccurrence(train, num_items=num_items, window=window)), samples=_SAMPLES, seed=seed
    )
    if (partners < 0).all():
        raise SemidError(
            "no training history holds two different items, so no items are co-consumed; align with another signal"
        )
    return partners


def _log_share(drawn: Int[np.ndarray, "n sample"], size: int) -> Float[np.ndarray, " size"]:
    """Log of how often each is drawn: the correction of in-batch negatives (log-Q)."""
    counts = np.bincount(drawn[drawn >= 0], minlength=size)
    return np.log(np.maximum(counts, 1) / max(counts.sum(), 1))


class _Projected(Alignment):
    """An alignment that sees quantized vectors through a linear head of `dim` outputs."""

    def __init__(self, config: Any, *, latent: int, dim: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head = nnx.Linear(latent, dim, rngs=rngs)


class Letter(_Projected):
    """See LetterConfig."""

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        quantized, own = self.head(items.quantized.vectors), signals.vectors[rows]
        loss = _find_each_other(quantized, own, self.config.temperature, ids=(rows, rows), mask=signals.known[rows])
        return self.config.weight(context.progress) * loss, {"alignment/letter": loss}


class Distill(_Projected):
    """See DistillConfig."""

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        error = jnp.square(self.head(items.quantized.vectors) - signals.vectors[rows]).mean(-1)
        known = signals.known[rows].astype(jnp.float32)
        loss = jnp.sum(error * known) / jnp.maximum(jnp.sum(known), 1)
        return self.config.weight(context.progress) * loss, {"alignment/distill": loss}


class Cooccurrence(Alignment):
    """See CooccurrenceConfig."""

    def __init__(self, config: CooccurrenceConfig, *, latent: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.head = nnx.Linear(latent, latent, rngs=rngs)

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        draw_key, search_key = jax.random.split(context.key)
        partners, mask = _drawn(signals.partners, rows, draw_key)
        others = model(tables.x[partners], key=search_key, progress=context.progress)
        loss = info_nce(
            self.head(items.quantized.vectors),
            self.head(others.quantized.vectors),
            temperature=self.config.temperature,
            mask=mask,
            ids=partners,
            false_negatives=_among(signals.partners[rows], partners) | (rows[:, None] == partners[None, :]),
            log_popularity=signals.partner_log_share[partners],
        )
        return self.config.weight(context.progress) * loss, {"alignment/cooccurrence": loss}


class Das(Alignment):
    """See DasConfig. Interests start from the means of the users' collaborative vectors, properties from the items'."""

    def __init__(
        self, config: DasConfig, method: RQVaeConfig, *, dim: int, signals: Signals, seed: int, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.method = dataclasses.replace(method, diversity=0.0)  # which is of codes clustered: the items' are
        self.users = RQVAE(method, dim=dim, rngs=rngs)
        self.users.initialize(np.asarray(signals.users), iterations=method.kmeans_iterations, seed=seed)
        width = signals.vectors.shape[1]
        self.item_head = nnx.Linear(method.latent, width, rngs=rngs)
        self.user_head = nnx.Linear(method.latent, width, rngs=rngs)
        self.interest = nnx.Param(signals.user_vectors * width**-0.5)
        self.property = nnx.Param(signals.vectors * width**-0.5)
        self.conformity = nnx.Param(0.1 * jax.random.normal(rngs.params(), self.interest.shape))
        self.popularity = nnx.Param(0.1 * jax.random.normal(rngs.params(), self.property.shape))
        self.from_popularity = nnx.Linear(1, width, rngs=rngs)
        self.from_activity = nnx.Linear(1, width, rngs=rngs)

    def __call__(
        self, model: RQVAE, rows: Int[Array, " n"], items: Pass, tables: Tables, context: StepContext
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        signals: Signals = tables.signals
        user_key, other_key, partner_key, search_key = jax.random.split(context.key, 4)
        users, mask = _drawn(signals.consumers, rows, user_key)
        passed = self.users(signals.users[users], key=search_key, progress=context.progress)
        self.users.quantizer.update_statistics(passed.found, mask=mask)
        loss, _ = autoencoder_loss(self.users, self.method, passed)
        click, debias = self._click_model(rows, users, signals, mask)
        views = self._views(rows, users, items, passed, signals, mask, (other_key, partner_key))
        loss += self.config.click * click + self.config.debias * debias
        loss += self.config.weight(context.progress) * sum(views.values(), jnp.zeros(()))
        metrics = {f"alignment/{name}": value for name, value in views.items()}
        return loss, {"alignment/click": click, "alignment/debias": debias, **metrics}

    def _click_model(
        self, rows: Int[Array, " n"], users: Int[Array, " n"], signals: Signals, mask: Bool[Array, " n"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The users' clicks on the items, and how far popularity has crept into interests and properties."""
        interest, conformity = self.interest[...][users], self.conformity[...][users]
        of_item, popularity = self.property[...][rows], self.popularity[...][rows]
        false = _among(signals.consumers[rows], users).T
        click = debiased_click_loss(
            interest, conformity, of_item, popularity, mask=mask, ids=rows, false_negatives=false
        )
        observed_items = self.from_popularity(signals.log_popularity[rows][:, None])
        observed_users = self.from_activity(signals.log_activity[users][:, None])
        sides = ((of_item, popularity, observed_items), (interest, conformity, observed_users))
        return click, sum((sum(debias_loss(*side, mask=mask)) for side in sides), jnp.zeros(()))

    def _views(
        self,
        rows: Int[Array, " n"],
        users: Int[Array, " n"],
        items: Pass,
        passed: Pass,
        signals: Signals,
        mask: Bool[Array, " n"],
        keys: tuple[Array, Array],
    ) -> dict[str, Float[Array, ""]]:
        """Quantized items and users against interests and properties: each other's, their own, and of co-consumers and
        co-consumed items."""
        interests, properties = self.interest[...], self.property[...]
        item, user = self.item_head(items.quantized.vectors), self.user_head(passed.quantized.vectors)
        others, has_other = _drawn(signals.consumers, rows, keys[0])
        partners, has_partner = _drawn(signals.partners, rows, keys[1])
        consumed = _among(signals.consumers[rows], users)
        options = {"temperature": self.config.temperature}
        of_users = {"log_popularity": signals.consumer_log_share[users], "ids": users}
        return {
            "user_to_item": info_nce(
                user, properties[rows], mask=mask, ids=rows, false_negatives=consumed.T, **options
            ),
            "item_to_user": info_nce(
                item, interests[users], mask=mask, false_negatives=consumed, **of_users, **options
            ),
            "item_to_own": info_nce(item, properties[rows], mask=signals.known[rows], ids=rows, **options),
            "user_to_own": info_nce(user, interests[users], mask=mask, **of_users, **options),
            "item_to_partner": info_nce(
                item,
                properties[partners],
                mask=has_partner,
                ids=partners,
                false_negatives=_among(signals.partners[rows], partners) | (rows[:, None] == partners[None, :]),
                log_popularity=signals.partner_log_share[partners],
                **options,
            ),
            "user_to_other": info_nce(
                user,
                interests[others],
                mask=has_other,
                ids=others,
                false_negatives=_among(signals.consumers[rows], others),
                log_popularity=signals.consumer_log_share[others],
                **options,
            ),
        }


def make_alignment(config: AlignmentConfig, method: RQVaeConfig, *, dim: int, signals: Signals, seed: int) -> Alignment:
    """The module of a config block, for items of `dim` content dimensions."""
    rngs = nnx.Rngs(seed)
    if isinstance(config, LetterConfig):
        return Letter(config, latent=method.latent, dim=signals.vectors.shape[1], rngs=rngs)
    if isinstance(config, DistillConfig):
        return Distill(config, latent=method.latent, dim=signals.vectors.shape[1], rngs=rngs)
    if isinstance(config, CooccurrenceConfig):
        return Cooccurrence(config, latent=method.latent, rngs=rngs)
    return Das(config, method, dim=dim, signals=signals, seed=seed, rngs=rngs)


def _find_each_other(
    a: Float[Array, "n dim"],
    b: Float[Array, "n dim"],
    temperature: float,
    *,
    ids: tuple[Int[Array, " n"], Int[Array, " n"]],
    mask: Bool[Array, " n"],
) -> Float[Array, ""]:
    """InfoNCE in the mean of both directions; `ids` are those of a and of b."""
    there = info_nce(a, b, temperature=temperature, ids=ids[1], mask=mask)
    return (there + info_nce(b, a, temperature=temperature, ids=ids[0], mask=mask)) / 2


def _drawn(
    table: Int[Array, "items sample"], rows: Int[Array, " n"], key: Array
) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """One entry of each row's own, and where there is one."""
    drawn = table[rows, jax.random.randint(key, rows.shape, 0, table.shape[1])]
    return jnp.maximum(drawn, 0), drawn >= 0


def _among(own: Int[Array, "n sample"], candidates: Int[Array, " m"]) -> Bool[Array, "n m"]:
    """Where a candidate is one of a row's own entries."""
    return (own[:, None, :] == candidates[None, :, None]).any(-1)
