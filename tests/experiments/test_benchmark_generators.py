"""A pulse of `experiments.benchmarks.generators`: tiny models beside a peer that speaks the protocol and no more.

The peer's own half needs torch and is no part of the suite: `search` compares its constraints with each other.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import generators, minutes, paired_timing
from experiments.layout import read_layout
from semid import SemanticCatalog
from semid.artifacts import Kind, write_artifact
from semid.catalog import CATALOG_FILE
from semid.errors import SemidError
from seq_models import EncoderDecoderConfig, TransformerConfig

FAKE = """
import json, sys
import numpy as np

items, number = 0, 0
for line in sys.stdin:
    question = json.loads(line)
    do = question.pop("do")
    answer = {}
    if do == "catalogue":
        items = len(np.load(question["file"]))
    elif do == "model":
        answer = {"parameters": 7}
    elif do == "examples":
        answer = {"examples": len(np.load(question["file"])["targets"])}
    elif do in ("steps", "matmul"):
        number += question.get("steps", 0)
        answer = {"seconds": 0.5, "median": 0.1, "loss": 1.0}
    elif do == "search":
        users = len(np.load(question["file"])["history"])
        rows = np.tile(np.arange(question["results"]) % items, (users, 1))
        np.save(question["out"], rows.astype(np.int32))
        answer = {"seconds": 0.25}
    elif do == "save":
        open(question["file"], "w").write(str(number))
    elif do == "restore":
        number = int(open(question["file"]).read())
        answer = {"step": number}
    elif do != "versions":
        sys.exit("no such question")
    print(json.dumps(answer), flush=True)
