"""All that commands import, so that a child is ready at once."""

import importlib

from semid.cli.app import COMMANDS

for name in ("orbax.checkpoint", "grain", "duckdb", "plotly.offline", "semid.bulk.collisions", "semid.evaluation"):
    importlib.import_module(name)
for command in COMMANDS.values():
    importlib.import_module(command.rpartition(".")[0])
