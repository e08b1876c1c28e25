"""Cost of an end-to-end step: arithmetic, time and memory.

    python -m experiments.benchmarks.joint --out runs/joint_cost.json
    JAX_NUM_CPU_DEVICES=8 python -m experiments.benchmarks.joint --rounds 0 --bank 10000000 --out runs/joint_bank.json

A joint step encodes a share p of what a batch asks for, its targets and the last w items of its histories, and
differentiates a share q; it is compared with the staged step, in which the generator alone learns from the same rows,
with the default joint step, whose one term reads no targets' vectors, so that they are not encoded, and with the step
that encodes every item of the histories. Then an encoder of a pre-trained one's size, tuned in every way that there
is; and the step with a bank too large for one device, which is compiled and not run.

Everything is random, as no cost depends on it. Speed is compared within rounds, in which every way takes its turn, as
in `training.py`. Memory is what the compiled step says that it needs, on one device. FLOPs are XLA's count of the
program as it was written, before the compiler changes it: of the encoder, those of its forward pass for items that are
encoded alone and those of value and gradient for the others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import NamedSharding

from experiments.benchmarks.training import table
from quantizers import Schedule, info_nce
from semid.artifacts import try_file, write_json
from semid.encoders import (
    BlocksConfig,
    Content,
    Frozen,
    Full,
    FusionConfig,
    HiddenRows,
    ImageConfig,
    ImageEncoder,
    ImageRows,
    ItemEncoder,
    LowRank,
    PostNorm,
    SideAdapters,
    SideTower,
    TextEncoder,
    TextEncoderConfig,
    TextRows,
    Tuning,
    tuned,
)
from semid.generators import LossTables, generator_loss
from semid.joint import JointConfig, JointModel, Objective, StepConfig, bucket_sizes
from semid.joint.model import ContentTables, joint_loss
from semid.tokenizers import RQVAE, RQVaeConfig
from semid.training import (
    ROWS,
    Loss,
    OptimizerConfig,
    PackedRows,
    StepContext,
    TrainState,
    make_mesh,
    make_optimizer,
    make_step,
    named_leaves,
    replicated,
    shardings,
    split_variables,
)
from seq_models import ItemTables, RQTransformer, RQTransformerConfig, TransformerConfig, code_cross_entropy, last_state

MIB, GIGA, PIXELS = 2**20, 1e9, 32
STAGED, DEFAULT, EVERY = "staged", "w 2, p 1, q 1, generation alone (the default)", "every history item"
OBJECTIVE = Objective(contrast=Schedule(0.1))


@dataclass(frozen=True)
class Sizes:
    """Sizes of the catalogue, a batch, and the models. Encoders are trained from scratch."""

    items: int = 12_101
    batch: int = 256
    """Histories, each with one target."""
    history: int = 20
    pieces: int = 32
    """Tokens of an item's text."""
    vocabulary: int = 1000
    text: BlocksConfig = BlocksConfig()
    image: BlocksConfig | None = None
    """Of an encoder of pictures of 32 x 32 pixels in 16 patches; None: there are none."""
    dim: int = 64
    """Width of an item's vector."""
    level_sizes: tuple[int, ...] = (256, 256, 256, 64)
    """Level sizes; the last level is the tie-break."""
    generator: TransformerConfig = TransformerConfig()


@dataclass(frozen=True)
class Pretrained:
    """An encoder of MiniLM's size, and its batch size."""

    blocks: BlocksConfig = BlocksConfig(dim=384, layers=6, heads=12, hidden=1536, architecture=PostNorm())
    vocabulary: int = 30_522
    items: int = 128
    tokens: int = 32
    side: SideAdapters = SideAdapters()
    low_rank: LowRank = LowRank()


@dataclass(frozen=True)
class Way:
    """A training step and its inputs, which are made on first use."""

    model: Callable[[], nnx.Module]
    loss: Loss
    batch: Callable[[], Any]
    tables: Callable[[], Any] = lambda: None


