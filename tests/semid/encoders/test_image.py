"""Decoding of pictures, the vision transformer, and those of torch's transformers read from a folder."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from semid.artifacts import load_tensors, save_tensors
from semid.encoders import BlocksConfig, ImageConfig, ImageEncoder, ImageRows, image_rows, load_image_encoder
from semid.errors import SemidError
from seq_models import Precision

GOLDEN = Path(__file__).parent / "golden"
SMALL = ImageConfig(size=4, patch=2, blocks=BlocksConfig(dim=8, layers=1, heads=2, hidden=8))


def _file(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, kind)
    return stream.getvalue()


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_pictures_become_pixels_and_none_is_absent():
    pixels = _noise(4, 4, 3)
    rows = image_rows([_file(pixels), None], item_ids=["a", "b"], config=SMALL)
    np.testing.assert_array_equal(rows.pixels[0], pixels)
    np.testing.assert_array_equal(rows.pixels[1], 0)
    np.testing.assert_array_equal(rows.present, [True, False])


def test_the_whole_picture_is_squashed():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :10], wide[:, -10:] = (255, 0, 0), (0, 0, 255)
    rows = image_rows([_file(wide), _file(wide, "JPEG")], item_ids=["a", "b"], config=SMALL)
    for pixels in np.asarray(rows.pixels, np.int32):
        assert (pixels[:, 0, 0] > 200).all()
        assert (pixels[:, -1, 2] > 200).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_mode_of_a_picture_becomes_red_green_blue(mode):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(stream, "PNG")
    rows = image_rows([stream.getvalue()], item_ids=["a"], config=SMALL)
    np.testing.assert_array_equal(rows.pixels, 255)


def _png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture", "item 'bad': not a readable PNG or JPEG image"),
        (_file(_noise(64, 64, 3))[:-2000], "item 'bad': not a readable PNG or JPEG image"),
        (_png_header(8001, 8000), "item 'bad': image of more than 64,000,000 pixels"),
        (_png_header(100_000, 100_000), "item 'bad': image of more than 64,000,000 pixels"),
        # A size that is allowed is decoded, and found to have no pixels: the header above was enough.
        (_png_header(8, 8), "item 'bad': not a readable PNG or JPEG image"),
    ],
)
def test_a_bad_picture_is_refused_with_its_item(data, message):
    with pytest.raises(SemidError, match=message) as error:
        image_rows([_file(_noise(4, 4, 3)), data], item_ids=["good", "bad"], config=SMALL)
    assert "\n" not in str(error.value)


def _folder(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


@pytest.mark.parametrize("name", ["vit", "clip", "clip_vision", "dinov2"])
def test_a_loaded_encoder_gives_what_torch_gives(name):
    encoder = load_image_encoder(GOLDEN / name)
    expected = load_tensors(GOLDEN / name / "expected.safetensors")
    rows = ImageRows(jnp.asarray(expected["pixels"]), jnp.ones(3, bool))
    assert (encoder.config.size, encoder.config.resampling) == (6, Image.Resampling.BILINEAR.value)
    np.testing.assert_allclose(encoder(rows), expected["vectors"], atol=2e-5)
    np.testing.assert_allclose(encoder.hidden(rows), expected["hidden"], atol=2e-5)


def test_a_loaded_encoder_computes_in_bfloat16():
    encoder = load_image_encoder(GOLDEN / "vit", precision=Precision.BFLOAT16)
    expected = load_tensors(GOLDEN / "vit" / "expected.safetensors")
    vectors = encoder(ImageRows(jnp.asarray(expected["pixels"]), jnp.ones(3, bool)))
    assert vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors, expected["vectors"], atol=0.1)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder = _folder("vit", tmp_path)
    tensors = load_tensors(folder / "model.safetensors")
    name = "vit.encoder.layer.1.output.dense.weight"
    save_tensors(folder / "model.safetensors", tensors | {name: tensors[name][:, 1:]})
    with pytest.raises(SemidError, match=rf"'{name}' has shape \(8, 11\), config.json asks for \(8, 12\)"):
        load_image_encoder(folder)


def _changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "file", "values", "message"),
    [
        ("vit", "config.json", {"model_type": "bert"}, "expected model_type of clip.*got 'bert'"),
        ("vit", "config.json", {"image_size": [6, 8]}, "expected square pictures"),
        ("dinov2", "config.json", {"use_swiglu_ffn": True}, "expected use_swiglu_ffn false"),
        ("vit", "preprocessor_config.json", {"size": {"height": 7, "width": 7}}, "must divide into patches of 2"),
        ("vit", "preprocessor_config.json", {"image_std": [1, 0, 1]}, "expected 3 means and 3 positive deviations"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(name, file, values, message, tmp_path):
    folder = _folder(name, tmp_path)
    load_image_encoder(folder)
    _changed(folder / file, **values)
    with pytest.raises(SemidError, match=message):
        load_image_encoder(folder)


def test_a_missing_preprocessor_is_named(tmp_path):
    folder = _folder("vit", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(SemidError, match=r"preprocessor_config.json: no such file"):
        load_image_encoder(folder)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_encoder_from_scratch_learns_a_color(class_token):
    pixels = np.zeros((8, 4, 4, 3), np.uint8)
    pixels[:4, ..., 0], pixels[4:, ..., 2] = 255, 255
    rows = ImageRows(jnp.asarray(pixels), jnp.ones(8, bool))
    encoder = ImageEncoder(ImageConfig(4, 2, SMALL.blocks, class_token=class_token), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(encoder, nnx.Param, ...)
    target = jnp.where(jnp.arange(8) < 4, 1.0, -1.0)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.mean((nnx.merge(graph, params, rest)(rows)[:, 0] - target) ** 2)

    first, start = loss(params)
    for _ in range(30):
        value, gradient = loss(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert value < 0.2 * first
    unused = [path for path, g in nnx.to_flat_state(start) if not jnp.any(g[...])]
    assert [path for path in unused if path[-2:] != ("key", "bias")] == []


def test_pictures_of_another_size_are_refused():
    encoder = ImageEncoder(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(SemidError, match=r"expected pictures of \(4, 4, 3\), got \(6, 6, 3\)"):
        encoder(ImageRows(jnp.zeros((1, 6, 6, 3), jnp.uint8), jnp.ones(1, bool)))
