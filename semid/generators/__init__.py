"""Training of generators: objective, distillation, validation."""

from semid.generators.distillation import DenseTeacher, TaughtRows, Teacher, taught
from semid.generators.objective import LossTables, ObjectiveConfig, generator_loss
from semid.generators.training import (
    GeneratorConfig,
    content_features,
    fit_generator,
    train,
    training_counts,
    training_rows,
    validation,
    write_statistics,
)

__all__ = [
    "DenseTeacher",
    "GeneratorConfig",
    "LossTables",
    "ObjectiveConfig",
    "TaughtRows",
    "Teacher",
    "content_features",
    "fit_generator",
    "generator_loss",
    "taught",
    "train",
    "training_counts",
    "training_rows",
    "validation",
    "write_statistics",
]
