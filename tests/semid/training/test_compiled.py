"""What a compiled program needs, read from its text and its operations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from semid.errors import SemidError
from semid.training import chip_of, compile_for, make_mesh, topology_devices
from semid.training.compiled import Compiled, DoesNotFit, Exchange, products
from semid.training.programs import Program
from semid.training.topologies import CHIPS


def struct(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def looped(x, w):
    """Seven products of [64, 32] and [32, 32], one after the other, then one more."""
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0] @ w


def test_loops_count_as_often_as_they_run():
    traced = jax.jit(looped).trace(struct(64, 32), struct(32, 32))
    one = 2 * 64 * 32 * 32
    assert products(traced.jaxpr) == 8 * one
    found = compile_for(traced, devices=1)
    assert found.products == 8 * one
    assert found.counted < 3 * one  # the compiler takes the loop for one turn
    assert found.traffic >= 8 * (2 * 64 * 32 + 32 * 32) * 4
    assert found.arguments == (64 * 32 + 32 * 32) * 4
    assert (found.times, found.bound, found.peak_share) == ({}, None, None)


OF_A_TPU = """\
%slice (of: f32[306,8], at: s32[]) -> f32[1,8] {
  %of = f32[306,8]{1,0} parameter(0)
  %at.1 = s32[]{:T(128)} parameter(1)
  ROOT %one = f32[1,8]{1,0} dynamic-slice(%of, %at.1, %at.1), dynamic_slice_sizes={1,8}
}

%doubled (all: f32[306,8], at: s32[]) -> f32[8] {
  %all = f32[306,8]{1,0} parameter(0)
  %at.2 = s32[]{:T(128)} parameter(1)
  %own = f32[1,8]{1,0} fusion(%all, %at.2), kind=kLoop, calls=%slice
  %flat = f32[8]{0} bitcast(%own)
  ROOT %sum = f32[8]{0} add(%flat, %flat)
}

%condition (at_most: (s32[], f32[306,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(306), metadata={op_name="while"}
  %counter = (s32[]{:T(128)}, f32[306,8]{1,0}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%counter), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %bound), direction=LT, metadata={op_name="lt"}
}

%body (turn: (s32[], f32[306,8])) -> (s32[], f32[306,8]) {
  %turn = (s32[]{:T(128)}, f32[306,8]{1,0}) parameter(0)
  %at.3 = s32[]{:T(128)} get-tuple-element(%turn), index=0
  %x = f32[306,8]{1,0} get-tuple-element(%turn), index=1
  %twice = f32[8]{0} fusion(%x, %at.3), kind=kOutput, calls=%doubled
  ROOT %next = (s32[]{:T(128)}, f32[306,8]{1,0}) tuple(%at.3, %x)
}

ENTRY %main (given: (s32[], f32[306,8])) -> (s32[], f32[306,8]) {
  %given = (s32[]{:T(128)}, f32[306,8]{1,0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[306,8]{1,0}) while(%given), condition=%condition, body=%body
}
"""


def test_loops_of_a_tpu_are_counted_by_their_condition():
    """Its programs have no word of the compiler's on how often they run."""
    assert Program.parse(OF_A_TPU).times["body"] == 306
    numbers = 4 + 9  # of the slice's index, and of the counter's comparison
    assert Program.parse(OF_A_TPU).traffic == 306 * (2 * 8 * 4 + numbers)  # a slice at a turn, and the sum
    on_chip = OF_A_TPU.replace("%twice = f32[8]{0}", "%twice = f32[8]{0:T(128)S(1)}")
    assert Program.parse(on_chip).traffic == 306 * (8 * 4 + numbers)
    for other in (("direction=LT", "direction=NE"), ("constant(306)", "parameter(1)")):
        assert Program.parse(OF_A_TPU.replace(*other)).times["body"] == 1  # it may end at any turn


@pytest.mark.parametrize(
    ("x", "w", "kind", "sent"),
    [
        (PartitionSpec(None, "data"), PartitionSpec("data"), "all-reduce", 2 * 64 * 32 * 4 * 7 / 8),
        (PartitionSpec("data"), PartitionSpec(), "all-gather", 64 * 32 * 4 * 7 / 8),
    ],
)
def test_exchanges_are_counted_with_what_a_device_sends(x, w, kind, sent):
    """The contracted axis divided: sums of all; another one divided, and the result asked for whole: gathered."""
    mesh = make_mesh()
    x, w = struct(64, 32, sharding=NamedSharding(mesh, x)), struct(32, 32, sharding=NamedSharding(mesh, w))
    traced = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, PartitionSpec())).trace(x, w)
    (exchange,) = compile_for(traced, devices=8).exchanges
    assert (exchange.kind, exchange.number, exchange.sent) == (kind, 1, sent)


def needs(**changes):
    given = {"devices": 4, "chip": CHIPS["v5e"], "arguments": 1.0, "temporaries": 2.0, "seconds": 1.0}
    given |= {
        "products": 197e9,
        "counted": 0.0,
        "traffic": 819e6,
        "exchanges": (Exchange("all-reduce", 1, 400e6, 1.0),),
    }
    return Compiled(**(given | changes))


def test_times_are_those_of_the_published_rates():
    found = needs()
    assert found.memory == 3.0
    assert found.times == pytest.approx({"compute": 1e-3, "memory": 1e-3, "interconnect": 2e-3})
    assert (found.bound, found.peak_share) == ("interconnect", pytest.approx(0.5))
    assert needs(counted=394e9).times["compute"] == pytest.approx(2e-3)  # work done twice takes its time


def test_what_does_not_fit_says_how_much_it_needs():
    traced = jax.jit(looped).trace(struct(1 << 20, 32), struct(32, 32))
    small = type(CHIPS["v5e"])("chip", 1e12, 2**20, 1e9, 1e9)
    with pytest.raises(DoesNotFit, match=r"it needs \d+\.\d GiB of the 0\.0 GiB of a chip a device"):
        compile_for(traced, devices=1, chip=small)


def test_topologies():
    assert len(topology_devices("cpu")) == 8
    assert chip_of("cpu") is None
    assert chip_of("v5p:2x2x1") is CHIPS["v5p"]
    with pytest.raises(SemidError, match="expected a topology such as v5e:4x4"):
        topology_devices("v9:4x4")


def test_a_machine_without_what_a_topology_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SemidError, match=r"needs libtpu: pip install 'semid\[tpu\]'"):
        topology_devices("v5e:2x2")
    with pytest.raises(SemidError, match="topology cuda: this process has no such device"):
        topology_devices("cuda")
