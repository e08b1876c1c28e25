"""Tables of the `datasets` library, by a stand-in of the calls that are used."""

import sys
import types

import pyarrow as pa
import pytest

from semid.cli import main
from semid.data import Dataset, read_huggingface
from semid.errors import SemidError

ITEMS = pa.table(
    {
        "asin": ["a", "b", "c"],
        "title": ["red shoe", "blue shoe", "straw hat"],
        "image": pa.array([{"bytes": b"png", "path": "x"}, None, {"bytes": None, "path": "x"}]),
    }
)
SEEN = pa.table({"user_id": ["u"] * 3 + ["v"] * 3, "asin": list("abcbca"), "timestamp": [1, 2, 3] * 2})


class _Table:
    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def with_format(self, kind: str) -> "_Table":
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        assert rows == slice(None)
        return self._table


@pytest.fixture
def asked(monkeypatch) -> list:
    calls = []

    def load(*where, **options):
        calls.append((*where, options))
        split = options.get("split") or where[0].rsplit("/", 1)[-1]
        if split not in ("items", "log"):
            raise FileNotFoundError(f"Directory {where[0]}\nnot found")
        return _Table(ITEMS.drop_columns(["image"]) if split == "items" else SEEN)

    fake = types.SimpleNamespace(load_from_disk=load, load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_a_split_of_the_hub_and_a_subfolder_are_tables(asked, tmp_path):
    assert read_huggingface("org/name", "full:items", revision="v1")["asin"].to_pylist() == ["a", "b", "c"]
    assert asked.pop() == ("org/name", "full", {"split": "items", "revision": "v1"})
    assert read_huggingface("org/name", "log").num_rows == 6
    assert asked.pop() == ("org/name", None, {"split": "log", "revision": None})
    assert read_huggingface(str(tmp_path), "full:log").num_rows == 6
    assert asked.pop() == (f"{tmp_path}/full/log", {})
    with pytest.raises(SemidError, match=rf"{tmp_path}: revision 'v1' is for datasets of the hub, org/name; leave"):
        read_huggingface(str(tmp_path), "full:log", revision="v1")
    with pytest.raises(SemidError, match=rf"{tmp_path}: no table 'gone' \(Directory {tmp_path}/gone not found\)"):
        read_huggingface(str(tmp_path), "gone")


def test_pictures_become_their_bytes(monkeypatch, tmp_path):
    fake = types.SimpleNamespace(load_from_disk=lambda _: _Table(ITEMS))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(SemidError, match=r"^org: items: row 3, column 'image': no bytes, and no such file: x; store"):
        read_huggingface("org", "items")
    (tmp_path / "x").write_bytes(b"jpeg")
    assert read_huggingface("org", "items")["image"].to_pylist() == [b"png", None, b"jpeg"]


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SemidError, match=r"org/name: reading it needs the extra .* pip install 'semid\[hf\]'"):
        read_huggingface("org/name", "items")


def test_the_command_makes_a_dataset_with_columns_of_other_names(asked, tmp_path, monkeypatch, capsys):
    options = f"--items items --interactions log --columns item_id=asin --text-vectors 0 --out {tmp_path}/out"
    main(["prepare", "huggingface", str(tmp_path), *options.split()])
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.item_ids.to_pylist() == ["a", "b", "c"]
    assert dataset.num_users == 2
    main(["prepare", "huggingface", str(tmp_path), *options.split()])  # control: the same tables are the same dataset
    monkeypatch.setitem(globals(), "SEEN", SEEN.set_column(2, "timestamp", pa.array([3, 2, 1] * 2)))
    with pytest.raises(SystemExit):
        main(["prepare", "huggingface", str(tmp_path), *options.split()])
    assert "in use by a dataset of other settings (source.sha256.interactions: " in capsys.readouterr().err
