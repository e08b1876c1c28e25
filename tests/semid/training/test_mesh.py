"""The mesh, and batches laid out on it."""

import jax
import numpy as np
import pytest
from flax import nnx

from semid.errors import SemidError
from semid.training import MeshConfig, ShardedByRows, divisible_batch_size, make_mesh, put_batch, replicated, shardings
from semid.training.mesh import gathered, leaf_sharding, on_host, table_sharding

ALL = ("data", "fsdp", "tensor")


@pytest.mark.parametrize(("count", "fsdp", "tensor", "data"), [(1, 1, 1, 1), (8, 1, 1, 8), (8, 2, 2, 2), (6, 3, 1, 2)])
def test_data_takes_what_the_others_leave(count, fsdp, tensor, data):
    mesh = make_mesh(jax.devices()[:count], MeshConfig(fsdp, tensor))
    assert dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_all_devices_by_default():
    assert make_mesh().size == len(jax.devices()) == 8


@pytest.mark.parametrize(("count", "fsdp", "tensor"), [(8, 3, 1), (1, 1, 2), (6, 2, 2)])
def test_devices_that_do_not_divide(count, fsdp, tensor):
    with pytest.raises(SemidError, match=f"{count} devices do not divide into fsdp {fsdp} x tensor {tensor}"):
        make_mesh(jax.devices()[:count], MeshConfig(fsdp, tensor))


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = put_batch({"rows": rows}, make_mesh(config=MeshConfig(fsdp=2)))["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
    along_tensor = put_batch({"rows": rows}, make_mesh(config=MeshConfig(tensor=2)))["rows"]
    assert {shard.data.shape for shard in along_tensor.addressable_shards} == {(2, 3)}
    everywhere = jax.device_put(rows, replicated(make_mesh()))
    assert {shard.data.shape for shard in everywhere.addressable_shards} == {(8, 3)}


def test_a_batch_that_does_not_divide():
    rows = np.zeros((12, 3), np.float32)
    assert put_batch(rows, make_mesh(jax.devices()[:4])).shape == (12, 3)
    with pytest.raises(SemidError, match="a batch of 12 rows does not divide among 8 devices"):
        put_batch(rows, make_mesh())


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1000, 64, 50, 5, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_divisible_batch_size_is_the_largest_that_divides(count, rows, accumulate):
    mesh, parts = make_mesh(jax.devices()[:count]), count * accumulate
    size = divisible_batch_size(64, rows=rows, mesh=mesh, accumulate=accumulate)
    possible = [n for n in range(1, min(64, rows) + 1) if n % parts == 0]
    assert size == max(possible, default=parts)
    assert put_batch(np.zeros((size, 2), np.float32), mesh).shape == (size, 2)


@pytest.mark.parametrize(
    ("batch_size", "count", "accumulate", "near"),
    [(64, 6, 1, "60 or 66"), (4, 8, 1, "8"), (64, 8, 3, "48 or 72"), (1, 1, 2, "2")],
)
def test_a_batch_size_that_would_have_to_change_is_refused(batch_size, count, accumulate, near):
    mesh = make_mesh(jax.devices()[:count])
    message = f"batch_size {batch_size} does not divide into {accumulate} microbatches for {count} devices; take {near}"
    with pytest.raises(SemidError, match=f"^{message}, or fewer devices$"):
        divisible_batch_size(batch_size, rows=1000, mesh=mesh, accumulate=accumulate)
    for size in map(int, near.split(" or ")):
        assert divisible_batch_size(size, rows=1000, mesh=mesh, accumulate=accumulate) == size


def test_a_divisible_batch_size_divides_over_data_and_fsdp_alone():
    mesh = make_mesh(config=MeshConfig(2, 2))
    assert divisible_batch_size(12, rows=11, mesh=mesh) == 8
    assert divisible_batch_size(12, rows=100, mesh=mesh) == 12


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("backbone/blocks/0/attention/qkv/kernel", (8, 3, 2, 4), ("fsdp", None, "tensor", None)),
        ("backbone/blocks/0/attention/qkv/kernel", (8, 10, 1, 4), ("fsdp", None, None, None)),
        ("backbone/blocks/0/feed/up/kernel", (8, 2, 16), ("fsdp", None, "tensor")),
        ("decoder/0/cross/kv/kernel", (8, 2, 2, 4), ("fsdp", None, "tensor", None)),
        ("decoder/0/cross/q/kernel", (8, 8), ("fsdp", "tensor")),
        ("backbone/blocks/0/attention/out/kernel", (8, 8), ("tensor", "fsdp")),
        ("opt_state/1/0/mu/blocks/0/feed/down/kernel", (16, 8), ("tensor", "fsdp")),
        ("tables/0/embedding", (40, 8), (None, "fsdp")),
        ("ids/embedding", (40, 8), (("fsdp", "tensor"), None)),
        ("stacked/kernel", (3, 8, 24), (None, "fsdp", None)),
        ("odd/up/kernel", (7, 2, 24), (None, None, "tensor")),
        ("odd/out/kernel", (8, 7), ("tensor", None)),
        ("norm/scale", (8,), ()),
        ("one/kernel", (8,), ()),
        ("quantizer/codebooks/0", (8, 8), ()),
        ("bank/unknown", (8,), ()),
    ],
)
def test_variables_are_split_by_name_where_they_divide(name, shape, spec):
    check_layout(leaf_sharding(name, shape, make_mesh(config=MeshConfig(2, 2))), shape, spec)


