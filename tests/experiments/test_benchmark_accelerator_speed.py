"""The measurement of steps and searches in small, on a CPU and as on a chip whose rates are published."""

import json

import jax
import pytest

from experiments.benchmarks import accelerator_speed
from experiments.benchmarks.accelerator_speed import Size, main
from semid.generators import GeneratorConfig
from semid.training import TrainingConfig
from semid.training.topologies import CHIPS
from seq_models import RQTransformerConfig, TransformerConfig

CONFIG = GeneratorConfig(
    model=RQTransformerConfig(TransformerConfig(8, layers=1, heads=2, hidden=8, dropout=0.1)),
    max_history=4,
    row_length=4,
    training=TrainingConfig(batch_size=8),
)


def test_programs_are_timed_and_compared_with_what_the_chip_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator_speed, "_sizes", lambda: [Size("tiny", CONFIG, 40, (4, 4), users=4, beam_size=4)])
    monkeypatch.setattr(accelerator_speed, "_chip", lambda: CHIPS["h200"])
    before = jax.config.jax_compilation_cache_dir
    try:
        main(tmp_path / "figures.json", steps=2)
        main(tmp_path / "late.json", minutes=-1.0)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    figures, late = (json.loads((tmp_path / name).read_text()) for name in ("figures.json", "late.json"))
    assert [row["program"] for row in figures["programs"]] == late["left out"] == ["tiny, step", "tiny, search"]
    for row in figures["programs"]:
        assert row["share of the promise"] == pytest.approx(row["ms at best"] / row["ms"])
        assert 0 < row["share of matrix peak"] <= row["share of the promise"] < 1
