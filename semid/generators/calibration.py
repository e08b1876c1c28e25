"""Calibration of an event head to the shares that events have in validation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax

from semid.data import Examples
from semid.progress import LOG
from semid.recommender import Recommender


def with_calibrated_events(recommender: Recommender, examples: Examples) -> Recommender:
    """Fit the biases of the recommender's event head to the events of the examples' targets (see `fit_biases`).

    The head was trained on the events of all interactions; the latest ones, which it is to predict, may have other
    shares (label shift: Saerens et al., Neural Computation 14, 2002).
    """
    model = nnx.clone(recommender.model)
    head = model.event_head
    if head is None or head.out.bias is None or examples.target_events is None:
        raise ValueError("expected a model with an event head, and examples with events")
    log_probs = recommender.event_log_probs(examples.histories, examples.targets[:, None])[:, 0]
    change = fit_biases(log_probs, examples.target_events - 1)
    head.out.bias = nnx.Param(jnp.asarray(head.out.bias[...] + change.astype(np.float32)))
    LOG.info("biases of events: %s", ", ".join(f"{value:+.3f}" for value in change))
    return recommender.with_model(model)


def fit_biases(log_probs: Float[np.ndarray, "n events"], events: Int[np.ndarray, " n"]) -> Float[np.ndarray, " events"]:
    """Biases on the logits that make the observed `events`, numbered from 0, most probable.

    A standard normal prior on each bias bounds those of events that were never observed.
    """
    observed = events[:, None] == np.arange(log_probs.shape[1])

    def loss(biases: Float[np.ndarray, " events"]) -> tuple[float, Float[np.ndarray, " events"]]:
        shifted = log_softmax(log_probs.astype(np.float64) + biases, axis=1)
        value = biases @ biases / 2 - shifted[observed].sum()
        return value / len(events), (biases + (np.exp(shifted) - observed).sum(axis=0)) / len(events)

    return minimize(loss, np.zeros(log_probs.shape[1]), jac=True, method="BFGS").x
