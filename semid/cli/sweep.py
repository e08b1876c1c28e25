"""The command `semid sweep`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from semid import artifacts
from semid.cli.choices import PathOrUrl
from semid.cli.config_files import to_yaml
from semid.cli.console import console
from semid.cli.outcome import stopped_by
from semid.cli.space import Space
from semid.config import check_seed, difference
from semid.errors import SemidError
from semid.training import HISTORY, read_history

if TYPE_CHECKING:
    import optuna

METRIC = "validation/ndcg@10"
STUDY, PAGE = "study.db", "sweep.html"
_SHOWN = 5
# Failures allowed before the first success: more of them mean a fault that all trials share.
_FAILURES = 3
# Attempts to create the study's tables, which another process may be creating.
_TRIES = 10


@dataclass(frozen=True)
class Sweep:
    """Search for options of `semid train` (and of `semid tokenize`) by validation, with optuna; extra `sweep`.

    A trial trains a model in OUT/trials; its value is the best NDCG@10 of its validations, and test is never read.
    Failed trials are recorded. The same command resumes where it was stopped; started several times at once, the
    processes share the trials. At the end the best trials are printed, OUT/config.yaml has the options of the best one
    for `semid train --config`, and OUT/sweep.html shows which fields matter.
    """

    space: PathOrUrl
    """YAML file with options of `semid train` below `train:`, as for --config. A searched field has the value `{low:
    1e-4, high: 1e-2, log: true}` or `{choices: [a, b]}`. With options below `tokenize:`, some of them searched, each
    trial has its own catalogue."""
    out: PathOrUrl
    """Folder of the study and its trials."""
    trials: int = 20
    """Total number of trials, including earlier ones."""
    seed: int = 0
    """Seed of the search. The seed of training is an option of the space."""

    def run(self) -> None:
        check_seed(self.seed)
        if self.trials < 1:
            raise SemidError(f"--trials {self.trials}: expected at least 1")
        space = Space.read(self.space)
        folder = artifacts.local_only(self.out, "the study is a file of SQLite")
        study = _study(folder, space)
        _enqueue_killed(study)
        while (left := self.trials - len(_finished(study))) > 0:
            console.print(f"trial {self.trials - left + 1} of {self.trials}")
            self._trial(study, space)
        self._show(study, space, folder)

    def _trial(self, study: optuna.Study, space: Space) -> None:
        """Run the next trial, or an interrupted one again, and record its value or its failure."""
        import optuna

        trial = study.ask()
        # One sampler per trial: with one per process, all processes would draw the same numbers.
        study.sampler = optuna.samplers.TPESampler(
            seed=(self.seed * 1_000_003 + trial.number) % 2**32, constant_liar=True
        )
        folder = trial.user_attrs.get("folder", f"trials/{trial.number:04d}")
        trial.set_user_attr("folder", folder)
        trial.set_user_attr("owner", asdict(artifacts.Owner.this()))
        try:
            values = {name: one.suggest(trial, name) for name, one in space.searched.items()}
            value = _validated(space.commands(values, f"{self.out}/{folder}"), f"{self.out}/{folder}")
        except BaseException as error:
            if stopped_by(error) or not isinstance(error, Exception):  # a signal: the next process resumes the trial
                _enqueue_again(study, trial)
                raise
            line = artifacts.first_line(error)
            trial.set_user_attr("error", line)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            console.print(f"trial {trial.number} failed: {line}")
            _check_failures(study)
        else:
            study.tell(trial, value)
            console.print(f"trial {trial.number}: {METRIC} {value:.4f}")

    def _show(self, study: optuna.Study, space: Space, folder: Path) -> None:
        """Print the best trials; write the options of the best, and the page."""
        from semid.report import write_sweep

        done = [trial for trial in _finished(study) if trial.value is not None]
        if not done:
            raise SemidError(f"{folder}: no trial has a value; look at the messages above")
        done.sort(key=lambda trial: -float(trial.value or 0))
        table = Table("rank", "trial", METRIC.removeprefix("validation/"), *_labels(space.searched))
        for rank, trial in enumerate(done[:_SHOWN], 1):
            fields = [_short(trial.params[name]) for name in space.searched]
            table.add_row(str(rank), str(trial.number), f"{trial.value:.4f}", *fields)
        console.print(table)
        best = space.commands(done[0].params, f"{self.out}/{done[0].user_attrs['folder']}")["train"]
        text = f"# semid train --config {artifacts.CONFIG}\n{to_yaml(replace(best, out=f'{self.out}/best'))}"
        with artifacts.replacing(folder / artifacts.CONFIG) as temporary:
            temporary.write_text(text, encoding="utf-8")
        done.sort(key=lambda trial: trial.number)
        values = [(trial.number, float(trial.value or 0), trial.params) for trial in done]
        page = write_sweep(folder / PAGE, METRIC.removeprefix("validation/"), values, _importances(study, len(done)))
        console.print(f"best: semid train --config {self.out}/{artifacts.CONFIG}; importances: {page}")


def _study(folder: Path, space: Space) -> optuna.Study:
    """The study of a folder, new or existing. Raises SemidError if it has another space."""
    try:
        import optuna
    except ImportError:
        raise SemidError("a sweep needs the extra: pip install 'semid[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if (folder / artifacts.MANIFEST).is_file():
        raise SemidError(f"{folder}: is an artifact; choose another folder for the sweep (--out)")
    artifacts.try_file(folder / artifacts.CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    storage = _storage(f"sqlite:///{folder / STUDY}")
    study = optuna.create_study(study_name="sweep", storage=storage, direction="maximize", load_if_exists=True)
    before = study.user_attrs.get("space")
    if before is not None and (change := difference(before, space.plain)):
        raise SemidError(f"{folder}: a sweep of another space ({change}); choose another --out, or give that space")
    study.set_user_attr("space", space.plain)
    return study


def _storage(url: str) -> optuna.storages.RDBStorage:
    """The database of studies, new or existing; retries if another process is creating its tables at the same time."""
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError

    def opened() -> optuna.storages.RDBStorage:
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

    for _ in range(_TRIES):
        with contextlib.suppress(IntegrityError, OperationalError):
            return opened()
        time.sleep(0.2)
    return opened()


def _enqueue_killed(study: optuna.Study) -> None:
    """Queue again the trials whose process, on this machine, was killed."""
    import optuna

    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner")
        if owner is not None and artifacts.Owner(**owner).has_ended():
            with contextlib.suppress(ValueError, RuntimeError):  # another process has done it already
                _enqueue_again(study, optuna.trial.Trial(study, trial._trial_id))


def _enqueue_again(study: optuna.Study, trial: optuna.Trial) -> None:
    """Record a trial as interrupted, and queue its values again in the same folder."""
    import optuna

    trial.set_user_attr("interrupted", True)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs["folder"]})


def _finished(study: optuna.Study) -> list[Any]:
    """Trials that have a value or failed, except those ended by a signal."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "FAIL")]
    return [trial for trial in ended if "interrupted" not in trial.user_attrs]


