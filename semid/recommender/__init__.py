"""Recommenders: a trained model and its catalogue, from item ids to item ids."""

from semid.recommender.packaging import (
    DATASET_FILE,
    Origin,
    carry_tokenizer,
)
from semid.recommender.recommender import (
    Recommendations,
    Recommender,
)
from semid.recommender.scorers import (
    CodeScorer,
    Question,
)
from semid.recommender.spec import (
    CodeModelConfig,
    ItemTables,
    Model,
    ModelConfig,
    ModelSpec,
    build_model,
    inputs_at,
    misfit,
    read_spec,
)
from semid.recommender.stablehlo import (
    export_program,
)

__all__ = [
    "DATASET_FILE",
    "CodeModelConfig",
    "CodeScorer",
    "ItemTables",
    "Model",
    "ModelConfig",
    "ModelSpec",
    "Origin",
    "Question",
    "Recommendations",
    "Recommender",
    "build_model",
    "carry_tokenizer",
    "export_program",
    "inputs_at",
    "misfit",
    "read_spec",
]
