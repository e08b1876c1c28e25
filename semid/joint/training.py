"""End-to-end training: encoders, tokenizer and generator one after the other, then together, then the generator alone.

Staged training, the baseline of the joint steps, is the same without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute as pc
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from semid import artifacts
from semid.artifacts import Kind, Origin
from semid.catalog import TOKENIZER_CONFIG
from semid.config import difference, to_dict
from semid.data import Dataset, LeaveOneOut, Standardizer
from semid.encoders import (
    ContentConfig,
    ContentReader,
    ImageFromScratch,
    ImageSource,
    ItemContent,
    ItemEncoder,
    PretrainedImage,
    PretrainedText,
    TextFromScratch,
    TextSource,
    check_content,
    present_of,
    read_content,
    row_digests,
)
from semid.errors import SemidError, refuse_path
from semid.generators import with_tuned_mixture, write_statistics
from semid.graphs import ItemGraph
from semid.joint.config import JointConfig
from semid.joint.context import WARM_UP, Context, PreviousRun, encode_items
from semid.joint.model import TEACHER_TERMS, JointModel
from semid.joint.stages import Stage, plan
from semid.progress import LOG
from semid.recommender import Recommender, read_spec
from semid.stage import Request, run_stage, shared_folder
from semid.tokenizers import RQVAE, SemanticTokenizer, TokenizerConfig, map_blocks
from semid.training import HISTORY, REQUEST, check_events, named_leaves, on_first, read_history, replace_leaves
from seq_models import RQTransformer

STATE_FILE = "joint.safetensors"

# Version of the `train_end_to_end` stage. Each change that trains another model from the same settings has a number,
# added for the requests that it concerns; all others keep their version, and with it their artifacts.
_VERSION = 1
_UNREAD_TARGETS_CHANGE = 1  # targets whose vectors no term reads come from the bank
_REPEAT_FACTOR_CHANGE = 2  # where items repeat, a repeat factor is chosen
_NO_REPEATS_FIX = 4  # targets that repeat do not count in joint steps without `repeats`
_NEW_ITEMS_FIX = 8  # new items of a run that is continued without joint steps enter the bank
_REPEAT_FACTOR_FIX = 16  # large factors, among which validation chooses, left some histories without recommendations
_PREVIOUS_TEXTS_FIX = 32  # a run that is continued has the vocabulary and text columns of the previous one

_SCRATCH = "scratch"


def train_end_to_end(
    dataset: Dataset,
    *,
    text: TextSource | str | Path | None = _SCRATCH,
    image: ImageSource | str | Path | None = None,
    content: ItemContent | None = None,
    config: JointConfig = JointConfig(),
    out: str | Path | None = None,
    seed: int = 0,
    teacher: Recommender | Float[np.ndarray, "items teacher"] | None = None,
    graph: ItemGraph | None = None,
    previous: PreviousRun | None = None,
    shared: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Recommender:
    """Train encoders, tokenizer and generator on the dataset's training histories, and write the model artifact `out`.

    `text` and `image` choose the encoders: "scratch", the folder of a pretrained model (its states read by side
    adapters), or a config such as `PretrainedText(folder, tuning=LowRank())`; None leaves the modality out. `content`
    replaces both: content and encoder from `read_content` or the caller. The terms `teacher_codes` and `teacher_states`
    learn from a `teacher`: a model that has item vectors, such as SASRec, or the vectors. The `graph` is mixed with the
    trained model at the weight that is best on validation. Where items repeat, validation also chooses the factor on
    the probabilities of the history's items.

    A stage (see `run_stage`): it resumes an interrupted run of the same request from its checkpoints and reads a
    finished one; without `out` nothing is written. The artifact is a recommender like any other (its features are the
    item vectors). It also holds all parameters and the bank (`joint.safetensors`), the encoders for other items (see
    `trained_encoder`, `ContentReader.load`), and the records of all stages (`history.jsonl`). `shared` is a folder for
    the checkpoints of the first three stages, which runs that differ only in later stages can share.

    `previous` is a run to continue from its variables and bank: the first three stages are skipped, and joint steps
    train on the targets that it did not have. `text` and `image` must be those of that run, whose vocabulary and text
    columns are used. New items enter the bank when a joint step first encodes them, or at once
    without joint steps. The last stage trains on all histories, so that the generator forgets none.

    Raises SemidError if content is missing or of other items, if more than `tie_break` items have none, if the
    objective needs a teacher and none is given, or the reverse, if `previous` has other settings, embeddings of other
    items, or histories that are not the beginning of those here, if codes collapse, and if `out` is in use.
    """
    refuse_path(dataset, "Dataset.load")
    refuse_path(teacher, "Recommender.from_pretrained")
    refuse_path(graph, "ItemGraph.load")
    source = _content_config(text, image, content)
    vectors = _teacher_vectors(teacher, dataset)
    _check_teacher(vectors, dataset, config, previous)
    fitted = dataset if previous is None else previous.dataset
    config = config.resolved(
        items=fitted.num_items,
        interactions=fitted.num_training_interactions,
        repeats=fitted.repeats.common,
    )
    request = _request(dataset, config, source, content, teacher, previous, seed)
    stage_request = {"seed": seed, "parents": dict(request.parents), "content": request.config.get("content")}
    if graph is not None:
        graph.check_dataset(dataset)
        request = dataclasses.replace(request, parents={**request.parents, "graph": graph.digest})

    def work(folder: Path) -> _Trained:
        dataset.splits.examples("validation")  # raises without any, as the stages after the warm-up of encoders would
        warm_up = folder if shared is None else _shared_folder(shared, request)
        read = content
        if read is None:
            read = _read_content(dataset, cast(ContentConfig, source), previous, seed=seed, cache=warm_up / "states")
        _check(dataset, read, config)
        context = Context(
            dataset=dataset,
            content=read.rows,
            config=config,
            teacher=vectors,
            previous=previous,
            request=stage_request,
            folder=folder,
            shared=None if shared is None else warm_up,
            title="" if out is None else f" of {Path(out).name}",
            seed=seed,
            mesh=mesh,
        )
        on_first(lambda: _write_request(folder, request))
        model = _run_stages(nnx.clone(read.encoder), context)
        trained = with_tuned_mixture(context.recommender(model), dataset, config.generator, graph=graph, seed=seed)
        return _Trained(trained, model, read.reader)

    def write(trained: _Trained, folder: Path) -> None:
        trained.recommender.write(folder)
        write_statistics(dataset, folder)
        trained.write(folder, config)

    return run_stage(request, out, load=_Trained.load, work=work, write=write).recommender


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A recommender, and if it was just trained the joint model that it is part of."""

    recommender: Recommender
    model: JointModel | None = None
    reader: ContentReader | None = None

    @classmethod
    def load(cls, path: Path) -> _Trained:
        return cls(Recommender.from_pretrained(path))

    def with_origin(self, origin: Origin) -> _Trained:
        return dataclasses.replace(self, recommender=self.recommender.with_origin(origin))

    def write(self, folder: Path, config: JointConfig) -> None:
        """Write the joint model's variables, the tokenizer of its item vectors, and the reader of content."""
        if self.model is None:
            raise TypeError("a recommender that was read has no joint model to write")
        artifacts.save_tensors(folder / STATE_FILE, jax.device_get(named_leaves(nnx.state(self.model))))
        settings, unchanged = TokenizerConfig(method=config.tokenizer), Standardizer.identity(self.model.encoder.dim)
        SemanticTokenizer(settings, unchanged, self.model.autoencoder).write(folder)
        artifacts.write_json(folder / TOKENIZER_CONFIG, to_dict(settings))
        if self.reader is not None:
            self.reader.write(folder)


