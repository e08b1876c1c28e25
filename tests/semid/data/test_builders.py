"""The builders, on files of a few lines in the forms in which the projects publish them."""

import functools
import gzip
import http.server
import json
import sys
import threading
import zipfile
from dataclasses import replace

import pytest
import tensorflow_datasets as tfds

from semid.artifacts import sha256
from semid.data import ShuffledTies, read_amazon_reviews, read_movielens
from semid.data.builders import amazon_reviews, movielens
from semid.data.builders.raw import clean
from semid.errors import SemidError

NOWHERE = "http://127.0.0.1:9/"  # the discard port: connections are refused

# user, item, second, rating, in file order. u2's two at 300 tie; u0's first line is its latest.
REVIEWS = [
    ("u0", "B000000003", 900, 5.0),
    ("u0", "B000000001", 100, 4.0),
    ("u0", "B000000002", 500, 3.0),
    ("u2", "B000000007", 300, 5.0),
    ("u2", "B000000004", 300, 1.0),
    ("u2", "B000000001", 200, 5.0),
    ("u1", "B000000005", 100, 5.0),
    ("u1", "B000000006", 101, 5.0),
    ("u1", "B000000008", 102, 5.0),
    ("u3", "B000000003", 50, 2.0),
    ("u4", "B000000002", 60, 2.0),
    ("u5", "B000000001", 70, 2.0),
]
USERS = ["u0", "u2", "u1", "u3", "u4", "u5"]
HISTORIES = {"u0": "123", "u2": "174", "u1": "568", "u3": "3", "u4": "2", "u5": "1"}
ITEMS = [f"B00000000{digit}" for digit in range(1, 9)]


