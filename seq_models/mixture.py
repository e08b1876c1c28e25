"""Mixtures of a model's distribution over items with an item graph's, including repeats and business rules.

    p(i | h) = [(1 - weight) r_i p_model(i | h) + weight q(i | h)] w_i

`r_i` is the repeat factor f for items of the history and (1 - f s) / (1 - s) for the others, s being the model's mass
on the history, so that the total is unchanged (f is bounded so that the others keep at least a millionth, and lists can
go on after the history's items). q is the normalized sum of the edges of the history's items, the latest weighted most.
`w_i` are a request's factors, by default 1; with others, scores are no longer a distribution. A model of codes divides
a leaf's probability evenly among its items. A model with a dense head first mixes its own two parts, each with its own
repeat factors.

`MixtureTerms` are these numbers for a batch of requests; they mix log-probabilities of given items, or of all items.
`PrefixMasses` are the terms summed over the prefixes of a trie, for a search by the mass below a prefix. They involve
only the few items that the terms treat separately, so their cost does not depend on the catalogue.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seq_models.masks import ItemMask, locate_members, run_sums, sorted_members, stable_order
from seq_models.ranking import scatter_rows
from seq_models.sharing import top_k
from seq_models.trie import CodeTrie
from seq_models.types import Boosts, ItemTables, RequestBatch

# Items kept of a distribution that is added to a model's: its largest shares, renormalized.
GRAPH_ITEMS = 256
# Minimum share of a prefix's model mass that remains when items are removed from it: above the rounding of sums.
_LEFT = 1e-6
# Minimum mass that a repeat factor leaves to items outside the history.
_OUTSIDE = 1e-6
# Window longer than any history.
_WHOLE = 2**31 - 1


class ItemNeighbors(NamedTuple):
    """Edges of an item graph by item row: rows of the neighbors (-1: none) and weights, above 0."""

    rows: Int[Array, "items width"]
    weights: Float[Array, "items width"]


class Mixture(NamedTuple):
    """Item graph and parameters of a mixture: a pytree, passed to jitted functions as an argument."""

    neighbors: ItemNeighbors | None
    weight: Float[Array, ""]
    """Share of the graph's distribution, from 0 to 1; 0 for a request whose history has no edges."""
    decay: Float[Array, ""]
    """Factor of an item's edges in the graph's distribution, applied once per later item in the history."""
    window: Int[Array, ""]
    """Number of latest items of the history whose edges count."""
    repeat_factor: Float[Array, ""]
    """Factor of the model's probability of items in the history: 0: they are never recommended, neither by the graph's
    distribution; 1: the model's own probability."""

    @classmethod
    def from_numbers(
        cls,
        neighbors: ItemNeighbors | None = None,
        *,
        weight: float = 0.0,
        decay: float = 1.0,
        window: int | None = None,
        repeat_factor: float = 1.0,
    ) -> Mixture:
        """Mixture of plain numbers, put on the device. Window None: the whole history. Raises ValueError for numbers
        out of range."""
        if not (0 <= weight <= 1 and 0 <= decay <= 1 and 0 <= repeat_factor < math.inf):
            raise ValueError(
                "expected a weight and a decay from 0 to 1 and a repeat_factor of at least 0, "
                f"got {weight}, {decay} and {repeat_factor}"
            )
        latest = jnp.asarray(_WHOLE if window is None else window, jnp.int32)
        share, factor, repeats = (jnp.asarray(number, jnp.float32) for number in (weight, decay, repeat_factor))
        return cls(neighbors, share, factor, latest, repeats)


class ItemShares(NamedTuple):
    """Distinct items (padded with -1) and their shares of a distribution."""

    rows: Int[Array, "b m"]
    shares: Float[Array, "b m"]


