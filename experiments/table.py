"""Tables of results: rows of finished runs as JSON, as Markdown, and between the markers of a page.

    python -m experiments table runs/amazon14_beauty                                # prints the tables
    python -m experiments table runs/amazon14_beauty --page docs/results.md         # docs/results.json too
    python -m experiments table --page docs/results.md                              # only from docs/results.json

A table of a page is between `<!-- table DATASET [NAME ...] -->` and `<!-- end of table -->`; names are those of
experiments or their files, by default all. Values are means and sample standard deviations over seeds. Differences of
Recall@10 are bootstrapped over users, with each example's value averaged over seeds (simulated worlds, which have
different users, are pooled). A `results.json` without `users` (from an earlier version, or with one target per user) is
read as one user per example.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float, Int

from experiments.experiment import chosen, experiments
from experiments.measurement import RESULTS
from semid import __version__
from semid.artifacts import read_json, replacing, write_json
from semid.errors import SemidError, did_you_mean
from semid.evaluation import paired_bootstrap

SEEN = ("included", "excluded")
COLUMNS = {
    "R@5": "recall@5",
    "N@5": "ndcg@5",
    "R@10": "recall@10",
    "N@10": "ndcg@10",
    "N@10 cold": "ndcg@10/popularity_cold",
    "coverage@10": "coverage@10",
    "Gini@10": "gini@10",
}
_SPLITS = {"GlobalTime": "_global_time", "HeldOutItems": "_held_out"}
_COLUMNS = 127  # of prose in pages
_MARKERS = "<!-- table DATASET --> and <!-- end of table -->"
_MARKED = re.compile(r"(<!-- table (\S+)((?: [\w.-]+)*) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Entry = dict[str, Any]


def main(words: Sequence[str]) -> None:
    """Run the words of `python -m experiments table`."""
    tyro.cli(_table, args=list(words), prog="python -m experiments table")


def _table(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (),
    baseline: str | None = None,
    experiments: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    page: Path | None = None,
    json: Path | None = None,
) -> None:
    """Print tables of finished runs, and write them.

    Args:
        folders: Folders of `python -m experiments`; none given: the rows of the JSON file.
        baseline: Row that the other rows are compared with; none given: item-graph, if there is one.
        experiments: Names of experiments or of their files; none given: all.
        seeds: Seeds of the folders' runs; none given: all.
        page: Page whose tables are updated, with the rows of the JSON file next to it.
        json: File of rows, to which those of the folders are added; none given: that of the page.
    """
    if not folders and (baseline or seeds):
        raise SemidError(f"--{'baseline' if baseline else 'seeds'} is of folders of runs; name some, or leave it out")
    file = json or (None if page is None else page.with_suffix(".json"))
    rows: list[Entry] = [] if file is None or not file.is_file() else read_json(file)["rows"]
    if not folders and not rows:
        raise SemidError(f"{file or 'table'}: no rows; name folders of runs, or a page or a JSON file that has some")
    if page is not None and not page.is_file():
        raise SemidError(f"{page}: no such page; make it, with {_MARKERS} where a table goes")
    if folders:
        fresh = entries(collected(folders, experiments, seeds), baseline or "item-graph")
        if baseline and baseline not in (names := {row["row"] for row in fresh}):
            raise SemidError(f"--baseline {baseline}: the folders have no such row{did_you_mean(baseline, names)}")
        rows = joined(rows, fresh)
    text = "" if page is None else rewritten(page.read_text(encoding="utf-8"), rows, where=str(page))
    if folders and file is not None:
        write_json(file, {"rows": rows})
    if page is not None:
        with replacing(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    wanted = chosen(experiments) if experiments else {row["experiment"] for row in rows}
    shown = [row for row in rows if row["experiment"] in wanted] or rows
    for dataset in dict.fromkeys(row["dataset"] for row in shown):
        print(f"\n{dataset}\n\n{markdown(rows, dataset, experiments)}")


def collected(folders: Sequence[Path], names: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The results of all finished runs in these folders. Raises SemidError if there are none."""
    wanted = chosen(names) if names else None
    found = [read_json(file) for folder in folders for file in sorted(folder.glob(f"*/{RESULTS}"))]
    kept = [
        record
        for record in found
        if (wanted is None or record["request"]["experiment"] in wanted)
        and (not seeds or record["request"]["seed"] in (None, *seeds))
    ]
    if not kept:
        where = ", ".join(map(str, folders))
        raise SemidError(f"{where}: no results of experiments; run some with `python -m experiments NAME --out ...`")
    return kept


def entries(records: Sequence[Mapping[str, Any]], baseline: str) -> list[Entry]:
    """One entry per dataset and row, with the values of every seed and the difference to the baseline.

    Raises SemidError for two results of one seed, and for seeds of unequal budget, settings, split or dataset.
    """
    by_row: dict[tuple[str, str], dict[int | None, Mapping[str, Any]]] = {}
    for record in records:
        for row in record["result"]["rows"]:
            of_seeds = by_row.setdefault((_dataset(record), row), {})
            if (seed := record["request"]["seed"]) in of_seeds:
                raise SemidError(f"{_dataset(record)}: two results of {row}, seed {seed}; name one folder of them")
            of_seeds[seed] = record
    return [
        _entry(dataset, row, of_seeds, by_row.get((dataset, baseline), {}), baseline)
        for (dataset, row), of_seeds in by_row.items()
    ]


