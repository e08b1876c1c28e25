"""Vector columns by pretrained encoders in their folders: made, stored by their recipe, made again, refused."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from semid.bulk import encode_files
from semid.catalog import Collisions, SemanticCatalog, append
from semid.data import Dataset
from semid.encoders import (
    PretrainedVectorsConfig,
    TextEncoder,
    TextRows,
    image_rows,
    load_image_encoder,
    load_text_encoder,
    restore_encoders,
    with_content_vectors,
)
from semid.encoders.weights import folder_digest
from semid.errors import SemidError
from semid.tokenizers import RQKmeansConfig, SemanticTokenizer, TokenizerConfig, tokenize

GOLDEN = Path(__file__).parent / "golden"
WORDS = json.loads((GOLDEN / "bert" / "tokenizer.json").read_text())["model"]["vocab"]
TITLES = [" ".join(list(WORDS)[5 + row : 7 + row + row % 3]) for row in range(6)] + [""]


@pytest.fixture
def bert(tmp_path) -> Path:
    folder = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "tiny bert"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def _picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    items = {"item_id": [f"i{row}" for row in range(7)], "title": TITLES}
    items["image"] = [None, *(_picture(row) for row in range(6))]
    interactions = pa.table({"user_id": ["u"] * 3, "item_id": ["i0", "i1", "i2"], "position": [0, 1, 2]})
    return Dataset.build(pa.table(items), interactions, name="words", source={"type": "test"})


def test_items_are_encoded_by_float32_products(dataset, bert, monkeypatch):
    """On every device: codes are made of these vectors."""
    seen, encode = set(), TextEncoder.__call__

    def asked(*args, **named):
        seen.add(jax.config.jax_default_matmul_precision)
        return encode(*args, **named)

    monkeypatch.setattr(TextEncoder, "__call__", asked)
    with_content_vectors(dataset, PretrainedVectorsConfig(str(bert)))
    assert seen == {"highest"}


def test_texts_become_the_vectors_of_the_loaded_encoder(dataset, bert):
    made = with_content_vectors(dataset, PretrainedVectorsConfig(str(bert)))
    encoder, tokenizer = load_text_encoder(bert)
    vectors = made.vectors("text_tiny-bert")
    for row, title in enumerate(TITLES[:-1]):
        alone = tokenizer.rows([title], max_length=16).rows
        np.testing.assert_allclose(vectors[row], np.asarray(encoder(TextRows(*alone)))[0], atol=2e-6)
    assert not vectors[-1].any()
    assert np.ptp(vectors, axis=0).max() > 0.1
    recipe = made.source.pop("text_tiny-bert")
    assert recipe["weights"] == folder_digest(bert)
    assert {name: recipe[name] for name in ("encoder", "reader", "pooling", "normalize", "max_length", "width")} == {
        "encoder": str(bert),
        "reader": "text",
        "pooling": "mean",
        "normalize": False,
        "max_length": 16,
        "width": 8,
    }
    assert made.source == dataset.source
    with pytest.warns(UserWarning, match="6 of 7 texts are cut to 3 tokens"):
        cut = with_content_vectors(dataset, PretrainedVectorsConfig(str(bert), "short", max_length=3))
    assert np.abs(cut.vectors("short")[:-1] - vectors[:-1]).max() > 1e-3


def test_an_encoder_is_read_from_a_url_and_recorded_by_it(dataset, bert, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = fsspec.filesystem("memory")
    try:
        for file in filter(Path.is_file, bert.rglob("*")):
            there.pipe_file(f"/models/bert/{file.relative_to(bert)}", file.read_bytes())
        url = "memory://models/bert"
        found, expected = (
            with_content_vectors(dataset, PretrainedVectorsConfig(str(of), "text")) for of in (url, bert)
        )
        assert found.encoders[0].settings["encoder"] == url
        assert folder_digest(url) == folder_digest(bert) == found.encoders[0].settings["weights"]
        np.testing.assert_array_equal(found.vectors("text"), expected.vectors("text"))
        assert load_text_encoder(url).tokenizer.size == load_text_encoder(bert).tokenizer.size
    finally:
        there.store.clear()


def test_pictures_become_the_vectors_of_the_loaded_encoder(dataset):
    made = with_content_vectors(dataset, PretrainedVectorsConfig(str(GOLDEN / "vit"), "seen"))
    encoder = load_image_encoder(GOLDEN / "vit")
    rows = image_rows(dataset.items["image"].to_pylist(), item_ids=dataset.item_ids.to_pylist(), config=encoder.config)
    expected = np.array(encoder(rows))
    expected[0] = 0.0  # it has no picture
    np.testing.assert_allclose(made.vectors("seen"), expected, atol=2e-6)
    assert (made.encoders[-1].inputs, made.source["seen"]["reader"]) == (("image",), "image")
    blind = dataset.replace(items=dataset.items.drop_columns(["image"]))
    with pytest.raises(SemidError, match=r"dataset 'words' has no column 'image' of pictures for .*vit to read"):
        with_content_vectors(blind, PretrainedVectorsConfig(str(GOLDEN / "vit")))
    (encoder,) = restore_encoders(made.encoders).values()
    for values, kind in ((["a.png"], "string"), ([{"bytes": b"x"}], "struct<bytes: binary>")):
        with pytest.raises(SemidError, match=f"column 'image': expected the bytes of PNG or JPEG files, got {kind};"):
            encoder.encode(pa.table({"image": values}))
    assert not encoder.encode(pa.table({"image": [None]})).any()  # control


@pytest.mark.parametrize("column", ["title", "item_id", "image"])
def test_a_column_that_holds_no_vectors_is_not_replaced(dataset, bert, column):
    config = PretrainedVectorsConfig(str(bert), column).resolved()
    with pytest.raises(SemidError, match=f"dataset 'words': column '{column}' is there and holds no vectors; choose"):
        config.fit(dataset)
    config.fit(
        dataset.replace(items=pa.table({"text": TITLES, column: pa.array([[1.0]] * 7, pa.list_(pa.float32(), 1))}))
    )


@pytest.mark.filterwarnings("ignore:.*have nothing in title")
def test_new_items_are_encoded_by_their_texts_at_every_door_while_the_folder_is_there(
    dataset, bert, tmp_path, monkeypatch
):
    made = with_content_vectors(dataset, PretrainedVectorsConfig(str(bert), "text"))
    made.save(tmp_path / "dataset")
    tokenize(
        Dataset.load(tmp_path / "dataset"),
        TokenizerConfig(RQKmeansConfig((3, 2)), collisions=Collisions.ALLOWED),
        out=tmp_path / "catalog",
    )
    new = tmp_path / "new.csv"
    new.write_text(f"item_id,title\nn0,{TITLES[2]}\nn1,{TITLES[4]}\n")
    append(tmp_path / "catalog", [new], tokenizer=SemanticTokenizer.from_pretrained(tmp_path / "catalog"))
    catalog = SemanticCatalog.load(tmp_path / "catalog")
    np.testing.assert_array_equal(catalog.lookup(["n0", "n1"]), catalog.lookup(["i2", "i4"]))
    raw = dataset.items.select(["item_id", "title"])
    bert.rename(tmp_path / "moved")
    tokenizer = SemanticTokenizer.from_pretrained(tmp_path / "catalog")  # it can do without as long as vectors come
    np.testing.assert_array_equal(tokenizer.encode(made.vectors("text")), catalog.codes[:7])
    with pytest.raises(SemidError, match=r"column 'text' needs the encoder .*tiny bert, and there is no such"):
        tokenizer.encode(raw)
    elsewhere = tmp_path / "models" / bert.name
    elsewhere.parent.mkdir()
    for place in (tmp_path / "moved", elsewhere.parent):  # the folder itself, or one that has it under its name
        if place == elsewhere.parent:
            (tmp_path / "moved").rename(elsewhere)
        monkeypatch.setenv("SEMID_ENCODERS", f"{tmp_path / 'nowhere'}{os.pathsep}{place}")
        tokenizer = SemanticTokenizer.from_pretrained(tmp_path / "catalog")
        np.testing.assert_array_equal(tokenizer.encode(raw), catalog.codes[:7])
    encode_files(tokenizer, [new], tmp_path / "codes")
    encoded = SemanticCatalog.read(tmp_path / "codes" / "new.parquet")
    np.testing.assert_array_equal(encoded.lookup(["n0", "n1"]), catalog.lookup(["i2", "i4"]))
    (elsewhere / "vocab.txt").write_text("changed")
    elsewhere.rename(bert)
    with pytest.raises(SemidError, match=r"tiny bert: not the files that column 'text' needs \(sha256 [0-9a-f]{64}, n"):
        SemanticTokenizer.from_pretrained(tmp_path / "catalog").encode(raw)


def test_a_repository_of_the_hub_is_recorded_by_its_commit(dataset, bert, tmp_path, monkeypatch):
    asked, commit = [], "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(bert, tmp_path / "snapshots" / commit))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, *, revision, allow_patterns: asked.append((name, revision)) or str(snapshot),
    )
    made = with_content_vectors(dataset, PretrainedVectorsConfig("some-org/tiny-bert"))
    (stored,) = made.encoders
    assert (stored.column, stored.settings["revision"]) == ("text_tiny-bert", commit)
    again = restore_encoders([stored])["text_tiny-bert"]
    np.testing.assert_array_equal(again.encode(dataset.items), made.vectors("text_tiny-bert"))
    assert set(asked) == {("some-org/tiny-bert", None), ("some-org/tiny-bert", commit)}
    assert asked[-1] == ("some-org/tiny-bert", commit)


def test_what_cannot_be_read_is_refused_with_the_extra_that_might(dataset, bert, tmp_path, monkeypatch):
    with pytest.raises(SemidError, match=r"encoder nowhere: no such folder$"):
        PretrainedVectorsConfig("nowhere").resolved()
    with pytest.raises(SemidError, match="expected at least 1 token for texts, got 0"):
        PretrainedVectorsConfig(str(bert), max_length=0)
    with pytest.raises(SemidError, match="column 'a b': expected letters, digits, _, - and dots; choose another name"):
        PretrainedVectorsConfig(str(bert), "a b")
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (bert / "modules.json").write_text(json.dumps(modules))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SemidError, match=r"expected model_type of bert, t5, .* got modules .*Dense; .*\[sentence-tra"):
        PretrainedVectorsConfig(str(bert)).resolved()
    (bert / "modules.json").unlink()
    (bert / "config.json").write_text('{"model_type": "mpnet"}')
    with pytest.raises(SemidError, match=r"expected model_type of bert, .* got model_type 'mpnet'; .*\[sentence-tra"):
        PretrainedVectorsConfig(str(bert)).resolved()


def test_other_text_models_are_read_by_sentence_transformers(dataset, bert, monkeypatch):
    """Its place is taken by a stand-in here: it needs torch."""

    class Model:
        max_seq_length = 5

        def __init__(self, folder, **options):
            assert (folder, options["model_kwargs"]) == (str(bert), {"use_safetensors": True})

        def get_sentence_embedding_dimension(self):
            return 2

        def encode(self, texts, **_):
            return np.array([[len(text), self.max_seq_length] for text in texts])

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model, __spec__=Model)
    )
    (bert / "config.json").write_text('{"model_type": "mpnet"}')
    (bert / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer"}]')
    made = with_content_vectors(dataset, PretrainedVectorsConfig(str(bert), "st", max_length=4))
    expected = np.array([[len(title), 4.0 if title else 0.0] for title in TITLES])
    np.testing.assert_array_equal(made.vectors("st"), expected)
    assert {name: made.source["st"][name] for name in ("reader", "max_length", "width")} == {
        "reader": "sentence-transformers",
        "max_length": 4,
        "width": 2,
    }
