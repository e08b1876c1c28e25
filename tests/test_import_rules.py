"""Who may import whom: every import of every source file, those inside functions and under TYPE_CHECKING included.

A module obeys the row of its longest prefix. `inside` are prefixes of this project's modules, `outside` top-level
packages of others; the standard library is open to all, and a package may import itself.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
OWN = ("semid", "quantizers", "seq_models", "experiments")
ANYTHING = None


class Rule(NamedTuple):
    inside: set[str]
    outside: set[str] | None = ANYTHING


BASE = {"semid.artifacts", "semid.config", "semid.errors"}
ARRAYS = {"numpy", "pyarrow", "jaxtyping"}
JAX = {"jax", "flax", "numpy", "jaxtyping"}
EVERYTHING = {"semid", "quantizers", "seq_models", "experiments"}

RULES = {
    # The two libraries know neither each other nor semid.
    "quantizers": Rule(set(), JAX | {"optax", "scipy"}),
    "seq_models": Rule(set(), JAX),
    # The base.
    "semid.errors": Rule(set(), set()),
    "semid.config": Rule({"semid.errors"}, set()),
    "semid.artifacts": Rule({"semid.errors", "semid.config"}, {"numpy", "safetensors"}),
    # Data and catalogue: no JAX. The builders alone know TFDS.
    "semid.data": Rule(BASE, ARRAYS | {"PIL", "grain"}),
    "semid.data.builders": Rule(BASE | {"semid.data"}, ARRAYS | {"tensorflow_datasets"}),
    "semid.catalog": Rule(BASE, ARRAYS),
    "semid.catalog_log": Rule(BASE | {"semid.catalog"}, ARRAYS),
    "semid.export": Rule(BASE | {"semid.catalog", "seq_models"}, ARRAYS | {"tokenizers"}),  # of seq_models the trie
    # Encoders, training, evaluation: none knows a model.
    "semid.encoders": Rule(
        BASE | {"semid.data"}, ARRAYS | JAX | {"scipy", "PIL", "safetensors", "sentencepiece", "tokenizers"}
    ),
    "semid.training": Rule(BASE, JAX | {"optax", "orbax", "grain", "rich", "tensorboardX"}),
    "semid.evaluation": Rule(BASE | {"semid.data", "semid.catalog"}, ARRAYS | {"rich"}),
    # Collaborative signals know no quantizer, the autoencoder no signal: alignment joins them.
    "semid.collaborative": Rule({"semid.errors", "semid.data.histories"}, {"numpy", "jaxtyping", "scipy"}),
    "semid.lightgcn": Rule(
        {"semid.errors", "semid.collaborative", "semid.data.histories"}, JAX | {"optax", "scipy", "rich"}
    ),
    "semid.autoencoder": Rule(BASE | {"quantizers", "semid.data", "semid.training"}, JAX),
    "semid.alignment": Rule(
        BASE
        | {"quantizers", "semid.data", "semid.training"}
        | {"semid.autoencoder", "semid.collaborative", "semid.lightgcn"},
        JAX,
    ),
    # A tokenizer knows no generator, a generator no quantizer: they meet through the catalogue.
    "semid.tokenizer": Rule(
        BASE
        | {"quantizers", "semid.data", "semid.training", "semid.catalog"}
        | {"semid.autoencoder", "semid.alignment"},
        ARRAYS | JAX,
    ),
    "semid.tokenization": Rule(
        BASE
        | {"quantizers", "semid.data", "semid.training", "semid.catalog"}
        | {"semid.autoencoder", "semid.alignment", "semid.tokenizer"},
        ARRAYS | JAX,
    ),
    "semid.bulk": Rule(
        BASE | {"semid.autoencoder", "semid.tokenizer", "semid.catalog"},
        ARRAYS | JAX | {"fsspec", "distributed", "duckdb"},
    ),
    "semid.growth": Rule(BASE | {"semid.catalog", "semid.catalog_log", "semid.bulk", "semid.tokenizer"}, ARRAYS),
    # What a model is, how it answers, what it learns; the recommender and its training are made of these.
    "semid.models": Rule(BASE | {"seq_models", "semid.catalog"}, ARRAYS | JAX),
    "semid.scorers": Rule(BASE | {"seq_models", "semid.models"}, ARRAYS | JAX),
    "semid.questions": Rule({"semid.errors", "semid.data.histories", "semid.scorers"}, ARRAYS | JAX),
    "semid.recommender": Rule(
        BASE
        | {"seq_models", "semid.catalog", "semid.catalog_log", "semid.training.state"}
        | {"semid.data.histories", "semid.data.features"}
        | {"semid.models", "semid.scorers", "semid.questions", "semid.handover", "semid.hub"},
        ARRAYS | JAX,
    ),
    "semid.program": Rule(
        BASE | {"semid.recommender", "semid.scorers", "semid.training.state"}, ARRAYS | {"jax", "flatbuffers"}
    ),
    # What goes with a model is files: no module here knows a tokenizer, a dataset or an evaluation.
    "semid.card": Rule({"semid.catalog"}, {"jinja2"}),
    "semid.handover": Rule(BASE | {"semid.catalog", "semid.card"}, set()),
    "semid.hub": Rule({"semid.errors"}, {"huggingface_hub"}),
    "semid.objective": Rule(
        BASE | {"seq_models", "semid.data.batches", "semid.training", "semid.models", "semid.recommender"},
        ARRAYS | JAX,
    ),
    "semid.generator": Rule(
        BASE
        | {"seq_models", "semid.data", "semid.catalog", "semid.training"}
        | {"semid.models", "semid.objective", "semid.recommender", "semid.handover"}
        | {"semid.evaluation"},  # validated by the very search and metric that are reported
        ARRAYS | JAX,
    ),
    # Where a tokenizer and a generator do meet: end to end.
    "semid.joint": Rule(
        BASE
        | {"quantizers", "seq_models", "semid.encoders", "semid.data", "semid.catalog", "semid.training"}
        | {"semid.autoencoder", "semid.tokenizer", "semid.models", "semid.objective", "semid.generator"}
        | {"semid.recommender", "semid.handover"},
        ARRAYS | JAX | {"optax"},
    ),
    # The report reads result files.
    "semid.report": Rule({"semid.artifacts", "semid.catalog", "semid.errors", "semid.report_catalog"}),
    "semid.report_catalog": Rule({"semid.artifacts", "semid.catalog", "semid.errors"}),
    # The top: `semid` re-exports; nothing imports the command line or an experiment.
    "semid": Rule({"semid"}, set()),
    "semid.cli": Rule(EVERYTHING),
    "semid.cli_catalog": Rule(EVERYTHING - {"experiments"}),
    "semid.cli_package": Rule({"semid.prepare", "semid.recommender"}, set()),
    "semid.cli_tokenize": Rule(EVERYTHING - {"experiments"}),
    "semid.cli_export": Rule(EVERYTHING - {"experiments"}),
    "semid.prepare": Rule(BASE | {"semid.data", "semid.encoders"}),
    "experiments": Rule(EVERYTHING),
}
TOP = (
    "semid.cli",
    "semid.cli_catalog",
    "semid.cli_tokenize",
    "semid.cli_export",
    "semid.cli_package",
    "experiments",
)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _imports(source: str) -> list[str]:
    """Modules that `source` imports; `from a import b` counts as `a.b` where that is a module of ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here: write the module's full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if _is_module(name) else str(node.module) for name in names]
    return found


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _rule(module: str) -> str | None:
    if module == "semid":
        return module
    return max((p for p in RULES if p != "semid" and _below(module, p)), key=len, default=None)


