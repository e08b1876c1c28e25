"""How well lists follow a requested group, such as a genre or brand, on the interactions of a real shop.

    python -m experiments.benchmarks.steering --dataset ../shared/data/ml1m --group categories --epochs 4
    python -m experiments.benchmarks.steering --dataset ../shared/data/amazon14_beauty --group brand --held-out .2
    python -m experiments.benchmarks.steering --dataset ../shared/data/ml1m --group categories --held-out .2 \
        --text-columns title description

A generator that was told the next item's group in training, and one of the same codes and settings that was not. Test
users are asked for the first group of their target that not all items share (`own`) or of another user's
(`exchanged`), and by a mask on the generator that was never told, which is what asking can give at most. NDCG@10 is of
all items; obedience is the share of the ten that are in the group of the target.

`excluded` asks for anything but the group of the last item, of users whose target is in another: by a mask. With
`--held-out`, a third generator is told the names of groups as texts, but never those of this share of them, drawn by
the seed; users whose target is in one of these are asked by its name. With `--text-columns` it is told these columns of
the item instead, such as its description, without the words of the held-out names: the encoder of texts knows them,
the generator never read them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import tyro
from jaxtyping import Bool, Float, Int

from experiments.benchmarks.conditions import ndcg_at_10
from experiments.data import stored_dataset
from semid.artifacts import try_file
from semid.catalog import SemanticCatalog
from semid.data import Dataset, Examples, SourceOrder, Tags
from semid.data.simulated import SimulatedConfig
from semid.encoders import with_text_vectors
from semid.evaluation import group_ids
from semid.generators import ConditionsConfig, GeneratorConfig, train
from semid.recommender import Recommender, encode_texts
from semid.stage import run_recorded
from semid.tokenizers import RQKmeansConfig, TokenizerConfig, tokenize


@dataclass(frozen=True)
class Steering:
    """Data, training and questions."""

    dataset: Path
    """Dataset folder (`semid prepare`), or one that `experiments.layout` reads."""
    group: str
    """Column of items with their groups."""
    epochs: float | None = None
    """Passes over the training data; none given: the default of `semid train`."""
    drop_conditions: float = 0.1
    """Share of the conditions that training drops."""
    film: bool = False
    """Conditions scale and shift the state."""
    held_out: float = 0.0
    """Share of the groups whose names are held out from training texts; 0: no texts."""
    text_columns: tuple[str, ...] = ()
    """Columns of items from which texts are written; none given: that of the groups."""
    split: Literal["validation", "test"] = "test"
    """Split of the targets."""
    users: int = 4096
    """Number of random users."""
    seed: int = 0
    """Seed of codes, models and users."""


@dataclass(frozen=True)
class Question:
    """Users, the group of each target, the items of each group, and the groups of items with equal codes."""

    examples: Examples
    own: Int[np.ndarray, " n"]
    members: Bool[np.ndarray, "tags items"]
    names: list[str]
    alike: Int[np.ndarray, " items"]

    def take(self, rows: Int[np.ndarray, " m"]) -> Question:
        """Some of the users."""
        return replace(self, examples=self.examples.take(rows), own=self.own[rows])

    def asked(self, part: str, groups: Int[np.ndarray, " n"]) -> list[dict[str, str]]:
        """One condition per user, which asks for a group by its name."""
        return [{part: self.names[number]} for number in groups]

    def gains(self, ranked: Int[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
        """NDCG@10 of each user's list."""
        return ndcg_at_10(ranked, self.examples, self.alike)

    def figures(
        self, lists: dict[str, Int[np.ndarray, "n k"]], groups: Int[np.ndarray, " n"], what: str = "obedience"
    ) -> dict[str, float]:
        """Mean NDCG@10 of lists, and `what`, the share of their items in each user's group."""
        inside = {name: self.members[groups[:, None], ranked] & (ranked >= 0) for name, ranked in lists.items()}
        found = {f"NDCG@10, {name}": float(self.gains(ranked).mean()) for name, ranked in lists.items()}
        return found | {f"{what}, {name}": float(share.mean()) for name, share in inside.items()}


def main(config: tyro.conf.OmitArgPrefixes[Steering], out: Path = Path("runs/steering")) -> None:
    """Train, measure and print.

    Args:
        config: Settings of the measurement.
        out: Folder for data, codes, models and a JSON file per split.
    """
    file = try_file(out / f"{config.split}.json")
    out = file.parent
    data = stored_dataset(config.dataset, out / "dataset", world=SimulatedConfig(), ties=SourceOrder())
    request = asdict(config) | {"dataset": data.digest}
    for name, value in run_recorded(request, file, partial(_measured, data, config, out)).items():
        print(f"{name:42s} {value:.4f}")


