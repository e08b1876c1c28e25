"""The mesh, and batches laid out on it."""

import jax
import numpy as np
import pytest

from semid.errors import SemidError
from semid.training.mesh import fitting_batch, make_mesh, put_batch, replicated


@pytest.mark.parametrize(("count", "fsdp", "tensor", "data"), [(1, 1, 1, 1), (8, 1, 1, 8), (8, 2, 2, 2), (6, 3, 1, 2)])
def test_data_takes_what_the_others_leave(count, fsdp, tensor, data):
    mesh = make_mesh(jax.devices()[:count], fsdp=fsdp, tensor=tensor)
    assert dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_all_devices_by_default():
    assert make_mesh().size == len(jax.devices()) == 8


@pytest.mark.parametrize(("count", "fsdp", "tensor"), [(8, 3, 1), (1, 1, 2), (6, 2, 2)])
def test_devices_that_do_not_divide(count, fsdp, tensor):
    with pytest.raises(SemidError, match=f"{count} devices do not divide into fsdp {fsdp} x tensor {tensor}"):
        make_mesh(jax.devices()[:count], fsdp=fsdp, tensor=tensor)


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = put_batch({"rows": rows}, make_mesh(fsdp=2))["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
    along_tensor = put_batch({"rows": rows}, make_mesh(tensor=2))["rows"]
    assert {shard.data.shape for shard in along_tensor.addressable_shards} == {(2, 3)}
    everywhere = jax.device_put(rows, replicated(make_mesh()))
    assert {shard.data.shape for shard in everywhere.addressable_shards} == {(8, 3)}


def test_a_batch_that_does_not_divide():
    rows = np.zeros((12, 3), np.float32)
    assert put_batch(rows, make_mesh(jax.devices()[:4])).shape == (12, 3)
    with pytest.raises(SemidError, match="a batch of 12 rows does not divide among 8 devices"):
        put_batch(rows, make_mesh())


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8])
@pytest.mark.parametrize(("batch_size", "rows"), [(64, 1000), (64, 64), (64, 50), (64, 5), (2, 1000), (1, 1)])
def test_a_fitting_batch_is_the_largest_that_divides(count, batch_size, rows):
    mesh = make_mesh(jax.devices()[:count])
    size = fitting_batch(batch_size, rows=rows, mesh=mesh)
    possible = [n for n in range(1, min(batch_size, rows) + 1) if n % count == 0]
    assert size == max(possible, default=count)
    assert put_batch(np.zeros((size, 2), np.float32), mesh).shape == (size, 2)


def test_a_fitting_batch_divides_over_data_and_fsdp_alone():
    assert fitting_batch(11, rows=100, mesh=make_mesh(fsdp=2, tensor=2)) == 8