def violations(module: str, source: str) -> list[str]:
    """The imports of `source`, the text of `module`, that the table does not allow."""
    prefix = _rule(module)
    if prefix is None:
        return [f"{module} has no row in the table: add one"]
    rule, wrong = RULES[prefix], []
    for name in _imports(source):
        top = name.split(".")[0]
        if top in OWN:
            own = prefix != "semid" and _below(name, prefix)
            allowed = own or any(_below(name, p) for p in rule.inside)
            for closed in TOP:
                allowed = allowed and (not _below(name, closed) or any(_below(module, p) for p in TOP))
        else:
            allowed = top in sys.stdlib_module_names or rule.outside is ANYTHING or top in rule.outside
        wrong += [] if allowed else [f"{module} must not import {name}"]
    return wrong


FILES = sorted(path for folder in OWN for path in (ROOT / folder).rglob("*.py"))


def test_no_source_file_breaks_the_rules():
    assert len(FILES) > 40  # the walk finds the tree
    assert not [line for path in FILES for line in violations(_module(path), path.read_text(encoding="utf-8"))]


def test_every_row_is_of_something_that_exists():
    assert not [prefix for prefix in RULES if not _is_module(prefix)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantizers.residual", "from seq_models import beam_search"),
        ("quantizers.residual", "import semid.errors"),
        ("seq_models.search", "def f():\n    import quantizers.kmeans"),
        ("seq_models.search", "import optax"),
        ("semid.collaborative", "import jax"),
        ("semid.lightgcn", "from semid.alignment import Signals"),
        ("semid.autoencoder", "from semid.alignment import Signals"),
        ("semid.alignment", "from semid.tokenizer import TokenizerConfig"),
        ("semid.generator", "from semid.autoencoder import RQVAE"),
        ("semid.config", "import numpy"),
        ("semid.data.dataset", "import jax.numpy as jnp"),
        ("semid.data.dataset", "from semid import catalog"),
        ("semid.data.dataset", "from semid.data import builders\nimport tensorflow_datasets"),
        ("semid.training.loop", "from semid.data.dataset import Dataset"),
        ("semid.generator", "from quantizers import health"),
        ("semid.recommender", "from semid.data.dataset import Dataset"),
        ("semid.evaluation.evaluator", "if TYPE_CHECKING:\n    from semid.recommender import Recommender"),
        ("semid.report", "from semid.recommender import Recommender"),
        ("semid.handover", "from semid.tokenizer import SemanticTokenizer"),
        ("semid.tokenizer", "from semid.objective import code_loss"),
        ("semid.generator", "from semid.cli import main"),
        ("semid.generator", "from semid.joint import MemoryBank"),
        ("semid.joint.bank", "from semid.report import render"),
        ("semid", "from semid.cli import main"),
        ("semid.export", "from semid.recommender import Recommender"),
        ("semid.program", "import flax"),
        ("semid.surprise", "import json"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantizers.residual", "import jax\nfrom quantizers.types import Quantized\nimport math"),
        ("semid.recommender", "from semid.data.histories import Histories\nfrom semid import artifacts"),
        ("semid.generator", "from semid.evaluation.metrics import accuracy"),
        ("semid.joint.codes", "from quantizers import Metric\nfrom seq_models import Inputs"),
        ("semid.alignment", "from semid.autoencoder import RQVAE\nfrom semid.collaborative import ppmi"),
        ("semid.cli", "def f():\n    from semid.data.builders import read_movielens"),
        ("experiments.demo", "from semid.cli import main"),
    ],
)
def test_what_is_allowed_is_not(module, source):
    assert violations(module, source) == []
