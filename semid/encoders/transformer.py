"""Text encoders: a small transformer from scratch; BERT, MiniLM, E5 and sentence-T5's encoder from a local folder."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from semid.artifacts import fetched
from semid.encoders.blocks import T5, Activation, Blocks, BlocksConfig, PostNorm, norm
from semid.encoders.content import TextRows
from semid.encoders.vocabulary import PretrainedTokenizer
from semid.encoders.weights import Settings, load_weights, read_activation, read_config, read_modules
from semid.errors import SemidError
from seq_models import Precision


class Pooling(enum.Enum):
    """Reduction of a text's states to one vector."""

    MEAN = "mean"
    CLS = "cls"


@dataclass(frozen=True)
class TextEncoderConfig:
    """A transformer over tokens. The defaults are small, to be trained from scratch."""

    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    """The stack; T5's has its own positions."""
    max_length: int = 64
    """Maximum tokens of a text."""
    pooling: Pooling = Pooling.MEAN
    """Mean over the real tokens, or the state of the first."""
    normalize: bool = False
    """Vectors of unit length."""
    segments: int = 0
    """Rows of BERT's segment table; a single text uses the first."""


class TextEncoder(nnx.Module):
    """Vectors of tokenized texts; those of absent ones are finite and mean nothing."""

    def __init__(self, config: TextEncoderConfig, *, vocabulary: int, rngs: nnx.Rngs) -> None:
        self.config, self.dim = config, config.blocks.dim
        self.tokens = nnx.Embed(vocabulary, self.dim, rngs=rngs)
        architecture = config.blocks.architecture
        self.positions = None if architecture.buckets else nnx.Embed(config.max_length, self.dim, rngs=rngs)
        self.segments = nnx.Embed(config.segments, self.dim, rngs=rngs) if config.segments else None
        # Post-norm blocks expect normed inputs.
        self.norm = None if architecture.norm_first else norm(config.blocks, rngs=rngs)
        self.blocks = Blocks(config.blocks, rngs=rngs)

    def __call__(self, rows: TextRows, *, key: Key[Array, ""] | None = None) -> Float[Array, "n dim"]:
        """One float32 vector per text. Dropout needs a `key`."""
        vectors = self._pooled(self.blocks(self._embedded(rows), rows.mask, key=key), rows)
        if not self.config.normalize:
            return vectors
        return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(vectors**2, axis=-1, keepdims=True), 1e-24))

    def hidden(self, rows: TextRows) -> Float[Array, "n layer dim"]:
        """The pooled states of the embeddings and of every block, as side adapters read them."""
        states = self.blocks.hidden(self._embedded(rows), rows.mask)
        return jnp.stack([self._pooled(state, rows) for state in states], axis=1)

    def _embedded(self, rows: TextRows) -> Float[Array, "n t dim"]:
        length = rows.tokens.shape[1]
        if length > self.config.max_length:
            raise SemidError(f"expected rows of at most {self.config.max_length} tokens, got {length}; cut the texts")
        x = self.tokens(rows.tokens)
        if self.positions is not None:
            x = x + self.positions(jnp.arange(length))[None]
        if self.segments is not None:
            x = x + self.segments(jnp.zeros((1, 1), jnp.int32))
        return x if self.norm is None else self.norm(x)

    def _pooled(self, states: Float[Array, "n t dim"], rows: TextRows) -> Float[Array, "n dim"]:
        states = states.astype(jnp.float32)
        if self.config.pooling is Pooling.CLS:
            return states[:, 0]
        real = rows.mask[..., None].astype(jnp.float32)
        return jnp.sum(states * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)


class _Layout(NamedTuple):
    """Reader of an architecture's config.json, and names and prefixes of its tensors."""

    config: Callable[[Settings, Path], TextEncoderConfig]
    names: Callable[[TextEncoderConfig], dict[str, str]]
    prefixes: tuple[str, ...]


def _bert_config(raw: Settings, folder: Path) -> TextEncoderConfig:
    if raw.get("position_embedding_type", "absolute") != "absolute":
        kind = raw["position_embedding_type"]
        raise SemidError(f"{folder / 'config.json'}: expected absolute positions, got {kind!r}; give another model")
    blocks = BlocksConfig(
        dim=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        hidden=raw["intermediate_size"],
        dropout=raw["hidden_dropout_prob"],
        activation=read_activation(raw["hidden_act"], folder=folder),
        architecture=PostNorm(),
        epsilon=raw["layer_norm_eps"],
    )
    return TextEncoderConfig(blocks, max_length=raw["max_position_embeddings"], segments=raw["type_vocab_size"])


def _bert_names(config: TextEncoderConfig) -> dict[str, str]:
    layer, block = "blocks.layers.{}", "encoder.layer.{}"
    return {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "segments": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
        f"{layer}.attention.query": f"{block}.attention.self.query",
        f"{layer}.attention.key": f"{block}.attention.self.key",
        f"{layer}.attention.value": f"{block}.attention.self.value",
        f"{layer}.attention.out": f"{block}.attention.output.dense",
        f"{layer}.norm_attention": f"{block}.attention.output.LayerNorm",
        f"{layer}.feed.up": f"{block}.intermediate.dense",
        f"{layer}.feed.down": f"{block}.output.dense",
        f"{layer}.norm_feed": f"{block}.output.LayerNorm",
    }


