"""SASRec that reads the graph's best items: nothing at first, then a map of the mean of their vectors."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.graph_inputs import GraphReader
from seq_models import DenseConfig, TeacherItems, TransformerConfig


def test_states_gain_a_map_of_the_mean_of_what_the_graph_finds():
    config = DenseConfig(TransformerConfig(dim=4, layers=1, heads=1, hidden=4, dropout=0.0))
    model = GraphReader(config, num_items=5, num_features=0, reads=True, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    vectors = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    found = TeacherItems(jnp.asarray([[1, 3], [-1, -1]], jnp.int32), jnp.log(jnp.asarray([[0.6, 0.2], [0.0, 0.0]])))
    np.testing.assert_array_equal(model.with_found(states, vectors, found), states)
    kernel = rng.normal(size=(4, 4)).astype(np.float32)
    model.found.kernel[...] = jnp.asarray(kernel)
    got = np.asarray(model.with_found(states, vectors, found) - states)
    mean = 0.75 * np.asarray(vectors[1]) + 0.25 * np.asarray(vectors[3])
    np.testing.assert_allclose(got[0], 2 * mean @ kernel, rtol=1e-5)  # vectors as large as in histories: sqrt(4)
    np.testing.assert_array_equal(got[1], 0)
    model.reads = False
    np.testing.assert_array_equal(model.with_found(states, vectors, found), states)
