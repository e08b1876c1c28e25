"""A pulse of every experiment end to end, and of those that read vectors of one."""

import pytest
from smoke import END_TO_END


@pytest.mark.filterwarnings("ignore:.* texts are cut to 8 tokens")
@pytest.mark.parametrize("name", END_TO_END)
def test_a_few_steps(name, smoke):
    smoke.run(name)
