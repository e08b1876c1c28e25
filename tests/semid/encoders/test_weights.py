"""Reading a folder: whole and in shards, every parameter once, and one line for what does not fit."""

import json
import math
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from semid.encoders import load_text_encoder
from semid.encoders.weights import load_weights, read_config
from semid.errors import SemidError

GOLDEN = Path(__file__).parent / "golden" / "bert"
NAMES = {"steps.{}": "steps.{}.dense", "patches": "stem.conv", "norm": "ln", "scale": "gain", "table": "words"}


class Net(nnx.Module):
    """A leaf of every kind."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.steps = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)])
        self.patches = nnx.Conv(3, 5, (2, 4), use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros((1, 1, 4)))
        self.table = nnx.Embed(6, 2, rngs=rngs)


def _tensors() -> dict[str, np.ndarray]:
    shapes = {
        "steps.0.dense.weight": (3, 2),
        "steps.0.dense.bias": (3,),
        "steps.1.dense.weight": (4, 3),
        "steps.1.dense.bias": (4,),
        "stem.conv.weight": (5, 3, 2, 4),
        "ln.weight": (4,),
        "ln.bias": (4,),
        "gain": (1, 1, 4),
        "words.weight": (6, 2),
        "nobody.asks": (2,),
    }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _load(folder: Path, *, prefixes: tuple[str, ...] = ("",)) -> Net:
    return load_weights(lambda: Net(nnx.Rngs(0)), folder, names=NAMES, prefixes=prefixes)


def _check(net: Net, tensors: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(net.steps[1].kernel[...], tensors["steps.1.dense.weight"].T)
    np.testing.assert_array_equal(net.steps[0].bias[...], tensors["steps.0.dense.bias"])
    np.testing.assert_array_equal(net.patches.kernel[1, 2, 0], tensors["stem.conv.weight"][:, 0, 1, 2])
    np.testing.assert_array_equal(net.norm.scale[...], tensors["ln.weight"])
    np.testing.assert_array_equal(net.norm.bias[...], tensors["ln.bias"])
    np.testing.assert_array_equal(net.scale[...], tensors["gain"])
    np.testing.assert_array_equal(net.table.embedding[...], tensors["words.weight"])


def test_every_leaf_is_the_file_s_tensor(tmp_path):
    save_file(_tensors(), tmp_path / "model.safetensors")
    _check(_load(tmp_path), _tensors())


def test_shards_and_a_prefix_give_the_same(tmp_path):
    named = {f"task.{name}": tensor for name, tensor in _tensors().items()}
    halves = {"a.safetensors": list(named)[:4], "b.safetensors": list(named)[4:]}
    for file, names in halves.items():
        save_file({name: named[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _check(_load(tmp_path, prefixes=("", "task.")), _tensors())
    with pytest.raises(SemidError, match=r"expected a tensor 'ln.bias', found none"):
        _load(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(SemidError, match=r"b.safetensors cannot be read as safetensors \(.*\); fetch the folder again"):
        _load(tmp_path, prefixes=("", "task."))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "steps.1.dense.weight",
            (3, 4),
            r"model.safetensors: tensor 'steps.1.dense.weight' has shape \(3, 4\), config",
        ),
        ("stem.conv.weight", (5, 3, 4, 2), r"has shape \(5, 3, 4, 2\), config.json asks for \(5, 3, 2, 4\)"),
        ("gain", (4,), r"tensor 'gain' has shape \(4,\), config.json asks for \(1, 1, 4\)"),
        ("ln.bias", None, r"expected a tensor 'ln.bias', found none; is it another model's\?"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name, shape, message):
    tensors = _tensors()
    del tensors[name]
    save_file(tensors | ({} if shape is None else {name: np.zeros(shape, np.float32)}), tmp_path / "model.safetensors")
    with pytest.raises(SemidError, match=message) as caught:
        _load(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_without_weights_or_with_broken_ones_are_refused(tmp_path):
    with pytest.raises(SemidError, match=r"has neither model.safetensors nor model.safetensors.index.json; save the"):
        _load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(SemidError, match=r"model.safetensors cannot be read as safetensors"):
        _load(tmp_path)


def test_configs_name_themselves(tmp_path):
    config = read_config(GOLDEN, kinds=("bert", "t5"))
    assert config["hidden_size"] == 8
    with pytest.raises(SemidError, match=r"config.json: expected a setting 'd_model', found none"):
        config["d_model"]
    with pytest.raises(SemidError, match=r"config.json: no such file"):
        read_config(tmp_path, kinds=("bert",))
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(SemidError, match="expected model_type of t5, got 'bert'; give such a model"):
        read_config(tmp_path, kinds=("t5",))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SemidError, match=r"config.json: not valid JSON"):
        read_config(tmp_path, kinds=("bert",))


@pytest.mark.parametrize(
    ("file", "value", "said"),
    [
        ("config.json", "[" * 100_000, "not valid JSON"),
        ("config.json", '{"model_type": "bert", "hidden_size": ' + "9" * 5_000 + "}", "not valid JSON"),
        ("config.json", ["bert"], "expected an object of settings, got "),
        ("config.json", {"model_type": ["bert"]}, "expected a text as 'model_type'"),
        ("config.json", {"hidden_size": 10**30}, "expected a whole number from 1 to 2.*24 as 'hidden_size', got 10+;"),
        ("config.json", {"hidden_size": None}, "expected a setting 'hidden_size', found none"),
        ("config.json", {"num_hidden_layers": 10**9}, "expected a whole number from 1 to 256"),
        ("config.json", {"num_attention_heads": 3}, "dim 8 must divide into 3 heads"),
        ("config.json", {"layer_norm_eps": math.nan}, "expected a number from 0 to 1e6 as 'layer_norm_eps', got nan"),
        ("config.json", {"hidden_act": {}}, "expected a text as 'hidden_act'"),
        ("modules.json", [{"type": 7}], "expected a list of objects that say their type"),
        ("1_Pooling/config.json", 7, "expected an object of settings, got 7"),
        ("tokenizer.json", "[" * 100_000, "not valid JSON"),
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "expected names of files next to it"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"a": "../a.safetensors"}},
            "expected names of files next to it",
        ),
    ],
)
def test_files_of_the_wrong_kind_are_named_in_one_line(tmp_path, file, value, said):
    shutil.copytree(GOLDEN, tmp_path / "bert")
    path = tmp_path / "bert" / file
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "bert" / "1_Pooling").mkdir(exist_ok=True)
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert load_text_encoder(tmp_path / "bert").encoder.dim == 8
    if isinstance(value, dict) and file == "config.json":
        value = json.loads(path.read_text()) | value
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(SemidError, match=rf"{re.escape(file)}: {said}"):
        load_text_encoder(tmp_path / "bert")


def test_tensors_are_read_from_float16_too(tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in _tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    net = _load(tmp_path)
    assert net.scale.dtype == jnp.float32
    _check(net, load_file(tmp_path / "model.safetensors"))
