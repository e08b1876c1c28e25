"""A tiny folder of the layout that the experiments read: random walks, so that nothing can be learned from it; short
runs; and small configurations."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapes
from smoke import Smoke, roomy

from experiments.benchmarks import generators as peers
from experiments.benchmarks import minutes
from semid.cli import tokenize as cli_tokenize
from semid.cli import train as cli
from semid.tokenizers import RQVaeConfig
from seq_models import CodeTrie

ITEMS, USERS, LENGTH = 48, 40, 6
TINY = {"dim": 8, "layers": 1, "heads": 2, "hidden": 8}


@pytest.fixture
def layout(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    rng = np.random.default_rng(0)
    titles = [f"thing {i} of kind {i % 4}" for i in range(ITEMS)]
    pq.write_table(
        pa.table({"item_id": pa.array(range(ITEMS), pa.int32()), "title": titles, "text": titles}),
        folder / "items.parquet",
    )
    rows = np.concatenate([rng.permutation(ITEMS)[:LENGTH] for _ in range(USERS)])
    interactions = {
        "user_id": pa.array(np.repeat(np.arange(USERS), LENGTH), pa.int32()),
        "item_id": pa.array(rows, pa.int32()),
        "position": pa.array(np.tile(np.arange(LENGTH), USERS), pa.int16()),
    }
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    np.save(folder / "text_minilm_f16.npy", rng.normal(size=(ITEMS, 8)).astype(np.float16))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """The configurations of the demo and of benchmarks that train, made tiny: compiling takes long, and longer the more
    layers, levels and shapes there are."""
    monkeypatch.setattr(cli, "train", _with(_generator, cli.train))
    monkeypatch.setattr(cli_tokenize, "tokenize", _with(_tokenizer, cli_tokenize.tokenize))
    families = {name: _generator(config) for name, config in minutes.FAMILIES.items()}
    for module in (peers, minutes):
        monkeypatch.setattr(module, "FAMILIES", families)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Short runs, without checks of shapes, which other tests have: tracing is most of their time."""
    runs = Smoke(tmp_path_factory.mktemp("smoke"))
    with pytest.MonkeyPatch.context() as patch, shapes.unchecked():
        patch.setattr("experiments.runner.tokenize", runs.tokenize)
        patch.setattr(CodeTrie, "from_codes", roomy(CodeTrie.from_codes))
        yield runs


def _with(shrink, function):
    """`function`, its last argument by position made smaller."""
    return lambda *given, **options: function(*given[:-1], shrink(given[-1]), **options)


def _generator(config):
    """Histories of one padded length, and the beams of validation those of evaluation: one program for both."""
    model = dataclasses.replace(config.model, backbone=dataclasses.replace(config.model.backbone, **TINY))
    if hasattr(model, "decoder_layers"):
        model = dataclasses.replace(model, decoder_layers=1)
    return dataclasses.replace(config, model=model, max_history=5, row_length=10, validation_beam=50)


def _tokenizer(config):
    method = dataclasses.replace(config.method, level_sizes=(8, 8))
    if isinstance(method, RQVaeConfig):
        training = dataclasses.replace(method.training, epochs=min(method.training.epochs, 2), batch_size=16)
        method = dataclasses.replace(method, hidden=(8,), latent=8, training=training)
    return dataclasses.replace(config, method=method)
