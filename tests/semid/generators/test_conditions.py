"""Conditions from data to command line: what a trained model is asked for, what it refuses, what its files hold."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from jax import export
from safetensors.numpy import load_file

from semid.catalog import SemanticCatalog
from semid.cli import main
from semid.config import from_dict, to_dict
from semid.data import Dataset
from semid.encoders import with_text_vectors
from semid.errors import SemidError
from semid.evaluation import Popularity, compare, evaluate
from semid.generators import (
    ConditionsConfig,
    GeneratorConfig,
    ObjectiveConfig,
    ProgramSizes,
    generator_loss,
    search_program,
    train,
    training_rows,
)
from semid.generators.calibration import fit_biases
from semid.generators.training import _build_untrained, _tables
from semid.graphs import ItemGraph
from semid.joint import joint_program
from semid.recommender import Condition, ConditionSpec, Recommender, Sampling, export_program, ranking, scorers
from semid.recommender.requests import read_histories
from semid.training import OptimizerConfig, StepContext, TrainingConfig, make_mesh
from seq_models import (
    Conditions,
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    Layout,
    RQTransformerConfig,
)
from seq_models import TransformerConfig as Stack

ITEMS, STEP = 12, {"look": 1, "buy": 5}
BACKBONE = Stack(dim=16, layers=1, heads=2, hidden=16, dropout=0.0)
FAMILIES = {
    "rq-transformer": RQTransformerConfig(BACKBONE),
    "encoder-decoder": EncoderDecoderConfig(BACKBONE, decoder_layers=1),
    "flat": FlatDecoderConfig(BACKBONE),
    "hybrid": HybridConfig(BACKBONE),
    "sasrec": DenseConfig(BACKBONE),
}
ASKED = ConditionsConfig(
    on_event=True, on_group="brand", on_text="text_lsa", text_columns=("brand",), event_inputs=True
)
CONFIG = GeneratorConfig(
    model=FAMILIES["rq-transformer"],
    features=(),
    max_history=4,
    row_length=6,
    conditions=ASKED,
    training=TrainingConfig(
        epochs=150, batch_size=32, validate_every=75, optimizer=OptimizerConfig(learning_rate=0.02)
    ),
)
BRANDS = ["acme boots", "orbit lamps", "zephyr kites"]


def circle(events=True) -> Dataset:
    """Everybody walks round the circle of items: who looks goes one step, who buys five."""
    rng = np.random.default_rng(0)
    users, items, positions, done = [], [], [], []
    for user in range(100):
        at = int(rng.integers(ITEMS))
        for position in range(7):
            event = ["look", "buy"][int(rng.integers(2))]
            at = (at + STEP[event]) % ITEMS
            for column, value in zip((users, items, positions, done), (user, f"i{at}", position, event), strict=True):
                column.append(value)
    table = {"user_id": users, "item_id": items, "position": positions} | ({"event": done} if events else {})
    brands = [BRANDS[row % 3] for row in range(ITEMS)]
    titles = [f"{brands[row]} number {row % 4}" for row in range(ITEMS)]
    tags = [[brands[row], ["big", "small"][row % 2]] for row in range(ITEMS)]
    named = {"item_id": [f"i{row}" for row in range(ITEMS)], "text": titles, "brand": brands, "tags": tags}
    return with_text_vectors(Dataset.build(pa.table(named), pa.table(table), name="circle"), dim=6)


def catalog_of(dataset) -> SemanticCatalog:
    codes = np.stack(np.unravel_index(np.arange(ITEMS), (3, 4)), axis=1).astype(np.int32)
    return SemanticCatalog(dataset.item_ids, codes, (3, 4))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return circle().save(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def home(dataset, tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    train(dataset, catalog_of(dataset), CONFIG, out=home / "model", seed=0, mesh=make_mesh(jax.devices()[:1]))
    return home


@pytest.fixture(scope="module")
def model(home) -> Recommender:
    return Recommender.from_pretrained(home / "model")


HISTORY = ["i0", "i1", "i6"]
DONE = ["look", "look", "buy"]


def first(model, condition, **options):
    return model.recommend([HISTORY], k=3, condition=condition, events=[DONE], **options).item_ids[0][0]


def test_who_buys_is_answered_otherwise_than_who_looks(model):
    assert first(model, {"event": "look"}) == "i7"
    assert first(model, Condition(event="buy")) == "i11"
    both = model.recommend([HISTORY] * 2, k=2, condition=[{"event": "buy"}, {"event": "look"}], events=[DONE] * 2)
    assert [ids[0] for ids in both.item_ids] == ["i11", "i7"]
    assert set(model.recommend([HISTORY], k=2, events=[DONE]).item_ids[0]) == {"i7", "i11"}  # asked for nothing: either


def test_groups_and_texts_steer(model):
    """The two items that may follow are of two brands."""
    for part in ("group", "text"):
        assert first(model, {part: BRANDS[7 % 3]}) == "i7"
        assert first(model, {part: BRANDS[11 % 3]}) == "i11"
    assert first(model, {"text": "kites zephyr"}) == first(model, {"text": "zephyr kites"}) == "i11"  # a bag of words


def test_scores_of_a_condition_are_those_of_its_recommendations(model):
    condition = {"event": "buy", "group": BRANDS[2]}
    top = model.recommend([HISTORY], k=ITEMS, condition=condition, events=[DONE])
    scores = model.score([HISTORY], top.item_ids[0], condition=condition, events=[DONE])
    np.testing.assert_allclose(top.scores, scores, atol=1e-5)
    histories = model._histories([HISTORY], False, [DONE])
    whole = model.catalog_log_probs(histories, condition=condition)
    rows = model.catalog.rows(top.item_ids[0])
    np.testing.assert_allclose(whole[:, rows], scores, atol=1e-5)
    np.testing.assert_array_equal(model.rank(histories, k=ITEMS, exclude_seen=False, condition=condition)[0], rows)


def test_explanations_are_of_what_was_asked(model, dataset):
    mixed, asked = model.with_graph(ItemGraph.fit(dataset), weight=0.3), {"condition": {"event": "buy"}}
    parts = mixed.explain(HISTORY, ["i7", "i11"], events=DONE, **asked)
    scores = mixed.score([HISTORY], ["i7", "i11"], events=[DONE], **asked)[0]
    np.testing.assert_allclose([part.log_prob for part in parts], scores, atol=1e-5)
    alone = np.exp(mixed.score([HISTORY], ["i7", "i11"], events=[DONE], graph_weight=0, **asked)[0])
    np.testing.assert_allclose([part.graph_share for part in parts], 1 - 0.7 * alone / np.exp(scores), atol=1e-5)
    assert parts[0].graph_share > parts[1].graph_share  # who buys goes to i11, says the model


def test_evaluation_asks_for_what_targets_are_or_for_one_thing(model, dataset):
    plain, own = evaluate(model, dataset), evaluate(model, dataset, own=("event",))
    fixed = evaluate(model, dataset, condition={"event": "buy"})
    assert own.values["ndcg@5"] > plain.values["ndcg@5"] + 0.03
    assert own.provenance["own_conditions"] == ["event"]
    assert "own_conditions" not in plain.provenance
    assert fixed.provenance["options"]["condition"] == "{'event': 'buy'}"
    bought = dataset.splits.test.target_events == dataset.events.index("buy") + 1
    np.testing.assert_allclose(fixed.per_example["mrr"][bought], own.per_example["mrr"][bought])
    assert fixed.per_example["mrr"][~bought].mean() < own.per_example["mrr"][~bought].mean()
    rankers = {"model": model, "popularity": Popularity.fit(dataset.splits.train, dataset.item_ids)}
    assert compare(rankers, dataset, own=("event",))["model"].values == own.values
    with pytest.raises(SemidError, match="Popularity knows no conditions"):
        evaluate(rankers["popularity"], dataset, own=("event",))


def test_events_of_another_dataset_are_numbered_by_the_models_names(model, dataset):
    """There, an event comes before all others by name, so that numbers differ."""
    renamed = dataset.replace(event=pa.array(["again", *dataset.event.to_pylist()[1:]]))
    assert renamed.events == ("again", "buy", "look")
    own = [evaluate(model, data, own=("event",), other_dataset=True).per_example["mrr"] for data in (dataset, renamed)]
    np.testing.assert_allclose(own[1][1:], own[0][1:])


def test_the_artifact_knows_names_and_words_and_the_catalogue_may_grow(home, model, tmp_path):
    spec = model.conditions
    assert (spec.events, spec.groups, spec.parts) == (("buy", "look"), tuple(BRANDS), ("event", "group", "text"))
    saved = tmp_path / "package"
    model.save_pretrained(saved)
    again = Recommender.from_pretrained(saved)
    for condition in ({"event": "buy"}, {"text": BRANDS[1]}, None):
        ours, theirs = (m.recommend([HISTORY], k=5, condition=condition) for m in (model, again))
        np.testing.assert_array_equal(ours.scores, theirs.scores)
    card = (saved / "README.md").read_text()
    assert "can be asked for | an event (buy, look); a group of items (brand: acme boots, orbit lamps" in card
    assert "a text (text\\_lsa); reads the history's events (buy, look)" in card

    grown = model.with_catalog(model.catalog)
    assert first(grown, {"event": "buy"}) == "i11"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"event": "bay"}, r"condition: unknown event 'bay'; did you mean 'buy'\? It knows buy, look$"),
        ({"group": "acme"}, r"condition: unknown group 'acme'; did you mean 'acme boots'\? It knows acme"),
        ({"text": "nothing such"}, "the encoder text_lsa knows no word of the text 'nothing such'"),
        ({"brand": "acme boots"}, "a condition has event, group, text, got 'brand'"),
        ([{"event": "buy"}] * 2, "expected one condition, or one for each of 1 histories, got 2"),
        (Conditions(event=np.array([1, 2])), "expected one condition for each of 1 histories, got 2"),
        (Conditions(event=np.array([3])), r"condition: expected a number from 0 \(any\) to 2 as event, got 3"),
        (["buy"], r"expected a condition such as \{'event': 'buy'\}, got 'buy'"),
    ],
)
def test_unknown_conditions_are_refused(model, asked, said):
    with pytest.raises(SemidError, match=said):
        model.recommend([HISTORY], condition=asked)


def test_unknown_events_and_other_lengths_are_refused(model):
    with pytest.raises(SemidError, match=r"history 0: unknown event 'lok'; did you mean 'look'\?"):
        model.recommend([HISTORY], events=[["look", "lok", None]])
    for events in (None, "buy", 5):
        with pytest.raises(SemidError, match=rf"history 0: expected a list of events, .*got {events!r}$"):
            model.recommend([HISTORY], events=[events])
    with pytest.raises(SemidError, match=r"expected an event for each item of the histories, \[3\], got \[2\]"):
        model.recommend([HISTORY], events=[DONE[:2]])
    dropped = model.recommend([["i0", "gone", "i1", "i6"]], events=[["look", "buy", "look", "buy"]], skip_unknown=True)
    np.testing.assert_array_equal(dropped.scores, model.recommend([HISTORY], events=[DONE]).scores)
    histories = dataclasses.replace(model._histories([HISTORY], False), events=np.array([1, 2, 3], np.int32))
    with pytest.raises(SemidError, match=r"expected events of histories from 0 \(unknown\) to 2, the model's, got 3"):
        model.rank(histories, k=1, exclude_seen=False)


@pytest.mark.parametrize(
    ("read", "reads"),
    [
        ({"event_inputs": True}, True),
        ({"on_event": True}, True),
        ({"on_event": True, "film": True}, False),
        ({"event_head": True}, False),
    ],
    ids=str,
)
def test_events_of_histories_are_for_models_that_read_them(model, read, reads):
    spec = ConditionSpec(("buy", "look"), **read)
    options = {"conditions": spec, "skip_unknown": False, "events": [DONE]}
    if reads:
        assert read_histories([HISTORY], model.catalog, **options).events.tolist() == [2, 2, 1]
    else:
        with pytest.raises(SemidError, match="the model reads no events; leave them out"):
            read_histories([HISTORY], model.catalog, **options)


def test_a_model_trained_without_conditions_is_as_ever_and_cannot_be_asked(dataset, tmp_path):
    """Whether or not the data have events."""
    short = dataclasses.replace(
        CONFIG, conditions=ConditionsConfig(), training=dataclasses.replace(CONFIG.training, epochs=1)
    )
    models = [train(data, catalog_of(data), short) for data in (dataset, circle(events=False))]
    ours, theirs = (model.recommend([HISTORY], k=5).scores for model in models)
    np.testing.assert_array_equal(ours, theirs)
    assert "conditions" not in to_dict(short)
    assert "conditions" not in to_dict(models[0].spec)
    assert from_dict(GeneratorConfig, to_dict(CONFIG)) == CONFIG
    for ask, said in (
        (lambda: models[0].recommend([HISTORY], condition={"event": "buy"}), "cannot be asked for event"),
        (lambda: models[0].recommend([HISTORY], events=[DONE]), "the model reads no events"),
        (lambda: evaluate(models[0], dataset, own=("group",)), "cannot be asked for group"),
    ):
        with pytest.raises(SemidError, match=said):
            ask()


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_conditions_or_says_why_not(dataset, family, film):
    conditions = dataclasses.replace(ASKED, film=film, on_group="tags")
    training = TrainingConfig(epochs=0.5, batch_size=64)
    features = ("text_lsa",) if family == "hybrid" else ()
    config = dataclasses.replace(
        CONFIG, model=FAMILIES[family], conditions=conditions, training=training, features=features
    )
    if film and family in ("encoder-decoder", "flat"):
        with pytest.raises(SemidError, match="FiLM needs one state"):
            train(dataset, catalog_of(dataset), config)
        return
    trained = train(dataset, catalog_of(dataset), config)
    assert trained.conditions.groups == ("acme boots", "big", "orbit lamps", "small", "zephyr kites")
    items = dataset.item_ids.to_pylist()
    one, other = (trained.score([HISTORY], items, condition={"event": event}) for event in STEP)
    assert (one != other).any()


def test_distillation_and_a_graph_go_with_conditions(dataset):
    config = dataclasses.replace(
        CONFIG, objective=ObjectiveConfig(teacher_items=4), training=TrainingConfig(epochs=0.5, batch_size=64)
    )
    graph = ItemGraph.fit(dataset)
    trained = train(dataset, catalog_of(dataset), config, teacher=graph, graph=graph)
    scores = trained.score([HISTORY], dataset.item_ids.to_pylist(), condition={"event": "buy"}, graph_weight=0.5)
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (ConditionsConfig(on_group="colour"), "no column 'colour' among the items'"),
        (
            ConditionsConfig(on_text="text"),
            "no text encoder made a column 'text', to encode conditions with",
        ),
        (dataclasses.replace(ASKED, text_columns=("price",)), "column 'price' is missing"),
    ],
)
def test_what_the_dataset_lacks_is_named(dataset, conditions, said):
    with pytest.raises(SemidError, match=said):
        conditions.fit(dataset)


def test_events_that_are_null_or_missing_are_refused(dataset):
    asked = ConditionsConfig(on_event=True)
    with pytest.raises(SemidError, match="dataset 'circle' has no column 'event'; add one to its interactions"):
        asked.fit(circle(events=False))
    holed = dataset.replace(event=pa.array(["buy", None, *dataset.event.to_pylist()[2:]]))
    with pytest.raises(SemidError, match=r"interactions row 2, column 'event': is null, as are 1 of 700"):
        asked.fit(holed)
    assert ConditionsConfig().fit(holed).spec is None  # who reads none does not mind


def test_settings_out_of_range_are_refused():
    with pytest.raises(SemidError, match=r"expected drop_conditions in \[0, 1\), got 1.0"):
        ConditionsConfig(drop_conditions=1.0)
    with pytest.raises(SemidError, match="give on_event, on_group or on_text too"):
        ConditionsConfig(film=True, event_inputs=True)
    told = {"on_event": True, "event_head": True, "drop_conditions": 0.0}  # everywhere: the head would learn nothing
    with pytest.raises(SemidError, match="nowhere: give film, or drop_conditions above 0"):
        ConditionsConfig(**told)
    for learning in ({"film": True}, {"drop_conditions": 0.1}, {"on_event": False}):
        ConditionsConfig(**told | learning)
    with pytest.raises(SemidError, match="give on_text too"):
        ConditionsConfig(text_columns=("brand",))
    with pytest.raises(SemidError, match="the sizes of conditions are a dataset's"):
        search_program(CONFIG, ProgramSizes(), make_mesh())
    with pytest.raises(SemidError, match="the sizes of conditions are a dataset's"):
        joint_program(dataclasses.replace(CONFIG, features=None), ProgramSizes(), make_mesh())


def test_the_command_line_asks_and_says_what_it_does_not_know(home, dataset, capsys):
    line = ["recommend", "--model", str(home / "model"), "--history", ",".join(HISTORY), "--events", ",".join(DONE)]
    main([*line, "-k", "1", "--condition", "event=buy"])
    assert "i11" in capsys.readouterr().out
    main([*line, "-k", "1", "--condition", "event=look", f"group={BRANDS[1]}"])
    assert "i7" in capsys.readouterr().out
    for words, said in (
        (["event=bay"], "unknown event 'bay'; did you mean 'buy'"),
        (["brand=acme"], "--condition brand=acme: expected event=NAME, group=NAME or text=WORDS"),
        (["event=buy", "event=look"], "--condition event=look: event is given already (buy)"),
    ):
        with pytest.raises(SystemExit):
            main([*line, "--condition", *words])
        assert said in capsys.readouterr().err
    asked = ["evaluate", "--model", str(home / "model"), "--dataset", str(dataset.origin.folder), "--condition"]
    main([*asked, "event=own"])
    written = json.loads((home / "metrics_asked_event-own.json").read_text())
    assert written["provenance"]["own_conditions"] == ["event"]
    main([*asked, "event=own"])
    assert "skipped" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit):
        main([*asked, "event=own", f"group={BRANDS[0]}"])
    assert "give =own for all parts, or for none" in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
def test_the_exported_program_is_asked_as_the_live_recommender(model, tmp_path):
    export_program(model, tmp_path / "program", k=4, beam_size=ITEMS, platforms=("cpu",))
    settings = json.loads((tmp_path / "program" / "program.json").read_text())["inputs"]
    assert settings["condition_names"] == {"events": ["buy", "look"], "groups": BRANDS}
    call = jax.jit(export.deserialize((tmp_path / "program" / "program.stablehlo").read_bytes()).call)
    arrays = load_file(tmp_path / "program" / "arrays.safetensors")
    history = np.array([[0, 1, 6, 0], [5, 6, 0, 0]], np.int32)
    asked = {name: np.zeros((2, *of["shape"][1:]), of["dtype"]) for name, of in settings["conditions"].items()}
    assert set(asked) == {"events", "event", "group", "text"}
    asked["event"][:] = 1, 0
    asked["group"][:] = 0, 3
    asked["events"][0, :3] = 2, 2, 1
    rows, scores = call(arrays, history, np.array([3, 2], np.int32), asked)
    live = model.recommend(
        [HISTORY, ["i5", "i6"]],
        k=4,
        beam_size=ITEMS,
        condition=[{"event": "buy"}, {"group": BRANDS[2]}],
        events=[DONE, [None, None]],
    )
    assert [[f"i{row}" for row in best] for best in rows.tolist()] == live.item_ids
    np.testing.assert_allclose(scores, live.scores, atol=1e-5)


VALUED = dataclasses.replace(CONFIG, conditions=ConditionsConfig(event_head=True, event_inputs=True))


@pytest.fixture(scope="module")
def valued(dataset) -> Recommender:
    """Of the two items that may follow, one is looked at and the other bought, which history and item tell."""
    return train(dataset, catalog_of(dataset), VALUED, seed=0, mesh=make_mesh(jax.devices()[:1]))


def test_events_of_an_item_have_probabilities_that_sum_to_one(valued, dataset):
    probabilities = valued.event_probs([HISTORY, ["i3"]], dataset.item_ids.to_pylist(), events=[DONE, [None]])
    assert probabilities.shape == (2, ITEMS, 2)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    assert valued.event_probs([], ["i7"]).shape == (0, 1, 2)
    four = valued.event_probs([HISTORY], ["i7", "i11", "i3", "i4"], events=[DONE])
    programs = scorers._event_log_probs._cache_size()
    np.testing.assert_array_equal(valued.event_probs([HISTORY], ["i7", "i11", "i3"], events=[DONE]), four[:, :3])
    assert scorers._event_log_probs._cache_size() == programs
    bought = valued.event_probs([HISTORY], ["i7", "i11"], events=[DONE])[0, :, 0]
    assert bought[0] < 0.1
    assert bought[1] > 0.9


def test_values_rank_by_the_exact_expected_value_of_what_the_beams_find(valued, dataset):
    ids, values = dataset.item_ids.to_pylist(), {"look": 1.0, "buy": 4.0}
    items = np.exp(valued.score([HISTORY], ids, events=[DONE])[0])
    worth = items * (valued.event_probs([HISTORY], ids, events=[DONE])[0] @ [4.0, 1.0])
    top = valued.recommend([HISTORY], k=4, beam_size=ITEMS, values=values, events=[DONE])
    best = np.argsort(-worth)[:4]
    assert top.item_ids[0] == [ids[row] for row in best]
    np.testing.assert_allclose(top.scores[0], np.log(worth[best]), atol=1e-4)
    histories = valued._histories([HISTORY], False, [DONE])
    ranked = valued.rank(histories, k=4, exclude_seen=False, beam_size=ITEMS, values=values)
    assert ranked[0].tolist() == best.tolist()
    first = {name: valued.recommend([HISTORY], k=1, values={name: 1}, events=[DONE]).item_ids[0] for name in STEP}
    assert first == {"look": ["i7"], "buy": ["i11"]}
    alike = valued.recommend([HISTORY], k=4, beam_size=ITEMS, values={"look": 1, "buy": 1}, events=[DONE])
    plain = valued.recommend([HISTORY], k=4, beam_size=ITEMS, events=[DONE])
    assert alike.item_ids == plain.item_ids  # the probabilities of all events sum to one
    np.testing.assert_allclose(alike.scores, plain.scores, atol=1e-4)
    best = {split: evaluate(valued, dataset, values={split: 1}).per_example["mrr"] for split in STEP}
    done = np.array(dataset.events)[dataset.splits.test.target_events - 1]
    for event, other in (("look", "buy"), ("buy", "look")):
        assert best[event][done == event].mean() > best[other][done == event].mean() + 0.2


def test_limits_of_groups_cut_lists_ranked_by_value_and_draws_do_not_go_with_them(valued, dataset):
    ids = dataset.item_ids.to_pylist()
    halves = valued.with_groups(pa.table({"item_id": ids, "half": [row % 2 for row in range(ITEMS)]}), "half")
    asked = {"values": {"look": 1.0, "buy": 4.0}, "events": [DONE], "beam_size": ITEMS}
    every = valued.recommend([HISTORY], k=ITEMS, **asked).item_ids[0]
    firsts = [next(item for item in every if ids.index(item) % 2 == half) for half in (0, 1)]
    found = halves.recommend([HISTORY], k=4, at_most={"half": 1}, **asked).item_ids[0]
    assert found == sorted(firsts, key=every.index)
    programs = ranking._first_within._cache_size()
    halves.recommend([HISTORY] * 4, k=4, at_most={"half": 1}, **asked | {"events": [DONE] * 4})
    three = halves.recommend([HISTORY] * 3, k=4, at_most={"half": 1}, **asked | {"events": [DONE] * 3})
    assert three.item_ids == [found] * 3
    assert ranking._first_within._cache_size() == programs + 1
    with pytest.raises(SemidError, match="values rank the items and sampling draws them"):
        valued.recommend([HISTORY], k=4, sample=Sampling(), **asked)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bay": 1}, "values: unknown event 'bay'; did you mean 'buy'"),
        ({"buy": -1}, "expected finite values of 0 or more, not all 0, got {'buy': -1}"),
        ({"buy": 0, "look": 0}, "expected finite values of 0 or more, not all 0"),
        ({"buy": "x"}, "values: expected a number for event 'buy', got 'x'"),
    ],
)
def test_values_that_rank_nothing_are_refused(valued, model, values, said):
    with pytest.raises(SemidError, match=said):
        valued.recommend([HISTORY], values=values)
    with pytest.raises(SemidError, match=r"knows no probabilities of events; train one with event_head \(--event-head"):
        model.recommend([HISTORY], values=values)
    with pytest.raises(SemidError, match=r"train one with event_head \(--event-head"):
        model.event_probs([HISTORY], ["i1"])


def test_calibrated_events_fit_the_validation_targets(dataset, tmp_path):
    examples = dataset.splits.validation
    conditions = dataclasses.replace(VALUED.conditions, calibrate_events=True)
    config = dataclasses.replace(VALUED, conditions=conditions, training=TrainingConfig(epochs=0.5, batch_size=64))
    fitted = train(dataset, catalog_of(dataset), config, out=tmp_path / "fitted")
    plain = train(dataset, catalog_of(dataset), dataclasses.replace(config, conditions=VALUED.conditions))
    change = _biases(fitted) - _biases(plain)
    happened = examples.target_events[:, None] - 1 == np.arange(2)
    for model, fits in ((fitted, True), (plain, False)):  # the derivative by each bias, of targets and prior, is 0
        probs = np.exp(model.event_log_probs(examples.histories, examples.targets[:, None])[:, 0])
        assert np.allclose(happened.sum(axis=0) - probs.sum(axis=0), change, atol=2e-3) == fits
    ids = dataset.item_ids.to_pylist()
    read = Recommender.from_pretrained(tmp_path / "fitted").event_probs([HISTORY], ids, events=[DONE])
    np.testing.assert_array_equal(read, fitted.event_probs([HISTORY], ids, events=[DONE]))
    with pytest.raises(SemidError, match="calibrate_events is for the probabilities of an event head"):
        ConditionsConfig(calibrate_events=True)


def _biases(model):
    return np.asarray(model.model.event_head.out.bias[...])


def test_biases_of_events_that_never_were_are_bounded():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(3), 200)).astype(np.float32)
    done = rng.integers(0, 2, 200).astype(np.int32)
    change = fit_biases(log_probs, done)
    found = np.exp(log_probs + change)
    found /= found.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.sum(axis=0) + change, np.bincount(done, minlength=3), atol=1e-2)
    assert -10 < change[2] < -2


def test_values_are_of_all_events(dataset):
    both = ConditionsConfig(on_event=True, event_head=True)
    config = dataclasses.replace(VALUED, conditions=both, training=TrainingConfig(epochs=0.5, batch_size=64))
    trained = train(dataset, catalog_of(dataset), config)
    trained.recommend([HISTORY], values={"buy": 1})
    with pytest.raises(SemidError, match="ask for no event next to them"):
        trained.recommend([HISTORY], values={"buy": 1}, condition={"event": "buy"})
    for family in ("encoder-decoder", "flat"):
        with pytest.raises(ValueError, match="an event head needs one state that an item is decoded from"):
            train(dataset, catalog_of(dataset), dataclasses.replace(config, model=FAMILIES[family]))


@pytest.mark.parametrize("family", ["hybrid", "sasrec"])
def test_other_families_with_one_state_know_values_too(dataset, family):
    features = ("text_lsa",) if family == "hybrid" else ()
    training = TrainingConfig(epochs=0.5, batch_size=64)
    config = dataclasses.replace(VALUED, model=FAMILIES[family], features=features, training=training)
    trained = train(dataset, catalog_of(dataset), config)
    assert trained.recommend([HISTORY], k=2, values={"buy": 1}).scores.shape == (1, 2)
    if family == "sasrec":
        told = dataclasses.replace(CONFIG, objective=ObjectiveConfig(distillation=1.0))
        with pytest.raises(SemidError, match="the teacher reads events or times of histories"):
            train(dataset, catalog_of(dataset), told, teacher=trained)


def _loss(dataset, family, weights, *, head=False, interactions=False):
    """Loss and terms of one batch of everything."""
    features = ("text_lsa",) if family == "hybrid" else ()
    objective = ObjectiveConfig(event_weights=weights, interaction_weights=interactions, repeats=True, distillation=0.0)
    config = dataclasses.replace(
        CONFIG,
        model=FAMILIES[family],
        conditions=ConditionsConfig(event_head=head),
        features=features,
        objective=objective,
    )
    recommender = _build_untrained(dataset, catalog_of(dataset), config, seed=1)
    rows = training_rows(dataset, config, recommender.model.layout)
    batch = rows[np.arange(len(rows))]
    tables = _tables(recommender, dataset, objective)
    run = jax.jit(functools.partial(generator_loss, objective=objective))
    context = StepContext(jax.random.key(0), jnp.zeros(()))
    value, terms = run(recommender.model, jax.tree.map(jnp.asarray, batch), tables, context)
    return float(value), {name: float(term) for name, term in terms.items()}, batch


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_one_are_the_loss_of_today_and_others_its_weighted_mean(dataset, family):
    plain, _, batch = _loss(dataset, family, {})
    assert batch.target_events is None
    ones, _, told = _loss(dataset, family, {"buy": 1, "look": 1})
    assert ones == plain  # bit for bit
    looks, buys = (_loss(dataset, family, {"look": a, "buy": b})[0] for a, b in ((1, 0), (0, 1)))
    number = {name: int((told.target_events == dataset.events.index(name) + 1).sum()) for name in STEP}
    weighted = _loss(dataset, family, {"buy": 3})[0]
    shares = {"look": number["look"], "buy": 3 * number["buy"]}
    assert weighted == pytest.approx((shares["look"] * looks + shares["buy"] * buys) / sum(shares.values()), rel=1e-5)


@pytest.mark.parametrize("family", ["rq-transformer", "encoder-decoder"])  # packed rows and single ones
def test_weights_of_interactions_weigh_their_targets(dataset, family):
    of_events = _loss(dataset, family, {"buy": 3})[0]
    done = np.array(dataset.events)[dataset.event_codes - 1]
    weighed = dataset.replace(weight=np.where(done == "buy", 3, 1).astype(np.float32))
    value, _, batch = _loss(weighed, family, {}, interactions=True)
    assert value == of_events != _loss(weighed, family, {})[0]
    assert (batch.target_weights[batch.targets < 0] == 0).all()
    twice = _loss(weighed, family, {"buy": 2}, interactions=True)[0]
    assert twice == pytest.approx(_loss(dataset, family, {"buy": 6})[0], rel=1e-6)
    ones = dataset.replace(weight=np.ones(len(dataset.item), np.float32))
    assert _loss(ones, family, {}, interactions=True)[0] == _loss(dataset, family, {})[0]  # bit for bit


def test_interactions_that_cannot_be_weighed_are_refused(dataset):
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(interaction_weights=True))
    weight = np.ones(len(dataset.item), np.float32)
    weight[2] = -0.5
    for of_all, said in (
        (None, "interactions have no column 'weight'; add one"),
        (weight, f"interactions row 3, column 'weight': -0.5 is negative, as are 1 of {len(weight)}; mend the column"),
        (np.zeros_like(weight), "interactions, column 'weight': all are 0"),
    ):
        with pytest.raises(SemidError, match=said):
            training_rows(dataset.replace(weight=of_all), config, Layout.PACKED)


def test_an_event_head_adds_a_term_and_weighs_it():
    data = circle()
    plain, _, _ = _loss(data, "rq-transformer", {})
    value, terms, _ = _loss(data, "rq-transformer", {}, head=True)
    assert terms["loss/event"] == pytest.approx(np.log(2))  # at first all events are alike
    assert value == pytest.approx(plain + np.log(2), rel=1e-6)
    value, terms, _ = _loss(data, "sasrec", {}, head=True)
    assert value == pytest.approx(terms["loss/item"] + terms["loss/event"], rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"buy": -1.0}, "expected event_weights of 0 or more, not all 0, got {'buy': -1.0}"),
        ({"buy": 0.0}, "expected event_weights of 0 or more, not all 0"),
        ({"bay": 2.0}, r"event_weights: unknown event 'bay'; did you mean 'buy'\? The dataset has buy, look"),
    ],
)
def test_event_weights_out_of_range_are_refused(weights, said, dataset):
    with pytest.raises(SemidError, match=said):
        ObjectiveConfig(event_weights=weights).weights_of(dataset.events)
    assert ObjectiveConfig().weights_of(()) is None
    with pytest.raises(SemidError, match="unknown event 'buy': the dataset has no column 'event'"):
        ObjectiveConfig(event_weights={"buy": 2.0}).weights_of(())
