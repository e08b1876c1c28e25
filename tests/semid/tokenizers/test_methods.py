"""The interfaces of methods, alignments and signals, and configs that were written before them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import precisions

from semid.config import choices, from_dict, to_dict
from semid.errors import SemidError
from semid.graphs import FuseConfig, GraphConfig, MMHCLConfig, PpmiConfig, Signal, VectorColumn
from semid.tokenizers import (
    AlignmentConfig,
    ProductConfig,
    RQKmeansConfig,
    RQVaeConfig,
    TokenizerConfig,
    TokenizerMethod,
)
from semid.tokenizers.alignment import Alignment, Signals
from semid.tokenizers.method import CodeModel

METHODS = [
    RQVaeConfig(level_sizes=(4, 8), hidden=(8,), latent=4),
    RQKmeansConfig((4, 8)),
    RQKmeansConfig((4, 8), unit_norm=True),
    ProductConfig((8, 8)),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_builds_a_model_of_its_sizes(method):
    model = method.build(6)
    assert isinstance(model, CodeModel)
    assert model.level_sizes == method.level_sizes
    assert model.encode(jnp.zeros((5, 6))).shape == (5, 2)
    assert model.decode(jnp.zeros((5, 2), jnp.int32)).shape == (5, 6)
    assert precisions(model.encode, jnp.zeros((5, 6))) == {jax.lax.Precision.HIGHEST}  # or items get other codes


def test_codes_that_are_not_residual_have_no_last_residuals():
    method, codes, x = ProductConfig((8, 8)), np.zeros((5, 2), np.int32), np.zeros((5, 6), np.float32)
    with pytest.raises(SemidError, match="the codes of opq are no residual codes"):
        method.last_residuals(method.build(6), x, codes)
    for residual in (RQKmeansConfig((8, 8)), RQKmeansConfig((8, 8), unit_norm=True)):
        residuals = residual.last_residuals(residual.build(6), x, codes)
        assert (residuals.vectors.shape, residuals.codebook.shape) == ((5, 6), (8, 6))


def test_the_command_line_finds_all_by_name():
    assert list(choices(TokenizerMethod)) == ["opq", "rq-kmeans", "rq-vae"]
    assert list(choices(AlignmentConfig)) == ["cooccurrence", "das", "distill", "letter", "match"]
    assert set(choices(Signal).values()) >= {PpmiConfig, VectorColumn}
    assert all(cls.needs <= set(Signals._fields) for cls in choices(AlignmentConfig).values())


@pytest.mark.parametrize("signal", [GraphConfig(neighbors=5), MMHCLConfig(), PpmiConfig(), VectorColumn("v")])
def test_signals_are_read_as_they_were_written(signal):
    """`GraphConfig` too, which has no name for the command line."""
    for config in (TokenizerConfig(signal=signal), FuseConfig(signal=signal)):
        assert from_dict(type(config), to_dict(config)) == config


def test_an_alignment_without_a_loss_is_abstract():
    class Silent(Alignment):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_configs_written_before_are_read(method):
    schedule = {"type": "Schedule", "value": 1.0, "initial": None, "until": 1.0}
    aligned = {
        "alignment": [
            {"type": "LetterConfig", "weight": schedule, "temperature": 0.5},
            {"type": "DistillConfig", "weight": schedule},
            {"type": "CooccurrenceConfig", "weight": schedule, "temperature": 0.1, "window": 5},
            {"type": "DasConfig", "weight": schedule, "temperature": 0.07, "click": 0.1, "debias": 0.1},
        ],
        "signal": {"type": "VectorColumn", "name": "teacher"},
    }
    alone = {"alignment": [], "signal": {"type": "PpmiConfig", "dim": 64, "window": 5}}
    old = {
        "type": "TokenizerConfig",
        "method": {"type": type(method).__name__, "level_sizes": list(method.level_sizes)},
        "columns": None,
        "collisions": "tie-break",
        **(aligned if method.can_align else alone),
    }
    config = from_dict(TokenizerConfig, old)
    written = to_dict(config)
    assert {**written, "method": old["method"]} == old
    assert from_dict(TokenizerConfig, written) == config


def test_the_settings_of_the_rq_vae_keep_their_names_and_order():
    names = "type level_sizes hidden latent assignments path metric decay reconstruction commitment entropy diversity"
    assert list(to_dict(RQVaeConfig())) == [*names.split(), "kmeans_iterations", "reseed", "training"]
    assert to_dict(RQVaeConfig())["metric"] == "euclidean"


@pytest.mark.parametrize(
    ("items", "size"),
    [(1, 1), (10, 10), (20, 16), (90, 16), (91, 32), (300, 64), (724, 128), (725, 256), (2_000, 256), (12_101, 256)],
)
def test_level_sizes_follow_the_number_of_items_where_none_are_named(items, size):
    for method, levels in ((RQVaeConfig(), 3), (RQKmeansConfig(), 3), (ProductConfig(), 16)):
        assert method.num_levels == levels
        resolved = TokenizerConfig(method).resolved(items)
        assert resolved.method.level_sizes == (size,) * levels
        assert resolved.resolved(7 * items) == resolved  # named by now
    assert TokenizerConfig(RQKmeansConfig((4, 8))).resolved(items).method.level_sizes == (4, 8)
