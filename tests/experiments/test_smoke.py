"""A pulse of every experiment but those end to end, which have a file of their own for a process of their own."""

import pytest
from smoke import END_TO_END

from experiments.experiment import experiments


@pytest.mark.parametrize("name", [name for name in experiments() if name not in END_TO_END])
def test_a_few_steps(name, smoke):
    smoke.run(name)


def test_codes_are_made_once_for_all_that_read_them(smoke):
    for name in ("recipe.semid-text", "recipe.sasrec-text", "alignment.text", "default", "distilled.graph"):
        smoke.runner.run(name)
    plain = [folder for folder in (smoke.out / "shared").glob("rq-vae_*") if folder.is_dir()]
    before = {folder: folder.stat().st_mtime_ns for folder in plain}
    smoke.runner.run("families.flat")
    assert before
    assert {folder: folder.stat().st_mtime_ns for folder in plain} == before
