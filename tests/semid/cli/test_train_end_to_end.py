"""The command `semid train-end-to-end`, on texts alone: its model recommends, and encodes items by what it holds."""

import json

import numpy as np
import pytest

from semid import Dataset, Recommender
from semid.artifacts import Kind, read_artifact
from semid.cli import main
from semid.config import to_dict
from semid.data.simulated import SimulatedConfig, simulate
from semid.encoders import ContentReader, PretrainedText, SideAdapters, TextFromScratch
from semid.errors import SemidError
from semid.generators import GeneratorConfig
from semid.joint import JointConfig, Phase, encode_items, trained_encoder
from semid.tokenizers import RQVaeConfig
from semid.training import TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:7 of 120 texts are cut to 64 tokens")
SHORT = TrainingConfig(epochs=1, batch_size=64)
CONFIG = JointConfig(
    encoder=SHORT,
    tokenizer=RQVaeConfig(level_sizes=(8, 8), hidden=(8,), latent=4, training=SHORT),
    generator=GeneratorConfig(
        RQTransformerConfig(TransformerConfig(dim=8, layers=1, heads=2, hidden=8)), max_history=5, training=SHORT
    ),
    joint=(Phase(SHORT),),
    finetune=SHORT,
    tie_break=120,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("end_to_end")
    world = SimulatedConfig(num_items=120, num_users=60, taxonomy=(2, 2, 2), family_size=1.0, images=False)
    simulate(world).dataset.save(home / "dataset")
    (home / "config.json").write_text(json.dumps(to_dict(CONFIG)))
    run(home, "--config", str(home / "config.json"))
    return home


def run(home, *options):
    main(["train-end-to-end", "--dataset", str(home / "dataset"), "--out", str(home / "model"), *options])


def test_the_model_recommends_and_encodes_items_by_what_its_folder_holds(home):
    assert {path.name for path in home.iterdir()} == {"dataset", "config.json", "model"}
    model, dataset = Recommender.from_pretrained(home / "model"), Dataset.load(home / "dataset")
    recommended = model.recommend([dataset.item_ids[:2].to_pylist()], k=3, beam_size=5)
    assert set(recommended.item_ids[0]) <= set(dataset.item_ids.to_pylist())
    content = ContentReader.load(home / "model").read(dataset)
    vectors = encode_items(trained_encoder(home / "model"), content)
    np.testing.assert_allclose(vectors, np.asarray(model.tables.features), atol=1e-4)
    manifest = read_artifact(home / "model", Kind.MODEL)
    assert manifest.parents == {"dataset": dataset.digest}
    interactions = dataset.num_training_interactions
    chosen = CONFIG.resolved(items=dataset.num_items, interactions=interactions, repeats=False)
    assert manifest.config["joint"] == to_dict(chosen)
    assert model.spec.repeat_factor == 0
    assert manifest.config["content"]["text"] == to_dict(TextFromScratch())


def test_a_finished_run_is_read_and_another_request_refused(home, capsys):
    before = {path: path.stat().st_mtime_ns for path in (home / "model").iterdir()}
    run(home, "--config", str(home / "config.json"))
    assert {path: path.stat().st_mtime_ns for path in (home / "model").iterdir()} == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(home, "--config", str(home / "config.json"), "--seed", "1")
    assert str(home / "model") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "none"), "expected text, image or vectors to encode items from, got none of them"),
        (("--teacher", "no_such"), "no_such: no such artifact"),
        (("--teacher", "{home}/model"), "no term learns from the teacher: weigh teacher_codes or teacher_states"),
        (("--text", "no_such"), "--text no_such: no such folder; expected scratch, none or that of a pretrained model"),
        (("--config", "{home}/dataset/manifest.json"), "manifest.json: line 2: kind: unknown key"),
        (("--config", "{home}/no.json"), "no.json: no such file"),
    ],
)
def test_options_that_do_not_fit_are_answered(home, tmp_path, capsys, options, message):
    words = [word.format(home=home) for word in options]
    with pytest.raises(SystemExit):
        main(["train-end-to-end", "--dataset", str(home / "dataset"), "--out", str(tmp_path / "m"), *words])
    assert message in capsys.readouterr().err


def test_a_folder_is_tuned_as_asked(tmp_path):
    from semid.cli.train_end_to_end import TrainEndToEnd

    command = TrainEndToEnd(tmp_path, tmp_path / "m", text=str(tmp_path), tuning="low-rank")
    source = command._text()
    assert isinstance(source, PretrainedText)
    assert (source.folder, source.tuning.rank) == (str(tmp_path), 8)
    assert TrainEndToEnd(tmp_path, tmp_path / "m", text=str(tmp_path))._text().tuning == SideAdapters()
    with pytest.raises(SemidError, match=r"--tuning full is for pretrained encoders; give the folder of one"):
        TrainEndToEnd(tmp_path, tmp_path / "m", tuning="full").run()
