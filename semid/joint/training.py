"""Training end to end: encoders, tokenizer and generator one after the other, then together, then the generator alone.

The staged way is the same without the middle: what the joint steps are worth is measured against it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from semid import artifacts
from semid.artifacts import Kind, Origin
from semid.catalog import TOKENIZER_CONFIG
from semid.config import to_dict
from semid.data import Dataset, Standardizer
from semid.encoders import ItemEncoder, Vocabulary, check_content
from semid.errors import SemidError
from semid.generators import write_statistics
from semid.joint.config import JointConfig
from semid.joint.model import TEACHER_TERMS, Content, JointModel
from semid.joint.stages import STATE_FILE, Earlier, Run
from semid.recommender import Recommender
from semid.tokenizers import SemanticTokenizer, TokenizerConfig
from semid.training import HISTORY, named_leaves, on_first, read_history, replace_leaves

VOCABULARY_FILE = "vocabulary.model"


def train_joint(
    dataset: Dataset,
    content: Content,
    encoder: ItemEncoder,
    config: JointConfig,
    *,
    out: Path,
    teacher: Float[np.ndarray, "items teacher"] | None = None,
    earlier: Earlier | None = None,
    vocabulary: Vocabulary | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    shared: Path | None = None,
) -> Recommender:
    """Train on the dataset's training histories and the items' `content`, and write the model artifact `out`.

    `encoder` is what turns content into vectors; `teacher` are item vectors for the objective's distillation terms. The
    artifact is a recommender like any other (its features are the item vectors), with all parameters and the bank in
    `joint.safetensors` beside it, the `vocabulary` of the texts, if one was made for them, and the records of all
    stages in `history.jsonl`. Each stage keeps its checkpoints in a folder of `<out>.stages`, and goes on from there
    after an interruption. With `shared` the first three stages keep theirs there, for runs that differ in the later
    ones alone.

    With `earlier` all variables are that run's, and its bank: the first three stages are left out, joint steps have the
    targets that it did not have, and an item that it did not know enters the bank when a step first encodes it. The
    generator's last stage has all histories again, so that it forgets none.

    Raises SemidError if content is missing or of other items, the objective wants a teacher that is not given,
    `earlier` is of other settings, codes collapse, or `out` is in use.
    """
    settings, parents = {"joint": to_dict(config)}, dataset.parents
    if teacher is not None:
        parents["teacher"] = hashlib.sha256(np.ascontiguousarray(teacher).tobytes()).hexdigest()
    if earlier is not None:
        parents["earlier"] = artifacts.read_artifact(earlier.path, Kind.MODEL).digest
    if artifacts.is_current(out, kind=Kind.MODEL, config=settings, parents=parents, seed=seed):
        return Recommender.from_pretrained(out)
    _check(dataset, content, config, teacher)
    run = Run(dataset, content, config, teacher, earlier, out, shared, parents, seed, mesh)
    model = run.start(encoder) if earlier is None else run.resumed(encoder, earlier)
    model = run.together(model)
    recommender = run.finetuned(model)

    def write() -> None:
        with artifacts.write_artifact(out, kind=Kind.MODEL, config=settings, parents=parents, seed=seed) as temporary:
            recommender.write(temporary)
            write_statistics(dataset, temporary)
            _write_tokenizer(model, config, temporary)
            artifacts.save_tensors(temporary / STATE_FILE, jax.device_get(named_leaves(nnx.state(model))))
            if vocabulary is not None:
                (temporary / VOCABULARY_FILE).write_bytes(vocabulary.model)
            _write_history(run, temporary / HISTORY)
        recommender.origin = Origin(out, artifacts.read_manifest(out))
        shutil.rmtree(run.stages, ignore_errors=True)

    on_first(write)
    return recommender


def trained_encoder(path: str | Path, encoder: ItemEncoder) -> ItemEncoder:
    """The encoders as a run left them, to encode other items (`encode_items`): the artifact's `SemanticTokenizer` gives
    these vectors codes, and `Recommender.with_catalog` recommends them.

    `encoder` is built as the one given to `train_joint` was. Raises SemidError naming a tensor that does not fit it.
    """
    artifacts.read_artifact(path, Kind.MODEL)
    file, prefix = Path(path) / STATE_FILE, "encoder/"
    leaves = artifacts.load_tensors(file)
    own = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    graph, state = nnx.split(encoder)
    return nnx.merge(graph, replace_leaves(state, own, where=str(file)))


def _write_history(run: Run, file: Path) -> None:
    """Write the records of all stages, in their order, each with the name of its stage."""
    paths = {stage: run.folder(stage) / HISTORY for stage in run.folders()}
    records = [
        {"stage": stage, **record} for stage, path in paths.items() if path.exists() for record in read_history(path)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_tokenizer(model: JointModel, config: JointConfig, folder: Path) -> None:
    """Write what turns item vectors, as the encoders make them, into codes."""
    settings, as_they_are = TokenizerConfig(method=config.tokenizer), Standardizer.identity(model.encoder.dim)
    SemanticTokenizer(settings, as_they_are, model.autoencoder).write(folder)
    artifacts.write_json(folder / TOKENIZER_CONFIG, to_dict(settings))


def _check(
    dataset: Dataset, content: Content, config: JointConfig, teacher: Float[np.ndarray, "items teacher"] | None
) -> None:
    check_content(content)
    if (rows := len(jax.tree.leaves(dict(content))[0])) != dataset.num_items:
        raise SemidError(f"expected content of the dataset's {dataset.num_items} items, got {rows} rows; make it anew")
    terms = {name for phase in config.joint for name in phase.step.objective.weights(0.0)}
    if teacher is None and (deaf := sorted(terms & TEACHER_TERMS)):
        raise SemidError(f"the term {deaf[0]} learns from a teacher: give its item vectors, or weight 0")
    if teacher is not None and len(teacher) != dataset.num_items:
        raise SemidError(f"expected a teacher's vectors of {dataset.num_items} items, got {len(teacher)}")