class MixtureTerms(NamedTuple):
    """The items that a mixture treats differently from all others, per request, and the numbers for them.

    Lists of rows are distinct and padded with -1.
    """

    history: Int[Array, "b t"]
    added: Int[Array, "b m"]
    added_masses: Float[Array, "b m"]
    """Masses from the graph, weight q(i), and from a dense head."""
    others: Float[Array, " b"]
    """Factor of the model's probability of items outside the history."""
    repeated: Float[Array, " b"]
    """Factor of the model's probability of items in the history."""
    repeats: Bool[Array, ""]
    """False if items of the history have probability 0."""
    boosts: Boosts | None
    history_log_probs: Float[Array, "b t"]
    """Under the model alone; arbitrary if the repeat factor is 1."""
    boost_log_probs: Float[Array, "b n"] | None

    @classmethod
    def from_requests(
        cls,
        mixture: Mixture | None,
        requests: RequestBatch,
        tables: ItemTables,
        *,
        score: Callable[[Int[Array, "b _"]], Float[Array, "b _"]],
        dense: ItemShares | None = None,
    ) -> MixtureTerms:
        """Terms of requests. `score` returns the model's log-probabilities of item rows (-inf for -1). For a model with
        a dense head these are the probabilities by codes, and `dense` the head's items with their shares."""
        mixture = Mixture.from_numbers() if mixture is None else mixture
        history = _distinct(jnp.where(requests.segments > 0, requests.history, -1))
        factor, nothing_seen = mixture.repeat_factor, jnp.full(history.shape, -jnp.inf)
        log_probs = jax.lax.cond(factor == 1, lambda: nothing_seen, lambda: score(history))
        others, repeated = _repeat_factors(jnp.exp(log_probs).sum(axis=-1), factor)
        graph, weight = _graph_items(mixture, requests, history, tables), mixture.weight
        weight = jnp.where(graph.shares.sum(axis=-1) > 0, weight, 0.0)
        added, left = ItemShares(graph.rows, weight[:, None] * graph.shares), 1 - weight
        if dense is not None:
            own = ItemShares(dense.rows, left[:, None] * dense.shares)
            both = (jnp.concatenate(columns, axis=1) for columns in zip(added, own, strict=True))
            added, left = _summed(*both, size=len(tables.known)), left * (1 - dense.shares.sum(axis=-1))
        boosts = _for_each(requests.boosts, history)
        return cls(
            history,
            *added,
            left * others,
            left * repeated,
            factor > 0,
            boosts,
            log_probs,
            None if boosts is None else score(boosts.rows),
        )

    @property
    def named_rows(self) -> tuple[Int[Array, "b _"], ...]:
        """Rows of the items that the terms treat separately, padded with -1."""
        return (self.history, self.added) if self.boosts is None else (self.history, self.added, self.boosts.rows)

    def closed(self, denied: Int[Array, "users n"] | None) -> Int[Array, "b _"]:
        """Rows of items with probability zero, in addition to those `denied`; padded with -1."""
        lists = [jnp.where(self.repeats, -1, self.history)]
        if denied is not None:
            lists.append(jnp.broadcast_to(denied, (self.history.shape[0], denied.shape[1])))
        if self.boosts is not None:
            lists.append(jnp.where(self.boosts.factors > 0, -1, self.boosts.rows))
        return jnp.concatenate(lists, axis=1)

    def item_log_probs(self, log_probs: Float[Array, "b n"], rows: Int[Array, "b n"]) -> Float[Array, "b n"]:
        """Mix the model's log-probabilities of item rows."""
        seen = _same(rows, self.history).any(axis=-1)
        factors = jnp.where(seen, self.repeated[:, None], self.others[:, None])
        masses = jnp.where(_same(rows, self.added), self.added_masses[:, None], 0.0).sum(axis=-1)
        return jnp.logaddexp(log_probs + jnp.log(factors), jnp.log(masses)) + jnp.log(self.boost_factors(rows))

    def catalog_log_probs(self, log_probs: Float[Array, "b items"]) -> Float[Array, "b items"]:
        """Mix the model's log-probabilities of all items."""
        user = jnp.arange(log_probs.shape[0])[:, None]
        seen, added = (scatter_rows(rows, log_probs.shape[1]) for rows in (self.history, self.added))
        repeated = _at_rows(log_probs, self.history) + jnp.log(self.repeated)[:, None]
        mixed = log_probs + jnp.log(self.others)[:, None]
        mixed = mixed.at[user, seen].set(repeated, mode="drop")
        with_added = jnp.logaddexp(_at_rows(mixed, self.added), jnp.log(self.added_masses))
        mixed = mixed.at[user, added].set(with_added, mode="drop")
        if self.boosts is None:
            return mixed
        rows = scatter_rows(self.boosts.rows, log_probs.shape[1])
        return mixed.at[user, rows].add(jnp.log(self.boosts.factors), mode="drop")

    def boost_factors(self, rows: Int[Array, "b n"]) -> Float[Array, "b n"]:
        """The requests' factors of item rows."""
        if self.boosts is None:
            return jnp.ones(rows.shape)
        return jnp.where(_same(rows, self.boosts.rows), self.boosts.factors[:, None], 1.0).prod(axis=-1)


class NodeMasses(NamedTuple):
    """Masses that a mixture's separately treated items add to the nodes of one level; unused entries have parent -1."""

    nodes: Int[Array, "b n"]
    parents: Int[Array, "b n"]
    of_model: Float[Array, "b n"]
    """Change of the model's mass, mostly negative."""
    added: Float[Array, "b n"]


