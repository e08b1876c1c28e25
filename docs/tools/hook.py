"""mkdocs hook: pages that come from elsewhere than `docs`: docstrings, the help of commands, notebooks, the root."""

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
# Files of the root that the site holds, by their names there.
OF_ROOT = {
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
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    made = {"reference/command-line.md": command_line(), "reference/index.md": overview()}
    made |= {_reference_page(module): reference(module) for module in packages()}
    made |= {there: (ROOT / here).read_text(encoding="utf-8") for here, there in OF_ROOT.items()}
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to notebooks and files of the root lead to their pages, those of the root into `docs` too."""
    depth = page.file.src_uri.count("/")
    markdown = markdown.replace(".ipynb)", ".md)")
    for here, there in OF_ROOT.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{here}", f"]({'../' * depth}{there}")
    return markdown.replace("](docs/", "](") if page.file.src_uri in OF_ROOT.values() else markdown


def packages() -> list[ModuleType]:
    """The libraries and their packages that name what is public."""
    modules = [importlib.import_module(name) for name in LIBRARIES]
    for module in list(modules):
        found = pkgutil.walk_packages(module.__path__, f"{module.__name__}.")
        modules += [importlib.import_module(info.name) for info in found if info.ispkg]
    return sorted((module for module in modules if hasattr(module, "__all__")), key=_order)


def overview() -> str:
    """Page of all packages: each with what it is and its public names."""
    parts = ["# Packages", "Every public name, by the package that has it. The names of `semid` itself are the way in."]
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
    """Page of a package: what it is, its own names by their docstrings, links to those of other packages."""
    homes = {name: home(name, module) for name in module.__all__ if name != "__version__"}
    own = [name for name, where in homes.items() if where == module.__name__]
    others = [f"- [`{name}`][{where}.{name}]" for name, where in homes.items() if where != module.__name__]
    head = [f"# {module.__name__}", inspect.getdoc(module) or "", "\n".join(others)]
    return "\n\n".join([*head, *(f"::: {module.__name__}.{name}" for name in own)])


def command_line() -> str:
    """Page of all commands: the help of each, and of the choices of each."""
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
