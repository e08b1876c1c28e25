"""Speed of encoding files of vectors to files of codes, compared with reading, and of joining them into a catalogue.

    python -m experiments.benchmarks.bulk --out runs/bulk.json --plot docs/bulk.svg --folder /data/scratch

Every size is measured in a process of its own, so that its peak memory is of that size. The files are of random float16
vectors, as pyarrow writes them by default: 1.5 GB a million items, deleted after their size is done. Beyond ten files
they are hard links to the first ten: making ten million vectors takes longer than encoding them. Such items cannot be
joined, since their ids repeat.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from flax import nnx

from experiments.benchmarks.paired_timing import timed
from experiments.benchmarks.quantizers import CONFIG, DIM, encode_flops, matmul_rate, report
from semid.artifacts import Kind, try_file, write_artifact
from semid.bulk import encode_files, write_catalog
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.config import to_dict
from semid.data import Standardizer, VectorFile
from semid.tokenizers import BLOCK, RQVAE, SemanticTokenizer, TokenizerConfig

DISTINCT = 10  # files
LINES = {"read": "#888888", "encode": "#1f77b4", "encode on the cluster": "#2ca02c", "catalogue": "#d62728"}
_OPTIONS: dict[str, dict[str, Any]] = {"float16 plain": {"use_dictionary": False}}


def main(
    out: Path = Path("runs/bulk.json"),
    plot: Path = Path("runs/bulk.svg"),
    sizes: tuple[int, ...] = (100_000, 1_000_000, 10_000_000),
    rows: int = 100_000,
    workers: int = 0,
    folder: Path | None = None,
    keep: bool = False,
) -> None:
    """Measure, print, write JSON, and plot the microseconds per item.

    At the smallest size, float32, and float16 without a dictionary, are measured, too.

    Args:
        out: File to write.
        plot: SVG to draw.
        sizes: Items of the catalogues.
        rows: Items of a file.
        workers: Processes (with one thread each) of a local Dask cluster to measure, too; 0: none.
        folder: Folder for the files, 1.6 GB per million items; none given: a temporary folder.
        keep: Keep the files in `folder`, for another run.
    """
    out, plot = try_file(out), try_file(plot)
    rate = matmul_rate()
    figures: dict[str, Any] = {"floor, us/item": encode_flops(1) / rate / 1e3, "matmul, GFLOP/s": rate}
    runs = [(items, "float16") for items in sizes] + [(min(sizes), kind) for kind in ("float32", "float16 plain")]
    with tempfile.TemporaryDirectory(dir=folder) as home:
        catalog = write_tokenizer(Path(home) / "tokenizer")
        for items, kind in runs:
            base = folder if keep and folder else Path(home)
            paths = _alone(write_files, base / f"{items} {kind}", items, min(rows, items), kind)
            figures[f"{items} {kind}"] = _alone(measure, catalog, paths, Path(home) / "work", workers)
            if base != folder:
                for path in paths:
                    path.unlink()
    report(figures, out)
    draw({items: figures[f"{items} float16"] for items in sizes}, plot)


def measure(catalog: Path, paths: Sequence[Path], work: Path, workers: int) -> dict[str, float]:
    """Microseconds per item of reading, encoding and joining files, and peak memory of this process (or a worker)."""
    tokenizer = SemanticTokenizer.from_pretrained(catalog)
    options: dict[str, Any] = {"dim": tokenizer.dim, "id_column": "item_id", "columns": tokenizer.input_columns}
    files = [VectorFile.open(str(path), **options) for path in paths]
    items = sum(pq.read_metadata(path).num_rows for path in paths)
    with tempfile.TemporaryDirectory(prefix=work.name, dir=work.parent) as name:
        folder = Path(name)
        encode_files(tokenizer, paths[:1], folder / "warm")  # compiles
        seconds = {"read": timed(lambda: [None for file in files for _ in file.blocks(BLOCK)])}
        seconds["encode"] = timed(encode_files, tokenizer, paths, folder / "codes")
        found = {"peak memory, GiB": _peak()}
        if workers:
            seconds["encode on the cluster"], found["peak memory of a worker, GiB"] = _on_cluster(
                tokenizer, paths, folder / "cluster", workers
            )
        if len(paths) <= DISTINCT:
            codes = [str(folder / "codes" / path.name) for path in paths]
            seconds["catalogue"] = timed(write_catalog, codes, folder / "catalog", tokenizer=catalog)
            found["peak memory with the catalogue, GiB"] = _peak()
    found["GB"] = sum(path.stat().st_size for path in paths) / 1e9
    found |= {f"{what}, us/item": time / items * 1e6 for what, time in seconds.items()}
    return found | {
        "items per second": items / seconds["encode"],
        "times as long as reading": seconds["encode"] / seconds["read"],
    }


def _on_cluster(tokenizer: SemanticTokenizer, paths: Sequence[Path], out: Path, workers: int) -> tuple[float, float]:
    """Seconds, and the peak memory of the largest worker."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, protocol="tcp", dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        warm = out.with_name("warm cluster")
        encode_files(tokenizer, paths[:workers], warm, scheduler=cluster.scheduler_address)
        seconds = timed(encode_files, tokenizer, paths, out, scheduler=cluster.scheduler_address)
        return seconds, max(client.run(_peak).values())