def joined(rows: Sequence[Entry], fresh: Sequence[Entry]) -> list[Entry]:
    """All rows, with fresh ones replacing old ones, in the order of datasets and experiments."""
    by_row = {(row["dataset"], row["row"]): row for row in (*rows, *fresh)}
    order = list(experiments())
    place = {name: at for at, name in enumerate(order)}
    names = sorted(by_row, key=lambda key: (key[0], place.get(by_row[key]["experiment"], len(order)), key[1]))
    return [by_row[key] for key in names]


def _dataset(record: Mapping[str, Any]) -> str:
    """Name of the dataset, with its split if that is not leave-one-out, and its ties if they are shuffled."""
    evaluation = record["result"]["provenance"]["evaluation"]
    split = _SPLITS.get(evaluation["split_rule"]["type"], "")
    return str(evaluation["dataset"]) + split + ("" if "source order" in evaluation["tie_rule"] else "_shuffled")


def _entry(
    dataset: str,
    row: str,
    of_seeds: Mapping[int | None, Mapping[str, Any]],
    against: Mapping[int | None, Mapping[str, Any]],
    baseline: str,
) -> Entry:
    results = [record["result"] for record in of_seeds.values()]
    kinds = {seed: _kind(record) for seed, record in of_seeds.items()}
    for name in next(iter(kinds.values())):
        values = {seed: kind[name] for seed, kind in kinds.items()}
        if len(set(values.values())) > 1:
            listed = "; ".join(f"seed {seed}: {value or 'nothing'}" for seed, value in values.items())
            raise SemidError(
                f"{dataset}: {row}: seeds differ in {name} ({listed}); name folders or --seeds of one kind"
            )
    name = next(iter(of_seeds.values()))["request"]["experiment"]
    known, about = experiments().get(name), [result["provenance"] for result in results]
    title = name if known is None else known.title
    return {
        "dataset": dataset,
        "experiment": name,
        "row": row,
        "title": title + row.removeprefix(name),
        "seeds": list(of_seeds),
        "values": {
            seen: {
                metric: [result["rows"][row]["test"][seen].get(metric) for result in results]
                for metric in COLUMNS.values()
            }
            for seen in SEEN
        },
        "minutes": [_minutes(one["stages"]) for one in about],
        "semid": _distinct(one["semid"] for one in about),
        "commits": _distinct(commit for one in about for commit in _commits(one)),
        "machines": _distinct(_machine(one["machine"]) for one in about),
        "measured": _distinct(one["measured"] for one in about),
        "budget": about[0]["budget"],
        "changed": about[0]["changed"],
        "difference": _difference(row, of_seeds, baseline, against),
    }


def _kind(record: Mapping[str, Any]) -> dict[str, str]:
    """Properties of a run that all seeds of a row must share; each seed of the simulator has a dataset of its own."""
    provenance = record["result"]["provenance"]
    evaluation = provenance["evaluation"]
    rule = dict(evaluation["split_rule"])
    split = ", ".join([rule.pop("type"), *(f"{name} {value}" for name, value in rule.items())])
    dataset = "simulated" if evaluation["dataset"] == "simulated" else record["request"]["dataset"][:16]
    return {"budget": provenance["budget"], "changed": provenance["changed"], "split": split, "dataset": dataset}


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _commits(provenance: Mapping[str, Any]) -> list[str | None]:
    """Commits of all stages, then that of the measurement."""
    stages = [stage for of_run in provenance["stages"].values() for stage in of_run.values()]
    return [*(stage["commit"] for stage in stages), provenance["commit"]]


