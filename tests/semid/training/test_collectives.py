"""Exchanges between devices in compiled steps: what moves is weights, their gradients, and sums of activations.

The compiler of CPU devices has no reduce-scatter: it prints an all-reduce and a slice.
"""

import collections

import jax
import pytest
from flax import nnx
from tasks import FAMILIES, ITEMS, SIZES, generator, joint, tokenizer

from semid.generators import GeneratorConfig, ProgramSizes, search_program
from semid.training import MeshConfig, OptimizerConfig, abstract_state, make_mesh, make_optimizer, make_step, put_batch
from semid.training.programs import Program

DATA, FSDP, TENSOR = MeshConfig(), MeshConfig(fsdp=8), MeshConfig(tensor=2)
MIXED = MeshConfig(fsdp=2, tensor=2)


def compiled(task, sharing, capfd):
    """Exchanges of a step on 8 devices, and the number of its parameters' arrays; the compiler must warn of nothing."""
    model, loss, tables, batch = task
    mesh, optimizer = make_mesh(config=sharing), make_optimizer(OptimizerConfig(), num_steps=10)
    step = make_step(model, optimizer, loss, tables=tables, seed=0, num_steps=10, mesh=mesh)
    text = step.lower(abstract_state(model, optimizer, mesh), put_batch(batch, mesh)).compile().as_text()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    return Program.parse(text).collectives, len(jax.tree.leaves(nnx.state(model, nnx.Param)))


def count(collectives):
    found = collections.Counter(one.kind for one in collectives)
    return {kind: found.pop(kind, 0) for kind in ("all-gather", "all-reduce")} | found


# Sums of metrics and of the gradient's norm, and of gradients together.
FEW = 5


@pytest.mark.parametrize("name", FAMILIES)
def test_with_fsdp_each_weight_is_gathered_once_and_its_gradient_summed_once(name, capfd):
    collectives, weights = compiled(generator(name), FSDP, capfd)
    found = count(collectives)
    assert set(found) == {"all-gather", "all-reduce"}
    assert 0 < found["all-gather"] <= weights
    assert found["all-reduce"] <= weights + FEW


def test_with_data_alone_gradients_are_summed_together(capfd):
    found = count(compiled(generator("rq-transformer"), DATA, capfd)[0])
    assert found.pop("all-reduce") <= FEW
    assert found == {"all-gather": 0}


@pytest.mark.parametrize(("name", "blocks"), [("rq-transformer", 2 + len(SIZES)), ("sasrec", 2)])
def test_with_tensor_a_block_sums_twice_forward_and_twice_backward(name, blocks, capfd):
    """As in Megatron-LM; the depth decoder's block runs once a level."""
    found = count(compiled(generator(name), TENSOR, capfd)[0])
    assert 4 * blocks <= found.pop("all-reduce") <= 4 * blocks + FEW
    assert found == {"all-gather": 0}


def test_of_all_three_axes_each_adds_its_own(capfd):
    collectives, weights = compiled(generator("rq-transformer"), MIXED, capfd)
    found = count(collectives)
    assert set(found) == {"all-gather", "all-reduce"}
    assert found["all-gather"] <= weights
    assert found["all-reduce"] <= 4 * (2 + len(SIZES)) + weights + FEW


def test_a_table_of_all_items_stays_where_it_lies(capfd):
    """Each device has some of the items, their logits, and their gradients."""
    collectives, _ = compiled(generator("sasrec"), FSDP, capfd)
    assert max(one.sent for one in collectives) < ITEMS * 16 * 4 / 8 / 4


def test_the_tokenizer_s_step(capfd):
    collectives, weights = compiled(tokenizer(), MIXED, capfd)
    found = count(collectives)
    assert set(found) == {"all-gather", "all-reduce"}
    assert found["all-gather"] <= weights
    assert found["all-reduce"] <= weights + FEW


def test_the_joint_step_moves_a_batch_s_items_and_neither_bank_nor_content(capfd, monkeypatch):
    monkeypatch.setattr(
        "semid.training.mesh.LARGE_TABLE", 1 << 16
    )  # bytes: content and codes lie over the devices, as the bank does
    collectives, weights = compiled(joint(), MIXED, capfd)
    found = count(collectives)
    assert "all-to-all" not in found
    assert found["all-gather"] <= 2 * weights
    assert max(one.sent for one in collectives) < ITEMS * 16 * 4 / 10


def searched(name, sharing):
    config = GeneratorConfig(model=FAMILIES[name], max_history=8)
    sizes = ProgramSizes(items=1 << 12, level_sizes=(16, 16, 16), users=64, beam_size=8)
    text = search_program(config, sizes, make_mesh(config=sharing)).lower().compile().as_text()
    return Program.parse(text).collectives


@pytest.mark.parametrize("name", FAMILIES)
def test_a_search_divides_users_without_exchanges(name):
    assert searched(name, DATA) == ()


def test_a_search_with_tensor_sums_twice_a_block():
    """The depth decoder's block runs once a level."""
    assert count(searched("rq-transformer", MIXED)) == {"all-gather": 0, "all-reduce": 2 * (2 + 3)}


def test_scores_of_all_items_are_divided_by_items():
    """Of each device travel the states, the k best and their scores, and sums of histories and of softmax."""
    found = searched("sasrec", FSDP)
    assert count(found) == {"all-gather": 3, "all-reduce": 3}
    assert max(one.sent for one in found) < 64 * (1 << 12) * 4 / 8
