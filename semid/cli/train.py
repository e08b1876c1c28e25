"""The command `semid train`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from semid.catalog import SemanticCatalog
from semid.cli.choices import PathOrUrl, folders_of, load_ranker, print_chosen, subcommands
from semid.cli.console import console
from semid.data import Dataset
from semid.generators import GeneratorConfig, train
from semid.graphs import ItemGraph
from semid.training import MeshConfig, make_mesh
from seq_models import ModelConfig, RQTransformerConfig


@dataclass(frozen=True)
class Generator(GeneratorConfig):
    """Inputs of a model and its validation; the model's own options follow its name."""

    model: Annotated[ModelConfig, subcommands(ModelConfig, first=RQTransformerConfig.name)] = RQTransformerConfig()
    """Generators of codes: RQ-Transformer, encoder-decoder (TIGER), flat decoder, hybrid (LIGER: a dense head ranks,
    cold items included); or SASRec with full-softmax cross-entropy."""


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Train:
    """Train a generator (or, with the subcommand sasrec, SASRec) on the dataset's training histories.

    Options of a model follow its name (`sasrec --dim 64`, or `--model sasrec --model.dim 64` anywhere); those of the
    default model need no name. `semid train sasrec --help` lists them. The same command resumes an interrupted run from
    its last checkpoint, on any devices. On several hosts, run the same command on each, with JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID set.
    """

    dataset: PathOrUrl
    """Dataset folder."""
    catalog: PathOrUrl
    """Catalogue folder of the same dataset; FOLDER@3 is its version 3."""
    out: PathOrUrl
    """Model folder to write."""
    config: tyro.conf.OmitArgPrefixes[Generator] = Generator()
    seed: int = 0
    """Seed of parameters, shuffling and dropout."""
    teacher: str | None = None
    """Folder of a SASRec model (or its org/name on the Hugging Face hub) or of an item graph, of the same dataset; the
    generator learns its ranking, too (--distillation)."""
    graph: PathOrUrl | None = None
    """Folder of an item graph of the same dataset (`semid graph`) to mix with the model, also in its search, with the
    weight that is best on validation."""
    sequences: tuple[str, ...] = ()
    """Catalogue folders of the same items whose codes are further inputs, NAME=FOLDER each (image=runs/mine/images);
    items may be missing there."""
    other_dataset: bool = False
    """Accept a catalogue made from another dataset, such as an earlier version whose codes you want to keep."""
    mesh: MeshConfig = MeshConfig()
    """Distribution of the work over devices."""

    def run(self) -> None:
        dataset, given = Dataset.load(self.dataset), GeneratorConfig(**vars(self.config))
        interactions, repeats = dataset.num_training_interactions, dataset.repeats
        config = given.resolved(interactions, repeats=repeats.common, taught=self.teacher is not None)
        by_teacher = replace(given, objective=replace(given.objective, distillation=config.objective.distillation))
        print_chosen(by_teacher, config, by=f"{interactions:,} training interactions, targets seen before: {repeats}")
        sequences = {name: SemanticCatalog.load(folder) for name, folder in folders_of(self.sequences).items()}
        train(
            dataset,
            SemanticCatalog.load(self.catalog),
            config,
            out=self.out,
            seed=self.seed,
            teacher=None if self.teacher is None else load_ranker(self.teacher),
            graph=None if self.graph is None else ItemGraph.load(self.graph),
            sequences=sequences,
            mesh=make_mesh(config=self.mesh),
            other_dataset=self.other_dataset,
        )
        console.print(f"model: {self.out}")
