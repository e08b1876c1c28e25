"""Runs of experiments: first the experiments that they need, then codes, then the model, as stages in one folder.

    OUT/dataset                the dataset (simulated: one per seed, dataset_SEED)
    OUT/shared/...             stages that several runs read: codes, warm-ups of end-to-end training
    OUT/NAME_SEED/model        the trained model (item graphs know no seed: NAME/model)
    OUT/NAME_SEED/results.json its measurement

`FOLDER.made.json` next to a stage's folder records the minutes it took, and the code that made it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np

from experiments.budgets import Budget, within
from experiments.experiment import CONTENT, TEACHER, Baseline, Experiment, TeacherVectors, experiments
from experiments.provenance import code
from semid.artifacts import MANIFEST, read_json, sha256_json, write_json
from semid.catalog import SemanticCatalog
from semid.config import difference, to_dict
from semid.data import Dataset
from semid.encoders import ContentConfig, FusionConfig, PretrainedImage, PretrainedText, read_content
from semid.errors import SemidError, did_you_mean
from semid.evaluation import Ranker, baselines
from semid.generators import GeneratorConfig, train
from semid.graphs import ItemGraphConfig, ItemKNN, VectorColumn, VectorKNN, fit_graph
from semid.joint import TEACHER_TERMS, JointConfig, train_end_to_end
from semid.recommender import Recommender
from semid.tokenizers import TokenizerConfig, tokenize

T = TypeVar("T")

_TEXT = "text_minilm"


@dataclass(frozen=True)
class Run:
    """A finished run: the resolved experiment, the model, its folder, and the records of its stages."""

    name: str
    experiment: Experiment
    seed: int | None
    folder: Path
    ranker: Ranker
    made: dict[str, Any]
    changed: str
    """Settings that differ from the experiment's file."""


