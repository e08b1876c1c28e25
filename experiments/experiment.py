"""One recipe for one seed, and the registry of the recipes in `experiments.configs`."""

from __future__ import annotations

import difflib
import enum
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from experiments import configs
from semid.config import later_field
from semid.encoders import ContentConfig
from semid.errors import SemidError
from semid.generators import GeneratorConfig
from semid.graphs import ItemGraphConfig
from semid.joint import JointConfig
from semid.tokenizers import TokenizerConfig

T = TypeVar("T")
_About = Annotated[T, tyro.conf.Suppress]  # no options of the command line

# Stands in `columns` and `features` for the dataset's own vector columns, as does leaving them open.
CONTENT = "content"
# The vector column of the teacher's item vectors.
TEACHER = "sasrec"


class Baseline(enum.Enum):
    """Rankers without settings, counted from training interactions."""

    POPULARITY = "popularity"
    BIGRAM = "bigram"
    ITEM_KNN = "item-knn"
    CONTENT_KNN = "content-knn"
    ORACLE = "oracle"
    """The true distribution of a simulated dataset: the ceiling."""


class TeacherVectors(enum.Enum):
    """Vectors in the column `TEACHER`; all but the first are controls."""

    OWN = "own"
    NOISE = "noise"
    SHUFFLED = "shuffled"
    """Those of other items."""


@dataclass(frozen=True)
class Experiment:
    """A model, what it needs to be trained, and what is known of it. Names are those of other experiments."""

    title: _About[str]
    """The model in a table of results."""
    model: GeneratorConfig | JointConfig | ItemGraphConfig | Baseline
    """The model to train and measure; the constants of an item graph are chosen on validation."""
    tokenizer: TokenizerConfig | None = None
    """Makes the codes that a generator reads; None: item numbers stand for them, as for SASRec alone."""
    sequences: dict[str, TokenizerConfig] = later_field({})
    """Tokenizers of further code sequences that a generator reads, by name."""
    teacher: str | None = None
    """The model whose ranking a generator is taught where its objective distills, and whose item vectors are the column
    `TEACHER` for tokenizers and models that name it."""
    vectors: TeacherVectors = TeacherVectors.OWN
    """Content of that column."""
    columns: dict[str, str] = later_field({})
    """Further vector columns for its tokenizers: the item vectors of these experiments, by the column's name."""
    graph: str | None = None
    """The item graph that is mixed with the model: measured without and with it."""
    encoders: ContentConfig | None = None
    """Encoders of an end-to-end model (pictures where there are any); None: items come as vectors."""
    weights: str | None = None
    """Folder of a pretrained encoder of texts, of pictures where these alone are read. In place of one from scratch it
    has side adapters; else it is tuned as `encoders` says."""
    beam_size: int = 50
    """Beams per user when it is measured."""
    cpu: float = 1.0
    """Share of all epochs under `--budget cpu`."""
    paper: _About[str] = ""
    datasets: _About[tuple[str, ...]] = ("amazon14_beauty",)
    """Those that the expected figure is of."""
    expected: _About[str] = ""
    """Expected figures."""
    minutes: _About[float | None] = None
    """Minutes of its own training on 2 CPU cores, where that was measured."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Experiments that come before it."""
        return tuple(name for name in (self.teacher, *self.columns.values(), self.graph) if name is not None)

    @property
    def seeded(self) -> bool:
        """Another seed gives another model of the same data."""
        return isinstance(self.model, GeneratorConfig | JointConfig)


@functools.cache
def experiments() -> dict[str, Experiment]:
    """All experiments by name, that of their file; of a file with several, FILE.VARIANT."""
    found: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(configs.__path__):
        made = importlib.import_module(f"{configs.__name__}.{module.name}").config()
        stem = module.name.replace("_", "-")
        own = {stem: made} if isinstance(made, Experiment) else {f"{stem}.{one}": made[one] for one in made}
        found |= own
    return found


def chosen(names: Iterable[str]) -> list[str]:
    """The experiments of these names; the name of a file stands for all of its variants.

    Raises SemidError for a name that does not exist, with the nearest one.
    """
    found: list[str] = []
    for name in names:
        own = [one for one in experiments() if one == name or one.startswith(f"{name}.")]
        if not own:
            files = {one.split(".")[0] for one in experiments()}
            near = difflib.get_close_matches(name, [*experiments(), *files], n=1, cutoff=0.0)
            raise SemidError(f"no experiment {name!r}; did you mean {near[0]}? `python -m experiments list` has all")
        found += [one for one in own if one not in found]
    return found
