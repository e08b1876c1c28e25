"""Files of a model's artifact: its spec, its parameters, and the data of the items that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from semid import artifacts, config
from semid.data import Standardizer, read_encoders
from semid.recommender.conditions import ItemConditions
from semid.recommender.items import ItemData
from semid.recommender.spec import SPEC_FILE, ModelSpec, read_spec
from semid.training import named_leaves, replace_leaves
from seq_models import ItemModel

_PARAMETERS, _ITEMS = "model.safetensors", "items.safetensors"
_GROUPS, _TEXTS, _CONDITIONS = "condition/groups", "condition/texts", "condition"
_SEQUENCE = "sequence/{}"
_MEAN, _SCALE = "standardizer/mean", "standardizer/scale"


def write_model(folder: Path, spec: ModelSpec, params: Any, items: ItemData) -> None:
    """Write config, parameters and item data into the folder of an artifact under construction."""
    artifacts.write_json(folder / SPEC_FILE, config.to_dict(spec))
    artifacts.save_tensors(folder / _PARAMETERS, named_leaves(jax.device_get(params)))
    tensors = {"train_counts": items.train_counts}
    if items.features is not None:
        tensors["features"] = items.features
    if items.standardizer is not None:
        tensors |= {_MEAN: items.standardizer.mean, _SCALE: items.standardizer.scale}
    of_items = items.conditions
    tensors |= {name: x for name, x in ((_GROUPS, of_items.groups), (_TEXTS, of_items.texts)) if x is not None}
    tensors |= {_SEQUENCE.format(at): codes for at, codes in enumerate(items.sequences)}
    artifacts.save_tensors(folder / _ITEMS, tensors)
    if of_items.encoder is not None:
        (folder / _CONDITIONS).mkdir(exist_ok=True)
        of_items.encoder.write(folder / _CONDITIONS)  # the tokenizer's may have the same name


def read_model(folder: Path, files: Iterable[str]) -> tuple[ModelSpec, ItemModel, ItemData]:
    """Read what `write_model` wrote into an artifact of these `files`.

    Raises SemidError naming file and tensor that does not fit or is not finite.
    """
    spec, file = read_spec(folder), folder / _PARAMETERS
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.build(seed=0)))  # drawing parameters takes a second
    parameters, tensors = artifacts.load_tensors(file), artifacts.load_tensors(folder / _ITEMS)
    artifacts.check_finite(parameters, where=file)
    artifacts.check_finite(tensors, where=folder / _ITEMS, may_be_infinite=(_SCALE,))  # of a constant dimension
    model = nnx.merge(graph, replace_leaves(state, parameters, where=str(file)))
    standardizer = Standardizer(tensors[_MEAN], tensors[_SCALE]) if _MEAN in tensors else None
    of_conditions = [name.removeprefix(f"{_CONDITIONS}/") for name in files if name.startswith(f"{_CONDITIONS}/")]
    encoders = read_encoders(folder / _CONDITIONS, of_conditions)
    of_items = ItemConditions(tensors.get(_GROUPS), tensors.get(_TEXTS), next(iter(encoders), None))
    number = 0 if spec.sequences is None else len(spec.sequences.names)
    sequences = tuple(tensors[_SEQUENCE.format(at)] for at in range(number))
    return spec, model, ItemData(tensors["train_counts"], tensors.get("features"), standardizer, of_items, sequences)
