"""The memory bank against numpy, on one device and on eight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from semid.errors import SemidError
from semid.joint import MemoryBank, bucket_sizes, encode_fresh, unique_rows
from semid.training import ROWS, MeshConfig, make_mesh, shardings

ITEMS, DIM = 100, 3


class Holder(nnx.Module):
    """A model with a bank, as a mesh knows it."""

    def __init__(self, num_items=ITEMS, dim=DIM):
        self.bank = MemoryBank(num_items, dim=dim, rngs=nnx.Rngs(0))


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rows_of(*rows):
    return jnp.asarray(rows, jnp.int32)


def always(n):
    return jnp.ones(n, bool)


@pytest.fixture
def bank():
    return Holder().bank


def test_what_is_written_is_read_and_the_rest_is_the_learned_vector(bank):
    vectors = random(0, 4, DIM)
    bank.write(rows_of(7, 99, 0, 3), vectors, mask=jnp.asarray([True, True, False, True]))
    found = np.asarray(bank.read(rows_of(*range(ITEMS)).reshape(4, 25))).reshape(ITEMS, DIM)
    expected = np.broadcast_to(bank.unknown[...], (ITEMS, DIM)).copy()
    expected[[7, 99, 3]] = vectors[jnp.asarray([0, 1, 3])]
    np.testing.assert_array_equal(found, expected)
    assert not np.any(np.all(np.asarray(bank.unknown[...]) == 0))
    np.testing.assert_array_equal(np.flatnonzero(bank.knows(rows_of(*range(ITEMS)))), [3, 7, 99])


def test_the_last_write_counts(bank):
    first, second = random(0, 2, DIM), random(1, 2, DIM)
    bank.write(rows_of(4, 5), first, mask=always(2))
    bank.write(rows_of(5, 6), second, mask=always(2))
    np.testing.assert_array_equal(bank.read(rows_of(4, 5, 6)), np.stack([first[0], second[0], second[1]]))
    np.testing.assert_array_equal(bank.written[...][jnp.asarray([3, 4, 5, 6])], [-1, 1, 2, 2])


def test_no_gradient_moves_an_entry_and_the_learned_vector_has_its_own(bank):
    """Of everything differentiable: entries get zeros, the learned vector what the unwritten rows are asked for."""
    bank.write(rows_of(1, 2), random(0, 2, DIM), mask=always(2))
    graph, state = nnx.split(bank)
    weights = random(1, 4, DIM)

    def loss(vectors, unknown):
        own = nnx.merge(graph, state, copy=True)
        own.vectors[...], own.unknown[...] = vectors, unknown
        return (own.read(rows_of(1, 8, 2, 9)) * weights).sum()

    by_entries, by_unknown = jax.grad(loss, argnums=(0, 1))(bank.vectors[...], bank.unknown[...])
    assert not by_entries.any()
    np.testing.assert_allclose(by_unknown, weights[1] + weights[3], rtol=1e-6)
    assert list(nnx.to_pure_dict(nnx.state(bank, nnx.Param))) == ["unknown"]


def test_no_gradient_reaches_what_was_written(bank):
    graph, state = nnx.split(bank)

    def loss(vectors):
        own = nnx.merge(graph, state, copy=True)
        own.write(rows_of(1, 2), vectors, mask=always(2))
        return own.read(rows_of(1, 2, 3)).sum()

    assert not jax.grad(loss)(random(0, 2, DIM)).any()


def test_a_fresh_vector_goes_before_the_bank_and_carries_the_gradient(bank):
    bank.write(rows_of(1, 2), random(0, 2, DIM), mask=always(2))
    rows, place, encoded = rows_of(1, 2, 3, 4), rows_of(-1, 1, -1, 0), random(1, 2, DIM)
    found = bank.read_or(rows, place, encoded)
    stored = bank.read(rows)
    np.testing.assert_array_equal(found, np.stack([stored[0], encoded[1], stored[2], encoded[0]]))
    gradient = jax.grad(lambda x: (bank.read_or(rows, place, x) * jnp.arange(4.0)[:, None]).sum())(encoded)
    np.testing.assert_array_equal(gradient, np.broadcast_to([[3.0], [1.0]], (2, DIM)))


@pytest.mark.parametrize("size", [1, 7, 30])
def test_unique_rows_are_each_once_and_found_again(size):
    rows = np.random.default_rng(0).integers(0, 9, (4, 6)).astype(np.int32)
    fresh = jax.jit(unique_rows, static_argnames="size")(jnp.asarray(rows), size=size, key=jax.random.key(0))
    different = np.unique(rows)
    assert fresh.rows.shape == fresh.real.shape == (size,)
    chosen = np.asarray(fresh.rows)[np.asarray(fresh.real)]
    assert len(chosen) == len(set(chosen.tolist())) == min(size, len(different))
    assert set(chosen.tolist()) <= set(different.tolist())
    assert np.asarray(fresh.real).tolist() == [True] * len(chosen) + [False] * (size - len(chosen))
    np.testing.assert_array_equal(
        fresh.place, [[list(chosen).index(r) if r in chosen else -1 for r in x] for x in rows]
    )


def test_which_items_are_chosen_is_random_by_key():
    rows, size = jnp.arange(10, dtype=jnp.int32), 3
    draw = jax.jit(lambda seed: unique_rows(rows, size=size, key=jax.random.key(seed)).rows)
    np.testing.assert_array_equal(draw(5), draw(5))
    counts = np.bincount(np.concatenate([draw(seed) for seed in range(400)]), minlength=10)
    assert np.all(np.abs(counts - 120) < 5 * np.sqrt(120 * 0.7))


def test_one_program_serves_whatever_repeats(bank):
    traces = []

    @functools.partial(jax.jit, static_argnames="size")
    def distinct(rows, *, size):
        traces.append(size)
        return unique_rows(rows, size=size, key=jax.random.key(0)).real.sum()

    found = [int(distinct(rows_of(*rows), size=4)) for rows in [(1, 1, 1, 1), (1, 2, 1, 2), (4, 3, 2, 1)]]
    assert found == [1, 2, 4]
    assert traces == [4]


@pytest.mark.parametrize(
    ("forward", "backward", "parts", "sizes"),
    [(1, 1, 1, (10, 10)), (0.2, 0.2, 1, (2, 2)), (0.25, 0.01, 1, (3, 1)), (1, 0, 1, (10, 0)), (0.3, 0.1, 4, (4, 4))],
)
def test_buckets_are_rounded_up(forward, backward, parts, sizes):
    assert bucket_sizes(10, forward=forward, backward=backward, parts=parts) == sizes


def test_rounding_leaves_no_item_to_a_rate_that_is_exact():
    assert bucket_sizes(300, forward=0.07, backward=0.01) == (21, 3)  # 300 * .07 is a little above 21


@pytest.mark.parametrize(("forward", "backward"), [(0, 0), (0.2, 0.3), (1.1, 0), (1, -0.1)])
def test_rates_that_are_none(forward, backward):
    with pytest.raises(SemidError, match=f"got backward {backward} and forward {forward}$"):
        bucket_sizes(10, forward=forward, backward=backward)


@pytest.mark.parametrize("backward", [0, 2, 5])
def test_only_the_backward_bucket_has_a_gradient(backward):
    fresh = unique_rows(rows_of(3, 1, 4, 1, 5, 9), size=5, key=jax.random.key(0))
    content = random(0, 10, DIM)

    def vectors(matrix):
        return encode_fresh(lambda rows: content[rows] @ matrix, fresh, backward=backward)

    matrix = random(1, DIM, DIM)
    np.testing.assert_allclose(vectors(matrix), content[fresh.rows] @ matrix, rtol=1e-5, atol=1e-6)
    expected = np.asarray(content[fresh.rows[:backward]]).sum(0)
    gradient = jax.grad(lambda m: vectors(m).sum())(matrix)
    np.testing.assert_allclose(gradient, np.broadcast_to(expected[:, None], (DIM, DIM)), rtol=1e-5, atol=1e-6)


def test_health_against_numpy(bank):
    """Random writes; ages are counted in writes since."""
    rng, written = np.random.default_rng(0), np.full(ITEMS, -1)
    for write in range(1, 8):
        rows = rng.permutation(ITEMS)[:10]
        bank.write(jnp.asarray(rows, jnp.int32), random(write, 10, DIM), mask=always(10))
        written[rows] = write
    health, ages = bank.health(), 7 - written[written >= 0]
    assert float(health.coverage) == pytest.approx(np.mean(written >= 0))
    found = (health.age_50, health.age_90, health.age_99)
    np.testing.assert_allclose(found, np.percentile(ages, [50, 90, 99]), rtol=1e-6)
    rows, mask = rng.integers(0, ITEMS, (5, 8)), rng.random((5, 8)) < 0.5
    coverage = bank.coverage(jnp.asarray(rows, jnp.int32), mask=jnp.asarray(mask))
    assert float(coverage) == pytest.approx(np.mean(written[rows[mask]] >= 0))


def test_an_empty_bank_is_healthy_in_numbers(bank):
    assert [float(x) for x in bank.health()] == [0, 0, 0, 0]
    assert float(bank.coverage(rows_of(1), mask=jnp.asarray([False]))) == 0


def test_agreement_is_the_mean_cosine_of_what_was_stored_before(bank):
    old, new = np.asarray(random(0, 3, DIM)), np.asarray(random(1, 4, DIM))
    assert float(bank.write(rows_of(1, 2, 3), jnp.asarray(old), mask=always(3))) == 0  # nothing was stored
    mask = jnp.asarray([True, True, True, False])
    found = bank.write(rows_of(2, 1, 8, 3), jnp.asarray(new), mask=mask)  # 8 is new, 3 is not written
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in [(new[0], old[1]), (new[1], old[0])]]
    assert float(found) == pytest.approx(np.mean(cosines), rel=1e-5)


def test_a_bank_of_nothing():
    with pytest.raises(SemidError, match=r"^expected num_items and dim of at least 1, got 0 and 4$"):
        MemoryBank(0, dim=4, rngs=nnx.Rngs(0))


def step(graph, params, rest, rows, vectors):
    """Write some of the rows, read all, as a joint step does."""
    model = nnx.merge(graph, params, rest, copy=True)
    fresh = unique_rows(rows[:, -1], size=len(rows), key=jax.random.key(0))
    agreement = model.bank.write(fresh.rows, vectors, mask=fresh.real)
    found = model.bank.read_or(rows, jnp.pad(fresh.place[:, None], ((0, 0), (3, 0)), constant_values=-1), vectors)
    return nnx.split(model, nnx.Param, ...)[2], (found, agreement, model.bank.health())


def run(mesh):
    graph, params, rest = nnx.split(Holder(), nnx.Param, ...)
    params, rest = (jax.device_put(part, shardings(part, mesh)) for part in (params, rest))
    jitted = jax.jit(functools.partial(step, graph), donate_argnums=1, out_shardings=(shardings(rest, mesh), None))
    outputs, rng = [], np.random.default_rng(0)
    with jax.set_mesh(mesh):
        for seed in range(3):
            batch = (rng.integers(0, ITEMS, (16, 4)).astype(np.int32), random(seed, 16, DIM))
            rest, found = jitted(params, rest, *jax.device_put(batch, NamedSharding(mesh, ROWS)))
            outputs.append(jax.tree.map(np.asarray, found))
    return outputs, rest


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(2, 2)])
def test_a_sharded_bank_is_the_bank(config):
    (single, _), (sharded, rest) = run(make_mesh(jax.devices()[:1])), run(make_mesh(config=config))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), single, sharded)
    for x, part in ((rest["bank"]["vectors"], (16, DIM)), (rest["bank"]["written"], (16,))):
        assert {shard.data.shape for shard in x[...].addressable_shards} == {part}


def test_ten_million_items_lie_in_parts_and_a_step_neither_gathers_nor_copies_them():
    mesh = make_mesh(config=MeshConfig(fsdp=2))
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: Holder(10_000_000, 256)), nnx.Param, ...)

    def placed(tree):
        lay = shardings(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, lay)

    def small(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, ROWS))

    def without_health(*args):  # which sorts all ages
        after, (found, agreement, _) = step(graph, *args)
        return after, (found, agreement)

    lay = (shardings(rest, mesh), None)
    args = (placed(params), placed(rest), small(64, 4, dtype=jnp.int32), small(64, 256, dtype=jnp.float32))
    with jax.set_mesh(mesh):
        memory = jax.jit(without_health, donate_argnums=1, out_shardings=lay).lower(*args).compile().memory_analysis()
    part = 10_000_000 * (256 + 1) * 4 / 8  # bytes a device: vectors, and when they were written
    assert memory.argument_size_in_bytes == pytest.approx(part, rel=1e-3)
    assert memory.alias_size_in_bytes == pytest.approx(part, rel=1e-3)
    assert memory.temp_size_in_bytes < 0.01 * part
