"""A pulse: the real mains of LETTER and DAS, on a tiny folder of the layout they read, for a couple of steps."""

import json

from experiments import das, letter
from experiments.alignment import ARMS
from experiments.arms import RANDOM, SHUFFLED, TEACHER


def test_two_steps_of_letter_and_of_das_share_what_is_finished(layout, tiny, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "semid")
    out = tmp_path / "run"
    letter.main(layout, out, seeds=(0,), budget=0.05)
    assert "| letter | 0." in capsys.readouterr().out
    das.main(layout, out, seeds=(0,), budget=0.05)
    assert caplog.text.count("skipped") == 4  # the dataset, the teacher, and codes and generator of the text arm
    written = json.loads((out / "arms.json").read_text())
    assert list(written["comparisons"]) == ["das - text"]
    assert {entry["model"] for entry in written["models"]} == {
        "teacher (SASRec)",
        "text",
        "das",
        "popularity",
        "bigram",
    }
    assert set(written["health"][0]) == {"text", "das"}
    assert {"teacher", "codes-letter", "generator-das"} <= set(json.loads((out / "minutes_0.json").read_text()))


def test_arms_read_what_their_names_say():
    configs = {name: arm(("text",)) for name, arm in ARMS.items()}
    content = {name: config.columns for name, config in configs.items()}
    wide = {"concatenation": ("text", TEACHER), "joint": ("text", TEACHER), "collaborative": (TEACHER,)}
    assert content == dict.fromkeys(ARMS, ("text",)) | wide
    signals = {name: config.signal.name for name, config in configs.items() if config.alignment}
    assert signals == dict.fromkeys(("letter", "distill", "das", "joint"), TEACHER) | {
        "random": RANDOM,
        "shuffled": SHUFFLED,
    }