class PrefixMasses(NamedTuple):
    """Changes of the masses of a trie's prefixes under a mixture, over the items that a mask allows."""

    terms: MixtureTerms
    levels: tuple[NodeMasses, ...]

    @classmethod
    def from_terms(
        cls, terms: MixtureTerms, trie: CodeTrie, codes: Int[Array, "items level"], *, mask: ItemMask | None
    ) -> PrefixMasses:
        """Sum the terms over the trie, from the items upwards."""
        named = _named_items(terms)
        members, found, order = sorted_members(trie, named.rows, codes)
        before, after, added = (jnp.take_along_axis(x, order, axis=-1) for x in named[1:])
        left = found if mask is None else found & mask.allows(members[-1])
        of_model, added = jnp.where(left, after, 0.0) - before, jnp.where(left, added, 0.0)
        levels = []
        for level, nodes in enumerate(members[:-1]):
            parents = members[level - 1] if level else jnp.zeros_like(nodes)
            keys = jnp.where(found, nodes, -1)
            last = found & (keys != jnp.pad(keys[:, 1:], ((0, 0), (0, 1)), constant_values=-1))
            sums = (run_sums(x, keys) for x in (of_model, added))
            levels.append(NodeMasses(nodes, jnp.where(last, parents, -1), *sums))
        return cls(terms, tuple(levels))

    def child_log_masses(
        self,
        log_probs: Float[Array, "b beam n"],
        parents: Int[Array, "b beam"],
        children: Int[Array, "b beam n"],
        *,
        level: int,
    ) -> Float[Array, "b beam n"]:
        """Log masses of the children of beams, from the model's log-probabilities of them."""
        own, scores = self.levels[level], log_probs + jnp.log(self.terms.others)[:, None, None]
        beam, place = locate_members(own.nodes, own.parents, parents, children)
        user = jnp.arange(beam.shape[0])[:, None]
        before = scores.at[user, beam, place].get(mode="fill", fill_value=-jnp.inf)
        mass = jnp.exp(before)
        left = jnp.where(mass > 0, jnp.maximum(1 + own.of_model / mass, _LEFT), 1.0)
        after = jnp.logaddexp(before + jnp.log(left), jnp.log(own.added))
        return scores.at[user, beam, place].set(after, mode="drop")


def is_mixed(mixture: Mixture | None, requests: RequestBatch, dense: ItemShares | None = None) -> bool:
    """True if scores differ from the model's own, or from those of its codes."""
    return mixture is not None or requests.boosts is not None or dense is not None


def catalog_terms(
    log_probs: Float[Array, "b items"],
    mixture: Mixture | None,
    requests: RequestBatch,
    tables: ItemTables,
    dense: ItemShares | None = None,
) -> MixtureTerms | None:
    """Terms from the model's log-probabilities of all items; None if nothing is mixed."""
    if not is_mixed(mixture, requests, dense):
        return None
    score = functools.partial(_at_rows, log_probs)
    return MixtureTerms.from_requests(mixture, requests, tables, score=score, dense=dense)


def mixed_catalog(
    log_probs: Float[Array, "b items"],
    mixture: Mixture | None,
    requests: RequestBatch,
    tables: ItemTables,
    dense: ItemShares | None = None,
) -> Float[Array, "b items"]:
    """Mix the model's log-probabilities of all items."""
    terms = catalog_terms(log_probs, mixture, requests, tables, dense)
    return log_probs if terms is None else terms.catalog_log_probs(log_probs)


def dense_shares(
    log_probs: Float[Array, "b items"],
    mixture: Mixture | None,
    requests: RequestBatch,
    tables: ItemTables,
    *,
    total: float,
) -> ItemShares:
    """The items with a dense head's largest probabilities after repeat factors; their shares sum to `total`."""
    if mixture is not None:
        repeats = mixture._replace(neighbors=None, weight=jnp.zeros_like(mixture.weight))
        log_probs = mixed_catalog(log_probs, repeats, requests._replace(boosts=None), tables)
    rows, shares = _largest(jnp.exp(log_probs))
    return ItemShares(rows, total * shares)


