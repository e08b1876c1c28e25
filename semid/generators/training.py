"""Training of a `seq_models` model on a dataset and its catalogue: loss, rows, validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from semid import artifacts
from semid.artifacts import Kind, Origin
from semid.catalog import SemanticCatalog
from semid.config import check_range, later_field, to_dict
from semid.data import Dataset, Examples, Standardizer, content_blocks, read_encoders
from semid.errors import SemidError, refuse_path
from semid.evaluation import accuracy, group_ids, item_places
from semid.generators.calibration import with_calibrated_events
from semid.generators.conditions import ConditionsConfig
from semid.generators.distillation import DenseTeacher, GraphTeacher, MixedTeacher, TaughtHistories, Teacher, as_teacher
from semid.generators.mixing import with_best_graph_weight, with_best_repeat_factor
from semid.generators.objective import LossTables, ObjectiveConfig, generator_loss
from semid.generators.starting import start_from_teacher
from semid.graphs import ColumnConfig, ItemGraph
from semid.recommender import (
    DATASET_FILE,
    ItemData,
    ModelSpec,
    Recommender,
    SequencesSpec,
    copy_tokenizer,
    sequence_codes,
)
from semid.stage import Request, run_stage
from semid.training import (
    OptimizerConfig,
    PackedHistories,
    Rows,
    RunFolder,
    SingleRows,
    Task,
    TrainingConfig,
    bound_loss,
)
from semid.training import train as run_training
from seq_models import (
    CodeTrie,
    DenseConfig,
    EncoderDecoderConfig,
    ItemModel,
    Layout,
    ModelConfig,
    RQTransformerConfig,
    SoftmaxOver,
)

# Version of the `train` stage: changed code that trains another model from the same settings needs another version, so
# that older artifacts are not taken for current ones. The second: graph weight or repeat factor chosen after training.
_VERSION, _VERSION_WITH_MIXTURE = 1, 3
# Added to the version of the requests that a change concerns; all others keep theirs, and with it their artifacts.
_TEACHER_CHANGE = 4  # rows with a teacher are batched by length; a teacher leaves the history out even if items repeat
_SEQUENCES_FIX = 8  # nearly all rows of one history lacked the further code sequences
_REPEAT_FACTOR_FIX = 16  # large factors, among which validation chooses, left some histories without recommendations
_WIDTH_WEIGHT = 32  # the losses of narrow widths counted as much as that of all dimensions

# Validation users that tune the mixture, as a multiple of those that select a checkpoint.
_MIXTURE_USERS = 4
# Default epochs from `_FULL_SIZE` training interactions on; fewer interactions get up to `_MOST_PASSES` times as many.
_EPOCHS, _FULL_SIZE, _MOST_PASSES = 36.0, 25_000, 6
# Default dropout, and that of data with fewer interactions than `_SMALL_DATA`.
_DROPOUT, _SMALL_DATA, _SMALL_DATA_DROPOUT = 0.1, 10_000, 0.3


@dataclass(frozen=True)
class GeneratorConfig:
    """A generator and its training: model, inputs, objective, schedule and validation."""

    model: ModelConfig = RQTransformerConfig()
    """A generator of codes, such as RQTransformerConfig; HybridConfig (with a dense head too); or DenseConfig (SASRec
    with full-softmax cross-entropy)."""
    features: tuple[str, ...] | None = None
    """Vector columns that the model reads next to the codes; none given: all of them; empty: none."""
    max_history: int = 20
    """Number of latest items of a history that the model reads."""
    row_length: int = 32
    """Positions of a packed training row."""
    conditions: ConditionsConfig = later_field(ConditionsConfig())
    """Conditions on the next item that requests may set, and events and times as inputs."""
    drop_sequences: float = later_field(0.1)
    """Share of the histories for which training hides a further code sequence, drawn for each sequence, so that the
    model can serve items that lack one."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The losses."""
    start_from_teacher: bool = later_field(False)
    """Initialize backbone and item embeddings from the teacher, a SASRec model with the same backbone (its dropout may
    differ). For models that decode an item from one state, with id_embedding."""
    training: TrainingConfig = TrainingConfig(epochs=None, optimizer=OptimizerConfig(learning_rate=3e-3))
    validation_users: int = 2048
    """Validation examples, drawn by the seed, on which NDCG@10 selects the model."""
    validation_beam: int = 20
    """Beam size in validation."""

    def __post_init__(self) -> None:
        check_range(self, "max_history", "row_length", "validation_users", "validation_beam", at_least=1)
        check_range(self, "drop_sequences", at_least=0, below=1)
        objective = self.objective
        if not self.model.has_codes and (
            objective.label_smoothing or objective.normalization is not SoftmaxOver.VOCABULARY
        ):
            raise SemidError(
                f"label_smoothing and normalization are of codes; {self.model.title} has none: leave them out"
            )

    @property
    def reads_events(self) -> bool:
        """Training rows have events."""
        return self.conditions.reads_events or bool(self.objective.event_weights)

    def resolved(self, interactions: int, *, repeats: bool, taught: bool = False) -> GeneratorConfig:
        """Fill in the defaults that depend on the training data (`repeats`: items repeat) and on a teacher (`taught`).

        Epochs: 36 from 25,000 interactions on; below that proportionally more, up to 216, with validations as many
        times further apart. Dropout of a generator of codes: 0.1 from 10,000 interactions on, 0.3 below.
        """
        model = self.model.with_dropout(_DROPOUT if interactions >= _SMALL_DATA else _SMALL_DATA_DROPOUT)
        resolved = replace(self, model=model, objective=self.objective.resolved(repeats=repeats, taught=taught))
        if self.training.epochs is not None:
            return resolved
        passes = round(min(max(_FULL_SIZE / max(interactions, 1), 1.0), _MOST_PASSES), 2)
        epochs, every = round(_EPOCHS * passes, 2), round(self.training.validate_every * passes, 2)
        return replace(resolved, training=replace(self.training, epochs=epochs, validate_every=every))


