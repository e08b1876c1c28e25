"""Calibration of an event head: its probabilities have the shares that events have in validation."""

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
    """The recommender, the biases of whose event head make what was done with the examples' targets the most probable.

    Events of the latest interactions, which are asked for, may have other shares than those of all before, by which the
    head was trained (label shift: Saerens et al., Neural Computation 14, 2002).
    """
    model = nnx.clone(recommender.model)
    head = model.event_head
    if head is None or head.out.bias is None or examples.target_events is None:
        raise ValueError("expected a model with an event head, and examples with events")
    log_probs = recommender.event_log_probs(examples.histories, examples.targets[:, None])[:, 0]
    change = fitted_biases(log_probs, examples.target_events - 1)
    head.out.bias = nnx.Param(jnp.asarray(head.out.bias[...] + change.astype(np.float32)))
    LOG.info("biases of events: %s", ", ".join(f"{value:+.3f}" for value in change))
    return recommender.with_model(model)


def fitted_biases(
    log_probs: Float[np.ndarray, "n events"], done: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " events"]:
    """Biases of logits under which the events that were done (from 0) are the most probable.

    A standard normal prior of each bounds those of events that never were.
    """
    happened = done[:, None] == np.arange(log_probs.shape[1])

    def loss(biases: Float[np.ndarray, " events"]) -> tuple[float, Float[np.ndarray, " events"]]:
        found = log_softmax(log_probs.astype(np.float64) + biases, axis=1)
        value = biases @ biases / 2 - found[happened].sum()
        return value / len(done), (biases + (np.exp(found) - happened).sum(axis=0)) / len(done)

    return minimize(loss, np.zeros(log_probs.shape[1]), jac=True, method="BFGS").x
