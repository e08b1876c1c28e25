import io
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from experiments.layout import read_layout
from semid.data import GlobalTime, ShuffledTies
from semid.errors import SemidError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_layout(folder, *, items=(), interactions=()):
    folder.mkdir()
    item_columns = {
        "item_id": pa.array([0, 1, 2], pa.int32()),
        "asin": ["B2", "B1", "B0"],
        "title": ["x", None, "z"],
        "price": pa.nulls(3, pa.float32()),
    }
    interaction_columns = {
        "user_id": pa.array([0, 0, 1, 0], pa.int32()),
        "item_id": pa.array([2, 1, 0, 0], pa.int32()),
        "position": pa.array([1, 0, 0, 2], pa.int16()),
        "rel_time": [0, 5, 0, 9],
    }
    pa.parquet.write_table(pa.table(item_columns | dict(items)), folder / "items.parquet")
    pa.parquet.write_table(pa.table(interaction_columns | dict(interactions)), folder / "interactions.parquet")
    np.save(folder / "text_minilm_f16.npy", np.arange(6, dtype=np.float16).reshape(3, 2))
    first, second = jpeg("red"), jpeg("blue")
    offset = np.cumsum([0, len(first), len(second)])
    data = np.frombuffer(first + second, np.uint8)
    np.savez(folder / "posters_64.npz", item_id=np.array([2, 0], np.int32), offset=offset, jpeg=data)
    return folder


def test_a_small_folder_by_hand(tmp_path):
    dataset = read_layout(write_layout(tmp_path / "shop"))
    assert (dataset.name, dataset.time_unit, dataset.source["type"]) == ("shop", "position", "layout")
    assert dataset.item_ids.to_pylist() == ["B2", "B1", "B0"]
    assert dataset.items.column_names == ["item_id", "title", "text_minilm", "image"]
    assert dataset.items["image"].to_pylist() == [jpeg("blue"), None, jpeg("red")]
    assert dataset.items.schema.field("text_minilm").type.value_type == pa.float16()
    assert dataset.vectors("text_minilm").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert dataset.users.to_pylist() == ["0", "1"]
    assert dataset.user.tolist() == [0, 0, 0, 1]
    assert dataset.item.tolist() == [1, 2, 0, 0]
    assert dataset.time.tolist() == [0, 1, 2, 0]
    assert sorted(dataset.source["sha256"]) == [
        "interactions.parquet",
        "items.parquet",
        "posters_64.npz",
        "text_minilm_f16.npy",
    ]


def test_times_events_and_weights_are_kept(tmp_path):
    more = {"timestamp": [50, 40, 7, 50], "event": ["buy", "view", None, "view"], "weight": [1.0, 0.5, 1.0, 2.0]}
    dataset = read_layout(write_layout(tmp_path / "shop", interactions=more))
    assert dataset.time_unit == "seconds"
    assert dataset.item.tolist() == [1, 2, 0, 0]
    assert dataset.time.tolist() == [40, 50, 50, 7]  # the tie at 50 by position
    assert dataset.event.to_pylist() == ["view", "buy", "view", None]
    assert dataset.weight.tolist() == [0.5, 1, 2, 1]
    plain = read_layout(write_layout(tmp_path / "plain"))
    assert (plain.event, plain.weight) == (None, None)


def test_ties_are_told_by_the_time_since_the_users_first(tmp_path):
    folder = write_layout(tmp_path / "shop", interactions={"rel_time": [0, 0, 0, 9]})
    shuffled = [read_layout(folder, ties=ShuffledTies(seed)) for seed in range(8)]
    assert {tuple(dataset.item.tolist()) for dataset in shuffled} == {(1, 2, 0, 0), (2, 1, 0, 0)}
    assert all(dataset.time.tolist() == [0, 0, 9, 0] for dataset in shuffled)
    assert shuffled[0].time_unit == "relative"
    assert shuffled[3].config["ties"] == {"type": "ShuffledTies", "seed": 3}
    with pytest.raises(SemidError, match=r"global-time split needs timestamps, this dataset has each user's own clock"):
        _ = shuffled[0].replace(split_rule=GlobalTime()).splits
    times = write_layout(tmp_path / "times", interactions={"rel_time": [0, 0, 0, 9], "timestamp": [50, 40, 7, 50]})
    shuffled = [read_layout(times, ties=ShuffledTies(seed)) for seed in range(8)]
    assert {tuple(dataset.item.tolist()) for dataset in shuffled} == {(1, 2, 0, 0), (1, 0, 2, 0)}
    assert shuffled[0].time_unit == "seconds"


@pytest.mark.parametrize(
    ("rel_time", "expected"),
    [
        (None, "ties shuffled by seed 0 need column 'timestamp' or 'rel_time' .*found user_id, item_id, position; add"),
        ([0.5, 1.0, 2.0, 3.0], "column 'rel_time': expected integers, got double with 0 nulls"),
        ([0, None, 0, 9], "column 'rel_time': expected integers, got int64 with 1 nulls"),
    ],
)
def test_ties_without_a_time_are_refused(tmp_path, rel_time, expected):
    folder = write_layout(tmp_path / "shop", interactions={} if rel_time is None else {"rel_time": rel_time})
    if rel_time is None:
        table = pa.parquet.read_table(folder / "interactions.parquet").drop_columns(["rel_time"])
        pa.parquet.write_table(table, folder / "interactions.parquet")
    assert read_layout(folder).time_unit == "position"  # ties in source order need none
    with pytest.raises(SemidError, match=f"interactions.parquet: {expected}"):
        read_layout(folder, ties=ShuffledTies())