def _distinct(rows: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The rows with repetitions replaced by -1."""
    earlier = jnp.tril(jnp.ones((rows.shape[1],) * 2, bool), -1)
    return jnp.where((_same(rows, rows) & earlier[None]).any(axis=-1), -1, rows)


def _at_rows(values: Float[Array, "b items"], rows: Int[Array, "b n"]) -> Float[Array, "b n"]:
    """Log-probabilities at item rows, -inf at -1."""
    return jnp.where(rows < 0, -jnp.inf, jnp.take_along_axis(values, jnp.maximum(rows, 0), axis=-1))


class _NamedItems(NamedTuple):
    """Item rows, their model mass before and after the factors of repeats and requests, and the added mass."""

    rows: Int[Array, "b n"]
    before: Float[Array, "b n"]
    after: Float[Array, "b n"]
    added: Float[Array, "b n"]


def _named_items(terms: MixtureTerms) -> _NamedItems:
    """The items that the terms treat separately. An item in several lists has its model mass in only one of them."""

    def model_masses(rows: Array, log_probs: Array) -> tuple[Array, Array]:
        seen, mass = _same(rows, terms.history).any(axis=-1), jnp.exp(log_probs)
        factors = jnp.where(seen, terms.repeated[:, None], terms.others[:, None]) * terms.boost_factors(rows)
        return mass * terms.others[:, None], mass * factors

    history, none = terms.history_log_probs, jnp.zeros_like(terms.added_masses)
    lists = [(terms.added, none, none, terms.added_masses * terms.boost_factors(terms.added))]
    if terms.boosts is not None and terms.boost_log_probs is not None:
        rows = terms.boosts.rows
        lists.append((rows, *model_masses(rows, terms.boost_log_probs), jnp.zeros_like(terms.boost_log_probs)))
        history = jnp.where(_same(terms.history, rows).any(axis=-1), -jnp.inf, history)
    lists.append((terms.history, *model_masses(terms.history, history), jnp.zeros_like(history)))
    return _NamedItems(*(jnp.concatenate(columns, axis=1) for columns in zip(*lists, strict=True)))


def _repeat_factors(
    seen: Float[Array, " b"], factor: Float[Array, ""]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Factors of the model's probability outside and inside the history; `seen` is the model's mass inside."""
    outside = jnp.maximum(1 - factor * seen, _OUTSIDE)
    others = jnp.where(factor == 1, 1.0, outside / jnp.maximum(1 - seen, 1e-6))
    return others, jnp.where(factor * seen > 1 - _OUTSIDE, (1 - _OUTSIDE) / seen, factor)


def _graph_items(
    mixture: Mixture, requests: RequestBatch, history: Int[Array, "b t"], tables: ItemTables
) -> ItemShares:
    """The graph's distribution over items that may be recommended; its shares sum to 1 or are all 0."""
    neighbors, none = mixture.neighbors, (history.shape[0], 0)
    if neighbors is None:
        return ItemShares(jnp.zeros(none, jnp.int32), jnp.zeros(none))
    if len(neighbors.rows) != len(tables.known):
        raise ValueError(
            f"expected the neighbors of all {len(tables.known)} rows of the item tables, got {len(neighbors.rows)}"
        )
    real = requests.segments > 0
    later = jnp.cumsum(real[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] - 1
    item_weights = jnp.where(real & (later < mixture.window), mixture.decay ** later.astype(jnp.float32), 0.0)
    weights = (item_weights[..., None] * neighbors.weights[requests.history]).reshape(history.shape[0], -1)
    rows = neighbors.rows[requests.history].reshape(history.shape[0], -1)
    possible = (rows >= 0) & (weights > 0)
    if tables.active is not None:
        possible &= tables.active[rows]
    possible &= ~_same(rows, history).any(axis=-1) | (mixture.repeat_factor > 0)
    items = _summed(jnp.where(possible, rows, -1), jnp.where(possible, weights, 0.0), size=len(tables.known))
    best, shares = _largest(items.shares)
    rows = jnp.take_along_axis(items.rows, jnp.maximum(best, 0), axis=-1)
    return ItemShares(jnp.where(best < 0, -1, rows), shares)


def _largest(weights: Float[Array, "b n"]) -> ItemShares:
    """Indices of the largest weights, and their shares, which sum to 1 or are all 0."""
    weights, best = top_k(weights, min(GRAPH_ITEMS, weights.shape[1]))
    shares = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    return ItemShares(jnp.where(weights > 0, best, -1), shares)


def _summed(rows: Int[Array, "b n"], weights: Float[Array, "b n"], *, size: int) -> ItemShares:
    """The distinct rows (of `size` items), sorted, with the sums of their weights; other places hold -1 and 0."""
    rows = jnp.where(rows < 0, size, rows)
    order = stable_order(rows, most=size)
    rows, weights = (jnp.take_along_axis(x, order, axis=-1) for x in (rows, weights))
    last = rows != jnp.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    weights = jnp.where(last, run_sums(weights, rows), 0.0)
    return ItemShares(jnp.where(last & (rows < size), rows, -1), weights)


def _for_each(boosts: Boosts | None, history: Int[Array, "b t"]) -> Boosts | None:
    """The boosts with one row per history."""
    if boosts is None:
        return None
    shape = (history.shape[0], boosts.rows.shape[1])
    return Boosts(jnp.broadcast_to(boosts.rows, shape), jnp.broadcast_to(boosts.factors, shape))


def _same(rows: Int[Array, "b n"], others: Int[Array, "b m"]) -> Bool[Array, "b n m"]:
    return rows[:, :, None] == others[:, None, :]
