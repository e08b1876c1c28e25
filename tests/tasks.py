"""Tiny training problems of every kind: model, loss, tables, batch."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from semid.encoders import FeatureRows
from semid.generators import LossTables, generator_loss
from semid.joint import JointModel, StepConfig
from semid.joint.model import ContentTables, joint_loss
from semid.recommender import ModelSpec
from semid.tokenizers import RQVAE, RQVaeConfig
from semid.tokenizers.autoencoder import Tables
from semid.tokenizers.rqvae import AlignedRQVAE, ItemRows
from semid.tokenizers.rqvae import joint_loss as tokenizer_loss
from semid.training import PackedRows
from seq_models import (
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    ItemTables,
    Layout,
    RQTransformer,
    RQTransformerConfig,
    TransformerConfig,
)

ITEMS, SIZES, ROWS = 1 << 16, (16, 16), 16
STACK = {"backbone": TransformerConfig(16, layers=2, heads=2, hidden=32, dropout=0.1)}
FAMILIES = {
    "rq-transformer": RQTransformerConfig(**STACK),
    "flat": FlatDecoderConfig(**STACK),
    "encoder-decoder": EncoderDecoderConfig(**STACK, decoder_layers=1),
    "sasrec": DenseConfig(**STACK),
}


def generator(name):
    model = ModelSpec(FAMILIES[name], SIZES, ITEMS, num_features=0, max_history=8).build(seed=0)
    tables = LossTables(ItemTables.from_arrays(np.zeros((ITEMS, 2), np.int32), None, np.ones(ITEMS, np.int32)))
    return model, generator_loss, tables, rows(model.layout is Layout.SINGLE)


def rows(single):
    history = np.ones((ROWS, 8), np.int32)
    return PackedRows(history, np.ones(ROWS, np.int32) if single else history, history)


def tokenizer():
    config = RQVaeConfig(level_sizes=SIZES, hidden=(32,), latent=8)
    model = AlignedRQVAE(RQVAE(config, dim=16, rngs=nnx.Rngs(0)), [])
    loss = functools.partial(tokenizer_loss, config=config)
    return model, loss, Tables(jnp.zeros((ITEMS, 16)), None), ItemRows(np.zeros(64, np.int32))


class Encoder(nnx.Module):
    dim = 16

    def __init__(self, rngs):
        self.layer = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, content, *, key=None):
        return self.layer(content["text"].vectors)


def joint():
    sizes = {"level_sizes": (*SIZES, 4), "num_features": 16}
    model = JointModel(
        Encoder(nnx.Rngs(0)),
        tokenizer()[0].autoencoder,
        RQTransformer(FAMILIES["rq-transformer"], **sizes, rngs=nnx.Rngs(1)),
        codes=np.zeros((ITEMS, 3), np.int32),
        rngs=nnx.Rngs(2),
    )
    tables = ContentTables({"text": FeatureRows(jnp.zeros((ITEMS, 16)), jnp.ones(ITEMS, bool))})
    return model, functools.partial(joint_loss, config=StepConfig()), tables, rows(True)
