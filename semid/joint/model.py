"""The joint model, and the losses of a step in which encoders, tokenizer and generator learn together."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from quantizers import Schedule, usage_entropy_loss
from semid.config import check_range
from semid.encoders import Content, ItemEncoder, take
from semid.errors import SemidError, did_you_mean
from semid.joint.bank import MemoryBank, bucket_sizes, encode_fresh, unique_rows
from semid.joint.codes import Relaxation, code_mixtures
from semid.joint.terms import code_agreement, session_contrast, symmetric_info_nce
from semid.tokenizers import RQVAE, Pass
from semid.training import PackedRows, StepContext, TableByRows, row_devices, share_rows
from seq_models import Inputs, ItemTables, RQTransformer, TrainingBatch, code_cross_entropy, last_state

Terms = dict[str, Float[Array, ""]]


class Reach(enum.Enum):
    """Deepest part of the model that the gradient of the recommendation losses reaches."""

    GENERATOR = "generator"
    """As in staged training: tokenizer and encoders do not learn from it."""
    TOKENIZER = "tokenizer"
    """Through the codes into codebooks and tokenizer."""
    ENCODER = "encoder"
    """End to end: on into the encoders of text and images."""


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the joint step; a term without weight is not computed."""

    generation: Schedule = Schedule(1.0)
    """Cross-entropy of the next item's codes, in nats per item."""
    reconstruction: Schedule = Schedule(1.0)
    """Mean squared error of the target items' vectors."""
    codebook: Schedule = Schedule(1.0)
    """Pulls code vectors to the latents that they quantize."""
    commitment: Schedule = Schedule(0.25)
    """Pulls latents to their code vectors."""
    entropy: Schedule = Schedule(1e-4)
    """Spreads a batch over the codes (UniGRec, arXiv 2601.17438)."""
    contrast: Schedule = Schedule(0.0)
    """InfoNCE from the history's last item to the target, among the batch's (LEMUR's SQDC, arXiv 2511.10962)."""
    sequence_item: Schedule = Schedule(0.0)
    """KL divergences between the code probabilities of history and target (ETEGRec's SIA, arXiv 2409.05546)."""
    preference: Schedule = Schedule(0.0)
    """InfoNCE between the generator's state and the target's reconstruction, both ways (ETEGRec's PSA)."""
    teacher_codes: Schedule = Schedule(0.0)
    """KL divergences between the code probabilities of an item's own and the teacher's vector (UniGRec's distillation
    into the tokenizer)."""
    teacher_states: Schedule = Schedule(0.0)
    """InfoNCE between the generator's state and the teacher's vector of the target, both ways (UniGRec's distillation
    into the generator)."""

    @classmethod
    def only(cls, **terms: Schedule) -> Objective:
        """These terms alone, without the defaults. Raises SemidError for an unknown name."""
        names = [field.name for field in fields(cls)]
        for name in terms.keys() - set(names):
            raise SemidError(f"the joint step has no term {name!r}{did_you_mean(name, names)}")
        return cls(**{name: terms.get(name, Schedule(0.0)) for name in names})

    def weights(self, progress: Float[Array, ""] | float) -> dict[str, Float[Array, ""]]:
        """Weights, at this progress, of the terms whose schedule has a weight at any time."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: weight(progress) for name, weight in named.items() if weight.value or weight.initial}


# Terms of the tokenizer alone, which prevail over the others in gradient surgery (BLOGER, arXiv 2510.21242).
TOKENIZER_TERMS = {"reconstruction", "codebook", "commitment", "entropy"}
# Terms whose gradient reaches the encoders, if at all, through the history's items.
HISTORY_TERMS = {"generation", "codebook", "teacher_states"}
# Terms that read the target's codes or the teacher's vector of it, but not its own vector.
_STATE_TERMS = {"generation", "teacher_states"}
# Terms that learn from a teacher's item vectors.
TEACHER_TERMS = {"teacher_codes", "teacher_states"}


@dataclass(frozen=True)
class StepConfig:
    """Losses of one joint step, and the items that it encodes."""

    objective: Objective = Objective()
    """The terms and their weights."""
    reach: Reach = Reach.ENCODER
    """Deepest part that the recommendation losses' gradient reaches."""
    relaxation: Relaxation = Relaxation.SOFT_BACKWARD
    """Path of the gradient through the codes that the generator reads."""
    window: int = 2
    """Number of last items of a history that a step encodes; through them the generation loss reaches the encoders."""
    forward: float = 1.0
    """Share of the items in a step's windows, and of its targets if a term reads them, to encode; the others are read
    from the bank."""
    backward: float = 1.0
    """Share of these items to encode with a gradient."""
    dropout: bool = False
    """Encode with the encoders' dropout; the bank then holds noisy vectors, from which no codes should be computed."""

    def __post_init__(self) -> None:
        check_range(self, "window", at_least=0)
        bucket_sizes(1, forward=self.forward, backward=self.backward)  # raises for rates that do not fit

    @property
    def reads_targets(self) -> bool:
        """Targets are encoded: because a term reads their vectors, or because there is no window."""
        return not self.window or not set(self.objective.weights(0.0)) <= _STATE_TERMS


