"""Content read from a dataset: by encoders from scratch, from pretrained folders and from vectors, and again later."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

from semid.config import from_dict, to_dict
from semid.data.simulated import SimulatedConfig, simulate
from semid.encoders import (
    BlocksConfig,
    ContentConfig,
    ContentReader,
    FusionConfig,
    ImageConfig,
    ImageFromScratch,
    ItemContent,
    LowRank,
    PretrainedImage,
    PretrainedText,
    SideAdapters,
    TextEncoderConfig,
    TextFromScratch,
    read_content,
)
from semid.errors import SemidError

pytestmark = pytest.mark.filterwarnings("ignore:.* texts are cut to 16 tokens")  # all that the golden BERT reads
GOLDEN = Path(__file__).parent / "golden"
BLOCKS = BlocksConfig(dim=8, layers=1, heads=2, hidden=8)
SCRATCH = ContentConfig(
    TextFromScratch(TextEncoderConfig(BLOCKS, max_length=16), vocabulary=200),
    ImageFromScratch(ImageConfig(size=8, patch=4, blocks=BLOCKS)),
    vectors=("content",),
    fusion=FusionConfig(dim=8, hidden=8),
)


@pytest.fixture(scope="module")
def world():
    config = SimulatedConfig(
        num_items=30, num_users=20, max_length=10, mean_length=6.0, taxonomy=(2, 2, 2), content_dim=8
    )
    return simulate(config).dataset


@pytest.fixture
def pretrained(tmp_path):
    """The golden BERT with a pooling, and the golden ViT."""
    text = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))
    (text / "1_Pooling").mkdir()
    (text / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return text, Path(shutil.copytree(GOLDEN / "vit", tmp_path / "vit"))


def encoded(content: ItemContent):
    return np.asarray(jax.jit(lambda rows: content.encoder(rows))(content.rows))


def test_what_is_written_reads_the_same_content_and_builds_the_same_encoder(world, tmp_path):
    content = read_content(world, SCRATCH, seed=3)
    assert set(content.rows) == {"text", "image", "content"}
    content.reader.write(tmp_path)
    again = ContentReader.load(tmp_path)
    assert again.config == SCRATCH
    later = ItemContent(again.read(world), again.encoder(seed=3), again)
    assert later.digest() == content.digest()
    np.testing.assert_array_equal(encoded(later), encoded(content))
    assert read_content(world, SCRATCH, seed=4).digest() != content.digest()  # other parameters


def test_a_text_column_that_came_later_is_not_read(world, pretrained, tmp_path):
    world = world.replace(items=world.items.select(["item_id", "title"]))
    today = world.replace(items=world.items.add_column(1, "later", pa.array(["new"] * len(world.items))))
    for source in (SCRATCH.text, PretrainedText(str(pretrained[0]), tuning=LowRank(rank=2))):
        content = read_content(world, ContentConfig(source))
        content.reader.write(tmp_path)
        rows = ContentReader.load(tmp_path).read(today)["text"]
        jax.tree.map(np.testing.assert_array_equal, rows, content.rows["text"])
        assert read_content(today, ContentConfig(source)).digest() != content.digest()  # control


def test_vectors_of_another_width_than_the_encoder_reads_are_named(world, tmp_path):
    read_content(world, ContentConfig(text=None, vectors=("content",))).reader.write(tmp_path)
    today = world.with_vectors("content", world.vectors("content")[:, :4])
    with pytest.raises(
        SemidError, match=r"column 'content': expected vectors of 8 dimensions, .* got 4; give those of"
    ):
        ContentReader.load(tmp_path).read(today)


def test_a_config_survives_json():
    tuned = PretrainedText("bert", tuning=LowRank(rank=2))
    for config in (SCRATCH, ContentConfig(tuned, PretrainedImage("vit"))):
        assert from_dict(ContentConfig, to_dict(config)) == config


@pytest.mark.parametrize("tuning", [SideAdapters(states=2, hidden=4), LowRank(rank=2)])
def test_pretrained_encoders_are_tuned_and_read_again_from_their_folders(world, pretrained, tuning, tmp_path):
    text, image = pretrained
    config = ContentConfig(PretrainedText(str(text), tuning=tuning), PretrainedImage(str(image), tuning=tuning))
    content = read_content(world, config, cache=tmp_path / "states")
    cached = isinstance(tuning, SideAdapters)
    assert (tmp_path / "states").exists() == cached
    assert [hasattr(rows, "states") for rows in content.rows.values()] == [cached, cached]
    content.reader.write(tmp_path)
    again = ContentReader.load(tmp_path)
    later = ItemContent(again.read(world), again.encoder())
    np.testing.assert_array_equal(encoded(later), encoded(content))
    assert np.abs(encoded(content)).max() > 0.1


def test_pretrained_folders_are_found_where_they_have_moved_and_other_weights_refused(
    world, pretrained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    read_content(world, ContentConfig(PretrainedText("bert", tuning=LowRank(rank=2)))).reader.write(tmp_path)
    assert ContentReader.load(tmp_path).config.text.folder == "bert"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SemidError, match=r"content.json needs the encoder bert, and there is no such folder here; put"):
        ContentReader.load(tmp_path)
    monkeypatch.setenv("SEMID_ENCODERS", str(tmp_path))
    reader = ContentReader.load(tmp_path)
    assert reader.config.text.folder == str(tmp_path / "bert")
    reader.write(tmp_path)  # control: the one that is written next has the folder that was found
    monkeypatch.delenv("SEMID_ENCODERS")
    ContentReader.load(tmp_path)
    with (tmp_path / "bert" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(
        SemidError, match=r"bert: not the files that .*content.json needs \(sha256 .*; put those back, n"
    ):
        ContentReader.load(tmp_path)


def test_what_does_not_fit_is_refused(world, tmp_path):
    with pytest.raises(SemidError, match="expected text, image or vectors to encode items from, got none"):
        ContentConfig(text=None)
    with pytest.raises(SemidError, match=r"image: expected the config .* ImageFromScratch\(\) or .*, got 'scratch'"):
        ContentConfig(image="scratch")
    with pytest.raises(SemidError, match=r"vectors: expected names of columns, got 'content'; give \('content',\)"):
        ContentConfig(vectors="content")
    with pytest.raises(SemidError, match="expected alpha above 0"):
        LowRank(alpha=0.0)
    with pytest.raises(SemidError, match="expected head_width of at least 1, got 0"):
        BlocksConfig(head_width=0)
    with pytest.raises(SemidError, match="a vector column named 'image' cannot be told from a part of the"):
        ContentConfig(vectors=("image",))
    for fusion, column in ((FusionConfig(), "items"), (FusionConfig(cross=True), "cross")):
        with pytest.raises(SemidError, match=f"a vector column named '{column}' cannot be told from a part of the"):
            ContentConfig(vectors=(column,), fusion=fusion)
    ContentConfig(vectors=("cross",))  # control
    with pytest.raises(SemidError, match="no vector column 'absent'"):
        read_content(world, ContentConfig(text=None, vectors=("absent",)))
    mute = world.replace(items=world.items.select(["item_id", "content"]))
    with pytest.raises(SemidError, match="dataset 'simulated' has no text columns; add one to the items table"):
        read_content(mute)
    blind = world.replace(items=world.items.drop_columns(["image"]))
    with pytest.raises(SemidError, match="has no column 'image' of pictures; leave the image encoder out"):
        read_content(blind, SCRATCH)
    with pytest.raises(SemidError, match=r"expected content.json, found none; its encoders were built by the caller"):
        ContentReader.load(tmp_path)
