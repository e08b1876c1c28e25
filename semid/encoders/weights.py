"""Pretrained weights from a local folder in the Hugging Face layout: config.json and safetensors, never a pickle."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from semid import artifacts
from semid.encoders.blocks import Activation
from semid.errors import SemidError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "quick_gelu": Activation.QUICK_GELU,
    "relu": Activation.RELU,
}
# Names of a layer's leaves in the files; the second are those of checkpoints converted from TensorFlow.
_LEAVES = {"kernel": ("weight",), "embedding": ("weight",), "scale": ("weight", "gamma"), "bias": ("bias", "beta")}
# Torch keeps outputs first: matrices [out, in], convolutions [out, in, height, width].
_TO_KERNEL = {2: (1, 0), 4: (2, 3, 1, 0)}

_M = TypeVar("_M", bound=nnx.Module)
_FETCH = "fetch the model's own folder"


# Settings of foreign files by the kind of value that they must have: no model could be built from others.
_DEPTHS = ("num_hidden_layers", "num_layers")
_COUNTS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_seq_length"),
    *("max_position_embeddings", "n_positions", "d_model", "d_ff", "d_kv", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
_NUMBERS = ("hidden_dropout_prob", "dropout_rate", "layer_norm_eps", "layer_norm_epsilon", "mlp_ratio")
_TEXTS = ("model_type", "hidden_act", "feed_forward_proj", "position_embedding_type")
_COLORS = ("image_mean", "image_std")
_OBJECTS = ("vision_config",)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e6


_KINDS: Mapping[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "a whole number from 1 to 256": (_DEPTHS, lambda value: type(value) is int and 1 <= value <= 256),
    "a whole number from 1 to 2**24": (_COUNTS, lambda value: type(value) is int and 1 <= value <= 1 << 24),
    "a whole number from 0 to 256": (("type_vocab_size",), lambda value: type(value) is int and 0 <= value <= 256),
    "a number from 0 to 1e6": (_NUMBERS, _is_number),
    "three numbers from 0 to 1e6": (
        _COLORS,
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)),
    ),
    "Pillow's number of a filter": (("resample",), lambda value: type(value) is int and 0 <= value <= 5),
    "a text": (_TEXTS, lambda value: isinstance(value, str)),
    "an object": (_OBJECTS, lambda value: isinstance(value, dict)),
}


class Settings(dict[str, Any]):
    """The object of a JSON file, without nulls. Settings that are missing or of another kind raise SemidError."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.path = path
        for kind, (names, fits) in _KINDS.items():
            for name in self.keys() & set(names):
                if not fits(self[name]):
                    raise SemidError(f"{path}: expected {kind} as {name!r}, got {repr(self[name])[:80]}; {_FETCH}")

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a file. Raises SemidError if it is missing, no JSON, or no object of settings that can be built."""
        values = artifacts.read_json(path)
        if not isinstance(values, dict):
            raise SemidError(f"{path}: expected an object of settings, got {repr(values)[:80]}; {_FETCH}")
        return cls(values, path)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the file in a config's errors about settings that do not fit each other."""
        try:
            yield
        except SemidError as error:
            raise SemidError(str(error) if str(self.path) in str(error) else f"{self.path}: {error}") from None

    def __missing__(self, name: str) -> Any:
        raise SemidError(f"{self.path}: expected a setting {name!r}, found none; {_FETCH}")


def read_config(folder: str | Path, *, kinds: Collection[str]) -> Settings:
    """`config.json` of a model of one of the types `kinds`. Raises SemidError for any other."""
    path = Path(folder) / "config.json"
    config = Settings.read(path)
    if (kind := config.get("model_type")) not in kinds:
        raise SemidError(f"{path}: expected model_type of {', '.join(sorted(kinds))}, got {kind!r}; give such a model")
    return config


def read_modules(folder: Path) -> list[str]:
    """Types of the modules of sentence-transformers in a folder's `modules.json`, none without such a file."""
    path = folder / "modules.json"
    listed = artifacts.read_json(path) if path.is_file() else []
    if not isinstance(listed, list) or not all(
        isinstance(of, dict) and isinstance(of.get("type"), str) for of in listed
    ):
        raise SemidError(f"{path}: expected a list of objects that say their type; {_FETCH}")
    return [of["type"] for of in listed]


def read_activation(name: str, *, folder: str | Path) -> Activation:
    """The activation that a config calls `name`."""
    if name not in _ACTIVATIONS:
        expected = ", ".join(_ACTIVATIONS)
        raise SemidError(f"{Path(folder) / 'config.json'}: expected an activation of {expected}; got {name!r}")
    return _ACTIVATIONS[name]


