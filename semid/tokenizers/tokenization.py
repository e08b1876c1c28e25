"""`tokenize`: a dataset's items to a catalogue of codes, and what is to be known of their health."""

from __future__ import annotations

import functools
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from quantizers import (
    code_counts,
    health,
    linear_probe_r2,
    min_cost_reassign,
    neighbor_prefix_overlap,
    sinkhorn_reassign,
    tie_break,
)
from semid import artifacts
from semid.artifacts import Kind, Manifest
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.config import to_dict
from semid.data import Dataset, content_blocks
from semid.errors import SemidError
from semid.tokenizers.alignment import PpmiConfig, co_consumed
from semid.tokenizers.rqvae import RQVaeConfig, in_blocks
from semid.tokenizers.tokenizer import Collisions, RQKmeansConfig, SemanticTokenizer, TokenizerConfig, fit_kmeans
from semid.training import HISTORY, discard_checkpoints, on_first


def tokenize(
    dataset: Dataset,
    config: TokenizerConfig,
    *,
    out: Path,
    parents: dict[str, Manifest],
    seed: int = 0,
    mesh: Mesh | None = None,
) -> SemanticCatalog:
    """Fit a tokenizer, encode every item, resolve collisions, and write the catalogue artifact `out`.

    It holds `catalog.parquet`, `tokenizer.safetensors`, `health.json` and, if it was trained, `history.jsonl`. Where
    the same request was answered before, that catalogue is read and nothing is done. Of several processes each calls
    this with the same arguments; a training is shared over `mesh` (all devices), all else is done by each.
    """
    settings, folder = {"tokenizer": to_dict(config)}, out.with_name(f"{out.name}.checkpoints")
    trained = isinstance(config.method, RQVaeConfig)
    made = functools.partial(artifacts.is_current, out, kind=Kind.CATALOG, config=settings, parents=parents, seed=seed)
    if on_first(made):  # asked by each, the last might find what the first has just written
        if trained:  # a kill may have come between the artifact and this
            on_first(functools.partial(discard_checkpoints, folder))
        return SemanticCatalog.read(out / CATALOG_FILE)
    tokenizer = SemanticTokenizer.fit(dataset, config, seed=seed, folder=folder, mesh=mesh)
    vectors = np.concatenate(content_blocks(dataset, config.columns), axis=1)
    codes = tokenizer.encode(vectors)
    popularity = dataset.splits.train.popularity(dataset.num_items)
    catalog = _resolved(dataset, tokenizer, vectors, codes, popularity)
    report = _health(codes, catalog, tokenizer) | {"explained_variance": tokenizer.explained(vectors)}
    report |= _learned_of_users(dataset, tokenizer, vectors, codes, popularity, seed=seed)

    def write() -> None:
        with artifacts.write_artifact(out, kind=Kind.CATALOG, config=settings, parents=parents, seed=seed) as temporary:
            catalog.write(temporary / CATALOG_FILE)
            tokenizer.write(temporary)
            artifacts.write_json(temporary / "health.json", report)
            if trained:
                shutil.copy(folder / HISTORY, temporary / HISTORY)
        if trained:
            discard_checkpoints(folder)

    on_first(write)
    return catalog


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
        return SemanticCatalog(dataset.item_ids, broken.codes.astype(np.int32), (*sizes, broken.level_size), True)
    if policy.moves_last_code:
        residuals, codebook = tokenizer.last_residuals(vectors, codes)
        reassign = sinkhorn_reassign if policy is Collisions.SINKHORN else min_cost_reassign
        try:
            codes = reassign(codes, residuals=residuals, codebook=codebook).codes
        except ValueError as error:
            raise SemidError(f"{error}; or choose the collision policy tie-break") from None
    return SemanticCatalog(dataset.item_ids, codes.astype(np.int32), sizes, False)


def _health(
    codes: Int[np.ndarray, "items level"], catalog: SemanticCatalog, tokenizer: SemanticTokenizer
) -> dict[str, Any]:
    """Health per level and of collisions, before and after they are resolved, as `health.json` holds it."""
    before = health(codes, tokenizer.level_sizes)
    after = health(catalog.codes, catalog.level_sizes)
    counts = code_counts(jnp.asarray(catalog.codes), level_sizes=catalog.level_sizes)
    levels = [
        {"level": level, **asdict(of_level), "used": of_level.size - of_level.dead, "counts": counts[level].tolist()}
        for level, of_level in enumerate(after.levels)
    ]
    return {
        "items": before.items,
        "levels": levels,
        "collisions": tokenizer.config.collisions.value,
        "collision_rate_before": before.collision_rate,
        "largest_group_before": before.largest_group,
        "collision_rate_after": after.collision_rate,
    }


def _learned_of_users(
    dataset: Dataset,
    tokenizer: SemanticTokenizer,
    vectors: Float[np.ndarray, "items dim"],
    codes: Int[np.ndarray, "items level"],
    popularity: Int[np.ndarray, " items"],
    *,
    seed: int,
) -> dict[str, Any]:
    """What the codes know of the users, per prefix, and, for an aligned tokenizer, beside content alone: codes of
    residual k-means of the same vectors and sizes. Empty for a dataset with too few interactions to say."""
    if np.ptp(popularity) == 0 or len(codes) < 10:
        return {}
    try:
        partners = co_consumed(dataset.splits.train, num_items=len(codes), window=PpmiConfig().window, seed=seed)
    except SemidError:
        return {}

    def measured(of: Int[np.ndarray, "items level"]) -> dict[str, Any]:
        return {
            "neighbors_sharing": neighbor_prefix_overlap(of, partners).tolist(),
            "popularity_explained": linear_probe_r2(
                of, np.log1p(popularity), level_sizes=tokenizer.level_sizes
            ).tolist(),
            "usage": [level.usage for level in health(of, tokenizer.level_sizes).levels],
        }

    found = {"codes": measured(codes)}
    if tokenizer.config.alignment:
        x = tokenizer.standardizer(vectors)
        with warnings.catch_warnings(action="ignore"):  # a reference may have fewer codes than the tokenizer
            content = fit_kmeans(x, RQKmeansConfig(tokenizer.level_sizes), seed=seed)
        found["content_only"] = measured(in_blocks(content.encode, x))
    return {"collaborative": found}
