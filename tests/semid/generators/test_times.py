"""Times from data to command line: a model whose next item depends on them, what it refuses, what its files hold."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow as pa
import pytest
from jax import export
from safetensors.numpy import load_file

from semid.catalog import SemanticCatalog
from semid.cli import main
from semid.config import to_dict
from semid.data import Dataset, Histories
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.generators import ConditionsConfig, GeneratorConfig, train, training_rows
from semid.graphs import ItemGraph
from semid.recommender import Recommender, export_program
from semid.recommender.stablehlo import LOADER, USE
from semid.training import OptimizerConfig, TrainingConfig, make_mesh
from seq_models import Layout, RQTransformerConfig, TransformerConfig

ITEMS = 12
SOON, LATE = 10, 100_000
READ = ConditionsConfig(time_inputs=True, time_bias=True)
CONFIG = GeneratorConfig(
    model=RQTransformerConfig(TransformerConfig(dim=16, layers=1, heads=2, hidden=16, dropout=0.0)),
    features=(),
    max_history=4,
    row_length=6,
    conditions=READ,
    training=TrainingConfig(epochs=80, batch_size=32, validate_every=40, optimizer=OptimizerConfig(learning_rate=0.02)),
)


def circle(time="timestamp") -> Dataset:
    """Everybody walks round the circle of items: one step after an item that came soon, five after one that came
    late."""
    rng = np.random.default_rng(0)
    users, items, times = [], [], []
    for user in range(100):
        at, now, gap = int(rng.integers(ITEMS)), 1_000_000_000, SOON
        for _ in range(7):
            users.append(user)
            items.append(f"i{at}")
            times.append(now)
            at = (at + (1 if gap == SOON else 5)) % ITEMS
            gap = SOON if rng.integers(2) else LATE
            now += gap
    table = {"user_id": users, "item_id": items, time: times}
    return Dataset.build(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)]}), pa.table(table), name="circle")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return circle().save(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (3, 4)), axis=1).astype(np.int32)
    catalog = SemanticCatalog(dataset.item_ids, codes, (3, 4))
    train(dataset, catalog, CONFIG, out=folder, seed=0, mesh=make_mesh(jax.devices()[:1]))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Recommender:
    return Recommender.from_pretrained(folder)


HISTORY = ["i0", "i1", "i2"]
TIMES = {SOON: [0, SOON, 2 * SOON], LATE: [0, SOON, SOON + LATE]}
NEXT = {SOON: "i3", LATE: "i7"}


@pytest.mark.parametrize("gap", [SOON, LATE])
def test_the_next_item_depends_on_when_the_last_one_came(model, gap):
    assert model.recommend([HISTORY], k=1, times=[TIMES[gap]]).item_ids == [[NEXT[gap]]]
    scores = model.score([HISTORY], list(NEXT.values()), times=[[now + 1.7e9 for now in TIMES[gap]]])[0]
    assert scores[list(NEXT).index(gap)] == max(scores) > np.log(0.8)


def test_without_times_they_are_unknown(model):
    assert set(model.recommend([HISTORY], k=2).item_ids[0]) == set(NEXT.values())


def test_explanations_and_probabilities_of_events_read_times_too(model, dataset):
    mixed = model.with_graph(ItemGraph.fit(dataset), weight=0.3)
    for gap, item in NEXT.items():
        (part,) = mixed.explain(HISTORY, [item], times=TIMES[gap])
        assert part.log_prob == pytest.approx(mixed.score([HISTORY], [item], times=[TIMES[gap]])[0, 0], abs=1e-5)
        alone = np.exp(mixed.score([HISTORY], [item], times=[TIMES[gap]], graph_weight=0)[0, 0])
        assert part.graph_share == pytest.approx(1 - 0.7 * alone / np.exp(part.log_prob), abs=1e-5)

    events = pa.array(["look", "buy"] * (len(dataset.item) // 2))
    conditions = ConditionsConfig(time_inputs=True, event_head=True)
    config = dataclasses.replace(CONFIG, conditions=conditions, training=TrainingConfig(epochs=1, batch_size=32))
    trained = train(dataset.replace(event=events, origin=None), model.catalog, config)
    soon, late = (trained.event_probs([HISTORY], ["i3"], times=[times]) for times in TIMES.values())
    assert not np.allclose(soon, late, atol=1e-6)


def test_evaluation_reads_the_dataset_s_times(model, dataset):
    examples = dataset.splits.test
    blind = dataclasses.replace(examples.histories, times=None)
    found = [
        np.mean(model.rank(histories, k=1, exclude_seen=False)[:, 0] == examples.targets)
        for histories in (examples.histories, blind)
    ]
    assert found[0] > 0.9 > 0.7 > found[1]
    assert evaluate(model, dataset, ks=(1,)).values["recall@1"] == pytest.approx(found[0])


def test_what_cannot_be_read_is_refused(model, dataset):
    with pytest.raises(SemidError, match="a time for each item"):
        model.recommend([HISTORY], times=[[1, 2]])
    dates = np.array(["2024-01-01", "2024-01-02", "2024-01-03"], "datetime64[ns]")
    for times in ([3, 2, 1], dates, dates.astype("datetime64[s]").tolist(), [["a"]], [[1], [2, 3]], ["1", "2", "3"],
                  [1, 2, 1e19], [1, 2, None], None):  # fmt: skip
        with pytest.raises(SemidError, match="history 0: expected times in seconds, a list of numbers"):
            model.recommend([HISTORY], times=[times])
    with pytest.raises(SemidError, match="has positions and no times"):
        READ.fit(circle("position"))
    none = dataclasses.replace(model.spec, conditions=None)
    other = Recommender(model.model, model.catalog, spec=none, items=model.items)
    with pytest.raises(SemidError, match="reads no times"):
        other.recommend([HISTORY], times=[TIMES[SOON]])


@pytest.mark.usefixtures("unchecked")
def test_an_exported_program_takes_times(model, tmp_path, monkeypatch):
    export_program(model, tmp_path / "program", k=2, platforms=("cpu",))
    facts = json.loads((tmp_path / "program" / "program.json").read_text())
    assert facts["inputs"]["conditions"]["times"] == {"dtype": "int32", "shape": ["batch", 4]}
    program = export.deserialize((tmp_path / "program" / "program.stablehlo").read_bytes()).call
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(LOADER + USE, names)  # the lines of its README, which ask for nothing and know no times
    (ids, scores), unknown = names["recommend"]([HISTORY]), model.recommend([HISTORY], k=2)
    assert ids == unknown.item_ids
    np.testing.assert_allclose(scores, unknown.scores, atol=1e-5)
    history, lengths = np.array([[0, 1, 2, 0]] * 2, np.int32), np.array([3, 3], np.int32)
    times = np.array([[*TIMES[gap], -1] for gap in (SOON, LATE)], np.int32)
    conditions = {"events": np.zeros_like(history), "times": times}
    rows, _ = program(load_file(tmp_path / "program" / "arrays.safetensors"), history, lengths, conditions)
    assert [f"i{row}" for row in np.asarray(rows)[:, 0]] == list(NEXT.values())


def test_the_command_line_takes_times(folder, capsys):
    times = ",".join(map(str, TIMES[LATE]))
    main(["recommend", "--model", str(folder), "--history", ",".join(HISTORY), "-k", "1", "--times", times])
    assert NEXT[LATE] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["recommend", "--model", str(folder), "--history", ",".join(HISTORY), "--times", "now"])
    assert "--times: expected seconds" in capsys.readouterr().err


def test_rows_have_times_only_for_models_that_read_them(dataset):
    for layout in (Layout.PACKED, Layout.SINGLE):
        read, plain = (
            training_rows(dataset, dataclasses.replace(CONFIG, conditions=conditions), layout)
            for conditions in (READ, ConditionsConfig())
        )
        read, plain = (rows[np.arange(4)] for rows in (read, plain))
        assert plain.times is None
        assert (read.times[read.segments == 0] == -1).all()
        assert set(np.unique(np.diff(read.times[0][read.segments[0] == 1]))) <= {SOON, LATE}
        np.testing.assert_array_equal(read.history, plain.history)


def test_settings_that_are_off_leave_no_trace():
    assert not {"time_inputs", "time_bias"} & set(to_dict(ConditionsConfig(on_event=True)))


def test_times_of_histories_begin_with_the_first_that_is_read():
    histories = Histories.from_lists([[1, 2, 3], [], [4]], times=[[100, 130, 2**40], [], [7]])
    top = 2**31 - 1
    assert histories.padded_times(2).tolist() == [[0, top], [-1, -1], [0, -1]]
    assert histories.padded_times(4).tolist() == [[0, 30, top, -1], [-1] * 4, [0, -1, -1, -1]]
    assert Histories.from_lists([[1]]).padded_times(2).tolist() == [[-1, -1]]
