"""Who may import whom: every import of every source file, those inside functions and under TYPE_CHECKING included.

A module obeys the row of its longest prefix. `inside` are prefixes of this project's modules, `outside` top-level
packages of others; the standard library is open to all, and a package may import itself.
"""

import ast
import graphlib
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


BASE = {"semid.errors", "semid.config", "semid.artifacts", "semid.arrow", "semid.progress", "semid.notebooks"}
ARRAYS = {"numpy", "pyarrow", "jaxtyping"}
JAX = {"jax", "flax", "numpy", "jaxtyping"}
EVERYTHING = {"semid", "quantizers", "seq_models", "experiments"}

# One row a package, in the order in which they build on each other: nothing imports what stands below it.
RULES = {
    # The two libraries know neither each other nor semid.
    "quantizers": Rule(set(), JAX | {"optax", "scipy"}),
    "seq_models": Rule(set(), JAX),
    # The base.
    "semid.errors": Rule(set(), set()),
    "semid.caches": Rule(set(), set()),
    "semid.progress": Rule(set(), {"rich"}),
    "semid.notebooks": Rule({"semid.errors"}, {"pyarrow"}),
    "semid.config": Rule({"semid.errors"}, set()),
    "semid.arrow": Rule({"semid.errors"}, {"numpy", "pyarrow", "jaxtyping"}),
    "semid.artifacts": Rule(
        {"semid.errors", "semid.config", "semid.caches"}, {"numpy", "safetensors", "fsspec", "huggingface_hub"}
    ),
    # Data: no JAX. The builders alone know TFDS.
    "semid.data": Rule(BASE, ARRAYS | {"PIL", "fsspec", "datasets"}),
    "semid.data.builders": Rule(BASE | {"semid.data"}, ARRAYS | {"tensorflow_datasets"}),
    # What stands on data alone: none of these knows a tokenizer or a recommender.
    "semid.training": Rule(BASE | {"semid.data"}, JAX | {"optax", "orbax", "grain", "tensorboardX", "wandb", "mlflow"}),
    "semid.encoders": Rule(
        BASE | {"semid.data", "seq_models"},
        ARRAYS | JAX | {"scipy", "PIL", "safetensors", "sentencepiece", "tokenizers", "sentence_transformers"},
    ),
    "semid.catalog": Rule(BASE | {"semid.data", "seq_models"}, ARRAYS | {"tokenizers"}),  # of seq_models the trie
    "semid.stage": Rule(BASE | {"semid.data", "semid.training"}, {"jax"}),
    "semid.graphs": Rule(
        BASE | {"quantizers", "semid.data", "semid.encoders", "semid.stage"}, ARRAYS | JAX | {"optax", "scipy"}
    ),
    "semid.evaluation": Rule(BASE | {"semid.data"}, ARRAYS),
    "semid.recommender": Rule(
        BASE | {"seq_models", "semid.data", "semid.catalog", "semid.training", "semid.encoders", "semid.graphs"},
        ARRAYS | JAX | {"jinja2", "huggingface_hub", "flatbuffers"},
    ),
    # A tokenizer knows no generator, a generator no quantizer: they meet through the catalogue.
    "semid.tokenizers": Rule(
        BASE
        | {"quantizers", "semid.data", "semid.training", "semid.encoders", "semid.graphs", "semid.catalog"}
        | {"semid.stage"},
        ARRAYS | JAX,
    ),
    "semid.generators": Rule(
        BASE
        | {"seq_models", "semid.data", "semid.training", "semid.catalog", "semid.stage", "semid.recommender"}
        | {"semid.evaluation", "semid.graphs"},  # validated by the very search and metric that are reported
        ARRAYS | JAX | {"scipy"},
    ),
    "semid.bulk": Rule(
        BASE | {"semid.data", "semid.catalog", "semid.tokenizers"}, ARRAYS | JAX | {"distributed", "duckdb"}
    ),
    # Where a tokenizer and a generator do meet: end to end.
    "semid.joint": Rule(
        BASE
        | {"quantizers", "seq_models", "semid.data", "semid.training", "semid.encoders", "semid.catalog"}
        | {"semid.stage", "semid.recommender", "semid.tokenizers", "semid.generators", "semid.graphs"},
        ARRAYS | JAX | {"optax"},
    ),
    # The report reads result files, and the tags of a dataset's items.
    "semid.report": Rule(
        BASE | {"semid.catalog", "semid.data", "semid.evaluation"}, ARRAYS | {"jinja2", "plotly", "umap"}
    ),
    # The top: `semid` names where its public names are; nothing imports the command line or an experiment.
    "semid": Rule({"semid"}, set()),
    "semid.cli": Rule(EVERYTHING - {"experiments"}),
    "semid.__main__": Rule({"semid.cli"}, set()),
    "experiments": Rule(EVERYTHING),
}
TOP = ("semid.cli", "semid.__main__", "experiments")


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


