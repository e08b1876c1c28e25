"""Pictures of items: decoding, a small vision transformer from scratch, and those of ViT, CLIP and DINOv2 folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from semid.artifacts import fetched
from semid.data import load_image
from semid.encoders.blocks import Architecture, Blocks, BlocksConfig, LayerScale, PreNorm, norm
from semid.encoders.content import ImageRows
from semid.encoders.weights import Settings, load_weights, read_activation, read_config
from semid.errors import SemidError
from seq_models import Precision


@dataclass(frozen=True)
class ImageConfig:
    """A vision transformer (Dosovitskiy et al. 2021), and the preparation of its pictures."""

    size: int = 64
    """Pictures are scaled to `size` x `size` pixels, whatever their proportions: nothing is cut off."""
    patch: int = 8
    """Side of the square patches, each of which becomes a position."""
    blocks: BlocksConfig = BlocksConfig()
    """The transformer over the patches."""
    class_token: bool = False
    """Pool by the state of a learned token (ViT, CLIP, DINOv2) instead of the mean over the patches."""
    norm_input: bool = False
    """A norm before the first block, the patches then without bias (CLIP)."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from red, green and blue in [0, 1] ..."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """... which are then divided by this."""
    resampling: int = 3
    """Pillow's number of the scaling filter; 3: bicubic."""

    def __post_init__(self) -> None:
        if min(self.size, self.patch) < 1 or self.size % self.patch:
            raise SemidError(f"size {self.size} must divide into patches of {self.patch} pixels; change either")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise SemidError(f"expected 3 means and 3 positive deviations, got {self.mean} and {self.std}")

    @property
    def positions(self) -> int:
        """Patches of a picture, and the class token."""
        return (self.size // self.patch) ** 2 + self.class_token


def image_rows(images: Sequence[bytes | None], *, item_ids: Sequence[str], config: ImageConfig) -> ImageRows:
    """Decode and scale PNG or JPEG files, one per item; None is an item without a picture.

    Raises SemidError naming the item whose picture cannot be decoded or has more than 64 million pixels, which its
    header tells before anything is decoded.
    """
    pixels = np.zeros((len(images), config.size, config.size, 3), np.uint8)
    for row, (data, item_id) in enumerate(zip(images, item_ids, strict=True)):
        if data is None:
            continue
        try:
            image = load_image(data, size=2 * config.size)  # decoding may downscale, to twice the size
        except SemidError as error:
            raise SemidError(f"item {item_id!r}: {error}") from None
        pixels[row] = np.asarray(image.resize((config.size, config.size), config.resampling))
    return ImageRows(jnp.asarray(pixels), jnp.asarray([data is not None for data in images], bool))


class Patches(nnx.Module):
    """A linear map of square patches, as a matrix product: it trains 4 times as fast on a CPU as a convolution."""

    def __init__(self, config: ImageConfig, *, rngs: nnx.Rngs) -> None:
        self.dtype = config.blocks.dtype.value
        shape = (config.patch, config.patch, 3, config.blocks.dim)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        self.bias = None if config.norm_input else nnx.Param(jnp.zeros(config.blocks.dim))

    def __call__(self, x: Float[Array, "n height width 3"]) -> Float[Array, "n t dim"]:
        n, height, width, _ = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        patch = len(kernel)
        x = x.reshape(n, height // patch, patch, width // patch, patch, 3).swapaxes(2, 3)
        x = x.astype(self.dtype).reshape(n, -1, 3 * patch**2) @ kernel.reshape(-1, kernel.shape[-1])
        x = x.astype(jnp.float32)
        return x if self.bias is None else x + self.bias[...][None, None]


class ImageEncoder(nnx.Module):
    """Vectors of pictures; those of absent ones, which are black, are finite and mean nothing."""

    def __init__(self, config: ImageConfig, *, rngs: nnx.Rngs) -> None:
        self.config, self.dim = config, config.blocks.dim
        normal = nnx.initializers.normal(0.02)
        self.patches = Patches(config, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs.params(), (self.dim,))) if config.class_token else None
        self.positions = nnx.Param(normal(rngs.params(), (config.positions, self.dim)))
        self.norm_input = norm(config.blocks, rngs=rngs) if config.norm_input else None
        self.blocks = Blocks(config.blocks, rngs=rngs)

    def __call__(self, rows: ImageRows, *, key: Key[Array, ""] | None = None) -> Float[Array, "n dim"]:
        """The pooled last states, normed. Dropout needs a `key`."""
        return self._pool(self.blocks(self._embed(rows.pixels), key=key))

    def hidden(self, rows: ImageRows) -> Float[Array, "n layer dim"]:
        """The pooled state of the patches' embeddings and of every block, before the norm at the end."""
        return jnp.stack([self._pool(states) for states in self.blocks.hidden(self._embed(rows.pixels))], axis=1)

    def _embed(self, pixels: UInt8[Array, "n height width 3"]) -> Float[Array, "n t dim"]:
        n, side = len(pixels), self.config.size
        if pixels.shape[1:] != (side, side, 3):
            raise SemidError(f"expected pictures of {(side, side, 3)}, got {pixels.shape[1:]}; decode with this config")
        mean, std = (
            jnp.asarray(values, jnp.float32)[None, None, None] for values in (self.config.mean, self.config.std)
        )
        x = self.patches((pixels.astype(jnp.float32) / 255 - mean) / std)
        if self.class_token is not None:
            x = jnp.concatenate([jnp.broadcast_to(self.class_token[...], (n, 1, self.dim)), x], axis=1)
        x = x + self.positions[...][None]
        return x if self.norm_input is None else self.norm_input(x)

    def _pool(self, states: Float[Array, "n t dim"]) -> Float[Array, "n dim"]:
        states = states.astype(jnp.float32)
        return states[:, 0] if self.config.class_token else jnp.mean(states, axis=1)


def load_image_encoder(folder: str | Path, *, precision: Precision = Precision.FLOAT32) -> ImageEncoder:
    """The ViT, CLIP vision or DINOv2 model in a folder of the Hugging Face layout; its vectors are the class token's.

    The config's `size`, `mean`, `std` and `resampling` are those of preprocessor_config.json; positions are resampled
    where it asks for another size than the model was trained with (DINOv2). Pictures are squashed to that size whole,
    where CLIP and DINOv2 cut out the center: of a product or a poster nothing may be lost.

    Raises SemidError for another architecture, tensors that do not fit, or missing files.
    """
    folder = fetched(folder)
    raw = read_config(folder, kinds=_FAMILIES)
    family = _FAMILIES[raw["model_type"]]
    raw = Settings(family.defaults | Settings(raw.get("vision_config", raw), raw.path), raw.path)
    if raw.get("use_swiglu_ffn"):
        raise SemidError(f"{folder}/config.json: expected use_swiglu_ffn false, got true; take a smaller DINOv2")
    with raw.naming():
        blocks = BlocksConfig(
            dim=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            hidden=raw.get("intermediate_size") or int(raw["hidden_size"] * raw["mlp_ratio"]),
            dropout=0.0,
            activation=read_activation(raw["hidden_act"], folder=folder),
            epsilon=raw["layer_norm_eps"],
            architecture=family.architecture,
            dtype=precision,
        )
        native = ImageConfig(
            size=_side(raw["image_size"], folder / "config.json"),
            patch=_side(raw["patch_size"], folder / "config.json"),
            blocks=blocks,
            class_token=True,
            norm_input="norm_input" in family.names,
        )
    names = family.names | {f"blocks.layers.{{}}.{ours}": theirs for ours, theirs in family.layers.items()}
    encoder = load_weights(
        lambda: ImageEncoder(native, rngs=nnx.Rngs(0)), folder, names=names, prefixes=family.prefixes
    )
    encoder.config = _preprocessing(native, folder / "preprocessor_config.json")
    encoder.positions = nnx.Param(_resampled(encoder.positions[...], encoder.config.positions))
    return encoder


class _Family(NamedTuple):
    """Tensor names of an architecture's files, and the defaults of its config.json."""

    names: dict[str, str]
    layers: dict[str, str]
    prefixes: tuple[str, ...]
    defaults: dict[str, Any]
    architecture: Architecture = PreNorm()


_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"}
_VIT_NAMES = {
    "patches": "embeddings.patch_embeddings.projection",
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "blocks.norm": "layernorm",
}
_VIT_ATTENTION = {
    "attention.query": "encoder.layer.{}.attention.attention.query",
    "attention.key": "encoder.layer.{}.attention.attention.key",
    "attention.value": "encoder.layer.{}.attention.attention.value",
    "attention.out": "encoder.layer.{}.attention.output.dense",
}
_VIT = _Family(
    names=_VIT_NAMES,
    layers=_VIT_ATTENTION
    | {
        "norm_attention": "encoder.layer.{}.layernorm_before",
        "norm_feed": "encoder.layer.{}.layernorm_after",
        "feed.up": "encoder.layer.{}.intermediate.dense",
        "feed.down": "encoder.layer.{}.output.dense",
    },
    prefixes=("", "vit."),
    defaults=_DEFAULTS | {"intermediate_size": 3072, "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16},
)
_DINO = _Family(
    names=_VIT_NAMES,
    layers=_VIT_ATTENTION
    | {
        "norm_attention": "encoder.layer.{}.norm1",
        "norm_feed": "encoder.layer.{}.norm2",
        "feed.up": "encoder.layer.{}.mlp.fc1",
        "feed.down": "encoder.layer.{}.mlp.fc2",
        "scale_attention": "encoder.layer.{}.layer_scale1.lambda1",
        "scale_feed": "encoder.layer.{}.layer_scale2.lambda1",
    },
    prefixes=("", "dinov2."),
    defaults=_DEFAULTS | {"mlp_ratio": 4, "layer_norm_eps": 1e-6, "image_size": 224, "patch_size": 14},
    architecture=LayerScale(),
)
_CLIP = _Family(
    names={
        "patches": "embeddings.patch_embedding",
        "class_token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "norm_input": "pre_layrnorm",
        "blocks.norm": "post_layernorm",
    },
    layers={
        "norm_attention": "encoder.layers.{}.layer_norm1",
        "attention.query": "encoder.layers.{}.self_attn.q_proj",
        "attention.key": "encoder.layers.{}.self_attn.k_proj",
        "attention.value": "encoder.layers.{}.self_attn.v_proj",
        "attention.out": "encoder.layers.{}.self_attn.out_proj",
        "norm_feed": "encoder.layers.{}.layer_norm2",
        "feed.up": "encoder.layers.{}.mlp.fc1",
        "feed.down": "encoder.layers.{}.mlp.fc2",
    },
    prefixes=("vision_model.", ""),
    defaults=_DEFAULTS
    | {"hidden_act": "quick_gelu", "intermediate_size": 3072, "layer_norm_eps": 1e-5}
    | {"image_size": 224, "patch_size": 32},
)
_FAMILIES = {"vit": _VIT, "dinov2": _DINO, "clip": _CLIP, "clip_vision_model": _CLIP}


# Largest side of a picture, in pixels.
_LONGEST = 4096


def _side(value: Any, file: Path) -> int:
    """The side of a square, given as a number or as both sides."""
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if not sides or any(type(side) is not int or not 1 <= side <= _LONGEST or side != sides[0] for side in sides):
        expected = f"square pictures and patches of 1 to {_LONGEST} pixels a side"
        raise SemidError(f"{file}: expected {expected}, got {repr(value)[:80]}; take a model of such")
    return int(sides[0])


def _preprocessing(config: ImageConfig, file: Path) -> ImageConfig:
    """`config` with the size, mean, deviation and filter that a preprocessor_config.json states."""
    raw = Settings.read(file)
    with raw.naming():
        size = (
            raw["crop_size"]
            if raw.get("crop_size") and raw.get("do_center_crop", True)
            else raw.get("size", config.size)
        )
        config = replace(config, size=_side(size, file), resampling=raw.get("resample", config.resampling))
        if not raw.get("do_normalize", True):
            return replace(config, mean=(0.0,) * 3, std=(1.0,) * 3)
        return replace(
            config, mean=tuple(raw.get("image_mean", config.mean)), std=tuple(raw.get("image_std", config.std))
        )


def _resampled(positions: Float[Array, "t dim"], number: int) -> Float[Array, "number dim"]:
    """`number` positions, for a square of more or fewer patches, bicubic; the class token's, the first, stays."""
    if len(positions) == number:
        return positions
    old, new = (round((n - 1) ** 0.5) for n in (len(positions), number))
    grid = np.asarray(positions[1:], np.float64).reshape(old, old, -1)
    weights = _bicubic(old, new)
    patches = np.einsum("ya,xb,abd->yxd", weights, weights, grid).reshape(new * new, -1)
    return jnp.concatenate([positions[:1], jnp.asarray(patches, jnp.float32)])


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of cubic convolution (Keys 1981, a = -3/4 as in torch) from `old` to `new` centers of equal cells."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first, weights = np.floor(at).astype(int), np.zeros((new, old))
    for neighbor in (first - 1, first, first + 1, first + 2):
        d = np.abs(at - neighbor)
        near, far = (1.25 * d - 2.25) * d * d + 1, -0.75 * (((d - 5) * d + 8) * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(neighbor, 0, old - 1)), np.where(d <= 1, near, far))
    return weights
