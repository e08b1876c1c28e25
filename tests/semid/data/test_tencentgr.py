"""The TencentGR reader, on 50 users in the published layout."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semid.cli.app import main
from semid.data import Dataset, read_tencentgr
from semid.data.builders import tencentgr
from semid.errors import SemidError

USERS, ITEMS, LENGTH, START = 50, 80, 12, 1_745_919_240
SEQUENCE = pa.list_(pa.struct({"item_id": pa.int64(), "action_type": pa.int64(), "timestamp": pa.int64()}))
WIDTHS = {81: 32, 84: 6}  # the second is another in each release
CANDIDATE = pa.struct({"feature_value": pa.int64(), "is_str": pa.bool_()})
opened: list[str] | None = None


class Poison:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def record(user: int, at: int) -> dict:
    """Item 1 to 80, an action that is null at times, and a time; two records of a user tie."""
    action = (None, 0, 1, 0, 0, 2)[(user + at) % 6]
    item = 1 + (7 * user + at * at) % ITEMS
    return {"item_id": item, "action_type": action, "timestamp": START + 100 * user + at - (at == 5)}


def original(item: int) -> int:
    return 30_000_000_000 + 17 * item


def embedding(item: int, number: int) -> list[float]:
    return np.random.default_rng([number, item]).normal(size=WIDTHS[number]).astype(np.float32).tolist()


def write(folder: Path, name: str, tables: list[pa.Table]) -> None:
    (folder / name).mkdir(parents=True)
    for part, table in enumerate(tables):
        pq.write_table(table, folder / name / f"part-{part:05d}.parquet")


def published(folder: Path) -> Path:
    """50 users in the layout of TencentGR, every file in two parts, with a pickle that must not be opened."""
    users = [{"user_id": 500 - user, "seq": [record(user, at) for at in range(LENGTH)]} for user in range(USERS)]
    users[3]["seq"][0]["item_id"] = None
    seq = pa.Table.from_pylist(users, pa.schema({"user_id": pa.int64(), "seq": SEQUENCE}))
    write(folder, "seq", [seq[:20], seq[20:]])
    items = range(1, ITEMS)  # item 80 has no features
    fields = {name: [None if name == "115" else item % (3 + k) for item in items] for k, name in enumerate(FIELDS)}
    fields["115"] = [item if item % 3 == 0 else None for item in items]
    features = pa.table({"item_id": pa.array(items), **{k: pa.array(v, pa.int64()) for k, v in fields.items()}})
    write(folder, "item_feat", [features[40:], features[:40]])
    write(folder, "user_feat", [pa.table({"user_id": [1], "103": [36], "106": [[6]]})])
    candidates = pa.table({"item_id": [original(1)], "retrieval_id": [1]})
    write(folder, "candidate", [candidates.append_column("100", pa.array([None], CANDIDATE))])
    for number, width in WIDTHS.items():
        have = [item for item in range(1, ITEMS + 40) if item % 10 != number % 10]  # some are of no history
        vectors = [None if item == 2 else embedding(item, number) for item in have]
        ids = [str(original(item)) for item in have]
        table = pa.table({"anonymous_cid": ids, "emb": pa.array(vectors, pa.list_(pa.float32()))})
        write(folder, f"mm_emb/emb_{number}_{width}_parquet", [table[:50], table[50:]])
    (folder / "indexer.pkl").write_bytes(pickle.dumps(Poison(folder / "trace")))
    numbers = range(1, ITEMS + 1)
    pq.write_table(
        pa.table({"item_id": numbers, "anonymous_cid": [original(item) for item in numbers]}),
        folder.parent / "item_ids.parquet",
    )
    return folder


FIELDS = tencentgr.FEATURES


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tencentgr, "_ROWS", 7)  # several batches a file
    return {"manual_dir": published(tmp_path / "raw"), "data_dir": tmp_path / "tfds"}


@pytest.fixture
def mapped(folders):
    return {**folders, "item_ids": folders["manual_dir"].parent / "item_ids.parquet"}


def histories(dataset: Dataset) -> dict[str, list[tuple[str, str, int]]]:
    ids, events = dataset.item_ids.to_pylist(), dataset.event.to_pylist()
    rows = zip(dataset.user.tolist(), dataset.item.tolist(), events, dataset.time.tolist(), strict=True)
    found: dict[str, list] = {}
    for user, item, event, time in rows:
        found.setdefault(dataset.users[user].as_py(), []).append((ids[item], event, time))
    return found


def expected_history(user: int) -> list[tuple[str, str, int]]:
    records = [record(user, at) for at in range(LENGTH)][1 if user == 3 else 0 :]
    names = {None: "exposure", 0: "exposure", 1: "click", 2: "conversion"}
    return [(str(one["item_id"]), names[one["action_type"]], one["timestamp"]) for one in records]


def test_everything_that_is_published(folders):
    trace = folders["manual_dir"] / "trace"
    pickle.loads((folders["manual_dir"] / "indexer.pkl").read_bytes())
    assert trace.exists()  # control: the pickle is poisoned
    trace.unlink()
    dataset = read_tencentgr("1m", **folders)
    assert histories(dataset) == {str(500 - user): expected_history(user) for user in range(USERS)}
    ids = [int(each) for each in dataset.item_ids.to_pylist()]
    assert ids == sorted({record(user, at)["item_id"] for user in range(USERS) for at in range(LENGTH)})
    rows = {int(row["item_id"]): row for row in dataset.items.to_pylist()}
    assert rows[7]["feature_100"] == "100_1"
    assert rows[7]["feature_122"] == f"122_{7 % 15}"
    assert [rows[item]["feature_115"] for item in (6, 7)] == ["115_6", None]
    assert set(rows[80].values()) == {"80", None}
    assert dataset.name == "tencentgr-1m"
    source = dict(dataset.source)
    assert {Path(name).parts[0] for name in source.pop("sha256")} == {"seq", "item_feat"}
    nulls = sum(record(user, at)["action_type"] is None for user in range(USERS) for at in range(LENGTH))
    assert source == {
        "type": "tencentgr",
        "release": "1m",
        "users": None,
        "seed": 0,
        "embeddings": [],
        "repeated lines left out": 0,
        "null action types, read as exposures": nulls,
        "records without an item, left out": 1,
        "items without features": 1,
    }
    assert not trace.exists()


def _note_opened(event: str, args: tuple) -> None:
    if opened is not None and event == "open":
        opened.append(str(args[0]))


def test_the_pickle_is_never_opened(mapped, monkeypatch):
    sys.addaudithook(_note_opened)
    monkeypatch.setattr(sys.modules[__name__], "opened", [])
    read_tencentgr("1m", **mapped, embeddings=(81,))
    assert any(name.endswith(".json") for name in opened)  # control: what is opened is seen
    assert not [name for name in opened if name.endswith("indexer.pkl")]
    (mapped["manual_dir"] / "indexer.pkl").read_bytes()
    assert [name for name in opened if name.endswith("indexer.pkl")]
    assert not (mapped["manual_dir"] / "trace").exists()


def test_embeddings_are_joined_by_original_ids_and_as_wide_as_their_files(mapped):
    dataset = read_tencentgr("10m", **mapped, embeddings=(84, 81))
    assert dataset.name == "tencentgr-10m"
    for number, width in WIDTHS.items():
        vectors, missing = dataset.vectors(f"emb_{number}"), 0
        assert vectors.shape == (dataset.num_items, width)
        for item, vector in zip(dataset.item_ids.to_pylist(), vectors, strict=True):
            has = int(item) % 10 != number % 10 and item != "2"
            missing += not has
            np.testing.assert_array_equal(vector, embedding(int(item), number) if has else np.zeros(width))
        assert dataset.source[f"items without emb_{number}, zeros there"] == missing > 0
    assert "item_ids.parquet" in dataset.source["sha256"]


def test_a_subset_of_users_is_drawn_by_seed_with_its_items_alone(mapped):
    subsets = [read_tencentgr("1m", **mapped, users=9, seed=seed, embeddings=(81,)) for seed in (0, 1)]
    for dataset in subsets:
        found = histories(dataset)
        assert len(found) == 9
        assert all(found[user] == expected_history(500 - int(user)) for user in found)
        wanted = {item for history in found.values() for item, _, _ in history}
        assert set(dataset.item_ids.to_pylist()) == wanted
        assert dataset.num_items < ITEMS
    assert set(subsets[0].users.to_pylist()) != set(subsets[1].users.to_pylist())
    again = read_tencentgr("1m", **mapped, users=9, seed=1, embeddings=(81,))  # the prepared files
    assert again.digest == subsets[1].digest
    everybody = read_tencentgr("1m", **mapped, users=USERS)
    assert everybody.num_users == USERS


def test_another_map_of_ids_is_not_read_as_the_one_before(mapped):
    read_tencentgr("1m", **mapped, embeddings=(81,))
    table = pq.read_table(mapped["item_ids"])
    pq.write_table(table[:-1], mapped["item_ids"])
    with pytest.raises(SemidError, match=r"prepared from item_ids.parquet: expected a file of sha256"):
        read_tencentgr("1m", **mapped, embeddings=(81,))


@pytest.mark.parametrize("name", ["other_ids.parquet", "raw/seq/part-00002.parquet"])
def test_files_that_came_later_are_not_left_out(mapped, name):
    before = read_tencentgr("1m", **mapped, embeddings=(81,))
    table = pq.read_table(mapped["item_ids"] if name == "other_ids.parquet" else mapped["manual_dir"] / "seq")
    path = mapped["manual_dir"].parent / name
    pq.write_table(table, path)
    if name == "other_ids.parquet":  # control: the same file under another name
        mapped["item_ids"] = path
        assert read_tencentgr("1m", **mapped, embeddings=(81,)).digest == before.digest
        pq.write_table(table[:-1], path)
    with pytest.raises(SemidError, match=f": prepared without {path}; remove that folder to prepare it again"):
        read_tencentgr("1m", **mapped, embeddings=(81,))


def rewrite(folder: Path, name: str, change) -> None:
    path = sorted((folder / name).glob("*.parquet"))[-1]
    pq.write_table(change(pq.read_table(path)), path)


def renamed(old: str, new: str):
    return lambda table: table.rename_columns([new if name == old else name for name in table.column_names])


def replaced(name: str, values):
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values(table.num_rows)))


def records(**changes):
    return lambda rows: [[{"item_id": 1, "action_type": 0, "timestamp": 5} | changes]] * rows


BAD = [
    ("seq", renamed("seq", "sequence"), "part-00001.parquet: column 'seq' is missing; found user_id, sequence"),
    ("seq", replaced("seq", lambda rows: [[1]] * rows),
     r"part-00001.parquet: column 'seq': expected list<struct<item_id, action_type, timestamp>> .*, got list<"),
    ("seq", replaced("seq", records(action_type=3)),
     r"part-00001.parquet: column 'seq.action_type': expected 0, 1, 2 \(exposure, click, conversion\) or null, got 3"),
    ("seq", replaced("user_id", lambda rows: [1.5] * rows), "'user_id': expected integers or strings, got double"),
    ("item_feat", renamed("121", "x"), "part-00001.parquet: column '121' is missing; found item_id, 100"),
    ("item_feat", replaced("100", lambda rows: ["a"] * rows), "column '100': expected numbers, got string"),
    ("item_feat", replaced("100", lambda rows: [1.5] * rows), "column '100': expected whole numbers"),
    ("mm_emb/emb_81_32_parquet", renamed("anonymous_cid", "cid"), "column 'anonymous_cid' is missing; found cid, emb"),
    ("mm_emb/emb_81_32_parquet", replaced("emb", lambda rows: [[0.5] * 31] * rows),
     "part-00001.parquet: column 'emb': vector of 31 numbers, expected 32"),
    ("mm_emb/emb_81_32_parquet", replaced("emb", lambda rows: ["[0.5]"] * rows),
     "column 'emb': expected lists of numbers, got string"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{k}-{bad[0]}" for k, bad in enumerate(BAD)])
def test_another_layout_is_named_by_file_and_column(mapped, name, change, message):
    rewrite(mapped["manual_dir"], name, change)
    with pytest.raises(SemidError, match=message) as raised:
        read_tencentgr("1m", **mapped, embeddings=(81,))
    assert "\n" not in str(raised.value)
    assert not list(mapped["data_dir"].rglob("*items*/**/*.array_record*"))


def test_null_times_are_named(mapped):
    path = mapped["manual_dir"] / "seq" / "part-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[4]["seq"][1]["timestamp"] = None
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"user_id": pa.int64(), "seq": SEQUENCE})), path)
    with pytest.raises(SemidError, match=r"part-00000.parquet: column 'seq.timestamp': 1 values are null"):
        read_tencentgr("1m", **mapped)


def test_what_is_missing_is_said(mapped):
    ids = mapped.pop("item_ids")
    with pytest.raises(SemidError, match=r"indexer.pkl alone, a pickle, which semid never opens; write it as a table"):
        read_tencentgr("1m", **mapped, embeddings=(81,))
    with pytest.raises(SemidError, match=r"expected Parquet files in one folder mm_emb/emb_82_\*; download .*GR-1M"):
        read_tencentgr("1m", **mapped, embeddings=(82,), item_ids=ids)
    with pytest.raises(SemidError, match="seq: expected users of 1 to 50, as many as there are, got 51"):
        read_tencentgr("1m", **mapped, users=51)
    with pytest.raises(SemidError, match="expected release 1m or 10m, got '2m'"):
        read_tencentgr("2m", **mapped)
    other = ids.with_name("other.parquet")
    pq.write_table(pa.table({"item_id": [1000], "anonymous_cid": ["5"]}), other)
    with pytest.raises(SemidError, match=r"other.parquet: column 'item_id': has none of the \d+ items"):
        read_tencentgr("1m", **mapped, embeddings=(81,), item_ids=other)
    pq.write_table(pa.table({"item": [1], "anonymous_cid": ["5"]}), other)
    with pytest.raises(SemidError, match=r"other.parquet: column 'item_id' is missing; found item, anonymous_cid"):
        read_tencentgr("1m", **mapped, embeddings=(81,), item_ids=other)
    mapped["manual_dir"] = mapped["manual_dir"] / "absent"
    with pytest.raises(SemidError, match=r"absent does not exist or is empty; put the files of https.*GR-10M there"):
        read_tencentgr("10m", **mapped)


def test_the_command(mapped, tmp_path, capsys):
    options = ["--users", "20", "--embeddings", "81", "--item-ids", str(mapped["item_ids"])]
    folders = ["--manual-dir", str(mapped["manual_dir"]), "--data-dir", str(mapped["data_dir"])]
    main(["prepare", "tencentgr", "--release", "1m", "--out", str(tmp_path / "d"), *folders, *options])
    dataset = Dataset.load(tmp_path / "d")
    assert (dataset.num_users, dataset.vector_columns) == (20, ["emb_81"])
    assert set(dataset.event.to_pylist()) == {"exposure", "click", "conversion"}
    assert "dataset tencentgr-1m" in capsys.readouterr().out