def train(
    dataset: Dataset,
    catalog: SemanticCatalog,
    config: GeneratorConfig = GeneratorConfig(),
    *,
    out: str | Path | None = None,
    seed: int = 0,
    teacher: Recommender | ItemGraph | Teacher | None = None,
    graph: ItemGraph | None = None,
    sequences: Mapping[str, SemanticCatalog] | None = None,
    mesh: Mesh | None = None,
    other_dataset: bool = False,
) -> Recommender:
    """Train a model on the dataset's training histories and write the model artifact `out`.

    A stage (see `run_stage`): it resumes an interrupted run of the same request from its checkpoints and reads a
    finished one; without `out` nothing is written. The `teacher` to distill is a dense model, or anything else that
    ranks items. The `graph` is mixed with the trained model at the weight that is best on validation. Where items
    repeat, validation also chooses the factor on the probabilities of the history's items.
    `sequences` are further catalogues of the same items, by names such as `image`: the model reads their codes as well,
    which an item may lack, but generates only those of `catalog`.
    The catalogue's tokenizer is copied into the artifact, to encode items that are appended later. `other_dataset`
    allows a catalogue of another dataset, such as an earlier one of the same shop, if its codes depend on content only.
    Raises SemidError if the items of catalogue, dataset and teacher differ, for a teacher or catalogue of another
    dataset, which may have been trained on interactions that are test here, and if `out` is in use.
    """
    sequences = sequences or {}
    refuse_path(dataset, "Dataset.load")
    refuse_path(teacher, "Recommender.from_pretrained", "ItemGraph.load")
    refuse_path(graph, "ItemGraph.load")
    for one in (catalog, *sequences.values()):
        refuse_path(one, "SemanticCatalog.load")
        check_catalog(one, dataset, other_dataset=other_dataset)
    repeats = dataset.repeats.common
    config = config.resolved(dataset.num_training_interactions, repeats=repeats, taught=teacher is not None)
    given_teacher = teacher
    teacher = None if teacher is None else as_teacher(teacher, config.objective, graph=graph)
    parents = {**dataset.parents, "catalog": catalog.provenance}
    parents |= {f"sequence {name}": one.provenance_of_items for name, one in sequences.items()}
    if teacher is not None:
        parents["teacher"] = teacher.digest
    if graph is not None:
        graph.check_dataset(dataset)
        parents["graph"] = graph.digest
    version = _VERSION if graph is None and not repeats else _VERSION_WITH_MIXTURE
    single, unseen = isinstance(config.model, EncoderDecoderConfig), repeats and config.objective.repeats is False
    version += _TEACHER_CHANGE * (teacher is not None and (single or unseen))
    version += _SEQUENCES_FIX * (single and bool(sequences))
    version += _REPEAT_FACTOR_FIX * (repeats and config.objective.repeats is not False)
    version += _WIDTH_WEIGHT * (isinstance(config.model, DenseConfig) and bool(config.model.widths))
    request = Request(Kind.MODEL, {"generator": to_dict(config)}, parents, seed, version)

    def work(folder: Path) -> Recommender:
        check_teacher(teacher, dataset, config)
        untrained = _build_untrained(dataset, _select_items(catalog, dataset), config, sequences=sequences, seed=seed)
        if config.start_from_teacher:
            untrained = start_from_teacher(untrained, given_teacher)
        title = "training" if out is None else f"training {Path(out).name}"
        run = RunFolder(folder, request.checkpoints, title=title)
        trained = fit_generator(untrained, dataset, config, run=run, seed=seed, teacher=teacher, mesh=mesh)
        return with_tuned_mixture(trained, dataset, config, graph=graph, seed=seed)

    def write(recommender: Recommender, folder: Path) -> None:
        recommender.write(folder)
        write_statistics(dataset, folder)
        if catalog.origin is not None:
            copy_tokenizer(catalog.origin, folder)

    return run_stage(request, out, load=Recommender.from_pretrained, work=work, write=write)


