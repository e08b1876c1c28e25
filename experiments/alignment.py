"""Value of collaborative alignment: one generator on the codes of seven tokenizers, and their controls.

    python -m experiments.alignment --dataset ../shared/data/amazon14_beauty --out runs/alignment
    python -m experiments.alignment --out runs/alignment_simulated --seeds 0 1 2 3 4    # the simulated catalogue

The teacher is SASRec with full-softmax cross-entropy over ids and content vectors, one a seed. The arms:

    text             RQ-VAE codes of the content vectors (of text, on Amazon data)
    letter           ... aligned with the teacher's item vectors (experiments/letter.py)
    distill          ... aligned with the teacher's item vectors by regression
    das              ... aligned in the dual views of users and items (experiments/das.py)
    concatenation    RQ-VAE codes of [content ; teacher's vectors], not aligned
    joint            ... aligned: regression on the teacher's vectors, and co-consumed items find each other
    collaborative    RQ-VAE codes of the teacher's vectors alone
    random, shuffled controls of distill: its vectors are noise, or those of other items

The generator, its budget and what it reads (codes and content vectors) are the same for all. Leave-one-out, 20-item
histories, item level, full catalogue, beam 50; checkpoints are chosen by validation NDCG@10, test is read once. Only
text, letter, distill and das can encode an item that nobody has had: their input is content alone.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments import das, letter
from experiments.arms import RANDOM, SHUFFLED, TEACHER, Arm, run
from experiments.results import folder_of
from semid import TokenizerConfig
from semid.graphs import VectorColumn
from semid.tokenizers import CooccurrenceConfig, DistillConfig, RQVaeConfig


def _distilled(content: tuple[str, ...], vectors: str) -> TokenizerConfig:
    """RQ-VAE aligned by regression: collaborative vectors count more than content, since both share few codes."""
    method = RQVaeConfig(reconstruction=0.2)
    return TokenizerConfig(method, content, alignment=(DistillConfig(),), signal=VectorColumn(vectors))


def _joint(content: tuple[str, ...]) -> TokenizerConfig:
    """Aligned RQ-VAE on the inputs of concatenation: the losses alone shape the codes, nothing is reconstructed."""
    alignment = (DistillConfig(), CooccurrenceConfig())
    return TokenizerConfig(
        RQVaeConfig(reconstruction=0.0), (*content, TEACHER), alignment=alignment, signal=VectorColumn(TEACHER)
    )


ARMS: dict[str, Arm] = {
    "text": lambda content: TokenizerConfig(columns=content),
    "letter": letter.tokenizer,
    "distill": lambda content: _distilled(content, TEACHER),
    "das": das.tokenizer,
    "concatenation": lambda content: TokenizerConfig(columns=(*content, TEACHER)),
    "joint": _joint,
    "collaborative": lambda content: TokenizerConfig(columns=(TEACHER,)),
    "random": lambda content: _distilled(content, RANDOM),
    "shuffled": lambda content: _distilled(content, SHUFFLED),
}


def main(
    dataset: Path | None = None,
    out: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: tuple[str, ...] = tuple(ARMS),
    teachers: Path | None = None,
    budget: float = 1.0,
) -> None:
    """Train and measure every arm for every seed.

    Args:
        dataset: Folder that `semid prepare layout` reads, with text_minilm; none given: the simulated catalogue.
        out: Folder for all results; none given: runs/alignment/ and the dataset's name.
        seeds: One run each, of teacher, tokenizers and generators (and of the simulated world).
        arms: Which, the first being what the others are compared with.
        teachers: Folder of experiments.amazon on the same dataset: its sasrec-text models are the teachers.
        budget: Factor on all numbers of epochs.
    """
    out = folder_of("alignment", out, dataset)
    run({name: ARMS[name] for name in arms}, dataset, out, seeds=seeds, teachers=teachers, budget=budget)


if __name__ == "__main__":
    tyro.cli(main)
