"""A pulse: the real main, on a small world, into a folder whose name has a space."""

import json

from semid.cli import main


def test_every_stage_of_a_small_world(tiny, tmp_path, capsys):
    out = tmp_path / "my demo"
    main(["demo", "--out", str(out), *["--num-items", "200", "--num-users", "150", "--epochs", "1"]])
    rows = {row["model"]: row for row in json.loads((out / "metrics.json").read_text())["rows"]}
    assert list(rows) == ["semid", "sasrec", "semid alone", "item graph", "popularity", "bigram", "oracle"]
    assert all(0 <= row["recall@10"] <= rows["oracle"]["recall@10"] for row in rows.values())
    made = {"dataset", "catalog", "graph", "model", "sasrec", "metrics.json", "examples.json", "catalog_tokens.json"}
    assert {path.name for path in out.iterdir()} == {*made, "users.parquet", "report.html"}
    assert len(json.loads((out / "catalog_tokens.json").read_text())["items"]) == 200
    assert f"$ semid report '{out}'\n" in capsys.readouterr().out