def check_catalog(catalog: SemanticCatalog, dataset: Dataset, *, other_dataset: bool = False) -> None:
    """Raise SemidError for a catalogue of another dataset, by digest; one in memory records no dataset and passes.

    A catalogue of encoded files (`write_catalog`) passes too: it records its tokenizer alone. Codes that depend on
    interactions, by alignment or by the vectors that were tokenized, are refused even with `other_dataset`.
    """
    if catalog.origin is None or (digest := dataset.other_source(catalog.origin)) is None:
        return
    manifest = catalog.origin.manifest
    learned = ""
    if manifest.config.get("tokenizer", {}).get("alignment"):
        learned = "its codes are aligned with interactions that may be test here"
    elif column := _learned_column(catalog.origin):
        learned = (
            f"its codes read the column {column!r}, whose vectors may be made from interactions that are test here"
        )
    if not learned and (other_dataset or "tokenizer" in manifest.parents):
        return
    reason = learned or "its test split may differ"
    remedy = "tokenize this dataset"
    if not learned:
        remedy += ", or train on it all the same with other_dataset=True (--other-dataset)"
    raise SemidError(
        f"{catalog.origin.folder}: made from dataset digest {digest[:16]}, not from this one of {dataset.digest[:16]}; "
        f"{reason}; {remedy}"
    )


def _learned_column(origin: Origin) -> str | None:
    """A column of a catalogue's tokenizer that may depend on interactions, None if all are content: one made from them
    (`semid vectors`), or one added in memory (`with_vectors`), such as a model's item vectors."""
    manifest = origin.manifest
    names = [name for name in manifest.parents if name not in ("dataset", "tokenizer")]
    encoders = read_encoders(origin.folder, manifest.files)
    names += [encoder.column for encoder in encoders if ColumnConfig.has_fitted(encoder)]
    columns = manifest.config.get("tokenizer", {}).get("columns")
    return next((name for name in names if columns is None or name in columns), None)


def _select_items(catalog: SemanticCatalog, dataset: Dataset) -> SemanticCatalog:
    """Select the dataset's items from the catalogue, in their order; items may have been appended or removed since."""
    if not catalog.find_rows(dataset.item_ids)[1].all():
        raise SemidError(
            f"the catalogue's {len(catalog)} items are not all of the dataset's {dataset.num_items}; "
            "tokenize this dataset"
        )
    return catalog.select(dataset.item_ids)


def _build_untrained(
    dataset: Dataset,
    catalog: SemanticCatalog,
    config: GeneratorConfig,
    *,
    sequences: Mapping[str, SemanticCatalog] | None = None,
    seed: int,
) -> Recommender:
    """Build the recommender, its parameters drawn by the seed."""
    sequences = sequences or {}
    if sequences and not config.model.has_codes:
        raise SemidError(f"further code sequences are for models of codes; {config.model.title} reads none")
    (features, standardizer), counts = _content(dataset, config.features), training_counts(dataset)
    columns = dataset.vector_columns if config.features is None else config.features
    conditions = config.conditions.fit(dataset)
    spec = ModelSpec(
        model=config.model,
        level_sizes=catalog.level_sizes,
        num_items=len(catalog),
        num_features=0 if features is None else features.shape[1],
        max_history=config.max_history,
        normalization=config.objective.normalization,
        catalog=catalog.digest,
        columns=tuple(columns),
        repeat_factor=config.objective.repeat_factor,
        conditions=conditions.spec,
        sequences=SequencesSpec.of(sequences, drop=config.drop_sequences),
    )
    codes = sequence_codes(sequences, dataset.item_ids)
    items = ItemData(counts, features, standardizer, conditions.of_items, codes)
    return Recommender(spec.build(seed=seed), catalog, spec=spec, items=items, dataset=dataset.digest)


