"""The value of end-to-end training: the recommendation loss reaches the tokenizer, and the encoders, or neither.

    python -m experiments.end_to_end --out runs/end_to_end --seeds 0 1 2 3 4                  # the simulated catalogue
    python -m experiments.end_to_end --dataset ../shared/data/ml1m --out runs/end_to_end_ml1m

Items are encoded from what one can read and see of them: a SentencePiece vocabulary of the catalogue's own texts with a
small transformer, and a small vision transformer on the pictures, if there are any. The arms share their first stages
(encoders by contrast of consecutive items, RQ-VAE on their vectors, generator on its codes) and their last (the
generator alone); between them come, the generator's epochs being as many in all,

    staged        nothing: the last stage gets these epochs
    joint         joint steps whose recommendation loss reaches the tokenizer, codes refreshed; the encoders are frozen
    end-to-end    joint steps whose recommendation loss reaches the encoders, codes held; then tokenizer and generator
                  are trained again on the updated vectors
    stopped       the same stages, gradients stopped at the encoders
    no-window     end-to-end by a contrastive term on the target's side: no history is encoded in the step (as in LEMUR)
    half          end-to-end, half of a step's items encoded
    sampled       end-to-end, a fifth of them
    moving        the recommendation loss reaches tokenizer and encoders, codes refreshed, nothing trained again

Leave-one-out, 20-item histories, item level, full catalogue, beam 50; checkpoints are chosen by validation NDCG@10,
test is read once.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.results import folder_of, stored_dataset
from quantizers import Schedule
from semid import Dataset, SemanticCatalog
from semid.artifacts import read_json, write_json
from semid.data.simulated import SimulatedConfig
from semid.encoders import (
    BlocksConfig,
    ImageConfig,
    ImageFromScratch,
    PretrainedText,
    TextEncoderConfig,
    TextFromScratch,
)
from semid.evaluation import evaluate
from semid.generators import GeneratorConfig, train
from semid.joint import (
    TEACHER_TERMS,
    JointConfig,
    Objective,
    Phase,
    Reach,
    Refresh,
    Relaxation,
    StepConfig,
    Surgery,
    train_end_to_end,
)
from semid.recommender import Recommender
from semid.stage import run_recorded
from semid.tokenizers import RQVaeConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import DenseConfig, RQTransformerConfig, TransformerConfig

FIGURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
WORLD = SimulatedConfig(num_items=1_000, num_users=4_000, family_size=1.0)
VOCABULARY, MAX_LENGTH, PRETRAINED_LENGTH = 1000, 48, 64
BLOCKS = BlocksConfig(dim=32, layers=1, heads=2, hidden=64)


def _training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, validate_every=epochs / 4, optimizer=optimizer)


# The tokenizer is held in joint steps and trained again after them: its own losses would only hold the encoders back.
TOGETHER = StepConfig(Objective.only(generation=Schedule(1.0)))
BACKBONE = TransformerConfig(dim=64, layers=2, heads=2, hidden=128, dropout=0.1)
END_TO_END = JointConfig(
    encoder=_training(3, 256, 2e-3),
    tokenizer=RQVaeConfig(level_sizes=(64, 64, 64), hidden=(64,), latent=32),
    generator=GeneratorConfig(RQTransformerConfig(BACKBONE), training=_training(24, 64, 3e-3)),
    joint=(Phase(_training(4, 256, 1e-3, autoencoder=0.0), TOGETHER),),
    finetune=_training(16, 64, 1e-3),
)

# Real catalogues are larger, their histories more: larger codebooks, fewer passes.
REAL = replace(
    END_TO_END,
    encoder=_training(1, 256, 2e-3),
    tokenizer=RQVaeConfig(hidden=(256, 128)),
    joint=(Phase(_training(2, 256, 1e-3, autoencoder=0.0), TOGETHER),),
    tie_break=256,
)

# What a term weighs that is off by default, where it is tried; the first four train a tokenizer.
OFF = {
    "reconstruction": 1.0,
    "codebook": 1.0,
    "commitment": 0.25,
    "entropy": 1e-4,
    "contrast": 0.1,
    "sequence_item": 1e-3,
    "preference": 1e-2,
    "teacher_codes": 1e-2,
    "teacher_states": 0.1,
}
TEACHER = GeneratorConfig(
    model=DenseConfig(TransformerConfig(dropout=0.4)), features=(), training=_training(30, 16, 2e-3)
)


def arms(config: JointConfig) -> dict[str, JointConfig]:
    """Arms to compare with the end-to-end `config`, with as many epochs in all."""
    (phase,) = config.joint

    def with_step(**changes: Any) -> JointConfig:
        return replace(config, joint=(replace(phase, step=replace(phase.step, **changes)),))

    def with_term(**weights: float) -> JointConfig:
        terms = {name: Schedule(weight) for name, weight in weights.items()}
        return with_step(objective=replace(phase.step.objective, **terms))

    def longer(epochs: float) -> TrainingConfig:
        return replace(config.finetune, epochs=config.finetune.num_epochs + epochs)

    def moving(encoder: float, reach: Reach, surgery: Surgery = Surgery.NONE) -> JointConfig:
        """The tokenizer learns in joint steps too; codes are refreshed, and nothing is trained again."""
        rates = (("autoencoder", 0.03), ("encoder", encoder))
        training = replace(phase.training, optimizer=replace(phase.training.optimizer, rates=rates))
        steps = Phase(training, StepConfig(reach=reach), surgery)
        return replace(config, joint=(steps,), codes=Refresh(0.25), finetune=longer(again))

    again, together = config.generator.training.num_epochs, phase.training.num_epochs
    made = {
        "staged": replace(config, joint=(), finetune=longer(again + together)),
        "joint": moving(0.0, Reach.TOKENIZER),
        "end-to-end": config,
        "stopped": with_step(reach=Reach.TOKENIZER),
        "no-window": with_step(window=0, objective=replace(phase.step.objective, contrast=Schedule(OFF["contrast"]))),
        "half": with_step(forward=0.5, backward=0.5),
        "sampled": with_step(forward=0.2, backward=0.2),
        "straight-through": with_step(relaxation=Relaxation.STRAIGHT_THROUGH),
        "moving": moving(0.1, Reach.ENCODER),
        "surgery": moving(0.1, Reach.ENCODER, Surgery.PROJECT),
    }
    return made | {f"with {term}": with_term(**{term: weight}) for term, weight in OFF.items()}


def encoders(dataset: Dataset, *, weights: Path | None = None) -> dict[str, Any]:
    """Encoders of the items' texts and pictures, from scratch; with `weights`, the folder of a pretrained transformer,
    side adapters read its states of the texts."""
    scratch = TextFromScratch(TextEncoderConfig(BLOCKS, max_length=MAX_LENGTH), vocabulary=VOCABULARY)
    text = PretrainedText(str(weights), max_length=PRETRAINED_LENGTH) if weights else scratch
    image = ImageFromScratch(ImageConfig(size=32, patch=8, blocks=BLOCKS))
    return {"text": text, "image": image if "image" in dataset.items.column_names else None}


def main(
    dataset: Path | None = None,
    out: Path | None = None,
    chosen: tuple[str, ...] = ("staged", "joint", "end-to-end"),
    seeds: tuple[int, ...] = (0,),
    budget: float = 1.0,
    weights: Path | None = None,
    warm: bool = True,
) -> None:
    """Train and evaluate every arm, print a table and write `end_to_end.json`.

    Args:
        dataset: Folder that `experiments.layout` reads; none given: simulated worlds, one per seed.
        out: Folder for all results, where what is finished is skipped; none given: runs/end_to_end/ and the dataset's
            name.
        chosen: Which arms, of those that `arms()` makes.
        seeds: One run of each arm for each.
        budget: Factor on all numbers of epochs but those of the tokenizer alone.
        weights: Folder of a pretrained text encoder, as Hugging Face lays it out; side adapters read it.
        warm: Train the encoders first, by contrast of consecutive items; else they start as they are.
    """
    out = folder_of("end_to_end", out, dataset)
    for seed in seeds:
        world = replace(WORLD, seed=seed)
        data = stored_dataset(dataset, out / ("dataset" if dataset else f"dataset_{seed}"), world)
        for name in chosen:
            config = _scaled(arms(REAL if dataset else END_TO_END)[name], budget)
            config = config if warm else replace(config, encoder=None)
            model = _trained(name, config, data, out, seed=seed, weights=weights)
            request = {"arm": name, "seed": seed, "model": model.digest, "dataset": data.digest}
            file = out / "measured" / f"{_file(name)}_{seed}.json"
            row = run_recorded(request, file, functools.partial(_row, model, data))
            print({"arm": name, "seed": seed, **row}, flush=True)
    records = [read_json(file) for file in sorted((out / "measured").glob("*.json"))]
    rows = [{name: record["request"][name] for name in ("arm", "seed")} | record["result"] for record in records]
    order = list(arms(END_TO_END))
    rows.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    write_json(out / "end_to_end.json", {"rows": rows})
    print(_table(rows))


def _file(arm: str) -> str:
    return arm.replace(" ", "-")


def _row(model: Recommender, data: Dataset) -> dict[str, float]:
    found = evaluate(model, data, split="test", ks=(5, 10), beam_size=50).values
    return {figure: found[figure] for figure in FIGURES}


def _trained(
    name: str, config: JointConfig, data: Dataset, out: Path, *, seed: int, weights: Path | None
) -> Recommender:
    """The model of one arm; arms of one seed share their first stages."""
    options: dict[str, Any] = encoders(data, weights=weights) | {"shared": out / f"shared_{seed}"}
    if _teacher_terms(config):
        numbers = SemanticCatalog(data.item_ids, np.arange(data.num_items)[:, None], (data.num_items,))
        sasrec = train(data, numbers, TEACHER, out=out / f"teacher_{seed}", seed=seed)
        options |= {"shared": out / f"shared_taught_{seed}", "teacher": sasrec.item_vectors()}
    return train_end_to_end(data, config=config, out=out / f"{_file(name)}_{seed}", seed=seed, **options)


def _teacher_terms(config: JointConfig) -> set[str]:
    """The terms that learn from a teacher."""
    return TEACHER_TERMS & {term for phase in config.joint for term in phase.step.objective.weights(0.0)}


def _scaled(config: JointConfig, budget: float) -> JointConfig:
    def scale(training: TrainingConfig) -> TrainingConfig:
        return replace(training, epochs=training.num_epochs * budget, validate_every=training.validate_every * budget)

    return replace(
        config,
        encoder=config.encoder and scale(config.encoder),
        generator=replace(config.generator, training=scale(config.generator.training)),
        joint=tuple(replace(phase, training=scale(phase.training)) for phase in config.joint),
        finetune=scale(config.finetune),
        codes=Refresh(every * budget) if (every := config.codes.refresh_every) else config.codes,
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """Means, and standard deviations over seeds."""
    lines = [f"| arm | seeds | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 2) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        values = ([row[name] for row in of_arm] for name in FIGURES)
        cells = (f"{np.mean(x):.4f} ± {np.std(x, ddof=len(x) > 1):.4f}" for x in values)
        lines.append(f"| {arm} | {len(of_arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
