"""Seals of checkpoints: digests of a checkpoint's files when written, and the checkpoints to resume from."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from semid import artifacts
from semid.errors import SemidError
from semid.training.tracking import HISTORY

REQUEST = "request.json"
# Written last into a checkpoint's folder: a folder without one was never finished.
_SEAL = "seal.json"
Scores = dict[int, float | None]


def best_of(scores: Scores) -> int | None:
    """The step with the highest score, the first one of equal scores; None without scores."""
    known = {step: score for step, score in scores.items() if score is not None}
    return max(known, key=lambda step: (known[step], -step), default=None)


def steps_to_keep(scores: Scores) -> set[int]:
    """The last two steps, and the best step as of each of them, since a run resumed from the second last needs it."""
    last_two = sorted(scores)[-2:]
    best = [best_of({s: score for s, score in scores.items() if s <= last}) for last in last_two]
    return {*last_two, *(step for step in best if step is not None)}


def log_now(folder: Path) -> dict[str, Any]:
    """Size and digest of a run's log as it is now."""
    log = folder / HISTORY
    size = log.stat().st_size if log.exists() else 0
    return {"bytes": size, "sha256": _sha256_of_start(log, size)}


def seal(step: Path, scores: Scores, log: dict[str, Any]) -> None:
    """Record the digests of a checkpoint and its request. `scores` are those of the steps until now, `log` is what
    `log_now` returned when the checkpoint was taken."""
    content = {
        "step": _number(step),
        "request": _request_digest(step),
        "files": _digests(step),
        "score": scores[_number(step)],
        "best": best_of(scores),
        "history": log,
    }
    artifacts.write_json(step / _SEAL, artifacts.sealed(content))


def damage(step: Path) -> str | None:
    """The first difference between a checkpoint and its seal; None if there is none."""
    try:
        sealed, found, request = _read(step), _digests(step), _request_digest(step)
    except (SemidError, OSError) as error:
        return " ".join(str(error).removeprefix(f"{step}/").split())
    if sealed["step"] != _number(step) or sealed["request"] != request:
        return f"{_SEAL}: of another step or run"
    for name in sorted(sealed["files"].keys() | found.keys()):
        if name not in found:
            return f"{name}: gone"
        if found[name] != sealed["files"].get(name):
            return f"{name}: changed"
    return None


def restorable(folder: Path) -> Scores:
    """Scores of the checkpoints up to the one to resume from: the last intact one whose best checkpoint is intact, too.
    Later ones are removed with a warning.

    Raises SemidError naming the damage if there is no such checkpoint, or if the log was changed before it.
    """
    steps = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=_number)
    damages = {step: found for step in steps if (found := damage(step))}
    seals = {step: _read(step) for step in steps if step not in damages}
    best = {step: folder / str(sealed["best"]) for step, sealed in seals.items() if sealed["best"] is not None}
    usable = [step for step in seals if best.get(step, step) in seals]
    if not usable:
        return _begin_again(folder, steps, damages | {step: "gone" for step in best.values() if step not in steps})
    last = usable[-1]
    for step in (step for step in steps if _number(step) > _number(last)):
        _forget(step, damages.get(step, "the best before it is damaged"), since=f"from step {last.name}")
    for step in (step for step in damages if _number(step) < _number(last)):
        artifacts.remove(step)  # its removal was interrupted, or it is not needed
    _check_history(folder / HISTORY, seals[last]["history"], step=last.name)
    return {_number(step): sealed["score"] for step, sealed in seals.items() if _number(step) <= _number(last)}


def _begin_again(folder: Path, steps: list[Path], damages: dict[Path, str]) -> Scores:
    """Remove the only checkpoint, which a killed run left unfinished. Raises SemidError if more was lost."""
    match list(damages.items()):
        case [(step, why)] if steps == [step] and not (step / _SEAL).exists():
            _forget(step, why, since="from the start")
        case [*_, (step, why)]:
            raise SemidError(
                f"{step}: damaged ({why}), and no other checkpoint stands in for it; delete {folder} and run again"
            )
    return {}


def _forget(step: Path, why: str, *, since: str) -> None:
    warnings.warn(f"{step}: damaged or never finished ({why}); training goes on {since}", stacklevel=2)
    artifacts.remove(step)


def _number(step: Path) -> int:
    return int(step.name)


def _read(step: Path) -> dict[str, Any]:
    """The seal of a checkpoint. Raises SemidError if it is missing or changed."""
    sealed = artifacts.read_json(step / _SEAL)
    if not isinstance(sealed, dict) or sealed.pop("sha256", None) != artifacts.sha256_json(sealed):
        raise SemidError(f"{step / _SEAL}: changed")
    return sealed


def _request_digest(step: Path) -> str:
    return artifacts.sha256_json(artifacts.read_json(step.parent / REQUEST))


def _digests(step: Path) -> dict[str, str]:
    files = (path for path in sorted(step.rglob("*")) if not path.is_dir() and path != step / _SEAL)
    return {str(path.relative_to(step)): artifacts.sha256(path) for path in files}


def _sha256_of_start(file: Path, size: int) -> str | None:
    """sha256 of a file's first `size` bytes; None without any."""
    if not size:
        return None
    with file.open("rb") as opened:
        return hashlib.sha256(opened.read(size)).hexdigest()


def _check_history(log: Path, written: dict[str, Any], *, step: str) -> None:
    """Raise SemidError if the log until `step` has changed; warn if it is missing."""
    if written["bytes"] and not log.exists():
        warnings.warn(f"{log}: gone; the records until step {step} are lost", stacklevel=3)
    elif _sha256_of_start(log, written["bytes"]) != written["sha256"]:
        again = f"delete it to go on without its records, or {log.parent} to begin again"
        raise SemidError(f"{log}: changed before step {step}; {again}")
