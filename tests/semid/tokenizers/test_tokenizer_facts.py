"""The purpose of the tokenizer, on a small simulated catalogue: codes in use that rarely collide, and know users."""

import dataclasses

import jax
import numpy as np
import pytest

from quantizers import CodeHealth, Schedule, health, neighbor_prefix_overlap
from semid.data import Dataset
from semid.data.simulated import SimulatedConfig, simulate
from semid.graphs import VectorColumn, co_consumed, ppmi_vectors
from semid.tokenizers import LetterConfig, RQKmeansConfig, RQVaeConfig, SemanticTokenizer, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig, make_mesh

SEEDS = (0, 1, 2)


def _config(sizes: tuple[int, ...], *, epochs: int, batch_size: int, rate: float, hidden=(256, 128)) -> RQVaeConfig:
    optimizer = OptimizerConfig(learning_rate=rate)
    training = TrainingConfig(epochs=epochs, batch_size=batch_size, validate_every=epochs, optimizer=optimizer)
    return RQVaeConfig(sizes, hidden=hidden, training=training)


# Trained until reconstruction is good: collisions fall with it, usage is there from the start.
OURS = _config((32, 32, 32), epochs=200, batch_size=200, rate=1e-2)
# More codes, which random ones fill less.
MANY = _config((128, 128, 128), epochs=40, batch_size=100, rate=3e-3)


@pytest.fixture(scope="module")
def catalogue() -> Dataset:
    return simulate(SimulatedConfig(num_items=600, num_users=600, family_size=1.0, images=False)).dataset


def _codes(folder, dataset: Dataset, method, *, seed: int, **options) -> np.ndarray:
    config = TokenizerConfig(method, ("content",), **options)
    mesh = make_mesh(jax.devices()[:1])
    tokenizer = SemanticTokenizer.fit(dataset, config, seed=seed, folder=folder / f"{seed} {options}", mesh=mesh)
    return tokenizer.encode(dataset.vectors("content"))


def _alive(found: CodeHealth) -> bool:
    """Usage of 95% and perplexity of 70% of the codebook, at every level."""
    return all(level.usage >= 0.95 and level.perplexity >= 0.7 * level.size for level in found.levels)


def test_codes_live_and_collide_half_as_often_as_those_of_residual_k_means(tmp_path, catalogue):
    collisions = {"ours": 0.0, "k-means": 0.0}
    for seed in SEEDS:
        ours = health(_codes(tmp_path, catalogue, OURS, seed=seed), OURS.level_sizes)
        assert _alive(ours), ours
        plain = RQKmeansConfig(OURS.level_sizes)
        collisions["ours"] += ours.collision_rate
        collisions["k-means"] += health(_codes(tmp_path, catalogue, plain, seed=seed), OURS.level_sizes).collision_rate
    assert collisions["ours"] <= collisions["k-means"] / 2, collisions


def test_without_initialization_and_care_codebooks_collapse(tmp_path, catalogue):
    naive = dataclasses.replace(MANY, kmeans_iterations=0, reseed=False)
    for seed in SEEDS:
        found = health(_codes(tmp_path / "naive", catalogue, naive, seed=seed), MANY.level_sizes)
        assert min(level.usage for level in found.levels) < 0.45, found
    cared = health(_codes(tmp_path / "cared", catalogue, MANY, seed=0), MANY.level_sizes)
    assert _alive(cared), cared


def _half(world: Dataset, users: slice) -> Dataset:
    """The world as some of its users know it."""
    chosen = np.arange(world.num_users)[users]
    rows = np.isin(world.user, chosen)
    user = np.searchsorted(chosen, world.user[rows]).astype(np.int32)
    return world.replace(user=user, item=world.item[rows], time=world.time[rows], users=world.users.take(chosen))


def test_alignment_gains_by_what_users_do_and_by_nothing_else(tmp_path):
    """Content is noisy, half of the users align, and the other half say which items are consumed together."""
    world = simulate(SimulatedConfig(num_items=400, num_users=4000, images=False, content_noise=1.5)).dataset
    seen, held_back = _half(world, slice(0, 2000)), _half(world, slice(2000, None))
    neighbors = co_consumed(held_back.splits.train, num_items=400, window=5, seed=0)
    true = ppmi_vectors(seen.splits.train, num_items=400, dim=32, window=5, seed=0)
    rng = np.random.default_rng(0)
    arms = {
        "none": None,
        "true": true,
        "random": rng.normal(size=true.shape),
        "shuffled": true[rng.permutation(len(true))],
    }
    method = _config((32, 32, 32), epochs=150, batch_size=100, rate=3e-3, hidden=(128,))
    sharing = {}
    for name, vectors in arms.items():
        options = {}
        dataset = seen
        if vectors is not None:
            dataset = seen.with_vectors("signal", vectors.astype(np.float32))
            options = {
                "alignment": (LetterConfig(Schedule(1.0), temperature=0.2),),
                "signal": VectorColumn("signal"),
            }
        codes = [_codes(tmp_path / name, dataset, method, seed=seed, **options) for seed in (0, 1)]
        sharing[name] = np.mean([neighbor_prefix_overlap(of, neighbors)[0] for of in codes])
    assert sharing["true"] > 1.2 * sharing["none"], sharing
    assert max(sharing["random"], sharing["shuffled"]) <= sharing["none"], sharing
