"""Speed of generators compared with the same encoder-decoder in PyTorch and Hugging Face transformers.

    python -m experiments.benchmarks.generators train --out runs/train.json --peer-python peer/bin/python
    python -m experiments.benchmarks.generators search --out runs/search.json --peer-python peer/bin/python
    python -m experiments.benchmarks.generators minutes --out runs/minutes --peer-python peer/bin/python \\
        --generators runs/families

`peer/bin/python` is of an environment with the extra `bench` (torch and transformers); the peer is T5 of
`peer_generator.py`. Both libraries read the same examples in the same order, and take AdamW with the same schedule and
clipping. They have the same width, depth, heads and a gated SiLU as feed-forward layer. They differ in this:

    positions     ours are rotary; T5 adds a learned bias, by 32 buckets of distance, to the scores of attention
    dropout       ours is on the input and the residuals; T5 also drops shares of attention and what is inside the
                  feed-forward layer, so both are timed without dropout too
    vocabulary    ours has an embedding table and a head of each level; T5 scores the codes of all levels each time
    padding       ours is to 5, 10 or 20 items, T5's to the longest history of a batch; both read the same batches, of
                  histories of about one length, as semid makes them. `shuffled` ones, as the usual recipes make them,
                  are of 20 items nearly always
    batches       both in microbatches, which saves both time on a CPU's caches, and `at once`
    search        ours encodes a user once for all beams; `generate` repeats the encoder's states for every beam
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
import tyro
from flax import nnx

from experiments.benchmarks.minutes import FAMILIES, minutes
from experiments.benchmarks.paired_timing import (
    Ask,
    Turn,
    give_examples,
    new_peer,
    peer,
    peer_steps,
    semid_order,
    semid_steps,
    take_turns,
    timed,
)
from experiments.configs.families import BACKBONE
from semid import GeneratorConfig
from semid.artifacts import try_file, write_json
from semid.data import Histories
from semid.recommender import ModelSpec, Scorer
from semid.training import SingleRows, batches
from seq_models import CodeTrie, EncoderDecoderConfig, ItemTables, RequestBatch, TransformerConfig
from seq_models.search import extend_prefixes, no_prefixes
from seq_models.sharing import top_k

SIZES = {
    "width 64": EncoderDecoderConfig(BACKBONE),
    "width 128": EncoderDecoderConfig(
        TransformerConfig(dim=128, layers=4, heads=4, hidden=1024, dropout=0.1), decoder_layers=4
    ),
}
USERS, ITEMS, LEVELS = 22_363, 12_101, (256, 256, 256, 9)  # as Amazon's Beauty
SEARCH_LEVELS = (256, 256, 256, 256)
HISTORY_ITEMS = 20
MICROBATCHES = FAMILIES["encoder-decoder"].training.accumulate
MANY = 200  # batches to average the work of one batch


def train(
    out: Path,
    peer_python: Path | None = None,
    rounds: int = 7,
    steps: int = 10,
    batch: int = 256,
    compiled: bool = False,
) -> None:
    """Time training steps of all contenders, alternating in rounds: medians over rounds of examples per second.

    The floor is the time of the matrix products alone at the rate that the same framework reaches, in the same run,
    on the largest of them. Codes are random, and so are histories, about as long as those of Beauty.

    Args:
        out: File to write.
        peer_python: Python with torch and transformers; none given: semid alone.
        rounds: Rounds; each trains every contender.
        steps: Steps per contender and round; a tenth for the larger model.
        batch: Examples per step.
        compiled: Time the peer under `torch.compile` as well (minutes of compilation).
    """
    out = try_file(out)
    codes = _random_codes(ITEMS, LEVELS)
    rows = SingleRows(_random_histories(USERS, ITEMS), max_history=HISTORY_ITEMS)
    figures: dict[str, Any] = {"batch": batch, "level sizes": LEVELS}
    with peer(peer_python, codes, LEVELS, search=False) as ask:
        figures |= ask("versions") if ask else {}
        for size, model in SIZES.items():
            few = steps if model.backbone.dim <= BACKBONE.dim else max(steps // 10, 1)
            turns, parameters = _trainings(model, codes, rows, ask, batch, compiled, (rounds + 1) * few)
            seconds = take_turns({name: functools.partial(turn, few) for name, turn in turns.items()}, rounds)
            each = {name: np.array(times) / few for name, times in seconds.items()}
            figures[size] = {"parameters": parameters}
            lengths = [len(b.history[0]) for b in batches(rows, batch_size=batch, num_batches=MANY, seed=0)]
            for name in (name for name in each if "matmul" not in name):
                items = [HISTORY_ITEMS] if "shuffled" in name else lengths
                figures[size][name] = _training_figures(name, each, model, batch, items)
            _report(figures, out)


def _trainings(
    model: EncoderDecoderConfig,
    codes: np.ndarray,
    rows: SingleRows,
    ask: Ask | None,
    batch: int,
    compiled: bool,
    steps: int,
) -> tuple[dict[str, Turn], dict[str, int]]:
    """The contenders, the largest matrix product of each library, and numbers of parameters."""
    shape = _largest_product(model, batch)
    own = nnx.state(ModelSpec(model, LEVELS, ITEMS, 0, HISTORY_ITEMS).build(seed=0), nnx.Param)
    counts = {"semid": sum(leaf.size for leaf in jax.tree.leaves(own))}
    turns: dict[str, Turn] = {"semid, matmul": functools.partial(_matmul, shape)}
    if ask:
        turns["peer, matmul"] = functools.partial(_peer_matmul, ask, shape)
    order = semid_order(rows, batch_size=batch, num_batches=steps)
    for way in ("", ", without dropout", ", at once", ", shuffled"):
        of = replace(model, backbone=replace(model.backbone, dropout=0.0)) if "dropout" in way else model
        config, parts = GeneratorConfig(of, features=()), 1 if way in (", at once", ", shuffled") else MICROBATCHES
        config = replace(config, training=replace(config.training, batch_size=batch, accumulate=parts))
        turns["semid" + way] = semid_steps(
            config, rows[np.arange(len(rows))] if "shuffled" in way else rows, codes, LEVELS
        )
        if ask is None:
            continue
        for kind in ("", ", compiled") if compiled else ("",):
            name = f"peer{kind}{way}"
            counts["peer"] = new_peer(ask, name, of, compiled=bool(kind), accumulate=parts)["parameters"]
            give_examples(ask, rows, [name], order=None if "shuffled" in way else order)
            turns[name] = functools.partial(peer_steps, ask, name, batch)
    return turns, counts


def _largest_product(model: EncoderDecoderConfig, batch: int) -> tuple[int, int, int]:
    return batch * HISTORY_ITEMS * len(LEVELS), model.backbone.dim, 2 * model.backbone.hidden


def _training_figures(
    name: str, seconds: dict[str, np.ndarray], model: EncoderDecoderConfig, batch: int, items: list[int]
) -> dict[str, float]:
    """Figures from the `seconds` per step (or product) in each round, by contender; `items` are lengths of batches."""
    library = name.partition(",")[0]
    rival = name.replace("peer", "semid").replace(", compiled", "")
    rate = 2.0 * np.prod(_largest_product(model, batch)) / np.median(seconds[f"{library}, matmul"])
    shared = library == "peer"
    flops = float(np.mean([step_flops(model, batch, level_sizes=LEVELS, shared=shared, items=n) for n in items]))
    median = float(np.median(seconds[name]))
    return {
        "examples per second": batch / median,
        "slowest round": batch / float(seconds[name].max()),
        "fastest round": batch / float(seconds[name].min()),
        "GFLOP of a step's products": flops / 1e9,
        "matmul, GFLOP/s": float(rate) / 1e9,
        "examples per second at the floor": batch * float(rate) / flops,
        "share of the floor's speed": flops / float(rate) / median,
        "semid is faster by, median of rounds": float(np.median(seconds[name] / seconds[rival])),
    }


def step_flops(
    model: EncoderDecoderConfig, batch: int, *, level_sizes: tuple[int, ...], shared: bool, items: int = HISTORY_ITEMS
) -> float:
    """FLOPs (two per multiply-add) of a training step's products; the backward pass has twice the forward pass's.

    `shared`: all levels share one vocabulary, as in T5.
    """
    size, levels = model.backbone, len(level_sizes)
    tokens, mixed = items * levels, size.dim * size.dim
    block = 4 * mixed + 3 * size.dim * size.hidden  # of a token: projections, feed-forward layer
    encoder = size.layers * tokens * (block + 2 * tokens * size.dim)
    cross = levels * (2 * mixed + 2 * tokens * size.dim) + tokens * 2 * mixed
    decoder = model.decoder_layers * (levels * (block + 2 * levels * size.dim) + cross)
    heads = (1 + sum(level_sizes)) * levels if shared else sum(level_sizes)
    return 3 * 2.0 * batch * (encoder + decoder + heads * size.dim)


def search(
    out: Path,
    peer_python: Path | None = None,
    items: tuple[int, ...] = (12_101, 1_000_000, 10_000_000),
    users: int = 512,
    peer_users: int = 32,
    peer_at_once: int = 16,
    beam_size: int = 50,
    results: int = 10,
    rounds: int = 3,
) -> None:
    """Time searches, including the encoding of histories: users per second, medians over alternating rounds.

    Codes and model weights are random. The peer is measured without a constraint, with
    `prefix_allowed_tokens_fn` (`trie`: nested dicts, up to 100,000 items; `sorted`: binary search among the sorted
    prefixes) and with `mask`, a processor of our own that does the same for all beams at once.

    Args:
        out: File to write; a plot goes beside it.
        peer_python: Python with torch and transformers; none given: semid alone.
        items: Items of each catalogue.
        users: Users per turn, in one batch.
        peer_users: Users per turn of the peer.
        peer_at_once: Users per call of `generate`.
        beam_size: Beams per user.
        results: Items returned to each user.
        rounds: Rounds, in each of which every contender searches once.
    """
    out = try_file(out)
    figures: dict[str, Any] = {"users": users, "beam size": beam_size, "catalogues": []}
    for num_items in items:
        codes = _random_codes(num_items, SEARCH_LEVELS)
        histories = _random_histories(max(users, peer_users), num_items).padded(HISTORY_ITEMS)
        turns = _semid_searches(codes, *(part[:users] for part in histories), beam_size=beam_size, results=results)
        with tempfile.TemporaryDirectory() as home, peer(peer_python, codes, SEARCH_LEVELS, search=True) as ask:
            found: dict[str, Path] = {}
            if ask:
                figures |= ask("versions")
                new_peer(ask, "peer", SIZES["width 64"])
                question = Path(home) / "question.npz"
                np.savez(question, history=histories[0][:peer_users], real=histories[1][:peer_users])
                for constraint in ("none", *(["trie"] if num_items <= 100_000 else []), "sorted", "mask"):
                    found[constraint] = Path(home) / f"{constraint}.npy"
                    turns[f"peer, {constraint}"] = functools.partial(
                        _peer_search,
                        ask,
                        name="peer",
                        file=str(question),
                        out=str(found[constraint]),
                        beam_size=beam_size,
                        results=results,
                        at_once=peer_at_once,
                        constraint=constraint,
                    )
            seconds = take_turns(turns, rounds)
            row = {"items": num_items, **_search_figures(seconds, users, peer_users)}
            lists = {constraint: np.load(file) for constraint, file in found.items()}
        if lists:
            others = [rows for name, rows in lists.items() if name in ("trie", "sorted")]
            equal = [(rows == lists["mask"]).all(axis=1) for rows in others]
            row["peer, lists equal to those of mask"] = float(np.mean(equal))
            row |= {f"peer, {name}: items that exist": float((rows >= 0).mean()) for name, rows in lists.items()}
        figures["catalogues"].append(row)
        _report(figures, out)
    _plot_search(figures["catalogues"], out.with_suffix(".html"))


def _semid_searches(
    codes: np.ndarray, history: np.ndarray, real: np.ndarray, *, beam_size: int, results: int
) -> dict[str, Callable[[], Any]]:
    """semid's two families, with the constraint of `Recommender` and without one."""
    requests = RequestBatch(jnp.asarray(history), jnp.asarray(real.astype(np.int32)))
    trie = CodeTrie.from_codes(codes, SEARCH_LEVELS)
    tables = ItemTables.from_arrays(codes, None, np.ones(len(codes), np.int32))
    turns: dict[str, Callable[[], Any]] = {}
    for name in ("encoder-decoder", "rq-transformer"):
        spec = ModelSpec(FAMILIES[name].model, SEARCH_LEVELS, len(codes), 0, HISTORY_ITEMS)
        scorer = Scorer.from_model(spec.build(seed=0), tables=tables, trie=trie, softmax_over=spec.normalization)
        turns[f"semid, {name}"] = functools.partial(timed, scorer.top, requests, k=results, beam_size=beam_size)
        turns[f"semid, {name}, unconstrained"] = functools.partial(
            timed,
            _unconstrained,
            scorer.graph,
            scorer.params,
            tables,
            requests,
            level_sizes=SEARCH_LEVELS,
            k=results,
            beam_size=beam_size,
        )
    return turns


