"""Metrics of lists written by `semid evaluate`: a table with intervals, and plots of accuracy by some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from semid.report.text import DASH, number, safe, words
from semid.report.users import error

_MEANINGS = {
    "novelty": (
        "Novelty",
        "how little known the items are: bits of surprise at one drawn from the training interactions",
    ),
    "diversity": ("Diversity", "one less the mean cosine of the vectors of two items of a list"),
    "code_diversity": ("Code diversity", "share of levels from the first on which the codes of two items differ"),
    "tag_entropy": ("Tag entropy", "spread of a list over tags, in bits: 0 where all items have one tag"),
    "calibration_kl": (
        "Calibration",
        "divergence of the tags of the history from those of the list, in bits: 0 is none",
    ),
    "serendipity": ("Serendipity", "share of users whose target the list holds and that of the bigram does not"),
    "worst_group": ("Worst group", "least NDCG of the thirds of users by length of their history"),
    "weak_users": ("Weak users", "share of users with a short history and an NDCG below the mean"),
}
_IN_FIGURES = ("novelty", "diversity", "code_diversity")  # the first two that are there
MAX_COLORS = 6  # models with a color of their own in the figures: the best


_SOURCES = {"vectors": "Vectors: column", "codes_of": "Codes: those of", "tags": "Tags: column"}


class About(NamedTuple):
    """Length of lists, and the inputs of their metrics; lists that differ in these are in separate tables."""

    k: int
    sources: tuple[str, ...]

    @classmethod
    def read(cls, lists: Mapping[str, Any]) -> About:
        """Entry of `metrics.json` on its lists."""
        return cls(lists["k"], tuple(f"{what} {lists[key]}" for key, what in _SOURCES.items() if lists.get(key)))


def list_sections(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """Table and plots of the rows with metrics of lists, for each kind of list."""
    return [_section(rows, about) for about in dict.fromkeys(about for row in rows for about in row["lists"])]


def _section(rows: Sequence[dict], about: About) -> dict[str, Any]:
    rows = [row | {"lists": row["lists"][about]} for row in rows if about in row["lists"]]
    columns = [key for key in _MEANINGS if any(key in row["lists"] for row in rows)]
    colored = [row["label"] for row in rows if row["model"] != "oracle"][:MAX_COLORS]
    figures = [_plane(rows, key, about.k, colored) for key in _IN_FIGURES if key in columns]
    return {
        **about._asdict(),
        "columns": [_MEANINGS[key][0] for key in columns],
        "meanings": [_MEANINGS[key] for key in columns],
        "rows": [(row, [_cell(row["lists"].get(key)) for key in columns]) for row in rows],
        "figures": figures[:2],
        "legend": [safe(label) for label in colored],
    }


def _cell(stated: Mapping[str, float] | None) -> tuple[str, str] | None:
    """A value, and its interval."""
    if stated is None:
        return None
    low, high = (f"{stated[end]:.3f}" for end in ("low", "high"))
    return f"{stated['value']:.3f}", f"{low}{DASH}{high}"


def _plane(rows: Sequence[dict], key: str, k: int, colored: Sequence[str]) -> dict[str, Any]:
    """A dot for each model: NDCG at `k` by a metric of its lists, with the intervals of both, in its legend's color."""
    ranking = f"ndcg@{k}"
    shown = [row for row in rows if key in row["lists"] and number(row["values"].get(ranking)) is not None]
    points = [row["lists"][key] for row in shown]
    return {
        "kind": "plane",
        "title": f"{words(ranking)} by {_MEANINGS[key][0].lower()}",
        "x_title": _MEANINGS[key][0],
        "y_title": words(ranking),
        "names": [safe(row["label"]) for row in shown],
        "oracle": [row["model"] == "oracle" for row in shown],
        "colors": [colored.index(row["label"]) if row["label"] in colored else None for row in shown],
        "x": [point["value"] for point in points],
        "below": [point["value"] - point["low"] for point in points],
        "above": [point["high"] - point["value"] for point in points],
        "y": [row["values"][ranking] for row in shown],
        "y_errors": [error(row["users"], ranking) for row in shown],
    }
