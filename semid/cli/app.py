"""The command line: `semid COMMAND ...`; `semid --help` lists the commands.

A command's module is imported once its name is known, with the handling of signals and errors already in place.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from semid import __version__
from semid.cli.cache import use_compilation_cache
from semid.cli.outcome import Outcome, Stopped, signals_raised
from semid.cli.verbosity import Verbosity, log_lines
from semid.errors import SemidError

COMMANDS = {
    "demo": "semid.cli.demo.Demo",
    "prepare": "semid.cli.prepare.Prepare",
    "tokenize": "semid.cli.tokenize.Tokenize",
    "graph": "semid.cli.graph.Graph",
    "vectors": "semid.cli.vectors.Vectors",
    "train": "semid.cli.train.Train",
    "compile": "semid.cli.compile.Compile",
    "sweep": "semid.cli.sweep.Sweep",
    "train-end-to-end": "semid.cli.train_end_to_end.TrainEndToEnd",
    "evaluate": "semid.cli.evaluate.Evaluate",
    "recommend": "semid.cli.recommend.Recommend",
    "catalog": "semid.cli.catalog.Catalog",
    "export": "semid.cli.export.Export",
    "export-program": "semid.cli.export.ExportProgram",
    "import-codes": "semid.cli.export.ImportCodes",
    "package": "semid.cli.package.Package",
    "report": "semid.cli.report.Report",
}

# Commands that train, and the trackers that show it (`semid.training.SINKS`).
TRAINING = ("demo", "sweep", "tokenize", "train", "train-end-to-end")
TRACKERS = ("tensorboard", "wandb", "mlflow")


def main(arguments: Sequence[str] | None = None) -> None:
    """Generative recommendation with semantic IDs: prepare, tokenize, train, evaluate, recommend, export, report.

    `semid COMMAND --help` explains a command, `semid demo` shows them at work, `semid --version` prints the version.
    Every command takes --quiet (only warnings, errors and results), --verbose, --debug (also tracebacks) and --config
    FILE.yaml, a file of options, which those of the command line override. Commands that train also take --track with
    one or more of tensorboard, wandb and mlflow, and --profile FOLDER, which traces ten steps of each training.
    """
    run_command(arguments, _run)


def run_command(
    arguments: Sequence[str] | None, run: Callable[[Sequence[str]], None], *, name: str | None = None
) -> None:
    """Call `run` with the words of a command line, without those of verbosity, as a command: with log lines, one line
    per error, and an exit status. `name` is the command's name, if it is not the first word."""
    words, verbosity = Verbosity.read(sys.argv[1:] if arguments is None else arguments)
    outcome = Outcome(words if name is None else [name, *words], debug=verbosity.debug)
    try:
        try:
            with signals_raised(), log_lines(verbosity.level):
                if "jax" not in sys.modules:  # otherwise JAX has already read its settings
                    verbosity.quiet_libraries()
                    use_compilation_cache()
                run(words)
        finally:
            sys.stdout.flush()  # raises here, where it is handled, if the reader of a pipe has ended
    except (Stopped, Exception) as error:
        raise SystemExit(outcome.report(error)) from None


def _run(words: Sequence[str]) -> None:
    if words == ["--version"]:
        print(__version__)
        return
    trackers, words = trackers_of(words)
    folder, words = profile_of(words)
    command = parse(words)
    from semid.training import join_processes, profiled, tracked_by

    join_processes()
    with tracked_by(*trackers), contextlib.nullcontext() if folder is None else profiled(folder):
        run(words[0], command)


def trackers_of(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Trackers named by `--track`, and the other words. Raises SemidError without names, or if nothing is trained."""
    from semid.cli.options import split_equals

    words = split_equals(words, "--track")
    if "--track" not in words:
        return [], list(words)
    _check_trains(words, "--track")
    at = words.index("--track")
    names = list(itertools.takewhile(TRACKERS.__contains__, words[at + 1 :]))
    if not names:
        word = next(iter(words[at + 1 :]), "") or "none"
        near = difflib.get_close_matches(word, TRACKERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SemidError(f"--track: expected some of {', '.join(TRACKERS)}, got {word}{hint}")
    return names, [*words[:at], *words[at + 1 + len(names) :]]


def _check_trains(words: Sequence[str], option: str) -> None:
    """Raise SemidError if an option of training is given to another command, or before the command's name."""
    if words[0] not in TRAINING:
        raise SemidError(f"{option}: expected after the name of a command that trains ({', '.join(TRAINING)})")


def profile_of(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder after `--profile`, and the other words. Raises SemidError without one, or if nothing is trained."""
    from semid.cli.options import split_equals

    words = split_equals(words, "--profile")
    if "--profile" not in words:
        return None, list(words)
    _check_trains(words, "--profile")
    at = words.index("--profile")
    folder = next(iter(words[at + 1 :]), "")
    if not folder or folder.startswith("-"):
        raise SemidError(f"--profile: expected a folder, got {folder or 'none'}")
    return folder, [*words[:at], *words[at + 2 :]]


def run(name: str, command: Any) -> None:
    """Run a command, and write its options into the artifact that it makes."""
    from semid.cli.config_files import write_beside
    from semid.training import on_first

    command.run()
    on_first(lambda: write_beside(name, command))


def parse(words: Sequence[str]) -> Any:
    """The command that these words describe, together with the file of options that they may name.

    Raises SystemExit after printing a message about a wrong word, or the help; SemidError for faults of the file.
    """
    import tyro

    from semid.cli.options import OPTIONS, REGISTRY, as_typed, check_once, file_of_options, hints

    name, rest = (words[0], list(words[1:])) if words else ("--help", [])
    if name.startswith("-"):
        shown: dict[str, Any] = {"description": inspect.getdoc(main), "config": OPTIONS, "registry": REGISTRY}
        return tyro.cli(_all_commands(), args=[name, *rest], prog="semid", **shown)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "semid --help lists them"
        print(f"semid: no command {name!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    file, rest = file_of_options(name, rest)
    cls, args = _load(name), as_typed(name, rest)
    check_once(name, args)

    def parsed(**default: Any) -> Any:
        with hints(name, rest), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* does not match any type in Union")  # a path, in PathOrUrl | None
            return tyro.cli(cls, args=args, prog=f"semid {name}", config=OPTIONS, registry=REGISTRY, **default)

    if file is None:
        return parsed()
    from semid.cli.config_files import with_file

    return with_file(cls, file, next(iter(args), ""), lambda default: parsed(default=default))


def _load(name: str) -> type:
    module, _, cls = COMMANDS[name].rpartition(".")
    found: type = getattr(importlib.import_module(module), cls)
    return found


def _all_commands() -> Any:
    """Choice of all commands, for their list and for shell completion."""
    import functools
    import operator
    from typing import Annotated

    import tyro

    kinds: list[Any] = [Annotated[_load(name), tyro.conf.subcommand(name)] for name in COMMANDS]
    return functools.reduce(operator.or_, kinds)