class Runner:
    """Trains experiments on one dataset for one seed; finished stages are read."""

    def __init__(
        self,
        known: Mapping[str, Experiment],
        data: Dataset,
        out: Path,
        *,
        seed: int,
        budget: Budget = Budget.FULL,
    ) -> None:
        self.data, self.out, self.seed, self.budget = data, out, seed, budget
        self._known, self._runs = known, dict[str, Run]()
        self._made: dict[str, Any] = {}
        self.simulated = (data.source or {}).get("type") == "simulated"
        self.content = (_TEXT,) if _TEXT in data.vector_columns else tuple(data.vector_columns)

    def resolved(self, name: str) -> Experiment:
        """The experiment at this budget, with the dataset's own columns if it leaves them open."""
        experiment = within(self._known[name], self.budget, interactions=self.data.num_training_interactions)
        if experiment.tokenizer is not None:
            experiment = replace(experiment, tokenizer=self._of_columns(experiment.tokenizer))
        sequences = {name: self._of_columns(config) for name, config in experiment.sequences.items()}
        experiment = replace(experiment, sequences=sequences)
        if isinstance(experiment.model, GeneratorConfig):
            features = self._columns(experiment.model.features)
            experiment = replace(experiment, model=replace(experiment.model, features=features))
        if experiment.model is Baseline.CONTENT_KNN and not self.content:
            raise SemidError(f"dataset {self.data.name!r} has no vector columns, which is all that content kNN reads")
        return replace(experiment, encoders=self._encoders(experiment))

    def check(self, name: str, *, needed_by: tuple[str, ...] = ()) -> None:
        """Resolve an experiment and all that it needs, before any is trained.

        Raises SemidError for one that reads inputs missing in the dataset, does not exist, or needs itself.
        """
        if name not in self._known:
            raise SemidError(f"{needed_by[-1]} needs {name!r}, which is no experiment{did_you_mean(name, self._known)}")
        if name in needed_by:
            raise SemidError(f"{' needs '.join((*needed_by, name))}; name another teacher, graph or column")
        experiment = self.resolved(name)
        if experiment.model is Baseline.ORACLE:
            self._baseline(experiment.model)  # raises if the dataset has no such baseline
        for need in experiment.needs:
            self.check(need, needed_by=(*needed_by, name))

    def run(self, name: str) -> Run:
        """Train an experiment, after those it needs."""
        if name not in self._runs:
            experiment = self.resolved(name)
            before: dict[str, Any] = {}
            for need in experiment.needs:
                before |= self.run(need).made
            self._made = {}
            seed = self.seed if experiment.seeded or self.simulated else None
            folder = self.out / (name if seed is None else f"{name}_{seed}")
            ranker = self._train(experiment, folder / "model")
            changed = difference(_settings(experiments()[name]), _settings(self._known[name]))
            self._runs[name] = Run(name, experiment, seed, folder, ranker, before | {name: self._made}, changed)
        return self._runs[name]

    def _columns(self, named: tuple[str, ...] | None) -> tuple[str, ...]:
        if named is None:
            return self.content
        return tuple(column for one in named for column in (self.content if one == CONTENT else (one,)))

    def _of_columns(self, config: TokenizerConfig) -> TokenizerConfig:
        if not (columns := self._columns(config.columns)):
            raise SemidError(f"dataset {self.data.name!r} has no vector columns to tokenize; add one (`semid prepare`)")
        return replace(config, columns=columns)

    def _encoders(self, experiment: Experiment) -> ContentConfig | None:
        encoders = experiment.encoders
        if encoders is None:
            if not isinstance(experiment.model, JointConfig):
                return None
            if not self.content:
                raise SemidError(f"dataset {self.data.name!r} has no vector columns for an end-to-end model to read")
            return ContentConfig(text=None, vectors=self.content)
        if experiment.weights is not None:
            encoders = _from_weights(encoders, experiment.title, experiment.weights)
        encoders = replace(encoders, vectors=self._columns(encoders.vectors))
        if encoders.text is not None and not self.data.text_columns:
            raise SemidError(f"dataset {self.data.name!r} has no texts, which this experiment reads")
        if "image" in self.data.items.column_names:
            return encoders
        if encoders.text is None and not encoders.vectors:
            raise SemidError(f"dataset {self.data.name!r} has no pictures, which is all that this experiment reads")
        return replace(encoders, image=None)

    def _train(self, experiment: Experiment, out: Path) -> Ranker:
        match experiment.model:
            case Baseline():
                return self._baseline(experiment.model)
            case ItemGraphConfig():
                config = experiment.model
                return self._stage("model", out, lambda: fit_graph(self.data, config, tune=True, out=out))
            case GeneratorConfig():
                return self._generator(experiment, experiment.model, out)
            case JointConfig():
                return self._end_to_end(experiment, experiment.model, out)

    def _baseline(self, baseline: Baseline) -> Ranker:
        if baseline is Baseline.ITEM_KNN:
            return ItemKNN.fit(self.data)
        if baseline is Baseline.CONTENT_KNN:
            return VectorKNN.fit(self.data, np.concatenate([self.data.vectors(name) for name in self.content], axis=1))
        known = baselines(self.data)
        if baseline.value not in known:
            raise SemidError(f"dataset {self.data.name!r} has no {baseline.value}: only simulated ones have it")
        return known[baseline.value]

    def _generator(self, experiment: Experiment, config: GeneratorConfig, out: Path) -> Recommender:
        tokenizer = experiment.tokenizer
        catalog = item_numbers(self.data) if tokenizer is None else self._codes("codes", experiment, tokenizer)
        read = {*(config.features or ()), config.objective.state_column}
        data = self._with_columns(experiment, read)
        graph = None if experiment.graph is None else self.run(experiment.graph).ranker
        teacher = self._teacher(experiment) if config.objective.distillation else None
        options: dict[str, Any] = {"out": out, "seed": self.seed, "graph": graph, "teacher": teacher}
        options["sequences"] = {
            name: self._sequence(f"codes of {name}", experiment, one) for name, one in experiment.sequences.items()
        }
        return self._stage("model", out, lambda: train(data, catalog, config, **options))

    def _codes(self, role: str, experiment: Experiment, config: TokenizerConfig) -> SemanticCatalog:
        signal = config.signal.name if config.alignment and isinstance(config.signal, VectorColumn) else None
        data = self._with_columns(experiment, {*(config.columns or ()), signal})
        settings = [to_dict(config.resolved(data.num_items)), data.parents]
        out = self._shared(config.method.name, settings)
        return self._stage(role, out, lambda: tokenize(data, config, out=out, seed=self.seed))

    def _sequence(self, role: str, experiment: Experiment, config: TokenizerConfig) -> SemanticCatalog:
        """Codes of a further sequence; items without a picture have none if the codes are only of picture vectors."""
        catalog = self._codes(role, experiment, config)
        encoders = [
            self.resolved(experiment.columns[name]).encoders
            for name in config.columns or ()
            if name in experiment.columns
        ]
        if not any(one is not None and set(one.sources) == {"image"} for one in encoders):
            return catalog
        return catalog.select(self.data.item_ids.filter(self.data.items["image"].is_valid().combine_chunks()))

    def _end_to_end(self, experiment: Experiment, config: JointConfig, out: Path) -> Recommender:
        terms = {term for phase in config.joint for term in phase.step.objective.weights(0.0)}
        teacher = self._teacher(experiment).item_vectors() if terms & TEACHER_TERMS else None
        encoders = cast(ContentConfig, experiment.encoders)  # as resolved
        graph = None if experiment.graph is None else self.run(experiment.graph).ranker
        options: dict[str, Any] = {"config": config, "out": out, "seed": self.seed, "teacher": teacher, "graph": graph}
        if encoders.vectors or encoders.fusion != FusionConfig():
            options["content"] = read_content(self.data, encoders, seed=self.seed)
        else:
            options |= {"text": encoders.text, "image": encoders.image}
        first = [to_dict(part) for part in (encoders, config.encoder, config.tokenizer, config.generator) if part]
        settings = [*first, config.tie_break, self.data.parents, experiment.teacher if teacher is not None else None]
        shared = self._shared("warm-up", settings)
        work = functools.partial(train_end_to_end, self.data, shared=shared, **options)
        return self._stage("model", out, work, warm_up=shared)

    def _teacher(self, experiment: Experiment) -> Any:
        if experiment.teacher is None:
            raise SemidError(f"{experiment.title}: expected the name of a teacher, got none; name one (--teacher)")
        return self.run(experiment.teacher).ranker

    def _with_columns(self, experiment: Experiment, names: Collection[str | None]) -> Dataset:
        """The dataset with the vector columns of these names that are item vectors of other experiments."""
        data = self._taught(experiment) if TEACHER in names else self.data
        for column in sorted(set(experiment.columns) & set(names)):
            model: Any = self.run(experiment.columns[column]).ranker
            data = data.with_vectors(column, model.item_vectors(), origin=model.origin)
        return data

    def _taught(self, experiment: Experiment) -> Dataset:
        """The dataset with the column `TEACHER`."""
        teacher = self._teacher(experiment)
        vectors, rng = teacher.item_vectors(), np.random.default_rng(self.seed)
        if experiment.vectors is TeacherVectors.OWN:
            return self.data.with_vectors(TEACHER, vectors, origin=teacher.origin)
        noise = rng.normal(size=vectors.shape)
        drawn = noise if experiment.vectors is TeacherVectors.NOISE else vectors[rng.permutation(len(vectors))]
        return self.data.with_vectors(TEACHER, drawn)

    def _shared(self, kind: str, settings: Any) -> Path:
        """Folder of a stage that runs of equal settings share. None values are ignored, so that fields can be added."""
        return self.out / "shared" / f"{kind}_{sha256_json(_without_none(settings))[:8]}_{self.seed}"

    def _stage(self, role: str, out: Path, work: Callable[[], T], *, warm_up: Path | None = None) -> T:
        """Run a stage. The time until the last checkpoint in the folder `warm_up`, which other runs share, is recorded
        as a stage of its own."""
        self._record(role, out)
        if warm_up is not None:
            self._record("warm-up", warm_up)
        if (out / MANIFEST).is_file():
            return work()
        started = time.time()
        try:
            return work()
        finally:
            ended = time.time()
            if warm_up is not None:
                steps = warm_up.glob("*/[0-9]*")  # checkpoints, which are never rewritten, unlike other files
                warm = max((step.stat().st_mtime for step in steps), default=started)
                if warm > started:
                    self._record("warm-up", warm_up, seconds=warm - started)
                    started = warm
            self._record(role, out, seconds=ended - started)

    def _record(self, role: str, out: Path, *, seconds: float | None = None) -> None:
        """Record a stage next to its folder: the minutes of all attempts, these `seconds` included, and the code of the
        last one."""
        file = out.with_name(f"{out.name}.made.json")
        made: dict[str, Any] = {"minutes": None, "semid": None, "commit": None}
        made |= read_json(file) if file.is_file() else {}
        if seconds is not None:
            made = {"minutes": (made["minutes"] or 0.0) + seconds / 60, **code()}
            if jax.process_index() == 0 and out.parent.is_dir():
                write_json(file, made)
        self._made[role] = {"folder": str(out.relative_to(self.out)), **made}


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Settings that distinguish it in a table; of a folder of weights only the name, if it is used."""
    weights = experiment.weights if experiment.encoders is not None else None
    return to_dict(replace(experiment, weights=weights and Path(weights).name))


def _from_weights(encoders: ContentConfig, title: str, folder: str) -> ContentConfig:
    """The encoders with that of texts (or of pictures, if only these are read) starting from given weights."""
    if encoders.text is None and encoders.image is None:
        raise SemidError(f"{title}: it reads vectors, no weights of an encoder; leave --weights out")
    if encoders.text is None:
        return replace(encoders, image=PretrainedImage(folder))
    text = encoders.text if isinstance(encoders.text, PretrainedText) else PretrainedText(folder)
    return replace(encoders, text=replace(text, folder=folder))


def item_numbers(data: Dataset) -> SemanticCatalog:
    """Item numbers as codes, for models that do not read codes."""
    return SemanticCatalog(data.item_ids, np.arange(data.num_items, dtype=np.int32)[:, None], (data.num_items,))


def _without_none(value: Any) -> Any:
    """JSON without the entries that are None."""
    if isinstance(value, dict):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
