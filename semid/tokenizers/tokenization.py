"""`tokenize`: from a dataset's items to a catalogue of codes, with a report of their health."""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from quantizers import (
    CodeHealth,
    code_counts,
    health,
    linear_probe_r2,
    min_cost_reassign,
    neighbor_prefix_overlap,
    sinkhorn_reassign,
    tie_break,
)
from semid import artifacts
from semid.artifacts import Kind, Origin
from semid.catalog import CATALOG_FILE, Collisions, SemanticCatalog, warn_of_large_group
from semid.config import to_dict
from semid.data import Dataset, Histories
from semid.errors import SemidError, refuse_path
from semid.graphs import PpmiConfig, co_consumed
from semid.stage import Request, run_stage
from semid.tokenizers.blocks import map_blocks
from semid.tokenizers.kmeans import RQKmeansConfig, fit_kmeans
from semid.tokenizers.method import FitContext
from semid.tokenizers.tokenizer import ContentColumns, SemanticTokenizer, TokenizerConfig

HEALTH_FILE = "health.json"
# Collaborative health is computed from at most this many training interactions, those of sampled users.
_INTERACTIONS = 5_000_000
# Version of the `tokenize` stage; one more if some items lack the content that the signal trains on.
_VERSION = 1


def tokenize(
    dataset: Dataset,
    config: TokenizerConfig = TokenizerConfig(),
    *,
    out: str | Path | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> SemanticCatalog:
    """Fit a tokenizer, encode every item, resolve collisions, and write the catalogue artifact `out`.

    It holds `catalog.parquet`, `tokenizer.safetensors`, `health.json` and, if it was trained, `history.jsonl`. A stage
    (see `run_stage`): without `out` nothing is written. Training is shared over `mesh` (default: all devices); with
    several processes, each calls this with the same arguments.
    """
    refuse_path(dataset, "Dataset.load")
    config = config.resolved(dataset.num_items)
    reads_signal = any("vectors" in alignment.needs for alignment in config.alignment)
    version = _VERSION + (reads_signal and config.signal.lacks_content(dataset))
    request = Request(Kind.CATALOG, {"tokenizer": to_dict(config)}, dataset.parents, seed, version)
    result = run_stage(
        request,
        out,
        load=lambda path: _Tokenized(SemanticCatalog.load(path, version=0)),
        work=functools.partial(_tokenize, dataset, config, seed=seed, mesh=mesh),
        write=_Tokenized.write,
    )
    return result.catalog


@dataclass(frozen=True)
class _Tokenized:
    """A catalogue and, unless it was read from an artifact, its tokenizer and the health of its codes."""

    catalog: SemanticCatalog
    tokenizer: SemanticTokenizer | None = None
    health: dict[str, Any] | None = None

    def with_origin(self, origin: Origin) -> _Tokenized:
        return replace(self, catalog=self.catalog.with_origin(origin))

    def write(self, folder: Path) -> None:
        self.catalog.write(folder / CATALOG_FILE)
        if self.tokenizer is not None:
            self.tokenizer.write(folder)
        artifacts.write_json(folder / HEALTH_FILE, self.health)


def _tokenize(dataset: Dataset, config: TokenizerConfig, folder: Path, *, seed: int, mesh: Mesh | None) -> _Tokenized:
    content = ContentColumns.read(dataset, config.columns)
    context = FitContext(dataset, seed, folder, config.alignment, config.signal, mesh)
    tokenizer = SemanticTokenizer.fit_columns(content, config, context)
    vectors = content.vectors
    codes = tokenizer.encode(vectors)
    popularity = dataset.splits.train.popularity(dataset.num_items)
    catalog = _resolve_collisions(dataset, tokenizer, vectors, codes, popularity)
    before = health(codes, tokenizer.level_sizes)
    report = _health(before, catalog, tokenizer) | {"explained_variance": tokenizer.explained(vectors, codes=codes)}
    report |= _collaborative_health(before, tokenizer, vectors, codes, popularity, context)
    return _Tokenized(catalog, tokenizer, report)


def _resolve_collisions(
    dataset: Dataset,
    tokenizer: SemanticTokenizer,
    vectors: Float[np.ndarray, "items dim"],
    codes: Int[np.ndarray, "items level"],
    popularity: Int[np.ndarray, " items"],
) -> SemanticCatalog:
    """Build the catalogue, its collisions resolved by the configured policy."""
    policy, sizes = tokenizer.config.collisions, tokenizer.level_sizes
    if policy.adds_level:
        unique = tie_break(codes, popularity=popularity if policy is Collisions.POPULARITY else None)
        item = str(dataset.item_ids[int(unique.codes[:, -1].argmax())])
        warn_of_large_group(unique.level_size, item, sizes)
        codes, sizes = unique.codes, (*sizes, unique.level_size)
    if policy.moves_last_code:
        residuals, codebook = tokenizer.last_residuals(vectors, codes)
        reassign = sinkhorn_reassign if policy is Collisions.SINKHORN else min_cost_reassign
        try:
            codes = reassign(codes, residuals=residuals, codebook=codebook).codes
        except ValueError as error:
            raise SemidError(f"{error}; or choose the collision policy tie-break") from None
    return SemanticCatalog(
        dataset.item_ids, codes.astype(np.int32), sizes, policy.adds_level, source_columns=dataset.source_columns
    )


def _health(before: CodeHealth, catalog: SemanticCatalog, tokenizer: SemanticTokenizer) -> dict[str, Any]:
    """Health of levels, and of collisions before and after they are resolved, as in `health.json`."""
    after = level_health(catalog)
    return {
        "items": after["items"],
        "levels": after["levels"],
        "collisions": tokenizer.config.collisions.value,
        "collision_rate_before": before.collision_rate,
        "largest_group_before": before.largest_group,
        "collision_rate_after": after["collision_rate_after"],
    }


def level_health(catalog: SemanticCatalog) -> dict[str, Any]:
    """Health of a catalogue's levels and its collision rate: the whole `health.json` of imported codes."""
    measured = health(catalog.codes, catalog.level_sizes)
    counts = code_counts(jnp.asarray(catalog.codes), level_sizes=catalog.level_sizes)
    levels = [
        {"level": level, **asdict(of_level), "used": of_level.size - of_level.dead, "counts": counts[level].tolist()}
        for level, of_level in enumerate(measured.levels)
    ]
    return {"items": measured.items, "levels": levels, "collision_rate_after": measured.collision_rate}


def _collaborative_health(
    before: CodeHealth,
    tokenizer: SemanticTokenizer,
    vectors: Float[np.ndarray, "items dim"],
    codes: Int[np.ndarray, "items level"],
    popularity: Int[np.ndarray, " items"],
    context: FitContext,
) -> dict[str, Any]:
    """Collaborative information in the codes, per prefix; for an aligned tokenizer also in codes of content alone, by
    residual k-means of the same vectors and sizes. Empty if the dataset has too few interactions.

    If there are very many interactions, co-consumed items are those of sampled users; `collaborative_interactions` is
    the number of theirs.
    """
    if np.ptp(popularity) == 0 or len(codes) < 10:
        return {}
    train, window = context.dataset.splits.train, PpmiConfig().window
    is_drawn = window in [alignment.co_consumption_window for alignment in context.alignment]
    sample = train if is_drawn else _sampled_users(train)
    try:
        if sample is train:
            partners = context.co_consumption.partners(window)
        else:
            partners = co_consumed(sample, num_items=len(codes), window=window, seed=context.seed)
    except SemidError:
        return {}

    def measure(codes: Int[np.ndarray, "items level"], code_health: CodeHealth) -> dict[str, Any]:
        explained = linear_probe_r2(codes, np.log1p(popularity), level_sizes=tokenizer.level_sizes)
        return {
            "neighbors_sharing": neighbor_prefix_overlap(codes, partners).tolist(),
            "popularity_explained": explained.tolist(),
            "usage": [level.usage for level in code_health.levels],
        }

    result = {"codes": measure(codes, before)}
    if tokenizer.config.alignment:
        x = tokenizer.standardizer(vectors)
        with warnings.catch_warnings(action="ignore"):  # a reference may have fewer codes than the tokenizer
            content = fit_kmeans(x, RQKmeansConfig(tokenizer.level_sizes), seed=context.seed)
        reference = map_blocks(content.encode, x)
        result["content_only"] = measure(reference, health(reference, tokenizer.level_sizes))
    size = {} if sample is train else {"collaborative_interactions": int(sample.lengths.sum())}
    return {"collaborative": result} | size


def _sampled_users(histories: Histories) -> Histories:
    """Histories of users drawn by a fixed seed, at most `_INTERACTIONS` in all; of all users, if they have no more."""
    if histories.lengths.sum() <= _INTERACTIONS:
        return histories
    order = np.random.default_rng(0).permutation(len(histories))
    number = np.searchsorted(np.cumsum(histories.lengths[order], dtype=np.int64), _INTERACTIONS, side="right")
    return histories.take(np.sort(order[:number]))