def write_statistics(dataset: Dataset, folder: Path) -> None:
    """Write the training data's name, rules and counts into a model's artifact: `dataset.json`."""
    about = {name: value for name, value in dataset.config.items() if name in ("name", "split_rule", "time_unit")}
    about["source"] = (dataset.source or {}).get("type", "")  # its settings may name local paths
    about["digest"] = dataset.digest
    artifacts.write_json(folder / DATASET_FILE, about | {"statistics": dataset.statistics()})


def fit_generator(
    recommender: Recommender,
    dataset: Dataset,
    config: GeneratorConfig,
    *,
    run: RunFolder,
    seed: int,
    teacher: Teacher | None = None,
    mesh: Mesh | None = None,
) -> Recommender:
    """Train the recommender's model from its current parameters; only the run's folder is written to."""
    model, tables = recommender.model, _tables(recommender, dataset, config.objective)
    if tables.items.vectors is not None:
        model.add_state_head(tables.items.vectors.shape[1], rngs=nnx.Rngs(seed))
    rows = training_rows(dataset, config, model.layout)
    if teacher is not None:
        rows = TaughtHistories(rows, teacher, config.objective)
    score = validation(dataset, config, seed=seed)
    task = Task(
        model,
        bound_loss(generator_loss, objective=config.objective),
        rows,
        tables=tables,
        validate=lambda candidate: score(recommender.with_model(_drop_state_head(candidate))),
        select="ndcg@10",
    )
    model = _drop_state_head(run_training(task, config.training, run=run, seed=seed, mesh=mesh))
    trained = recommender.with_model(model)
    if not config.conditions.calibrate_events:
        return trained
    return with_calibrated_events(trained, dataset.splits.examples("validation"))


def _drop_state_head(model: ItemModel) -> ItemModel:
    """Remove the state head, which training alone reads, in place."""
    if model.state_head is not None:  # setting None anyway would change its structure, and compile again
        model.state_head = None
    return model


def check_teacher(teacher: Teacher | None, dataset: Dataset, config: GeneratorConfig) -> None:
    """Raise SemidError unless a teacher is given exactly if the objective distills. It must be trained on this dataset,
    and mixed with an item graph if the objective has a share for one."""
    if (teacher is not None) != bool(config.objective.distillation):
        raise SemidError("distillation needs a weight above 0 and a teacher: give both (--teacher), or neither")
    if (share := config.objective.teacher_graph) and not isinstance(teacher, MixedTeacher):
        raise SemidError(
            f"teacher_graph {share} mixes the item graph with a dense teacher (SASRec); give one (--teacher), or leave "
            "it out"
        )
    if teacher is not None and not config.model.has_codes:
        raise SemidError(f"distillation is for models of codes; {config.model.title} has none")
    if teacher is not None and not teacher.item_ids.equals(dataset.item_ids):
        raise SemidError("the teacher's items are not the dataset's in the same order; train it on this dataset")
    if teacher is not None and teacher.origin is not None:
        dataset.check_source(teacher.origin, what="the teacher", remedy="train a teacher on this dataset")
    counted, dense = (teacher.graph, teacher.dense) if isinstance(teacher, MixedTeacher) else (teacher, teacher)
    if isinstance(dense, DenseTeacher):
        dense.recommender.dense_model(remedy="name a teacher that `semid train sasrec` wrote (--teacher)")
    if isinstance(dense, DenseTeacher) and (made := dense.recommender.dataset):
        dataset.check_source(made, what="the teacher", remedy="train a teacher on this dataset")
    known = dense.recommender.conditions if isinstance(dense, DenseTeacher) else None
    if known is not None and (known.event_inputs or known.reads_times):
        raise SemidError(
            "the teacher reads events or times of histories, which distillation does not give it; train one without "
            "(--event-inputs, --time-inputs, --time-bias)"
        )
    if isinstance(counted, GraphTeacher):
        counted.graph.check_dataset(dataset)


def training_rows(dataset: Dataset, config: GeneratorConfig, layout: Layout) -> Rows:
    """Rows of the training histories in the model's layout."""
    train, history = dataset.splits.train, config.max_history
    if not config.reads_events:
        train = train.without_events()
    if config.objective.interaction_weights:
        _check_weights(dataset)
    else:
        train = train.without_weights()
    times = config.conditions.reads_times
    if layout is Layout.SINGLE:
        return SingleRows(train, max_history=history, times=times)
    append_last = layout is Layout.CLOSED
    length = config.row_length
    return PackedHistories(train, max_history=history, row_length=length, append_last=append_last, times=times)


