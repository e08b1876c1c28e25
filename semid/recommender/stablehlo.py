"""The recommender as a program for JAX alone: StableHLO, with every array that it reads in a file next to it.

Loading it needs jax, flatbuffers, numpy, safetensors and pyarrow, but neither semid nor flax: see docs/stablehlo.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax import export
from jaxtyping import Array, Float, Int

from semid import artifacts
from semid.arrow import write_parquet
from semid.artifacts import Kind
from semid.errors import SemidError, refuse_path
from semid.recommender.ranking import list_sizes
from semid.recommender.recommender import Recommender
from semid.recommender.scorers import Scorer
from semid.recommender.spec import ModelSpec
from semid.training import named_leaves
from seq_models import Conditions, RequestBatch

SCHEMA_VERSION = 1

Program = Callable[..., tuple[Int[Array, "batch k"], Float[Array, "batch k"]]]


def export_program(
    recommender: Recommender,
    out: str | Path,
    *,
    k: int = 10,
    beam_size: int = 50,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write the folder `out`: what `recommender.recommend(histories, k=k, beam_size=beam_size)` computes, as a program.

    - `program.stablehlo`: a serialized `jax.export` of `program(arrays, history, lengths) -> (rows, scores)`, for any
      batch: `history` int32 [batch, max_history] holds item rows, oldest first, the latest `max_history` of them, from
      the left on; `lengths` int32 [batch] says how many. Rows int32 [batch, k] are best first, -1 where there are
      fewer, scores float32 [batch, k] their log-probabilities (-inf). For length 0: the most popular of training.
      Where nothing repeats (`leaves_out_history` in `program.json`), the items of `history` are left out, while
      `recommend` leaves out those before them too: drop these, and choose a `k` that allows for it.
      Where the model knows conditions, a fourth argument has them: the dict `conditions` of `events` int32
      [batch, max_history] and, as it knows them, `event`, `group` int32 [batch] and `text` float32 [batch, width],
      numbered from 1 by the names in `program.json`, zeros for any;
    - `arrays.safetensors`: parameters, item tables, trie, mixture (an item graph's edges and weight) and popularity,
      the dict `arrays`;
    - `item_ids.parquet`: item_id by item row; `program.json`: the settings; `README.md`: how to load it.

    Raises SemidError for numbers out of range, platforms that JAX does not know, and where flatbuffers is missing.
    """
    refuse_path(recommender, "Recommender.from_pretrained")
    k, beam_size = list_sizes(k, beam_size)
    artifacts.output_folder(out, kind=Kind.PROGRAM)
    if importlib.util.find_spec("flatbuffers") is None:  # jax.export writes and reads with it
        raise SemidError("a program is written with the package flatbuffers: pip install 'semid[stablehlo]'")
    arrays, program = as_program(recommender, k=k, beam_size=beam_size)
    exported = _exported(program, arrays, recommender.spec, platforms)
    settings = {"k": k, "beam_size": beam_size, "platforms": list(platforms)}
    parents = {} if recommender.origin is None else {"model": recommender.origin.digest}
    with artifacts.write_artifact(out, kind=Kind.PROGRAM, config=settings, parents=parents) as folder:
        (folder / "program.stablehlo").write_bytes(exported.serialize())
        artifacts.save_tensors(folder / "arrays.safetensors", arrays)
        write_parquet(pa.table({"item_id": recommender.item_ids}), folder / "item_ids.parquet")
        artifacts.write_json(folder / "program.json", settings | _facts(recommender, exported, folder))
        (folder / artifacts.PAGE).write_text(_README, encoding="utf-8")


