"""Map of the items: their content vectors in two dimensions by UMAP (extra `map`), colored by code and by category."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from semid.arrow import is_fixed_vector, read_parquet, to_matrix
from semid.catalog import SemanticCatalog
from semid.report.catalog import Items, numbered_categories
from semid.report.text import safe

MAX_POINTS = 2_000
_SEED, _NEIGHBORS = 0, 15


def item_map(items: Items, catalog: SemanticCatalog) -> dict[str, Any] | None:
    """Points of at most `MAX_POINTS` items, drawn by a fixed seed, with first code and category.

    None without UMAP, and for a dataset without vectors or with few items.
    """
    try:
        from umap import UMAP
    except ImportError:
        return None
    column = _vector_column(items)
    if column is None:
        return None
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(items.item_ids))[:MAX_POINTS])
    codes, known = catalog.find_rows(items.item_ids.take(rows))
    rows, codes = rows[known], codes[known]
    if len(rows) <= _NEIGHBORS:
        return None
    vectors = to_matrix(read_parquet(items.file, columns=[column])[column])[rows] if items.file else np.zeros((0, 1))
    settings = {"n_neighbors": _NEIGHBORS, "metric": "cosine", "random_state": _SEED, "n_jobs": 1}
    points: Float[np.ndarray, "n 2"] = UMAP(**settings).fit_transform(vectors.astype(np.float32))
    names, numbers = numbered_categories([items.categories[row] for row in rows])
    first: Int[np.ndarray, " n"] = catalog.codes[codes, 0]
    shared = {"kind": "map", "x": _rounded(points[:, 0]), "y": _rounded(points[:, 1])}
    shared["text"] = [safe(items.title(row) or items.item_ids[row].as_py()) for row in rows.tolist()]
    by_code = shared | {"title": "By first code", "size": catalog.level_sizes[0], "colors": first.tolist()}
    by_category = shared | {"title": "By category", "size": 0, "colors": numbers.tolist()}
    return {
        "column": column,
        "points": len(rows),
        "legend": names,
        "figures": [by_code, *([by_category] * bool(names))],
    }


def _vector_column(items: Items) -> str | None:
    """The dataset's first column of vectors."""
    if items.file is None:
        return None
    return next((field.name for field in pq.read_schema(items.file) if is_fixed_vector(field.type)), None)


def _rounded(values: Float[np.ndarray, " n"]) -> list[float]:
    return [round(value, 3) for value in values.tolist()]
