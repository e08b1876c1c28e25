"""Reports of figures and the models that they are of."""

import re
import shutil

import pytest

from semid.artifacts import read_manifest, write_artifact
from semid.errors import SemidError
from semid.evaluation import write_metrics
from tests.semid.report.test_report import ROWS, _make_run, _page, _table_rows


@pytest.mark.parametrize("file", ["metrics.json", "metrics_validation.json"])
def test_figures_of_a_model_that_was_trained_again_are_refused(tmp_path, file):
    run = _make_run(tmp_path / "demo")
    digest = read_manifest(run / "model").digest
    models = {"runs/demo/model": digest, "runs/other/model": "0" * 64}  # two of one name
    write_metrics(run / file, "test", ROWS, {"dataset": "Tiny & Co", "models": models})
    assert _page(run)  # control
    for parents in ({"model": digest}, {}):
        shutil.rmtree(run / "model")
        with write_artifact(run / "model", kind="model", config={"seed": 1}, parents=parents) as folder:
            (folder / "weights").write_bytes(b"others")
        if parents:
            assert _page(run)  # its package
    with pytest.raises(SemidError, match=f"^{run}/model: not the model that {file} measured; evaluate again$"):
        _page(run)


@pytest.mark.parametrize("other", [{"runs/shop/model": "1" * 64}, {}])
def test_models_that_were_trained_on_another_dataset_have_a_table_of_their_own(tmp_path, other):
    runs = [_make_run(tmp_path / name) for name in ("demo", "shop")]
    rows = [row | ({"ndcg@10": 0.035} if row["model"] == "semid" else {}) for row in ROWS]
    about = {"dataset": "Tiny & Co", **({"trained_on_other_dataset": other} if other else {})}
    (runs[1] / "metrics.json").unlink()
    write_metrics(runs[1] / "metrics.json", "test", rows, about)
    page, heading = _page(*runs), "Tiny &amp; Co, test split"
    found = [title for title in re.findall("<h3>([^<]*)</h3>", page) if title.startswith("Tiny")]
    models = [row[0] for row in _table_rows(page)]
    if other:
        assert found == [heading, f"{heading}, with models trained on another dataset"]
        assert models == ["semid", "popularity", "oracle"] * 2
    else:  # control
        assert found == [heading]
        assert models == ["semid (shop)", "semid (demo)", "popularity", "oracle"]
