"""Mixtures of a model's distribution over items with an item graph's, repeats and business rules included.

    p(i | h) = [(1 - weight) r_i p_model(i | h) + weight q(i | h)] w_i

`r_i` is the repeat factor f for items of the history and (1 - f s) / (1 - s) for the others, s being the model's mass
on the history, so that the sum stays what it was (f is at most what leaves the others a millionth, lest lists end with
the history); q is the normalized sum of the edges of the history's items, the latest counting most; `w_i` are a
request's factors, 1 unless given, after which scores are no longer a distribution. A model of codes divides a leaf's
probability evenly among its items; one with a dense head mixes its own two parts first, after the factors of repeats,
which each part has for itself.

`MixtureTerms` are these numbers for a batch of requests. They mix log-probabilities of items given, and of all items.
`PrefixMasses` are what they add to the prefixes of a trie, for a search by the mass of what lies under a prefix: sums
over the few items that the terms name, so that they cost the same in any catalogue.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seq_models.masks import ItemMask, order_of, places_of, run_sums, sorted_members
from seq_models.ranking import scatter_rows
from seq_models.sharing import top_k
from seq_models.trie import CodeTrie
from seq_models.types import Boosts, ItemTables, RequestBatch

# Items of a distribution that is added to a model's: its largest shares, which are then the distribution.
GRAPH_ITEMS = 256
# Share of a prefix's model mass that is left at least, where items are taken out of it: more than the sums' rounding.
_LEFT = 1e-6
# Mass that a repeat factor leaves to items outside the history at least: they follow those in it.
_OUTSIDE = 1e-6
# No history is as long.
_WHOLE = 2**31 - 1


class ItemNeighbors(NamedTuple):
    """Edges of an item graph by item row: neighbors' rows (-1: none) and their weights, above 0."""

    rows: Int[Array, "items width"]
    weights: Float[Array, "items width"]


class Mixture(NamedTuple):
    """Item graph and numbers of a mixture: a pytree, to be passed to jitted functions as an argument."""

    neighbors: ItemNeighbors | None
    weight: Float[Array, ""]
    """Share of the graph's distribution, from 0 to 1; 0 for a request whose history has no edges."""
    decay: Float[Array, ""]
    """Factor of an item's edges in the graph's distribution, per item that came after it in the history."""
    window: Int[Array, ""]
    """Latest items of the history whose edges count."""
    repeat_factor: Float[Array, ""]
    """Factor of the model's probability of items in the history: 0 where nothing repeats, 1: as the model says.
    At 0 these have no share in the graph's distribution either."""

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
        """The mixture with numbers on the device; no window: the whole history. Raises ValueError if out of range."""
        if not (0 <= weight <= 1 and 0 <= decay <= 1 and 0 <= repeat_factor < math.inf):
            raise ValueError(
                "expected a weight and a decay from 0 to 1 and a repeat_factor of at least 0, "
                f"got {weight}, {decay} and {repeat_factor}"
            )
        latest = jnp.asarray(_WHOLE if window is None else window, jnp.int32)
        share, factor, repeats = (jnp.asarray(number, jnp.float32) for number in (weight, decay, repeat_factor))
        return cls(neighbors, share, factor, latest, repeats)


class ItemShares(NamedTuple):
    """Items with a share in a distribution (-1 for none), no item twice, and their shares."""

    rows: Int[Array, "b m"]
    shares: Float[Array, "b m"]


