"""The joint step of end-to-end training, traced from sizes alone, without data or parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from semid.encoders import FeatureEncoder, FeatureRows, FusionConfig, ItemEncoder
from semid.errors import SemidError
from semid.generators import GeneratorConfig, ProgramSizes, check_sizes
from semid.joint.config import JointConfig
from semid.joint.model import ContentTables, JointModel
from semid.recommender import ModelSpec
from semid.tokenizers import RQVAE
from semid.training import (
    ROWS,
    PackedRows,
    TrainState,
    abstract_state,
    divisible_batch_size,
    make_optimizer,
    make_step,
)
from seq_models import RQTransformer


def joint_program(config: GeneratorConfig, sizes: ProgramSizes, mesh: Mesh) -> tuple[jax.stages.Traced, TrainState]:
    """Trace the default joint step with this generator for a batch of the config's size; also returns the shapes of its
    state.

    An encoder maps content vectors of width `sizes.num_features` to item vectors of width `sizes.item_dim`; the last of
    `sizes.level_sizes` is the tie-break.
    """
    joint, training = JointConfig(generator=config), config.training
    check_sizes(config)
    if not sizes.num_features or len(sizes.level_sizes) < 2:
        raise SemidError(
            "an end-to-end step reads content vectors (num_features above 0) and has two levels or more, the last of "
            f"which tells items apart; got num_features {sizes.num_features} and level_sizes {sizes.level_sizes}"
        )
    tokenizer = replace(joint.tokenizer, level_sizes=sizes.level_sizes[:-1])

    def build() -> JointModel:
        rngs, fusion = nnx.Rngs(0), FusionConfig(dim=sizes.item_dim)
        encoder = ItemEncoder({"content": FeatureEncoder(sizes.num_features)}, fusion, rngs=rngs)
        spec = ModelSpec(config.model, sizes.level_sizes, sizes.items, sizes.item_dim, config.max_history)
        codes = jnp.zeros((sizes.items, len(sizes.level_sizes)), jnp.int32)
        autoencoder = RQVAE(tokenizer, dim=sizes.item_dim, rngs=rngs)
        return JointModel(encoder, autoencoder, cast(RQTransformer, spec.build(seed=0)), codes=codes, rngs=rngs)

    model, phase = nnx.eval_shape(build), joint.joint[0]
    optimizer = make_optimizer(phase.training.optimizer, num_steps=10_000)
    array: Any = jax.ShapeDtypeStruct
    content = FeatureRows(array((sizes.items, sizes.num_features), jnp.float32), array((sizes.items,), jnp.bool))
    step = make_step(
        model,
        optimizer,
        phase.loss(config),
        tables=ContentTables({"content": content}),
        seed=0,
        num_steps=10_000,
        mesh=mesh,
        accumulate=training.accumulate,
        rates=phase.training.optimizer.rates,
    )
    count = divisible_batch_size(training.batch_size, rows=1 << 62, mesh=mesh, accumulate=training.accumulate)
    by_rows = NamedSharding(mesh, ROWS)
    history = array((count, config.max_history), jnp.int32, sharding=by_rows)
    state = abstract_state(model, optimizer, mesh)
    return step.trace(state, PackedRows(history, array((count,), jnp.int32, sharding=by_rows), history)), state
