"""The benchmark of input memory in small: one process, in this one."""

import json

from experiments.benchmarks import training_input


def test_a_process_says_what_it_holds(tmp_path):
    training_input._dataset(400, 20).save(tmp_path / "data")
    training_input._work(tmp_path)
    figures = json.loads((tmp_path / "0.json").read_text())
    assert list(figures) == ["libraries", "data", "rows", "teacher", "batches"]
    assert all(0 < memory["RssAnon"] <= memory["VmHWM"] for memory in figures.values())
