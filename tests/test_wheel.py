"""The wheel, built from a copy of the tree and unpacked elsewhere: what it holds, and that it works without a checkout;
what importing costs, and which names it gives."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("semid", "quantizers", "seq_models")
FILES = ("pyproject.toml", "README.md", "LICENSE")
# Libraries that take long to import, and are not needed before a command or a function of theirs is.
SLOW = ("tensorflow_datasets", "plotly", "jinja2", "orbax", "grain", "PIL", "sentencepiece", "torch", "pandas")
HEAVY = ("jax", "flax", "optax", "numpy", "pyarrow", "scipy", "rich", "tyro", *SLOW)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what pip puts into site-packages."""
    home = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, home / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, home / "tree")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(home, "-m", "pip", "wheel", *options, "--wheel-dir", str(home), str(home / "tree"))
    (wheel,) = home.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(home / "site")
    return home / "site"


def run(cwd, *arguments, path=None):
    """Output of Python in a process of its own, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_it_holds_the_packages_whole_and_nothing_else(installed):
    def files(root):
        found = (path.relative_to(root) for name in PACKAGES for path in (root / name).rglob("*") if path.is_file())
        return {str(path) for path in found if path.suffix != ".pyc"}

    assert files(installed) == files(ROOT)
    assert {f"{package}/py.typed" for package in PACKAGES} < files(installed)
    assert {"semid/recommender/card.md.j2", "semid/report/report.html.j2"} < files(installed)
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == set(PACKAGES)


def test_it_prepares_csv_files_outside_the_checkout(installed, tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(4)))
    rows = "".join(f"u{user},i{n},{n}\n" for user in range(3) for n in range(4))
    (tmp_path / "interactions.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    script = """
import importlib.metadata, sys
import quantizers, seq_models, semid, semid.cli
for package in (quantizers, seq_models, semid, semid.cli):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
assert importlib.metadata.version("semid") == semid.__version__
semid.cli.main(["--version"])
semid.cli.main(["prepare", "csv", "--items", "items.csv", "--interactions", "interactions.csv", "--out", "data"])
print(semid.Dataset.load("data").num_items, "items")
"""
    printed = run(tmp_path, "-c", script, str(installed), path=installed)
    assert printed.startswith("0.")
    assert printed.endswith("4 items\n")


def test_importing_semid_imports_no_library():
    shown = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    assert run(ROOT, "-c", f"import semid; {shown}", path=ROOT).split() == []
    data = run(ROOT, "-c", f"import semid; semid.Dataset; {shown}", path=ROOT).split()
    assert data == ["numpy", "pyarrow"]  # and so the libraries would be seen
    assert not set(SLOW) & set(run(ROOT, "-c", f"import semid.cli, semid.joint; {shown}", path=ROOT).split())


def test_semid_shows_its_public_names_alone():
    import semid

    assert dir(semid) == semid.__all__
    assert all(getattr(semid, name) is not None for name in dir(semid))
    with pytest.raises(AttributeError, match="no attribute 'tokenise'"):
        _ = semid.tokenise


def test_a_report_without_plotly_says_what_to_install(tmp_path):
    script = """
import sys
sys.modules["plotly"] = sys.modules["plotly.offline"] = None
from semid import SemidError
from semid.report import write_report
try:
    write_report(["run"], "report.html")
except SemidError as error:
    print(error)
"""
    assert "pip install 'semid[report]'" in run(tmp_path, "-c", script, path=ROOT)
