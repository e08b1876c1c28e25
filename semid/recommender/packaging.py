"""Packages: a recommender as one folder, with everything that goes with the model and a model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from semid import artifacts
from semid.artifacts import MANIFEST, PAGE, Kind, Manifest, Origin
from semid.catalog import TOKENIZER_CONFIG, SemanticCatalog, copy_tokenizer_files
from semid.errors import SemidError
from semid.recommender.card import model_card

METRICS = "metrics.json"
DATASET_FILE = "dataset.json"
TRAINING = "training.json"


@runtime_checkable
class Measured(Protocol):
    """Result of `semid.evaluate`."""

    @property
    def provenance(self) -> dict[str, Any]: ...
    def row(self, model: str) -> dict[str, str | float]: ...


def trained_digest(origin: Origin) -> str:
    """Digest of the artifact that training wrote: this one's, or for a package that of the model in it."""
    return origin.manifest.parents.get("model", origin.digest)


def copy_files_to(folder: Path, origin: Origin, *, metrics: bool) -> None:
    """Copy a model's other files (tokenizer, data statistics, ...) that are not in `folder` yet.

    Training logs are not copied, and metrics only if `metrics`.
    Raises SemidError for a file that has changed since the recommender was loaded.
    """
    for name in origin.manifest.files:
        written, log = (folder / name).exists(), Path(name).suffix == ".jsonl"
        if not (written or log or name == PAGE or (name == METRICS and not metrics)):
            origin.copy_file(name, folder)


def copy_tokenizer(catalog: Origin, folder: Path) -> None:
    """Copy the tokenizer of a catalogue artifact and its config; a catalogue of imported codes has none."""
    if "tokenizer" in catalog.manifest.config:
        copy_tokenizer_files(catalog, folder)
        artifacts.write_json(folder / TOKENIZER_CONFIG, catalog.manifest.config["tokenizer"])


def write_package(
    path: Path,
    *,
    write: Callable[[Path], None],
    spec: dict[str, Any],
    catalog: SemanticCatalog,
    parameters: int,
    origin: Origin | None,
    dataset: str,
    catalog_updated: bool,
    metrics: str | Path | Measured | None,
    license: str | None,
) -> None:
    """Write the artifact `path`: the files of `write`, the other files of the model, and its card.

    `dataset` is the digest of the dataset that it was trained on; empty: not known. `catalog_updated`: the catalogue,
    or vectors of its items, are of another version than the model's own metrics.
    """
    _check_place(path, origin)
    manifest = Manifest(Kind.MODEL, {"spec": spec}, {}) if origin is None else origin.manifest
    parents = {"dataset": dataset} if dataset else {}
    parents |= {} if origin is None else {"model": origin.digest, **manifest.parents}
    measured = None if metrics is None else _read_metrics(metrics, origin, catalog, catalog_updated=catalog_updated)
    with artifacts.write_artifact(
        path, kind=Kind.MODEL, config=manifest.config, parents=parents, seed=manifest.seed, devices=manifest.devices
    ) as folder:
        write(folder)
        if measured is not None:
            artifacts.write_json(folder / METRICS, measured)
        if origin is not None:
            copy_files_to(folder, origin, metrics=not catalog_updated)
            if TRAINING not in origin.manifest.files:
                artifacts.write_json(folder / TRAINING, _training(manifest))
        records = {name: _json(folder / name) for name in (METRICS, DATASET_FILE, TOKENIZER_CONFIG, TRAINING)}
        card = model_card(
            spec=spec,
            catalog=catalog,
            parameters=parameters,
            training=records[TRAINING],
            dataset=records[DATASET_FILE],
            tokenizer=records[TOKENIZER_CONFIG],
            metrics=records[METRICS],
            license=license,
        )
        (folder / PAGE).write_text(card, encoding="utf-8")


