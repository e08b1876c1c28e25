"""Recommenders: a trained model and its catalogue, from item ids to item ids."""

from semid.recommender.packaging import (
    DATASET_FILE,
    copy_tokenizer,
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
    "Question",
    "Recommendations",
    "Recommender",
    "build_model",
    "copy_tokenizer",
    "export_program",
    "inputs_at",
    "misfit",
    "read_spec",
]
