"""Latent semantic vectors: deterministic, of unit length, and nearer for texts that share words."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse
from scipy.sparse.linalg import svds

from semid.data import Dataset
from semid.encoders import LatentSemantics, LatentSemanticsConfig, restore_encoders, with_text_vectors
from semid.encoders.factors import truncated_svd
from semid.encoders.text import _tf_idf
from semid.errors import SemidError
from semid.recommender import encode_texts

TOPICS = (
    "lipstick gloss matte red lips makeup colour",
    "engine oil motor gear wheel brake garage",
    "novel author chapter poem story library ink",
)


def latent_semantic_vectors(texts: list[str], **options: int) -> np.ndarray:
    return LatentSemantics.fit(texts, LatentSemanticsConfig(**options)).encode_texts(texts)


def _texts(n: int = 30, *, seed: int = 0) -> list[str]:
    """Text `i` is five words of topic `i % 3` and one common one."""
    rng = np.random.default_rng(seed)
    return [" ".join([*rng.choice(TOPICS[i % 3].split(), 5, replace=False), "new"]) for i in range(n)]


def _dataset(texts: list[str] | None) -> Dataset:
    columns = {"item_id": [f"i{row}" for row in range(30)]} | ({} if texts is None else {"title": texts})
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    return Dataset.build(pa.table(columns), interactions, name="words", source={"type": "test"})


def test_texts_of_one_topic_are_nearer_than_of_two():
    vectors = latent_semantic_vectors(_texts(), dim=4)
    cosine, topic = vectors @ vectors.T, np.arange(30) % 3
    same = topic[:, None] == topic
    assert cosine[same].min() > cosine[~same].max()
    # Control: with the topics shuffled away from the texts there is nothing to find.
    shuffled = np.random.default_rng(1).permutation(topic)
    same = (shuffled[:, None] == shuffled) & ~np.eye(30, dtype=bool)
    assert abs(cosine[same].mean() - cosine[~same].mean()) < 0.2


def test_the_singular_value_decomposition_is_that_of_a_dense_solver():
    texts = _texts(12)
    vocabulary = sorted({word for text in texts for word in text.split()})
    counts = np.array([[text.split().count(word) for word in vocabulary] for text in texts], float)
    counts = counts[:, (counts > 0).sum(axis=0) > 1]
    weighted = counts * (np.log(len(texts) / (counts > 0).sum(axis=0)) + 1)  # each word at most once: 1 + log tf = 1
    left, singular, _ = np.linalg.svd(weighted, full_matrices=False)
    expected = (left * singular)[:, :5]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = latent_semantic_vectors(texts, dim=5)
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=1e-5)  # free of the signs of the axes


def test_weights_are_those_of_counts_in_any_order_of_words():
    texts, words, idf = ["two one two x", "", "one three"], ("one", "two", "three"), np.array([1.5, 2.0, 0.5])
    expected = [[1.5, 2.0 * (1 + np.log(2.0)), 0.0], [0.0, 0.0, 0.0], [1.5, 0.0, 0.5]]
    found = _tf_idf(texts, {word: place for place, word in enumerate(words)}, idf)
    np.testing.assert_array_equal(found.toarray(), np.array(expected, np.float32))
    assert (found.nnz, found.indices.tolist(), found.dtype) == (4, [0, 1, 0, 2], np.float32)


def test_the_same_texts_give_the_same_bits():
    first, second = (latent_semantic_vectors(_texts(), dim=6) for _ in range(2))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, latent_semantic_vectors(_texts(seed=1), dim=6))


def test_few_different_texts_give_the_same_bits_too():
    """Where many dimensions are left that nothing lies in, ARPACK draws vectors as it goes."""
    rng, words = np.random.default_rng(0), [f"w{place}" for place in range(600)]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(5)] * 140
    found = [LatentSemantics.fit(texts, LatentSemanticsConfig(dim=16)).basis for _ in range(3)]
    assert found[0].shape[1] == 16
    for again in found[1:]:
        np.testing.assert_array_equal(again, found[0])


@pytest.mark.parametrize("shape", [(90, 70), (30, 70)])
def test_factors_are_those_of_scipy_to_the_bit(shape):
    rng = np.random.default_rng(0)
    matrix = sparse.random_array(shape, density=0.2, rng=rng, dtype=np.float32).tocsr()
    start = rng.standard_normal(min(shape)).astype(np.float32)
    expected = svds(matrix, k=8, v0=start)
    found = truncated_svd(matrix, rank=8, start=start)
    for ours, theirs in zip(found, (expected[0][:, ::-1], expected[1][::-1], expected[2][::-1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_vectors_have_unit_length_and_texts_without_known_words_are_zero():
    vectors = latent_semantic_vectors([*_texts(), "", "unheardof"], dim=4)
    np.testing.assert_allclose(np.linalg.norm(vectors[:30], axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[30:], 0)


def test_fewer_texts_than_dimensions_give_fewer_dimensions():
    assert latent_semantic_vectors(_texts(6), dim=64).shape == (6, 5)
    assert latent_semantic_vectors(_texts(), dim=64, vocabulary=8).shape == (30, 7)


def test_case_and_punctuation_do_not_matter():
    loud = [text.upper().replace(" ", " -- ") for text in _texts()]
    np.testing.assert_array_equal(latent_semantic_vectors(loud, dim=4), latent_semantic_vectors(_texts(), dim=4))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["alpha beta", "alpha beta"], "at least 3 texts that share 2 words, got 2 with 2 shared words"),
        (["one", "two", "three"], "got 3 with 0 shared words; give a vector column before tokenizing"),
        ([], "got 0 with 0 shared words"),
    ],
)
def test_too_little_text_is_refused(texts, message):
    with pytest.raises(SemidError, match=message):
        latent_semantic_vectors(texts, dim=4)


def test_no_dimension_is_refused():
    with pytest.raises(SemidError, match="at least 1 dimension for text vectors, got 0"):
        latent_semantic_vectors(_texts(), dim=0)


def test_no_vocabulary_is_refused():
    for size in (1, -5):  # the last would leave out the five rarest words
        with pytest.raises(SemidError, match=f"a vocabulary of at least 2 words, got {size}"):
            LatentSemanticsConfig(vocabulary=size)
    LatentSemanticsConfig(vocabulary=2)


def test_a_dataset_gets_a_vector_column_and_notes_it_in_its_source():
    dataset = _dataset(_texts())
    made = with_text_vectors(dataset, dim=4)
    assert (dataset.vector_columns, made.vector_columns) == ([], ["text_lsa"])
    np.testing.assert_array_equal(made.vectors("text_lsa"), latent_semantic_vectors(dataset.texts(), dim=4))
    recipe = {"type": "LatentSemanticsConfig", "dim": 4, "vocabulary": 50_000}
    assert made.source == {"type": "test", "text_lsa": recipe}


def test_the_encoder_goes_with_the_dataset_and_gives_its_items_the_vectors_that_they_have(tmp_path):
    made = with_text_vectors(_dataset(_texts()), dim=4).save(tmp_path / "dataset")
    loaded = Dataset.load(tmp_path / "dataset")
    for dataset in (made, loaded):
        encoder = restore_encoders(dataset.encoders)["text_lsa"]
        assert (encoder.inputs, encoder.width) == (("title",), 4)
        np.testing.assert_array_equal(encoder.encode(loaded.items), loaded.vectors("text_lsa"))
        np.testing.assert_array_equal(encoder.encode(loaded.items.slice(7, 1)), loaded.vectors("text_lsa")[7:8])
    assert made.with_vectors("text_lsa", np.zeros((30, 2))).encoders == ()  # that column is another's now
    assert made.with_vectors("other", np.zeros((30, 2))).encoders == made.encoders  # control


def test_texts_that_are_asked_for_again_restore_no_encoder_again(monkeypatch):
    stored, other = (with_text_vectors(_dataset(_texts()), dim=4).encoders[0] for _ in range(2))
    restored, restore = [], LatentSemanticsConfig.restore
    monkeypatch.setattr(LatentSemanticsConfig, "restore", lambda self, one: restored.append(one) or restore(self, one))
    first, again, of_other = (encode_texts(one, ["red lipstick"]) for one in (stored, stored, other))
    assert restored == [stored, other]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, of_other)
    assert first.any()


def test_folding_in_is_the_projection_that_a_dense_solver_gives():
    texts = _texts(12)
    fitted = LatentSemantics.fit(texts, LatentSemanticsConfig(dim=5))
    new = [f"{fitted.words[1]} {fitted.words[5]} {fitted.words[1]}", "unheardof"]
    known = [[text.split().count(word) for word in fitted.words] for text in texts]
    weighted = np.array(known, float) * fitted.idf  # each word at most once: 1 + log tf = 1
    _, _, right = np.linalg.svd(weighted, full_matrices=False)
    counts = np.array([[text.split().count(word) for word in fitted.words] for text in new], float)
    row = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * fitted.idf @ right[:5].T
    both = np.concatenate([weighted @ right[:5].T, row[:1]])
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    vectors = fitted.encode_texts(new)
    np.testing.assert_allclose(fitted.encode_texts(texts) @ vectors[0], both[:-1] @ both[-1], atol=1e-5)
    np.testing.assert_array_equal(vectors[1], 0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"item_id": ["a"]}, "column 'title' is missing; found item_id; add it, empty or not"),
        ({"title": [3]}, "column 'title': expected texts, got int64; convert it to strings"),
    ],
)
def test_items_without_the_raw_columns_are_refused(items, message):
    encoder = LatentSemantics.fit(_texts(), LatentSemanticsConfig(dim=4), inputs=("title",))
    with pytest.raises(SemidError, match=message):
        encoder.encode(pa.table(items))
    assert encoder.encode(pa.table({"title": pa.array([None], pa.null())})).tolist() == [[0, 0, 0, 0]]  # control


def test_a_dataset_without_text_is_refused():
    with pytest.raises(SemidError, match="dataset 'words' has neither vector nor text columns"):
        with_text_vectors(_dataset(None))
