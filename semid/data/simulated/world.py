"""A simulator with a known distribution of the next item: source of the embedded dataset, and of data for tests.

Items belong to *cells*, the leaves of a latent taxonomy (department > category > kind, each kind in several styles),
with Zipf popularity inside a cell. The items of a cell form *families*: variants of one product, adjacent in
popularity, with nearly the same content. A user's next item comes from a mixture of five components:

    taste        a cell from the user's favourite kinds in the user's style; favourites drift over the user's lifetime
    transition   a cell that follows the last item's kind in a sparse transition matrix, in the last item's style
    variant      another variant of one of the last three items, the last one most often
    successor    one of the few items that follow the last item in particular
    popularity   any cell, by its overall share

and within a cell or family an item is drawn by its share. Items the user has had and items not yet released have
probability zero, and the rest is renormalised, so `p(next | user, step, history)` is explicit: `Oracle` computes it,
rejection sampling draws from it. If the config has `events`, each item is shown, clicked or bought with the
probabilities of the component that it came from (`semid.data.simulated.events`); the items are the same either way.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from semid.data.dataset import Dataset
from semid.data.simulated.config import SimulatedConfig
from semid.data.simulated.content import item_table, numbered_ids
from semid.data.simulated.oracle import RECENT, Oracle, People, World, blocks, mixtures, normalized

START = 1_577_836_800  # 2020-01-01, in seconds
DAY = 86_400
HOME_SHARE = 0.7  # probability that a favourite kind is drawn from the user's home department
USER_BLOCK = 1 << 16
REJECTION_ROUNDS = 32  # after so many rejected draws, an item is drawn from the dense distribution


class Simulation(NamedTuple):
    """A dataset and the oracle that knows the distribution it was drawn from."""

    dataset: Dataset
    oracle: Oracle


def simulate(config: SimulatedConfig) -> Simulation:
    """Simulate the world of `config`, which `dataset.source["config"]` records."""
    # Each part has its own random stream, so that, say, switching images off changes no interaction.
    parts = (np.random.default_rng([config.seed, part]) for part in range(5))
    world_rng, people_rng, walk_rng, content_rng, log_rng = parts
    world = make_world(config, world_rng)
    people = make_people(config, world, people_rng)
    item = _walk(world, people, walk_rng)
    items = item_table(
        world.cell,
        np.log(world.group_share / (world.stop - world.start))[world.family],
        world.family,
        taxonomy=config.taxonomy,
        styles=config.styles,
        dim=config.content_dim,
        noise=config.content_noise,
        images=config.images,
        rng=content_rng,
    )
    dataset = Dataset(
        items=items,
        users=numbered_ids("u", config.num_users),
        user=np.repeat(np.arange(config.num_users, dtype=np.int32), people.lengths),
        item=item,
        time=people.time,
        name="simulated",
        source={"type": "simulated", "config": config.recorded()},
    )
    oracle = Oracle(world, people, dataset.item_ids)
    if config.events is None:
        return Simulation(dataset, oracle)
    log = oracle.draw_log(item, log_rng)
    weight = log.weight.astype(np.float32) if config.events.position_bias else None
    return Simulation(dataset.replace(event=log.event, weight=weight), dataclasses.replace(oracle, log=log))


def make_world(config: SimulatedConfig, rng: np.random.Generator) -> World:
    """Cells and their items, releases, transitions, successors, families."""
    num_items, num_cells = config.num_items, config.num_cells
    cell_share = normalized((1.0 + rng.permutation(num_cells)) ** -0.5)
    counts = 1 + rng.multinomial(num_items - num_cells, cell_share)
    first_slot = np.concatenate([[0], np.cumsum(counts)])
    cell_of_slot = np.repeat(np.arange(num_cells), counts)
    weight = (1.0 + np.arange(num_items) - first_slot[cell_of_slot]) ** -config.zipf
    share_of_slot = weight / np.bincount(cell_of_slot, weight)[cell_of_slot]
    row_of_slot = rng.permutation(num_items)
    slot_of_row = np.argsort(row_of_slot)
    cell = cell_of_slot[slot_of_row]
    release = np.full(num_items, START)
    late = rng.permutation(num_items)[: config.num_late]
    release[late] += (rng.uniform(0.2, 1.0, len(late)) * config.days * DAY).astype(np.int64)
    kinds = np.arange(config.num_kinds)[:, None]
    step = rng.integers(1, config.num_kinds, (config.num_kinds, config.next_kinds))  # never to the same kind
    next_kinds = (kinds + step) % config.num_kinds
    follow = rng.integers(config.next_kinds, size=(num_items, config.successors))
    next_cell = next_kinds[cell[:, None] // config.styles, follow] * config.styles + (cell % config.styles)[:, None]
    successor_slot = first_slot[next_cell] + (rng.random(next_cell.shape) * counts[next_cell]).astype(np.int64)
    is_first = rng.random(num_items) * config.family_size < 1  # geometric sizes, cut where a cell ends
    is_first[first_slot[:-1]] = True
    start = np.concatenate([first_slot[:-1], np.flatnonzero(is_first)])
    stop = np.concatenate([first_slot[1:], np.flatnonzero(is_first)[1:], [num_items]])
    family_of_slot = num_cells + np.cumsum(is_first) - 1
    group_share = np.concatenate([np.ones(num_cells), np.add.reduceat(share_of_slot, start[num_cells:])])
    others = 1 - share_of_slot / group_share[family_of_slot]
    per_others = np.divide(1, others, out=np.zeros(num_items), where=others > 0)
    return World(
        config=config,
        cell=cell.astype(np.int32),
        family=family_of_slot[slot_of_row].astype(np.int32),
        share=share_of_slot[slot_of_row],
        per_others=per_others[slot_of_row],
        release=release,
        successors=row_of_slot[successor_slot].astype(np.int32),
        next_kinds=next_kinds,
        cell_share=cell_share,
        row_of_slot=row_of_slot,
        start=start,
        stop=stop,
        group_share=group_share,
        cumulative=np.concatenate([[0.0], np.cumsum(share_of_slot)]),
    )


def make_people(config: SimulatedConfig, world: World, rng: np.random.Generator) -> People:
    """Draw the users' favourites, lengths, and times on a clock that all users share."""
    num_users, horizon = config.num_users, config.days * DAY
    home = _draw_kinds(world, rng, (num_users, 1)) // math.prod(config.taxonomy[1:])
    style = rng.integers(config.styles, size=(num_users, 1))
    early, other = (_draw_favourites(world, home, rng) * config.styles + style for _ in range(2))
    late = np.where(rng.random(early.shape) < config.drift, other, early)
    extra = rng.geometric(1 / (config.mean_length - config.min_length + 1), num_users) - 1
    lengths = np.minimum(config.min_length + extra, config.max_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # A lifetime takes about a quarter of the days; gaps of at least a second leave no ties.
    passed = np.cumsum(1 + rng.exponential(horizon / (4 * config.mean_length), offsets[-1]).astype(np.int64))
    start = START + (rng.random(num_users) * 0.75 * horizon).astype(np.int64)
    return People(early, late, offsets, passed + np.repeat(start - passed[offsets[:-1]], lengths))


def draw_next(
    world: World,
    people: People,
    *,
    users: Int[np.ndarray, " n"],
    seen: Int[np.ndarray, "n step"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " n"]:
    """Draw the next item row of users who have had the items `seen`, oldest first.

    Redrawing seen or unreleased items samples from the renormalised distribution. After `REJECTION_ROUNDS` rounds, the
    remaining users get an item from the same distribution in dense form.
    """
    steps = np.full(len(users), seen.shape[1])
    recent = np.full((len(users), RECENT), -1)
    recent[:, : seen.shape[1]] = seen[:, : -RECENT - 1 : -1]
    choices = mixtures(world, people, users=users, steps=steps, recent=recent)
    time = people.time_of(users, steps)
    chosen = np.empty(len(users), np.int32)
    left = np.arange(len(users))
    for _ in range(REJECTION_ROUNDS):
        drawn = world.draw(choices.take(left), rng)
        refused = (world.release[drawn] > time[left]) | (seen[left] == drawn[:, None]).any(axis=1)
        chosen[left] = drawn
        left = left[refused]
        if not len(left):
            return chosen
    for block in blocks(left, world.config.num_items):
        owner = np.repeat(np.arange(len(block)), seen.shape[1])
        p = world.dense(choices.take(block), time[block], seen=seen[block].reshape(-1), owner=owner)
        ends = np.cumsum(p, axis=1)
        chosen[block] = (ends <= rng.random(len(block))[:, None] * ends[:, -1:]).sum(axis=1)
    return chosen


def _walk(world: World, people: People, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Draw the item rows of all interactions, sorted by user."""
    item = np.empty(len(people.time), np.int32)
    lengths = people.lengths
    for first in range(0, len(lengths), USER_BLOCK):
        users = np.arange(first, min(first + USER_BLOCK, len(lengths)))
        users = users[np.argsort(-lengths[users], kind="stable")]  # longest first: users still active are a prefix
        rows = np.empty((len(users), lengths[users[0]]), np.int32)
        for step in range(rows.shape[1]):
            active = int((lengths[users] > step).sum())
            rows[:active, step] = draw_next(world, people, users=users[:active], seen=rows[:active, :step], rng=rng)
            item[people.offsets[users[:active]] + step] = rows[:active, step]
    return item


def _draw_kinds(world: World, rng: np.random.Generator, shape: tuple[int, ...]) -> Int[np.ndarray, "..."]:
    return rng.choice(len(world.cell_share), size=shape, p=world.cell_share) // world.config.styles


def _draw_favourites(world: World, home: Int[np.ndarray, "n 1"], rng: np.random.Generator) -> Int[np.ndarray, "n f"]:
    """Draw favourite kinds, most of them from the home department."""
    shape = (len(home), world.config.favourites)
    kinds_each = math.prod(world.config.taxonomy[1:])
    at_home = home * kinds_each + rng.integers(kinds_each, size=shape)
    return np.where(rng.random(shape) < HOME_SHARE, at_home, _draw_kinds(world, rng, shape))
