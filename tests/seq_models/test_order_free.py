"""An encoder that knows no order: a history is a set, in training and in the search."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from seq_models import EncoderDecoderConfig
from tests.seq_models.test_models import STACK, build, logits, random_codes

LENGTHS = (6, 4)


def _changes(config, order):
    """The largest change of a logit where the items of each history stand in another order."""
    model, codes, targets = build(config), random_codes(0, 2, 6), random_codes(1, 2)
    segments = (np.arange(6) < np.array(LENGTHS)[:, None]).astype(np.int32)
    permuted = codes.copy()
    for row, length in enumerate(LENGTHS):
        permuted[row, :length] = codes[row, order(length)]
    before, after = (logits(model, jnp.asarray(rows), segments, targets) for rows in (codes, permuted))
    return max(np.abs(one - other).max() for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("stack", [STACK, replace(STACK, relation=True)], ids=["plain", "relation"])
@pytest.mark.parametrize(
    "order", [lambda n: np.arange(n)[::-1], lambda n: np.roll(np.arange(n), 2)], ids=["reversed", "rolled"]
)
def test_a_permuted_history_gives_the_same_logits(order, stack):
    assert _changes(EncoderDecoderConfig(stack, decoder_layers=1, order_free=True), order) < 1e-5
    assert _changes(EncoderDecoderConfig(stack, decoder_layers=1), order) > 1e-3  # control


def test_another_item_gives_other_logits():
    model, codes = build(EncoderDecoderConfig(STACK, decoder_layers=1, order_free=True)), random_codes(0, 1, 6)
    changed = codes.copy()
    changed[0, 2] = (codes[0, 2] + 1) % 2
    segments, targets = np.ones((1, 6), np.int32), random_codes(1, 1)
    before, after = (logits(model, jnp.asarray(rows), segments, targets) for rows in (codes, changed))
    assert max(np.abs(one - other).max() for one, other in zip(before, after, strict=True)) > 1e-3