@pytest.mark.parametrize(
    ("shape", "spec"), [((64, 3), (ALL, None)), ((12, 3), (None, None)), ((64,), (ALL,)), ((), ())]
)
def test_variables_are_split_by_rows_if_their_type_says_so(shape, spec):
    tree = {"by rows": ShardedByRows(np.zeros(shape)), "kernel": nnx.Param(np.zeros((8, 24)))}
    layout = shardings(tree, make_mesh(config=MeshConfig(2, 2)))
    check_layout(layout["by rows"].get_raw_value(), shape, spec)
    assert tuple(layout["kernel"].get_raw_value().spec) == ("fsdp", None)


def check_layout(sharding, shape, spec):
    assert tuple(sharding.spec) == spec
    placed = jax.device_put(np.zeros(shape, np.float32), sharding)
    parts = [8 if axis == ALL else 4 if axis == ALL[1:] else 2 if axis else 1 for axis in spec or [None] * len(shape)]
    split = [size // count for size, count in zip(shape, parts, strict=True)]
    assert {shard.data.shape for shard in placed.addressable_shards} == {tuple(split)}


def test_gathered_arrays_are_whole_on_one_device_and_put_on_no_other(monkeypatch):
    mesh, values = make_mesh(config=MeshConfig(2, 2)), np.arange(32, dtype=np.float32).reshape(4, 8)
    layouts = {"split": leaf_sharding("kernel", values.shape, mesh), "whole": replicated(mesh)}
    tree, placed, put = {name: jax.device_put(values, layout) for name, layout in layouts.items()}, [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, where: placed.append(where) or put(x, where))
    for x in gathered(tree, mesh).values():
        assert x.devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(x, values)
    assert placed == [jax.devices()[0]]  # what was divided, on the first device alone
    for x in on_host(tree, mesh).values():
        assert isinstance(x, np.ndarray)
        np.testing.assert_array_equal(x, values)
    assert len(placed) == 1


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-2, 1)])
def test_axes_of_no_devices(sizes):
    with pytest.raises(SemidError, match=f"^expected (fsdp|tensor) of at least 1, got {min(sizes)}$"):
        MeshConfig(*sizes)


def test_devices_of_a_process_that_do_not_divide_among_tensor(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    make_mesh(config=MeshConfig(tensor=4))
    with pytest.raises(SemidError, match=r"^a process's 4 devices do not divide among tensor 8; choose less$"):
        make_mesh(config=MeshConfig(tensor=8))


@pytest.mark.parametrize(("rows", "split"), [(24, True), (16, False), (25, False)])
def test_large_tables_of_items_lie_over_all_devices_that_divide_them(rows, split, monkeypatch):
    monkeypatch.setattr("semid.training.mesh.LARGE_TABLE", 16 * 8 * 4)  # bytes
    table = jax.ShapeDtypeStruct((rows, 8), np.float32)
    found = table_sharding(table, make_mesh(config=MeshConfig(2, 2)))
    assert found.shard_shape(table.shape) == (rows // 8 if split else rows, 8)
