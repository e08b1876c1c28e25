"""A pulse: the families of generators side by side, on a tiny folder of the layout they read, for a few steps."""

import json

import pytest

from experiments import generators


@pytest.mark.filterwarnings("ignore:48 items cannot fill", "ignore:level . has . codes", "ignore:level . has .. codes")
def test_every_family_has_its_row(layout, tmp_path, capsys):
    generators.main(layout, tmp_path / "run", budget=0.1)
    written = json.loads((tmp_path / "run" / "generators.json").read_text())
    assert [row["model"] for row in written["rows"]] == list(generators.FAMILIES)
    for row in written["rows"]:
        assert 0 <= row["recall@10"] <= 1
        assert min(row["users a second"], row["targets a second"], row["training minutes"]) > 0
    assert capsys.readouterr().out.count("| encoder-decoder | 0 |") == 1
