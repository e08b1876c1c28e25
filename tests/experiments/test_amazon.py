"""A pulse: the real main, on a tiny folder of the layout it reads, for a couple of steps."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import amazon
from experiments.results import stored_dataset
from semid.data import ShuffledTies
from semid.data.simulated import SimulatedConfig
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
    shuffled = amazon.folder_of("amazon", None, layout, ties=ShuffledTies(2))
    assert shuffled.parts[-3:] == ("runs", "amazon", "tiny_shuffled_by_seed_2")


def test_datasets_of_two_tie_rules_do_not_meet(layout, tmp_path):
    def stored(source, name, **ties):
        return stored_dataset(source, tmp_path / name, SimulatedConfig(images=False), **ties)

    path = layout / "interactions.parquet"
    pq.write_table(pq.read_table(path).append_column("rel_time", [[0] * 240]), path)
    plain, shuffled = stored(layout, "plain"), stored(layout, "shuffled", ties=ShuffledTies(2))
    assert sorted(plain.item.tolist()) == sorted(shuffled.item.tolist())
    assert plain.digest != shuffled.digest
    with pytest.raises(SemidError, match=r"plain: in use by a dataset of other settings \(ties: None -> "):
        stored(layout, "plain", ties=ShuffledTies(2))
    prepared = tmp_path / "shuffled"
    assert stored(prepared, "copy").ties == stored(prepared, "copy", ties=ShuffledTies(2)).ties == ShuffledTies(2)
    with pytest.raises(SemidError, match="shuffled: ties are shuffled by seed 2; prepare it with --ties"):
        stored(prepared, "other", ties=ShuffledTies(3))
    with pytest.raises(SemidError, match="simulated: ties are in source order; prepare it with --ties"):
        stored(None, "world", ties=ShuffledTies())
