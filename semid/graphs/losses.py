"""Losses of graph vectors of users and items: functions of final vectors and a batch's (user, item, negative) nodes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from quantizers import info_nce, masked_mean, unit_rows

_CONTRAST_TEMPERATURE = 0.2
_VIEW_TEMPERATURE = 0.6
_CONTRASTED = 1024  # triples compared with each other: a table of all 4096 of a step would take most of its time
_MOST_ALIKE = 0.8  # larger cosines of content count as this one, so that items of like content still repel (CM3)


def bpr_loss(final: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]) -> Float[Array, ""]:
    """Mean of `-log sigmoid(user . item - user . negative)` over (user, item, negative) nodes (equation 15)."""
    user, item, negative = jnp.moveaxis(final[triples], 1, 0)
    return -jax.nn.log_sigmoid((user * (item - negative)).sum(-1)).mean()


def bootstrap_loss(
    final: Float[Array, "nodes dim"],
    triples: Int[Array, "n 3"],
    content: Float[Array, "n dim"],
    predictor: Float[Array, "dim dim"],
    key: PRNGKeyArray,
    *,
    dropout: float,
    present: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Sum of four means of `1 - cos` between a linear prediction and its target: user to item, item to user, content to
    item and content to itself. Targets have dropout and no gradient. Content counts only where it is `present`."""
    users, items = final[triples[:, 0]], final[triples[:, 1]]
    targets = [
        jax.lax.stop_gradient(_dropped(vectors, jax.random.fold_in(key, place), rate=dropout))
        for place, vectors in enumerate((users, items, content))
    ]
    of_content = content @ predictor
    mean = jnp.mean if present is None else functools.partial(masked_mean, mask=present)
    pairs = (
        (users @ predictor, targets[1], jnp.mean),
        (items @ predictor, targets[0], jnp.mean),
        (of_content, targets[1], mean),
        (of_content, targets[2], mean),
    )
    cosines = [mean((unit_rows(one) * unit_rows(other)).sum(-1)) for one, other, mean in pairs]
    return len(pairs) - functools.reduce(jnp.add, cosines)


def uniform_loss(
    final: Float[Array, "nodes dim"],
    triples: Int[Array, "n 3"],
    content: Float[Array, "n width"],
    *,
    weight: float,
) -> Float[Array, ""]:
    """Mean squared distance of users and their items on the sphere, plus `weight` / 2 times the uniformity of users and
    of items, over the first 1024 triples. The items' is calibrated by the cosine of their content (CM3, section 4),
    which is 0 for items without content (rows of zeros)."""
    users, items = unit_rows(final[triples[:, 0]]), unit_rows(final[triples[:, 1]])
    first = slice(_CONTRASTED)
    alike = unit_rows(content[first])
    expected = 2 - 2 * jnp.clip(alike @ alike.T, 0, _MOST_ALIKE)
    apart = uniformity(users[first], triples[first, 0])
    apart += uniformity(items[first], triples[first, 1], expected=expected)
    return jnp.square(users - items).sum(-1).mean() + weight / 2 * apart


def uniformity(
    x: Float[Array, "n dim"], ids: Int[Array, " n"], *, expected: Float[Array, "n n"] | None = None
) -> Float[Array, ""]:
    """Logarithm of the mean of `exp(-2 (|x - y|^2 - expected))` over pairs of different ids; `x` at unit length."""
    distances = 2 - 2 * x @ x.T
    pairs = ids[:, None] != ids[None]
    exponents = -2 * (distances if expected is None else distances - expected)
    total = jnp.where(pairs, jnp.exp(exponents), 0).sum()  # from -8 to 4 each
    number = pairs.sum()
    return jnp.log(jnp.where(number > 0, total, 1)) - jnp.log(jnp.maximum(number, 1).astype(jnp.float32))


def view_contrast(
    by_edges: Float[Array, "nodes dim"], by_hyperedges: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]
) -> Float[Array, ""]:
    """InfoNCE between the two vectors of the users, and of the items, of the first 1024 triples (MMHCL)."""
    terms = [
        info_nce(by_edges[rows], by_hyperedges[rows], ids=rows, temperature=_VIEW_TEMPERATURE)
        for rows in (triples[:_CONTRASTED, 0], triples[:_CONTRASTED, 1])
    ]
    return terms[0] + terms[1]


def content_contrast(
    final: Float[Array, "nodes dim"],
    triples: Int[Array, "n 3"],
    content: Float[Array, "n dim"],
    *,
    present: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE between the items of the first 1024 triples and their projected content, if `present` (RLMRec)."""
    rows, mask = triples[:_CONTRASTED, 1], None if present is None else present[:_CONTRASTED]
    return info_nce(final[rows], content[:_CONTRASTED], mask=mask, ids=rows, temperature=_CONTRAST_TEMPERATURE)


def _dropped(x: Float[Array, "n dim"], key: PRNGKeyArray, *, rate: float) -> Float[Array, "n dim"]:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def ego_norm(ego: Float[Array, "nodes dim"], triples: Int[Array, "n 3"]) -> Float[Array, ""]:
    """Half the squared norm of the three ego embeddings, a mean over the triples."""
    return 0.5 * jnp.square(ego[triples]).sum((1, 2)).mean()
