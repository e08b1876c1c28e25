"""The tutorial's commands and scripts in the order of the page, and the notebooks' code, on less data and training."""

import dataclasses
import functools
import http.server
import json
import re
import shlex
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import semid
from semid.cli import main
from semid.data import simulated
from semid.generators import GeneratorConfig
from semid.tokenizers import RQKmeansConfig, TokenizerConfig
from semid.training import TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
# Options that make a command of the tutorial small.
SMALLER = {
    "tokenize": ["rq-kmeans", "--level-sizes", "8", "8"],
    "train": ["--epochs", "0.2", "--validation-users", "8", "--dim", "16", "--layers", "1", "--hidden", "16"],
}
simulate = simulated.simulate


@pytest.fixture
def small_shop(monkeypatch):
    """The simulator makes the smallest shop, whatever is asked for."""
    few = {"num_items": 100, "num_users": 30, "max_length": 12, "mean_length": 7.0}
    monkeypatch.setattr(simulated, "simulate", lambda config: simulate(dataclasses.replace(config, **few)))


def _steps(text: str) -> list[str]:
    """Blocks of a page to run, in order: Python, files to save, command lines."""
    text = text.replace("\\\n", " ")
    return re.findall(r"^```(?:python|csv)\n.*?^```$|^ {4}(?:semid|head) [^\n]*$", text, re.MULTILINE | re.DOTALL)


def _run(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "head":  # head -51 FROM > TO
        lines = Path(words[2]).read_text().splitlines()[: -int(words[1])]
        Path(words[4]).write_text("\n".join(lines))
        return
    assert words[0] == "semid"
    main([*words[1:], *SMALLER.get(words[1], [])])


def _get(address: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_tutorial_runs(small_shop, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    *steps, serve = _steps((DOCS / "tutorial.md").read_text())
    assert len(steps) == 15
    for step in steps:
        language, _, body = step.removesuffix("```").partition("\n")
        if language == "```python":
            exec(compile(body, "tutorial.md", "exec"), {})
        elif language == "```csv":
            Path("new.csv").write_text(body)
        else:
            _run(step.strip())
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("perplexity", "of the graph", "1 items appended"))
    assert (tmp_path / "runs" / "shop" / "report.html").exists()
    _check_server(monkeypatch, serve)


def _check_server(monkeypatch, block: str) -> None:
    """Run the page's server at a free port, and ask it."""
    servers = []
    code = block.partition("\n")[2].removesuffix("```").replace("8080", "0")
    with monkeypatch.context() as patched:
        patched.setattr(http.server.HTTPServer, "serve_forever", lambda server: servers.append(server))
        exec(compile(code, "serve.py", "exec"), {})
    (server,) = servers
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://localhost:{server.server_port}/?history="
        status, answer = _get(f"{address}i0000003,i0000042")
        assert (status, len(answer["items"])) == (200, 10)
        status, answer = _get(f"{address}nothing")
        assert status == 400
        assert "nothing" in answer["error"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(small_shop, monkeypatch, path):
    """Its cells of code as they stand, but for the sizes of what is trained."""
    backbone = TransformerConfig(dim=16, layers=1, hidden=16)
    few = {"training": TrainingConfig(epochs=0.2), "validation_users": 8}
    train, small = semid.train, GeneratorConfig(model=RQTransformerConfig(backbone=backbone))
    monkeypatch.setattr(
        semid,
        "train",
        lambda dataset, catalog, config=small: train(dataset, catalog, dataclasses.replace(config, **few)),
        raising=False,
    )
    tokens = TokenizerConfig(method=RQKmeansConfig(level_sizes=(8, 8), iterations=2))
    if path.stem != "codes":  # which trains nothing
        monkeypatch.setattr(semid, "tokenize", functools.partial(semid.tokenize, config=tokens), raising=False)
    names: dict = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