def test_vectors_and_posters_are_optional_and_item_ids_are_the_last_resort(tmp_path):
    folder = write_layout(tmp_path / "shop")
    table = pa.parquet.read_table(folder / "items.parquet").drop_columns(["asin"])
    pa.parquet.write_table(table, folder / "items.parquet")
    for name in ("text_minilm_f16.npy", "posters_64.npz"):
        (folder / name).unlink()
    dataset = read_layout(folder)
    assert dataset.item_ids.to_pylist() == ["0", "1", "2"]
    assert dataset.vector_columns == []


@pytest.mark.parametrize(
    ("items", "interactions", "expected"),
    [
        ({"item_id": [0, 2, 1]}, {}, "items.parquet: expected column 'item_id' with 0, 1, 2, ... in row order"),
        ({}, {"item_id": [0, 1, 3, 0]}, "interactions.parquet: row 3, column 'item_id': 3 is no row of the 3 items"),
        ({}, {"item_id": [0, 1, -1, 0]}, "interactions.parquet: row 3, column 'item_id': -1 is no row"),
        ({}, {"item_id": [0, None, 1, 0]}, "interactions.parquet: column 'item_id': expected integers.* 1 nulls"),
        ({"asin": ["a", "b", "a"]}, {}, "items.parquet: row 3, column 'item_id': 'a' occurs in an earlier row too"),
    ],
)
def test_faults_name_the_file(tmp_path, items, interactions, expected):
    assert read_layout(write_layout(tmp_path / "good")).num_items == 3
    with pytest.raises(SemidError, match=expected):
        read_layout(write_layout(tmp_path / "bad", items=items, interactions=interactions))


@pytest.mark.parametrize("name", ["items.parquet", "interactions.parquet"])
def test_missing_tables_are_named(tmp_path, name):
    folder = write_layout(tmp_path / "shop")
    (folder / name).unlink()
    with pytest.raises(SemidError, match=f"{name}: no such file"):
        read_layout(folder)


def test_missing_columns_are_named(tmp_path):
    folder = write_layout(tmp_path / "shop")
    table = pa.parquet.read_table(folder / "interactions.parquet").drop_columns(["position"])
    pa.parquet.write_table(table, folder / "interactions.parquet")
    with pytest.raises(SemidError, match=r"interactions.parquet: column 'position' is missing; found user_id, item_id"):
        read_layout(folder)


def test_bad_vectors_and_posters_are_named(tmp_path):
    folder = write_layout(tmp_path / "shop")
    np.savez(folder / "posters_64.npz", item_id=np.array([9]), offset=np.array([0, 1]), jpeg=np.zeros(1, np.uint8))
    with pytest.raises(SemidError, match=r"posters_64.npz: expected arrays item_id, offset and jpeg"):
        read_layout(folder)
    np.save(folder / "text_minilm_f16.npy", np.zeros((4, 2), np.float16))
    with pytest.raises(SemidError, match=r"text_minilm_f16.npy: expected floats \[3, dim\], .* got float16 \[4, 2\]"):
        read_layout(folder)


@pytest.mark.parametrize(
    ("name", "counts", "targets"),
    [
        ("amazon14_beauty", (22_363, 12_101, 198_502), 131_413),
        ("ml1m", (6_040, 3_706, 1_000_209), 1_000_209 - 3 * 6_040),
    ],
)
def test_development_data(name, counts, targets):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent: the development data are not part of the project")
    started = time.perf_counter()
    dataset = read_layout(SHARED / name)
    seconds = time.perf_counter() - started
    assert (dataset.num_users, dataset.num_items, len(dataset.item)) == counts
    assert dataset.splits.train.lengths.sum() - dataset.num_users == targets
    assert dataset.vectors("text_minilm").shape == (counts[1], 384)
    assert dataset.texts()[0]
    assert seconds < 10  # half a second on an idle machine
    if name == "ml1m":
        assert dataset.items["image"].null_count == 3_706 - 3_256


def test_beauty_has_the_items_of_a_day_in_the_order_of_their_ids():
    folder = SHARED / "amazon14_beauty"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the development data are not part of the project")
    source, shuffled = read_layout(folder), read_layout(folder, ties=ShuffledTies())
    at = shuffled.splits.test.histories.ends  # where the targets stand
    assert round((shuffled.time[at] == shuffled.time[at - 1]).mean(), 3) == 0.435
    tied = (np.diff(shuffled.user) == 0) & (np.diff(shuffled.time) == 0)
    assert tied.sum() == 77_402
    place = np.argsort(np.argsort(source.item_ids.to_pylist()))  # of an item by its id
    assert (np.diff(place[source.item])[tied] > 0).all()
    assert abs((np.diff(place[shuffled.item])[tied] > 0).mean() - 0.5) < 0.01