def trained_encoder(path: str | Path, encoder: ItemEncoder | None = None) -> ItemEncoder:
    """Load the encoders of an end-to-end model, to encode other items (`encode_items`): the artifact's
    `SemanticTokenizer` gives these vectors codes, and `Recommender.with_catalog` recommends them.

    An `encoder` built like the one given in `content` is needed for such a model, and stays unchanged. Raises
    SemidError naming a tensor that does not fit.
    """
    path = artifacts.fetched(path)
    file, prefix = path / STATE_FILE, "encoder/"
    with artifacts.opened(path, Kind.MODEL):
        encoder = ContentReader.load(path).encoder() if encoder is None else encoder
        leaves = artifacts.load_tensors(file)
    own = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    graph, state = nnx.split(encoder)
    return nnx.merge(graph, replace_leaves(state, own, where=str(file)))


def _content_config(
    text: TextSource | str | Path | None, image: ImageSource | str | Path | None, content: ItemContent | None
) -> ContentConfig | None:
    """Config of the content to read; None if `content` is given."""
    if content is not None:
        if (text, image) != (_SCRATCH, None):
            raise SemidError("expected text and image, or content, got both; content has its own encoders")
        return None
    if isinstance(text, str | Path):
        text = TextFromScratch() if text == _SCRATCH else PretrainedText(str(text))
    if isinstance(image, str | Path):
        image = ImageFromScratch() if image == _SCRATCH else PretrainedImage(str(image))
    return ContentConfig(text, image)


