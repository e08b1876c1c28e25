"""Figures of compiled programs, kept in a file and shown on a page."""

import json

from experiments.benchmarks import accelerators
from experiments.benchmarks.accelerators import Case, main
from semid.generators import GeneratorConfig, ProgramSizes
from semid.training import MeshConfig, TrainingConfig
from seq_models import DenseConfig, TransformerConfig

TINY = ProgramSizes(items=64, users=8, beam_size=4)
CONFIG = GeneratorConfig(
    model=DenseConfig(TransformerConfig(8, layers=1, hidden=8, dropout=0.1)),
    max_history=4,
    row_length=4,
    training=TrainingConfig(batch_size=8),
)


def test_what_is_compiled_is_kept_and_shown(tmp_path, monkeypatch):
    sizes = "cpu", MeshConfig(fsdp=2), CONFIG, TINY
    cases = [Case("step", *sizes), Case("search", *sizes, trace=accelerators._search)]
    long = Case("long", *sizes, table="lengths", plain=True)
    monkeypatch.setattr(accelerators, "_cases", lambda: cases)
    monkeypatch.setattr(accelerators, "_lengths", lambda: [long])
    begin, end, lengths = (f"<!-- {name} -->" for name in ("table: begin", "table: end", "lengths: begin"))
    out, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n{lengths}\n<!-- lengths: end -->\n")
    main(out, page)
    figures = json.loads(out.read_text())
    assert list(figures) == [case.name for case in (*cases, long)]
    assert (figures[cases[0].name]["bound"], "state" in figures[cases[1].name]) == (None, False)
    before, table, after = page.read_text().partition(lengths)[0].replace(end, begin).split(begin)
    assert (before, after, "old" in table) == ("before\n", "\nafter\n", False)
    assert long.name in page.read_text().partition(lengths)[2]
    assert [line.split(" | ")[0] for line in table.strip().splitlines()[2:]] == [f"| {case.name}" for case in cases]
    monkeypatch.setattr(accelerators, "_needs", None)  # what is in the file is not compiled again
    main(out, page)
