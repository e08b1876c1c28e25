"""The stages of end-to-end training, one class each: which parts of the joint model a stage trains or replaces."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from quantizers import Schedule, health
from semid import artifacts
from semid.errors import SemidError
from semid.generators import GeneratorConfig, fit_generator, validation
from semid.joint.config import JointConfig, Phase, Surgery
from semid.joint.context import WARM_UP, Context
from semid.joint.model import JointModel, Objective, StepConfig
from semid.joint.surgery import sum_without_conflict
from semid.tokenizers import RQVAE, AlignedRQVAE, reseeding, train_autoencoder
from semid.training import (
    SingleRows,
    Task,
    TrainingConfig,
    TrainState,
    check_training,
    edit_variables,
    train,
    with_variables,
)
from seq_models import RQTransformer

Hook = Callable[[int, TrainState, dict[str, Any]], TrainState]


@dataclass(frozen=True)
class Stage(abc.ABC):
    """A stage of a run; `name` is the folder of its checkpoints."""

    name: str

    @abc.abstractmethod
    def __call__(self, model: JointModel, context: Context) -> JointModel:
        """Run the stage, from its last checkpoint if there is one, and return the trained model."""

    @abc.abstractmethod
    def training(self, model: JointModel, config: JointConfig) -> tuple[nnx.Module, TrainingConfig | None]:
        """The part of the model that the stage trains, and the settings of that training."""

    def check(self, model: JointModel, context: Context) -> None:
        """Raise SemidError, naming the stage, for settings that its training would refuse after the stages before."""
        part, training = self.training(model, context.config)
        try:
            if training is not None:
                check_training(part, training, mesh=context.mesh)
        except SemidError as error:
            raise SemidError(f"stage {self.name}: {error}") from None


def plan(config: JointConfig, *, warm_up: bool) -> list[Stage]:
    """The stages of a run in their order; without `warm_up` the model comes from a previous one."""
    encoder, tokenizer, generator = WARM_UP
    stages: list[Stage] = []
    if warm_up:
        stages += [WarmUpEncoder(encoder)] if config.encoder is not None else []
        stages += [FitTokenizer(tokenizer), FitGenerator(generator)]
    phases = config.joint * config.cycles
    for number, phase in enumerate(phases):
        name = f"joint.{number}" if len(phases) > 1 else "joint"
        last, ends_cycle = number + 1 == len(phases), (number + 1) % len(config.joint) == 0
        stages.append(JointSteps(name, phase, last=last))
        if config.codes.refits and ends_cycle:
            cycle = (number + 1) // len(config.joint)
            stages += [FitTokenizer(f"{tokenizer}.{cycle}"), FitGenerator(f"{generator}.{cycle}")]
    return [*stages, Finetune("finetune")]


@dataclass(frozen=True)
class WarmUpEncoder(Stage):
    """Train the encoders alone, by contrast of consecutive items."""

    def __call__(self, model: JointModel, context: Context) -> JointModel:
        training = context.config.encoder
        if training is None:
            return model
        context.standardize(model)
        contrast = StepConfig(Objective.only(contrast=Schedule(1.0)), window=1, dropout=True)

        def coverage(candidate: JointModel) -> dict[str, float]:
            return {"coverage": float(candidate.bank.health().coverage)}

        return _take_steps(self.name, model, Phase(training, contrast), context, validate=coverage)

    def training(self, model: JointModel, config: JointConfig) -> tuple[nnx.Module, TrainingConfig | None]:
        return model, config.encoder


@dataclass(frozen=True)
class FitTokenizer(Stage):
    """Train a new tokenizer on the encoders' current item vectors, and encode the catalogue with it."""

    def __call__(self, model: JointModel, context: Context) -> JointModel:
        config, seed = context.config.tokenizer, context.seed
        context.standardize(model)
        context.fill_bank(model)
        vectors = np.asarray(context.item_vectors(model))
        autoencoder = RQVAE(config, dim=model.encoder.dim, rngs=nnx.Rngs(seed))
        autoencoder.initialize(vectors, iterations=config.kmeans_iterations, seed=seed)
        run = context.run_folder(self.name)
        model.autoencoder = train_autoencoder(
            AlignedRQVAE(autoencoder, []),
            vectors,
            config,
            signals=None,
            request=run.request,
            seed=seed,
            folder=run.folder,
            mesh=context.mesh,
            inputs=artifacts.sha256_json(run.request),
        )
        model.codes[...] = jnp.asarray(context.codes_from_bank(model))
        return model

    def training(self, model: JointModel, config: JointConfig) -> tuple[nnx.Module, TrainingConfig | None]:
        return AlignedRQVAE(model.autoencoder, []), config.tokenizer.training


@dataclass(frozen=True)
class FitGenerator(Stage):
    """Train a new generator on the current codes."""

    def __call__(self, model: JointModel, context: Context) -> JointModel:
        model.generator = cast(RQTransformer, context.spec(model.encoder.dim).build(seed=context.seed))
        return _train_generator(self.name, model, context.config.generator, context)

    def training(self, model: JointModel, config: JointConfig) -> tuple[nnx.Module, TrainingConfig | None]:
        return model.generator, config.generator.training