def main(
    out: Path = Path("runs/joint_cost.json"),
    rounds: int = 7,
    steps: int = 3,
    windows: tuple[int, ...] = (0, 2, 5),
    rates: tuple[tuple[float, float], ...] = ((1, 1), (1, 0.2), (0.5, 0.5), (0.2, 0.2)),
    bank: int = 0,
    sizes: Sizes = Sizes(),
    pretrained: Pretrained = Pretrained(),
) -> None:
    """Measure, print tables and write JSON.

    Args:
        out: File to write.
        rounds: Rounds over all variants; 0: nothing is run, and only the FLOPs and memory of the steps (with `bank`,
            those of the bank) are measured.
        steps: Steps per turn.
        windows: Last items of a history that are encoded in a step, w.
        rates: Shares that are encoded and differentiated, p and q.
        bank: Items of a bank of width 256 on all devices; 0: none.
        sizes: Of catalogue, batch and models.
        pretrained: What is tuned.
    """
    out = try_file(out)
    figures: dict[str, Any] = {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    if rounds or not bank:
        figures["steps"] = _joint_steps(sizes, windows, rates, rounds, steps)
    if rounds:
        figures["tunings"] = _tunings(pretrained, rounds, steps)
    if bank:
        figures["bank"] = [_bank(replace(sizes, items=bank, dim=256))]
    for name, value in figures.items():
        print(table(name, value) if isinstance(value, list) else f"{name}: {value}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)


class _Program:
    """A variant's compiled step. Its state and inputs are made by `start`."""

    def __init__(self, way: Way) -> None:
        self.way, self.mesh, self.optimizer = way, make_mesh(), make_optimizer(OptimizerConfig(), num_steps=10_000)
        of_state = shardings(jax.eval_shape(self._first), self.mesh)
        rows, whole = NamedSharding(self.mesh, ROWS), replicated(self.mesh)
        self.made = ((self._first, of_state), (way.batch, rows), (way.tables, whole))
        self.state, batch, tables = (_placed(jax.eval_shape(make), lay) for make, lay in self.made)
        options: dict[str, Any] = {"tables": None, "seed": 0, "num_steps": 10_000, "mesh": self.mesh}
        step = make_step(nnx.eval_shape(way.model), self.optimizer, way.loss, **options)
        lowered = replace(step, tables=tables).lower(self.state, batch)
        self.flops, self.program, self.key = _flops(lowered), lowered.compile(), step.key

    def _first(self) -> TrainState:
        """The state before the first step."""
        _, params, rest = split_variables(self.way.model())
        return TrainState(jnp.zeros((), jnp.int32), params, rest, self.optimizer.init(params))

    def start(self) -> None:
        """Make the state, the tables, and the batch that all steps are taken on."""
        self.state, *self.given = (jax.jit(make, out_shardings=lay)() for make, lay in self.made)

    def take(self, steps: int) -> float:
        """Seconds of a number of steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.state, self.metrics = self.program(self.state, *self.given, self.key)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started

    def needs(self) -> dict[str, float]:
        """MiB per device: parameters with their moments, temporary arrays of a step, and the sum of both."""
        need: Any = self.program.memory_analysis()
        given = need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes
        trained = jax.tree.leaves((self.state.params, self.state.opt_state))
        return {
            "trained, with moments, MiB": sum(map(_bytes, trained)) / MIB,
            "temporaries, MiB": need.temp_size_in_bytes / MIB,
            "in all, MiB": (given + need.temp_size_in_bytes) / MIB,
        }


def _bytes(leaf: Any) -> int:
    """Bytes of the part of an array that a device holds."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _placed(tree: Any, lay: Any) -> Any:
    """Shapes with shardings, for a program that is compiled without arrays."""
    of_leaves = jax.tree.broadcast(lay, tree)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, of_leaves)


def _compared(ways: dict[str, Way], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Costs of the variants, and with `rounds` their times relative to the first in the same round."""
    programs = {name: _Program(way) for name, way in ways.items()}
    times = _times(programs, rounds, steps) if rounds else {}
    return {
        name: {"step, GFLOP": program.flops / GIGA, **times.get(name, {}), **program.needs()}
        for name, program in programs.items()
    }


def _times(programs: dict[str, _Program], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    for program in programs.values():
        program.start()
    takes = [{name: one.take(steps) / steps for name, one in programs.items()} for _ in range(rounds + 1)][1:]
    seconds = {name: np.array([take[name] for take in takes]) for name in programs}
    first, rows = next(iter(programs)), {}
    for name in programs:
        low, middle, high = np.quantile(seconds[name] / seconds[first], (0.25, 0.5, 0.75))
        rows[name] = {
            "ms a step": 1e3 * float(np.median(seconds[name])),
            f"time over {first}": float(middle),
            "quartiles": f"{low:.3g} to {high:.3g}",
        }
    return rows


def _joint_steps(
    sizes: Sizes, windows: tuple[int, ...], rates: tuple[tuple[float, float], ...], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Joint steps by w, p and q, after the staged one."""
    configs = {
        f"w {w}, p {p:g}, q {q:g}": StepConfig(OBJECTIVE, window=w, forward=p, backward=q)
        for w in windows
        for p, q in rates
    }
    configs[DEFAULT] = JointConfig().joint[0].step
    configs[EVERY] = StepConfig(OBJECTIVE, window=sizes.history)
    ways = _staged(sizes) | {name: _joint(sizes, config) for name, config in configs.items()}
    costs = _compared(ways, rounds, steps)
    flops = _flops_of_an_item(sizes)
    encoding = {name: _encoding(sizes, config, flops) for name, config in configs.items()}
    return [{"step": name, **encoding.get(name, {}), **cost} for name, cost in costs.items()]


def _encoding(sizes: Sizes, config: StepConfig, flops: tuple[float, float]) -> dict[str, float]:
    """Number of items that a step encodes. Its program has fixed shapes, so repeated items in a batch count, too."""
    most = sizes.batch * (config.reads_targets + min(config.window, sizes.history))
    forward, backward = bucket_sizes(most, forward=config.forward, backward=config.backward)
    still, learning = flops
    taken = (forward - backward) * still + backward * learning
    return {
        "items encoded": forward,
        "differentiated": backward,
        "encoder, GFLOP": taken / GIGA,
        "over p = q = 1": taken / (most * learning),
    }


def _flops_of_an_item(sizes: Sizes) -> tuple[float, float]:
    """FLOPs of encoding an item, without and with a gradient, in a batch of `sizes.batch` items."""
    graph, params, rest = split_variables(nnx.eval_shape(lambda: _encoder(sizes)))
    content = jax.eval_shape(lambda: _content(replace(sizes, items=sizes.batch)))

    def total(params: nnx.State, rest: nnx.State, content: Content) -> Any:
        return jnp.sum(nnx.merge(graph, params, rest)(content, key=jax.random.key(0, impl="rbg")))

    programs = (jax.jit(of).lower(params, rest, content) for of in (total, jax.value_and_grad(total)))
    still, learning = (_flops(program) / sizes.batch for program in programs)
    return still, learning


def _flops(program: jax.stages.Lowered | jax.stages.Compiled) -> float:
    counted: Any = program.cost_analysis()
    return counted["flops"]


def _staged(sizes: Sizes) -> dict[str, Way]:
    """The generator alone on fixed codes and vectors: with one target per row, and as in actual training, with every
    item as a target."""

    def loss(model: RQTransformer, batch: PackedRows, tables: LossTables, context: StepContext) -> Any:
        codes, (backbone, depth) = tables.items.codes[batch.targets], jax.random.split(context.key)
        states = model.states(tables.items.inputs(batch.history), batch.segments, key=backbone)
        logits = model.depth_logits(last_state(states, batch.segments), codes, key=depth)
        return code_cross_entropy(logits, codes, jnp.ones(len(codes))).sum(), {}

    def tables() -> LossTables:
        vectors = jnp.zeros((sizes.items, sizes.dim))
        return LossTables(ItemTables(_codes(sizes), vectors, jnp.ones(sizes.items, bool)))

    def packed() -> PackedRows:
        rows = _rows(sizes)
        return rows._replace(targets=rows.history)

    def model() -> RQTransformer:
        return _generator(sizes)

    return {
        STAGED: Way(model, loss, lambda: _rows(sizes), tables),
        "staged, every item a target": Way(model, generator_loss, packed, tables),
    }


def _joint(sizes: Sizes, config: StepConfig) -> Way:
    def model() -> JointModel:
        tokenizer = RQVaeConfig(level_sizes=sizes.level_sizes[:-1], hidden=(128,))
        autoencoder = RQVAE(tokenizer, dim=sizes.dim, rngs=nnx.Rngs(0))
        return JointModel(_encoder(sizes), autoencoder, _generator(sizes), codes=_codes(sizes), rngs=nnx.Rngs(0))

    loss = functools.partial(joint_loss, config=config)
    return Way(model, loss, lambda: _rows(sizes), lambda: ContentTables(_content(sizes)))


def _encoder(sizes: Sizes) -> ItemEncoder:
    rngs = nnx.Rngs(0)
    config = TextEncoderConfig(sizes.text, max_length=sizes.pieces)
    encoders: dict[str, Any] = {"text": TextEncoder(config, vocabulary=sizes.vocabulary, rngs=rngs)}
    if sizes.image is not None:
        encoders["image"] = ImageEncoder(ImageConfig(size=PIXELS, patch=8, blocks=sizes.image), rngs=rngs)
    return ItemEncoder(encoders, FusionConfig(dim=sizes.dim), rngs=rngs)


def _generator(sizes: Sizes) -> RQTransformer:
    config = RQTransformerConfig(sizes.generator)
    return RQTransformer(config, level_sizes=sizes.level_sizes, num_features=sizes.dim, rngs=nnx.Rngs(0))


def _content(sizes: Sizes) -> Content:
    content: dict[str, Any] = {"text": _texts(sizes.items, sizes.pieces, sizes.vocabulary)}
    if sizes.image is not None:
        pixels = jax.random.bits(jax.random.key(1), (sizes.items, PIXELS, PIXELS, 3), jnp.uint8)
        content["image"] = ImageRows(pixels, jnp.ones(sizes.items, bool))
    return content


def _texts(items: int, tokens: int, vocabulary: int) -> TextRows:
    """Full-length histories: padding would cost as much."""
    return TextRows(
        jax.random.randint(jax.random.key(0), (items, tokens), 0, vocabulary), jnp.ones((items, tokens), bool)
    )


def _codes(sizes: Sizes) -> Any:
    return jax.random.randint(
        jax.random.key(2), (sizes.items, len(sizes.level_sizes)), 0, jnp.asarray(sizes.level_sizes)[None]
    )


def _rows(sizes: Sizes) -> PackedRows:
    """One full history and one target per row."""
    items = jax.random.randint(jax.random.key(3), (sizes.batch, sizes.history + 1), 0, sizes.items)
    segments = jnp.broadcast_to(jnp.arange(1, sizes.batch + 1)[:, None], (sizes.batch, sizes.history))
    return PackedRows(items[:, :-1], items[:, -1], segments)


def _tunings(sizes: Pretrained, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A step of the encoders and fusion layers, with a loss by which pairs of items find each other."""

    def loss(model: ItemEncoder, batch: Content, tables: None, context: StepContext) -> Any:
        vectors = model(batch, key=context.key)
        return info_nce(vectors[::2], vectors[1::2]), {}

    def texts() -> Content:
        return {"text": _texts(sizes.items, sizes.tokens, sizes.vocabulary)}

    def states() -> Content:
        shape = (sizes.items, sizes.side.states, sizes.blocks.dim)
        return {
            "text": HiddenRows(jax.random.normal(jax.random.key(4), shape, jnp.float16), jnp.ones(sizes.items, bool))
        }

    def fused(encoder: Any) -> ItemEncoder:
        return ItemEncoder({"text": encoder}, FusionConfig(), rngs=nnx.Rngs(1))

    def model(tuning: Tuning) -> ItemEncoder:
        config = TextEncoderConfig(sizes.blocks, max_length=512, segments=2)
        backbone = TextEncoder(config, vocabulary=sizes.vocabulary, rngs=nnx.Rngs(0))
        return fused(tuned(backbone, tuning, rngs=nnx.Rngs(2)))

    def tower() -> ItemEncoder:
        return fused(SideTower(sizes.blocks.dim, sizes.side, rngs=nnx.Rngs(2)))

    tunings: dict[str, Tuning] = {
        "full": Full(),
        "low rank": sizes.low_rank,
        "side adapters": sizes.side,
        "frozen": Frozen(),
    }
    ways = {name: Way(functools.partial(model, tuning), loss, texts) for name, tuning in tunings.items()}
    ways["side adapters, states cached"] = Way(tower, loss, states)
    costs = _compared(ways, rounds, steps)
    all_of = "in all, MiB"
    return [
        {"tuning": name, **cost, "in all over full": cost[all_of] / costs["full"][all_of]}
        for name, cost in costs.items()
    ]


def _bank(sizes: Sizes) -> dict[str, Any]:
    """The joint step on a bank split over all devices, compiled without making any array."""
    program = _Program(_joint(sizes, StepConfig(OBJECTIVE)))
    bank = {name: leaf for name, leaf in named_leaves(program.state.rest).items() if name.startswith("bank/")}
    whole = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in bank.values())
    return {
        "items": sizes.items,
        "width": sizes.dim,
        "bank, MiB": whole / MIB,
        "of a device, MiB": sum(map(_bytes, bank.values())) / MIB,
        "step, GFLOP": program.flops / GIGA,
        "of a device, GFLOP": _flops(program.program) / GIGA,
        **program.needs(),
    }


if __name__ == "__main__":
    tyro.cli(main)
