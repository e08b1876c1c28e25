"""Artifacts that the code before the packages wrote (commit d705499) are read, and answer as they did then.

`old_artifacts/expected.json` holds the answers of that code: rows, scores, metrics and codes.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from semid import Dataset, Recommender, SemanticCatalog, SemanticTokenizer, evaluate, tokenize
from semid.artifacts import read_artifact
from semid.catalog.versions import verify
from semid.config import from_dict
from semid.errors import SemidError
from semid.tokenizers import TokenizerConfig

FOLDER = Path(__file__).parent / "old_artifacts"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
HISTORIES, LATER, K = EXPECTED["histories"], EXPECTED["later_histories"], EXPECTED["k"]
SEARCH = {"k": K, "beam_size": EXPECTED["beam_size"]}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.load(FOLDER / "dataset")


@pytest.mark.parametrize("name", EXPECTED["artifact_digests"])
def test_every_digest_is_what_it_was(name):
    kind = {"dataset": "dataset", "catalog": "catalog"}.get(name, "model")
    assert read_artifact(FOLDER / name, kind).digest == EXPECTED["artifact_digests"][name]


def test_the_dataset_is_what_it_was(dataset):
    counts = {name: str(value) for name, value in dataset.statistics().items()}
    assert {name: counts[name] for name in EXPECTED["dataset"]["statistics"]} == EXPECTED["dataset"]["statistics"]


def test_the_catalogue_and_its_tokenizer_are_what_they_were(dataset):
    expected, versions = EXPECTED["catalog"], [SemanticCatalog.load(FOLDER / "catalog", v) for v in range(3)]
    assert [version.digest for version in versions] == expected["digests"]
    assert (versions[-1].item_ids.to_pylist(), versions[-1].codes.tolist()) == (expected["items"], expected["codes"])
    assert verify(FOLDER / "catalog").number == 2
    codes = SemanticTokenizer.from_pretrained(FOLDER / "catalog").encode(dataset.vectors("content"))
    assert codes.tolist() == EXPECTED["tokenizer"]["codes_of_content"]


@pytest.mark.parametrize("name", EXPECTED["models"])
def test_models_recommend_and_score_as_they_did(dataset, name):
    expected, model = EXPECTED["models"][name], Recommender.from_pretrained(FOLDER / name)
    top = model.recommend(HISTORIES, **SEARCH)
    assert top.item_ids == expected["item_ids"]
    np.testing.assert_allclose(top.scores, expected["scores"], rtol=1e-5)
    np.testing.assert_allclose(model.score(HISTORIES, ["i0", "i39"]), expected["score_i0_i39"], rtol=1e-5)
    values = evaluate(model, dataset, ks=(5, 10), beam_size=SEARCH["beam_size"]).values
    assert values == pytest.approx(expected["metrics"])
    if "later" in expected:
        later = Recommender.from_pretrained(FOLDER / name, catalog=FOLDER / "catalog").recommend(LATER, **SEARCH)
        assert later.item_ids == expected["later"]["item_ids"]
        np.testing.assert_allclose(later.scores, expected["later"]["scores"], rtol=1e-5)
        first = Recommender.from_pretrained(FOLDER / name, catalog=f"{FOLDER / 'catalog'}@0")
        assert len(first.catalog) == len(model.catalog) < len(SemanticCatalog.load(FOLDER / "catalog"))


def test_a_stage_does_not_take_an_old_artifact_for_its_own(dataset):
    """They do not say which version of the stage wrote them."""
    made = read_artifact(FOLDER / "catalog", "catalog")
    config = from_dict(TokenizerConfig, made.config["tokenizer"])
    with pytest.raises(SemidError, match=r"in use by a catalog of other settings \(.*stage_version: None -> 1"):
        tokenize(dataset, config, out=FOLDER / "catalog", seed=made.seed)
