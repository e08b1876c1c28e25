"""The command `semid train-end-to-end`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from semid import artifacts
from semid.cli.choices import PathOrUrl, print_chosen
from semid.cli.console import console
from semid.data import Dataset
from semid.encoders import (
    Frozen,
    Full,
    ImageFromScratch,
    ImageSource,
    LowRank,
    PretrainedImage,
    PretrainedText,
    SideAdapters,
    TextFromScratch,
    TextSource,
    Tuning,
)
from semid.errors import SemidError
from semid.graphs import ItemGraph
from semid.joint import JointConfig, train_end_to_end
from semid.recommender import Recommender
from semid.training import MeshConfig, make_mesh

_SCRATCH, _NONE = "scratch", "none"
_TUNINGS: dict[str, Tuning] = {
    "side-adapters": SideAdapters(),
    "low-rank": LowRank(),
    "full": Full(),
    "frozen": Frozen(),
}


@dataclass(frozen=True)
class TrainEndToEnd:
    """Train encoders, tokenizer and generator on the dataset's training histories: first one after the other, then
    together, so that the recommendation loss reaches the encoders of texts and pictures.

    `semid evaluate`, `recommend`, `package` and `export-program` take the model folder like any other. The same command
    resumes an interrupted run from its last checkpoint.
    """

    dataset: PathOrUrl
    """Dataset folder with text columns, or a column `image` of pictures."""
    out: PathOrUrl
    """Model folder to write."""
    text: str = _SCRATCH
    """Encoder of the texts: scratch (a small transformer with a vocabulary from the dataset's texts), none, or the
    folder of a pretrained BERT, MiniLM, E5 or sentence-T5 model in the Hugging Face layout."""
    image: str = _NONE
    """Encoder of the pictures: none, scratch (a small vision transformer), or the folder of a pretrained ViT, CLIP or
    DINOv2 model."""
    tuning: Literal["side-adapters", "low-rank", "full", "frozen"] | None = None
    """Parameters of pretrained encoders to train: small adapters that read the encoder's states (computed once; the
    cheapest), low-rank changes of its matrices, all, or none; none given: side-adapters."""
    teacher: str | None = None
    """Folder (or org/name of the Hugging Face hub) of a model that `semid train sasrec` wrote on this dataset. The
    terms teacher_codes and teacher_states of the stages' settings learn from its item vectors."""
    graph: PathOrUrl | None = None
    """Folder of an item graph of the same dataset (`semid graph`) to mix with the model, also in its search, with the
    weight that is best on validation."""
    stages: tyro.conf.Suppress[JointConfig] = JointConfig()
    """Settings of the stages; only by a file of options (--config)."""
    seed: int = 0
    """Seed of parameters, shuffling and dropout."""
    mesh: Annotated[MeshConfig, tyro.conf.arg(name="")] = MeshConfig()
    """Distribution of the work over devices."""

    def run(self) -> None:
        if self.tuning is not None and {self.text, self.image} <= {_SCRATCH, _NONE}:
            raise SemidError(
                f"--tuning {self.tuning} is for pretrained encoders; give the folder of one (--text, --image), or "
                "leave it out"
            )
        dataset, given = Dataset.load(self.dataset), self.stages
        items, interactions = dataset.num_items, dataset.num_training_interactions
        config = given.resolved(items=items, interactions=interactions, repeats=dataset.repeats.common)
        by = f"{items:,} items and {interactions:,} training interactions, targets seen before: {dataset.repeats}"
        print_chosen(given, config, by=by)
        train_end_to_end(
            dataset,
            text=self._text(),
            image=self._image(),
            config=config,
            out=self.out,
            seed=self.seed,
            teacher=None if self.teacher is None else Recommender.from_pretrained(self.teacher),
            graph=None if self.graph is None else ItemGraph.load(self.graph),
            mesh=make_mesh(config=self.mesh),
        )
        console.print(f"model: {self.out}")

    def _text(self) -> TextSource | None:
        if self.text in (_SCRATCH, _NONE):
            return TextFromScratch() if self.text == _SCRATCH else None
        return PretrainedText(_folder(self.text, "--text"), tuning=self._tuning())

    def _image(self) -> ImageSource | None:
        if self.image in (_SCRATCH, _NONE):
            return ImageFromScratch() if self.image == _SCRATCH else None
        return PretrainedImage(_folder(self.image, "--image"), tuning=self._tuning())

    def _tuning(self) -> Tuning:
        return _TUNINGS[self.tuning or "side-adapters"]


def _folder(value: str, option: str) -> str:
    if not artifacts.fetched(value).is_dir():
        raise SemidError(
            f"{option} {value}: no such folder; expected {_SCRATCH}, {_NONE} or that of a pretrained model"
        )
    return value