def load_weights(
    build: Callable[[], _M], folder: str | Path, *, names: Mapping[str, str], prefixes: tuple[str, ...] = ("",)
) -> _M:
    """Build a module and read its parameters from the folder's safetensors, as float32.

    `names` maps each layer of the module ("layers.{}.attention.query"), or single parameter, to its name in the files;
    braces stand for the numbers, in order. In a task's checkpoint all names have a prefix ("bert."): the first of
    `prefixes` that fits is used. Tensors that the module does not have are ignored.

    Raises SemidError for a tensor that is missing or of another shape, and names it.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    tensors = _Tensors(Path(folder))
    named = [(path, variable, _candidates(path, names)) for path, variable in nnx.to_flat_state(state)]
    fits = (p for p in prefixes if any(p + name in tensors.files for name in named[0][2]))
    prefix = next(fits, prefixes[0])
    filled = [
        (path, variable.replace(tensors.read([prefix + n for n in candidates], variable.shape, str(path[-1]))))
        for path, variable, candidates in named
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _candidates(path: tuple[Any, ...], names: Mapping[str, str]) -> list[str]:
    """Names that the parameter at `path` may have in the files."""
    text = ".".join(str(part) for part in path)
    numbers, pattern = re.findall(r"\d+", text), re.sub(r"\d+", "{}", text)
    if pattern in names:
        return [names[pattern].format(*numbers)]
    layer, leaf = pattern.rsplit(".", 1)
    return [f"{names[layer].format(*numbers)}.{end}" for end in _LEAVES[leaf]]


class _Tensors:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, {}
        if (folder / INDEX).is_file():
            self.files = {name: folder / file for name, file in _read_index(folder / INDEX).items()}
        elif (folder / WEIGHTS).is_file():
            self.files = dict.fromkeys(_opened(folder / WEIGHTS).keys(), folder / WEIGHTS)
        else:
            raise SemidError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}; save the model as safetensors, no other is read"
            )

    def read(self, candidates: list[str], shape: tuple[int, ...], leaf: str) -> Float[jnp.ndarray, "*shape"]:
        """Read the first of `candidates` that exists, with the axes in the order of a `leaf` of that shape."""
        name = next((name for name in candidates if name in self.files), None)
        if name is None:
            raise SemidError(f"{self.folder}: expected a tensor {candidates[0]!r}, found none; is it another model's?")
        order = _TO_KERNEL.get(len(shape), ()) if leaf == "kernel" else tuple(range(len(shape)))
        expected = tuple(shape[order.index(axis)] for axis in range(len(shape)))
        try:
            with _opened(self.files[name]) as file:
                tensor = np.asarray(file.get_tensor(name), np.float32)
        except (SafetensorError, TypeError, ValueError) as error:  # not in this shard; bfloat16, which numpy lacks
            raise SemidError(f"{self.files[name]}: tensor {name!r} cannot be read as float32 ({error})") from None
        while tensor.ndim > len(shape) and tensor.shape[0] == 1:  # learned positions of ViT: [1, t, dim]
            tensor = tensor[0]
        if tensor.shape != expected:
            raise SemidError(
                f"{self.files[name]}: tensor {name!r} has shape {tensor.shape}, config.json asks for {expected}; "
                "take both files from one model"
            )
        return jnp.asarray(np.transpose(tensor, order))


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor name. Raises SemidError unless the files are next to the index."""
    files = Settings.read(path)["weight_map"]
    named = isinstance(files, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    )
    if not named or any("\0" in file for file in files.values()):
        raise SemidError(f"{path}: expected names of files next to it, by tensor, as 'weight_map'; {_FETCH}")
    return files


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise SemidError(f"{path} cannot be read as safetensors ({error}); fetch the folder again") from None


def folder_digest(folder: str | Path) -> str:
    """sha256 of a model's files by their names: settings, tokenizer, safetensors. Raises SemidError without any."""
    folder = artifacts.fetched(folder)
    files = sorted(path for suffix in (".json", ".txt", ".safetensors") for path in folder.rglob(f"*{suffix}"))
    if not files:
        raise SemidError(f"expected a model's files in {folder}, found none; give a folder in the Hugging Face layout")
    return artifacts.sha256_json({str(path.relative_to(folder)): artifacts.sha256(path) for path in files})


def find_folder(folder: str, digest: str | None, *, reader: str, revision: str | None = None, remedy: str = "") -> Path:
    """The folder with a model's files of this digest: one in or below those of SEMID_ENCODERS, else `folder` itself.

    Raises SemidError if files are missing or differ, naming their `reader` and the remedies: SEMID_ENCODERS, and
    `remedy`.
    """
    for place in filter(None, os.environ.get("SEMID_ENCODERS", "").split(os.pathsep)):
        for moved in (Path(place), Path(place) / Path(folder).name):
            if moved.is_dir() and any(moved.glob("*.json")) and folder_digest(moved) == digest:
                return moved
    # Only encoders from the hub have a revision: other folders that are missing are not looked for there.
    here = artifacts.fetched(folder) if revision is None else artifacts.local_folder(folder, revision=revision)
    remedy = f"name the folder that has them by the variable SEMID_ENCODERS{remedy}"
    if not here.is_dir():
        absent = f"{reader} needs the encoder {folder}, and there is no such folder here"
        raise SemidError(f"{absent}; put its files (sha256 {digest}) there, {remedy}")
    if (found := folder_digest(here)) != digest:
        raise SemidError(
            f"{here}: not the files that {reader} needs (sha256 {digest}, now {found}); put those back, {remedy}"
        )
    return here