def _check_failures(study: optuna.Study) -> None:
    finished = _finished(study)
    if len(finished) >= _FAILURES and all(trial.state.name == "FAIL" for trial in finished):
        raise SemidError(f"all {len(finished)} trials failed, the last by: {finished[-1].user_attrs.get('error')}")


def _validated(commands: dict[str, Any], folder: str) -> float:
    """Run a trial's commands, and return the best validation value that its training recorded."""
    import jax

    from semid.cli import app

    with contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)  # trials of other sizes do not reuse programs
        for name, command in commands.items():
            app.run(name, command)
    history = read_history(artifacts.resolved(f"{folder}/model") / HISTORY)
    values = [record[METRIC] for record in history if METRIC in record]
    if not values:
        raise SemidError(f"{folder}/model: no validation was recorded")
    return max(values)


def _importances(study: optuna.Study, trials: int) -> dict[str, float]:
    """Importance of each field for the value of trials (PED-ANOVA); empty for too few trials."""
    import optuna

    if trials < 4:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=False)
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (ValueError, RuntimeError):  # all values are equal
        return {}


def _labels(names: Iterable[str]) -> list[str]:
    """Last parts of names, or whole names if their last parts are equal."""
    last = {name: name.rpartition(".")[2] for name in names}
    return [part if [*last.values()].count(part) == 1 else name for name, part in last.items()]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
