"""The code trie and the search over it: seconds and bytes to build, users per second, and cost of the constraint.

    python -m experiments.benchmarks.search --out runs/search.json
    python -m experiments.benchmarks.search --out runs/build.json --build-items 20000000

Catalogues are random codes. The model is a table of logits by the code before, so that what is timed is the search. The
control, `unconstrained`, is a beam search over all products of the vocabularies, whose results need not exist. Every
contender runs once a round, in turn; given are users per second of its fastest round, and per second of processor time,
which says more where other work shares the machine. What a mixture with an item graph costs, a condition, or two
further code sequences is measured on searches with a model, an RQ-Transformer of the recipes' size, as ratios of
medians. Peak memory is that of the whole process so far, its libraries and the codes included.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int

from semid.artifacts import try_file, write_json
from semid.recommender import ConditionSpec, ModelSpec, Scorer, SequencesSpec
from seq_models import (
    Conditions,
    ItemNeighbors,
    ItemTables,
    Mixture,
    RequestBatch,
    RQTransformerConfig,
    SoftmaxOver,
    TransformerConfig,
)
from seq_models.masks import ItemMask
from seq_models.search import Beams, Step, beam_search, checked_logits, extend_prefixes, no_prefixes
from seq_models.sharing import top_k
from seq_models.trie import Capacity, CodeTrie
from seq_models.types import Prefixes

Tables = tuple[Float[Array, "before size"], ...]
Contenders = Mapping[str, Callable[[], Any]]
_BACKBONE = TransformerConfig(dim=128, heads=4, hidden=256, dropout=0.0)  # of the recipes' generators


def main(
    out: Path = Path("runs/search.json"),
    items: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000),
    level_sizes: tuple[int, ...] = (256, 256, 256, 256),
    users: int = 32,
    beam_size: int = 50,
    denied: int = 50,
    rounds: int = 30,
    edges: int = 64,
    build_items: int = 0,
) -> None:
    """Measure, print and write JSON.

    Args:
        out: File to write.
        items: Items of each catalogue.
        level_sizes: Codebook sizes, first level first.
        users: Users per batch.
        beam_size: Beams per user.
        denied: Items denied to each user when masks are measured.
        rounds: Runs of each search.
        edges: Neighbors of each item in the graph of the mixture; 0: no mixture is measured.
        build_items: Items of a catalogue of 8 levels of 2048 codes whose trie is only built; 0: none.
    """
    out = try_file(out)
    figures: dict[str, Any] = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "level sizes": level_sizes,
        "users": users,
        "beam size": beam_size,
        "catalogues": [],
    }
    tables, rng = _tables(level_sizes, users), np.random.default_rng(0)
    for num_items in items:
        codes, trie, row = _build(num_items, level_sizes, rng)
        row |= _rates(_contenders(tables, trie, codes, users, beam_size, denied, rng), users, rounds)
        if edges:
            row |= _mixture_costs(trie, codes, users=users, beam_size=beam_size, edges=edges, rounds=rounds)
        del codes, trie  # before the next are made
        figures["catalogues"].append(row)
        _show(row)
    if build_items:
        figures["build"] = _build(build_items, (2048,) * 8, rng)[-1]
        _show(figures["build"])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)


def _build(
    num_items: int, level_sizes: tuple[int, ...], rng: np.random.Generator
) -> tuple[Int[np.ndarray, "items level"], CodeTrie, dict[str, Any]]:
    codes = np.empty((num_items, len(level_sizes)), np.int32)
    for level, size in enumerate(level_sizes):
        codes[:, level] = rng.integers(0, size, num_items, np.int32)
    started, processor = time.monotonic(), time.process_time()
    trie = jax.block_until_ready(CodeTrie.from_codes(codes, level_sizes))
    seconds, processor = time.monotonic() - started, time.process_time() - processor
    figures = {
        "items": num_items,
        "build, s": seconds,
        "build, s of processor time": processor,
        "peak memory, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "bytes an item": _bytes_an_item(trie),
    }
    roomy = CodeTrie.from_codes(codes, level_sizes, capacity=Capacity.around(trie))
    return codes, trie, figures | {"bytes an item of a capacity": _bytes_an_item(roomy)}


def _bytes_an_item(trie: CodeTrie) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trie)) / trie.num_items


def _show(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        print(f"{name:70s} {value:,.2f}" if isinstance(value, float) else f"{name:70s} {value:,}")


def _contenders(
    tables: Tables,
    trie: CodeTrie,
    codes: Int[np.ndarray, "items level"],
    users: int,
    beam_size: int,
    denied: int,
    rng: np.random.Generator,
) -> Contenders:
    """Searches that differ only in the items that they may return."""
    lists = (jnp.asarray(rng.integers(0, trie.num_items, (users, denied), np.int32)), jnp.asarray(codes))
    shared = ItemMask.from_items(trie, allowed=rng.random((1, trie.num_items)) < 0.5)
    constrained = functools.partial(_constrained, tables, trie, users=users, beam_size=beam_size)
    return {
        "unconstrained": functools.partial(_unconstrained, tables, users=users, beam_size=beam_size),
        "constrained": constrained,
        f"constrained, {denied} items denied to each user": functools.partial(constrained, denied=lists),
        "constrained, half of the items allowed": functools.partial(constrained, shared),
    }


def _seconds(contenders: Contenders, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Times of each contender's rounds, and their processor times."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first round compiles
        for name, run in contenders.items():
            started, processor = time.monotonic(), time.process_time()
            jax.block_until_ready(run())
            seconds[name].append((time.monotonic() - started, time.process_time() - processor))
    return {name: measured[1:] for name, measured in seconds.items()}


def _rates(contenders: Contenders, users: int, rounds: int) -> dict[str, float]:
    rates = {}
    for name, measured in _seconds(contenders, rounds).items():
        wall, processor = (min(column) for column in zip(*measured, strict=True))
        rates[f"{name}: users/s"] = users / wall
        rates[f"{name}: users/s of processor time"] = users / processor
    return rates


def _mixture_costs(
    trie: CodeTrie, codes: Int[np.ndarray, "items level"], *, users: int, beam_size: int, edges: int, rounds: int
) -> dict[str, float]:
    """Times of a search with a model, alone and mixed with an item graph, after histories of 20 items."""
    num_items, keys = trie.num_items, jax.random.split(jax.random.key(0), 3)
    spec = ModelSpec(RQTransformerConfig(_BACKBONE), trie.level_sizes, num_items, 0, max_history=20)
    counts = np.ones(num_items, np.int32)
    tables = ItemTables.from_arrays(codes, None, counts)
    scorer = Scorer.from_model(spec.build(seed=0), tables=tables, trie=trie, softmax_over=SoftmaxOver.VOCABULARY)
    edges_of = (num_items, edges)
    neighbors = ItemNeighbors(
        jax.random.randint(keys[0], edges_of, 0, num_items), jax.random.uniform(keys[1], edges_of)
    )
    history = jax.random.randint(keys[2], (users, 20), 0, num_items)
    requests = RequestBatch(history, jnp.ones_like(history))
    mixtures = {
        "model": None,
        "with graph": Mixture.from_numbers(neighbors, weight=0.7, decay=0.5),
        "with graph, without repeats": Mixture.from_numbers(neighbors, weight=0.7, decay=0.5, repeat_factor=0.0),
    }
    contenders = {
        name: functools.partial(replace(scorer, mixture=mixture).top, requests, k=10, beam_size=beam_size)
        for name, mixture in mixtures.items()
    }
    conditions = ConditionSpec(("buy", "click", "look"), on_event=True, film=True)
    asked = scorer.with_model(replace(spec, conditions=conditions).build(seed=0))
    wish = requests._replace(target_conditions=Conditions(jnp.ones(users, jnp.int32)))
    contenders["asked for an event"] = functools.partial(asked.top, wish, k=10, beam_size=beam_size)
    further = SequencesSpec(("text", "image"), (trie.level_sizes,) * 2, ("", ""))
    reading = scorer.with_model(replace(spec, sequences=further).build(seed=0))
    reading = replace(reading, tables=ItemTables.from_arrays(codes, None, counts, sequences=(codes, codes)))
    contenders["two further code sequences"] = functools.partial(reading.top, requests, k=10, beam_size=beam_size)
    medians = {name: np.median(times, axis=0) / users for name, times in _seconds(contenders, rounds).items()}
    figures: dict[str, float] = {}
    for name, times in medians.items():
        for what, own, alone in zip(("time", "processor time"), times, medians["model"], strict=True):
            figures |= {f"{name}: ms of {what} per user": own * 1e3, f"{name}: {what} over the model's": own / alone}
    return figures


@functools.partial(jax.jit, static_argnames=("users", "beam_size"))
def _constrained(
    tables: Tables,
    trie: CodeTrie,
    mask: ItemMask | None = None,
    denied: tuple[Int[Array, "users n"], Int[Array, "items level"]] | None = None,
    *,
    users: int,
    beam_size: int,
) -> Beams:
    """With denied rows and the catalogue's codes, the time includes making the mask of a request."""
    if denied is not None:
        mask = ItemMask.from_items(trie, denied=denied[0], codes=denied[1])
    return beam_search(_step(tables), (), trie, batch=users, beam_size=beam_size, mask=mask)


