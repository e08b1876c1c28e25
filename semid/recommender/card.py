"""The model card: a README.md in the Hugging Face hub's format, from the records of an artifact's origin."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semid import config
from semid.catalog import SemanticCatalog
from semid.recommender.spec import ModelSpec

if TYPE_CHECKING:
    import jinja2

_TAGS = ["semid", "jax", "recommendation", "sequential-recommendation"]
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>&|~#$])")
_SIMPLE_ID = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def model_card(
    *,
    spec: dict[str, Any],
    catalog: SemanticCatalog,
    parameters: int,
    training: dict[str, Any] | None,
    dataset: dict[str, Any] | None,
    tokenizer: dict[str, Any] | None,
    metrics: dict[str, Any] | None,
    license: str | None,
) -> str:
    """The card. `spec`, `training`, `dataset`, `tokenizer` and `metrics` are the JSON files of its folder.

    `metrics` has this model's row first. Names may hold any characters: they are escaped in Markdown and YAML.
    """
    model_spec = config.from_dict(ModelSpec, spec, where="the model's config")
    model = model_spec.model
    return _template().render(
        front=front_matter(model.title, metrics, license),
        family=model.title,
        spec=spec,
        sizes=_sizes(spec["model"]),
        has_codes=model.has_codes,
        sequences=() if model_spec.sequences is None else model_spec.sequences.names,
        conditions=None if model_spec.conditions is None else model_spec.conditions.description,
        catalog=catalog,
        parameters=parameters,
        training=training,
        dataset=dataset,
        simulated=dataset is not None and dataset["source"] == "simulated",
        tokenizer=tokenizer,
        metrics=metrics,
        columns=_columns(metrics["provenance"]["ks"]) if metrics else {},
        ids=_simple_ids(catalog),
    )


def front_matter(family: str, metrics: dict[str, Any] | None, license: str | None) -> str:
    """The card's YAML, one key per line: JSON values, which are YAML."""
    entries: dict[str, Any] = {"library_name": "semid", "tags": _TAGS}
    if license is not None:
        entries["license"] = plain(license)
    if metrics:
        row, data = metrics["rows"][0], plain(metrics["provenance"].get("dataset", ""))
        shown = _columns(metrics["provenance"]["ks"]).values()
        result = {
            "task": {"type": "recommendation", "name": "next-item recommendation"},
            "dataset": {"type": data, "name": data, "split": plain(metrics["split"])},
            "metrics": [{"type": name, "value": row[name]} for name in shown if name in row],
        }
        entries["model-index"] = [{"name": family, "results": [result]}]
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items())


def plain(text: Any) -> str:
    """Text on one line; unprintable characters become spaces."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def markdown(text: Any) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return _SPECIAL.sub(r"\\\1", plain(text))


def _columns(ks: Sequence[int]) -> dict[str, str]:
    """Column heads of the metrics' table, and the metrics that they show."""
    shown = {f"{label}@{k}": f"{name}@{k}" for k in ks for label, name in (("Recall", "recall"), ("NDCG", "ndcg"))}
    return shown | {"MRR": "mrr", f"coverage@{max(ks)}": f"coverage@{max(ks)}"}


def _sizes(model: dict[str, Any]) -> str:
    """The whole numbers of a model's config and its backbone's, in words."""
    flat = {name: value for name, value in model.items() if type(value) is int}
    flat |= {name: value for name, value in model.get("backbone", {}).items() if type(value) is int}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in flat.items())


def _simple_ids(catalog: SemanticCatalog) -> list[str]:
    """Two ids to show the calls with: ids that need no quotes on a command line."""
    ids = [name for name in catalog.item_ids[:1000].to_pylist() if _SIMPLE_ID.fullmatch(name)]
    return ids[:2]


def _template() -> jinja2.Template:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": markdown, "label": lambda name: plain(name).replace("_", " ")}
    return environment.get_template("card.md.j2")