def as_program(recommender: Recommender, *, k: int, beam_size: int) -> tuple[dict[str, Array], Program]:
    """The arrays that the recommender reads, by name, and the function of them and of histories that ranks items."""
    scorer = recommender.scorer
    fields = _arrays(scorer)
    names, structure = list(named_leaves(fields)), jax.tree.structure(fields)
    rows, scores = (jnp.asarray(values) for values in recommender.most_popular(k))
    popular = {"popular/rows": rows.astype(jnp.int32), "popular/scores": scores}

    def program(
        arrays: dict[str, Array],
        history: Int[Array, "batch max_history"],
        lengths: Int[Array, " batch"],
        conditions: dict[str, Array] | None = None,
    ) -> tuple[Int[Array, "batch k"], Float[Array, "batch k"]]:
        own = jax.tree.unflatten(structure, [arrays[name] for name in names])
        segments = (jnp.arange(history.shape[1], dtype=jnp.int32)[None] < lengths[:, None]).astype(jnp.int32)
        requests = RequestBatch(history, segments)
        if conditions is not None:
            parts = {name: part for name, part in conditions.items() if name not in ("events", "times")}
            requests = requests._replace(events=conditions["events"], target_conditions=Conditions(**parts))
            requests = requests._replace(times=conditions.get("times"))
        top = replace(scorer, **own).top(requests, k=k, beam_size=beam_size)
        has_items = (lengths > 0)[:, None]
        return (
            jnp.where(has_items, top.rows, arrays["popular/rows"][None]),
            jnp.where(has_items, top.scores, arrays["popular/scores"][None]),
        )

    return named_leaves(fields) | popular, program


def _arrays(scorer: Scorer) -> dict[str, Any]:
    """The scorer's array fields, with the item vectors, which each batch would compute again."""
    fields = {name: getattr(scorer, name) for name in ("params", "trie", "mixture")}
    return fields | {"tables": scorer.request_tables}


