"""One vector an item, whatever is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from semid.encoders import (
    FeatureEncoder,
    FeatureRows,
    FusionConfig,
    HiddenRows,
    ItemEncoder,
    SideAdapters,
    SideTower,
    check_content,
)
from semid.encoders.fusion import keep_modalities
from semid.errors import SemidError

CONFIG = FusionConfig(dim=4, hidden=6, modality_dropout=0.5)


def _content(items=5):
    """Item 0 has both, 1 the first only, 2 the second only, 3 neither, 4 both."""
    text, image = np.random.default_rng(0).normal(size=(2, items, 3)).astype(np.float32)
    first = jnp.array([True, True, False, False, True])[:items]
    second = jnp.array([True, False, True, False, True])[:items]
    return {"text": FeatureRows(jnp.asarray(text), first), "image": FeatureRows(jnp.asarray(image), second)}


def _encoder(config=CONFIG, names=("text", "image")):
    return ItemEncoder({name: FeatureEncoder(3) for name in names}, config, rngs=nnx.Rngs(0))


def test_what_is_missing_does_not_matter_and_what_is_there_does():
    encoder, content = _encoder(), _content()
    changed = content | {"image": content["image"]._replace(vectors=content["image"].vectors + 1)}
    before, after = encoder(content), encoder(changed)
    assert before.shape == (5, 4)
    np.testing.assert_array_equal((before == after).all(axis=1), [False, True, False, True, False])


def test_from_the_identity_an_untrained_encoder_gives_the_vectors_but_for_the_norm():
    config, content = FusionConfig(dim=3, hidden=6, identity=True), _content()
    both = sum(np.asarray(rows.vectors) for rows in content.values())[[0, 4]]
    expected = (both - both.mean(1, keepdims=True)) / both.std(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(_encoder(config)(content))[[0, 4]], expected, rtol=1e-4)
    assert not np.allclose(np.asarray(_encoder(FusionConfig(dim=3, hidden=6))(content))[[0, 4]], expected, rtol=1e-1)
    with pytest.raises(SemidError, match=r"identity: expected vectors as wide as dim 4, got \{'image': 3"):
        _encoder(FusionConfig(dim=4, identity=True))


@pytest.mark.parametrize("names", [("text",), ("image",), ("text", "image")])
def test_any_subset_of_modalities_makes_vectors(names):
    vectors = _encoder(names=names)({name: _content()[name] for name in names})
    assert vectors.shape == (5, 4)
    assert jnp.isfinite(vectors).all()


def test_shapes_are_static():
    """One program, whatever is missing."""
    graph, state = nnx.split(_encoder())
    traced = []

    @jax.jit
    def encode(content):
        traced.append(1)
        return nnx.merge(graph, state)(content)

    content = _content()
    encode(content)
    encode(content | {"text": content["text"]._replace(present=jnp.zeros(5, bool))})
    assert len(traced) == 1


def _gradient(content):
    graph, params, rest = nnx.split(_encoder(), nnx.Param, ...)
    weights = jnp.arange(4.0)[None]
    gradient = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, rest)(content) * weights))(params)
    return {".".join(path): float(jnp.abs(value[...]).max()) for path, value in nnx.to_flat_state(gradient)}


def test_the_absent_vector_gets_the_gradient_of_what_is_missing():
    content = {name: FeatureRows(rows.vectors, jnp.ones(5, bool)) for name, rows in _content().items()}
    there = _gradient(content)
    assert there["absent.image"] == 0
    assert there["projections.image.kernel"] > 0
    missing = _gradient(content | {"image": content["image"]._replace(present=jnp.zeros(5, bool))})
    assert missing["absent.image"] > 0
    assert missing["projections.image.kernel"] == 0
    assert missing["projections.text.kernel"] > 0


def test_modalities_are_hidden_in_training_only_and_never_all_of_them():
    present = jnp.tile(jnp.array([[True, True], [True, False], [False, False]]), (1000, 1))
    np.testing.assert_array_equal(keep_modalities(present, 0.5, None), present)
    kept = keep_modalities(present, 0.5, jax.random.key(0)).reshape(1000, 3, 2)
    assert kept[:, 0].any(axis=-1).all()
    np.testing.assert_allclose(kept[:, 0].mean(axis=0), 0.75, atol=0.05)  # half, and the quarter in which both would go
    np.testing.assert_array_equal(kept[:, 1:], present.reshape(1000, 3, 2)[:, 1:])


def test_a_key_hides_whole_modalities():
    encoder, content = _encoder(), _content(1)
    alone = [
        encoder(content | {name: content[name]._replace(present=jnp.zeros(1, bool))}) for name in ("text", "image")
    ]
    seen = [encoder(content, key=jax.random.key(seed)) for seed in range(20)]
    possible = [encoder(content), *alone]
    matches = np.array([[np.allclose(x, y, atol=1e-6) for y in possible] for x in seen])
    assert matches.any(axis=1).all()
    assert matches.any(axis=0).all()
    calm = _encoder(FusionConfig(dim=4, hidden=6, modality_dropout=0.0))
    np.testing.assert_array_equal(calm(content, key=jax.random.key(0)), calm(content))


def _towers(**states):
    return {
        name: SideTower(dim, SideAdapters(states=n, hidden=2), rngs=nnx.Rngs(1)) for name, (n, dim) in states.items()
    }


def test_the_tower_between_side_towers_reads_both():
    encoder = ItemEncoder(_towers(text=(3, 4), image=(3, 2)), FusionConfig(dim=4, cross=True), rngs=nnx.Rngs(0))
    shapes = {"text": (5, 3, 4), "image": (5, 3, 2)}
    content = {
        name: HiddenRows(jax.random.normal(jax.random.key(0), shapes[name]).astype(jnp.float16), rows.present)
        for name, rows in _content().items()
    }
    graph, params, rest = nnx.split(encoder, nnx.Param, ...)
    weights = jnp.arange(4.0)[None]
    gradient = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, rest)(content) * weights))(params)
    cross = [value for path, value in nnx.to_flat_state(gradient) if path[0] == "cross"]
    assert cross
    assert all(jnp.any(value[...]) for value in cross)


def test_what_does_not_fit_is_refused():
    content = _content()
    check_content(content)
    nobody = content | {"image": content["image"]._replace(present=jnp.zeros(5, bool))}
    with pytest.raises(SemidError, match="expected items with 'image', got none among 5; leave that encoder out"):
        check_content(nobody)
    with pytest.raises(SemidError, match="expected content of the same items"):
        check_content({"text": content["text"], "image": _content(2)["image"]})
    with pytest.raises(SemidError, match=r"expected content of \['image', 'text'\], got \['text'\]"):
        _encoder()({"text": content["text"]})
    with pytest.raises(SemidError, match="expected at least one encoder"):
        ItemEncoder({}, CONFIG, rngs=nnx.Rngs(0))
    for towers in (_towers(text=(3, 4)), _towers(text=(3, 4), image=(2, 4))):
        with pytest.raises(SemidError, match="cross: expected side adapters of equal states on 2 encoders"):
            ItemEncoder(towers, FusionConfig(dim=4, cross=True), rngs=nnx.Rngs(0))
