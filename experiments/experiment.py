"""`Experiment`: a model and everything needed to train it, and the registry of `experiments.configs`."""

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
_About = Annotated[T, tyro.conf.Suppress]  # fields that are no command-line options

# In `columns` and `features`, stands for the dataset's own vector columns; None means the same.
CONTENT = "content"
# The vector column of the teacher's item vectors.
TEACHER = "sasrec"


class Baseline(enum.Enum):
    """Rankers without settings, from counts of training interactions."""

    POPULARITY = "popularity"
    BIGRAM = "bigram"
    ITEM_KNN = "item-knn"
    CONTENT_KNN = "content-knn"
    ORACLE = "oracle"
    """The true distribution of a simulated dataset: the ceiling."""


class TeacherVectors(enum.Enum):
    """Content of the column `TEACHER`; all but the first are controls."""

    OWN = "own"
    NOISE = "noise"
    SHUFFLED = "shuffled"
    """Vectors of other items."""


@dataclass(frozen=True)
class Experiment:
    """A model, everything needed to train it, and its expected results. Names refer to other experiments."""

    title: _About[str]
    """Name of the model in tables of results."""
    model: GeneratorConfig | JointConfig | ItemGraphConfig | Baseline
    """The model to train and measure; the constants of an item graph are chosen on validation."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of the codes that a generator reads; None: item numbers as codes, for SASRec only."""
    sequences: dict[str, TokenizerConfig] = later_field({})
    """Tokenizers of further code sequences that a generator reads, by name."""
    teacher: str | None = None
    """Model whose ranking a generator learns if its objective distills, and whose item vectors are the column `TEACHER`
    for tokenizers and models that use it."""
    vectors: TeacherVectors = TeacherVectors.OWN
    """Content of the column `TEACHER`."""
    columns: dict[str, str] = later_field({})
    """Further vector columns for its tokenizers: column names and the experiments whose item vectors they hold."""
    graph: str | None = None
    """Item graph to mix with the model, which is measured with and without it."""
    encoders: ContentConfig | None = None
    """Encoders of an end-to-end model (of pictures, if there are any); None: items are given as vectors."""
    weights: str | None = None
    """Folder of a pretrained encoder of texts, or of pictures if only these are read. If it replaces one from scratch,
    it gets side adapters; otherwise `encoders` gives its tuning."""
    beam_size: int = 50
    """Beams per user in the measurement."""
    cpu: float = 1.0
    """Share of all epochs under `--budget cpu`."""
    paper: _About[str] = ""
    datasets: _About[tuple[str, ...]] = ("amazon14_beauty",)
    """Datasets of the expected figures."""
    expected: _About[str] = ""
    """Expected figures."""
    minutes: _About[float | None] = None
    """Minutes of its own training on 2 CPU cores, if measured."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Experiments that must run before it."""
        return tuple(name for name in (self.teacher, *self.columns.values(), self.graph) if name is not None)

    @property
    def seeded(self) -> bool:
        """True if another seed gives another model of the same data."""
        return isinstance(self.model, GeneratorConfig | JointConfig)


@functools.cache
def experiments() -> dict[str, Experiment]:
    """All experiments by name: FILE, or FILE.VARIANT for a file with several."""
    found: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(configs.__path__):
        config = importlib.import_module(f"{configs.__name__}.{module.name}").config()
        stem = module.name.replace("_", "-")
        own = {stem: config} if isinstance(config, Experiment) else {f"{stem}.{one}": config[one] for one in config}
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