def _minutes(stages: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Minutes of all stages that the model needs, each once; None if one is unknown."""
    minutes = {stage["folder"]: stage["minutes"] for of_run in stages.values() for stage in of_run.values()}.values()
    return None if not minutes or None in minutes else round(sum(minutes), 2)


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['processor'] or 'processor not recorded'}, {machine['cores']} cores, {machine['devices']}"


def _difference(
    row: str,
    of_seeds: Mapping[int | None, Mapping[str, Any]],
    baseline: str,
    against: Mapping[int | None, Mapping[str, Any]],
) -> Entry | None:
    """Recall@10 of a row minus the baseline's on the same dataset, for their common seeds; a run without seeds is used
    for all."""

    def users(record: Mapping[str, Any]) -> str:
        return str(record["request"]["dataset"])

    pairs = [(record, against.get(seed, against.get(None))) for seed, record in of_seeds.items()]
    pairs = [(record, other) for record, other in pairs if other is not None and users(other) == users(record)]
    if row == baseline or not pairs:
        return None
    same_users = len({users(record) for record, _ in pairs}) == 1

    def recall(records: Sequence[Any], of_row: str) -> Float[np.ndarray, " n"]:
        values = [np.array(record["result"]["rows"][of_row]["recall@10"]) for record in records]
        return np.mean(values, axis=0) if same_users else np.concatenate(values)

    ours, theirs = zip(*pairs, strict=True)
    values = recall(ours, row), recall(theirs, baseline)
    of_users = _users([(*ours, *theirs)] if same_users else pairs)
    found = paired_bootstrap(*values, users=of_users)._asdict()
    return {"baseline": baseline, **found}


def _users(records: Sequence[Sequence[Any]]) -> Int[np.ndarray, " n"] | None:
    """Numbers of the examples' users, from the records of each dataset; None: one user per example."""
    stored = [next((one["result"]["users"] for one in some if "users" in one["result"]), None) for some in records]
    if None in stored:
        return None
    return np.concatenate([np.array(users) + (at << 32) for at, users in enumerate(stored)])


def markdown(rows: Sequence[Entry], dataset: str, names: Sequence[str] = ()) -> str:
    """The tables of a dataset, for all experiments or those named, in that order: with seen items, then without them
    where that differs; and their provenance."""
    own = [row for row in rows if row["dataset"] == dataset]
    if not own:
        raise SemidError(f"no rows of dataset {dataset!r}; those there are of {_distinct(r['dataset'] for r in rows)}")
    if names:
        there, own = own, [row for name in chosen(names) for row in own if row["experiment"] == name]
        if not own:
            experiments = ", ".join(_distinct(row["experiment"] for row in there))
            raise SemidError(f"no rows of dataset {dataset!r} and {', '.join(names)}; there are those of {experiments}")
    parts = [_grid(own, "included")]
    if others := [row for row in own if row["values"]["included"] != row["values"]["excluded"]]:
        parts += ["Seen items excluded, where that is another figure:", _grid(others, "excluded")]
    return "\n\n".join([*parts, _makers(own)])


def _grid(rows: Sequence[Entry], seen: str) -> str:
    baseline = next((row["difference"]["baseline"] for row in rows if row["difference"]), None)
    over = [] if baseline is None or seen != "included" else [f"R@10 over {baseline} [95%]"]
    head = ["model", "seeds", *COLUMNS, *over, "minutes", "commit"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [_cell(row["values"][seen][metric]) for metric in COLUMNS.values()]
        cells += [_interval(row["difference"], baseline)] if over else []
        minutes = [value for value in row["minutes"] if value is not None]
        seeds = ", ".join("-" if seed is None else str(seed) for seed in row["seeds"])
        cells += [f"{np.mean(minutes):.1f}" if minutes else "", ", ".join(row["commits"])]
        lines.append(f"| {' | '.join([_title(row), seeds, *cells])} |")
    return "\n".join(lines)


def _title(row: Entry) -> str:
    """The row's title, with a note on another version, budget or changed settings."""
    others = [f"semid {version}" for version in row["semid"] if version != __version__]
    others += [f"budget {row['budget']}"] if row["budget"] != "full" else []
    others += [row["changed"]] if row["changed"] else []
    return row["title"] + (f" ({', '.join(others)})" if others else "")


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    shown = _figure(float(np.mean(known)))
    return shown if len(known) == 1 else f"{shown} ± {_figure(float(np.std(known, ddof=1)))}"


def _figure(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1)


def _interval(difference: Mapping[str, Any] | None, baseline: str | None) -> str:
    """Mean and interval of a difference, with its baseline if that is not the column's."""
    if difference is None:
        return ""
    mean, low, high = (f"{difference[name]:+.4f}".replace("0.", ".", 1) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" + (f" over {difference['baseline']}" if difference["baseline"] != baseline else "")


def _makers(rows: Sequence[Entry]) -> str:
    machines = _distinct(machine for row in rows for machine in row["machines"])
    days = sorted({when[:10] for row in rows for when in row["measured"]})
    text = f"Machine: {'; '.join(machines)}. Test was read once per model, {' to '.join(days[:1] + days[1:][-1:])}."
    return textwrap.fill(text, _COLUMNS, break_on_hyphens=False)


def rewritten(page: str, rows: Sequence[Entry], *, where: str) -> str:
    """The page with its tables replaced by these rows. Raises SemidError for a page without tables."""
    if not _MARKED.search(page):
        raise SemidError(f"{where}: no table; expected {_MARKERS}")
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{markdown(rows, mark[2], mark[3].split())}\n\n{mark[4]}", page)


def print_results(result: Mapping[str, Any]) -> None:
    """Print the figures of one run."""
    for name, row in result["rows"].items():
        for split in [split for split in ("validation", "test") if split in row]:
            for seen in SEEN[: 1 if row[split]["included"] == row[split]["excluded"] else 2]:
                values = row[split][seen]
                figures = ", ".join(f"{head} {_figure(values[column])}" for head, column in list(COLUMNS.items())[:4])
                print(f"{name}, {split}, seen items {seen}: {figures}", flush=True)
