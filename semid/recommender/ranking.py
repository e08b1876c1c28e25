"""Rankings and exact scores of item rows after histories, in batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from semid.catalog import SemanticCatalog
from semid.config import is_whole
from semid.data import Histories, as_masks
from semid.errors import SemidError
from semid.graphs.ranking import largest
from semid.recommender.lists import Sampling
from semid.recommender.mixing import log_factors
from semid.recommender.requests import power_of_two, request_batches, select_masks
from semid.recommender.scorers import Scorer
from semid.recommender.spec import ModelSpec
from seq_models import Boosts, Conditions, GroupLimits, GumbelNoise, RequestBatch, TopK, best_allowed, first_within

# Users a search runs at once, at the default beam; wider beams take proportionally fewer.
_BATCH, BEAM = 512, 50
# Exact scoring computes this many (history, item) pairs at once.
_PAIRS = 1 << 16
# ... and scoring of the whole catalogue this many histories.
_USERS = 8
# Lists up to this length share a program: they are computed at this length and cut.
_SHORTEST = 16
# A dense model scores every item of the catalogue: this many scores (64 MiB) at once.
_SCORES = 1 << 24

_best_allowed, _first_within = (jax.jit(chosen, static_argnums=2) for chosen in (best_allowed, first_within))


@dataclass(frozen=True, eq=False)
class ItemPopularity:
    """Popularity of a catalogue's items in training."""

    log_shares: Float[np.ndarray, " items"]
    """Logs of the items' smoothed shares of the interactions, -inf of removed items."""

    @classmethod
    def from_counts(cls, catalog: SemanticCatalog, train_counts: Int[np.ndarray, " items"]) -> ItemPopularity:
        """Popularity by numbers of interactions."""
        counts = np.where(catalog.active, train_counts + 1.0, 0)
        with np.errstate(divide="ignore"):
            return cls(np.log(counts / max(counts.sum(), 1)).astype(np.float32))

    @functools.cached_property
    def order(self) -> Int[np.ndarray, " items"]:
        """Item rows, the most popular first: sorted once, and not for each request."""
        return np.argsort(-self.log_shares, kind="stable").astype(np.int32)


