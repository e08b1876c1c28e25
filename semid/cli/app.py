"""The command line: `semid prepare | tokenize | train | train-end-to-end | evaluate | recommend | catalog | export |
export-program | import-codes | package | report`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from semid import __version__
from semid.cli.catalog import Catalog
from semid.cli.evaluate import Evaluate
from semid.cli.export import Export, ExportProgram, ImportCodes
from semid.cli.package import Package
from semid.cli.prepare import Prepare
from semid.cli.recommend import Recommend
from semid.cli.report import Report
from semid.cli.tokenize import Tokenize
from semid.cli.train import Train
from semid.cli.train_end_to_end import TrainEndToEnd
from semid.errors import SemidError
from semid.training import join_processes

Command = (
    Annotated[tyro.conf.OmitArgPrefixes[Prepare], tyro.conf.subcommand("prepare")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[tyro.conf.OmitArgPrefixes[Train], tyro.conf.subcommand("train")]
    | Annotated[TrainEndToEnd, tyro.conf.subcommand("train-end-to-end")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Recommend, tyro.conf.subcommand("recommend")]
    | Annotated[Catalog, tyro.conf.subcommand("catalog")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[ExportProgram, tyro.conf.subcommand("export-program")]
    | Annotated[ImportCodes, tyro.conf.subcommand("import-codes")]
    | Annotated[Package, tyro.conf.subcommand("package")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Generative recommendation with semantic IDs: prepare, tokenize, train, evaluate, recommend, export, report.

    `semid --version` prints the version.
    """
    if list(sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(__version__)
        return
    command = tyro.cli(
        Command,
        args=arguments,
        prog="semid",
        description=main.__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.EnumChoicesFromValues),
    )
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            join_processes()
            command.run()
    except (SemidError, OSError) as error:
        print(f"semid: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"semid: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
