"""Speed of training the RQ-VAE, compared with vector-quantize-pytorch, and of resolving collisions.

    python -m experiments.benchmarks.quantizers train --out runs/train.json --peer-python peer/bin/python
    python -m experiments.benchmarks.quantizers collisions --out runs/collisions.json

`peer/bin/python` is of an environment with the extra `bench` (torch and vector-quantize-pytorch). The floor is the time
of the matrix products alone at the rate that the same framework reaches, in the same run, on the largest of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments.benchmarks.paired_timing import timed
from quantizers import ResidualKMeans, min_cost_reassign, residual_codes, sinkhorn_reassign, tie_break
from semid.artifacts import try_file, write_json
from semid.errors import SemidError
from semid.tokenizers import BLOCK, RQVAE, AlignedRQVAE, ItemRows, RQVaeConfig
from semid.tokenizers.autoencoder import Tables
from semid.tokenizers.rqvae import joint_loss
from semid.training import create_state, make_mesh, make_optimizer, make_step, put_batch

DIM, ITEMS, BATCH = 768, 65_536, 2048
CONFIG = RQVaeConfig((256, 256, 256))
# OpenMP's threads spin for .2 s after PyTorch's last product, and would take cores from the next contender.
_PAUSE = 0.5


def train(out: Path, peer_python: Path | None = None, rounds: int = 7, steps: int = 20) -> None:
    """Time training steps of both, alternating in rounds: medians over rounds of items per second.

    Args:
        out: File to write.
        peer_python: Python with torch and vector-quantize-pytorch; none given: semid alone.
        rounds: Rounds; each trains every contender.
        steps: Steps per contender and round.
    """
    out = try_file(out)
    contenders = {"semid": _semid_steps()}
    rates: dict[str, list[float]] = {"semid": [], "peer": []}
    with contextlib.ExitStack() as stack:
        if peer_python:
            ask = stack.enter_context(_peer(peer_python))
            for name in ("ema", "gradient"):
                contenders[f"vector-quantize-pytorch, {name}"] = functools.partial(_peer_steps, ask, name)
        for run in contenders.values():
            run(3)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, run in contenders.items():
                time.sleep(_PAUSE)
                seconds[name].append(run(steps) / steps)
            time.sleep(_PAUSE)
            rates["semid"].append(matmul_rate())
            if peer_python:
                rates["peer"].append(ask(f"matmul {steps}")[0])
    flops = step_flops()
    figures: dict[str, Any] = {"batch": BATCH, "GFLOP of a step's products": flops / 1e9}
    for name, times in seconds.items():
        rate = float(np.median(rates["semid" if name == "semid" else "peer"]))
        median = float(np.median(times))
        figures[name] = {
            "items per second": BATCH / median,
            "slowest and fastest round": [BATCH / max(times), BATCH / min(times)],
            "matmul, GFLOP/s": rate,
            "items per second at the floor": BATCH * rate * 1e9 / flops,
            "share of the floor's speed": flops / (rate * 1e9) / median,
            "semid's speed over this one's": median / float(np.median(seconds["semid"])),
        }
    report(figures, out)


def step_flops() -> float:
    """FLOPs (two per multiply-add) of a training step's products: forward, gradients of weights and of inputs."""
    widths = (DIM, *CONFIG.hidden, CONFIG.latent)
    one_way = 2 * BATCH * sum(a * b for a, b in itertools.pairwise(widths))
    first = 2 * BATCH * widths[0] * widths[1]  # the gradient of the inputs is not needed
    return 6 * one_way - first + encode_flops(BATCH) - one_way


def encode_flops(items: int) -> float:
    """FLOPs of encoding: the encoder and a distance to every code."""
    widths = (DIM, *CONFIG.hidden, CONFIG.latent)
    return 2.0 * items * (sum(a * b for a, b in itertools.pairwise(widths)) + sum(CONFIG.level_sizes) * CONFIG.latent)


