import hashlib
import io
import re

import ml_dtypes
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapes
from PIL import Image

from semid import arrow
from semid.arrow import digest
from semid.artifacts import read_artifact
from semid.data import Dataset, GlobalTime, HeldOutItems, LeaveOneOut, ShuffledTies, SourceOrder, joined_texts
from semid.errors import SemidError


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


ITEMS = {
    "item_id": ["c", "a", "b", "d"],
    "title": ["t0", None, "t2", ""],
    "tags": [["x", "y"], ["z"], None, []],
    "price": [1.5, None, 2.0, 3.0],
    "image": pa.array([png("red"), None, png("blue"), None], pa.binary()),
    "half": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float16) / 7), 2),
    "single": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float32) / 7), 3),
}
INTERACTIONS = {
    "user_id": ["v", "u", "v", "v", "u", "v"],
    "item_id": ["a", "b", "b", "c", "c", "a"],
    "timestamp": [30, 5, 10, 20, 4, 30],
    "event": ["buy", "view", None, "view", "buy", "late"],
    "weight": [1.0, 0.5, 0.25, 2.0, 3.0, 4.0],
}


def build(interactions=INTERACTIONS, items=ITEMS, **options):
    return Dataset.build(pa.table(items), pa.table(interactions), name="shop", **options)