def write_gz(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def json_reviews(rows=REVIEWS):
    return [
        json.dumps({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t, "reviewText": "Nice, 'very'\n"})
        for u, i, t, r in rows
    ]


def metadata_2014():
    one = {
        "asin": "B000000001",
        "title": "Soap &amp; \n Water",
        "brand": "O'Neill",
        "price": 3.1,
        "imUrl": "http://images/1.jpg",
        "categories": [["Beauty", "Bath", "Soap"], ["Beauty", "Gifts"]],
        "description": 'It says "clean"',
        "related": {"also_bought": ["B000000002"]},
    }
    return [repr(one), repr({"asin": "B000000002"}), repr({"asin": "B999999999", "title": "never reviewed"})]


def metadata_2018():
    one = {
        "asin": "B000000001",
        "title": '<span id="productTitle" class="a">Soap &amp; Water</span>',
        "brand": "O'Neill",
        "price": "$1,003.10",
        "category": ["Beauty", "Bath", "Soap", "Gifts"],
        "feature": ["Cleans", "Rinses"],
        "description": ['It says "clean"', ""],
    }
    script = {"asin": "B000000002", "title": "var t = new Date().getTime();", "price": ".a { color: red }", "brand": ""}
    return [json.dumps(each) for each in (one, one | {"title": "the same once more"}, script)]


def metadata_2023():
    one = {
        "parent_asin": "B000000001",
        "title": "Soap &amp; Water",
        "store": "O'Neill",
        "price": 3.1,
        "categories": ["Beauty", "Bath", "Soap", "Gifts"],
        "features": ["Cleans", "Rinses"],
        "description": ['It says "clean"'],
        "images": [{"large": "http://images/1.jpg"}],
    }
    rest = {"title": None, "store": None, "price": "from 2.99", "categories": [], "features": [], "description": []}
    return [json.dumps(one), json.dumps({"parent_asin": "B000000002"} | rest)]


def csv_2023(rows=REVIEWS):
    return ["user_id,parent_asin,rating,timestamp", *(f"{u},{i},{r},{t * 1000}" for u, i, t, r in rows)]


WRITERS = {
    2014: (("reviews_Beauty_5.json.gz", json_reviews), ("meta_Beauty.json.gz", metadata_2014)),
    2018: (("All_Beauty_5.json.gz", json_reviews), ("meta_All_Beauty.json.gz", metadata_2018)),
    2023: (("All_Beauty.csv.gz", csv_2023), ("meta_All_Beauty.jsonl.gz", metadata_2023)),
}
CATEGORY = {2014: "Beauty", 2018: "All_Beauty", 2023: "All_Beauty"}


@pytest.fixture
def offline(monkeypatch):
    """No test reaches the projects' hosts."""
    releases = {
        year: replace(release, reviews=NOWHERE + release.reviews[8:], metadata=NOWHERE + release.metadata[8:])
        for year, release in amazon_reviews.RELEASES.items()
    }
    monkeypatch.setattr(amazon_reviews, "RELEASES", releases)
    monkeypatch.setattr(movielens, "ARCHIVE", replace(movielens.ARCHIVE, url=NOWHERE + "ml-1m.zip"))


@pytest.fixture
def folders(tmp_path, offline):
    """Manual folder with the files of all three years, and a data folder."""
    for files in WRITERS.values():
        for name, lines in files:
            write_gz(tmp_path / "manual" / name, lines())
    return {"manual_dir": tmp_path / "manual", "data_dir": tmp_path / "data"}


def read(year, folders, **options):
    return read_amazon_reviews(year, CATEGORY[year], **folders, **options)


def histories(dataset):
    ids = dataset.item_ids.to_pylist()
    bounds = zip(dataset.users.to_pylist(), dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    return {user: "".join(ids[row][-1] for row in dataset.item[a:b]) for user, a, b in bounds}


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_ids_order_and_counts(folders, year):
    dataset = read(year, folders)
    assert dataset.item_ids.to_pylist() == ITEMS
    assert dataset.users.to_pylist() == USERS
    assert histories(dataset) == HISTORIES
    assert dataset.time[dataset.offsets[0] : dataset.offsets[1]].tolist() == [100, 500, 900]
    assert dataset.time_unit == "seconds"
    assert dataset.statistics()["interactions"] == len(REVIEWS)
    assert [len(dataset.splits.test), len(dataset.splits.validation)] == [3, 3]


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_texts(folders, year):
    rows = read(year, folders).items.to_pylist()
    expected = {
        "item_id": "B000000001",
        "title": "Soap & Water",
        "brand": "O'Neill",
        "price": "$1003.10" if year == 2018 else "$3.10",
        "features": "Cleans Rinses",
        "description": 'It says "clean"',
        "categories": ["Beauty", "Bath", "Soap", "Gifts"],
    }
    if year == 2014:
        del expected["features"]  # 2014 knows none, and a column of nulls is left out
    assert rows[0] == expected
    assert rows[1] == dict.fromkeys(expected) | {"item_id": "B000000002"}  # metadata without texts
    assert rows[2] == dict.fromkeys(expected) | {"item_id": "B000000003"}  # no metadata


def test_source_records_what_was_read(folders):
    manual = folders["manual_dir"]
    dataset = read(2018, folders)
    names = [name for name, _ in WRITERS[2018]]
    assert dataset.name == "amazon-2018-All_Beauty"
    assert dataset.source == {
        "type": "amazon-reviews",
        "year": 2018,
        "category": "All_Beauty",
        "sha256": {name: sha256(manual / name) for name in names},
        "repeated lines left out": 0,
    }


def test_milliseconds_decide_within_a_second(folders):
    lines = ["u,B000000001,5.0,1000900", "u,B000000002,5.0,1000100", "u,B000000003,5.0,1000500", "v,B000000001,1.0,5"]
    write_gz(folders["manual_dir"] / "All_Beauty.csv.gz", ["user_id,parent_asin,rating,timestamp", *lines])
    dataset = read(2023, folders)
    assert histories(dataset) == {"u": "231", "v": "1"}
    assert dataset.time.tolist() == [1000, 1000, 1000, 0]
    assert histories(read(2023, folders, ties=ShuffledTies())) == histories(dataset)


def test_ties_of_reviews_may_be_shuffled(folders):
    shuffled = [histories(read(2014, folders, ties=ShuffledTies(seed))) for seed in range(8)]
    assert {found["u2"] for found in shuffled} == {"174", "147"}  # the two at 300 tie
    assert all(found | {"u2": "174"} == HISTORIES for found in shuffled)


def test_a_repeated_line_counts_once_and_a_repeated_item_stays(folders):
    again = [REVIEWS[0], ("u0", "B000000001", 950, 4.0)]
    write_gz(folders["manual_dir"] / "All_Beauty_5.json.gz", json_reviews(REVIEWS + again))
    dataset = read(2018, folders)
    assert histories(dataset) == HISTORIES | {"u0": "1231"}
    assert dataset.source["repeated lines left out"] == 1


def test_files_may_be_unpacked(folders):
    for name, lines in WRITERS[2023]:
        (folders["manual_dir"] / name).unlink()
        (folders["manual_dir"] / name.removesuffix(".gz")).write_text("\n".join(lines()))
    dataset = read(2023, folders)
    assert histories(dataset) == HISTORIES
    assert dataset.source["sha256"].keys() == {"All_Beauty.csv", "meta_All_Beauty.jsonl"}


def test_second_call_reads_the_prepared_files(folders):
    first = read(2014, folders)
    written = {path: path.stat().st_mtime_ns for path in folders["data_dir"].rglob("*.array_record*")}
    assert len(written) == 2
    for name, _ in WRITERS[2014]:
        (folders["manual_dir"] / name).unlink()
    second = read(2014, folders)
    assert second.items == first.items
    assert second.item.tolist() == first.item.tolist()
    assert second.source == first.source
    assert {path: path.stat().st_mtime_ns for path in folders["data_dir"].rglob("*.array_record*")} == written


def test_records_keep_their_order_over_many_shards(folders):
    builder = amazon_reviews.AmazonReviews(config="2014-Beauty-histories", data_dir=folders["data_dir"])
    settings = tfds.download.DownloadConfig(manual_dir=folders["manual_dir"], num_shards=4)
    builder.download_and_prepare(download_config=settings)
    assert len(list(folders["data_dir"].rglob("*.array_record*"))) == 4
    assert [record["user_id"].decode() for record in builder.as_data_source(split="full")] == USERS


@pytest.mark.parametrize("name", ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"])
def test_missing_file_is_named_with_folder_and_page(folders, name):
    (folders["manual_dir"] / name).unlink()
    with pytest.raises(SemidError, match=f"no {name} in .*manual, and http.*cannot be read .*from https.*put it there"):
        read(2014, folders)


def test_empty_folder_is_named(folders):
    for path in folders["manual_dir"].iterdir():
        path.unlink()
    with pytest.raises(SemidError, match=r"manual does not exist or is empty, and http.*put it there") as raised:
        read(2023, folders)
    assert "\n" not in str(raised.value)
    with pytest.raises(SemidError, match=r"manual does not exist or is empty, and http.*put it there"):
        read_movielens(**folders)


def test_expected_checksum(folders):
    name = "meta_Beauty.json.gz"
    right = sha256(folders["manual_dir"] / name)
    with pytest.raises(SemidError, match=rf"{name}: expected a file of sha256 {'0' * 64}, got {right}"):
        read(2014, folders, checksums={name: "0" * 64})
    assert read(2014, folders, checksums={name: right}).num_items == 8
    with pytest.raises(SemidError, match=rf"prepared from {name}: expected a file of sha256 {'0' * 64}, got {right}"):
        read(2014, folders, checksums={name: "0" * 64})  # the prepared files remember


def test_raw_file_changed_after_preparation(folders):
    read(2014, folders)
    name = "reviews_Beauty_5.json.gz"
    write_gz(folders["manual_dir"] / name, json_reviews(REVIEWS[:-1]))
    with pytest.raises(SemidError, match=f"2014-Beauty-items.*prepared from {name}: expected .*; remove that folder"):
        read(2014, folders)


def test_metadata_are_never_evaluated(folders, tmp_path):
    trace = tmp_path / "trace"
    lines = metadata_2014()
    lines[1] = f"{{'asin': 'B000000002', 'title': __import__('os').system('touch {trace}')}}"
    write_gz(folders["manual_dir"] / "meta_Beauty.json.gz", lines)
    with pytest.raises(SemidError, match=r"meta_Beauty.json.gz, line 2: ValueError: malformed node") as raised:
        read(2014, folders)
    assert "\n" not in str(raised.value)
    assert not trace.exists()
    assert not list(folders["data_dir"].rglob("*.array_record*"))


BAD_REVIEWS = [
    ("{'reviewerID': 'u'}", "JSONDecodeError"),
    ('["u"]', "expected an object"),
    ('{"reviewerID": "u", "overall": 1.0, "unixReviewTime": 5}', "KeyError: 'asin'"),
    ('{"reviewerID": "", "asin": "B", "overall": 1.0, "unixReviewTime": 5}', "expected an id, got ''"),
    (r'{"reviewerID": "u", "asin": "\ud800", "overall": 1.0, "unixReviewTime": 5}', r"expected an id, got '\\ud800'"),
    ('{"reviewerID": "u", "asin": "B", "overall": 1.0, "unixReviewTime": 1e30}', "no time before"),
    ("[" * 100_000, "RecursionError"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_REVIEWS)
def test_malformed_review_is_named_by_line(folders, line, problem):
    write_gz(folders["manual_dir"] / "reviews_Beauty_5.json.gz", [*json_reviews()[:3], line])
    with pytest.raises(SemidError, match=f"reviews_Beauty_5.json.gz, line 4: .*{problem}"):
        read(2014, folders)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["user,item"], "line 1: ValueError: expected the header"),
        ([*csv_2023(), "u,B000000001,5.0"], "line 14: ValueError: not enough values"),
        (csv_2023()[:1], "no interactions in it"),
    ],
)
def test_malformed_ratings(folders, lines, problem):
    write_gz(folders["manual_dir"] / "All_Beauty.csv.gz", lines)
    with pytest.raises(SemidError, match=problem):
        read(2023, folders)


def test_cut_off_archive(folders):
    path = folders["manual_dir"] / "meta_Beauty.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SemidError, match=r"meta_Beauty.json.gz: damaged or not readable"):
        read(2014, folders)


def test_unknown_year_and_category(folders):
    with pytest.raises(SemidError, match="expected year 2014, 2018, 2023, got 2016"):
        read_amazon_reviews(2016, "Beauty", **folders)
    with pytest.raises(SemidError, match="no category 'Sport' in 2014; did you mean 'Sports_and_Outdoors'"):
        read_amazon_reviews(2014, "Sport", **folders)


def test_download_where_the_manual_folder_has_no_file(folders, tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folders["manual_dir"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = {"reviews": "reviews_{}_5.json.gz", "metadata": "meta_{}.json.gz"}
        local = {key: f"http://127.0.0.1:{server.server_port}/{name}" for key, name in urls.items()}
        monkeypatch.setitem(amazon_reviews.RELEASES, 2014, replace(amazon_reviews.RELEASES[2014], **local))
        dataset = read(2014, folders | {"manual_dir": tmp_path / "absent"})
        server.shutdown()
    assert histories(dataset) == HISTORIES
    assert dataset.items["title"][0].as_py() == "Soap & Water"
    assert set(dataset.source["sha256"]) == {"reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"}


MOVIES = [
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "2::Jumanji (1995)::Adventure",
    "10::GoldenEye (1995)::Action|Thriller",
    "11::Misérables, Les (1995)::Drama",
    "12::Never rated (1990)::Comedy",
]
RATINGS = [
    *("1::10::5::978300760", "1::1::3::978300760", "1::2::3::978300000"),
    *("2::11::4::978299000", "2::1::4::978299001"),
]


def write_movielens(folder, ratings=RATINGS):
    folder.mkdir(parents=True)
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    (folder / "movies.dat").write_text("\n".join(MOVIES), encoding="latin-1")
    (folder / "ratings.dat").write_text("\n".join(ratings))


@pytest.fixture
def manual(tmp_path, offline):
    """A manual folder with ml-1m.zip alone."""
    write_movielens(tmp_path / "ml-1m")
    return zipped(tmp_path / "ml-1m", tmp_path / "manual")


def zipped(folder, manual):
    manual.mkdir(exist_ok=True)
    with zipfile.ZipFile(manual / "ml-1m.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"ml-1m/{path.name}")
    return manual


def assert_is_movielens(dataset):
    assert dataset.items.to_pylist() == [
        {"item_id": "1", "title": "Toy Story (1995)", "categories": ["Animation", "Children's", "Comedy"]},
        {"item_id": "2", "title": "Jumanji (1995)", "categories": ["Adventure"]},
        {"item_id": "10", "title": "GoldenEye (1995)", "categories": ["Action", "Thriller"]},
        {"item_id": "11", "title": "Misérables, Les (1995)", "categories": ["Drama"]},
    ]
    assert dataset.users.to_pylist() == ["1", "2"]
    assert dataset.item_ids.take(dataset.item).to_pylist() == ["2", "10", "1", "11", "1"]  # 10 before 1: file order
    assert dataset.time.tolist() == [978300000, 978300760, 978300760, 978299000, 978299001]


def test_movielens_archive(manual, tmp_path):
    dataset = read_movielens(manual_dir=manual, data_dir=tmp_path / "data", checksums={})
    assert_is_movielens(dataset)
    assert dataset.source["sha256"] == {"ml-1m.zip": sha256(manual / "ml-1m.zip")}


def test_movielens_folder(tmp_path, offline):
    write_movielens(tmp_path / "manual" / "ml-1m")
    folders = {"manual_dir": tmp_path / "manual", "data_dir": tmp_path / "data"}
    dataset = read_movielens(**folders)
    assert_is_movielens(dataset)
    assert dataset.source["sha256"].keys() == {"ml-1m/ratings.dat", "ml-1m/movies.dat"}
    (tmp_path / "manual" / "ml-1m" / "ratings.dat").write_text(RATINGS[0])
    with pytest.raises(SemidError, match=r"1m-items.*prepared from ml-1m/ratings.dat: expected .*; remove that folder"):
        read_movielens(**folders)


def test_movielens_archive_is_the_published_one(manual, tmp_path):
    with pytest.raises(SemidError, match=r"ml-1m.zip: expected a file of sha256 a6898adb\w+, got"):
        read_movielens(manual_dir=manual, data_dir=tmp_path / "data")


def test_movielens_damage(manual, tmp_path):
    write_movielens(tmp_path / "bad" / "ml-1m", [*RATINGS, "2::1::4"])
    folders = {"manual_dir": zipped(tmp_path / "bad" / "ml-1m", manual), "data_dir": tmp_path / "data"}
    with pytest.raises(SemidError, match=r"ml-1m/ratings.dat, line 6: ValueError: not enough values"):
        read_movielens(**folders, checksums={})
    (manual / "ml-1m.zip").write_bytes(b"no archive")
    with pytest.raises(SemidError, match=r"ml-1m.zip: not a zip archive"):
        read_movielens(**folders, checksums={})
    with zipfile.ZipFile(manual / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/movies.dat", MOVIES[0])
    with pytest.raises(SemidError, match=r"ml-1m.zip: no ml-1m/ratings.dat in it"):
        read_movielens(**folders, checksums={})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a &lt; b &amp; c", "a < b & c"),
        ("<b class='x'>Tea</b>\n\tpot", "Tea pot"),
        ("3 < 4 > 2", "3 < 4 > 2"),
        ("half \ud83c of a \N{CHERRIES}", "half of a \N{CHERRIES}"),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


def test_tensorflow_is_not_needed(manual, tmp_path):
    read_movielens(manual_dir=manual, data_dir=tmp_path / "data", checksums={})
    assert "tensorflow" not in sys.modules
