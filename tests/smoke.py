"""A pulse of experiments: a few steps of tiny models on one small simulated world, the first of each kind measured."""

import numpy as np

from experiments.budgets import Budget
from experiments.data import stored_dataset, world_of
from experiments.experiment import Baseline, experiments
from experiments.measurement import measured
from experiments.runner import Runner
from semid.catalog import SemanticCatalog
from semid.config import to_dict
from semid.data import SourceOrder
from semid.joint import JointConfig
from semid.tokenizers import tokenize
from seq_models import Capacity

# Experiments end to end, and those that read vectors of one.
END_TO_END = [
    name
    for name, one in experiments().items()
    if any(isinstance(experiments()[need].model, JointConfig) for need in (name, *one.columns.values()))
]


def roomy(from_codes):
    """`CodeTrie.from_codes` with room for any codes of as many items: tries of equal level sizes share programs."""

    def build(codes, level_sizes, *, capacity=None, **options):
        most = tuple(min(size, len(codes)) for size in level_sizes)
        leaf_items = 1 if len(np.unique(codes, axis=0)) == len(codes) else len(codes)
        return from_codes(codes, level_sizes, capacity=capacity or Capacity(len(codes), most, leaf_items), **options)

    return build


class Smoke:
    """Runs of a file of tests, in one folder: they share the world, the teachers, the graph, the codes that are the
    same, and most programs, as all codes of one shape become those of the first tokenizer that makes it."""

    def __init__(self, out):
        self.out = out
        data = stored_dataset(None, out / "dataset_0", world=world_of(0, small=True), ties=SourceOrder())
        self.runner = Runner(experiments(), data, out, seed=0, budget=Budget.SMOKE)
        self._codes: dict[tuple[int, ...], SemanticCatalog] = {}
        self._measured = set()

    def tokenize(self, *given, **options):
        """Codes of a tokenizer that was trained, or those of the first of this shape."""
        made = tokenize(*given, **options)
        return self._codes.setdefault(made.level_sizes[: len(made.level_sizes) - made.tie_break], made)

    def run(self, name):
        """Train an experiment and what it needs; the first of each kind of model is measured."""
        run = self.runner.run(name)
        model = run.experiment.model
        if not isinstance(model, Baseline):
            assert run.made[name]["model"]["minutes"] > 0
            assert set(run.experiment.needs) <= set(run.made)
        kind = model if isinstance(model, Baseline) else type(getattr(model, "model", model))
        if kind not in self._measured:
            self._measured.add(kind)
            self._measure(run)

    def _measure(self, run):
        result = measured(run, self.runner.data, budget="smoke")
        mixed = [f"{run.name} + graph"] if run.experiment.graph else []
        assert list(result["rows"]) == [run.name, *mixed]
        for row in result["rows"].values():
            for split in ("validation", "test"):
                assert all(0 <= row[split][seen]["recall@10"] <= 1 for seen in ("included", "excluded"))
            assert len(row["recall@10"]) == self.runner.data.num_users
        about = result["provenance"]
        assert (about["budget"], about["changed"], about["config"]) == ("smoke", "", to_dict(run.experiment))
        assert about["stages"] == run.made