def _check_weights(dataset: Dataset) -> None:
    """Raise SemidError unless the column `weight` can weigh targets."""
    weight, remedy = dataset.weight, "mend the column, or train without interaction_weights"
    if weight is None:
        raise SemidError(
            f"dataset {dataset.name!r}: interactions have no column 'weight'; add one, or do not weigh them"
        )
    if (negative := weight < 0).any():
        row = int(np.argmax(negative))
        raise SemidError(
            f"dataset {dataset.name!r}: interactions row {row + 1}, column 'weight': {weight[row]:g} is negative, as "
            f"are {negative.sum():,} of {len(weight):,}; {remedy}"
        )
    if not weight.any():
        raise SemidError(f"dataset {dataset.name!r}: interactions, column 'weight': all are 0; {remedy}")


def _tables(recommender: Recommender, dataset: Dataset, objective: ObjectiveConfig) -> LossTables:
    catalog, constrained = recommender.catalog, objective.normalization is SoftmaxOver.CHILDREN
    items = recommender.tables._replace(vectors=_state_vectors(dataset, objective.state_column))
    trie = CodeTrie.from_codes(catalog.codes, catalog.level_sizes) if constrained else None
    weights = objective.weights_of(dataset.events) if objective.event_weights else None
    return LossTables(items, trie, None if weights is None else jnp.asarray(weights))


def _state_vectors(dataset: Dataset, column: str) -> Float[Array, "items dim"] | None:
    """The column's vectors at unit length; zeros, which are constant negatives, for items without training data."""
    if not column:
        return None
    vectors, known = dataset.vectors(column), training_counts(dataset) > 0
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return jnp.asarray(np.where(known[:, None], vectors / np.maximum(lengths, 1e-12), np.float32(0)))


def content_features(dataset: Dataset, columns: tuple[str, ...] | None) -> Float[np.ndarray, "items feature"] | None:
    """The named vector columns (None: all) side by side and standardized; None where there are none."""
    return _content(dataset, columns)[0]


def _content(
    dataset: Dataset, columns: tuple[str, ...] | None
) -> tuple[Float[np.ndarray, "items feature"] | None, Standardizer | None]:
    """`content_features` and their standardizer, which appended items will need."""
    blocks = content_blocks(dataset, columns)
    if not blocks:
        return None, None
    standardizer = Standardizer.fit(blocks)
    return standardizer(np.concatenate(blocks, axis=1)), standardizer


def training_counts(dataset: Dataset) -> Int[np.ndarray, " items"]:
    """Number of training interactions of each item."""
    return dataset.splits.train.popularity(dataset.num_items).astype(np.int32)


@dataclass(frozen=True)
class Validation:
    """Accuracy of recommenders on a fixed sample of the validation split, in a catalogue of `num_items`."""

    examples: Examples
    num_items: int
    beam_size: int

    def __call__(self, recommender: Recommender) -> dict[str, float]:
        """Recall@10 and NDCG@10."""
        values = self.accuracies(recommender)
        return {name: float(values[name].mean()) for name in ("ndcg@10", "recall@10")}

    def accuracies(self, recommender: Recommender) -> dict[str, Float[np.ndarray, " n"]]:
        """Recall@10, NDCG@10 and the other metrics of lists of 10, per example."""
        codes, histories = recommender.codes, self.examples.histories
        groups = np.arange(self.num_items) if codes is None else group_ids(codes)
        ranked = recommender.rank(histories, k=10, exclude_seen=False, beam_size=self.beam_size)
        seen = None if recommender.repeats else histories
        return accuracy(item_places(ranked, self.examples.targets, groups, seen=seen), (10,))


def validation(dataset: Dataset, config: GeneratorConfig, *, seed: int) -> Validation:
    """Build the validation of `config.validation_users` examples, drawn by the seed."""
    examples: Examples = dataset.splits.examples("validation")
    if len(examples) > config.validation_users:
        examples = examples.take(np.random.default_rng(seed).permutation(len(examples))[: config.validation_users])
    return Validation(examples, dataset.num_items, config.validation_beam)


def with_tuned_mixture(
    trained: Recommender, dataset: Dataset, config: GeneratorConfig, *, graph: ItemGraph | None, seed: int
) -> Recommender:
    """Mix in the graph, if there is one, at the best weight on validation; where items repeat in the training data,
    also choose the factor on the probabilities of the history's items.

    More users decide than for a checkpoint, as NDCG@10 is flat in both.
    """
    more_users = replace(config, validation_users=_MIXTURE_USERS * config.validation_users)
    score = validation(dataset, more_users, seed=seed)
    mixed = trained if graph is None else with_best_graph_weight(trained, graph, score)
    if not (dataset.repeats.common and mixed.repeats):
        return mixed
    return with_best_repeat_factor(mixed, lambda candidate: score.accuracies(candidate)["ndcg@10"])
