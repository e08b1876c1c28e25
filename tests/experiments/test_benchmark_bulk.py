"""The benchmark of bulk tokenization in small: its figures, and the plot of them."""

import xml.etree.ElementTree as ET

import pytest

from experiments.benchmarks import bulk


def test_a_small_catalogue_is_measured_and_drawn(tmp_path):
    paths = bulk.write_files(tmp_path / "files", 70, 40, "float16")
    catalog = bulk.write_tokenizer(tmp_path / "tokenizer")
    found = bulk.measure(catalog, paths, tmp_path / "work", 0)
    assert {path.name for path in tmp_path.iterdir()} == {"files", "tokenizer"}  # what was measured with is gone
    assert found["GB"] == pytest.approx(sum(path.stat().st_size for path in paths) / 1e9)
    bulk.draw({70: found, 700: found}, tmp_path / "bulk.svg")
    tree = ET.parse(tmp_path / "bulk.svg")
    name = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f"{name}polyline")) == 3
    assert {"70", "700", "read", "encode", "catalogue"} <= {text.text for text in tree.findall(f"{name}text")}
