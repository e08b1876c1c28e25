"""Value of one model per group of items, such as a section of a shop, combined by a distribution over groups.

    python -m experiments.benchmarks.group_heads --dataset ../shared/data/amazon14_beauty --film

Each item is in one group, the second step of its path of categories. Two generators of the same codes and settings, one
of which was told the next item's group in training (structured human priors, arXiv 2511.10492, made exact): its
distribution under a group, among the group's items alone, is that group's head, and

    p(item | history) = p(group | history) p(item | history, group)

with the probability of the group that the same model gives when it is asked for nothing sums to one over all items.
`inside` is the loss of the target's codes among the items of its group, level by level, in nats; `switch` that of the
group. What is finished is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import tyro
from jaxtyping import Float, Int
from scipy.special import log_softmax, logsumexp

from experiments.benchmarks.conditions import ndcg_at_10
from experiments.data import stored_dataset
from semid.artifacts import try_file
from semid.data import Dataset, Examples, SourceOrder
from semid.data.simulated import SimulatedConfig
from semid.evaluation import group_ids
from semid.generators import ConditionsConfig, GeneratorConfig, train
from semid.recommender import Recommender
from semid.stage import run_recorded
from semid.tokenizers import RQKmeansConfig, TokenizerConfig, tokenize

_COLUMN = "section"
_BLOCK = 256  # histories per batch of scores of all items


@dataclass(frozen=True)
class GroupHeads:
    """Data, training and questions."""

    dataset: Path
    """Dataset folder (`semid prepare`), or one that `experiments.layout` reads."""
    epochs: float | None = None
    """Passes over the training data; none given: the default of `semid train`."""
    film: bool = False
    """Groups scale and shift the state that an item is decoded from, instead of being added to the input."""
    split: Literal["validation", "test"] = "test"
    users: int = 2048
    """Number of random users."""
    seed: int = 0


def main(config: tyro.conf.OmitArgPrefixes[GroupHeads], out: Path = Path("runs/group_heads")) -> None:
    """Train, measure and print.

    Args:
        config: Settings of the measurement.
        out: Folder for data, codes, models and group_heads.json.
    """
    file = try_file(out / "group_heads.json")
    out = file.parent
    data = stored_dataset(config.dataset, out / "dataset", world=SimulatedConfig(), ties=SourceOrder())
    request = asdict(config) | {"dataset": data.digest}
    for name, value in run_recorded(request, file, partial(_measured, data, config, out)).items():
        print(f"{name:32s} {value:.4f}")


def _measured(dataset: Dataset, config: GroupHeads, out: Path) -> dict[str, float]:
    names, group = sections(dataset)
    column = pa.array([names[number] for number in group])
    dataset = dataset.replace(items=dataset.items.append_column(_COLUMN, column))
    catalog = tokenize(dataset, TokenizerConfig(RQKmeansConfig()), out=out / "catalog", seed=config.seed)
    plain = GeneratorConfig()
    plain = replace(plain, training=replace(plain.training, epochs=config.epochs))
    told_of = replace(plain, conditions=ConditionsConfig(on_group=_COLUMN, film=config.film))
    never = train(dataset, catalog, plain, out=out / "never", seed=config.seed)
    told = train(dataset, catalog, told_of, out=out / "told", seed=config.seed)

    examples = dataset.splits.examples(config.split)
    drawn = np.random.default_rng(config.seed).permutation(len(examples))[: config.users]
    sums: dict[str, list[float]] = {}
    for block in np.array_split(drawn, -(-len(drawn) // _BLOCK)):
        for name, values in _of_users(never, told, examples.take(block), group, names).items():
            sums.setdefault(name, []).extend(values)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _of_users(
    never: Recommender, told: Recommender, examples: Examples, group: Int[np.ndarray, " items"], names: list[str]
) -> dict[str, Float[np.ndarray, " n"]]:
    """All figures of each user."""
    alone, unasked = (log_softmax(model.catalog_log_probs(examples.histories), axis=1) for model in (never, told))
    heads = np.full_like(unasked, -np.inf)
    for number, name in enumerate(names):
        asked = told.catalog_log_probs(examples.histories, condition={"group": name})
        heads[:, group == number] = log_softmax(asked[:, group == number], axis=1)
    scores = {
        "never told": alone,
        "any": unasked,
        "heads": heads + switch(unasked, group, len(names))[:, group],
        "heads, switch of never told": heads + switch(alone, group, len(names))[:, group],
    }
    found, codes = {}, np.asarray(never.catalog.codes)
    for name, values in scores.items():
        ranked = np.argsort(-values, axis=1, kind="stable")[:, :10]
        found[f"NDCG@10, {name}"] = ndcg_at_10(ranked, examples, group_ids(codes))
        found[f"bits of groups in the list, {name}"] = entropy(group[ranked], len(names))
        own = switch(values, group, len(names))[np.arange(len(values)), group[examples.targets]]
        found[f"switch, {name}"] = -own
        levels = inside(values, examples.targets, group, codes)
        found |= {f"inside, level {level + 1}, {name}": loss for level, loss in enumerate(levels)}
    return found


def sections(dataset: Dataset) -> tuple[list[str], Int[np.ndarray, " items"]]:
    """The sorted second steps of category paths, and the index of each item's; "" if it has none."""
    steps = [(path or [])[1:2] for path in dataset.items["categories"].to_pylist()]
    names, group = np.unique([step[0] if step else "" for step in steps], return_inverse=True)
    return [name or "none" for name in names.tolist()], group


def switch(
    log_probs: Float[np.ndarray, "n items"], group: Int[np.ndarray, " items"], groups: int
) -> Float[np.ndarray, "n groups"]:
    """Log-probabilities of the groups."""
    return np.stack([logsumexp(log_probs[:, group == number], axis=1) for number in range(groups)], axis=1)


def inside(
    log_probs: Float[np.ndarray, "n items"],
    targets: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " items"],
    codes: Int[np.ndarray, "items level"],
) -> Float[np.ndarray, "level n"]:
    """Losses of the targets' codes, given the codes before, among the items of the target's group."""
    same = group[targets][:, None] == group[None]
    mass = [logsumexp(np.where(same, log_probs, -np.inf), axis=1)]
    for level in range(codes.shape[1]):
        same = same & (codes[targets, level][:, None] == codes[None, :, level])
        mass.append(logsumexp(np.where(same, log_probs, -np.inf), axis=1))
    return -np.diff(np.stack(mass), axis=0)


def entropy(groups: Int[np.ndarray, "n k"], number: int) -> Float[np.ndarray, " n"]:
    """Entropy of the groups in each list, in bits."""
    shares = np.stack([(groups == each).mean(axis=1) for each in range(number)], axis=1)
    return -(shares * np.log2(np.maximum(shares, 1e-12))).sum(axis=1)


if __name__ == "__main__":
    tyro.cli(main)
