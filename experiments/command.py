"""The commands of `python -m experiments`: run experiments by name, with changes to their fields; list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.budgets import Budget
from experiments.data import stored_dataset, twin_name, world_of
from experiments.experiment import Experiment, chosen, experiments
from experiments.measurement import measured
from experiments.provenance import code
from experiments.runner import Runner
from experiments.table import print_results
from semid.artifacts import try_file
from semid.cli.choices import Ties
from semid.data import SourceOrder
from semid.training import join_processes, on_first


@dataclass(frozen=True)
class Options:
    """Data, folder and size of the runs."""

    dataset: Path | None = None
    """Dataset folder of `semid prepare`, or a folder that `experiments.layout` reads; none given: a simulated world per
    seed."""
    out: Path | None = None
    """Folder for all results; none given: runs/ and the dataset's name."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each is a run of everything that is trained."""
    budget: Budget = Budget.FULL
    """The full experiment, its share of epochs for CPUs, or a few steps of tiny models."""
    ties: Ties = SourceOrder()
    """Order of a user's interactions of equal time: that of the source, or random by a seed (0 if none is given)."""

    @property
    def folder(self) -> Path:
        """Folder for all results, checked to be writable."""
        name = twin_name(self.dataset.resolve().name if self.dataset else "simulated", self.ties)
        name += "" if self.budget is Budget.FULL else f"_{self.budget.value}"
        return try_file((self.out or Path("runs") / name) / "results.json").parent


@dataclass(frozen=True)
class _Command:
    options: Annotated[Options, tyro.conf.arg(name="")]
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def run(names: Sequence[str], words: Sequence[str]) -> None:
    """Run the experiments of these names, with fields changed by the words of a command line."""
    known, named = dict(experiments()), chosen(names)
    options = Options()
    for name in named:
        options, known[name] = parsed(name, known[name], words)
    run_all(named, options, known)


def parsed(name: str, experiment: Experiment, words: Sequence[str]) -> tuple[Options, Experiment]:
    """Options, and the experiment with the fields changed by the words."""
    found = tyro.cli(
        _Command,
        args=list(words),
        default=_Command(Options(), experiment),
        prog=f"python -m experiments {name}",
        description=f"{experiment.title}. {experiment.paper}",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
    )
    return found.options, found.experiment


def run_all(names: Sequence[str], options: Options, known: Mapping[str, Experiment]) -> list[dict[str, Any]]:
    """Train and measure each experiment for each seed, skipping what is finished; return all results."""
    join_processes()
    code()  # cached now, before anything else is committed
    out, results = options.folder, []
    for seed in options.seeds:
        path = out / ("dataset" if options.dataset else f"dataset_{seed}")
        world = world_of(seed, small=options.budget is Budget.SMOKE)
        data = stored_dataset(options.dataset, path, world=world, ties=options.ties)
        runner = Runner(known, data, out, seed=seed, budget=options.budget)
        for name in names:
            runner.check(name)
        for name in names:
            results.append(measured(runner.run(name), data, budget=options.budget.value))
            on_first(lambda: print_results(results[-1]))
    return results


def print_list() -> None:
    """Print name, minutes, datasets, expected figure and paper of every experiment."""
    rows = [("name", "minutes", "datasets", "expected", "paper")]
    for name, one in experiments().items():
        minutes = "" if one.minutes is None else f"{one.minutes:g}"
        rows.append((name, minutes, " ".join(one.datasets), one.expected, one.paper))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
