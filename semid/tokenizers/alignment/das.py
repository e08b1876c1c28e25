"""DAS: dual views of items and users, both quantized, aligned with debiased interests (arXiv 2508.10584)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from quantizers import Schedule, Similarity, info_nce, masked_mean, unit_rows
from semid.config import check_range
from semid.errors import SemidError
from semid.tokenizers.alignment.base import Alignment, AlignmentConfig, Signals, draw_entries, is_entry
from semid.tokenizers.autoencoder import RQVAE, AutoencoderConfig, Pass, Tables, autoencoder_loss
from semid.training import StepContext


@dataclass(frozen=True)
class DasConfig(AlignmentConfig):
    """Dual views: items and users are quantized and aligned with debiased interests (DAS, arXiv 2508.10584)."""

    weight: Schedule = Schedule(0.1)
    """Weight of each of the six views: user-item, same entity and co-occurrence, from either side."""
    temperature: float = 0.07
    """Temperature of the cosines."""
    click: float = 0.1
    """Weight of the click model, which learns the interests and properties to align with."""
    debias: float = 0.1
    """Weight of the losses that keep popularity and conformity out of these."""
    name = "das"
    needs = frozenset(Signals._fields)

    def __post_init__(self) -> None:
        check_range(self, "click", "debias", at_least=0)
        check_range(self, "temperature", above=0)

    def build(self, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int) -> Das:
        return Das(self, method, dim=dim, signals=signals, seed=seed, rngs=nnx.Rngs(seed))


class DebiasLosses(NamedTuple):
    """Unweighted means: `tied` of 1 - cos(bias, observed), `apart` of the squared cos(interest, bias)."""

    tied: Float[Array, ""]
    apart: Float[Array, ""]


@jax.jit
def debiased_click_loss(
    user_interest: Float[Array, "n dim"],
    user_conformity: Float[Array, "n bias"],
    item_property: Float[Array, "n dim"],
    item_popularity: Float[Array, "n bias"],
    *,
    mask: Bool[Array, " n"] | None = None,
    ids: Integer[Array, " n"] | None = None,
    false_negatives: Bool[Array, "n n"] | None = None,
) -> Float[Array, ""]:
    """Loss of clicks: the user of a row clicked its item; the items of other rows are negatives.

    Scores are interest . property + conformity . popularity (DAS, arXiv 2508.10584, after DICE, arXiv 2006.11011).
    `ids` are the items'; the rest is as in `info_nce`, without correction for popular items being negatives more often.
    """
    _check_shapes(conformity=user_conformity, popularity=item_popularity)
    return info_nce(
        jnp.concatenate([user_interest, user_conformity], -1),
        jnp.concatenate([item_property, item_popularity], -1),
        temperature=1.0,
        similarity=Similarity.INNER_PRODUCT,
        mask=mask,
        ids=ids,
        false_negatives=false_negatives,
    )


@jax.jit
def debias_loss(
    interest: Float[Array, "n dim"],
    bias: Float[Array, "n dim"],
    observed: Float[Array, "n dim"],
    *,
    mask: Bool[Array, " n"] | None = None,
) -> DebiasLosses:
    """Losses that keep popularity in `bias` and out of `interest` (DAS, arXiv 2508.10584).

    For users these are interest and conformity, for items property and popularity. `observed` is a vector computed from
    training counts (activity, popularity); if that function is learned, add the click loss, or both sides of `tied` may
    collapse to a constant. Means over rows where `mask` is true. Raises SemidError for shapes that differ.
    """
    _check_shapes(interest=interest, bias=bias, observed=observed)
    if mask is not None and mask.shape != interest.shape[:1]:
        raise SemidError(f"debias_loss: expected mask of shape {interest.shape[:1]}, one per row, got {mask.shape}")
    interests, biases, targets = (unit_rows(x, mask=mask) for x in (interest, bias, observed))
    tied = 1 - (biases * targets).sum(-1)
    apart = jnp.square((interests * biases).sum(-1))
    return DebiasLosses(*(masked_mean(x, mask=mask) for x in (tied, apart)))


class Das(Alignment):
    """The users' autoencoder, the click model, and the six views.

    Interests start from the means of the users' collaborative vectors, properties from the items'.
    """

    def __init__(
        self, config: DasConfig, method: AutoencoderConfig, *, dim: int, signals: Signals, seed: int, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.method = dataclasses.replace(method, diversity=0.0)  # only the items' codes are clustered
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
        users, mask = draw_entries(signals.consumers, rows, user_key)
        passed = self.users(signals.users[users], mask=mask, key=search_key, progress=context.progress)
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
        """Loss of the users' clicks on the items, and of popularity in interests and properties."""
        interest, conformity = self.interest[...][users], self.conformity[...][users]
        taste, popularity = self.property[...][rows], self.popularity[...][rows]
        false = is_entry(signals.consumers[rows], users).T
        click = debiased_click_loss(interest, conformity, taste, popularity, mask=mask, ids=rows, false_negatives=false)
        observed_items = self.from_popularity(signals.log_popularity[rows][:, None])
        observed_users = self.from_activity(signals.log_activity[users][:, None])
        sides = ((taste, popularity, observed_items), (interest, conformity, observed_users))
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
        """InfoNCE from quantized items and users to properties and interests: each other's, their own, and those of
        co-consumed items and co-consumers."""
        interests, properties = self.interest[...], self.property[...]
        item, user = self.item_head(items.quantized.vectors), self.user_head(passed.quantized.vectors)
        others, has_other = draw_entries(signals.consumers, rows, keys[0])
        partners, has_partner = draw_entries(signals.partners, rows, keys[1])
        consumed = is_entry(signals.consumers[rows], users)
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
                false_negatives=is_entry(signals.partners[rows], partners) | (rows[:, None] == partners[None, :]),
                log_popularity=signals.partner_log_share[partners],
                **options,
            ),
            "user_to_other": info_nce(
                user,
                interests[others],
                mask=has_other,
                ids=others,
                false_negatives=is_entry(signals.consumers[rows], others),
                log_popularity=signals.consumer_log_share[others],
                **options,
            ),
        }


def _check_shapes(**vectors: Array) -> None:
    shapes = [x.shape for x in vectors.values()]
    if len(set(shapes)) > 1:
        raise SemidError(f"DAS: expected {', '.join(vectors)} of one shape, got {' and '.join(map(str, shapes))}")
