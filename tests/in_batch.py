"""Inputs and oracle of in-batch losses: all combinations of their options, and their rows by a double loop in numpy."""

from __future__ import annotations

import itertools

import numpy as np

N, DIM = 16, 4
OPTIONS = ("mask", "ids", "false_negatives", "log_popularity")
CHOICES = [combo for size in range(5) for combo in itertools.combinations(OPTIONS, size)]


def vectors(count: int, *, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(count, N, DIM)).astype(np.float32))


def options() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "mask": rng.random(N) < 0.7,
        "ids": rng.integers(0, 9, N).astype(np.int32),
        "false_negatives": rng.random((N, N)) < 0.2,
        "log_popularity": rng.normal(size=N).astype(np.float32),
    }


def naive_rows(logits: np.ndarray, options: dict[str, np.ndarray]) -> list[tuple[float, list[float]]]:
    """Logit of the own candidate and those of the negatives, of each unmasked anchor."""
    mask, ids, false = (options.get(name) for name in ("mask", "ids", "false_negatives"))
    logits = logits.astype(np.float64) - options.get("log_popularity", np.zeros(N))
    rows = []
    for r in range(N):
        negatives = []
        for c in range(N):
            same = ids is not None and ids[r] == ids[c]
            if c != r and not same and (mask is None or mask[c]) and not (false is not None and false[r, c]):
                negatives.append(logits[r, c])
        if mask is None or mask[r]:
            rows.append((logits[r, r], negatives))
    return rows


def cross_entropy(own: float, negatives: list[float]) -> float:
    return np.log(np.exp([own, *negatives]).sum()) - own


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
