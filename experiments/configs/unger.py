"""States that find the target's vector of behavior, next to codes of content and behavior (UNGER's distillation).

    python -m experiments unger --dataset ../shared/data/amazon14_beauty --seeds 0 1 2

    plain     codes of content and behavior side by side
    pulled    the same; in training the state finds the target's behavior vector among all items'

Behavior is the item vectors of recipe.sasrec-text; RQ-Transformers of the default size, 12 epochs, no vectors as input.
The paper (arXiv 2502.06269) pulls to the vector that its codes are of, which it aligns along with a DIN; it reports
Recall@20 14.7% over the best generative baseline on a Beauty of its own. Measured on the
simulated catalogue and on Beauty: less with it (docs/results.md).
"""

from dataclasses import replace

from experiments.configs.recipe import HYBRID_CODES
from experiments.experiment import TEACHER, Experiment
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.training import OptimizerConfig, TrainingConfig


def config() -> dict[str, Experiment]:
    training = TrainingConfig(epochs=12, batch_size=32, validate_every=3, optimizer=OptimizerConfig(learning_rate=2e-3))
    plain = Experiment(
        "codes of text and behavior",
        GeneratorConfig(features=(), training=training),
        HYBRID_CODES,
        teacher="recipe.sasrec-text",
        paper="arXiv 2502.06269",
    )
    generator = GeneratorConfig(features=(), objective=ObjectiveConfig(state_column=TEACHER), training=training)
    pulled = replace(plain, title="codes of text and behavior, states pulled to behavior", model=generator)
    return {"plain": plain, "pulled": pulled}
