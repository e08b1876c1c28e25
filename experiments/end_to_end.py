"""What end-to-end training is worth: the recommendation loss reaches the tokenizer, and the encoders, or neither.

    python -m experiments.end_to_end --out runs/end_to_end --seeds 0 1 2 3 4                  # the simulated catalogue
    python -m experiments.end_to_end --dataset ../shared/data/ml1m --out runs/end_to_end_ml1m

Items are encoded from what one can read and see of them: a SentencePiece vocabulary of the catalogue's own texts with a
small transformer, and a small vision transformer on the pictures, if there are any. The arms share their first stages
(encoders by contrast of consecutive items, RQ-VAE on their vectors, generator on its codes) and their last (the
generator alone, as many epochs); between them come, for as many epochs,

    staged        nothing: the last stage gets these epochs too
    joint         joint steps whose recommendation loss reaches the tokenizer; the encoders are frozen
    end-to-end    ... and reaches the encoders
    no-window     ... through the target's side alone: no history is encoded afresh (LEMUR's way)

Leave-one-out, 20-item histories, item level, full catalogue, beam 50; checkpoints are chosen by validation NDCG@10,
test is read once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from flax import nnx

from quantizers import Schedule
from semid import Dataset
from semid.artifacts import read_artifact, write_json
from semid.autoencoder import RQVaeConfig
from semid.data.dataset import KIND as DATASET
from semid.data.layout import read_layout
from semid.data.simulated import SimulatedConfig, simulate
from semid.encoders.blocks import BlocksConfig
from semid.encoders.fusion import FusionConfig, ItemEncoder
from semid.encoders.image import ImageConfig, ImageEncoder, image_rows
from semid.encoders.transformer import TextEncoder, TextEncoderConfig
from semid.encoders.vocabulary import Vocabulary
from semid.evaluation import evaluate
from semid.generator import GeneratorConfig
from semid.joint.model import Content, Objective, Reach, StepConfig
from semid.joint.training import JointConfig, train_joint
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

FIGURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
WORLD = SimulatedConfig(num_items=1_000, num_users=4_000)
VOCABULARY, MAX_LENGTH = 1000, 32
BLOCKS = BlocksConfig(dim=32, layers=1, heads=2, hidden=64)


def _training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=learning_rate, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, validate_every=epochs / 4, optimizer=optimizer)


BACKBONE = TransformerConfig(dim=64, layers=2, heads=2, hidden=128, dropout=0.1)
END_TO_END = JointConfig(
    encoder=_training(1, 256, 1e-3),
    tokenizer=RQVaeConfig(level_sizes=(64, 64, 64), hidden=(64,), latent=32),
    generator=GeneratorConfig(RQTransformerConfig(BACKBONE), training=_training(8, 64, 3e-3)),
    joint=_training(4, 256, 1e-3, autoencoder=0.1, encoder=0.3),
    step=StepConfig(objective=Objective(contrast=Schedule(0.1))),
    finetune=_training(8, 64, 1e-3),
    refresh=1.0,
)


def arms() -> dict[str, JointConfig]:
    """What is compared, with as many epochs in all."""
    config, joint = END_TO_END, END_TO_END.joint
    if joint is None:
        raise ValueError("the arms are made of joint steps; give their epochs")
    rates = tuple((name, 0.0 if name == "encoder" else share) for name, share in joint.optimizer.rates)
    return {
        "staged": replace(
            config, joint=None, finetune=replace(config.finetune, epochs=config.finetune.epochs + joint.epochs)
        ),
        "joint": replace(
            config,
            joint=replace(joint, optimizer=replace(joint.optimizer, rates=rates)),
            step=replace(config.step, reach=Reach.TOKENIZER),
        ),
        "end-to-end": config,
        "no-window": replace(config, step=replace(config.step, window=0)),
    }


def read_content(dataset: Dataset, *, seed: int) -> tuple[Content, ItemEncoder]:
    """The items' texts and pictures as arrays, and an encoder of both, to be trained from scratch."""
    rngs, texts = nnx.Rngs(seed), dataset.texts()
    pieces = Vocabulary.train(texts, size=VOCABULARY)
    content: dict[str, Any] = {"text": pieces.rows(texts, max_length=MAX_LENGTH).rows}
    encoders: dict[str, Any] = {
        "text": TextEncoder(TextEncoderConfig(BLOCKS, max_length=MAX_LENGTH), vocabulary=pieces.size, rngs=rngs)
    }
    if "image" in dataset.items.column_names:
        images = ImageConfig(size=32, patch=8, blocks=BLOCKS)
        ids = dataset.item_ids.to_pylist()
        content["image"] = image_rows(dataset.items["image"].to_pylist(), item_ids=ids, config=images)
        encoders["image"] = ImageEncoder(images, rngs=rngs)
    return content, ItemEncoder(encoders, FusionConfig(), rngs=rngs)


def main(
    dataset: Path | None = None,
    out: Path = Path("runs/end_to_end"),
    chosen: tuple[str, ...] = ("staged", "joint", "end-to-end", "no-window"),
    seeds: tuple[int, ...] = (0,),
    budget: float = 1.0,
) -> None:
    """Train and evaluate every arm, print a table and write `end_to_end.json`.

    Args:
        dataset: Folder that `semid prepare layout` reads; none given: simulated worlds, one a seed.
        out: Folder for all results; what is finished there is not made again.
        chosen: Which arms.
        seeds: One run of each arm for each.
        budget: Factor on all numbers of epochs.
    """
    rows = []
    for seed in seeds:
        path = out / ("dataset" if dataset else f"dataset_{seed}")
        if not path.exists():
            made = read_layout(dataset) if dataset else simulate(replace(WORLD, seed=seed)).dataset
            made.save(path)
        data, parents = Dataset.load(path), {"dataset": read_artifact(path, DATASET)}
        for name in chosen:
            content, encoder = read_content(data, seed=seed)
            config, folder = _scaled(arms()[name], budget), out / f"{name}_{seed}"
            shared = out / f"shared_{seed}"
            model = train_joint(data, content, encoder, config, out=folder, parents=parents, seed=seed, shared=shared)
            found = evaluate(model, data, split="test", ks=(5, 10), beam_size=50).values
            rows.append({"arm": name, "seed": seed, **{figure: found[figure] for figure in FIGURES}})
            print(rows[-1])
    write_json(out / "end_to_end.json", {"rows": rows})
    print(_table(rows))


def _scaled(config: JointConfig, budget: float) -> JointConfig:
    def scale(training: TrainingConfig) -> TrainingConfig:
        return replace(training, epochs=training.epochs * budget, validate_every=training.validate_every * budget)

    return replace(
        config,
        encoder=config.encoder and scale(config.encoder),
        tokenizer=replace(config.tokenizer, training=scale(config.tokenizer.training)),
        generator=replace(config.generator, training=scale(config.generator.training)),
        joint=config.joint and scale(config.joint),
        finetune=scale(config.finetune),
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| arm | seeds | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 2) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        means = (sum(row[name] for row in of_arm) / len(of_arm) for name in FIGURES)
        lines.append(f"| {arm} | {len(of_arm)} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
