"""Losses of models at each level of the codes: nats per target, of models on the validation users of one dataset.

    python -m experiments.benchmarks.levels --dataset ../shared/data/amazon14_beauty --out runs/levels.json \
        --models runs/amazon14_beauty/recipe.semid-hybrid_0/model runs/amazon14_beauty/recipe.sasrec-text_0/model

The codes are those of the first model. A model's probability of an item, graph and history left out, is the product of
its probabilities of each code given the codes before it, sums over the items that have them: so a model without codes
is compared with one that has some. The last figure of a row is what tells items of equal codes apart. Test is not read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float, Int
from scipy import sparse

from experiments.layout import read_layout
from semid.data import Examples
from semid.errors import SemidError
from semid.recommender import Recommender
from semid.stage import run_recorded

# Users per batch of probabilities of all items.
_USERS = 256


def main(dataset: Path, models: list[Path], out: Path, users: int = 2048, seed: int = 0) -> None:
    """Measure, and print a line for each model.

    Args:
        dataset: Folder of research data (see `experiments.layout`).
        models: Models trained on these data; the first one has codes.
        out: JSON file of the figures; it is read if it exists.
        users: Number of random validation users.
        seed: Seed of the users.
    """
    digests = [Recommender.from_pretrained(model).digest for model in models]
    request = {"models": digests, "dataset": dataset.name, "users": users, "seed": seed}
    for row in run_recorded(request, out, partial(_measured, dataset, models, users, seed))["rows"]:
        levels = " ".join(f"{nats:.3f}" for nats in row["levels"])
        print(f"{row['model']}: {levels}, sum {sum(row['levels']):.3f} nats; {row['on_items']:.3f} of it all on items")


def _measured(dataset: Path, models: list[Path], users: int, seed: int) -> dict[str, Any]:
    examples: Examples = read_layout(dataset).splits.examples("validation")
    examples = examples.take(np.random.default_rng(seed).permutation(len(examples))[:users])
    loaded = [Recommender.from_pretrained(model) for model in models]
    codes = loaded[0].codes
    if codes is None:
        raise SemidError(f"{models[0]}: expected a model of codes first, got {loaded[0].spec.model.title}")
    rows = []
    for path, model in zip(models, loaded, strict=True):
        starts = range(0, len(examples), _USERS)
        blocks = [examples.take(np.arange(at, min(at + _USERS, len(examples)))) for at in starts]
        losses, masses = zip(*(_of_block(model, block, codes) for block in blocks), strict=True)
        levels = np.concatenate(losses).mean(axis=0).round(4).tolist()
        rows.append({"model": str(path), "levels": levels, "on_items": round(float(np.concatenate(masses).mean()), 4)})
    return {"rows": rows}


def _of_block(
    model: Recommender, examples: Examples, codes: Int[np.ndarray, "items level"]
) -> tuple[Float[np.ndarray, "n levels"], Float[np.ndarray, " n"]]:
    log_probs = model.catalog_log_probs(examples.histories, graph_weight=0 if model.graph is not None else None)
    probs = np.exp(log_probs.astype(np.float64))
    return level_losses(probs, examples.targets, codes), probs.sum(axis=1)


def level_losses(
    probs: Float[np.ndarray, "n items"], targets: Int[np.ndarray, " n"], codes: Int[np.ndarray, "items level"]
) -> Float[np.ndarray, "n levels"]:
    """-log p of each code of the targets given the codes before, and of the item given its codes. Rows of `probs` are
    normalized first, so that these sum to -log of the target's probability."""
    user, items = np.arange(len(probs)), len(codes)
    before, losses = probs.sum(axis=1), []
    for level in range(1, codes.shape[1] + 1):
        groups = np.unique(codes[:, :level], axis=0, return_inverse=True)[1].reshape(-1)
        members = sparse.csr_array((np.ones(items), (np.arange(items), groups)))
        mass = (probs @ members)[user, groups[targets]]
        losses.append(np.log(before / mass))
        before = mass
    return np.column_stack([*losses, np.log(before / probs[user, targets])])


if __name__ == "__main__":
    tyro.cli(main)
