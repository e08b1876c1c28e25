"""README and docs: the links, paths, commands and Python of every page work with the current code."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from experiments.command import Options, parsed
from experiments.experiment import chosen, experiments
from semid.catalog import remove
from semid.cli import app
from semid.cli.verbosity import Verbosity
from semid.encoders import with_text_vectors
from semid.generators import ConditionsConfig, GeneratorConfig, ObjectiveConfig
from semid.stage import store_dataset
from semid.tokenizers import RQKmeansConfig, TokenizerConfig
from semid.training import TrainingConfig
from seq_models import RQTransformerConfig, TransformerConfig

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
OWN = ("semid", "quantizers", "seq_models", "experiments")
FOLDERS = (*OWN, "tests", "docs")
OUTSIDE = re.compile(r"https?:|mailto:|#")
DIALECT = re.compile(
    r"\b(?:anew|beside|afresh|heard|handed over|hand(?:ing)? over|tombstones?|nobody|goes on|what is made of"
    r"|(?:one|a second|tokens|users|bytes) an item|one a (?:line|row|level|user))\b",
    re.IGNORECASE,
)
# Pages that may mention names of earlier versions.
FREE = {"CHANGELOG.md"}

SMALL = TokenizerConfig(method=RQKmeansConfig(level_sizes=(8, 8), iterations=2))
TINY = GeneratorConfig(
    model=RQTransformerConfig(backbone=TransformerConfig(dim=16, layers=1, hidden=16)),
    objective=ObjectiveConfig(repeats=True),  # no factor to compile
    training=TrainingConfig(epochs=0.1),
    validation_users=8,
)

ALONE = ("how-to/own-model", "how-to/own-quantizer")
_SHRUNK = """
from dataclasses import replace
import semid
from semid.generators import ObjectiveConfig
from semid.training import TrainingConfig
from seq_models import TransformerConfig
train, tiny = semid.train, TransformerConfig(dim=16, layers=1, hidden=16)
few = dict(objective=ObjectiveConfig(repeats=True), training=TrainingConfig(epochs=0.1), validation_users=8)
semid.train = lambda data, catalog, config, out: train(
    data, catalog, replace(config, model=replace(config.model, backbone=tiny), **few), out=out
)
"""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _links(text: str) -> list[str]:
    """Targets of links and images, outside of code."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", _prose(text)))
    return [target for target in targets if not OUTSIDE.match(target)]