def collisions(out: Path, items: int = 1_000_000) -> None:
    """Time every collision policy on 3 x 256 codes of clustered vectors.

    Args:
        out: File to write.
        items: Number of items.
    """
    out = try_file(out)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(items // 2, 32)).astype(np.float32)
    x = centers[rng.integers(len(centers), size=items)] + 0.25 * rng.normal(size=(items, 32)).astype(np.float32)
    x[:, 8:] *= 0.4
    model = ResidualKMeans.fit(jnp.asarray(x[:20_000]), level_sizes=(256,) * 3, iterations=10, key=jax.random.key(0))
    blocks = [residual_codes(jnp.asarray(x[at : at + BLOCK]), model.codebooks) for at in range(0, items, BLOCK)]
    codes = np.concatenate([np.asarray(block.codes) for block in blocks])
    last: dict[str, Any] = {
        "residuals": np.concatenate([np.asarray(block.residuals[:, -1]) for block in blocks]),
        "codebook": np.asarray(model.codebooks[-1]),
    }
    _, counts = np.unique(codes, axis=0, return_counts=True)
    figures: dict[str, Any] = {
        "items": items,
        "colliding": float(counts[counts > 1].sum() / items),
        "largest group": int(counts.max()),
        "tie-break, s": timed(lambda: tie_break(codes)),
        "popularity, s": timed(lambda: tie_break(codes, popularity=rng.integers(1000, size=items))),
        "sinkhorn, s": timed(lambda: sinkhorn_reassign(codes, **last)),
        "min-cost, s": timed(lambda: min_cost_reassign(codes, **last)),
    }
    report(figures, out)


def _semid_steps() -> Callable[[int], float]:
    """The step of `semid tokenize`, on random rows of vectors on the device."""
    x = np.random.default_rng(0).standard_normal((ITEMS, DIM), dtype=np.float32)
    model = RQVAE(CONFIG, dim=DIM, rngs=nnx.Rngs(0))
    model.initialize(x[:4096], iterations=1, seed=0)
    whole, mesh, tables = AlignedRQVAE(model, []), make_mesh(), Tables(jnp.asarray(x), None)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(CONFIG.training.optimizer, num_steps=10_000)
        state = create_state(whole, optimizer, mesh)
        loss = functools.partial(joint_loss, config=CONFIG)
        step = make_step(whole, optimizer, loss, tables=tables, seed=0, num_steps=10_000, mesh=mesh)
    rng = np.random.default_rng(0)

    def run(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            for _ in range(steps):
                rows = ItemRows(rng.integers(ITEMS, size=BATCH).astype(np.int32))
                state, _ = step(state, put_batch(rows, mesh))
            jax.block_until_ready(state)
        return time.perf_counter() - started

    return run


@contextlib.contextmanager
def _peer(python: Path) -> Iterator[Callable[[str], list[float]]]:
    """A process of `peer_rqvae.py`, controlled line by line."""
    script = Path(__file__).with_name("peer_rqvae.py")
    with subprocess.Popen(
        [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        examples_set, answers = process.stdin, process.stdout
        if examples_set is None or answers is None:
            raise SemidError(f"{script}: no pipes to it")

        def ask(line: str) -> list[float]:
            examples_set.write(line + "\n")
            return [float(word) for word in answers.readline().split()]

        yield ask
        examples_set.close()


def _peer_steps(ask: Callable[[str], list[float]], name: str, steps: int) -> float:
    return ask(f"{name} {steps}")[0]


def matmul_rate(repeats: int = 20) -> float:
    """GFLOP/s of the first layer's product."""
    a, b = jnp.ones((BATCH, DIM)), jnp.ones((DIM, CONFIG.hidden[0]))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(a, b))
    seconds = timed(lambda: [jax.block_until_ready(multiply(a, b)) for _ in range(repeats)])
    return repeats * 2 * BATCH * DIM * CONFIG.hidden[0] / seconds / 1e9


def report(figures: dict[str, Any], out: Path) -> None:
    """Print, and write JSON with a description of the machine."""
    shown = {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__} | figures
    for name, value in shown.items():
        print(f"{name}: {value}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, shown)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "collisions": collisions})