def _cycle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a ring, if any do."""
    imports = {module: {name for name in _imports(source) if name in sources} for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_files_import_each_other():
    assert _cycle({_module(path): path.read_text(encoding="utf-8") for path in FILES}) == []


def test_a_cycle_is_caught():
    lazy = "def f():\n    from semid.catalog import catalog"
    sources = {"semid.catalog.catalog": "import semid.catalog.changes", "semid.catalog.changes": lazy}
    assert _cycle(sources)
    assert not _cycle(sources | {"semid.catalog.changes": "import json"})  # control


def test_every_row_is_of_something_that_exists():
    assert not [prefix for prefix in RULES if not _is_module(prefix)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantizers.residual", "from seq_models import beam_search"),
        ("quantizers.residual", "import semid.errors"),
        ("seq_models.search", "def f():\n    import quantizers.kmeans"),
        ("seq_models.search", "import optax"),
        ("semid.config", "import numpy"),
        ("semid.data.dataset", "import jax.numpy as jnp"),
        ("semid.data.dataset", "from semid import catalog"),
        ("semid.data.dataset", "from semid.data import builders\nimport tensorflow_datasets"),
        ("semid.graphs.lightgcn", "from semid.tokenizers import Signals"),
        ("semid.training.loop", "from semid.recommender import Recommender"),
        ("semid.catalog.updates", "from semid.tokenizers import SemanticTokenizer"),
        ("semid.tokenizers.tokenizer", "from semid.generators import generator_loss"),
        ("semid.generators.training", "from semid.tokenizers import RQVAE"),
        ("semid.generators.training", "from quantizers import health"),
        ("semid.generators.training", "from semid.cli import main"),
        ("semid.generators.training", "from semid.joint import MemoryBank"),
        ("semid.recommender.packaging", "from semid.tokenizers import SemanticTokenizer"),
        ("semid.recommender.stablehlo", "import optax"),
        ("semid.evaluation.evaluator", "if TYPE_CHECKING:\n    from semid.recommender import Recommender"),
        ("semid.report.page", "from semid.recommender import Recommender"),
        ("semid.joint.bank", "from semid.report import render"),
        ("semid", "from semid.cli import main"),
        ("semid.surprise", "import json"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantizers.residual", "import jax\nfrom quantizers.types import Quantized\nimport math"),
        ("semid.recommender.recommender", "from semid.data import Histories\nfrom semid import artifacts"),
        ("semid.generators.training", "from semid.evaluation import accuracy"),
        ("semid.joint.codes", "from quantizers import Distance\nfrom seq_models import Inputs"),
        ("semid.tokenizers.alignment", "from semid.graphs import ppmi"),
        ("semid.cli.app", "def f():\n    from semid.data.builders import read_movielens"),
        ("experiments.layout", "from semid.cli.app import run_command"),
    ],
)
def test_what_is_allowed_is_not(module, source):
    assert violations(module, source) == []
