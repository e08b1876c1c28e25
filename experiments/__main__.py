"""Run experiments, list them, and make tables of their results.

    python -m experiments list
    python -m experiments item-graph recipe --dataset ../shared/data/amazon14_beauty --seeds 0 1 2
    python -m experiments tiger --dataset data/mine --budget cpu --model.training.batch-size 512
    python -m experiments tiger --help                                     # every field of its config
    python -m experiments table runs/amazon14_beauty --baseline item-graph

Several experiments run one after the other in one folder; the name of a file runs all of its variants (`recipe` is
recipe.sasrec-text and the others), and experiments that another one needs run first. The same command again skips what
is finished, resumes what was interrupted, and refuses another dataset or other settings in the same folder. On several
hosts that share the folder, start it on each like `semid train`. Every command takes --quiet, --verbose and --debug.
"""

from __future__ import annotations

from collections.abc import Sequence

from semid.cli.app import run_command
from semid.cli.options import check_once


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the words of a command line."""
    run_command(arguments, _run, name="experiments")


def _run(words: Sequence[str]) -> None:
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    names, options = list(words[:first]), list(words[first:])
    if not names:
        print(__doc__)
        return
    from experiments import command, table  # imported here, as JAX reads its settings when it is imported

    check_once("experiments", options)
    match names:
        case ["list"]:
            command.print_list()
        case ["table", *folders]:
            table.main([*folders, *options])
        case _:
            command.run(names, options)


if __name__ == "__main__":
    main()