def _exported(
    program: Program, arrays: Mapping[str, Array], spec: ModelSpec, platforms: Sequence[str]
) -> export.Exported:
    (batch,) = export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    history = jax.ShapeDtypeStruct((batch, spec.max_history), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    conditions = {
        name: jax.ShapeDtypeStruct((batch, *of), kind) for name, (of, kind) in _condition_shapes(spec).items()
    }
    _check_platforms(platforms)
    arguments = (shapes, history, lengths, *([conditions] if conditions else []))
    return export.export(jax.jit(program), platforms=tuple(platforms))(*arguments)


def _condition_shapes(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes, without the batch, and types of the input `conditions`; empty for a model without conditions."""
    if spec.conditions is None:
        return {}
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"event": ((), np.int32), "group": ((), np.int32)}
    shapes["text"] = (spec.conditions.text_width,), np.float32
    along = ["events"] + ["times"] * spec.conditions.reads_times
    of_items: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(along, ((spec.max_history,), np.int32))
    return of_items | {part: shapes[part] for part in spec.conditions.parts}


def _check_platforms(platforms: Sequence[str]) -> None:
    known = ("cpu", "cuda", "rocm", "tpu")
    if not platforms or set(platforms) - set(known):
        raise SemidError(f"expected one or more platforms of {', '.join(known)}, got {list(platforms)}")


def _facts(recommender: Recommender, exported: export.Exported, folder: Path) -> dict[str, Any]:
    """Contents of `program.json` next to the settings."""
    spec, files = recommender.spec, ("program.stablehlo", "arrays.safetensors", "item_ids.parquet")
    k = exported.out_avals[0].shape[1]
    return {
        "schema_version": SCHEMA_VERSION,
        "model": type(recommender.model).__name__,
        "items": len(recommender.item_ids),
        "max_history": spec.max_history,
        "leaves_out_history": not recommender.repeats,
        "inputs": {
            "arrays": "arrays.safetensors",
            "history": {"dtype": "int32", "shape": ["batch", spec.max_history]},
            "lengths": {"dtype": "int32", "shape": ["batch"]},
            **_condition_facts(spec),
        },
        "outputs": {
            "rows": {"dtype": "int32", "shape": ["batch", k]},
            "scores": {"dtype": "float32", "shape": ["batch", k]},
        },
        "catalog": recommender.catalog.digest,
        "sha256": {name: artifacts.sha256(folder / name) for name in files},
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
    }


def _condition_facts(spec: ModelSpec) -> dict[str, Any]:
    """The input `conditions`, of a model that knows conditions, and the names that its numbers stand for, from 1 on."""
    if spec.conditions is None:
        return {}
    shapes = {
        name: {"dtype": np.dtype(kind).name, "shape": ["batch", *of]}
        for name, (of, kind) in _condition_shapes(spec).items()
    }
    names = {"events": list(spec.conditions.events), "groups": list(spec.conditions.groups)}
    return {"conditions": shapes, "condition_names": names}


LOADER = """\
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
from jax import export
from safetensors.numpy import load_file

folder = Path("program")
try:
    files = dict(json.loads((folder / "manifest.json").read_bytes())["files"])
except (ValueError, KeyError, TypeError):
    raise ValueError(f"{folder / 'manifest.json'} is not what was written; export the program again") from None
for name, digest in files.items():
    if name != "README.md" and hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
        raise ValueError(f"{folder / name} is not what was written; export the program again")
settings = json.loads((folder / "program.json").read_text(encoding="utf-8"))
program = jax.jit(export.deserialize((folder / "program.stablehlo").read_bytes()).call)
arrays = jax.device_put(load_file(folder / "arrays.safetensors"))
item_ids = pq.read_table(folder / "item_ids.parquet")["item_id"].to_pylist()
"""

USE = '''\
row_of = {item_id: row for row, item_id in enumerate(item_ids)}


def recommend(histories):
    """The best item ids for each history of item ids, oldest first, and their log-probabilities."""
    history = np.zeros((len(histories), settings["max_history"]), np.int32)
    lengths = np.zeros(len(histories), np.int32)
    for user, items in enumerate(histories):
        latest = [row_of[item_id] for item_id in items][-settings["max_history"] :]
        history[user, : len(latest)], lengths[user] = latest, len(latest)
    conditions = {  # for a model with conditions: none requested, all events and times unknown
        name: np.full([len(histories), *given["shape"][1:]], -1 if name == "times" else 0, given["dtype"])
        for name, given in settings["inputs"].get("conditions", {}).items()
    }
    fourth = [conditions] if "conditions" in settings["inputs"] else []
    rows, scores = map(np.array, program(arrays, history, lengths, *fourth))
    if settings.get("leaves_out_history"):  # the program leaves out only the latest max_history items
        for user, items in enumerate(histories):
            scores[user, np.isin(rows[user], [row_of[item_id] for item_id in items])] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        rows, scores = (np.take_along_axis(found, order, axis=1) for found in (rows, scores))
    rows = np.where(scores > -np.inf, rows, -1)
    return [[item_ids[row] for row in best if row >= 0] for best in rows], scores
'''

_README = f"""# A recommender as a StableHLO program

Written by semid; loaded without it, by `pip install jax flatbuffers numpy safetensors pyarrow`:

```python
{LOADER}```

`program(arrays, history, lengths)` gives item rows and log-probabilities:

```python
{USE}```

A model that knows conditions takes a fourth argument, `program(arrays, history, lengths, conditions)`: arrays by the
names, shapes and types of `inputs.conditions` in `program.json`, zeros where nothing is asked for and where an event of
the history is not known; `times`, where there are any, are seconds since the history's first item, -1 where they are
not known and behind the history; `inputs.condition_names` has the events and groups that are numbered from 1.

Where `program.json` says `leaves_out_history`, the program recommends none of the items that it reads, the latest
`max_history`; the lines above drop earlier ones from its k items, so that lists of longer histories may be shorter.

The program is compiled once for every batch size that it meets: fill batches up to a few sizes. `program.json` has the
shapes, `item_ids.parquet` the item of each row, `manifest.json` the sha256 of every file.
"""
