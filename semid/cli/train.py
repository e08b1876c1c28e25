"""The command `semid train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from semid import artifacts
from semid.artifacts import Kind
from semid.catalog import versions as catalog_log
from semid.cli.console import console, print_statistics
from semid.data import Dataset
from semid.generators import GeneratorConfig, train_generator
from semid.recommender import Recommender
from semid.training import MeshConfig, make_mesh
from seq_models import DenseConfig, EncoderDecoderConfig, FlatDecoderConfig, HybridConfig, RQTransformerConfig


@dataclass(frozen=True)
class _Generator(GeneratorConfig):
    """A GeneratorConfig whose models have their usual names as subcommands."""

    model: (
        Annotated[RQTransformerConfig, tyro.conf.subcommand("rq-transformer")]
        | Annotated[EncoderDecoderConfig, tyro.conf.subcommand("encoder-decoder")]
        | Annotated[FlatDecoderConfig, tyro.conf.subcommand("flat")]
        | Annotated[HybridConfig, tyro.conf.subcommand("hybrid")]
        | Annotated[DenseConfig, tyro.conf.subcommand("sasrec")]
    ) = RQTransformerConfig()
    """Generators of codes: RQ-Transformer, encoder-decoder (TIGER), flat decoder, hybrid (LIGER: a dense head ranks,
    cold items included); or SASRec with full-softmax cross-entropy."""


@dataclass(frozen=True)
class Train:
    """Train a generator (or, with the subcommand sasrec, SASRec) on the dataset's training histories.

    Options of a model follow its name, after all others; `semid train sasrec --help` lists them. Interrupted runs go
    on from their last checkpoint when the same command is given again, on whatever devices there are. On several
    hosts, give each the same command and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    dataset: Path
    """Dataset folder."""
    catalog: Path
    """Catalogue folder of the same dataset."""
    out: Path
    """Model folder to write."""
    config: tyro.conf.OmitArgPrefixes[_Generator] = _Generator()
    seed: int = 0
    """Seed of parameters, shuffling and dropout."""
    teacher: Path | None = None
    """Folder of a SASRec model of the same dataset, whose ranking the generator hears (see objective.distillation)."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""

    def run(self) -> None:
        parents = {
            "dataset": artifacts.read_artifact(self.dataset, Kind.DATASET),
            "catalog": artifacts.read_artifact(self.catalog, Kind.CATALOG),
        }
        dataset = Dataset.load(self.dataset)
        print_statistics(dataset)
        catalog = catalog_log.of_items(self.catalog, dataset.item_ids)
        teacher = None
        if self.teacher is not None:
            parents["teacher"] = artifacts.read_artifact(self.teacher, Kind.MODEL)
            teacher = Recommender.from_pretrained(self.teacher)
        config, mesh = GeneratorConfig(**vars(self.config)), make_mesh(config=self.mesh)
        train_generator(
            dataset,
            catalog,
            config,
            out=self.out,
            parents=parents,
            seed=self.seed,
            teacher=teacher,
            mesh=mesh,
            tokenizer=self.catalog,
        )
        console.print(f"model: {self.out}")