@functools.partial(jax.jit, static_argnums=0, static_argnames=("level_sizes", "k", "beam_size"))
def _unconstrained(
    graph: Any,
    params: Any,
    tables: ItemTables,
    requests: RequestBatch,
    *,
    level_sizes: tuple[int, ...],
    k: int,
    beam_size: int,
) -> Any:
    """Unconstrained beam search over all code sequences: its results need not be items."""
    model = nnx.merge(graph, params)
    context = model.encode_history(tables.inputs(requests.history), requests.segments)
    cache, users = model.init_cache(context), len(requests.history)
    prefixes, scores = no_prefixes(users), jnp.zeros((users, 1))
    for size in level_sizes:
        logits, cache = model.decode_step(context, cache, prefixes)
        products = (scores[..., None] + jax.nn.log_softmax(logits)).reshape(users, -1)
        scores, best = top_k(products, min(beam_size, products.shape[1]))
        prefixes = extend_prefixes(prefixes, best // size, best % size)
    return prefixes.codes[:, :k], scores[:, :k]


def _search_figures(seconds: dict[str, list[float]], users: int, peer_users: int) -> dict[str, float]:
    figures = {}
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    for name, median in medians.items():
        figures[f"{name}: users/s"] = (users if name.startswith("semid") else peer_users) / median
    for name in ("semid, encoder-decoder", "semid, rq-transformer"):
        figures[f"{name}: constraint's share"] = 1 - medians[f"{name}, unconstrained"] / medians[name]
    for name in ("trie", "sorted", "mask"):
        if f"peer, {name}" in medians:
            mine, theirs = (figures[f"{one}: users/s"] for one in ("semid, encoder-decoder", f"peer, {name}"))
            figures[f"peer, {name}: constraint's share"] = 1 - medians["peer, none"] / medians[f"peer, {name}"]
            figures[f"peer, {name}: semid's encoder-decoder is faster by"] = mine / theirs
    return figures


def _plot_search(rows: list[dict[str, Any]], file: Path) -> None:
    names = [name for row in rows for name in row if name.endswith("users/s")]
    plot = go.Figure(
        layout={"xaxis": {"title": "items", "type": "log"}, "yaxis": {"title": "users per second", "type": "log"}}
    )
    for name in dict.fromkeys(names):
        known = [row for row in rows if name in row]
        plot.add_scatter(
            x=[row["items"] for row in known], y=[row[name] for row in known], name=name.removesuffix(": users/s")
        )
    plot.write_html(file)


def _peer_search(ask: Ask, **arguments: Any) -> float:
    return ask("search", **arguments)["seconds"]


def _peer_matmul(ask: Ask, shape: tuple[int, int, int], repeats: int) -> float:
    rows, inner, columns = shape
    return ask("matmul", rows=rows, inner=inner, columns=columns, repeats=repeats)["seconds"]


def _matmul(shape: tuple[int, int, int], repeats: int) -> float:
    a, b = jnp.ones(shape[:2]), jnp.ones(shape[1:])
    jax.block_until_ready((a, b))
    return timed(lambda: [jax.block_until_ready(_product(a, b)) for _ in range(repeats)])


_product = jax.jit(jnp.matmul)


def _random_codes(items: int, level_sizes: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(size, size=items, dtype=np.int32) for size in level_sizes], axis=1)


def _random_histories(users: int, items: int) -> Histories:
    rng = np.random.default_rng(0)
    lengths = np.minimum(2 + rng.geometric(0.2, users), 200)
    ends = np.cumsum(lengths)
    return Histories(
        users=np.arange(users, dtype=np.int32),
        items=rng.integers(items, size=ends[-1], dtype=np.int32),
        starts=ends - lengths,
        ends=ends,
    )


def _report(figures: dict[str, Any], out: Path) -> None:
    shown = {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__} | figures
    for name, value in shown.items():
        print(f"{name}: {value}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, shown)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "search": search, "minutes": minutes})