def assert_same(a, b):
    for name in ("users", "event", "split_rule", "source", "name", "time_unit"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.items.equals(b.items)
    for name in ("user", "item", "time", "weight"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype


def test_a_dataset_is_one_line_in_a_notebook(tmp_path):
    line = "Dataset('shop': 2 users, 4 items, 6 interactions, vectors half, single"
    assert repr(build()) == f"{line})"
    assert repr(build().save(tmp_path / "d")) == f"{line}, from {tmp_path}/d)"


def in_kinds(values):
    """A column in a chunk per kind of string that Arrow has, of a dictionary as well; or in two chunks."""
    column = pa.chunked_array([values])
    for kind in (pa.large_string(), pa.string_view()):
        yield column.cast(kind)
    yield column.cast(pa.large_string()).dictionary_encode()
    yield pa.chunked_array([[], values[:1], values[1:]], pa.string())


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("ties", [SourceOrder(), ShuffledTies()])
def test_strings_are_joined_nowhere_and_give_the_same_dataset(kind, rows, ties, monkeypatch):
    expected = build(ties=ties)
    monkeypatch.setattr(arrow, "_CHUNK_ROWS", rows)
    columns = {name: list(in_kinds(INTERACTIONS[name]))[kind] for name in ("user_id", "item_id", "event")}
    ids = arrow.as_strings(arrow.decoded(columns["user_id"]))
    assert ids.to_pylist() == INTERACTIONS["user_id"]
    assert max(map(len, ids.chunks)) <= rows
    found = build(INTERACTIONS | columns, ties=ties)
    assert_same(found, expected)
    assert found.users.type == found.event.type == pa.string()
    assert found.digest == expected.digest


def test_build_maps_ids_and_sorts_by_user_and_time():
    dataset = build()
    assert (dataset.num_users, dataset.num_items) == (2, 4)
    assert dataset.users.to_pylist() == ["v", "u"]
    assert dataset.user.tolist() == [0, 0, 0, 0, 1, 1]
    assert dataset.item.tolist() == [2, 0, 1, 1, 0, 2]
    assert dataset.time.tolist() == [10, 20, 30, 30, 4, 5]
    assert dataset.event.to_pylist() == [None, "view", "buy", "late", "buy", "view"]
    assert dataset.weight.tolist() == [0.25, 2, 1, 4, 3, 0.5]
    assert dataset.offsets.tolist() == [0, 4, 6]
    assert [getattr(dataset, f).dtype for f in ("user", "item", "time")] == [np.int32, np.int32, np.int64]


def test_events_are_numbered_by_name_and_nulls_refused():
    dataset = build()
    assert dataset.event_codes.tolist() == [0, 3, 1, 2, 1, 3]  # a null is unknown
    with pytest.raises(SemidError, match=r"interactions row 1, column 'event': is null, as are 1 of 6; fill them in"):
        _ = dataset.events
    filled = build(INTERACTIONS | {"event": ["buy", "view", "view", "view", "buy", "late"]})
    assert filled.events == ("buy", "late", "view")
    without = build({name: values for name, values in INTERACTIONS.items() if name != "event"})
    assert (without.events, without.event_codes) == ((), None)


def test_position_alone_orders_and_beside_a_timestamp_breaks_ties():
    rest = {name: INTERACTIONS[name] for name in ("user_id", "item_id")}
    alone = build(rest | {"position": [3, 1, 0, 2, 0, 1]})
    assert alone.time_unit == "position"
    assert alone.item.tolist() == [2, 1, 0, 1, 0, 2]
    both = build(rest | {"timestamp": [0, 0, 0, 0, 1, 9], "position": [3, 1, 0, 2, 0, 1]})
    assert both.time_unit == "seconds"
    assert both.item.tolist() == [2, 0, 1, 1, 2, 0]


def test_fractions_of_a_second_order_what_falls_into_one():
    times = pa.array([1900, 0, 1500, 1100, 1, 1000], pa.timestamp("ms"))
    dataset = build(INTERACTIONS | {"timestamp": times})
    assert dataset.time.tolist() == [1, 1, 1, 1, 0, 0]
    assert dataset.item.tolist() == [1, 0, 2, 1, 2, 0]


def test_texts_may_be_categorical_views_or_empty_lists():
    words = pa.array(["p", None, "q"])
    lists = pa.array([["r"], [], None])
    kinds = [pa.large_list(pa.dictionary(pa.int8(), pa.large_string())), pa.list_(pa.string())]
    for one in (words, words.dictionary_encode(), words.cast(pa.string_view())):
        for several in (lists.cast(kind) for kind in kinds):
            table = pa.table({"one": one, "several": several})
            assert joined_texts(table, ("one", "several")) == ["p. r", "", "q"]
        table = pa.table({"one": one, "several": pa.array([[], None, []])})  # of nothing, by its type
        assert joined_texts(table, ("one", "several")) == ["p", "", "q"]
    with pytest.raises(SemidError, match="column 'one': expected texts, got int64; convert it to strings"):
        joined_texts(pa.table({"one": [1]}), ("one",))


def test_columns_by_what_they_are():
    dataset = build(items=ITEMS | {"numbers": pa.array([[1, 2]] * 4, pa.list_(pa.int32(), 2))})
    assert dataset.text_columns == ["title", "tags"]
    assert dataset.vector_columns == ["half", "single", "numbers"]
    assert dataset.texts() == ["t0. x > y", "z", "t2", ""]
    with_nulls = build(items=ITEMS | {"tags": [["x", None, "y"], ["z"], None, [None]]})
    assert with_nulls.texts() == dataset.texts()
    assert build(items=ITEMS | {"text": ["p", "q", "r", "s"]}).texts() == ["p", "q", "r", "s"]
    with pytest.raises(SemidError, match="dataset 'shop' has neither vector nor text columns"):
        build(items={"item_id": ITEMS["item_id"]}).texts()


def test_vectors_in_float32():
    dataset = build()
    assert dataset.vectors("half").dtype == np.float32
    np.testing.assert_array_equal(dataset.vectors("half"), (np.arange(8, dtype=np.float16) / 7).reshape(4, 2))
    np.testing.assert_array_equal(dataset.vectors("single"), (np.arange(12, dtype=np.float32) / 7).reshape(4, 3))
    with pytest.raises(SemidError, match=r"no vector column 'title' in dataset 'shop'; it has \['half', 'single'\]"):
        dataset.vectors("title")


def test_with_vectors_adds_and_replaces_a_checked_column():
    vectors = np.arange(20, dtype=np.float64).reshape(4, 5)
    dataset = build().with_vectors("model", vectors)
    assert dataset.vector_columns == ["half", "single", "model"]
    np.testing.assert_array_equal(dataset.vectors("model"), vectors)
    assert dataset.with_vectors("half", vectors).vectors("half").shape == (4, 5)
    vectors[2, 1] = np.nan
    with pytest.raises(SemidError, match=r"^model: row 3, column 'model': vector holds a NaN"):
        dataset.with_vectors("model", vectors)


def test_what_is_no_matrix_of_numbers_is_no_vector_column():
    vectors = np.arange(8).reshape(4, 2)
    for given in (vectors.astype(ml_dtypes.bfloat16), vectors, vectors.tolist()):
        with shapes.unchecked():
            dataset = build().with_vectors("v", given)
        np.testing.assert_array_equal(dataset.vectors("v"), vectors)
    for wrong in (vectors[:3], vectors[:, :0], vectors[:, 0], vectors[None], vectors.astype(str)):
        shape = re.escape(f"got {wrong.dtype} {list(wrong.shape)}")
        with pytest.raises(SemidError, match=rf"column 'v': expected numbers \[4 items, dim\], {shape}"):
            build().with_vectors("v", wrong)


@pytest.mark.parametrize(
    ("rules", "named"),
    [({"split_rule": GlobalTime}, "split_rule: .* GlobalTime"), ({"ties": "shuffled"}, "ties: .* ShuffledTies")],
)
def test_what_is_no_rule_is_named(rules, named):
    for made in (lambda: build(**rules), lambda: build().replace(**rules)):
        with pytest.raises(SemidError, match=rf"{named}\(\).*, got {re.escape(repr(next(iter(rules.values()))))}$"):
            made()


def test_statistics_by_hand():
    statistics = build().statistics()
    assert statistics == {
        "users": 2,
        "items": 4,
        "items never interacted with": 1,
        "interactions": 6,
        "interactions a user (min / mean / max)": "2 / 3.00 / 4",
        "times": "1970-01-01 to 1970-01-01",
        "same time as the one before": 1,
        "order of equal times": "in source order",
        "repeated (user, item)": 1,
        "split": "LeaveOneOut",
        "events": "view 2, buy 2, null 1, late 1",
        "training interactions": 4,
        "training targets seen before": "0 of 2",
        "validation examples": 1,
        "test examples": 1,
    }
    later = build(INTERACTIONS | {"timestamp": ["2024-01-31"] * 5 + ["2024-02-29T23:59:59"]})
    assert later.statistics()["times"] == "2024-01-31 to 2024-02-29"
    assert "times" not in build({**INTERACTIONS, "position": range(6), "timestamp": [None] * 6}).statistics()


@pytest.mark.parametrize("rule", [LeaveOneOut(), GlobalTime(0.5, 0.75), HeldOutItems(0.5, seed=3)])
def test_save_and_load_give_the_same_dataset(tmp_path, rule, monkeypatch):
    dataset = build(split_rule=rule, source={"type": "by hand", "nested": {"n": 1}})
    dataset.save(tmp_path / "d")
    loaded = Dataset.load(tmp_path / "d")
    assert_same(dataset, loaded)
    np.testing.assert_array_equal(loaded.vectors("half"), dataset.vectors("half"))
    assert loaded.items["image"].to_pylist() == [png("red"), None, png("blue"), None]
    assert loaded.statistics() == dataset.statistics()
    loaded.statistics().clear()  # a copy of what is counted once
    monkeypatch.setattr(np, "unique", None)
    assert loaded.statistics() == dataset.statistics()


def test_save_and_load_without_options_from_pandas(tmp_path):
    frames = pd.DataFrame({"item_id": [1, 2]}), pd.DataFrame({"user_id": [7], "item_id": [2], "position": [0]})
    dataset = Dataset.from_tables(*frames, name="small")
    dataset.save(str(tmp_path / "d"))
    loaded = Dataset.load(str(tmp_path / "d"))
    assert (loaded.event, loaded.weight, loaded.time_unit) == (None, None, "position")
    assert (loaded.item_ids.to_pylist(), loaded.users.to_pylist()) == (["1", "2"], ["7"])
    assert (loaded.user.tolist(), loaded.item.tolist(), loaded.time.tolist()) == ([0], [1], [0])


def test_the_digest_of_a_table_is_that_of_its_stream_in_arrow_format():
    whole = pa.table(ITEMS)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as stream:
        stream.write_table(whole)
    assert digest(whole) == hashlib.sha256(sink.getvalue()).hexdigest()
    assert digest(pa.concat_tables([whole[:3], whole[3:]])) == digest(whole) != digest(whole[:3])


def test_equal_datasets_have_equal_digests(tmp_path):
    manifests = [build().save(tmp_path / name) for name in ("a", "b")]
    assert manifests[0].digest == manifests[1].digest
    other = build(split_rule=GlobalTime()).save(tmp_path / "c")
    assert other.digest != manifests[0].digest
    assert read_artifact(tmp_path / "a", "dataset").digest == manifests[0].digest


@pytest.mark.parametrize("name", ["items.parquet", "users.parquet", "interactions.parquet"])
def test_a_changed_byte_is_refused(tmp_path, name):
    build().save(tmp_path / "d")
    assert Dataset.load(tmp_path / "d").num_items == 4
    path = tmp_path / "d" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SemidError, match=f"{name}: content does not match its sha256"):
        Dataset.load(tmp_path / "d")