def _read_content(
    dataset: Dataset, source: ContentConfig, previous: PreviousRun | None, *, seed: int, cache: Path
) -> ItemContent:
    """Read the content; for a run that is continued as the previous one did, whose encoders know its tokens alone: a
    vocabulary of today's texts would give them other numbers.

    Raises SemidError if the previous run has other encoders.
    """
    if previous is None:
        return read_content(dataset, source, seed=seed, cache=cache)
    reader = ContentReader.load(previous.path)
    before, now = ({"content": to_dict(of.without_folders()), **of.weights_digests()} for of in (reader.config, source))
    if change := difference(before, now):
        raise SemidError(f"previous: {previous.path} has other encoders ({change}); give the same text and image")
    return ItemContent(reader.read(dataset, cache=cache), reader.encoder(seed=seed), reader)


def _request(
    dataset: Dataset,
    config: JointConfig,
    source: ContentConfig | None,
    content: ItemContent | None,
    teacher: Recommender | Float[np.ndarray, "items teacher"] | None,
    previous: PreviousRun | None,
    seed: int,
) -> Request:
    settings: dict[str, Any] = {"joint": to_dict(config)}
    parents = dict(dataset.parents)
    if source is not None:
        settings["content"] = to_dict(source)
        parents |= source.weights_digests()
    if content is not None:
        parents["content"] = content.digest()
    if isinstance(teacher, Recommender):
        parents["teacher"] = teacher.digest
    elif teacher is not None:
        parents["teacher"] = hashlib.sha256(np.ascontiguousarray(teacher).tobytes()).hexdigest()
    if previous is not None:
        path = artifacts.fetched(previous.path)
        origin = Origin(path, artifacts.read_artifact(path, Kind.MODEL))
        previous.dataset.check_source(origin, what="the previous run", remedy="give the dataset of that run")
        _check_continued(dataset, previous.dataset)
        same = dataset.item_ids.equals(previous.dataset.item_ids)
        if config.generator.model.has_item_embeddings and not same:
            raise SemidError(
                "previous: embeddings of item ids know nothing of other items; leave id_embedding out, or train from "
                "scratch"
            )
        parents["previous"] = origin.digest
    version, no_repeats = _VERSION, config.generator.objective.repeats is False
    version += _UNREAD_TARGETS_CHANGE * any(not phase.step.reads_targets for phase in config.joint)
    version += _REPEAT_FACTOR_CHANGE * dataset.repeats.common
    version += _REPEAT_FACTOR_FIX * (dataset.repeats.common and not no_repeats)
    if config.joint and no_repeats and dataset.repeats.repeated:
        version += _NO_REPEATS_FIX
    if previous is not None and not config.joint and not dataset.item_ids.equals(previous.dataset.item_ids):
        version += _NEW_ITEMS_FIX
    if previous is not None and source is not None and source.text is not None:
        version += _PREVIOUS_TEXTS_FIX
    return Request(Kind.MODEL, settings, parents, seed, version)