def write_tokenizer(folder: Path) -> Path:
    """A catalogue with a tokenizer of the default size and random weights, which do not affect the speed."""
    x = np.random.default_rng(0).standard_normal((4096, DIM), dtype=np.float32)
    model = RQVAE(CONFIG, dim=DIM, rngs=nnx.Rngs(0))
    model.initialize(x, iterations=1, seed=0)
    tokenizer = SemanticTokenizer(TokenizerConfig(CONFIG), Standardizer.fit([x]), model)
    with write_artifact(folder, kind=Kind.CATALOG, config={"tokenizer": to_dict(tokenizer.config)}) as made:
        codes = tokenizer.encode(x[:1])
        SemanticCatalog(pa.array(["0"]), codes, tokenizer.level_sizes).write(made / CATALOG_FILE)
        tokenizer.write(made)
    return folder


def write_files(folder: Path, items: int, rows: int, kind: str) -> list[Path]:
    """Write files of random vectors, except existing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.parquet" for number in range(-(-items // rows))]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        if number >= DISTINCT:
            path.hardlink_to(paths[number % DISTINCT])
            continue
        here = min(rows, items - number * rows)
        x = np.random.default_rng(number).standard_normal((here, DIM), dtype=np.float32).astype(kind.split()[0])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), DIM)
        ids = pa.array([f"{number:05d}-{row:07d}" for row in range(here)])
        table = pa.table({"item_id": ids, "content": vectors})
        pq.write_table(table, path.with_suffix(".writing"), **_OPTIONS.get(kind, {}))
        path.with_suffix(".writing").rename(path)
    return paths


def draw(figures: dict[int, dict[str, float]], out: Path) -> None:
    """Plot microseconds per item over the number of items (logarithmic) as an SVG."""
    width, height, left, bottom = 560, 300, 60, 40
    shown = {
        line: {n: of[name] for n, of in figures.items() if name in of} for line in LINES if (name := f"{line}, us/item")
    }
    shown = {line: values for line, values in shown.items() if values}
    top = 1.1 * max(max(values.values()) for values in shown.values())
    low, high = np.log10(min(figures)), np.log10(max(figures))

    def at(items: int, value: float) -> tuple[float, float]:
        share = (np.log10(items) - low) / max(high - low, 1e-9)
        return left + 20 + share * (width - left - 190), height - bottom - value / top * (height - bottom - 20)

    parts = [f'<path d="M{left},10 V{height - bottom} H{width - 150}" fill="none" stroke="black"/>']
    parts += [_text(at(items, 0)[0], height - bottom + 18, f"{items:,}", "middle") for items in figures]
    parts += [_text(left - 6, at(min(figures), tick)[1] + 4, f"{tick:g}", "end") for tick in _ticks(top)]
    parts += [_text(left, height - 4, "items"), _text(8, 10, "us per item")]
    ends = sorted((at(max(values), values[max(values)])[1], line) for line, values in shown.items())
    label = -np.inf
    for end, line in ends:
        points = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in shown[line].items())
        parts.append(f'<polyline points="{points}" fill="none" stroke="{LINES[line]}" stroke-width="2"/>')
        label = max(end, label + 14)  # labels of lines with close ends are placed below each other
        parts.append(_text(width - 145, label + 4, line, color=LINES[line]))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n", encoding="utf-8"
    )


def _ticks(top: float) -> list[float]:
    step = next(
        step for power in range(-3, 9) for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if top < 6 * step
    )
    return [step * number for number in range(int(top / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = "black") -> str:
    style = f'font-family="sans-serif" font-size="12" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new process and return its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    tyro.cli(main)
