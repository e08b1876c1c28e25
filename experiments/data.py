"""Datasets of experiments: from a folder or simulated, written once, and refused if they differ later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.layout import read_layout
from semid.artifacts import MANIFEST
from semid.data import Dataset, SourceOrder, TieRule
from semid.data.simulated import SimulatedConfig, simulate
from semid.errors import SemidError
from semid.stage import store_dataset
from semid.training import on_first

# World of runs without a dataset, with another seed for each run; its products have no variants.
WORLD = SimulatedConfig(num_items=1_000, family_size=1.0)


def twin_name(name: str, ties: TieRule) -> str:
    """Name of a dataset with its tie rule, as other rules have tables of their own."""
    return name if ties == SourceOrder() else f"{name}_{ties.description.replace(' ', '_')}"


def read_dataset(folder: Path) -> Dataset:
    """Read a dataset from a folder that `semid prepare` wrote, or in the layout of the development data."""
    return Dataset.load(folder) if (folder / MANIFEST).is_file() else read_layout(folder)


def stored_dataset(source: Path | None, path: Path, *, world: SimulatedConfig, ties: TieRule) -> Dataset:
    """A dataset from a folder of `semid prepare`, a layout folder, or a simulated world, stored as an artifact.

    Raises SemidError if `path` has a dataset of another source, or if `source` is prepared with other `ties`.
    """

    def read() -> Dataset:
        if source is not None and not (source / MANIFEST).is_file():
            return read_layout(source, ties=ties)
        dataset = simulate(world).dataset if source is None else Dataset.load(source)
        if ties not in (SourceOrder(), dataset.ties):
            raise SemidError(f"{source or 'simulated'}: ties are {dataset.ties.description}; prepare it with --ties")
        return dataset

    on_first(lambda: store_dataset(read(), path) and None)
    return Dataset.load(path)


def world_of(seed: int, *, small: bool) -> SimulatedConfig:
    """The simulated world of a seed."""
    world = replace(WORLD, seed=seed)
    return replace(world, num_items=120, num_users=60, taxonomy=(2, 2, 2)) if small else world
