"""What a notebook shows of objects."""

import numpy as np
import pyarrow as pa
import pytest

from semid.catalog import SemanticCatalog
from semid.data import Dataset
from semid.errors import SemidError
from semid.notebooks import Facts, as_pandas
from semid.recommender import Recommendations


def _catalog():
    removed = np.array([False, True])
    return SemanticCatalog(pa.array(["a", "<b>"]), np.array([[0, 3], [1, 2]], np.int32), (2, 4), removed=removed)


def test_facts_are_lines_and_a_table_that_escapes():
    facts = Facts("a <title>", {"items": 1200, "of <x>": "1 & 2"})
    assert repr(facts) == "a <title>\nitems   1,200\nof <x>  1 & 2"
    shown = facts._repr_html_()
    assert "a &lt;title&gt;" in shown
    assert ">1,200</td>" in shown
    assert "<x>" not in shown


def test_a_dataset_describes_itself():
    items = pa.table({"item_id": ["a", "b"], "title": ["one", "two"]})
    bought = pa.table({"user_id": ["u"] * 3, "item_id": ["a", "b", "a"], "timestamp": [1, 2, 3]})
    dataset = Dataset.from_tables(items, bought, name="shop")
    described = dataset.describe()
    assert described.values["interactions"] == 3
    assert described.title == "dataset shop"
    assert "item_id, title" in dataset._repr_html_()


def test_codes_and_recommendations_as_frames():
    codes = _catalog().to_pandas()
    assert codes.to_dict("list") == {
        "item_id": ["a", "<b>"],
        "level_0": [0, 1],
        "level_1": [3, 2],
        "active": [True, False],
    }
    assert "2 x 4" in _catalog()._repr_html_()
    scores = np.array([[-1.0, -2.0], [-3.0, -np.inf]], np.float32)
    top = Recommendations([["a", "b"], ["c"]], scores)
    assert top.to_pandas().to_dict("list") == {
        "history": [0, 0, 1],
        "rank": [1, 2, 1],
        "item_id": ["a", "b", "c"],
        "score": [-1.0, -2.0, -3.0],
    }
    assert "a, b" in top._repr_html_()
    assert len(Recommendations([], np.zeros((0, 2), np.float32)).to_pandas()) == 0


def test_a_frame_without_pandas_is_refused():
    class Table:
        def to_pandas(self):
            raise ImportError("no pandas")

    with pytest.raises(SemidError, match="a DataFrame needs pandas"):
        as_pandas(Table())