def _t5_config(raw: Settings, folder: Path) -> TextEncoderConfig:
    # "gated-gelu" means the approximate one, whatever it says; the default is that of the first T5 models.
    gated, _, name = raw.get("feed_forward_proj", "relu").rpartition("-")
    activation = Activation.GELU_TANH if gated and name == "gelu" else read_activation(name, folder=folder)
    blocks = BlocksConfig(
        dim=raw["d_model"],
        layers=raw["num_layers"],
        heads=raw["num_heads"],
        hidden=raw["d_ff"],
        head_width=raw["d_kv"],
        dropout=raw["dropout_rate"],
        activation=activation,
        architecture=T5(
            gated=bool(gated),
            buckets=raw["relative_attention_num_buckets"],
            max_distance=raw.get("relative_attention_max_distance", 128),
        ),
        epsilon=raw["layer_norm_epsilon"],
    )
    return TextEncoderConfig(blocks, max_length=raw.get("n_positions", 512))


def _t5_names(config: TextEncoderConfig) -> dict[str, str]:
    layer, block = "blocks.layers.{}", "encoder.block.{}.layer"
    return {
        "tokens": "shared",
        "blocks.distances": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{layer}.norm_attention": f"{block}.0.layer_norm",
        f"{layer}.attention.query": f"{block}.0.SelfAttention.q",
        f"{layer}.attention.key": f"{block}.0.SelfAttention.k",
        f"{layer}.attention.value": f"{block}.0.SelfAttention.v",
        f"{layer}.attention.out": f"{block}.0.SelfAttention.o",
        f"{layer}.norm_feed": f"{block}.1.layer_norm",
        f"{layer}.feed.gate": f"{block}.1.DenseReluDense.wi_0",
        f"{layer}.feed.up": f"{block}.1.DenseReluDense.wi_1"
        if config.blocks.architecture.gated
        else f"{block}.1.DenseReluDense.wi",
        f"{layer}.feed.down": f"{block}.1.DenseReluDense.wo",
        "blocks.norm": "encoder.final_layer_norm",
    }


_LAYOUTS: Mapping[str, _Layout] = {
    "bert": _Layout(_bert_config, _bert_names, ("", "bert.")),
    "t5": _Layout(_t5_config, _t5_names, ("",)),
}


def _read_pooling(folder: Path) -> Pooling:
    """Pooling by sentence-transformers' file. Raises SemidError if it is missing or of another kind."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        raise SemidError(f"{folder} does not say how states are pooled: give pooling=Pooling.MEAN (E5) or Pooling.CLS")
    modes = {name for name, on in Settings.read(path).items() if name.startswith("pooling_mode") and on}
    known = {"pooling_mode_mean_tokens": Pooling.MEAN, "pooling_mode_cls_token": Pooling.CLS}
    if len(modes) != 1 or not modes <= set(known):
        raise SemidError(f"{path}: expected one of {', '.join(known)}, got {', '.join(sorted(modes))}; give pooling=")
    return known[modes.pop()]


def _normalizes(folder: Path) -> bool:
    return any(kind.endswith(".Normalize") for kind in read_modules(folder))


class LoadedText(NamedTuple):
    """An encoder with its weights, and the tokenizer of its rows."""

    encoder: TextEncoder
    tokenizer: PretrainedTokenizer


def load_text_encoder(folder: str | Path, *, pooling: Pooling | None = None) -> LoadedText:
    """The encoder of `load_transformer` and the tokenizer of the same folder.

    Raises SemidError for what either does not read, and for a tokenizer of more tokens than the encoder knows.
    """
    folder = fetched(folder)
    tokenizer = PretrainedTokenizer(folder)
    encoder = load_transformer(folder, pooling=pooling)
    if tokenizer.size > encoder.tokens.num_embeddings:
        known = encoder.tokens.num_embeddings
        raise SemidError(
            f"{folder}: expected a tokenizer of at most {known} tokens, got {tokenizer.size}; mixed models?"
        )
    return LoadedText(encoder, tokenizer)


def load_transformer(
    folder: str | Path, *, pooling: Pooling | None = None, precision: Precision = Precision.FLOAT32
) -> TextEncoder:
    """The BERT or T5 encoder in a folder of the Hugging Face layout.

    Pooling and normalization are read from the files of sentence-transformers in the folder; `pooling` overrides. A
    dense layer after the pooling (sentence-T5) is not read, as fusion projects anyway.

    Raises SemidError for another architecture, for tensors that do not fit, and if nothing states the pooling.
    """
    folder = fetched(folder)
    raw = read_config(folder, kinds=_LAYOUTS)
    layout = _LAYOUTS[raw["model_type"]]
    with raw.naming():
        config = layout.config(raw, folder)
    config = replace(
        config,
        pooling=pooling or _read_pooling(folder),
        normalize=_normalizes(folder),
        blocks=replace(config.blocks, dtype=precision),
    )
    return load_weights(
        lambda: TextEncoder(config, vocabulary=raw["vocab_size"], rngs=nnx.Rngs(0)),
        folder,
        names=layout.names(config),
        prefixes=layout.prefixes,
    )