def _measured(dataset: Dataset, config: Steering, out: Path) -> dict[str, float]:
    catalog = tokenize(dataset, TokenizerConfig(RQKmeansConfig()), out=out / "catalog", seed=config.seed)
    plain = GeneratorConfig(features=tuple(dataset.vector_columns))
    plain = replace(plain, training=replace(plain.training, epochs=config.epochs))
    how = ConditionsConfig(film=config.film, drop_conditions=config.drop_conditions)
    asked = replace(plain, conditions=replace(how, on_group=config.group))
    never = train(dataset, catalog, plain, out=out / "never", seed=config.seed)
    told = train(dataset, catalog, asked, out=out / "told", seed=config.seed)

    question = _question(dataset, config, group_ids(catalog.codes))
    own, ask = question.own, partial(_ranked, examples=question.examples)
    wished, members = question.asked("group", own), question.members[own]
    lists = {
        "never told": ask(never),
        "never told, masked": ask(never, allowed=members),
        "any": ask(told),
        "own": ask(told, condition=wished),
        "own, masked": ask(told, condition=wished, allowed=members),
        "exchanged": ask(told, condition=question.asked("group", np.roll(own, 1))),
    }
    found = question.figures(lists, own)
    for name, other in (("any", "never told"), ("own, masked", "never told, masked")):
        found |= _difference(f"{name} - {other}", question.gains(lists[name]) - question.gains(lists[other]))
    found |= _exclusion(never, question)
    if config.held_out:
        found |= _held_out_words(dataset, catalog, replace(plain, conditions=how), config, question, out)
    return found


def _question(dataset: Dataset, config: Steering, alike: Int[np.ndarray, " items"]) -> Question:
    """Users whose target has a group; its first one counts."""
    tags, examples = Tags.from_column(dataset.items, config.group), dataset.splits.examples(config.split)
    first = tags.padded()[:, 0]
    examples = examples.take(np.flatnonzero(first[examples.targets] >= 0))
    examples = examples.take(np.random.default_rng(config.seed).permutation(len(examples))[: config.users])
    members = _members(tags, dataset.num_items)
    return Question(examples, first[examples.targets], members, tags.names.to_pylist(), alike)


def _exclusion(model: Recommender, question: Question) -> dict[str, float]:
    """Users whose target is in no group of the last item: with all items and without those of its first group."""
    examples = question.examples
    last = question.members[:, examples.histories.items[examples.histories.ends - 1]]
    unwanted = last.argmax(axis=0)
    shared = np.count_nonzero(last & question.members[:, examples.targets], axis=0)
    rows = np.flatnonzero(last[unwanted, np.arange(len(unwanted))] & (shared == 0))
    some, unwanted = question.take(rows), unwanted[rows]
    lists = {
        "all items": _ranked(model, some.examples),
        "excluded": _ranked(model, some.examples, allowed=~some.members[unwanted]),
    }
    return some.figures(lists, unwanted, "in the last's group")


def _held_out_words(
    dataset: Dataset,
    catalog: SemanticCatalog,
    plain: GeneratorConfig,
    config: Steering,
    question: Question,
    out: Path,
) -> dict[str, float]:
    """Users whose target is in a group with a held-out name, asked by this name or by another held-out one."""
    rng, count = np.random.default_rng(config.seed), len(question.names)
    secret = rng.permutation(count)[: max(1, round(config.held_out * count))]
    data = with_text_vectors(dataset)
    encoder = data.encoders[-1]
    names = {question.names[number] for number in secret}
    shown = without_names(data.items, config.group, names)
    for column in config.text_columns:
        shown = without_words(shown, column, names)
    columns = config.text_columns or (config.group,)
    words = replace(plain.conditions, on_text=encoder.column, text_columns=columns)
    asked, shop = replace(plain, conditions=words), data.replace(items=shown)
    told = train(shop, catalog, asked, out=out / "words", seed=config.seed, other_dataset=True)
    known = np.count_nonzero(encode_texts(encoder, question.names), axis=1) > 0  # of some word
    some = question.take(np.flatnonzero(np.isin(question.own, secret[known[secret]])))
    lists = {
        "held-out words, any": _ranked(told, some.examples),
        "held-out words, own": _ranked(told, some.examples, condition=some.asked("text", some.own)),
        "held-out words, exchanged": _ranked(told, some.examples, condition=some.asked("text", np.roll(some.own, 1))),
    }
    return some.figures(lists, some.own) | {"held-out words, users": float(len(some.own))}


def without_names(items: pa.Table, column: str, names: set[str]) -> pa.Table:
    """The items without these values of a column of strings or of lists of strings."""

    def left(value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list):
            return [each for each in value if each not in names]
        return None if value in names else value

    kept = pa.array([left(value) for value in items[column].to_pylist()], items.schema.field(column).type)
    return items.set_column(items.schema.get_field_index(column), column, kept)


def without_words(items: pa.Table, column: str, names: set[str]) -> pa.Table:
    """The items without these names, and words that begin with one, in a column of texts."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names)))})\w*", re.IGNORECASE)
    kept = pa.array(
        [None if text is None else pattern.sub("", text) for text in items[column].to_pylist()], pa.string()
    )
    return items.set_column(items.schema.get_field_index(column), column, kept)


def _members(tags: Tags, num_items: int) -> Bool[np.ndarray, "tags items"]:
    places = tags.padded()
    members = np.zeros((len(tags), num_items), bool)
    for column in places.T:
        there = column >= 0
        members[column[there], np.flatnonzero(there)] = True
    return members


def _ranked(
    model: Recommender,
    examples: Examples,
    *,
    condition: list[dict[str, str]] | None = None,
    allowed: Bool[np.ndarray, "n items"] | None = None,
) -> Int[np.ndarray, "n k"]:
    return model.rank(examples.histories, k=10, exclude_seen=False, allowed=allowed, condition=condition)


def _difference(name: str, values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Mean over users, and its standard error."""
    return {
        f"NDCG@10, {name}": float(values.mean()),
        f"{name}, standard error": float(values.std(ddof=1) / len(values) ** 0.5),
    }


if __name__ == "__main__":
    tyro.cli(main)