class Ranking(NamedTuple):
    """A scorer on the items of a catalogue, whose popularity answers histories without items."""

    scorer: Scorer
    spec: ModelSpec
    catalog: SemanticCatalog
    popularity: ItemPopularity

    def top(
        self,
        histories: Histories,
        *,
        k: int,
        beam_size: int,
        exclude_seen: bool,
        allowed: Bool[np.ndarray, " items"] | Bool[np.ndarray, "n items"] | None = None,
        boosts: Boosts | None = None,
        conditions: Conditions | None = None,
        values: Float[np.ndarray, " events"] | None = None,
        limits: GroupLimits | None = None,
        sample: Sampling | None = None,
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Item rows best first, or as drawn, -1 where there are fewer than k, and their scores. With `values` of
        events, the items that the beams find are ranked by expected value, and scores are its logarithms."""
        k, beam_size = list_sizes(k, beam_size)
        if values is not None and sample is not None:
            raise SemidError("values rank the items and sampling draws them: ask for one of the two")
        exclude_seen |= bool(self._with_older(histories))
        if allowed is not None:
            allowed = as_masks(allowed, num_histories=len(histories), num_items=len(self.catalog))
        ranked = np.full((len(histories), k), -1, np.int32)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        size = self._batch_size(_BATCH * BEAM // max(beam_size, k, BEAM))
        batches = self._requests(
            histories, size, allowed=allowed, exclude_seen=exclude_seen, boosts=boosts, conditions=conditions
        )
        for index, requests in batches:
            noise = None if sample is None else sample.noise(index[0] + np.arange(len(requests.history)))
            limited = requests._replace(limits=limits if values is None else None, noise=noise)
            length = max(beam_size, k) if values is not None else self._list_length(k, beam_size, limits)
            top = self.scorer.top(limited, k=length, beam_size=beam_size)
            if values is not None:  # for the padded batch, so that shapes are few
                by_value = TopK(*jax.device_put(self._by_value(requests, top, values)))
                top = _first_within(by_value, limits, self._list_length(k, beam_size, limits))
            rows, of_rows = (np.asarray(part)[: len(index)] for part in top)
            ranked[index], scores[index] = rows[:, :k], of_rows[:, :k]
        if len(empty := np.flatnonzero(histories.lengths == 0)):
            noise = None if sample is None else sample.noise(np.resize(empty, power_of_two(len(empty))))
            popular = self.most_popular(len(empty), k, select_masks(allowed, empty), boosts, limits=limits, noise=noise)
            ranked[empty], scores[empty] = popular
        return ranked, scores

    def _list_length(self, k: int, beam_size: int, limits: GroupLimits | None) -> int:
        """Length of the list to compute, whose first k items are kept: every length is another program to compile.
        Under limits items are chosen one by one, so that long lists are slow."""
        if self.scorer.trie is None:
            return _rounded(k)
        return max(beam_size, k) if limits is None else min(_rounded(k), max(beam_size, k))

    def _by_value(
        self, requests: RequestBatch, top: TopK, values: Float[np.ndarray, " events"]
    ) -> tuple[Int[np.ndarray, "n m"], Float[np.ndarray, "n m"]]:
        """Items by expected value, p(item) times the sum of value p(event | item, history), and its logarithm."""
        events = np.exp(np.asarray(self.scorer.event_log_probs(requests, top.rows)))
        rows, log_probs = (np.asarray(part) for part in top)
        with np.errstate(divide="ignore"):
            log_values = np.where(rows >= 0, log_probs + np.log(events @ values), -np.inf).astype(np.float32)
        order = np.argsort(-log_values, axis=1, kind="stable")
        log_values = np.take_along_axis(log_values, order, axis=1)
        return np.where(log_values > -np.inf, np.take_along_axis(rows, order, axis=1), -1), log_values

    def event_log_probs(
        self,
        histories: Histories,
        rows: Int[np.ndarray, " n"] | Int[np.ndarray, "histories n"],
        *,
        conditions: Conditions | None = None,
    ) -> Float[np.ndarray, "histories n event"]:
        """Logarithms of p(event | item, history) of item rows, the same for all histories or each one's own."""
        number, events = rows.shape[-1], 0 if self.spec.conditions is None else len(self.spec.conditions.events)
        log_probs = np.empty((len(histories), number, events), np.float32)
        rows = np.broadcast_to(rows, (len(histories), number))
        width = power_of_two(max(number, 1))
        size = self._batch_size(min(_PAIRS // width, _BATCH))
        for index, requests in self._requests(histories, size, conditions=conditions):
            padded = np.full((len(requests.history), width), -1, np.int32)
            padded[: len(index), :number] = rows[index]
            values = np.asarray(self.scorer.event_log_probs(requests, jax.device_put(padded)))
            log_probs[index] = values[: len(index), :number]
        return log_probs

    def log_probs(
        self, histories: Histories, rows: Int[np.ndarray, " n"], *, conditions: Conditions | None = None
    ) -> Float[np.ndarray, "histories n"]:
        """Exact log-probabilities of item rows after each history (of popularity, after an empty one), -inf of removed
        items."""
        scores = np.empty((len(histories), len(rows)), np.float32)
        width = min(power_of_two(max(len(rows), 1)), _PAIRS)
        size = self._batch_size(min(_PAIRS // width, _BATCH))
        for index, requests in self._requests(histories, size, conditions=conditions):
            for start in range(0, len(rows), width):
                block = np.resize(rows[start : start + width], width)  # few shapes; repeated rows are cut off below
                values = np.asarray(self.scorer.log_probs(requests, jax.device_put(block)))
                kept = slice(start, min(start + width, len(rows)))
                scores[index, kept] = values[: len(index), : kept.stop - kept.start]
        scores[:, ~self.catalog.active[rows]] = -np.inf
        for user in self._with_older(histories):
            scores[user, np.isin(rows, histories[user])] = -np.inf
        scores[histories.lengths == 0] = self.popularity.log_shares[rows]
        return scores

    def catalog_log_probs(
        self, histories: Histories, *, conditions: Conditions | None = None
    ) -> Float[np.ndarray, "histories items"]:
        """`log_probs` of all items, at less cost: items whose codes begin alike share the computation."""
        scores = np.empty((len(histories), len(self.catalog)), np.float32)
        for index, requests in self._requests(histories, self._batch_size(_USERS), conditions=conditions):
            log_probs = np.asarray(self.scorer.catalog_log_probs(requests))
            scores[index] = log_probs[: len(index), : len(self.catalog)]
        for user in self._with_older(histories):
            scores[user, histories[user]] = -np.inf
        scores[histories.lengths == 0] = self.popularity.log_shares
        return scores

    def most_popular(
        self,
        n: int,
        k: int,
        allowed: Bool[np.ndarray, "masks items"] | None,
        boosts: Boosts | None = None,
        *,
        limits: GroupLimits | None = None,
        noise: GumbelNoise | None = None,
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """The allowed items that are most popular in training: the lists for n empty histories.

        `noise` may have more than n keys.
        """
        popularity, slots = self.popularity.log_shares, len(self.scorer.tables.codes)
        if all(option is None for option in (allowed, boosts, limits, noise)):
            rows, scores = _listed(self.popularity.order[None, :k], popularity[None], k)
            return np.broadcast_to(rows, (n, k)), np.broadcast_to(scores, (n, k))
        if boosts is not None:
            popularity = popularity + log_factors(boosts, len(popularity))
        all_alike = noise is None and (allowed is None or len(allowed) == 1)
        rows, scores = np.empty((1 if all_alike else n, k), np.int32), np.empty((1 if all_alike else n, k), np.float32)
        size = max(_SCORES // slots, 1)
        for start in range(0, len(rows), size):
            index = np.arange(start, min(start + size, len(rows)))
            padded = (min(size, power_of_two(len(index))), slots)
            own_noise = None if noise is None else noise._replace(keys=noise.keys[np.resize(index, padded[0])])
            block, masks = np.broadcast_to(popularity, (len(index), len(popularity))), select_masks(allowed, index)
            rows[index], scores[index] = _best(block, k, masks, limits, own_noise, padded=padded)
        return np.broadcast_to(rows, (n, k)), np.broadcast_to(scores, (n, k))

    def _with_older(self, histories: Histories) -> list[int]:
        """Indices of the histories with items to leave out that the model does not read: if items do not repeat, it
        leaves out those that it reads."""
        longer = np.flatnonzero(histories.lengths > self.spec.max_history)
        return [] if self.spec.repeat_factor else longer.tolist()

    def _requests(
        self,
        histories: Histories,
        size: int,
        *,
        allowed: Bool[np.ndarray, "masks items"] | None = None,
        exclude_seen: bool = False,
        boosts: Boosts | None = None,
        conditions: Conditions | None = None,
    ) -> Iterator[tuple[Int[np.ndarray, " n"], RequestBatch]]:
        self._check_events(histories)
        return request_batches(
            histories,
            size,
            max_history=self.spec.max_history,
            slots=len(self.scorer.tables.codes),
            allowed=allowed,
            exclude_seen=exclude_seen,
            boosts=boosts,
            conditions=conditions,
            times=self.spec.conditions is not None and self.spec.conditions.reads_times,
        )

    def _check_events(self, histories: Histories) -> None:
        """Raise SemidError for events that are not numbered by the model's names."""
        if self.spec.conditions is None or histories.events is None:
            return
        known, highest = len(self.spec.conditions.events), int(histories.events.max(initial=0))
        if known and highest > known:
            raise SemidError(f"expected events of histories from 0 (unknown) to {known}, the model's, got {highest}")

    def _batch_size(self, histories: int) -> int:
        """`histories`, or fewer if a dense model would hold too many scores; at least 1."""
        most = histories if self.spec.model.has_codes else min(histories, _SCORES // len(self.catalog))
        return max(most, 1)


def _rounded(k: int) -> int:
    """Length at which a list of k items is computed."""
    return max(power_of_two(k), _SHORTEST)


def list_sizes(k: int, beam_size: int) -> tuple[int, int]:
    """`k` and `beam_size` as Python integers. Raises SemidError unless they are whole numbers of at least 1."""
    if not all(is_whole(number) and number >= 1 for number in (k, beam_size)):
        raise SemidError(f"expected k and beam_size of at least 1, got {k!r} and {beam_size!r}; give whole numbers")
    return int(k), int(beam_size)


def _best(
    scores: Float[np.ndarray, "n items"],
    k: int,
    allowed: Bool[np.ndarray, "masks items"] | None,
    limits: GroupLimits | None,
    noise: GumbelNoise | None,
    *,
    padded: tuple[int, int],
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The k best allowed items of each row of scores, or those drawn, and their scores.

    On the device, scores are padded to the shape `padded`; `noise` has as many keys.
    """
    if allowed is not None:
        scores = np.where(allowed, scores, np.float32(-np.inf))
    if limits is not None or noise is not None:
        n, spare = len(scores), [(0, size - has) for size, has in zip(padded, scores.shape, strict=True)]
        nothing = jax.device_put(np.zeros((padded[0], 1), np.int32))
        requests = RequestBatch(nothing, nothing, limits=limits, noise=noise)
        scores = np.pad(scores, spare, constant_values=-np.inf)
        top = _best_allowed(jax.device_put(scores), requests, _rounded(k))
        return np.asarray(top.rows)[:n, :k], np.asarray(top.scores)[:n, :k]
    return _listed(largest(scores, k), scores, k)


def _listed(
    best: Int[np.ndarray, "n _"], scores: Float[np.ndarray, "n items"], k: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The `best` items of each row and their scores, -1 and -inf where there are fewer than k."""
    values = np.take_along_axis(scores, best, axis=1)
    missing = ((0, 0), (0, k - best.shape[1]))
    rows = np.pad(np.where(values == -np.inf, -1, best), missing, constant_values=-1)
    return rows, np.pad(values, missing, constant_values=-np.inf)
