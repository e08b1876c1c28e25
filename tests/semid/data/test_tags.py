"""Tags of items against sets of them collected in plain Python."""

import numpy as np
import pyarrow as pa
import pytest

from semid.data import Tags, usual_tag_column, usual_tags
from semid.errors import SemidError

ITEMS = pa.table(
    {
        "item_id": list("abcde"),
        "price": [1.0, 2.0, 3.0, 4.0, 5.0],
        "categories": [["All", "Hair", "Hair"], ["All", "Skin"], None, ["All", "", "Hair"], []],
        "path": ["All > Hair", "All > Skin", "", None, "All"],
        "year": [1999, None, 2000, 2000, 2000],
        "brand": pa.array(["x", "y", None, "y", ""]).dictionary_encode(),
        "same": ["s"] * 5,
    }
)


def sets(tags: Tags) -> list[set[str]]:
    names = tags.names.to_pylist()
    return [{names[n] for n in tags.numbers[a:b]} for a, b in zip(tags.bounds[:-1], tags.bounds[1:], strict=True)]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("categories", [{"Hair"}, {"Skin"}, set(), {"Hair"}, set()]),  # the root that all share is left out
        ("path", [{"Hair"}, {"Skin"}, set(), set(), set()]),
        ("year", [{"1999"}, set(), {"2000"}, {"2000"}, {"2000"}]),
        ("brand", [{"x"}, {"y"}, set(), {"y"}, set()]),
        ("same", [set()] * 5),
    ],
)
def test_columns_of_every_kind(column, expected):
    tags = Tags.from_column(ITEMS, column)
    assert sets(tags) == expected
    assert len(tags) == len(set().union(*expected))
    rows = np.array([3, -1, 0, 4])
    assert sets(tags.take(rows)) == [set() if row < 0 else expected[row] for row in rows]
    padded = [{tags.names[n].as_py() for n in row if n >= 0} for row in tags.padded()]
    assert padded == expected
    assert tags.names.to_pylist() == sorted(set().union(*expected))
    of_each = [row[row >= 0] for row in tags.padded()]
    assert all((np.diff(row) > 0).all() for row in of_each), "sorted"


def test_shares_are_means_of_the_items_distributions():
    genres = [["a", "b"], ["a"], ["b", "c", "d"], []]
    tags = Tags.from_column(pa.table({"genres": genres}), "genres")
    rows, owner = np.array([0, 1, 3, -1, 2, 2, 1, 3]), np.array([0, 0, 0, 0, 1, 1, 1, 2])
    expected = np.zeros((3, 4))
    for user, items in enumerate([[0, 1], [2, 2, 1], []]):
        for item in items:
            for tag in genres[item]:
                expected[user, tags.names.to_pylist().index(tag)] += 1 / len(genres[item]) / len(items)
    np.testing.assert_allclose(tags.shares(rows, owner, owners=3), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "is_usual"),
    [
        *((name, True) for name in ("tag", "Tags", "item_tags", "tag_2", "productTags", "subcategory", "mainGenre")),
        *((name, False) for name in ("discount_percentage", "vintage", "stage", "heritage", "tagline")),
    ],
)
def test_tag_is_a_whole_word(name, is_usual):
    assert (usual_tag_column(pa.schema({name: pa.string()})) == name) == is_usual


def test_the_usual_column_is_found_by_its_name():
    assert usual_tags(ITEMS).column == "categories"
    assert usual_tags(ITEMS.select(["item_id", "brand"])) is None
    assert usual_tags(ITEMS.select(["same"]).rename_columns(["category"])) is None  # tells nothing apart


@pytest.mark.parametrize(
    ("column", "message"),
    [("brnd", "no column 'brnd' among .* did you mean 'brand'"), ("price", "'price': expected strings.*got double")],
)
def test_what_is_no_column_of_tags_is_named(column, message):
    with pytest.raises(SemidError, match=message):
        Tags.from_column(ITEMS, column)
