"""Pages of the site that are made from code: every public name and every command has its place."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from semid.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hook", ROOT / "docs" / "tools" / "hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_documented_once_and_linked_elsewhere(hook):
    pages = {module.__name__: hook.reference(module) for module in hook.packages()}
    documented = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    assert {"semid", "semid.data", "semid.tokenizers.alignment", "quantizers", "seq_models"} < set(pages)
    assert len(documented) == len(set(documented))
    for module in hook.packages():
        page = pages[module.__name__]
        places = dict(re.findall(r"^- \[`(\w+)`\]\[(\S+)\]$", page, re.MULTILINE))
        own = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", page, re.MULTILINE)
        assert sorted([*places, *own]) == sorted(set(module.__all__) - {"__version__"})
        assert set(places.values()) <= set(documented)


def test_every_command_has_its_help(hook):
    page = hook.command_line()
    titles = set(re.findall(r"^#{2,3} semid (.*)$", page, re.MULTILINE))
    assert set(app.COMMANDS) | {"train sasrec", "tokenize rq-vae", "catalog append"} <= titles
    assert page.count("usage: semid ") == len(titles) + 1


def test_notebooks_have_no_output_and_become_pages(hook):
    notebooks = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
        assert hook.notebook_page(path).count("```python") == len(code)


def test_every_page_has_its_place_in_the_navigation():
    places = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert pages | notebooks <= places


def test_a_page_has_one_title(hook):
    """Its first heading is its name in the navigation."""
    named = re.findall(r"- ([^:\n]+): ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    texts = {there: (ROOT / here).read_text() for here, there in hook.ROOT_PAGES.items() if here.endswith(".md")}
    texts |= {f"notebooks/{file.stem}.md": hook.notebook_page(file) for file in (ROOT / "docs").rglob("*.ipynb")}
    texts |= {path: (ROOT / "docs" / path).read_text() for _, path in named if (ROOT / "docs" / path).is_file()}
    titles = {path: re.search(r"^# (.*)$", text, re.MULTILINE)[1] for path, text in texts.items()}
    assert titles == {path: title for title, path in named if path in texts}


def test_figures_are_drawn_and_shown():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "tools" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    shown = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert {file.stem for file in figures.FOLDER.glob("*.svg")} == set(figures.FIGURES)
    for name, draw in figures.FIGURES.items():
        assert re.search(rf"\((concepts/)?figures/{name}\.svg\)", shown)
        assert ElementTree.fromstring(draw().svg()).tag.endswith("svg")
