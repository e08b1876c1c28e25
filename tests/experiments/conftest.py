"""A tiny folder of the layout that the experiments read: random walks, so that nothing can be learned from it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
