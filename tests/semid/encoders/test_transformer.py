"""Text encoders: torch's own answers on tiny random weights, pooling, absent texts, and what is refused."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from semid.encoders import BlocksConfig, Pooling, TextEncoder, TextEncoderConfig, TextRows, load_text_encoder, take
from semid.encoders.content import present_of
from semid.encoders.transformer import load_transformer
from semid.errors import SemidError
from seq_models import Precision

GOLDEN = Path(__file__).parent / "golden"
MODELS = pytest.mark.parametrize("name", ["bert", "t5", "t5_gated"])


def _expected(name: str) -> tuple[TextRows, dict[str, np.ndarray]]:
    tensors = load_file(GOLDEN / name / "expected.safetensors")
    return TextRows(jnp.asarray(tensors["tokens"]), jnp.asarray(tensors["mask"])), tensors


@functools.cache
def _loaded(name: str, pooling: Pooling) -> TextEncoder:
    return load_transformer(GOLDEN / name, pooling=pooling)


def _run(encoder: TextEncoder, rows: TextRows) -> jax.Array:
    return nnx.jit(lambda encoder, rows: encoder(rows))(encoder, rows)


def _copy(name: str, folder: Path, **changes: object) -> Path:
    """The golden folder with other settings in its config."""
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write(folder: Path, file: str, content: object) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))


@MODELS
def test_vectors_and_hidden_states_are_those_of_torch(name):
    rows, expected = _expected(name)
    mean, first = (_loaded(name, pooling) for pooling in Pooling)
    np.testing.assert_allclose(_run(mean, rows), expected["mean"], atol=2e-5)
    np.testing.assert_allclose(_run(first, rows), expected["cls"], atol=2e-5)
    hidden = nnx.jit(lambda encoder, rows: encoder.hidden(rows))(mean, rows)
    assert hidden.shape == (3, 3, 8)
    np.testing.assert_allclose(hidden[:, 0], expected["first"], atol=2e-5)
    np.testing.assert_allclose(hidden[:, 1], expected["second"], atol=2e-5)
    # Control: what torch says hangs on the mask.
    unmasked = _run(mean, rows._replace(mask=jnp.ones_like(rows.mask)))
    assert np.abs(unmasked[:2] - expected["mean"][:2]).max() > 1e-2


def test_weights_in_bfloat16_and_products_in_bfloat16(tmp_path):
    rows, expected = _expected("t5_gated")
    folder = _copy("t5_gated", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    encoder = load_transformer(folder, pooling=Pooling.MEAN, precision=Precision.BFLOAT16)
    assert encoder.tokens.embedding.dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):  # dot_product_attention itself promotes
        vectors = _run(encoder, rows)
    assert vectors.dtype == jnp.float32
    assert np.abs(vectors - expected["mean"]).max() < 0.05 * np.abs(expected["mean"]).max()


def test_pooling_and_normalization_are_read_from_the_folder(tmp_path):
    rows, expected = _expected("bert")
    folder = _copy("bert", tmp_path / "m")
    _write(folder, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    np.testing.assert_allclose(_run(load_transformer(folder), rows), expected["cls"], atol=2e-5)
    _write(folder, "modules.json", [{"type": "sentence_transformers.models.Normalize"}])
    unit = expected["cls"] / np.linalg.norm(expected["cls"], axis=1, keepdims=True)
    np.testing.assert_allclose(_run(load_transformer(folder), rows), unit, atol=2e-5)
    assert load_transformer(folder, pooling=Pooling.MEAN).config.pooling is Pooling.MEAN


def test_checkpoints_of_tasks_and_of_tensorflow_call_the_same_tensors_otherwise(tmp_path):
    rows, expected = _expected("bert")
    folder = _copy("bert", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    other = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name):
        return "bert." + next((name.replace(a, b) for a, b in other.items() if a in name), name)

    save_file({renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    encoder = load_transformer(folder, pooling=Pooling.MEAN)
    np.testing.assert_allclose(_run(encoder, rows), expected["mean"], atol=2e-5)


def _scratch(**change: object) -> TextEncoder:
    config = TextEncoderConfig(BlocksConfig(dim=8, hidden=12), max_length=6)
    return nnx.jit(lambda: TextEncoder(replace(config, **change), vocabulary=11, rngs=nnx.Rngs(0)))()


def _rows() -> TextRows:
    mask = jnp.arange(6)[None] < jnp.array([6, 2, 0])[:, None]
    return TextRows(jnp.where(mask, jax.random.randint(jax.random.key(0), (3, 6), 1, 11), 0), mask)


def test_an_encoder_from_scratch_learns_to_tell_texts_apart():
    encoder, rows = _scratch(), take(_rows(), np.array([0, 1]))
    graph, state = nnx.split(encoder)
    target = jnp.array([1.0, -1.0])

    @jax.jit
    def step(state):
        def loss(state):
            return jnp.mean((nnx.merge(graph, state)(rows, key=jax.random.key(0))[:, 0] - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(state)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, state, gradient)

    losses = []
    for _ in range(40):
        value, state = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_absent_texts_are_finite_and_disturb_nobody(pooling):
    encoder, rows = _scratch(pooling=pooling, normalize=True), _rows()
    assert present_of(rows).tolist() == [True, True, False]
    graph, state = nnx.split(encoder)
    weights = jax.random.normal(jax.random.key(1), (3, 8))

    def loss(state, rows):
        vectors = nnx.merge(graph, state)(rows)
        return jnp.sum(weights[: len(vectors)] * jnp.where(present_of(rows)[:, None], vectors, 0.0))

    with_absent, without = (jax.jit(jax.grad(loss))(state, take(rows, np.arange(n))) for n in (3, 2))
    assert np.isfinite(_run(encoder, rows)).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), with_absent, without)


def test_longer_rows_than_positions_are_refused():
    rows = TextRows(jnp.ones((1, 7), jnp.int32), jnp.ones((1, 7), bool))
    with pytest.raises(SemidError, match="rows of at most 6 tokens, got 7; cut the texts"):
        _scratch()(rows)
    assert _run(_scratch(), take(_rows(), np.array([0]))).shape == (1, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: expected model_type of bert, t5, got 'gpt2'"),
        ({"hidden_act": "mish"}, "config.json: expected an activation of gelu, .*; got 'mish'"),
        ({"position_embedding_type": "relative_key"}, "expected absolute positions, got 'relative_key'"),
        (
            {"intermediate_size": 13},
            r"model.safetensors: tensor 'encoder.layer.0.output.dense.weight' has shape \(8, 12\), "
            r"config.json asks for \(8, 13\)",
        ),
        ({"vocab_size": 17}, r"tensor 'embeddings.word_embeddings.weight' has shape \(16, 8\), .* asks for \(17, 8\)"),
        ({"num_hidden_layers": 3}, r"expected a tensor 'encoder.layer.2.*', found none"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, changes, message):
    folder = _copy("bert", tmp_path / "m", **changes)
    with pytest.raises(SemidError, match=message) as caught:
        load_transformer(folder, pooling=Pooling.MEAN)
    assert "\n" not in str(caught.value)


def test_unstated_pooling_is_refused(tmp_path):
    with pytest.raises(SemidError, match=r"does not say how states are pooled: give pooling=Pooling.MEAN"):
        load_transformer(GOLDEN / "bert")
    folder = _copy("bert", tmp_path / "m")
    _write(folder, "1_Pooling/config.json", {"pooling_mode_max_tokens": True})
    with pytest.raises(SemidError, match="got pooling_mode_max_tokens; give pooling="):
        load_transformer(folder)


def test_the_encoder_comes_with_its_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    encoder, tokenizer = load_text_encoder(GOLDEN / "bert", pooling=Pooling.MEAN)
    rows = tokenizer.rows(["Matte red lipsticks", ""], max_length=8).rows
    assert _run(encoder, rows).shape == (2, 8)
    folder = _copy("bert", tmp_path / "m")
    tokens = [*(GOLDEN / "bert" / "vocab.txt").read_text().split(), "one", "more"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SemidError, match="a tokenizer of at most 16 tokens, got 18; mixed models"):
        load_text_encoder(folder, pooling=Pooling.MEAN)
