"""A pulse of every experiment end to end."""

import pytest

from experiments.experiment import experiments
from semid.joint import JointConfig


@pytest.mark.filterwarnings("ignore:.* texts are cut to 8 tokens")
@pytest.mark.parametrize("name", [name for name, one in experiments().items() if isinstance(one.model, JointConfig)])
def test_a_few_steps(name, smoke):
    smoke.run(name)
