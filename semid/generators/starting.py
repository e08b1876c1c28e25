"""Initialization of a generator from its teacher's parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from semid.errors import SemidError
from semid.recommender import Recommender
from seq_models import TransformerConfig
from seq_models.state_decoder import StateDecoder


def start_from_teacher(untrained: Recommender, teacher: Any) -> Recommender:
    """Copy backbone and item vectors of a SASRec `teacher` into an untrained generator: apart from the small embeddings
    of codes, both then encode a history alike.

    Raises SemidError for a teacher that is no SASRec model or has another backbone, and for a generator that does not
    read an item as one position with an embedding of its id.
    """
    model = untrained.model
    if not isinstance(model, StateDecoder) or model.ids is None:
        raise SemidError(
            "start_from_teacher is for models that decode an item from one state and read embeddings of ids, and this "
            f"{untrained.spec.model.title} does not; set id_embedding where there is one, or leave it out"
        )
    if not isinstance(teacher, Recommender) or teacher.spec.model.has_codes:
        raise SemidError("start_from_teacher needs a SASRec model for a teacher; give one (--teacher)")
    dense = teacher.dense_model()
    ours, theirs = _shape(model.backbone.config), _shape(dense.backbone.config)
    for name, value in vars(ours).items():
        if value != (other := getattr(theirs, name)):
            raise SemidError(
                f"start_from_teacher: backbone.{name} is {value}, the teacher's {other}; make them equal, or leave it "
                "out"
            )
    vectors = dense.vectors(teacher.tables.features)
    model.start_from(dense.backbone, vectors * jnp.sqrt(vectors.shape[-1]))
    return untrained.with_model(model)


def _shape(backbone: TransformerConfig) -> TransformerConfig:
    """The config with defaults for the settings that no parameter depends on."""
    default = TransformerConfig()
    return replace(backbone, dropout=default.dropout, dtype=default.dtype, remat=default.remat)
