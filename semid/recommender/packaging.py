"""The folder that a recommender is handed over as: what goes with the model, and the card that says what it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from semid import artifacts
from semid.artifacts import MANIFEST, PAGE, Kind, Manifest
from semid.catalog import TOKENIZER_CONFIG, TOKENIZER_FILE, SemanticCatalog
from semid.errors import SemidError
from semid.recommender.card import model_card

METRICS = "metrics.json"
DATASET_FILE = "dataset.json"
TRAINING = "training.json"


class Measured(Protocol):
    """What `semid.evaluate` gives."""

    @property
    def provenance(self) -> dict[str, Any]: ...
    def row(self, model: str) -> dict[str, str | float]: ...


@dataclass(frozen=True)
class Origin:
    """The artifact that a recommender was loaded from."""

    folder: Path
    manifest: Manifest
    later: bool = False
    """The recommender has come to a later version of its catalogue: what was measured there is not of this one."""

    @property
    def trained(self) -> str:
        """Digest of the artifact that training wrote: this one's, or that which this one was handed over from."""
        return self.manifest.parents.get("model", self.manifest.digest)

    def read(self, name: str) -> Any:
        """A JSON file of the artifact, None where it has none of that name."""
        return artifacts.read_json(self.folder / name) if name in self.manifest.files else None

    def carry(self, into: Path) -> None:
        """Copy what goes with the model (tokenizer, data statistics, metrics) and is not written anew.

        Raises SemidError if it is no longer what it was when the recommender was loaded.
        """
        for name, digest in self.manifest.files.items():
            if (into / name).exists() or name == PAGE or Path(name).suffix == ".jsonl":  # logs of training stay behind
                continue
            if self.later and name == METRICS:
                continue
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.folder / name, into / name)
            except FileNotFoundError:
                raise SemidError(
                    f"{self.folder / name}: gone since the recommender was loaded; load it again"
                ) from None
            if artifacts.sha256(into / name) != digest:
                raise SemidError(f"{self.folder / name}: changed since the recommender was loaded; load it again")


def carry_tokenizer(catalog: Path, manifest: Manifest, into: Path) -> None:
    """Copy the tokenizer of a catalogue artifact, config and all; a catalogue of imported codes has none."""
    if "tokenizer" in manifest.config:
        shutil.copyfile(catalog / TOKENIZER_FILE, into / TOKENIZER_FILE)
        if artifacts.sha256(into / TOKENIZER_FILE) != manifest.files[TOKENIZER_FILE]:
            raise SemidError(f"{catalog / TOKENIZER_FILE}: changed since training began; train on the catalogue anew")
        artifacts.write_json(into / TOKENIZER_CONFIG, manifest.config["tokenizer"])


def hand_over(
    path: Path,
    *,
    write: Callable[[Path], None],
    spec: dict[str, Any],
    catalog: SemanticCatalog,
    parameters: int,
    origin: Origin | None,
    metrics: str | Path | Measured | None,
    license: str | None,
) -> None:
    """Write the artifact `path`: what `write` puts there, what goes with it, and its card."""
    _check_place(path, origin)
    made = Manifest(Kind.MODEL, {"spec": spec}, {}) if origin is None else origin.manifest
    parents = made.parents if origin is None else {"model": origin.manifest.digest, **made.parents}
    measured = None if metrics is None else _read_metrics(metrics, origin, catalog)
    with artifacts.write_artifact(
        path, kind=Kind.MODEL, config=made.config, parents=parents, seed=made.seed, devices=made.devices
    ) as folder:
        write(folder)
        if measured is not None:
            artifacts.write_json(folder / METRICS, measured)
        if origin is not None:
            origin.carry(folder)
            if TRAINING not in origin.manifest.files:
                artifacts.write_json(folder / TRAINING, _training(made))
        found = {name: _json(folder / name) for name in (METRICS, DATASET_FILE, TOKENIZER_CONFIG, TRAINING)}
        card = model_card(
            spec=spec,
            catalog=catalog,
            parameters=parameters,
            training=found[TRAINING],
            dataset=found[DATASET_FILE],
            tokenizer=found[TOKENIZER_CONFIG],
            metrics=found[METRICS],
            license=license,
        )
        (folder / PAGE).write_text(card, encoding="utf-8")


def _training(made: Manifest) -> dict[str, Any]:
    """What the manifest of a trained model says that the one of a folder handed over, made later, does not."""
    about = {name: getattr(made, name) for name in ("created", "devices", "packages", "seed")}
    return {"digest": made.digest, **about}


def _json(file: Path) -> Any:
    return artifacts.read_json(file) if file.exists() else None


def _check_place(path: Path, origin: Origin | None) -> None:
    """Only a folder that was handed over is replaced, and never the one that is read."""
    if origin is not None and path.resolve() == origin.folder.resolve():
        raise SemidError(f"{path}: the recommender was loaded from here; choose another folder")
    artifacts.check_output(path, kind=Kind.MODEL)
    if (path / MANIFEST).is_file() and PAGE not in artifacts.read_json(path / MANIFEST)["files"]:
        raise SemidError(f"{path}: in use by a model that `semid train` wrote; choose another folder")


def _read_metrics(metrics: str | Path | Measured, origin: Origin | None, catalog: SemanticCatalog) -> dict[str, Any]:
    """The rows of this model and of the control baselines, as `metrics.json` has them: the model's first."""
    if not isinstance(metrics, (str, Path)):
        split = metrics.provenance["split"]
        return {"split": split, "rows": [metrics.row("semid")], "provenance": metrics.provenance}
    file = Path(metrics)
    read = artifacts.read_json(file)
    if not isinstance(read, dict) or not {"split", "rows", "provenance"} <= set(read):
        raise SemidError(f"{file}: expected split, rows and provenance, as `semid evaluate` writes them")
    measured: Mapping[str, str] = read["provenance"].get("models", {})
    known = () if origin is None else (origin.manifest.digest, origin.trained)
    own = [index for index, digest in enumerate(measured.values()) if digest in known]
    if not own or len(read["rows"]) < len(measured):
        found = ", ".join(f"{path} ({digest[:12]})" for path, digest in measured.items()) or "no model"
        raise SemidError(
            f"{file}: measures {found}, not this model ({known[0][:12] if known else 'never saved'}); "
            "run `semid evaluate --model` on it"
        )
    version = read["provenance"].get("catalog")
    if version != catalog.digest and (version is not None or (origin is not None and origin.later)):
        raise SemidError(
            f"{file}: measures another version of the catalogue; run `semid evaluate` on this one (--catalog), or "
            "leave the metrics out"
        )
    row, path = read["rows"][own[0]], list(measured)[own[0]]
    controls = [row for row in read["rows"][len(measured) :] if row["model"] in ("popularity", "bigram", "oracle")]
    provenance = {**read["provenance"], "models": {Path(path).name: measured[path]}}  # others' models and paths stay
    for name, key, renamed in (
        ("beam_against_exact", row["model"], row["model"]),
        ("trained_on_other_dataset", path, Path(path).name),
    ):
        of_models = provenance.pop(name, {})
        if key in of_models:
            provenance[name] = {renamed: of_models[key]}
    return {"split": read["split"], "rows": [row, *controls], "provenance": provenance}