def _training(manifest: Manifest) -> dict[str, Any]:
    """Time, devices, packages and seed of a training run, which the manifest of its package does not hold."""
    about = {name: getattr(manifest, name) for name in ("created", "devices", "packages", "seed")}
    return {"digest": manifest.digest, **about}


def _json(file: Path) -> Any:
    return artifacts.read_json(file) if file.exists() else None


def _check_place(path: Path, origin: Origin | None) -> None:
    """Raise SemidError unless `path` is free, or a package to replace that the recommender was not loaded from."""
    path = artifacts.resolved(path)
    if origin is not None and path == origin.folder.resolve():
        raise SemidError(f"{path}: the recommender was loaded from here; choose another folder")
    artifacts.output_folder(path, kind=Kind.MODEL)
    if (path / MANIFEST).is_file() and PAGE not in artifacts.read_manifest(path).files:
        raise SemidError(f"{path}: in use by a model that `semid train` wrote; choose another folder")


def _check_unconditional(provenance: Mapping[str, Any], where: str) -> None:
    """Raise SemidError for metrics that were measured under a condition: a card has those without."""
    asked = provenance.get("own_conditions") or provenance.get("options", {}).get("condition")
    if asked:
        raise SemidError(f"{where}: the model was asked for {asked}; give metrics without a condition")


def _read_metrics(
    metrics: str | Path | Measured, origin: Origin | None, catalog: SemanticCatalog, *, catalog_updated: bool
) -> dict[str, Any]:
    """Metrics of this model, the first row, and of the control baselines, in the format of `metrics.json`."""
    known = () if origin is None else (origin.digest, trained_digest(origin))
    if not isinstance(metrics, (str, Path)):
        provenance = {name: value for name, value in metrics.provenance.items() if name != "model"}
        _check_unconditional(provenance, "these metrics")
        if (about := metrics.provenance.get("model")) is None or about["origin"] not in (known or (None,)):
            raise SemidError("these metrics are of another model; give what `semid.evaluate` gives of this one")
        if about["catalog"] != catalog.digest:
            raise SemidError("these metrics are of another version of the catalogue; evaluate this one")
        return {"split": provenance["split"], "rows": [metrics.row("semid")], "provenance": provenance}
    file = artifacts.fetched(metrics)
    read = artifacts.read_sealed(file)
    if not isinstance(read, dict) or not {"split", "rows", "provenance"} <= set(read):
        raise SemidError(f"{file}: expected split, rows and provenance, as `semid evaluate` writes them")
    _check_unconditional(read["provenance"], str(file))
    measured: Mapping[str, str] = read["provenance"].get("models", {})
    own = [index for index, digest in enumerate(measured.values()) if digest in known]
    if not own or len(read["rows"]) < len(measured):
        found = ", ".join(f"{path} ({digest[:12]})" for path, digest in measured.items()) or "no model"
        raise SemidError(
            f"{file}: measures {found}, not this model ({known[0][:12] if known else 'never saved'}); "
            "run `semid evaluate --model` on it"
        )
    version = read["provenance"].get("catalog")
    if version != catalog.digest and (version is not None or catalog_updated):
        raise SemidError(
            f"{file}: measures another version of the catalogue; run `semid evaluate` on this one (--catalog), or "
            "leave the metrics out"
        )
    row, path = read["rows"][own[0]], list(measured)[own[0]]
    controls = [row for row in read["rows"][len(measured) :] if row["model"] in ("popularity", "bigram", "oracle")]
    folder = Path(path).name  # others' models and paths stay
    model = folder if row["model"] == path else row["model"]  # several models of one kind and folder are named by path
    provenance = {**read["provenance"], "models": {folder: measured[path]}}
    for name, key, renamed in (
        ("beam_against_exact", row["model"], model),
        ("half_width_95", row["model"], model),
        ("trained_on_other_dataset", path, folder),
    ):
        of_models = provenance.pop(name, {})
        if key in of_models:
            provenance[name] = {renamed: of_models[key]}
    return {"split": read["split"], "rows": [row | {"model": model}, *controls], "provenance": provenance}
