"""The command `semid vectors`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated

import tyro

from semid.cli.choices import PathOrUrl
from semid.cli.console import console
from semid.config import choices
from semid.data import Dataset
from semid.graphs import (
    AlphaRecConfig,
    ColumnConfig,
    FuseConfig,
    PpmiConfig,
    Signal,
    SmoothConfig,
    VectorColumn,
    add_column,
    neighbor_overlap,
)

_SIGNALS = {name: cls for name, cls in choices(Signal).items() if cls is not VectorColumn}


@dataclass(frozen=True)
class _Fuse(FuseConfig):
    """A FuseConfig whose signal is given by name."""

    __doc__ = FuseConfig.__doc__
    signal: tyro.conf.Suppress[tyro.conf.Fixed[Signal]] = PpmiConfig()
    signal_name: Annotated[str, tyro.conf.arg(name="signal")] = PpmiConfig.name
    """Collaborative vectors: ppmi (from co-occurrence), lightgcn, freedom, bm3, mmhcl, cm3 or alpharec, each with its
    defaults; or the name of a vector column, such as the item vectors of a trained model."""

    def plain(self) -> FuseConfig:
        """The config as it is stored."""
        kind = _SIGNALS.get(self.signal_name)
        signal = kind() if kind else VectorColumn(self.signal_name)
        has_column = kind is not None and any(f.name == "column" for f in fields(kind))
        if has_column and getattr(signal, "reads_content", True):  # LightGCN has the field, and does not read it
            signal = replace(signal, column=self.column)
        return FuseConfig(**{**{f.name: getattr(self, f.name) for f in fields(FuseConfig)}, "signal": signal})


_Column = (
    Annotated[SmoothConfig, tyro.conf.subcommand(SmoothConfig.name)]
    | Annotated[_Fuse, tyro.conf.subcommand(FuseConfig.name)]
    | Annotated[AlphaRecConfig, tyro.conf.subcommand(AlphaRecConfig.name)]
)


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True)
class Vectors:
    """Make a vector column from another one and training interactions, and write the dataset with it.

    Tokenizers and models read the new column (COLUMN_smooth, COLUMN_fuse or COLUMN_alpharec) like others, by --columns
    or --features. Items appended later need the column that it was made from.
    """

    dataset: PathOrUrl
    """Dataset folder."""
    out: PathOrUrl
    """Dataset folder to write: the same dataset with the new column."""
    way: _Column = SmoothConfig()
    """Method."""

    def run(self) -> None:
        config: ColumnConfig = self.way.plain() if isinstance(self.way, _Fuse) else self.way
        dataset = Dataset.load(self.dataset)
        source, before = config.read(dataset)
        made = add_column(dataset, config, out=self.out)
        after = made.vectors(f"{source}_{config.name}")
        console.print(f"made {after.shape[1]}-d vectors of {source} ({source}_{config.name})")
        console.print(
            f"of an item's 20 nearest by {source} {neighbor_overlap(before, after):.0%} are among its 20 by them"
        )
        console.print(f"dataset: {self.out}")