"""
TINY = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.1)


@pytest.fixture
def fake_peer(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(paired_timing, "SCRIPT", script)
    monkeypatch.setattr(paired_timing, "_PAUSE", 0)
    return Path(sys.executable)


@pytest.fixture
def tiny_sizes(monkeypatch):
    model = EncoderDecoderConfig(TINY, decoder_layers=1)
    monkeypatch.setattr(generators, "SIZES", {"width 64": model})
    monkeypatch.setattr(generators, "USERS", 20)
    monkeypatch.setattr(generators, "HISTORY_ITEMS", 5)  # the shortest that are padded: batches of one shape
    monkeypatch.setattr(generators, "LEVELS", (8, 4))
    monkeypatch.setattr(generators, "SEARCH_LEVELS", (8, 8))
    monkeypatch.setattr(generators, "MICROBATCHES", 1)  # a batch of 8 is one row for each device


def test_training_is_timed_with_and_without_a_peer(fake_peer, tiny_sizes, tmp_path):
    generators.train(tmp_path / "train.json", None, rounds=1, steps=1, batch=8)
    alone = json.loads((tmp_path / "train.json").read_text())["width 64"]
    assert alone["semid"]["examples per second"] > 0
    assert "peer" not in alone
    generators.train(tmp_path / "train.json", fake_peer, rounds=1, steps=2, batch=8)
    peer = json.loads((tmp_path / "train.json").read_text())["width 64"]["peer, without dropout"]
    assert peer["examples per second"] == 8 / 0.25


def test_flops_of_a_step_are_those_that_the_compiler_counts():
    """Without attention's masks, norms and the like, which are no products: a little less than the compiler's."""
    model = EncoderDecoderConfig(replace(TINY, dim=64, hidden=256, dropout=0.0), decoder_layers=1)
    config = generators.GeneratorConfig(model, features=())
    built = generators.ModelSpec(model, generators.LEVELS, 50, 0, 20).build(seed=0)
    codes = generators._random_codes(50, generators.LEVELS)

    def loss(params):
        whole = generators.nnx.merge(graph, params)
        logits = whole.decode(tables.inputs(history), jax.numpy.ones_like(history), tables.codes[:4]).logits
        return sum(jax.nn.logsumexp(one, axis=-1).sum() for one in logits)

    graph, params = generators.nnx.split(built)
    tables = generators.ItemTables.from_arrays(codes, None, np.ones(50, np.int32))
    history = jax.numpy.zeros((4, config.max_history), int)
    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    ours = generators.step_flops(model, 4, level_sizes=generators.LEVELS, shared=False)
    assert 0.8 < ours / counted < 1.0
    assert generators.step_flops(model, 4, level_sizes=generators.LEVELS, shared=True) > ours


def test_search_is_timed_at_every_size(fake_peer, tiny, tiny_sizes, tmp_path):
    options = {"users": 4, "peer_users": 2, "beam_size": 5, "results": 3, "rounds": 1}
    generators.search(tmp_path / "search.json", fake_peer, items=(60, 80), **options)
    small, large = json.loads((tmp_path / "search.json").read_text())["catalogues"]
    assert (small["items"], large["items"]) == (60, 80)
    assert small["peer, trie: users/s"] == 2 / 0.25
    assert small["semid, rq-transformer: users/s"] > 0
    assert small["peer, lists equal to those of mask"] == 1.0
    assert (tmp_path / "search.html").stat().st_size


@pytest.fixture
def finished_run(layout, tmp_path):
    """What `python -m experiments families` leaves behind, with random codes and a history of one look."""
    folder = tmp_path / "run"
    data = read_layout(layout).save(folder / "dataset")
    codes = np.random.default_rng(0).integers(0, 4, (data.num_items, 3)).astype(np.int32)
    options = {"kind": Kind.CATALOG, "config": {}, "parents": data.parents, "seed": 0}
    with write_artifact(folder / "shared" / "rq-vae_0", **options) as temporary:
        SemanticCatalog(data.item_ids, codes, (4, 4, 4)).write(temporary / CATALOG_FILE)
    model = folder / "families.rq-transformer_0" / "model"
    model.mkdir(parents=True)
    look = {"step": 12, "validation/recall@10": 0.055, "validation/ndcg@10": 0.03}
    (model / "history.jsonl").write_text(json.dumps(look) + "\n")
    return folder


def test_minutes_are_steps_times_their_seconds_and_go_on_from_the_last_look(
    finished_run, fake_peer, tiny, tmp_path, monkeypatch, capsys
):
    short = minutes.FAMILIES["rq-transformer"]
    short = replace(short, training=replace(short.training, epochs=1.0, validate_every=1.0))
    monkeypatch.setattr(minutes, "FAMILIES", {**minutes.FAMILIES, "rq-transformer": short})

    def run(**options):
        minutes.minutes(
            tmp_path / "out",
            finished_run,
            fake_peer,
            learning_rates=(3e-3,),
            epochs=(40.0,),
            looks=4,
            steps=1,
            families=("rq-transformer",),
            **options,
        )
        return json.loads((tmp_path / "out" / "minutes.json").read_text())["rows"]

    first = run(rounds=1)
    assert [row["model"] for row in first] == [
        "rq-transformer",
        "rq-transformer, codes alone",
        "peer, rate 0.003, 40 epochs",
    ]
    ours = first[0]
    assert ours["minutes to 0.05"] == ours["training minutes"] == 12 * ours["seconds a step"] / 60
    assert ours["minutes to 0.06"] is None
    assert [at for at, _ in first[-1]["looks"]] == [step * 0.5 / 60 for step in (10, 20, 30, 40)]
    (log,) = (tmp_path / "out").glob("peer*/history.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    (log.parent / "state.pt").write_text("30")  # as if a kill had come after the third look
    assert run(rounds=0) == first
    assert capsys.readouterr().out.count("'step': 40") == 2


def test_a_peer_that_ends_is_named(fake_peer):
    codes = np.zeros((1, 1), int)
    with paired_timing.peer(fake_peer, codes, (1,), search=False) as ask:
        assert ask is not None
        assert ask("model")["parameters"] == 7
        with pytest.raises(SemidError, match="the peer ended at 'dance'"):
            ask("dance")
