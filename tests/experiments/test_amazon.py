"""A pulse: the real main, on a tiny folder of the layout it reads, for a couple of steps."""

import json
import shutil

import numpy as np
import pytest

from experiments import amazon
from semid.errors import SemidError


def test_two_steps_of_everything(layout, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    amazon.main(layout, out, seeds=(0,), beam_size=50, budget=0.05, ablations=True)
    written = json.loads((out / "metrics.json").read_text())
    models = [row["model"] for row in written["rows"]]
    trained = ["sasrec-text", "semid-text", "semid-hybrid", "sasrec-text-repeats", "semid-hybrid-untaught"]
    mixed = [name for one in trained for name in (one, f"{one} + graph")]
    rows = ["item-graph", *mixed[:6], "item-graph-counts", *mixed[6:], "popularity", "bigram"]
    assert models == rows * 2
    assert all(0 <= row["recall@10"] <= 1 for row in written["rows"])
    assert [row.get("seen") for row in written["rows"]] == [None] * len(rows) + ["excluded"] * len(rows)
    assert set(json.loads((out / "minutes_0.json").read_text())) == {
        *("codes-text", "codes-hybrid", "item-graph", "item-graph-counts"),
        *trained,
    }
    assert "semid-hybrid + graph - item-graph" in json.loads((out / "seeds.json").read_text())["comparisons"]
    assert "| semid-hybrid | 0." in capsys.readouterr().out


def test_another_dataset_or_budget_in_the_same_folder_is_refused(layout, tiny, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "semid")
    out = tmp_path / "run"
    amazon.main(layout, out, seeds=(0,), beam_size=50, budget=0.05)
    first = (out / "metrics.json").read_text()
    caplog.clear()
    amazon.main(layout, out, seeds=(0,), beam_size=50, budget=0.05)  # control: nothing is made or measured again
    assert caplog.text.count("skipped") == 7  # the dataset, the graph, two catalogues and three models
    assert json.loads((out / "metrics.json").read_text())["rows"] == json.loads(first)["rows"]
    other = shutil.copytree(layout, tmp_path / "other" / layout.name)
    vectors = np.load(other / "text_minilm_f16.npy")
    np.save(other / "text_minilm_f16.npy", vectors[::-1])
    with pytest.raises(SemidError, match=r"in use by a dataset of other settings \(source.sha256.text_minilm_f16.npy"):
        amazon.main(other, out, seeds=(0,), beam_size=50, budget=0.05)
    with pytest.raises(SemidError, match=r"in use by a model of other settings \(generator.training.epochs"):
        amazon.main(layout, out, seeds=(0,), beam_size=50, budget=0.1)
    with pytest.raises(SemidError, match=r"the result of another request \(beam_size: 50 -> 49\)"):
        amazon.main(layout, out, seeds=(0,), beam_size=49, budget=0.05)


def test_results_are_named_after_the_dataset(layout):
    assert amazon.folder_of("amazon", None, layout).parts[-3:] == ("runs", "amazon", "tiny")
    assert amazon.folder_of("amazon", tmp := layout / "elsewhere", layout) == tmp
