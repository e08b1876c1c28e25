"""mkdocs hook that adds pages from outside `docs`: docstrings, the help of commands, notebooks, files of the root."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LIBRARIES = ("semid", "quantizers", "seq_models")
# Files of the root that the site includes, and their names there.
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "Dockerfile": "Dockerfile",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append a page per package to the section Reference."""
    (reference,) = (section["Reference"] for section in config.nav or [] if "Reference" in section)
    reference += [{module.__name__: _reference_page(module)} for module in packages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {"reference/command-line.md": command_line(), "reference/index.md": overview()}
    pages |= {_reference_page(module): reference(module) for module in packages()}
    pages |= {there: (ROOT / here).read_text(encoding="utf-8") for here, there in ROOT_PAGES.items()}
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to notebooks and to files of the root at their pages, and links from those files into `docs`."""
    depth = page.file.src_uri.count("/")
    markdown = markdown.replace(".ipynb)", ".md)")
    for here, there in ROOT_PAGES.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{here}", f"]({'../' * depth}{there}")
    return markdown.replace("](docs/", "](") if page.file.src_uri in ROOT_PAGES.values() else markdown


def packages() -> list[ModuleType]:
    """The libraries and those of their packages that declare public names (`__all__`)."""
    modules = [importlib.import_module(name) for name in LIBRARIES]
    for module in list(modules):
        found = pkgutil.walk_packages(module.__path__, f"{module.__name__}.")
        modules += [importlib.import_module(info.name) for info in found if info.ispkg]
    return sorted((module for module in modules if hasattr(module, "__all__")), key=_order)


def overview() -> str:
    """Page of all packages, each with its docstring's first line and its public names."""
    parts = ["# Packages", "Every public name, by package. Start with the names of `semid` itself."]
    for module in packages():
        what = (inspect.getdoc(module) or "").partition("\n")[0]
        names = ", ".join(f"`{name}`" for name in module.__all__)
        parts += [f"## [{module.__name__}]({module.__name__}.md)", what, names]
    return "\n\n".join(parts)


def _order(module: ModuleType) -> tuple[int, str]:
    return LIBRARIES.index(module.__name__.partition(".")[0]), module.__name__


def _reference_page(module: ModuleType) -> str:
    return f"reference/{module.__name__}.md"


def home(name: str, module: ModuleType) -> str:
    """The package that documents a name of `module`: the one with the name that is nearest to the definition."""
    value = getattr(module, name)
    source = getattr(value, "__module__", None) or module.__name__
    holders = [other.__name__ for other in packages() if name in other.__all__ and getattr(other, name) is value]
    around = [holder for holder in holders if f"{source}.".startswith(f"{holder}.")]
    return max(around or [module.__name__], key=len)


def reference(module: ModuleType) -> str:
    """Page of a package: its docstring, its own names with their docstrings, links to names of other packages."""
    homes = {name: home(name, module) for name in module.__all__ if name != "__version__"}
    own = [name for name, where in homes.items() if where == module.__name__]
    others = [f"- [`{name}`][{where}.{name}]" for name, where in homes.items() if where != module.__name__]
    head = [f"# {module.__name__}", inspect.getdoc(module) or "", "\n".join(others)]
    return "\n\n".join([*head, *(f"::: {module.__name__}.{name}" for name in own)])


def command_line() -> str:
    """Page of all commands: the help of each command and of its choices."""
    parts = ["# Command line", "What `--help` prints of every command.", _fenced(_help([]))]
    for words in _commands([]):
        parts += [f"{'#' * (1 + len(words))} semid {' '.join(words)}", _fenced(_help(words))]
    return "\n\n".join(parts)


def _commands(words: list[str]) -> Iterator[list[str]]:
    """A command's subcommands, depth first, two words deep."""
    for name in re.findall(r"^[│ ]+• (\S+)", _help(words), re.MULTILINE):
        yield [*words, name]
        if not words:
            yield from _commands([name])


def _help(words: list[str]) -> str:
    from semid.cli import app

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit), _columns(92):
        app.parse([*words, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())


@contextlib.contextmanager
def _columns(width: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def notebook_page(path: Path) -> str:
    """A notebook as a page: its text, and its code in blocks."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in sources)