@dataclass(frozen=True)
class JointSteps(Stage):
    """Train the parts of the model together by the settings of one phase; then refresh the codes, if scheduled."""

    phase: Phase
    last: bool
    """The run's last phase, which may return to its best checkpoint; others end with their last step."""

    def __call__(self, model: JointModel, context: Context) -> JointModel:
        schedule = context.config.codes
        hooks = functools.partial(_refresh_hooks, model, self.phase, context)
        select = "ndcg@10" if self.last and not schedule.refits else None
        validate = _validation(context)
        model = _take_steps(self.name, model, self.phase, context, validate=validate, select=select, hooks=hooks)
        if schedule.refresh_every is not None:
            if self.last:
                context.fill_bank(model)
            model.codes[...] = jnp.asarray(context.codes_from_bank(model))
        return model

    def training(self, model: JointModel, config: JointConfig) -> tuple[nnx.Module, TrainingConfig | None]:
        return model, self.phase.training


@dataclass(frozen=True)
class Finetune(Stage):
    """Continue to train the generator; all else is fixed."""

    def __call__(self, model: JointModel, context: Context) -> JointModel:
        config = replace(context.config.generator, training=context.config.finetune)
        return _train_generator(self.name, model, config, context)

    def training(self, model: JointModel, config: JointConfig) -> tuple[nnx.Module, TrainingConfig | None]:
        return model.generator, config.finetune


def _train_generator(name: str, model: JointModel, config: GeneratorConfig, context: Context) -> JointModel:
    """Train the model's generator from its current parameters."""
    trained = fit_generator(
        context.recommender(model),
        context.dataset,
        config,
        run=context.run_folder(name),
        seed=context.seed,
        mesh=context.mesh,
    )
    model.generator = cast(RQTransformer, trained.model)
    return model


def _take_steps(
    name: str,
    model: JointModel,
    phase: Phase,
    context: Context,
    *,
    validate: Callable[[JointModel], dict[str, float]],
    select: str | None = None,
    hooks: Callable[[int], Sequence[Hook]] = lambda steps_per_epoch: (),
) -> JointModel:
    """Train by joint steps on training histories with one target each."""
    generator, histories = context.config.generator, context.dataset.splits.train.without_weights()
    task = Task(
        model,
        phase.loss(generator),
        SingleRows(
            histories if generator.conditions.reads_events else histories.without_events(),
            max_history=generator.max_history,
            seen=_items_seen(context),
            times=generator.conditions.reads_times,
        ),
        tables=context.tables,
        validate=validate,
        select=select,
        hooks=hooks,
        combine=sum_without_conflict if phase.surgery is Surgery.PROJECT else None,
    )
    trained = train(task, phase.training, run=context.run_folder(name), seed=context.seed, mesh=context.mesh)
    graph, state = nnx.split(trained)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, state))  # the loop returns arrays on the host


def _items_seen(context: Context) -> Int[np.ndarray, " histories"] | None:
    """Number of items per training history that the previous run has trained on; None: there is none."""
    if context.previous is None:
        return None
    before = context.previous.dataset
    lengths = dict(zip(before.users.to_pylist(), before.splits.train.lengths, strict=True))
    return np.array([lengths.get(user, 0) for user in context.dataset.users.to_pylist()])


def _validation(context: Context) -> Callable[[JointModel], dict[str, float]]:
    """Accuracy, measured as in the generator's own stages, and the health of bank and codes."""
    score = validation(context.dataset, context.config.generator, seed=context.seed)

    def validate(candidate: JointModel) -> dict[str, float]:
        churn = {f"churn/level_{level}": float(x) for level, x in enumerate(candidate.churn[...])}
        bank = {f"bank/{name}": float(x) for name, x in candidate.bank.health()._asdict().items()}
        levels = health(np.asarray(candidate.codes[...])[:, :-1], context.config.tokenizer.level_sizes).levels
        usage = {f"usage/level_{level}": of.usage for level, of in enumerate(levels)}
        return score(context.recommender(candidate)) | churn | bank | usage

    return validate


def _refresh_hooks(model: JointModel, phase: Phase, context: Context, steps_per_epoch: int) -> list[Hook]:
    """A hook that recomputes all codes from the bank, as scheduled, and records how many changed.

    Dead codes of a tokenizer in training are re-seeded first, except at the last step, after which nothing trains them.
    """
    every_epochs, tokenizer = context.config.codes.refresh_every, context.config.tokenizer
    if every_epochs is None:
        return []
    every = max(round(every_epochs * steps_per_epoch), 1)
    reseed, last = reseeding(model, tokenizer, seed=context.seed), round(phase.training.num_epochs * steps_per_epoch)
    reseeds = tokenizer.reseed and phase.trains_codebooks

    def refresh(current: JointModel) -> None:
        codes = context.codes_from_bank(current)
        churn = (codes != np.asarray(current.codes[...])).mean(axis=0)
        for variable, value in ((current.codes, codes), (current.churn, churn.astype(np.float32))):
            variable[...] = jax.device_put(value, variable[...].sharding)

    def hook(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        if at % every:
            return state
        if reseeds and at < last:
            state = reseed(state, context.item_vectors(with_variables(model, state.params, state.rest)))
        return edit_variables(model, state, refresh)

    return [hook]
