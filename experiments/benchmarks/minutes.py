"""Minutes of training until validation Recall@10 passes a mark: semid's families and T5 of the same codes."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from experiments.benchmarks.paired_timing import (
    Ask,
    Turn,
    give_examples,
    new_peer,
    peer,
    peer_steps,
    semid_order,
    semid_steps,
    take_turns,
)
from experiments.configs import families as configs
from semid import Dataset, GeneratorConfig, SemanticCatalog, train
from semid.artifacts import try_file, write_json
from semid.catalog import CATALOG_FILE
from semid.data import Examples
from semid.errors import SemidError
from semid.evaluation import accuracy, group_ids, item_places
from semid.generators import content_features, training_counts, training_rows
from semid.recommender import ModelSpec
from semid.training import HISTORY, SingleRows, read_history
from seq_models import EncoderDecoderConfig

FAMILIES: dict[str, GeneratorConfig] = {
    name: one.model for name, one in configs.config().items() if isinstance(one.model, GeneratorConfig)
}
PEER = EncoderDecoderConfig(configs.BACKBONE)  # whose sizes T5 has
QUALITIES = (0.05, 0.06)


def minutes(
    out: Path,
    generators: Path = Path("runs/families"),
    peer_python: Path | None = None,
    learning_rates: tuple[float, ...] = (3e-3, 1e-3, 1e-2),
    epochs: tuple[float, ...] = (6.0,),
    looks: int = 12,
    at_once: int = 64,
    rounds: int = 7,
    steps: int = 20,
    families: tuple[str, ...] = ("rq-transformer", "encoder-decoder"),
) -> None:
    """Training minutes until validation Recall@10 passes each mark.

    A training minute is steps times the median time of a step, measured in alternating rounds before anything is
    trained: neither validation nor what else the machine does is counted. Ours are read from a finished run of
    `python -m experiments families` and trained once more on codes alone, which is all that T5 reads. The same users
    are asked, with the beams of `GeneratorConfig.validation_beam`; T5's lists are those of `generate` under `mask`.

    Args:
        out: Folder for all results; training resumes from the last validation there.
        generators: Folder of `python -m experiments families`: dataset, catalogue, histories of training.
        peer_python: Python with torch and transformers; none given: semid alone.
        learning_rates: T5's peak learning rates, one training each.
        epochs: T5's schedules, one training each.
        looks: Validations per training of T5.
        at_once: Users per call of `generate`.
        rounds: Rounds of measuring steps; 0: times are read from an earlier run.
        steps: Steps per contender and round.
        families: Families of semid to measure.
    """
    out = try_file(out / "minutes.json").parent
    out.mkdir(parents=True, exist_ok=True)
    data, catalog = Dataset.load(generators / "dataset"), _catalog(generators)
    theirs = FAMILIES["encoder-decoder"]
    rows = SingleRows(data.splits.train, max_history=theirs.max_history)
    ours, folders = {}, {}
    for family in families:
        ours[family], folders[family] = FAMILIES[family], generators / f"families.{family}_0" / "model"
        name = f"{family}, codes alone"
        ours[name], folders[name] = replace(FAMILIES[family], features=()), out / f"{family}-codes"
    with peer(peer_python, catalog.codes, catalog.level_sizes, search=True) as ask:
        if rounds:
            write_json(out / "seconds.json", _step_seconds(ours, data, catalog, rows, ask, rounds, steps))
        seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
        found: list[dict[str, Any]] = []
        for name, config in ours.items():
            if folders[name].parent == out:
                train(data, catalog, config, out=folders[name])
            found.append(_figures(name, read_history(folders[name] / HISTORY), seconds[name]))
            _report(found, out)
        if ask is None:
            return
        for peak, length in itertools.product(learning_rates, epochs):
            total = round(length * -(-len(rows) // theirs.training.batch_size))
            fit = _PeerFit(f"peer, rate {peak:g}, {length:g} epochs", peak, total, looks, at_once)
            found.append(_figures(fit.name, fit.run(ask, data, catalog, rows, theirs, out), seconds["peer"]))
            _report(found, out)


def _catalog(generators: Path) -> SemanticCatalog:
    """The catalogue that the families of a finished run share."""
    folders = [file.parent for file in generators.glob(f"shared/*/{CATALOG_FILE}")]
    if len(folders) != 1:
        raise SemidError(f"{generators}: expected one catalogue in shared/, found {len(folders)}; run families alone")
    return SemanticCatalog.load(folders[0])


@dataclass(frozen=True)
class _PeerFit:
    """One training of T5 with some validations; it resumes from the last one."""

    name: str
    learning_rate: float
    num_steps: int
    looks: int
    at_once: int

    def run(
        self, ask: Ask, data: Dataset, catalog: SemanticCatalog, rows: SingleRows, config: GeneratorConfig, out: Path
    ) -> list[dict[str, float]]:
        """Metrics of each validation."""
        home = out / self.name.replace(",", "").replace(" ", "-")
        home.mkdir(exist_ok=True)
        batch, parts = config.training.batch_size, config.training.accumulate
        new_peer(ask, "fit", PEER, learning_rate=self.learning_rate, num_steps=self.num_steps, accumulate=parts)
        give_examples(ask, rows, ["fit"], order=semid_order(rows, batch_size=batch, num_batches=self.num_steps))
        examples = _validation_examples(data, config)
        history, real = examples.histories.padded(config.max_history)
        np.savez(home / "question.npz", history=history, real=real)
        state, log = home / "state.pt", home / HISTORY
        step = ask("restore", name="fit", file=str(state))["step"] if state.exists() else 0
        done = [record for record in read_history(log) if record["step"] <= step] if step else []
        for look in range(len(done) + 1, self.looks + 1):
            until = round(self.num_steps * look / self.looks)
            trained = ask("steps", name="fit", batch=config.training.batch_size, steps=until - step)
            step = until
            searched = self._search(ask, home, config.validation_beam)
            places = item_places(np.load(home / "found.npy"), examples.targets, group_ids(catalog.codes))
            values = {f"validation/{k}": float(v.mean()) for k, v in accuracy(places, (10,)).items()}
            done.append({"step": step, **values, **trained, "validation seconds": searched})
            print(self.name, done[-1], flush=True)
            log.write_text("".join(json.dumps(record) + "\n" for record in done), encoding="utf-8")
            ask("save", name="fit", file=str(state))
        return done

    def _search(self, ask: Ask, home: Path, beam_size: int) -> float:
        return ask(
            "search",
            name="fit",
            file=str(home / "question.npz"),
            out=str(home / "found.npy"),
            beam_size=beam_size,
            results=10,
            at_once=self.at_once,
            constraint="mask",
        )["seconds"]


def _validation_examples(data: Dataset, config: GeneratorConfig) -> Examples:
    """The validation examples that `train` uses with seed 0."""
    examples = data.splits.examples("validation")
    if len(examples) <= config.validation_users:
        return examples
    return examples.take(np.random.default_rng(0).permutation(len(examples))[: config.validation_users])


def _step_seconds(
    ours: dict[str, GeneratorConfig],
    data: Dataset,
    catalog: SemanticCatalog,
    rows: SingleRows,
    ask: Ask | None,
    rounds: int,
    steps: int,
) -> dict[str, float]:
    """The median time of a training step of every contender, on the real examples."""
    turns: dict[str, Turn] = {}
    for name, config in ours.items():
        features, counts = content_features(data, config.features), training_counts(data)
        width = 0 if features is None else features.shape[1]
        spec = ModelSpec(config.model, catalog.level_sizes, len(catalog), width, config.max_history)
        of_family = training_rows(data, config, spec.build(seed=0).layout)
        turns[name] = semid_steps(config, of_family, catalog.codes, catalog.level_sizes, features, counts)
    if ask:
        config = FAMILIES["encoder-decoder"]
        batch = config.training.batch_size
        new_peer(ask, "peer", PEER, accumulate=config.training.accumulate)
        order = semid_order(rows, batch_size=batch, num_batches=(rounds + 1) * steps)
        give_examples(ask, rows, ["peer"], order=order)
        turns["peer"] = functools.partial(peer_steps, ask, "peer", batch)
    seconds = take_turns({name: functools.partial(turn, steps) for name, turn in turns.items()}, rounds)
    return {name: float(np.median(times)) / steps for name, times in seconds.items()}


def _figures(name: str, records: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """Validations as (training minutes, Recall@10), and the first minute beyond each mark."""
    looks = [(r["step"] * seconds / 60, r["validation/recall@10"]) for r in records if "validation/recall@10" in r]
    return {
        "model": name,
        "seconds a step": seconds,
        "training minutes": looks[-1][0],
        "validation recall@10": max(value for _, value in looks),
        **{f"minutes to {mark}": next((at for at, value in looks if value > mark), None) for mark in QUALITIES},
        "looks": looks,
    }


def _report(found: list[dict[str, Any]], out: Path) -> None:
    write_json(out / "minutes.json", {"rows": found})
    print({name: value for name, value in found[-1].items() if name != "looks"}, flush=True)
    plot = go.Figure(
        [go.Scatter(x=x, y=y, name=row["model"]) for row in found for x, y in [zip(*row["looks"], strict=True)]],
        layout={"xaxis": {"title": "training minutes", "type": "log"}, "yaxis": {"title": "validation Recall@10"}},
    )
    plot.write_html(out / "minutes.html")