class MixtureTerms(NamedTuple):
    """The items for which a mixture does something else than for all others, per request, and what it does.

    Rows are -1 where there is none; no list holds an item twice.
    """

    history: Int[Array, "b t"]
    added: Int[Array, "b m"]
    added_masses: Float[Array, "b m"]
    """Of the graph, weight q(i), and of a dense head."""
    others: Float[Array, " b"]
    """Factor of the model's probability of items outside the history."""
    repeated: Float[Array, " b"]
    """... and in it."""
    repeats: Bool[Array, ""]
    """False where items of the history have probability 0."""
    boosts: Boosts | None
    history_log_probs: Float[Array, "b t"]
    """Under the model alone, where its factor differs from the others'; else anything."""
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
        """The terms of requests; `score` gives the model's log-probabilities of item rows (of -1: -inf), those of its
        codes where it has a dense head, whose items are `dense`, with their shares in the model's distribution."""
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
    def named(self) -> tuple[Int[Array, "b _"], ...]:
        """Rows of the items that the terms treat apart, -1 for none."""
        return (self.history, self.added) if self.boosts is None else (self.history, self.added, self.boosts.rows)

    def closed(self, denied: Int[Array, "users n"] | None) -> Int[Array, "b _"]:
        """Rows of probability exactly zero, -1 for none, with those denied anyway."""
        lists = [jnp.where(self.repeats, -1, self.history)]
        if denied is not None:
            lists.append(jnp.broadcast_to(denied, (self.history.shape[0], denied.shape[1])))
        if self.boosts is not None:
            lists.append(jnp.where(self.boosts.factors > 0, -1, self.boosts.rows))
        return jnp.concatenate(lists, axis=1)

    def of_items(self, log_probs: Float[Array, "b n"], rows: Int[Array, "b n"]) -> Float[Array, "b n"]:
        """Log-probabilities of item rows, from the model's."""
        seen = _same(rows, self.history).any(axis=-1)
        factors = jnp.where(seen, self.repeated[:, None], self.others[:, None])
        masses = jnp.where(_same(rows, self.added), self.added_masses[:, None], 0.0).sum(axis=-1)
        return jnp.logaddexp(log_probs + jnp.log(factors), jnp.log(masses)) + jnp.log(self.boosts_of(rows))

    def of_catalog(self, log_probs: Float[Array, "b items"]) -> Float[Array, "b items"]:
        """Log-probabilities of all items, from the model's."""
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

    def boosts_of(self, rows: Int[Array, "b n"]) -> Float[Array, "b n"]:
        """A request's own factors of item rows."""
        if self.boosts is None:
            return jnp.ones(rows.shape)
        return jnp.where(_same(rows, self.boosts.rows), self.boosts.factors[:, None], 1.0).prod(axis=-1)


class NodeMasses(NamedTuple):
    """Masses that the items named by a mixture add to the nodes above them at one level; parents are -1 for none."""

    nodes: Int[Array, "b n"]
    parents: Int[Array, "b n"]
    of_model: Float[Array, "b n"]
    """Change of the model's mass, mostly downwards."""
    added: Float[Array, "b n"]


class PrefixMasses(NamedTuple):
    """Masses of the prefixes of a trie under a mixture, of all that a mask leaves of the items that the terms name."""

    terms: MixtureTerms
    levels: tuple[NodeMasses, ...]

    @classmethod
    def from_terms(
        cls, terms: MixtureTerms, trie: CodeTrie, codes: Int[Array, "items level"], *, mask: ItemMask | None
    ) -> PrefixMasses:
        """Sums of the terms, from the items upwards."""
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

    def of_children(
        self,
        log_probs: Float[Array, "b beam n"],
        parents: Int[Array, "b beam"],
        children: Int[Array, "b beam n"],
        *,
        level: int,
    ) -> Float[Array, "b beam n"]:
        """Logs of the masses of children of parents, from the model's log-probabilities of them."""
        own, scores = self.levels[level], log_probs + jnp.log(self.terms.others)[:, None, None]
        beam, place = places_of(own.nodes, own.parents, parents, children)
        user = jnp.arange(beam.shape[0])[:, None]
        before = scores.at[user, beam, place].get(mode="fill", fill_value=-jnp.inf)
        mass = jnp.exp(before)
        left = jnp.where(mass > 0, jnp.maximum(1 + own.of_model / mass, _LEFT), 1.0)
        after = jnp.logaddexp(before + jnp.log(left), jnp.log(own.added))
        return scores.at[user, beam, place].set(after, mode="drop")


def is_mixed(mixture: Mixture | None, requests: RequestBatch, dense: ItemShares | None = None) -> bool:
    """True where scores are other than the model's own, or than those of its codes."""
    return mixture is not None or requests.boosts is not None or dense is not None


def catalog_terms(
    log_probs: Float[Array, "b items"],
    mixture: Mixture | None,
    requests: RequestBatch,
    tables: ItemTables,
    dense: ItemShares | None = None,
) -> MixtureTerms | None:
    """The terms where the model's log-probabilities of all items are known; None: nothing is mixed."""
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
    """Log-probabilities of all items, from the model's."""
    terms = catalog_terms(log_probs, mixture, requests, tables, dense)
    return log_probs if terms is None else terms.of_catalog(log_probs)


def dense_shares(
    log_probs: Float[Array, "b items"],
    mixture: Mixture | None,
    requests: RequestBatch,
    tables: ItemTables,
    *,
    total: float,
) -> ItemShares:
    """The items of a dense head's largest probabilities, after the factors of repeats; the shares sum to `total`."""
    if mixture is not None:
        repeats = mixture._replace(neighbors=None, weight=jnp.zeros_like(mixture.weight))
        log_probs = mixed_catalog(log_probs, repeats, requests._replace(boosts=None), tables)
    rows, shares = _largest(jnp.exp(log_probs))
    return ItemShares(rows, total * shares)


