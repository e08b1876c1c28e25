"""Training of generators: objective, distillation, validation."""

from semid.generators.objective import (
    LossTables,
    ObjectiveConfig,
    code_loss,
)
from semid.generators.training import (
    GeneratorConfig,
    content_features,
    fit_generator,
    loss_of,
    train,
    training_counts,
    training_rows,
    validation,
    write_statistics,
)

__all__ = [
    "GeneratorConfig",
    "LossTables",
    "ObjectiveConfig",
    "code_loss",
    "content_features",
    "fit_generator",
    "loss_of",
    "train",
    "training_counts",
    "training_rows",
    "validation",
    "write_statistics",
]
