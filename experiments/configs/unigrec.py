"""UniGRec (arXiv 2601.17438): soft codes of falling temperature, a SASRec that teaches tokenizer and generator.

    python -m experiments unigrec --dataset ../shared/data/amazon14_beauty

    joint        UniGRec: generator, joint steps, generator again
    staged       its tokenizer alone, then the generator for as many epochs
    distilled    as `staged`, taught by the ranking of the same SASRec

Terms, weights, relaxation and the last stage's rate are the paper's. Other rates are not: the generator's is 3e-3
(there 5e-3), the tokenizer's in joint steps 1.2e-7 (3e-3 x 4e-5; there 2e-7 or 2e-8). Ours are the RQ-Transformer, a
level that tells colliding items apart, the minus in code logits (which the release leaves out), a temperature that
falls again in the joint steps (there it stays at .001), and numbers of epochs that a small machine bears. The teacher's
codes meet the item's own (in the release a summary of the history), at a temperature of 1 there and here. Items come as
vectors, whose projection is not trained. Published on Beauty: Recall@10 .0825, NDCG@10 .0457, its ladder .0617
(TIGER), .0697 (soft codes), .0742 (joint), .0746 (uniformity), .0825 (distillation). Measured on Beauty (Recall@10):
joint .0345, staged .0493, distilled .0600.
"""

from dataclasses import replace

from experiments.experiment import Experiment
from quantizers import GradientPath, Nearest, Schedule
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.joint import JointConfig, Objective, Phase, Reach, Refresh, Relaxation, StepConfig
from semid.tokenizers import RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig

NONE = Schedule(0.0)


def training(epochs: float, batch_size: int, learning_rate: float, **rates: float) -> TrainingConfig:
    """A stage of UniGRec, ETEGRec or BLOGER; `rates` are the parts' shares of the learning rate."""
    optimizer = OptimizerConfig(learning_rate=learning_rate, weight_decay=0.05, rates=tuple(rates.items()))
    return TrainingConfig(epochs=epochs, batch_size=batch_size, optimizer=optimizer)


GENERATOR = GeneratorConfig(training=training(12, 64, 3e-3))


def config() -> dict[str, Experiment]:
    objective = Objective(
        reconstruction=Schedule(0.5),
        codebook=NONE,
        commitment=NONE,
        entropy=NONE,
        teacher_codes=Schedule(0.01),
        teacher_states=Schedule(0.1),
    )
    step = StepConfig(objective, reach=Reach.TOKENIZER, relaxation=Relaxation.SOFT, window=0)
    tokenizer = RQVaeConfig(
        level_sizes=(256, 256, 256),
        hidden=(512, 256, 128, 64),
        assignments=(Nearest(temperature=Schedule(0.001, initial=0.01)),),
        path=GradientPath.SOFT,
        commitment=0.0,
        entropy=1e-4,
    )
    joint = JointConfig(
        encoder=None,
        tokenizer=tokenizer,
        generator=GENERATOR,
        joint=(Phase(training(3, 512, 3e-3, autoencoder=4e-5, encoder=0.0), step),),
        codes=Refresh(0.25),
        finetune=training(12, 64, 4e-4),
    )
    staged = replace(GENERATOR, training=training(27, 64, 3e-3))
    distilled = replace(staged, objective=ObjectiveConfig(distillation=1.0))
    paper = "arXiv 2601.17438"
    return {
        "joint": Experiment(
            "UniGRec", joint, teacher="sasrec", paper=paper, expected="R@10 .0825, N@10 .0457 (published)"
        ),
        "staged": Experiment("UniGRec's tokenizer, staged", staged, TokenizerConfig(tokenizer)),
        "distilled": Experiment(
            "UniGRec's tokenizer, staged, taught by SASRec", distilled, TokenizerConfig(tokenizer), teacher="sasrec"
        ),
    }
