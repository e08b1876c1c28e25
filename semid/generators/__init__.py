"""Training of generators: objective, distillation, validation."""

from semid.generators.calibration import with_calibrated_events
from semid.generators.conditions import ConditionsConfig, FittedConditions
from semid.generators.distillation import (
    DenseTeacher,
    GraphTeacher,
    MixedTeacher,
    TaughtHistories,
    TaughtRows,
    Teacher,
    as_teacher,
    taught,
)
from semid.generators.objective import LossTables, ObjectiveConfig, generator_loss
from semid.generators.programs import ProgramSizes, check_sizes, search_program, training_program
from semid.generators.training import (
    GeneratorConfig,
    content_features,
    fit_generator,
    train,
    training_counts,
    training_rows,
    validation,
    with_tuned_mixture,
    write_statistics,
)
from semid.generators.vector_teacher import VectorTeacher

__all__ = [
    "ConditionsConfig",
    "DenseTeacher",
    "FittedConditions",
    "GeneratorConfig",
    "GraphTeacher",
    "LossTables",
    "MixedTeacher",
    "ObjectiveConfig",
    "ProgramSizes",
    "TaughtHistories",
    "TaughtRows",
    "Teacher",
    "VectorTeacher",
    "as_teacher",
    "check_sizes",
    "content_features",
    "fit_generator",
    "generator_loss",
    "search_program",
    "taught",
    "train",
    "training_counts",
    "training_program",
    "training_rows",
    "validation",
    "with_calibrated_events",
    "with_tuned_mixture",
    "write_statistics",
]
