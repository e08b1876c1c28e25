"""Further code sequences, from catalogues to the command line: what is read of them, and where an item has none."""

import json
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pytest
from jax import export
from safetensors.numpy import load_file

from semid import artifacts
from semid.catalog import CATALOG_FILE, SemanticCatalog, remove
from semid.catalog.changes import ChangeKind
from semid.catalog.versions import commit, current
from semid.cli import main
from semid.config import to_dict
from semid.data import Dataset
from semid.errors import SemidError
from semid.generators import GeneratorConfig, train
from semid.recommender import Recommender, export_program, read_spec
from semid.training import OptimizerConfig, TrainingConfig, make_mesh
from seq_models import DenseConfig, EncoderDecoderConfig, RQTransformerConfig
from seq_models import TransformerConfig as Stack

ITEMS = 12
BACKBONE = Stack(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
CONFIG = GeneratorConfig(
    model=RQTransformerConfig(BACKBONE),
    features=(),
    max_history=4,
    row_length=6,
    training=TrainingConfig(epochs=30, batch_size=32, validate_every=30, optimizer=OptimizerConfig(learning_rate=0.02)),
)


def ids(rows):
    return pa.array([f"i{row}" for row in rows])


CODES = SemanticCatalog(
    ids(range(ITEMS)), np.stack(np.unravel_index(np.arange(ITEMS), (4, 3)), axis=1).astype(np.int32), (4, 4)
)
# Of other items too, in another order, and without item 5: the parity of an item's number.
ROWS = [14, 3, 2, 1, 0, 4, 6, 7, 8, 9, 10, 11]
IMAGE = SemanticCatalog(ids(ROWS), np.array([[row % 2, row // 8] for row in ROWS], np.int32), (2, 2))
SOUND = SemanticCatalog(ids(range(4)), np.array([[row] for row in range(4)], np.int32), (4,))
SEQUENCES = {"image": IMAGE, "sound": SOUND}
ONE_DEVICE = make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    rng = np.random.default_rng(0)
    walks = [(rng.integers(ITEMS) + np.arange(6) * rng.integers(1, 3)) % ITEMS for _ in range(60)]
    table = {
        "user_id": np.repeat(np.arange(60), 6),
        "item_id": [f"i{row}" for walk in walks for row in walk],
        "position": np.tile(np.arange(6), 60),
    }
    built = Dataset.build(pa.table({"item_id": ids(range(ITEMS))}), pa.table(table), name="walks")
    return built.save(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def home(dataset, tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    train(dataset, CODES, CONFIG, out=home / "model", sequences=SEQUENCES, mesh=ONE_DEVICE)
    return home


@pytest.fixture(scope="module")
def model(home) -> Recommender:
    return Recommender.from_pretrained(home / "model")


def shown(recommender, history=("i0", "i5", "i3")):
    return recommender.recommend([list(history)], k=5)


def test_rows_are_those_of_the_items_and_missing_ones_are_none(model):
    image, sound = (np.asarray(codes) for codes in model.tables.sequences)
    assert image.tolist() == [[-1, -1] if row == 5 else [row % 2, row // 8] for row in range(ITEMS)]
    assert sound.tolist() == [[row] if row < 4 else [-1] for row in range(ITEMS)]
    spec = read_spec(model.origin.folder).sequences
    assert (spec.names, spec.level_sizes, spec.drop) == (("image", "sound"), ((2, 2), (4,)), 0.1)
    assert spec.catalogs == (IMAGE.digest, SOUND.digest)


def test_the_sequences_are_learned_and_stored(home, model):
    parameters = load_file(home / "model" / "model.safetensors")
    learned = {name: value for name, value in parameters.items() if name.startswith("sequences/")}
    assert sorted(value.shape for value in learned.values()) == [(5, 8), (5, 8)]
    assert all(np.abs(value).max() > 1e-3 for value in learned.values())
    missing = tuple(np.full_like(codes, -1) for codes in model.items.sequences)
    other = Recommender(model.model, model.catalog, spec=model.spec, items=model.items._replace(sequences=missing))
    assert np.abs(shown(model).scores - shown(other).scores).max() > 1e-4


def test_without_any_the_config_and_the_model_are_those_of_before(dataset, tmp_path):
    assert "drop_sequences" not in to_dict(CONFIG)
    plain = train(dataset, CODES, CONFIG, out=tmp_path / "plain", sequences={}, mesh=ONE_DEVICE)
    assert "sequences" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert plain.tables.sequences is None


def test_what_the_encoder_decoder_did_not_learn_is_trained_again(dataset, model, monkeypatch):
    requests = []

    def asked(request, *_, **__):
        requests.append(request)
        return model

    monkeypatch.setattr("semid.generators.training.run_stage", asked)
    for family in (EncoderDecoderConfig(BACKBONE), CONFIG.model):
        for sequences in (SEQUENCES, {}):
            train(dataset, CODES, replace(CONFIG, model=family), sequences=sequences)
    assert [request.version for request in requests] == [9, 1, 1, 1]


def test_another_version_of_a_sequence_is_another_request(dataset, model, tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr("semid.generators.training.run_stage", lambda one, *_, **__: requests.append(one) or model)
    folder = tmp_path / "image"
    with artifacts.write_artifact(folder, kind="catalog", config={}, parents=dataset.parents) as new:
        IMAGE.write(new / CATALOG_FILE)

    def asked(name):
        train(dataset, CODES, CONFIG, sequences={"image": SemanticCatalog.load(name)})
        return requests[-1].parents["sequence image"]

    before = asked(folder)
    assert before == asked(folder) == SemanticCatalog.load(folder).origin.digest
    appended = pa.table({"item_id": ["i5"], "codes": pa.array([[1, 1]], pa.list_(pa.int32(), 2))})
    commit(folder, current(folder), ChangeKind.APPEND, appended)
    after = asked(folder)
    remove(folder, ["i14"])  # its codes are read as before
    assert before == asked(f"{folder}@0") != after == asked(folder)


def test_appended_items_are_read_by_later_catalogues_or_without(model):
    grown = SemanticCatalog(
        ids([*range(ITEMS), 14, 15]), np.concatenate([CODES.codes, [[3, 3], [2, 3]]]).astype(np.int32), (4, 4)
    )
    without = model.with_catalog(grown)
    assert all((np.asarray(codes)[ITEMS:] == -1).all() for codes in without.tables.sequences)
    read = model.with_catalog(grown, sequences={"image": IMAGE})
    image, sound = (np.asarray(codes) for codes in read.tables.sequences)
    assert image[ITEMS:].tolist() == [[0, 1], [-1, -1]]
    assert (sound[ITEMS:] == -1).all()
    np.testing.assert_array_equal(image[:ITEMS], np.asarray(model.tables.sequences[0]))
    assert np.abs(shown(read, ["i0", "i14"]).scores - shown(without, ["i0", "i14"]).scores).max() > 1e-4
    changed = SemanticCatalog(IMAGE.item_ids, 1 - IMAGE.codes, (2, 2))
    for catalogs, message in (
        ({"imag": IMAGE}, "reads no code sequence 'imag', but image, sound"),
        ({"sound": IMAGE}, r"'sound' of levels \[4\], got a catalogue of \[2, 2\]"),
        ({"image": changed}, "'image' has other codes for 11 of the items"),
    ):
        with pytest.raises(SemidError, match=message):
            model.with_catalog(grown, sequences=catalogs)


@pytest.mark.usefixtures("unchecked")
def test_a_program_for_jax_alone_reads_them(model, tmp_path):
    export_program(model, tmp_path / "program", k=5, platforms=("cpu",))
    loaded = export.deserialize((tmp_path / "program" / "program.stablehlo").read_bytes())
    arrays = load_file(tmp_path / "program" / "arrays.safetensors")
    history = np.array([[0, 5, 3, 0]], np.int32)
    rows, scores = loaded.call(arrays, history, np.array([3], np.int32))
    expected = shown(model)
    assert [f"i{row}" for row in np.asarray(rows)[0]] == expected.item_ids[0]
    np.testing.assert_allclose(np.asarray(scores)[0], expected.scores[0], atol=1e-5)


def test_what_does_not_fit_is_refused(dataset):
    strangers = SemanticCatalog(pa.array(["x", "y"]), np.zeros((2, 1), np.int32), (4,))
    with pytest.raises(SemidError, match="'image' has none of the 12 items; give a catalogue of the same item ids"):
        train(dataset, CODES, CONFIG, sequences={"image": strangers})
    dense = GeneratorConfig(DenseConfig(BACKBONE), features=())
    with pytest.raises(SemidError, match="further code sequences are for models of codes; SASRec"):
        train(dataset, CODES, dense, sequences=SEQUENCES)
    with pytest.raises(SemidError, match=r"drop_sequences in \[0, 1\), got 1"):
        GeneratorConfig(drop_sequences=1.0)


def test_by_command_line_from_catalogues_to_a_package(dataset, home, tmp_path, capsys):
    data, runs = str(dataset.origin.folder), {"codes": CODES, "image": IMAGE}
    for name, catalog in runs.items():
        index = {
            item: [f"<{'abc'[level]}_{code}>" for level, code in enumerate(codes)]
            for item, codes in zip(catalog.item_ids.to_pylist(), catalog.codes.tolist(), strict=True)
            if item != "i14"
        }
        if name == "image":
            index["i5"] = ["<a_0>", "<b_1>"]  # an imported catalogue is of all the dataset's items
        (tmp_path / f"{name}.json").write_text(json.dumps(index))
        read = ["--codes", str(tmp_path / f"{name}.json"), "--dataset", data, "--out", str(tmp_path / name)]
        main(["import-codes", *read])
    tiny = ["rq-transformer", "--dim", "8", "--layers", "1", "--heads", "2", "--hidden", "8"]
    asked = ["train", "--dataset", data, "--catalog", str(tmp_path / "codes"), "--out", str(tmp_path / "model")]
    given = ["--sequences", f"image={tmp_path / 'image'}"]
    main([*asked, *given, "--epochs", "1", *tiny])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["sequences"]["names"] == ["image"]
    main(["package", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "package")])
    assert "the code sequences image" in (tmp_path / "package" / "README.md").read_text()
    packaged = Recommender.from_pretrained(tmp_path / "package")
    trained = Recommender.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(shown(packaged).scores, shown(trained).scores)
    of_now = ["--catalog", str(tmp_path / "codes"), *given, "--beam-size", "2", "--split", "validation"]
    main(["evaluate", "--model", str(tmp_path / "model"), "--dataset", data, *of_now])
    measured = json.loads((tmp_path / "metrics_validation_catalog.json").read_text())["provenance"]
    assert measured["sequences"] == {"image": SemanticCatalog.load(tmp_path / "image").digest}
    with pytest.raises(SystemExit):
        main([*asked[:-1], str(tmp_path / "other"), "--sequences", "image", *tiny])
    assert "--sequences image: expected NAME=FOLDER, such as image=" in capsys.readouterr().err
