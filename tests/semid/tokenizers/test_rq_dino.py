"""The loss of RQ-DINO: its definition, and a few steps on the simulator's pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quantizers import Gumbel, ResidualQuantizer, Schedule
from semid.data.simulated import SimulatedConfig, simulate
from semid.encoders import ImageConfig, ImageEncoder, image_rows
from semid.encoders.blocks import BlocksConfig
from semid.encoders.content import ImageRows
from semid.tokenizers import rq_dino_loss


def test_the_loss_by_its_definition():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(3, 4, 5)), rng.normal(size=(2, 4, 6))
    matrix, center = rng.normal(size=(5, 6)), rng.normal(size=6)
    quantizer = ResidualQuantizer((7, 7), dim=5, rngs=nnx.Rngs(0))
    arrays = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
    found = rq_dino_loss(
        *arrays,
        quantizer=quantizer,
        head=lambda x: x @ jnp.asarray(matrix, jnp.float32),
        center=jnp.asarray(center, jnp.float32),
    )
    vectors = np.asarray(quantizer.decode(quantizer.encode(jnp.asarray(student, jnp.float32))), np.float64)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    wanted, said = np.exp(log_softmax((teacher - center) / 0.04)), log_softmax(vectors @ matrix / 0.1)
    pairs = [-(wanted[g] * said[v]).sum(-1).mean() for g in range(2) for v in range(3) if g != v]
    np.testing.assert_allclose(found.agreement, np.mean(pairs), rtol=1e-5)
    np.testing.assert_allclose(found.center, teacher.mean((0, 1)), rtol=1e-5)
    losses = quantizer(jnp.asarray(student, jnp.float32)).losses
    assert (found.codebook, found.commitment) == (losses.codebook, losses.commitment)


def test_the_codes_of_a_step_move_usage_and_noise_takes_the_key_and_the_progress():
    quantizer = ResidualQuantizer((7, 7), dim=5, rngs=nnx.Rngs(0), assignment=Gumbel(Schedule(0.0, initial=1e3)))
    student = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 5)), jnp.float32)
    arguments = {"quantizer": quantizer, "head": lambda x: x, "center": jnp.zeros(5), "key": jax.random.key(1)}
    early = rq_dino_loss(student, student[:2], progress=0.0, **arguments).found
    late = rq_dino_loss(student, student[:2], progress=1.0, **arguments).found
    np.testing.assert_array_equal(late.codes, quantizer.encode(student))
    assert (early.codes != late.codes).any(-1).mean() > 0.5
    quantizer.update_statistics(late)
    shares = np.bincount(np.asarray(late.codes)[..., 0].ravel(), minlength=7) / 120
    np.testing.assert_allclose(quantizer.usage[0][...], 0.99 / 7 + 0.01 * shares, rtol=1e-5)


def test_too_few_crops_are_refused():
    settings = {"quantizer": ResidualQuantizer((3,), dim=2, rngs=nnx.Rngs(0)), "head": lambda x: x}
    for crops, large in ((1, 1), (2, 3)):
        with pytest.raises(ValueError, match=rf"got {crops} and {large}$"):
            rq_dino_loss(jnp.ones((crops, 4, 2)), jnp.ones((large, 4, 2)), center=jnp.zeros(2), **settings)
    rq_dino_loss(jnp.ones((2, 4, 2)), jnp.ones((2, 4, 2)), center=jnp.zeros(2), **settings)


SIZE, CLASSES = 24, 16
CONFIG = ImageConfig(SIZE, 8, BlocksConfig(dim=8, layers=1, heads=2, hidden=16, dropout=0.0))


class Student(nnx.Module):
    def __init__(self, rngs):
        self.encoder, self.head = ImageEncoder(CONFIG, rngs=rngs), nnx.Linear(8, CLASSES, use_bias=False, rngs=rngs)
        self.quantizer = ResidualQuantizer((8, 8), dim=8, rngs=rngs)


@pytest.fixture(scope="module")
def pictures():
    """Pixels of 72 simulated items, [items, 32, 32, 3]."""
    world = simulate(SimulatedConfig(num_items=72, num_users=8, seed=0))
    column = next(name for name in world.dataset.items.column_names if "image" in name)
    whole = ImageConfig(32, 8, CONFIG.blocks)
    images = world.dataset.items[column].to_pylist()
    return image_rows(images, item_ids=world.dataset.item_ids.to_pylist(), config=whole).pixels


def test_crops_of_a_picture_come_to_share_codes(pictures):
    graph, params, rest = nnx.split(Student(nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(3e-3)

    def crops(key):
        corners = jax.random.randint(key, (2, 2), 0, 32 - SIZE + 1)
        return jnp.stack(
            [jax.lax.dynamic_slice(pictures, (0, *at, 0), (len(pictures), SIZE, SIZE, 3)) for at in corners]
        )

    def encoded(params, pixels):
        model = nnx.merge(graph, params, rest)
        rows = ImageRows(pixels.reshape(-1, SIZE, SIZE, 3), jnp.ones(2 * len(pictures), bool))
        return model, model.encoder(rows).reshape(2, len(pictures), -1)

    @jax.jit
    def step(params, teacher, center, state, key):
        pixels = crops(key)
        of_teacher, states = encoded(teacher, pixels)
        logits = of_teacher.head(states)

        def loss(params):
            model, states = encoded(params, pixels)
            found = rq_dino_loss(states, logits, quantizer=model.quantizer, head=model.head, center=center)
            return found.agreement + found.codebook + 0.25 * found.commitment, found

        gradient, found = jax.grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction
            updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        teacher = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, teacher, params)
        return params, teacher, 0.9 * center + 0.1 * found.center, state, found.agreement

    @jax.jit
    def shared(params, key):
        """Shares of items whose first codes of two crops are the same, and of pairs of items."""
        model, states = encoded(params, crops(key))
        codes = model.quantizer.encode(states)[..., 0]
        return jnp.mean(codes[0] == codes[1]), jnp.mean(codes[0][:, None] == codes[1][None])

    values = (params, params, jnp.zeros(CLASSES), optimizer.init(params))
    agreements = []
    for at in range(60):
        *values, agreement = step(*values, jax.random.key(at))
        agreements.append(float(agreement))
    assert np.mean(agreements[-10:]) < np.mean(agreements[:10]) - 0.1
    own, others = shared(values[0], jax.random.key(100))
    assert own > others + 0.2
