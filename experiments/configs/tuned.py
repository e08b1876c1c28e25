"""A pretrained text encoder that the recommendation loss reaches: its matrices by low rank, or every parameter.

    python -m experiments tuned --dataset ../shared/data/amazon14_beauty --weights models/all-MiniLM-L6-v2 --seeds 0

    frozen          MiniLM as it comes
    low-rank        LoRA of rank 8 on queries and values
    full            all of MiniLM, at a hundredth of the generator's rate

Items are encoded from 32 tokens of their texts, two thirds of which are longer (`encoders` has the vectors of whole
texts). The tuned ones are `encoders.held` without its warm-up by contrast, which would encode every item of each of its
steps: as many epochs of the generator as `frozen`, the contrast as a term of the joint steps, and a tenth of a step's
items encoded and differentiated, which is what makes it bearable on two cores.

Measured on Beauty, seed 0 (Recall@10): frozen .0500, low-rank .0449, full .0440.
"""

from dataclasses import replace

from experiments.configs.encoders import ENCODERS
from experiments.configs.encoders import config as of_vectors
from experiments.experiment import Experiment
from semid.encoders import Frozen, Full, LowRank, PretrainedText, Tuning
from semid.joint import JointConfig

_WEIGHTS = "models/all-MiniLM-L6-v2"


def config() -> dict[str, Experiment]:
    return {
        "frozen": _of_texts(of_vectors()["frozen"], "texts' encoder as it comes", Frozen()),
        "low-rank": _tuned("low rank", LowRank(), 0.3),
        "full": _tuned("every parameter", Full(), 0.01),
    }


def _tuned(title: str, tuning: Tuning, rate: float) -> Experiment:
    held = of_vectors()["held"]
    assert isinstance(held.model, JointConfig)
    (phase,) = held.model.joint
    optimizer = replace(phase.training.optimizer, rates=(("autoencoder", 0.0), ("encoder", rate)))
    sampled = replace(
        phase,
        training=replace(phase.training, optimizer=optimizer),
        step=replace(phase.step, window=1, forward=0.1, backward=0.1),
    )
    model = replace(held.model, encoder=None, joint=(sampled,))
    return _of_texts(replace(held, model=model), f"texts' encoder tuned end to end, {title}", tuning)


def _of_texts(experiment: Experiment, title: str, tuning: Tuning) -> Experiment:
    text = PretrainedText(_WEIGHTS, tuning, max_length=32)
    return replace(experiment, title=title, encoders=replace(ENCODERS, text=text, vectors=()))
