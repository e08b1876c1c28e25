"""Bad input at the command line: one line, a nonzero exit, nothing written, little time and memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.faults.children import Ended, run_command

_ITEMS = "item_id,title\na,x\nb,y\nc,z\n"
_SEEN = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nu,c,3\n"
# Names and contents of files.
FILES: dict[str, bytes] = {
    "items.csv": _ITEMS.encode(),
    "seen.csv": _SEEN.encode(),
    "empty.csv": b"",
    "header.csv": b"item_id,title\n",
    "no_id.csv": b"name,title\na,x\n",
    "twice.csv": (_ITEMS + "a,again\n").encode(),
    "null_id.csv": (_ITEMS + ",w\n").encode(),
    "latin.csv": _ITEMS.replace("x", "\xe9").encode("latin-1"),
    "utf16.csv": _ITEMS.encode("utf-16"),
    "ragged.csv": (_ITEMS + "d,1,2,3\n").encode(),
    "quote.csv": (_ITEMS + 'd,"open\n').encode(),
    "zeros.csv": b"\0" * 4096,
    "unknown.csv": (_SEEN + "u,q,4\n").encode(),
    "bad_time.csv": (_SEEN + "u,a,soon\n").encode(),
    "no_time.csv": b"user_id,item_id\nu,a\n",
    "infinite.csv": (_SEEN + "u,a,inf\n").encode(),
    "null_user.csv": (_SEEN + ",a,5\n").encode(),
    "bad.jsonl": b'{"item_id": "a", "title": "x"}\n{"item_id": \n',
    "list.jsonl": b"[1, 2]\n",
    "deep.json": b"[" * 100_000,
    "bad.json": b"{",
    "list.json": b"[]",
    "noise.parquet": b"PAR1" + bytes(range(256)) * 8,
    "noise.bin": bytes(range(256)) * 64,
    "noise_ids.txt": b"\xff\xfe\xfa\n",
    "unknown_ids.txt": b"nobody\n",
    "config.json": b'{"epochz": 1}',
}
_CSV = "prepare csv --out {out}/d --items {in}/"
_MODEL, _CATALOG, _DATA = "--model {world}/model", "--catalog {world}/catalog", "--dataset {world}/dataset"
_TRAIN = f"train rq-transformer {_DATA} {_CATALOG} --out {{out}}/m"
INPUTS = (
    *(f"{_CSV}{name}.csv --interactions {{in}}/seen.csv" for name in (
        "empty", "header", "no_id", "twice", "null_id", "latin", "ragged", "quote", "zeros", "absent")),
    *(f"{_CSV}items.csv --interactions {{in}}/{name}.csv" for name in (
        "empty", "unknown", "bad_time", "no_time", "infinite", "null_user", "zeros", "absent")),
    _CSV + "bad.jsonl --interactions {in}/seen.csv",
    "prepare jsonl --out {out}/d --items {in}/bad.jsonl --interactions {in}/bad.jsonl",
    "prepare jsonl --out {out}/d --items {in}/list.jsonl --interactions {in}/list.jsonl",
    "prepare parquet --out {out}/d --items {in}/noise.parquet --interactions {in}/noise.parquet",
    "prepare parquet --out {out}/d --items {in} --interactions {in}",
    "prepare simulated --out {out}/d --num-items 3",
    "prepare simulated --out {out}/d --seed -1",
    "prepare simulated --out {out}/d --num-users many",
    "prepare simulated --out {in}/items.csv/d",
    "prepare simulated --out {in}",
    "tokenize --dataset {out}/absent --out {out}/c",
    "tokenize --dataset {world}/model --out {out}/c",
    f"tokenize {_DATA} --out {{out}}/c rq-vae --level-sizes 0 8",
    f"tokenize {_DATA} --out {{out}}/c rq-vae --epochs -1",
    f"tokenize {_DATA} --out {{out}}/c --columns absent",
    f"tokenize {_DATA} --out {{world}}/model",
    f"tokenize {_CATALOG} --out {{out}}/codes --input {{in}}/noise.parquet",
    f"tokenize {_CATALOG} --out {{out}}/codes --input {{in}}/absent-*.parquet",
    f"tokenize {_CATALOG} --out {{out}}/codes --input {{world}}/codes/new_items.parquet",
    "catalog append --catalog {world}/catalog --input {in}/noise.parquet",
    "catalog append --catalog {world}/catalog --input {in}/absent.csv",
    "catalog remove --catalog {world}/catalog --items nobody",
    "catalog remove --catalog {world}/catalog --file {in}/noise_ids.txt",
    "catalog apply --catalog {world}/catalog --change {in}/noise.parquet",
    "catalog apply --catalog {world}/catalog --change {world}/grown/changes/000002.parquet",
    "catalog verify {world}/dataset",
    _TRAIN + " --epochs nan",
    _TRAIN + " --batch-size 0",
    _TRAIN + " --heads 3",
    _TRAIN + " --learning-rate fast",
    _TRAIN + " --features absent",
    f"train rq-transformer {_DATA} --catalog {{world}}/model --out {{out}}/m",
    "train-end-to-end --out {out}/m --dataset {world}/dataset --config {in}/config.json",
    "train-end-to-end --out {out}/m --dataset {world}/dataset --config {in}/deep.json",
    "train-end-to-end --out {out}/m --dataset {world}/dataset --config {in}/list.json",
    f"evaluate {_MODEL} --dataset {{world}}/catalog --out {{out}}/m.json",
    f"evaluate {_MODEL} {_DATA} --out {{out}}/m.json --ks 0",
    f"evaluate {_MODEL} {_DATA} --out {{out}}/m.json --beam-size -5",
    f"evaluate {_MODEL} {_DATA} --out {{out}}/m.json --split train",
    f"recommend {_MODEL} --history nobody",
    f"recommend {_MODEL} --history a -k 0",
    f"recommend {_MODEL} --history [1",
    f"recommend {_MODEL} --history i0 --allow {{in}}/unknown_ids.txt",
    f"recommend {_MODEL} --history i0 --deny {{in}}/noise_ids.txt",
    f"package {_MODEL} --out {{out}}/p --metrics {{in}}/bad.json",
    f"package {_MODEL} --out {{out}}/p --metrics {{in}}/list.json",
    f"export-program {_MODEL} --out {{out}}/p -k 0",
    f"export {_CATALOG} --out {{out}}/t --format hf",
    f"import-codes {_DATA} --out {{out}}/c --codes {{in}}/deep.json",
    f"import-codes {_DATA} --out {{out}}/c --codes {{in}}/noise.bin",
    "report {out}/absent --out {out}/r.html",
    "report",
)  # fmt: skip
CONTROL = _CSV + "items.csv --interactions {in}/seen.csv"
_SECONDS, _TIMES_MEMORY = 5.0, 2.0


def measure(world: Path) -> dict[str, Any]:
    """Faults in the responses to all inputs, and the maximum time and memory next to those of a clean run."""
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "in").mkdir()
        for file, content in FILES.items():
            (home / "in" / file).write_bytes(content)
        clean, _ = _run(CONTROL, world, home)
        if clean.status:
            bad.append(f"control: {clean.text[-500:]}")
        ended = {line: _run(line, world, home) for line in INPUTS}
    for line, (end, written) in ended.items():
        bad += [f"{line}: {fault}" for fault in _faults(end, written, clean)]
    ends = [end for end, _ in ended.values()]
    figures = {
        "longest, s of the processor": round(max(end.seconds for end in ends), 2),
        "clean run, s of the processor": round(clean.seconds, 2),
        "most memory, MiB": round(max(end.mebibytes for end in ends)),
        "memory of a clean run, MiB": round(clean.mebibytes),
    }
    outcomes = Counter("fault" if any(_faults(*pair, clean)) else "one line" for pair in ended.values())
    return {"inputs": {"outcomes": dict(outcomes), "bad": bad}, "figures": {"outcomes": figures, "bad": []}}


def _run(line: str, world: Path, home: Path) -> tuple[Ended, list[str]]:
    """The end of a command, and the files that it has written or changed, including the world's."""
    out = home / "out"
    out.mkdir(exist_ok=True)
    places = {"world": world, "out": out, "in": home / "in"}
    before = _listed(home) | _listed(world)
    ended = run_command([word.format_map(places) for word in line.split()], log=home / "log.txt", seconds=120)
    after = _listed(home) | _listed(world)
    if line == CONTROL:
        return ended, []
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    return ended, sorted(str(path.relative_to(home if path.is_relative_to(home) else world)) for path in changed)


def _listed(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of all files but logs."""
    paths = (path for path in folder.rglob("*") if not path.name.startswith("log."))
    states = ((path, path.stat()) for path in paths)
    return {path: (0, 0) if path.is_dir() else (state.st_size, state.st_mtime_ns) for path, state in states}


def _faults(end: Ended, written: list[str], clean: Ended) -> list[str]:
    lines = [line for line in end.text.splitlines() if line.strip()]
    of_semid = [line for line in lines if line.startswith("semid")]
    boxed = bool(lines) and lines[0].startswith("╭")  # the parser's own message about wrong words
    faults = []
    if end.status not in (1, 2):
        faults.append(f"status {end.status}")
    if "Traceback" in end.text or "(unexpected;" in end.text or not (of_semid or boxed):
        faults.append(f"said {end.text[-400:]!r}")
    if written:
        faults.append(f"left {written}")
    if end.seconds > clean.seconds + _SECONDS:
        faults.append(f"took {end.seconds:.1f} s")
    if end.mebibytes > _TIMES_MEMORY * clean.mebibytes:
        faults.append(f"took {end.mebibytes:.0f} MiB")
    return faults