@functools.partial(jax.jit, static_argnames=("users", "beam_size"))
def _unconstrained(tables: Tables, *, users: int, beam_size: int) -> tuple[Prefixes, Float[Array, "users beam"]]:
    prefixes, scores = no_prefixes(users), jnp.zeros((users, 1))
    for level, table in enumerate(tables):
        logits, _ = _step(tables)((), prefixes)
        logits = checked_logits(logits, (*scores.shape, table.shape[1]), level)
        products = (scores[..., None] + jax.nn.log_softmax(logits)).reshape(users, -1)
        scores, best = top_k(products, min(beam_size, products.shape[1]))
        prefixes = extend_prefixes(prefixes, best // table.shape[1], best % table.shape[1])
    return prefixes, scores


def _tables(level_sizes: tuple[int, ...], users: int) -> Tables:
    """Logits of each level's codes: at the first by user, then by the code before."""
    keys = jax.random.split(jax.random.key(0), len(level_sizes))
    before = (users, *level_sizes[:-1])
    return tuple(jax.random.normal(k, (n, size)) for k, n, size in zip(keys, before, level_sizes, strict=True))


def _step(tables: Tables) -> Step:
    def step(cache: Any, prefixes: Prefixes) -> tuple[Array, Any]:
        if prefixes.level == 0:
            return tables[0][:, None, :], cache
        return tables[prefixes.level][prefixes.codes[..., -1]], cache

    return step


if __name__ == "__main__":
    tyro.cli(main)
