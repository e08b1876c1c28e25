"""The stages of end-to-end training: what each of them makes of the joint model, and where it keeps its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute as pc
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from quantizers import Schedule, health, tie_break
from semid import artifacts
from semid.catalog import SemanticCatalog
from semid.config import to_dict
from semid.data import Dataset, Standardizer
from semid.encoders import ItemEncoder, take
from semid.errors import SemidError
from semid.generators import GeneratorConfig, fit_generator, training_counts, validation
from semid.joint.config import JointConfig, Phase, Surgery
from semid.joint.model import Content, JointModel, Objective, StepConfig, Tables, joint_loss, joint_losses
from semid.joint.surgery import sum_without_conflict
from semid.recommender import Model, ModelSpec, Recommender, build_model
from semid.tokenizers import RQVAE, AlignedRQVAE, map_blocks, reseeding, train_autoencoder
from semid.training import (
    RunFolder,
    SingleRows,
    Task,
    TrainState,
    named_leaves,
    replace_leaves,
    train,
    with_variables,
)
from seq_models import RQTransformer

STATE_FILE = "joint.safetensors"
STAGES = ("encoder", "tokenizer", "generator", "joint", "finetune")
_SHARED = STAGES[:3]
_OF_ITEMS = {"bank/vectors", "bank/written", "codes"}


class Earlier(NamedTuple):
    """A run to go on from: the artifact that `train_joint` wrote, and the dataset it was trained on."""

    path: Path
    dataset: Dataset


@dataclass(frozen=True)
class Run:
    """One run's inputs, and its stages."""

    dataset: Dataset
    content: Content
    config: JointConfig
    teacher: Float[np.ndarray, "items teacher"] | None
    earlier: Earlier | None
    out: Path
    shared: Path | None
    parents: dict[str, str]
    seed: int
    mesh: Mesh | None

    @property
    def stages(self) -> Path:
        """The folder of the stages' checkpoints."""
        return self.out.with_name(f"{self.out.name}.stages")

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return (self.shared if self.shared is not None and stage in _SHARED else self.stages) / stage

    def request(self, stage: str) -> dict[str, Any]:
        """What a stage's result depends on: its settings, and those of the stages before it."""
        settings = to_dict(self.config)
        if stage in _SHARED:
            settings = {name: settings[name] for name in (*_SHARED[: _SHARED.index(stage) + 1], "tie_break")}
        return {"stage": stage, "config": settings, "parents": self.parents, "seed": self.seed}

    @functools.cached_property
    def tables(self) -> Tables:
        """On the device."""
        return Tables(dict(self.content), None if self.teacher is None else jnp.asarray(self.teacher))

    @functools.cached_property
    def phases(self) -> dict[str, Phase]:
        """The phases of all cycles, by the names of their stages."""
        turns = self.config.joint * self.config.cycles
        return {f"joint.{turn}" if len(turns) > 1 else "joint": phase for turn, phase in enumerate(turns)}

    @functools.cached_property
    def refits(self) -> dict[str, int]:
        """After which phases, by name, tokenizer and generator are fitted anew, for the how-manieth time."""
        turns = len(self.config.joint)
        ends = list(self.phases)[turns - 1 :: turns] if turns and self.config.codes.refits else []
        return {name: time for time, name in enumerate(ends, 1)}

    def folders(self) -> list[str]:
        """The names of all stages, in their order."""
        middle = [
            stage
            for name in self.phases
            for stage in (name, *(f"{of}.{self.refits[name]}" for of in _SHARED[1:] if name in self.refits))
        ]
        return [*_SHARED, *middle, STAGES[-1]]

    def _untrained(self, encoder: ItemEncoder) -> JointModel:
        config, seed = self.config, self.seed
        empty = np.zeros((self.dataset.num_items, len(config.tokenizer.level_sizes) + 1), np.int32)
        autoencoder = RQVAE(config.tokenizer, dim=encoder.dim, rngs=nnx.Rngs(seed))
        generator = _checked(build_model(self._spec(encoder.dim), seed=seed))
        width = 0 if self.teacher is None else self.teacher.shape[1]
        return JointModel(
            encoder, autoencoder, generator, codes=jnp.asarray(empty), num_teacher=width, rngs=nnx.Rngs(seed + 1)
        )

    def start(self, encoder: ItemEncoder) -> JointModel:
        """Encoders, tokenizer and generator warmed up one after the other: the staged way."""
        config, model = self.config, self._untrained(encoder)
        model.encoder.standardize(jnp.asarray(encode_items(model.encoder, self.content)))
        if config.encoder is not None:
            contrast = StepConfig(Objective.only(contrast=Schedule(1.0)), window=1, dropout=True)
            model = self._steps("encoder", model, Phase(config.encoder, contrast), validate=self._bank_only)
            model.encoder.standardize(jnp.asarray(encode_items(model.encoder, self.content)))
        return self._fitted(model)

    def _fitted(self, model: JointModel, time: int = 0) -> JointModel:
        """A new tokenizer of the vectors that the encoders give the items now, and a new generator of its codes."""
        config, seed = self.config, self.seed
        tokenizer, generator = (f"{stage}.{time}" if time else stage for stage in _SHARED[1:])
        self._fill_bank(model)
        vectors = np.asarray(self._vectors(model))
        autoencoder = RQVAE(config.tokenizer, dim=model.encoder.dim, rngs=nnx.Rngs(seed))
        autoencoder.initialize(vectors, iterations=config.tokenizer.kmeans_iterations, seed=seed)
        model.autoencoder = train_autoencoder(
            AlignedRQVAE(autoencoder, []),
            vectors,
            config.tokenizer,
            signals=None,
            request=self.request(tokenizer),
            seed=seed,
            folder=self.folder(tokenizer),
            mesh=self.mesh,
        )
        model.codes[...] = jnp.asarray(self.fresh_codes(model))
        model.generator = _checked(build_model(self._spec(model.encoder.dim), seed=seed))
        model.generator = _checked(self._generator_stage(generator, model, config.generator).model)
        return model

    def resumed(self, encoder: ItemEncoder, earlier: Earlier) -> JointModel:
        """The earlier run's variables; items are known by their ids, and new ones get codes beside the others'."""
        model = self._untrained(encoder)
        leaves, fresh = artifacts.load_tensors(earlier.path / STATE_FILE), named_leaves(nnx.state(model))
        if len(leaves["codes"]) != earlier.dataset.num_items:
            raise SemidError(
                f"{earlier.path} was trained on {len(leaves['codes'])} items, not on the {earlier.dataset.num_items} "
                "of the earlier dataset; give the dataset of that run"
            )
        before = pc.index_in(self.dataset.item_ids, earlier.dataset.item_ids).fill_null(-1).to_numpy()
        (kept,) = np.nonzero(before >= 0)
        for name in _OF_ITEMS & set(leaves):
            rows = np.array(fresh[name])
            rows[kept] = leaves[name][before[kept]]
            leaves[name] = rows
        graph, state = nnx.split(model)
        model = nnx.merge(graph, replace_leaves(state, leaves, where=str(earlier.path / STATE_FILE)))
        vectors = self._vectors(model)
        if len(new := np.setdiff1d(np.arange(self.dataset.num_items), kept)):
            vectors = vectors.at[new].set(encode_items(model.encoder, self.content, new))
        model.codes[...] = jnp.asarray(self._apart(map_blocks(model.autoencoder.encode, vectors)))
        return model

    def together(self, model: JointModel) -> JointModel:
        """The joint steps, and at their end the whole catalogue encoded and given its codes."""
        config, phases = self.config, self.phases
        if phases:
            score = validation(self.dataset, config.generator, seed=self.seed)

            def validate(candidate: JointModel) -> dict[str, float]:
                churn = {f"churn/level_{level}": float(x) for level, x in enumerate(candidate.churn[...])}
                bank = {f"bank/{name}": float(x) for name, x in candidate.bank.health()._asdict().items()}
                usage = health(np.asarray(candidate.codes[...])[:, :-1], config.tokenizer.level_sizes).levels
                used = {f"usage/level_{level}": of.usage for level, of in enumerate(usage)}
                return score(self.recommender(candidate)) | churn | bank | used

            last = list(phases)[-1]
            for name, phase in phases.items():  # a turn ends where it ends: only the last may step back to its best
                best = "ndcg@10" if name == last and name not in self.refits else None
                model = self._steps(name, model, phase, validate=validate, select=best)
                if name in self.refits:
                    model.encoder.standardize(jnp.asarray(encode_items(model.encoder, self.content)))
                    model = self._fitted(model, self.refits[name])
                elif config.codes.refresh_every is not None:
                    model.codes[...] = jnp.asarray(self.fresh_codes(model))
            if not self.refits:
                self._fill_bank(model)
                model.codes[...] = jnp.asarray(self.fresh_codes(model))
        return model

    def finetuned(self, model: JointModel) -> Recommender:
        """The generator trained on with all else as it is."""
        config = replace(self.config.generator, training=self.config.finetune)
        recommender = self._generator_stage("finetune", model, config)
        model.generator = _checked(recommender.model)
        return recommender

    def recommender(self, model: JointModel) -> Recommender:
        """What the model is to its users: the generator, reading item vectors from the bank and codes as they are."""
        catalog = self._catalog(np.asarray(model.codes[...]))
        counts, spec = training_counts(self.dataset), replace(self._spec(model.encoder.dim), catalog=catalog.digest)
        vectors, as_they_are = np.asarray(self._vectors(model)), Standardizer.identity(model.encoder.dim)
        return Recommender(
            model.generator, catalog, spec=spec, features=vectors, train_counts=counts, standardizer=as_they_are
        )

    def fresh_codes(self, model: JointModel) -> Int[np.ndarray, "items level"]:
        """Codes of the bank's vectors, and what they were of items that it does not hold."""
        known = np.asarray(model.bank.knows(jnp.arange(self.dataset.num_items)))[:, None]
        codes = map_blocks(model.autoencoder.encode, self._vectors(model))
        return self._apart(np.where(known, codes, np.asarray(model.codes[...])[:, :-1]))

    def _apart(self, codes: Int[np.ndarray, "items level-1"]) -> Int[np.ndarray, "items level"]:
        """With a last level that tells items apart. Raises SemidError if it is too small, as where codes collapse."""
        broken = tie_break(codes)
        if broken.level_size > self.config.tie_break:
            raise SemidError(
                f"{broken.level_size} items share their codes, and tie_break leaves room for {self.config.tie_break}: "
                "codes collapse; lower the tokenizer's rate, or give tie_break more"
            )
        return broken.codes.astype(np.int32)

    def _spec(self, dim: int) -> ModelSpec:
        sizes, generator = self.config.tokenizer.level_sizes, self.config.generator
        level_sizes = (*sizes, self.config.tie_break)
        return ModelSpec(generator.model, level_sizes, self.dataset.num_items, dim, generator.max_history)

    def _catalog(self, codes: Int[np.ndarray, "items level"]) -> SemanticCatalog:
        sizes = (*self.config.tokenizer.level_sizes, self.config.tie_break)
        return SemanticCatalog(self.dataset.item_ids, codes, sizes, tie_break=True)

    def _vectors(self, model: JointModel) -> Float[Array, "items dim"]:
        return model.bank.read(jnp.arange(self.dataset.num_items))

    def _fill_bank(self, model: JointModel) -> None:
        """Encode every item, in one pass over the catalogue."""
        vectors = encode_items(model.encoder, self.content)
        rows = jnp.arange(len(vectors))
        model.bank.write(rows, jnp.asarray(vectors), mask=jnp.ones(len(vectors), bool))

    def _bank_only(self, model: JointModel) -> dict[str, float]:
        return {"coverage": float(model.bank.health().coverage)}

    def _generator_stage(self, name: str, model: JointModel, config: GeneratorConfig) -> Recommender:
        return fit_generator(
            self.recommender(model),
            self.dataset,
            config,
            run=RunFolder(self.folder(name), self.request(name), title=f"{name} of {self.out.name}"),
            seed=self.seed,
            mesh=self.mesh,
        )

    def _steps(
        self,
        name: str,
        model: JointModel,
        phase: Phase,
        *,
        validate: Callable[[JointModel], dict[str, float]],
        select: str | None = None,
    ) -> JointModel:
        rows = SingleRows(self.dataset.splits.train, max_history=self.config.generator.max_history, seen=self._seen)
        apart = phase.surgery is Surgery.PROJECT
        task = Task(
            model,
            functools.partial(joint_losses if apart else joint_loss, config=phase.step),
            rows,
            tables=self.tables,
            validate=validate,
            select=select,
            hooks=lambda steps: self._refreshing(model, phase, steps) if name in self.phases else [],
            combine=sum_without_conflict if apart else None,
        )
        run = RunFolder(self.folder(name), self.request(name), title=f"{name} steps of {self.out.name}")
        trained = train(task, phase.training, run=run, seed=self.seed, mesh=self.mesh)
        graph, state = nnx.split(trained)
        return nnx.merge(graph, jax.tree.map(jnp.asarray, state))  # the loop gives arrays of the host

    @property
    def _seen(self) -> Int[np.ndarray, " histories"] | None:
        """How many items of each training history the earlier run had."""
        if self.earlier is None:
            return None
        before = self.earlier.dataset
        had = dict(zip(before.users.to_pylist(), before.splits.train.lengths, strict=True))
        return np.array([had.get(user, 0) for user in self.dataset.users.to_pylist()])

    def _refreshing(
        self, model: JointModel, phase: Phase, steps_per_epoch: int
    ) -> list[Callable[[int, TrainState, dict[str, Any]], TrainState]]:
        """Now and then, codes of the whole catalogue from what the bank holds, and how many changed. A tokenizer that
        learns has its dead codes seeded anew."""
        if self.config.codes.refresh_every is None:
            return []
        every = max(round(self.config.codes.refresh_every * steps_per_epoch), 1)
        reseed = reseeding(model, self.config.tokenizer, seed=self.seed)
        rates = phase.training.optimizer.rates
        cared = self.config.tokenizer.reseed and all(share for part, share in rates if "autoencoder".startswith(part))

        def hook(at: int, state: TrainState, metrics: dict[str, Any]) -> TrainState:
            if at % every:
                return state
            current = with_variables(model, state.params, state.rest)
            if cared:
                state = reseed(state, self._vectors(current))
                current = with_variables(model, state.params, state.rest)
            codes, leaves = self.fresh_codes(current), named_leaves(state)
            churn = (codes != np.asarray(current.codes[...])).mean(axis=0)
            leaves |= {"rest/churn": jnp.asarray(churn, jnp.float32), "rest/codes": jnp.asarray(codes)}
            return replace_leaves(state, leaves, where="refreshing codes")

        return [hook]


def encode_items(
    encoder: ItemEncoder, content: Content, rows: Int[np.ndarray, " items"] | None = None
) -> Float[np.ndarray, "items dim"]:
    """Vectors of all items, or of those in `rows`, a block at a time."""
    rows = np.arange(len(jax.tree.leaves(dict(content))[0])) if rows is None else rows

    @jax.jit
    def encode(rows: Int[Array, " n"], content: Content) -> Float[Array, "n dim"]:
        return encoder({name: take(of, rows) for name, of in content.items()})

    return map_blocks(lambda rows: encode(rows, dict(content)), rows.astype(np.int32))


def _checked(model: Model) -> RQTransformer:
    if not isinstance(model, RQTransformer):
        raise TypeError(f"expected an RQ-Transformer, got {type(model).__name__}")
    return model
