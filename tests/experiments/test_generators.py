"""A pulse: the families of generators side by side, on a tiny folder of the layout they read, for a few steps."""

import json

from experiments import generators


def test_every_family_has_its_row(layout, tiny, tmp_path, capsys):
    generators.main(layout, tmp_path / "run", budget=0.1, steps=2)
    written = json.loads((tmp_path / "run" / "generators.json").read_text())
    assert [row["model"] for row in written["rows"]] == list(generators.FAMILIES)
    for row in written["rows"]:
        assert 0 <= row["recall@10"] <= 1
        assert min(row["users a second"], row["targets a second"], row["training minutes"]) > 0
    assert capsys.readouterr().out.count("| encoder-decoder | 0 |") == 1
