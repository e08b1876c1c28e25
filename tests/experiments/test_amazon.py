"""A pulse: the real main, on a tiny folder of the layout it reads, for a couple of steps."""

import json

from experiments import amazon


def test_two_steps_of_everything(layout, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    amazon.main(layout, out, seeds=(0,), beam_size=50, budget=0.05)
    written = json.loads((out / "metrics.json").read_text())
    models = [row["model"] for row in written["rows"]]
    trained = ["sasrec", "sasrec-text", "semid-text", "semid-hybrid"]
    assert models == [*trained, "popularity", "bigram"] * 2
    assert all(0 <= row["recall@10"] <= 1 for row in written["rows"])
    assert [row.get("seen") for row in written["rows"]] == [None] * 6 + ["excluded"] * 6
    assert set(json.loads((out / "minutes_0.json").read_text())) == {"codes-text", "codes-hybrid", *trained}
    assert "semid-hybrid - semid-text" in json.loads((out / "seeds.json").read_text())["comparisons"]
    assert "| semid-hybrid | 0." in capsys.readouterr().out
