"""Every kind of program lowers for TPU and CUDA, on a machine that has neither."""

from dataclasses import replace

import jax
import pytest
from tasks import FAMILIES, STACK, joint, tokenizer

from semid.errors import SemidError
from semid.generators import GeneratorConfig, ObjectiveConfig, ProgramSizes, search_program, training_program
from semid.training import (
    OptimizerConfig,
    TrainingConfig,
    abstract_state,
    make_mesh,
    make_optimizer,
    make_step,
    put_batch,
)
from seq_models import HybridConfig, Mixer, RQTransformerConfig, SoftmaxOver

PLATFORMS = ("tpu", "cuda")
TINY = ProgramSizes(items=64, level_sizes=(4, 4), num_features=6, users=2, beam_size=4)
RECURRENT = replace(STACK["backbone"], mixer=Mixer.STATE_SPACE)
ALL = FAMILIES | {"hybrid": HybridConfig(**STACK), "state-space": RQTransformerConfig(RECURRENT)}


def mesh():
    return make_mesh(jax.devices()[:1])


def assert_lowers(traced):
    for platform in PLATFORMS:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "module @jit" in text
        assert "f64" not in text


def config(name):
    training = TrainingConfig(batch_size=2)
    return GeneratorConfig(model=ALL[name], max_history=4, row_length=6, training=training)


@pytest.mark.parametrize("name", ALL)
def test_training_steps(name):
    assert_lowers(training_program(config(name), TINY, mesh())[0])


def test_a_step_over_children_is_traced_and_one_with_a_teacher_refused():
    def program(objective):
        return training_program(replace(config("rq-transformer"), objective=objective), TINY, mesh())

    program(ObjectiveConfig(normalization=SoftmaxOver.CHILDREN))
    with pytest.raises(SemidError, match="there is no teacher: leave distillation out"):
        program(ObjectiveConfig(distillation=1.0))


@pytest.mark.parametrize("name", ALL)
def test_searches(name):
    assert_lowers(search_program(config(name), TINY, mesh()))


@pytest.mark.parametrize("task", [tokenizer, joint])
def test_steps_of_the_tokenizer_and_of_all_together(task):
    (model, loss, tables, batch), optimizer = task(), make_optimizer(OptimizerConfig(), num_steps=10)
    step = make_step(model, optimizer, loss, tables=tables, seed=0, num_steps=10, mesh=mesh())
    assert_lowers(step.trace(abstract_state(model, optimizer, mesh()), put_batch(batch, mesh())))


def test_what_a_platform_cannot_do_is_found():
    def on_cpu(x):
        return jax.lax.linalg.lu_pivots_to_permutation(x, permutation_size=4)

    def only_cpu(x):
        return jax.lax.platform_dependent(x, cpu=on_cpu)

    traced = jax.jit(only_cpu).trace(jax.ShapeDtypeStruct((2,), "int32"))
    traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(NotImplementedError, match="tpu"):
        traced.lower(lowering_platforms=("tpu",))
