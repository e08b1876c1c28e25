"""A simulated user's next item, written out item by item: what the tests compare the simulator with."""

from __future__ import annotations

import numpy as np

from semid.data import Histories


def components(simulation, user: int, step: int) -> np.ndarray:
    """Unnormalized probabilities [component, item] of the item after a user's first `step`."""
    dataset, oracle = simulation
    world, people = oracle.world, oracle.people
    mix, num_items = world.config.mixture, world.config.num_items
    rows = dataset.item[dataset.offsets[user] :][:step]
    age = step / (people.lengths[user] - 1)
    taste, transition = np.zeros((2, len(world.cell_share)))
    for early, late, weight in zip(people.early[user], people.late[user], np.array([4, 2, 1]) / 7, strict=True):
        taste[early] += mix.taste * weight * (1 - age)
        taste[late] += mix.taste * weight * age
    if step:
        kind, style = divmod(world.cell[rows[-1]], world.config.styles)
        for following, weight in zip(world.next_kinds[kind], np.array([8, 4, 2, 1]) / 15, strict=True):
            transition[following * world.config.styles + style] += mix.transition * weight
    popularity = mix.popularity * world.cell_share
    variant, successor = np.zeros((2, num_items))
    for recent, weight in zip(rows[:-4:-1], np.array([4, 2, 1]) / 7, strict=False):
        others = other_variants(world, recent)
        for other in others:
            variant[other] += mix.variant * weight * world.share[other] / world.share[others].sum()
    if step:
        for following, weight in zip(world.successors[rows[-1]], np.array([2, 1]) / 3, strict=True):
            successor[following] += mix.successor * weight
    of_cells = [each[world.cell] * world.share for each in (taste, transition, popularity)]
    p = np.array([of_cells[0], of_cells[1], variant, successor, of_cells[2]])
    time = dataset.time[dataset.offsets[user] + step]
    p[:, [i for i in range(num_items) if i in rows or world.release[i] > time]] = 0
    return p


def other_variants(world, item: int) -> np.ndarray:
    """Rows of the other items of an item's family."""
    return np.flatnonzero((world.family == world.family[item]) & (np.arange(len(world.family)) != item))


def history_of(simulation, user: int, step: int) -> Histories:
    """A user's first `step` items."""
    dataset = simulation.dataset
    rows = dataset.item[dataset.offsets[user] :][:step]
    return Histories(np.array([user], np.int32), rows, np.array([0]), np.array([step]))
