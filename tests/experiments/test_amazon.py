"""A pulse: the real main, on a tiny folder of the layout it reads, for a couple of steps."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import amazon

ITEMS, USERS, LENGTH = 48, 40, 6


@pytest.fixture
def layout(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(0)
    titles = [f"thing {i} of kind {i % 4}" for i in range(ITEMS)]
    pq.write_table(
        pa.table({"item_id": pa.array(range(ITEMS), pa.int32()), "title": titles, "text": titles}),
        folder / "items.parquet",
    )
    rows = np.concatenate([rng.permutation(ITEMS)[:LENGTH] for _ in range(USERS)])
    interactions = {
        "user_id": pa.array(np.repeat(np.arange(USERS), LENGTH), pa.int32()),
        "item_id": pa.array(rows, pa.int32()),
        "position": pa.array(np.tile(np.arange(LENGTH), USERS), pa.int16()),
    }
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    np.save(folder / "text_minilm_f16.npy", rng.normal(size=(ITEMS, 8)).astype(np.float16))
    return folder


@pytest.mark.filterwarnings("ignore:48 items cannot fill", "ignore:level . has . codes", "ignore:level . has .. codes")
def test_two_steps_of_everything(layout, tmp_path, capsys):
    out = tmp_path / "run"
    amazon.main(layout, out, seeds=(0,), beam_size=5, budget=0.05)
    written = json.loads((out / "metrics.json").read_text())
    models = [row["model"] for row in written["rows"]]
    trained = ["sasrec", "sasrec-text", "semid-text", "semid-hybrid"]
    assert models == [*trained, "popularity", "bigram"] * 2
    assert all(0 <= row["recall@10"] <= 1 for row in written["rows"])
    assert [row.get("seen") for row in written["rows"]] == [None] * 6 + ["excluded"] * 6
    assert set(json.loads((out / "minutes_0.json").read_text())) == {"codes-text", "codes-hybrid", *trained}
    assert "semid-hybrid - semid-text" in json.loads((out / "seeds.json").read_text())["comparisons"]
    assert "| semid-hybrid | 0." in capsys.readouterr().out
