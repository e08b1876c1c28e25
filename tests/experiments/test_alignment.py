"""A pulse: the real mains of LETTER and DAS, on a tiny folder of the layout they read, for a couple of steps."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import das, letter
from experiments.alignment import ARMS
from experiments.arms import RANDOM, SHUFFLED, TEACHER

ITEMS, USERS, LENGTH = 48, 40, 6


@pytest.fixture
def layout(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(0)
    items = {"item_id": pa.array(range(ITEMS), pa.int32()), "title": [f"thing {i}" for i in range(ITEMS)]}
    pq.write_table(pa.table(items | {"text": items["title"]}), folder / "items.parquet")
    rows = np.concatenate([rng.permutation(ITEMS)[:LENGTH] for _ in range(USERS)])
    interactions = {
        "user_id": pa.array(np.repeat(np.arange(USERS), LENGTH), pa.int32()),
        "item_id": pa.array(rows, pa.int32()),
        "position": pa.array(np.tile(np.arange(LENGTH), USERS), pa.int16()),
    }
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    np.save(folder / "text_minilm_f16.npy", rng.normal(size=(ITEMS, 8)).astype(np.float16))
    return folder


@pytest.mark.filterwarnings("ignore:48 items cannot fill codebooks")
def test_two_steps_of_letter_and_of_das_share_what_is_finished(layout, tmp_path, capsys):
    out = tmp_path / "run"
    letter.main(layout, out, seeds=(0,), budget=0.05)
    assert "| letter | 0." in capsys.readouterr().out
    das.main(layout, out, seeds=(0,), budget=0.05)
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 3  # the teacher, and codes and generator of the text arm
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