class Codes(TableByRows):
    """Variable of the catalogue's codes, which no gradient moves and a schedule refreshes."""


class ContentTables(NamedTuple):
    """Device arrays that no step changes: the items' content, a teacher's item vectors if there is one, and the
    conditions that items meet (see `ItemTables`), if the generator knows some."""

    content: Content
    teacher: Float[Array, "items teacher"] | None = None
    groups: Int[Array, "items m"] | None = None
    texts: Float[Array, "items text"] | None = None


# Parts of a JointModel that are trained, by their names.
PARTS = ("encoder", "autoencoder", "generator", "bank", "to_latent", "to_item", "teacher_to_latent", "to_teacher")


class JointModel(nnx.Module):
    """Encoders, tokenizer, generator, the bank between them, and the catalogue's codes."""

    def __init__(
        self,
        encoder: ItemEncoder,
        autoencoder: RQVAE,
        generator: RQTransformer,
        *,
        codes: Int[Array, "items level"],
        num_teacher: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.encoder, self.autoencoder, self.generator = encoder, autoencoder, generator
        self.bank = MemoryBank(len(codes), dim=encoder.dim, rngs=rngs)
        self.codes = Codes(jnp.asarray(codes))
        self.churn = Codes(jnp.zeros(codes.shape[1]))  # share of items whose code changed when last refreshed
        state, latent = generator.config.backbone.dim, autoencoder.quantizer.codebooks[0].shape[1]
        self.to_latent = nnx.Linear(state, latent, rngs=rngs)
        self.to_item = nnx.Linear(state, encoder.dim, rngs=rngs)
        self.teacher_to_latent = nnx.Linear(num_teacher, latent, rngs=rngs) if num_teacher else None
        self.to_teacher = nnx.Linear(state, num_teacher, rngs=rngs) if num_teacher else None

    def select_items(self, rows: Int[np.ndarray, " items"]) -> None:
        """Keep the items of these rows, in this order; -1 adds a new item, without a vector and with code 0."""
        codes = jnp.where(jnp.asarray(rows >= 0)[:, None], self.codes[...][np.maximum(rows, 0)], 0)
        self.codes = Codes(codes)
        self.bank.select_items(rows)


class _BatchItems(NamedTuple):
    """Vectors of a batch's items: fresh ones with their gradient, the others from the bank."""

    targets: Float[Array, "b dim"]
    history: Float[Array, "b t dim"]
    last: Float[Array, "b dim"]


def joint_loss(
    model: JointModel, batch: PackedRows, tables: ContentTables, context: StepContext, **settings: Any
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted sum of all terms for rows of one history and one target each; every term is a metric.

    `settings` are those of `joint_terms`.
    """
    losses, metrics = joint_losses(model, batch, tables, context, **settings)
    return jnp.sum(losses), metrics


def joint_losses(
    model: JointModel,
    batch: PackedRows,
    tables: ContentTables,
    context: StepContext,
    *,
    config: StepConfig,
    **settings: Any,
) -> tuple[Float[Array, "2"], dict[str, Array]]:
    """The tokenizer's own terms, and the others, as two losses: for gradient surgery.

    `settings` are the others of `joint_terms`.
    """
    weights = config.objective.weights(context.progress)
    terms, metrics = joint_terms(model, batch, tables, context, config=config, **settings)
    weighted = {name: weights[name] * term for name, term in terms.items()}
    own = [value for name, value in weighted.items() if name in TOKENIZER_TERMS]
    others = [value for name, value in weighted.items() if name not in TOKENIZER_TERMS]
    logged = {f"loss/{name}": term for name, term in terms.items()}
    zero = jnp.zeros(())
    return jnp.stack([sum(own, zero), sum(others, zero)]), {**metrics, **logged}


def joint_terms(
    model: JointModel,
    batch: PackedRows,
    tables: ContentTables,
    context: StepContext,
    *,
    config: StepConfig,
    smoothing: float = 0.0,
    repeats: bool = True,
    hold_codebooks: bool = False,
) -> tuple[Terms, dict[str, Array]]:
    """The unweighted terms, by name. Writes the encoded vectors into the bank.

    `smoothing` is the label smoothing of the generation term; without `repeats`, targets that stand in their own
    history do not count in it. `hold_codebooks` keeps the quantizer's statistics, which with a decay are its codebooks.
    """
    names = set(config.objective.weights(context.progress))
    encode_key, search_key, target_key, generate_key = jax.random.split(context.key, 4)
    items, metrics = _encode_batch(model, batch, tables, encode_key, config)
    passed = model.autoencoder(items.targets, key=target_key, progress=context.progress)
    terms = _tokenizer_terms(passed)
    if names & {"generation", "sequence_item", "preference", "teacher_states"}:
        state = _state(model, batch, tables, items.history, context, (search_key, generate_key), config)
        terms |= _generator_terms(model, batch, tables, state, passed, generate_key, smoothing, repeats)
    if "contrast" in names:
        terms["contrast"] = session_contrast(
            items.last, items.targets, items=batch.targets, sessions=batch.segments.max(axis=1)
        )
    if "teacher_codes" in names:
        terms["teacher_codes"] = _teacher_code_term(model, batch, tables, passed)
    if not hold_codebooks:
        model.autoencoder.quantizer.update_statistics(passed.found)
    return {name: term for name, term in terms.items() if name in names}, metrics


def _encode_batch(
    model: JointModel, batch: PackedRows, tables: ContentTables, key: Key[Array, ""], config: StepConfig
) -> tuple[_BatchItems, dict[str, Array]]:
    """Encode the last items of the histories, and the targets if the config reads them; write these vectors into the
    bank, and read all others from it."""
    real = batch.segments > 0
    lengths = real.sum(axis=1, keepdims=True)
    later_items = lengths - 1 - jnp.arange(real.shape[1])[None]
    windowed = real & (later_items < config.window)
    first = batch.targets[:, None]
    if not config.reads_targets:
        first = jnp.take_along_axis(batch.history, jnp.maximum(lengths - 1, 0), axis=1)
    candidates = jnp.concatenate([first, jnp.where(windowed, batch.history, first)], 1)
    most = len(candidates) * (config.reads_targets + min(config.window, real.shape[1]))
    forward, backward = bucket_sizes(most, forward=config.forward, backward=config.backward, parts=row_devices())
    order_key, dropout_key = jax.random.split(key)
    fresh = unique_rows(candidates, size=forward, key=order_key)
    dropout = dropout_key if config.dropout else None

    def encode(rows: Int[Array, " n"]) -> Float[Array, "n dim"]:
        rows = share_rows(rows)  # else every device would encode all of them
        return model.encoder({name: take(of, rows) for name, of in tables.content.items()}, key=dropout)

    encoded = encode_fresh(encode, fresh, backward=backward)
    agreement = model.bank.write(fresh.rows, encoded, mask=fresh.real)
    metrics = {"bank/agreement": agreement, "bank/history_coverage": model.bank.coverage(batch.history, mask=real)}
    if config.reach is not Reach.ENCODER:
        encoded = jax.lax.stop_gradient(encoded)
    places = jnp.where(windowed, fresh.place[:, 1:], -1)
    of_target = fresh.place[:, 0] if config.reads_targets else jnp.full_like(batch.targets, -1)
    targets = model.bank.read_or(batch.targets, of_target, encoded)
    history = model.bank.read_or(batch.history, places, encoded)
    return _BatchItems(targets, history, last_state(history, batch.segments)), metrics


def _state(
    model: JointModel,
    batch: PackedRows,
    tables: ContentTables,
    vectors: Float[Array, "b t dim"],
    context: StepContext,
    keys: tuple[Key[Array, ""], Key[Array, ""]],
    config: StepConfig,
) -> Float[Array, "b state"]:
    """The generator's state after each history, whose items it reads as code mixtures of the current tokenizer."""
    quantizer = model.autoencoder.quantizer
    latents, real = model.autoencoder.latents(vectors), batch.segments > 0
    found = quantizer.search(latents, mask=real, key=keys[0], progress=context.progress)
    books = [book[...] for book in quantizer.codebooks]
    mixtures = code_mixtures(found, books, relaxation=config.relaxation, distance=quantizer.distance)
    if config.reach is Reach.GENERATOR:
        mixtures = jax.lax.stop_gradient(mixtures)
    inputs, sizes = _inputs(model, batch, tables, keys[1]), model.generator.level_sizes
    # The level of the tie-break has no codebook: its codes are the catalogue's.
    others = (jax.nn.one_hot(inputs.codes[..., level], sizes[level]) for level in range(len(mixtures), len(sizes)))
    inputs = inputs._replace(dense=vectors, mixtures=(*mixtures, *others))
    return last_state(model.generator.states(inputs, batch.segments, key=keys[1]), batch.segments)


def _inputs(model: JointModel, batch: PackedRows, tables: ContentTables, key: Key[Array, ""]) -> Inputs:
    """Rows and catalogue codes of the histories, and their events, times and conditions if the generator reads any."""
    codes = model.codes[...]
    items = ItemTables(codes, None, jnp.ones(len(codes), bool), groups=tables.groups, texts=tables.texts)
    along = {name: getattr(batch, name) for name in ("events", "target_events", "times")}
    rows = TrainingBatch(batch.history, batch.segments, batch.targets, **along)
    return model.generator.training_inputs(items, rows, key)


def _tokenizer_terms(passed: Pass) -> Terms:
    """Terms of the tokenizer alone. Reconstruction has no gradient to its targets, which would move to where they are
    easy to reconstruct."""
    losses = passed.quantized.losses
    return {
        "reconstruction": jnp.mean(jnp.square(passed.reconstruction - jax.lax.stop_gradient(passed.x))),
        "codebook": losses.codebook,
        "commitment": losses.commitment,
        "entropy": usage_entropy_loss(passed.found.probabilities),
    }


def _generator_terms(
    model: JointModel,
    batch: PackedRows,
    tables: ContentTables,
    state: Float[Array, "b state"],
    passed: Pass,
    key: Key[Array, ""],
    smoothing: float,
    repeats: bool,
) -> Terms:
    codes, rows = model.codes[...][batch.targets], TrainingBatch(batch.history, batch.segments, batch.targets)
    weights = jnp.ones(len(batch.targets)) if repeats else rows.without_repeats().weights
    logits = model.generator.depth_logits(state, codes, key=jax.random.fold_in(key, 1))
    books = [book[...] for book in model.autoencoder.quantizer.codebooks]
    distance = model.autoencoder.quantizer.distance
    terms = {
        "generation": code_cross_entropy(logits, codes, weights, smoothing=smoothing).sum(),
        "sequence_item": code_agreement(model.to_latent(state), passed.latents, books, distance=distance),
        "preference": symmetric_info_nce(model.to_item(state), passed.reconstruction, items=batch.targets),
    }
    if model.to_teacher is not None and tables.teacher is not None:
        of_target = tables.teacher[batch.targets]
        terms["teacher_states"] = symmetric_info_nce(model.to_teacher(state), of_target, items=batch.targets)
    return terms


def _teacher_code_term(model: JointModel, batch: PackedRows, tables: ContentTables, passed: Pass) -> Float[Array, ""]:
    """Agreement of codes at a temperature of 1, whatever the assignment's, and with hard residuals, as in UniGRec's
    release: at the assignment's .001 there, codes are one-hot and those of two items tens of thousands of nats apart.
    """
    if model.teacher_to_latent is None or tables.teacher is None:
        raise TypeError("the term teacher_codes needs a teacher's item vectors")
    quantizer = model.autoencoder.quantizer
    latents = model.teacher_to_latent(tables.teacher[batch.targets])
    books = [book[...] for book in quantizer.codebooks]
    return code_agreement(passed.latents, latents, books, distance=quantizer.distance)
