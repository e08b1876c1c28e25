"""`tokenize`: a dataset's items to a catalogue of codes, and what is to be known of their health."""

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
from semid.errors import SemidError
from semid.graphs import PpmiConfig, co_consumed
from semid.stage import Request, refuse_path, run_stage
from semid.tokenizers.blocks import map_blocks
from semid.tokenizers.kmeans import RQKmeansConfig, fit_kmeans
from semid.tokenizers.method import FitContext
from semid.tokenizers.tokenizer import ContentColumns, SemanticTokenizer, TokenizerConfig

HEALTH_FILE = "health.json"
# Training interactions that the collaborative health of codes is computed from, of users drawn where there are more.
_INTERACTIONS = 5_000_000
# Version of what `tokenize` does with the same settings; one more where items lack content that the signal trains on.
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
    (see `run_stage`): without `out` nothing is written. Training is shared over `mesh` (all devices); of several
    processes each calls this with the same arguments.
    """
    refuse_path(dataset, "Dataset.load")
    config = config.resolved(dataset.num_items)
    reads_signal = any("vectors" in alignment.needs for alignment in config.alignment)
    version = _VERSION + (reads_signal and config.signal.lacks_content(dataset))
    request = Request(Kind.CATALOG, {"tokenizer": to_dict(config)}, dataset.parents, seed, version)
    made = run_stage(
        request,
        out,
        load=lambda path: _Tokenized(SemanticCatalog.load(path, version=0)),
        work=functools.partial(_tokenized, dataset, config, seed=seed, mesh=mesh),
        write=_Tokenized.write,
    )
    return made.catalog


@dataclass(frozen=True)
class _Tokenized:
    """A catalogue, the tokenizer that made it and the health of its codes; these two None where they were not asked."""

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


def _tokenized(dataset: Dataset, config: TokenizerConfig, folder: Path, *, seed: int, mesh: Mesh | None) -> _Tokenized:
    content = ContentColumns.read(dataset, config.columns)
    context = FitContext(dataset, seed, folder, config.alignment, config.signal, mesh)
    tokenizer = SemanticTokenizer.fit_columns(content, config, context)
    vectors = content.vectors
    codes = tokenizer.encode(vectors)
    popularity = dataset.splits.train.popularity(dataset.num_items)
    catalog = _resolved(dataset, tokenizer, vectors, codes, popularity)
    before = health(codes, tokenizer.level_sizes)
    report = _health(before, catalog, tokenizer) | {"explained_variance": tokenizer.explained(vectors, codes=codes)}
    report |= _collaborative_health(before, tokenizer, vectors, codes, popularity, context)
    return _Tokenized(catalog, tokenizer, report)


def _resolved(
    dataset: Dataset,
    tokenizer: SemanticTokenizer,
    vectors: Float[np.ndarray, "items dim"],
    codes: Int[np.ndarray, "items level"],
    popularity: Int[np.ndarray, " items"],
) -> SemanticCatalog:
    """The catalogue after the configured policy."""
    policy, sizes = tokenizer.config.collisions, tokenizer.level_sizes
    if policy.adds_level:
        broken = tie_break(codes, popularity=popularity if policy is Collisions.POPULARITY else None)
        item = str(dataset.item_ids[int(broken.codes[:, -1].argmax())])
        warn_of_large_group(broken.level_size, item, sizes)
        codes, sizes = broken.codes, (*sizes, broken.level_size)
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
    """Health per level and of collisions, before and after they are resolved, as `health.json` holds it."""
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
    """Health of a catalogue's codes per level, and of the collisions in it: all of `health.json` for imported codes."""
    found = health(catalog.codes, catalog.level_sizes)
    counts = code_counts(jnp.asarray(catalog.codes), level_sizes=catalog.level_sizes)
    levels = [
        {"level": level, **asdict(of_level), "used": of_level.size - of_level.dead, "counts": counts[level].tolist()}
        for level, of_level in enumerate(found.levels)
    ]
    return {"items": found.items, "levels": levels, "collision_rate_after": found.collision_rate}


def _collaborative_health(
    before: CodeHealth,
    tokenizer: SemanticTokenizer,
    vectors: Float[np.ndarray, "items dim"],
    codes: Int[np.ndarray, "items level"],
    popularity: Int[np.ndarray, " items"],
    context: FitContext,
) -> dict[str, Any]:
    """Collaborative information in the codes, per prefix, and for an aligned tokenizer also in those of content alone:
    residual k-means of the same vectors and sizes. Empty for a dataset with too few interactions.

    Of very many interactions co-consumed items are those of some users, whose `collaborative_interactions` are stated.
    """
    if np.ptp(popularity) == 0 or len(codes) < 10:
        return {}
    train, window = context.dataset.splits.train, PpmiConfig().window
    is_counted = window in [alignment.co_consumption_window for alignment in context.alignment]
    some = train if is_counted else _some_users(train)
    try:
        if some is train:
            partners = context.co_consumption.partners(window)
        else:
            partners = co_consumed(some, num_items=len(codes), window=window, seed=context.seed)
    except SemidError:
        return {}

    def measured(codes: Int[np.ndarray, "items level"], found: CodeHealth) -> dict[str, Any]:
        explained = linear_probe_r2(codes, np.log1p(popularity), level_sizes=tokenizer.level_sizes)
        return {
            "neighbors_sharing": neighbor_prefix_overlap(codes, partners).tolist(),
            "popularity_explained": explained.tolist(),
            "usage": [level.usage for level in found.levels],
        }

    result = {"codes": measured(codes, before)}
    if tokenizer.config.alignment:
        x = tokenizer.standardizer(vectors)
        with warnings.catch_warnings(action="ignore"):  # a reference may have fewer codes than the tokenizer
            content = fit_kmeans(x, RQKmeansConfig(tokenizer.level_sizes), seed=context.seed)
        reference = map_blocks(content.encode, x)
        result["content_only"] = measured(reference, health(reference, tokenizer.level_sizes))
    drawn = {} if some is train else {"collaborative_interactions": int(some.lengths.sum())}
    return {"collaborative": result} | drawn


def _some_users(histories: Histories) -> Histories:
    """Histories of users drawn by a fixed seed, of `_INTERACTIONS` at most; all, where there are no more."""
    if histories.lengths.sum() <= _INTERACTIONS:
        return histories
    order = np.random.default_rng(0).permutation(len(histories))
    number = np.searchsorted(np.cumsum(histories.lengths[order], dtype=np.int64), _INTERACTIONS, side="right")
    return histories.take(np.sort(order[:number]))
