"""A pulse of `experiments.end_to_end`: two arms on a tiny world with texts and pictures, from scratch to the table."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import end_to_end
from semid.artifacts import load_tensors
from semid.data.simulated import SimulatedConfig
from semid.encoders import BlocksConfig, Vocabulary
from semid.encoders.reader import VOCABULARY_FILE
from semid.generators import GeneratorConfig
from semid.joint import Phase, Reach
from semid.joint.training import STATE_FILE
from semid.tokenizers import RQVaeConfig
from semid.training import TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

BRIEF = TrainingConfig(epochs=1, batch_size=64)
TINY = TransformerConfig(dim=8, layers=1, heads=2, hidden=8)


def test_the_arms_differ_in_what_they_say():
    made = end_to_end.arms(end_to_end.END_TO_END)
    steps = {name: phase.step for name, config in made.items() for phase in config.joint}
    assert set(made) - set(steps) == {"staged"}
    assert steps["joint"].reach is Reach.TOKENIZER
    assert dict(made["joint"].joint[0].training.optimizer.rates)["encoder"] == 0
    assert (steps["end-to-end"].reach, steps["end-to-end"].window) == (Reach.ENCODER, 2)
    no_window = steps["no-window"]  # the generation loss alone would not reach the encoders
    assert (no_window.window, set(no_window.objective.weights(0.0))) == (0, {"generation", "contrast"})
    assert set(steps["end-to-end"].objective.weights(0.5)) == {"generation"}
    assert set(steps["with entropy"].objective.weights(0.5)) == {"generation", "entropy"}
    given = {
        name: config.finetune.epochs
        + sum(phase.training.epochs for phase in config.joint)
        + bool(config.codes.refits and config.joint) * config.generator.training.epochs
        for name, config in made.items()
    }
    assert len(set(given.values())) == 1


@pytest.mark.filterwarnings("ignore:.* texts are cut to 48 tokens")
def test_from_texts_and_pictures_to_a_table(tmp_path, monkeypatch, capsys):
    world = SimulatedConfig(num_items=120, num_users=60, taxonomy=(2, 2, 2), family_size=1.0)
    config = dataclasses.replace(
        end_to_end.END_TO_END,
        encoder=BRIEF,
        tokenizer=RQVaeConfig(level_sizes=(8, 8), hidden=(8,), latent=4, training=BRIEF),
        generator=GeneratorConfig(RQTransformerConfig(TINY), training=BRIEF),
        joint=(Phase(BRIEF),),
        finetune=BRIEF,
        tie_break=120,
    )
    monkeypatch.setattr(end_to_end, "WORLD", world)
    monkeypatch.setattr(end_to_end, "END_TO_END", config)
    monkeypatch.setattr(end_to_end, "BLOCKS", BlocksConfig(dim=8, layers=1, heads=2, hidden=8))
    monkeypatch.setattr(end_to_end, "VOCABULARY", 200)
    for arm in ("staged", "end-to-end"):  # one after the other: the rows stand beside each other
        end_to_end.main(out=tmp_path, chosen=(arm,))
    rows = json.loads((tmp_path / "end_to_end.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["staged", "end-to-end"]
    assert "| end-to-end | 1 |" in capsys.readouterr().out
    assert Vocabulary((tmp_path / "staged_0" / VOCABULARY_FILE).read_bytes()).size == 200
    staged, together = (load_tensors(tmp_path / f"{name}_0" / STATE_FILE) for name in ("staged", "end-to-end"))
    for tower in ("text", "image"):
        names = [name for name in staged if name.startswith(f"encoder/encoders/{tower}/") and "kernel" in name]
        assert names
        assert any(np.any(staged[name] != together[name]) for name in names)