def _distinct(rows: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The rows with -1 in place of those that stand in an earlier place too."""
    earlier = jnp.tril(jnp.ones((rows.shape[1],) * 2, bool), -1)
    return jnp.where((_same(rows, rows) & earlier[None]).any(axis=-1), -1, rows)


def _at_rows(values: Float[Array, "b items"], rows: Int[Array, "b n"]) -> Float[Array, "b n"]:
    """Log-probabilities at item rows, -inf at -1."""
    found = jnp.take_along_axis(values, jnp.maximum(rows, 0), axis=-1)
    return jnp.where(rows < 0, -jnp.inf, found)


class _NamedItems(NamedTuple):
    """Item rows, their mass in the model before and after the factors of repeats and requests, and what is added."""

    rows: Int[Array, "b n"]
    before: Float[Array, "b n"]
    after: Float[Array, "b n"]
    added: Float[Array, "b n"]


def _named_items(terms: MixtureTerms) -> _NamedItems:
    """The items that the terms treat apart; one that stands in several lists has its model's mass in one alone."""

    def of_model(rows: Array, log_probs: Array) -> tuple[Array, Array]:
        seen, mass = _same(rows, terms.history).any(axis=-1), jnp.exp(log_probs)
        factors = jnp.where(seen, terms.repeated[:, None], terms.others[:, None]) * terms.boosts_of(rows)
        return mass * terms.others[:, None], mass * factors

    history, none = terms.history_log_probs, jnp.zeros_like(terms.added_masses)
    lists = [(terms.added, none, none, terms.added_masses * terms.boosts_of(terms.added))]
    if terms.boosts is not None and terms.boost_log_probs is not None:
        rows = terms.boosts.rows
        lists.append((rows, *of_model(rows, terms.boost_log_probs), jnp.zeros_like(terms.boost_log_probs)))
        history = jnp.where(_same(terms.history, rows).any(axis=-1), -jnp.inf, history)
    lists.append((terms.history, *of_model(terms.history, history), jnp.zeros_like(history)))
    return _NamedItems(*(jnp.concatenate(columns, axis=1) for columns in zip(*lists, strict=True)))


def _repeat_factors(
    seen: Float[Array, " b"], factor: Float[Array, ""]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Factors of the model's probability outside and inside the history, on which it has the mass `seen`."""
    outside = jnp.maximum(1 - factor * seen, _OUTSIDE)
    others = jnp.where(factor == 1, 1.0, outside / jnp.maximum(1 - seen, 1e-6))
    return others, jnp.where(factor * seen > 1 - _OUTSIDE, (1 - _OUTSIDE) / seen, factor)


def _graph_items(
    mixture: Mixture, requests: RequestBatch, history: Int[Array, "b t"], tables: ItemTables
) -> ItemShares:
    """The graph's distribution, of items that may be recommended at all; its shares sum to 1 or are all 0."""
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
    """Places of the largest weights, and their shares, which sum to 1 or are all 0."""
    weights, best = top_k(weights, min(GRAPH_ITEMS, weights.shape[1]))
    shares = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    return ItemShares(jnp.where(weights > 0, best, -1), shares)


def _summed(rows: Int[Array, "b n"], weights: Float[Array, "b n"], *, size: int) -> ItemShares:
    """The rows, of so many items, in order, each once, with the sum of its weights; -1 and 0 in the places between."""
    rows = jnp.where(rows < 0, size, rows)
    order = order_of(rows, most=size)
    rows, weights = (jnp.take_along_axis(x, order, axis=-1) for x in (rows, weights))
    last = rows != jnp.pad(rows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    weights = jnp.where(last, run_sums(weights, rows), 0.0)
    return ItemShares(jnp.where(last & (rows < size), rows, -1), weights)


def _for_each(boosts: Boosts | None, history: Int[Array, "b t"]) -> Boosts | None:
    """The boosts with a row for each history."""
    if boosts is None:
        return None
    shape = (history.shape[0], boosts.rows.shape[1])
    return Boosts(jnp.broadcast_to(boosts.rows, shape), jnp.broadcast_to(boosts.factors, shape))


def _same(rows: Int[Array, "b n"], others: Int[Array, "b m"]) -> Bool[Array, "b n m"]:
    return rows[:, :, None] == others[:, None, :]
