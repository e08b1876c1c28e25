"""Pretrained weights from a local folder in the Hugging Face layout: config.json and safetensors, never a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
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
# What a leaf of a layer is called in the files; the second names are those of checkpoints that came from TensorFlow.
_LEAVES = {"kernel": ("weight",), "embedding": ("weight",), "scale": ("weight", "gamma"), "bias": ("bias", "beta")}
# Torch keeps outputs first: matrices [out, in], convolutions [out, in, height, width].
_TO_KERNEL = {2: (1, 0), 4: (2, 3, 1, 0)}

_M = TypeVar("_M", bound=nnx.Module)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises SemidError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise SemidError(f"expected a file {path}, found none; give a folder in the Hugging Face layout") from None
    except ValueError as error:
        raise SemidError(f"{path} is no JSON ({error}); fetch the folder again") from None


class _Config(dict[str, Any]):
    """A config that names itself where a setting is missing."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise SemidError(f"{self.path}: expected a setting {name!r}, found none; fetch the model's own config.json")


def read_config(folder: str | Path, *, kinds: Collection[str]) -> dict[str, Any]:
    """`config.json` of a model of one of the types `kinds`. Raises SemidError for any other."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("model_type") not in kinds:
        kind = config.get("model_type") if isinstance(config, dict) else config
        raise SemidError(f"{path}: expected model_type of {', '.join(sorted(kinds))}, got {kind!r}; give such a model")
    return _Config(config, path)


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

    `names` maps each layer of the module ("layers.{}.attention.query") to its name in the files; numbers are put in for
    braces, in order. A name may stand for one parameter too. A task's checkpoint calls the same tensors by a
    prefix ("bert."): the first of `prefixes` that fits is taken. Tensors that the module has no place for are ignored.

    Raises SemidError for a tensor that is missing or of another shape, and names it.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    tensors = _Tensors(Path(folder))
    wanted = [(path, variable, _candidates(path, names)) for path, variable in nnx.to_flat_state(state)]
    fits = (p for p in prefixes if any(p + name in tensors.files for name in wanted[0][2]))
    prefix = next(fits, prefixes[0])
    filled = [
        (path, variable.replace(tensors.read([prefix + n for n in called], variable.shape, str(path[-1]))))
        for path, variable, called in wanted
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
            self.files = {name: folder / file for name, file in read_json(folder / INDEX)["weight_map"].items()}
        elif (folder / WEIGHTS).is_file():
            self.files = dict.fromkeys(_opened(folder / WEIGHTS).keys(), folder / WEIGHTS)
        else:
            raise SemidError(
                f"{folder} has neither {WEIGHTS} nor {INDEX}; save the model as safetensors, no other is read"
            )

    def read(self, candidates: list[str], shape: tuple[int, ...], leaf: str) -> Float[jnp.ndarray, "*shape"]:
        """The one of `candidates` that exists, in the order of axes of a `leaf` of that shape."""
        name = next((name for name in candidates if name in self.files), None)
        if name is None:
            raise SemidError(f"{self.folder}: expected a tensor {candidates[0]!r}, found none; is it another model's?")
        order = _TO_KERNEL.get(len(shape), ()) if leaf == "kernel" else tuple(range(len(shape)))
        expected = tuple(shape[order.index(axis)] for axis in range(len(shape)))
        with _opened(self.files[name]) as file:
            tensor = file.get_tensor(name)
        while tensor.ndim > len(shape) and tensor.shape[0] == 1:  # learned positions of ViT: [1, t, dim]
            tensor = tensor[0]
        if tensor.shape != expected:
            raise SemidError(
                f"{self.files[name]}: tensor {name!r} has shape {tensor.shape}, config.json asks for {expected}; "
                "take both files from one model"
            )
        return jnp.asarray(np.transpose(np.asarray(tensor, np.float32), order))


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
