"""`quantizers` stands alone: jax, flax, optax, numpy, scipy, jaxtyping and the standard library."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import quantizers

ALLOWED = {"quantizers", "jax", "flax", "optax", "numpy", "scipy", "jaxtyping"} | sys.stdlib_module_names
FILES = sorted(Path(quantizers.__file__).parent.glob("**/*.py"))


def _imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_what_it_may(path):
    assert _imported(path.read_text()) <= ALLOWED


def test_control_the_check_sees_other_imports():
    assert _imported("def f():\n    import semid.data\n    from seq_models.trie import x") == {"semid", "seq_models"}


def test_every_exported_name_exists():
    assert all(hasattr(quantizers, name) for name in quantizers.__all__)
    assert quantizers.__all__ == sorted(quantizers.__all__)