def _prose(text: str) -> str:
    """The page without code blocks."""
    return re.sub(r"^(?: {4}[^\n]*|```.*?^```)$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(text: str) -> set[str]:
    """Link anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken(links: list[str], folder: Path) -> list[str]:
    """Links without a file, or without the heading that they name."""
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        file = folder / path
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text())):
            broken.append(link)
    return broken


def _python(text: str) -> list[str]:
    """Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _commands(text: str, program: str) -> list[list[str]]:
    """Arguments of each command line of `program` in the code blocks."""
    blocks = re.findall(r"^(?: {4}|\$ )(.*)$", text.replace("\\\n", " "), re.MULTILINE)
    lines = [shlex.split(line, comments=True) for line in blocks if line.startswith(f"{program} ")]
    return [line[len(shlex.split(program)) :] for line in lines]


def _unknown_names(code: str) -> list[str]:
    """Names that their modules do not have; methods are not checked. An unknown module raises ImportError."""
    tree, unknown = ast.parse(code), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OWN:
            module = importlib.import_module(node.module)
            unknown += [f"{node.module}.{name.name}" for name in node.names if not hasattr(module, name.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OWN:
            known = hasattr(importlib.import_module(node.value.id), node.attr)
            unknown += [] if known else [f"{node.value.id}.{node.attr}"]
    return unknown


def _parse(arguments: list[str]) -> object:
    """The command object parsed from arguments of `semid`; it is not run."""
    return app.parse(app.profile_of(app.trackers_of(Verbosity.read(arguments)[0])[1])[1])


@each_page
def test_no_page_holds_the_marks_of_a_merge(page):
    assert not re.search(r"^(?:<{7}|>{7}) ", page.read_text(), re.MULTILINE)


@each_page
def test_links_lead_to_files_and_headings(page):
    text = page.read_text()
    assert _broken(_links(text), page.parent) == []


def test_a_broken_link_would_be_found(tmp_path):
    (tmp_path / "there.md").write_text("# One heading: here\n")
    text = "[a](there.md#one-heading-here) [b](gone.md) [c](there.md#gone) `[d](e)`\n\n    [code](f)\n"
    assert _broken(_links(text), tmp_path) == ["gone.md", "there.md#gone"]


@each_page
def test_paths_in_backquotes_exist(page):
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", _prose(page.read_text()))
    assert page.name in FREE or [path for path in paths if not (ROOT / path).exists()] == []


@each_page
def test_commands_parse(page, tmp_path, monkeypatch):
    """In a folder with the page's YAML blocks as files; each block's first line is a comment with its name."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    for arguments in _commands(page.read_text(), "semid"):
        if arguments[0].startswith("--"):  # answered by the parser itself
            with pytest.raises(SystemExit) as stop:
                _parse(arguments)
            assert not stop.value.code
        else:
            assert _parse(arguments)


def test_a_wrong_option_would_be_found(capsys):
    (arguments,) = _commands("    semid evaluate --models runs/a \\\n        --dataset data/a    # comment", "semid")
    assert arguments == ["evaluate", "--models", "runs/a", "--dataset", "data/a"]
    with pytest.raises(SystemExit):
        _parse(arguments)
    assert "--models" in capsys.readouterr().err


# Options of other programs, and options that are read before those of a command.
OTHERS = {"--upgrade", "--require-hashes", "--no-warm", "--budget", "--workers", "--nthreads", "--nv", "--help"}
OTHERS |= {"--config", "--track", "--profile", "--quiet", "--verbose", "--debug", "--model", "--method", "--split-rule"}
OTHERS |= {"--xla_gpu_deterministic_ops", "--xla_tpu_spmd_rng_bit_generator_unsafe"}


@functools.cache
def _completion() -> str:
    """The shell completion script: all commands with their options and help."""
    script = io.StringIO()
    with contextlib.redirect_stdout(script), pytest.raises(SystemExit):
        app.parse(["--tyro-print-completion", "bash"])
    return script.getvalue()


@functools.cache
def _options() -> set[str]:
    return _option_words(_completion()) | OTHERS


def _option_words(text: str) -> set[str]:
    words = re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)
    return {re.sub(r"^--(model|method|split-rule)\.", "--", word) for word in words}


@each_page
def test_options_in_the_text_exist(page):
    assert page.name in FREE or _option_words(_prose(page.read_text())) - _options() == set()


def test_an_option_that_does_not_exist_would_be_found():
    assert _option_words("Unless `--split-rules` says so, or `--out`.") - _options() == {"--split-rules"}


def _bare_options(code: str) -> list[str]:
    """Strings of the code, except docstrings, that name an option outside parentheses and backquotes."""
    tree, bare = ast.parse(code), []
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.JoinedStr) else getattr(node, "value", None)
        if isinstance(text, str) and node not in docstrings | parts:
            bare += [text] if _option_words(re.sub(r"\([^()]*\)|`[^`]*`", "", text)) else []
    return bare


LIBRARY = [file for name in OWN[:3] for file in (ROOT / name).rglob("*.py") if "cli" not in file.parts]


def test_messages_for_users_of_python_name_the_parameter_before_the_option():
    bare = [text for file in LIBRARY for text in _bare_options(file.read_text())]
    assert [text for text in bare if "semid evaluate --model" not in text] == []  # a command, as the report shows it


def test_an_option_alone_would_be_found():
    code = '''"""Of --this."""\nsay(f"{a}: give --that, or {b}")\nsay("give those (--those), by `semid --them`")'''
    assert _bare_options(code) == ["f'{a}: give --that, or {b}'"]


def _current(text: str) -> str:
    """The text without blocks of commands that begin with `git checkout COMMIT`: these need that commit's code."""
    return re.sub(r"^    git checkout [0-9a-f]{7}\n(?: {4}.*\n)*", "", text, flags=re.MULTILINE)


def test_commands_of_an_earlier_commit_are_left_out():
    old = "    git checkout 927a479\n    python -m experiments.gone \\\n        --out x\n"
    assert _current(f"a\n\n{old}\nb\n") == "a\n\n\nb\n"
    assert _current("    python -m experiments.gone\n") == "    python -m experiments.gone\n"  # control


@each_page
def test_modules_that_are_run_exist(page):
    modules = re.findall(r"python -m (experiments[\w.]*)", _current(page.read_text()))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_commands_of_experiments_parse(monkeypatch):
    monkeypatch.delattr(TrainingConfig, "__tyro_markers__", raising=False)  # set where `semid tokenize` was imported
    of_all = {f"--{option.name}" for option in fields(Options)}  # the same for every experiment, and parsed once
    lines = set[tuple[str, ...]]()
    for file in (*(ROOT / "docs").glob("*.md"), *(ROOT / "experiments" / "configs").glob("*.py")):
        for words in _commands(_current(file.read_text()), "python -m experiments"):
            if words[0] not in ("list", "table") and "..." not in words:
                first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
                names, options = chosen(words[:first]), words[first:]
                own = {word for word in options if word.startswith("--")} - of_all
                lines |= {(name, *options) for name in (names if own else ["popularity"])}
    assert {"popularity", "mmgrec"} <= {name for name, *_ in lines}
    for name, *options in lines:
        parsed(name, experiments()[name], options)
    with pytest.raises(SystemExit):  # control
        parsed("mmgrec", experiments()["mmgrec"], ["--model.relation"])


def test_experiments_of_the_methods_exist():
    named = set(
        re.findall(r"\(experiment `([\w-]+)`\)|experiment `([\w-]+)` \|", (ROOT / "docs" / "methods.md").read_text())
    )
    files = {file.stem.replace("_", "-") for file in (ROOT / "experiments" / "configs").glob("*.py")}
    assert {"tiger", "item-knn"} <= {name for pair in named for name in pair if name} <= files


@each_page
def test_python_compiles_and_its_names_exist(page):
    for number, code in enumerate(_python(page.read_text())):
        compile(code, f"{page.name}, block {number}", "exec")
        assert _unknown_names(code) == []


def test_an_unknown_name_would_be_found():
    code = "import semid\nfrom semid.data import Dataset, Gone\nsemid.train(semid.tokenise(x.anything))\n"
    assert sorted(_unknown_names(code)) == ["semid.data.Gone", "semid.tokenise"]


@each_page
def test_prose_keeps_within_127_columns(page):
    long = [line for line in _prose(page.read_text()).splitlines() if len(line) > 127 and line[0] not in "|<"]
    assert long == []


@each_page
def test_plain_english(page):
    assert page.name in FREE or DIALECT.findall(_prose(page.read_text())) == []


def test_help_and_navigation_are_plain_english():
    assert "Dataset folder" in _completion()
    assert DIALECT.findall(_completion() + (ROOT / "mkdocs.yml").read_text()) == []


def test_dialect_would_be_found():
    text = "Codes are made anew, one an item, beside those that nobody has heard of and that were handed over."
    assert DIALECT.findall(text) == ["anew", "one an item", "beside", "nobody", "heard", "handed over"]


def test_readme_is_one_screen_and_runs(monkeypatch, capsys):
    """Its Python unchanged, with smaller models."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 85
    monkeypatch.setattr(semid, "tokenize", functools.partial(semid.tokenize, config=SMALL), raising=False)
    monkeypatch.setattr(semid, "train", functools.partial(semid.train, config=TINY), raising=False)
    (code,) = _python(text)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    top, printed = names["top"], capsys.readouterr().out
    assert len(top.item_ids[0]) == 5
    assert np.all(np.diff(top.scores) <= 0)
    assert str(top.item_ids) in printed


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder with tiny versions of everything that the pages' Python reads."""
    home, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    ids = ["B000142FVW", "B0009OMU0A", "B0012Y0ZG2", *(f"i{row}" for row in range(37))]
    titles, brands = [f"word{row % 5} thing{row % 3} plain" for row in range(40)], [f"b{row % 9}" for row in range(40)]
    items = pa.table({"item_id": ids, "title": titles, "brand": brands})
    bought = [
        (f"u{user}", ids[item], at, ("buy", "look")[at % 2])
        for user in range(24)
        for at, item in enumerate(rng.permutation(40)[:6])
    ]
    columns = ("user_id", "item_id", "timestamp", "event")
    interactions = pa.table(dict(zip(columns, zip(*bought, strict=True), strict=True)))
    for name, table in (("items", items), ("interactions", interactions)):
        pq.write_table(table, home / f"{name}.parquet")
    pq.write_table(pa.table({"history": [ids[:2]], "target": ["i1"]}), home / "held_out.parquet")
    made = with_text_vectors(semid.Dataset.from_tables(items, interactions, name="mine"), dim=6)
    dataset = store_dataset(made, home / "data" / "mine")
    catalog = semid.tokenize(dataset, SMALL, out=home / "runs" / "mine" / "catalog")
    recommender = semid.train(dataset, catalog, TINY, out=home / "runs" / "mine" / "model")
    conditions = ConditionsConfig(
        on_event=True, event_inputs=True, event_head=True, on_group="title", on_text="text_lsa"
    )
    semid.train(dataset, catalog, replace(TINY, conditions=conditions), out=home / "runs" / "mine" / "conditioned")
    recommender.save_pretrained(home / "package")
    for item_id in ids[-3:]:
        remove(home / "runs" / "mine" / "catalog", [item_id])
    return home


# Pages whose Python is run below, and pages with tests of their own.
RUN = ("catalog", "data", "generators", "packaging", "tokenizers", "graphs", "how-to/steer", "how-to/own-encoder")
RUN += ("how-to/code-health", "how-to/language-model", "configs", "conditions")
ELSEWHERE = {"README", "docs/end-to-end", "docs/stablehlo", "docs/tutorial", *(f"docs/{name}" for name in ALONE)}


def test_python_of_every_page_is_run_somewhere():
    with_python = {str(page.relative_to(ROOT).with_suffix("")) for page in PAGES if _python(page.read_text())}
    assert with_python == {f"docs/{name}" for name in RUN} | ELSEWHERE


@pytest.mark.parametrize("name", ALONE)
def test_python_of_a_page_that_adds_a_family_runs(shop, name):
    """In a separate process: the family would stay registered in later tests."""
    blocks = [_SHRUNK, *_python((ROOT / "docs" / f"{name}.md").read_text())]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=shop,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RUN)
def test_python_of_a_page_runs(shop, monkeypatch, name):
    """Run its blocks in order."""
    monkeypatch.chdir(shop)
    tokenize = semid.tokenize
    monkeypatch.setattr(
        semid, "tokenize", lambda data, *_, out: tokenize(data, SMALL, out=f"{out}_small"), raising=False
    )
    monkeypatch.setattr(semid, "train", functools.partial(semid.train, config=TINY), raising=False)
    tables = {"new_items": pa.table({"item_id": ["new"], "title": ["word1 thing2"], "brand": ["b1"]})}
    tables |= {f"{table}_frame": pq.read_table(shop / f"{table}.parquet") for table in ("items", "interactions")}
    tables["new_vectors"] = np.ones((1, 6), np.float32)
    drawn = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    names: dict = {"vectors": drawn[:, :6] if name == "packaging" else jnp.asarray(drawn), **tables}
    blocks = _python((ROOT / "docs" / f"{name}.md").read_text())
    assert blocks
    for number, code in enumerate(blocks):
        exec(compile(code, f"{name}.md, block {number}", "exec"), names)


def test_python_of_end_to_end_fits(shop, monkeypatch):
    """All blocks but the last, which needs a trained model; calls of the training are only bound to its signature."""
    monkeypatch.chdir(shop)
    signature, bound = inspect.signature(semid.train_end_to_end), []
    monkeypatch.setattr(
        semid, "train_end_to_end", lambda *given, **named: bound.append(signature.bind(*given, **named)), raising=False
    )
    *blocks, _ = _python((ROOT / "docs" / "end-to-end.md").read_text())
    for number, code in enumerate(blocks):
        exec(compile(code, f"end-to-end.md, block {number}", "exec"), {})
    assert [sorted(call.arguments) for call in bound] == [
        ["dataset", "out"],
        ["dataset", "image", "out", "text"],
        ["content", "dataset", "out"],
        ["content", "dataset", "out"],
    ]


def _versions(lock: str) -> set[str]:
    return set(re.findall(r"^[\w.-]+==[^\s;\\]+", (ROOT / lock).read_text(), re.MULTILINE))


def test_the_core_lock_is_part_of_the_development_lock():
    core, everything = _versions("requirements.lock"), _versions("requirements-dev.lock")
    assert core
    assert core < everything