def _check_continued(dataset: Dataset, before: Dataset) -> None:
    """Raise SemidError unless the training history of every user of both datasets begins with the earlier one's. Else
    the continued run would miss interactions, or the previous one would have trained on what is held out here."""
    now, then = dataset.splits.train, before.splits.train
    places = pc.index_in(before.users, dataset.users).fill_null(-1).to_numpy()
    known = np.flatnonzero(places >= 0)
    user, then = places[known], then.take(known)
    allowed = now.lengths[user]
    if isinstance(before.split_rule, LeaveOneOut) and isinstance(dataset.split_rule, LeaveOneOut):
        # With two interactions of a user, both were trained on; now that there is a third, the second is validation.
        short = (np.diff(before.offsets)[known] == 2) & (np.diff(dataset.offsets)[user] == 3)
        allowed = np.where(short, 2, allowed)
        if short.any():
            LOG.warning("previous: that run trained on what is validation here of %s users", f"{short.sum():,}")
    rows, owner = then.flat()
    items = pc.index_in(before.item_ids, dataset.item_ids).fill_null(-1).to_numpy()[rows]
    place = np.arange(len(rows)) - (np.cumsum(then.lengths) - then.lengths)[owner]
    same = place < allowed[owner]
    same[same] = now.items[(now.starts[user][owner] + place)[same]] == items[same]
    if not same.all():
        raise SemidError(
            f"previous: user {before.users[int(known[owner[np.argmin(same)]])].as_py()!r}: what that run trained on is "
            "not the beginning of the training history here (interactions left out, or another split); keep the older "
            "interactions and the split rule, or train from scratch"
        )


def _shared_folder(path: str | Path, request: Request) -> Path:
    """Check that the shared folder can be written to, before any work, and return it."""
    folder = shared_folder(path)
    check_events(request.settings, folder)
    return Path(on_first(lambda: str(artifacts.try_folder(folder).path)))


def _write_request(folder: Path, request: Request) -> None:
    """Write the run's request into the folder of its stages' checkpoints, which is discarded with it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / REQUEST).exists():
        artifacts.write_json(folder / REQUEST, request.checkpoints)


def _run_stages(encoder: ItemEncoder, context: Context) -> JointModel:
    """Run all stages, from an untrained model or from that of the previous run, and write their history."""
    stages = plan(context.config, warm_up=context.previous is None)
    if context.previous is None:
        model = _build_untrained(encoder, context, num_items=context.dataset.num_items)
    else:
        model = _load_previous(encoder, context, context.previous)
    for stage in stages:
        stage.check(model, context)
    for stage in stages:
        with contextlib.ExitStack() as stack:
            if context.shared is not None and stage.name in WARM_UP:
                on_first(functools.partial(_lock, context.run_folder(stage.name).folder, stack))
            model = stage(model, context)
    on_first(lambda: _write_history(stages, context))
    return model


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    stack.enter_context(artifacts.locked(folder.with_name(f".{folder.name}.lock"), folder))


def _build_untrained(encoder: ItemEncoder, context: Context, *, num_items: int) -> JointModel:
    config, seed = context.config, context.seed
    autoencoder = RQVAE(config.tokenizer, dim=encoder.dim, rngs=nnx.Rngs(seed))
    generator = cast(RQTransformer, context.spec(encoder.dim).build(seed=seed))
    codes = jnp.zeros((num_items, len(context.level_sizes)), jnp.int32)
    width = 0 if context.teacher is None else context.teacher.shape[1]
    return JointModel(encoder, autoencoder, generator, codes=codes, num_teacher=width, rngs=nnx.Rngs(seed + 1))


def _load_previous(encoder: ItemEncoder, context: Context, previous: PreviousRun) -> JointModel:
    """Load the previous run's model for the dataset's items, found by their ids; codes are computed from the vectors in
    the bank, and for new items from their content."""
    file, before = artifacts.place(previous.path) / STATE_FILE, previous.dataset
    if read_spec(file.parent).conditions != context.conditions.spec:
        raise SemidError(
            f"{file.parent}: the previous run knows other conditions (names of events and groups are a part of them); "
            "give the same, or train from scratch"
        )
    leaves = artifacts.load_tensors(file)
    graph, state = nnx.split(_build_untrained(encoder, context, num_items=before.num_items))
    model = nnx.merge(graph, replace_leaves(state, leaves, where=str(file)))
    rows = pc.index_in(context.dataset.item_ids, before.item_ids).fill_null(-1).to_numpy()
    model.select_items(rows)
    vectors = context.item_vectors(model)
    if len(new := np.flatnonzero(rows < 0)):
        encoded = jnp.asarray(encode_items(model.encoder, context.content, new))
        vectors = vectors.at[new].set(encoded)
        if not context.config.joint:  # else joint steps, or the stages after them, write these
            model.bank.write(jnp.asarray(new), encoded, mask=jnp.ones(len(new), bool))
    model.codes[...] = jnp.asarray(context.with_tie_break(map_blocks(model.autoencoder.encode, vectors)))
    return model


def _write_history(stages: Sequence[Stage], context: Context) -> None:
    """Write the records of all stages, in their order, each with the name of its stage."""
    paths = {stage.name: context.run_folder(stage.name).folder / HISTORY for stage in stages}
    records = [
        {"stage": stage, **record} for stage, path in paths.items() if path.exists() for record in read_history(path)
    ]
    (context.folder / HISTORY).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _teacher_vectors(
    teacher: Recommender | Float[np.ndarray, "items teacher"] | None, dataset: Dataset
) -> Float[np.ndarray, "items teacher"] | None:
    if isinstance(teacher, Recommender):
        return teacher.item_vectors_for(dataset)
    if teacher is not None and np.ndim(teacher) != 2:
        raise SemidError(f"expected a Recommender or item vectors as the teacher, got {type(teacher).__name__}")
    return teacher


def _check_teacher(
    teacher: Float[np.ndarray, "items teacher"] | None,
    dataset: Dataset,
    config: JointConfig,
    previous: PreviousRun | None,
) -> None:
    """Raise SemidError unless a teacher's vectors, finite and of all items, are given exactly if a term learns from
    them."""
    terms = {name for phase in config.joint for name in phase.step.objective.weights(0.0)}
    if teacher is None and (lacking := sorted(terms & TEACHER_TERMS)):
        raise SemidError(f"the term {lacking[0]} learns from a teacher: give one (--teacher), or weight 0")
    # A previous model may have heads for a teacher.
    if teacher is not None and previous is None and not terms & TEACHER_TERMS:
        raise SemidError("no term learns from the teacher: weigh teacher_codes or teacher_states, or give no teacher")
    if teacher is not None and len(teacher) != dataset.num_items:
        raise SemidError(f"expected a teacher's vectors of {dataset.num_items} items, got {len(teacher)}")
    if teacher is not None and len(bad := np.flatnonzero(~np.isfinite(teacher).all(axis=1))):
        item = dataset.item_ids[int(bad[0])].as_py()
        raise SemidError(f"the teacher's vector of item {item!r} has NaN or infinity, as do {len(bad):,} in all")


def _check(dataset: Dataset, content: ItemContent, config: JointConfig) -> None:
    """Raise SemidError unless the content is of the dataset's items, and so few have none or equal content that the
    tie-break tells them apart: no training could."""
    check_content(content.rows)
    present = np.stack([np.asarray(present_of(rows)) for rows in content.rows.values()])
    if (rows := present.shape[1]) != dataset.num_items:
        raise SemidError(f"expected content of the dataset's {dataset.num_items} items, got {rows} rows; read it again")
    if (alike := int((~present.any(axis=0)).sum())) > config.tie_break:
        raise SemidError(
            f"{alike} items have nothing that the encoders read, so they share their codes, and tie_break leaves room "
            f"for {config.tie_break}; give tie_break {alike} or more, or leave these items out"
        )
    _, first, sizes = np.unique(row_digests(content.rows), return_index=True, return_counts=True)
    if (alike := int(sizes.max())) > config.tie_break:
        item = dataset.item_ids[int(first[sizes.argmax()])].as_py()
        raise SemidError(
            f"{alike} items have the same content as item {item!r}, so they share their codes, and tie_break leaves "
            f"room for {config.tie_break}; give tie_break {alike} or more, or content that tells them apart"
        )
