"""The files of docs/cluster: what they start exists, with these options; YAML that names what the code reads."""

import shlex
from pathlib import Path

import click
import pytest
import yaml
from distributed.cli.dask_scheduler import main as dask_scheduler
from distributed.cli.dask_worker import main as dask_worker

from semid.cli import main
from semid.cli.prepare import Prepare
from semid.cli.tokenize import Tokenize
from semid.cli.train import Train
from semid.training import processes

DOCS = Path(__file__).parents[3] / "docs"
DASK = {"scheduler": dask_scheduler, "worker": dask_worker}


def _documents(file: Path) -> list[dict]:
    return list(yaml.safe_load_all(file.read_text()))


def _containers(file: Path) -> list[dict]:
    specs = [document["spec"]["template"]["spec"] for document in _documents(file) if document["kind"] != "Service"]
    return [container for spec in specs for container in spec["containers"]]


def _commands(file: Path) -> list[list[str]]:
    """The command lines of semid and Dask in a script or page, or of containers."""
    if file.suffix == ".yaml":
        return [container["command"] for container in _containers(file)]
    lines = file.read_text().replace("\\\n", " ").splitlines()
    words = [
        shlex.split(line, comments=True) for line in lines if line.strip().startswith(("semid ", "dask ", "srun "))
    ]
    words = [line[line[0] == "srun" :] for line in words]
    return [line[: line.index("&")] if "&" in line else line for line in words]


FILES = [DOCS / "cluster.md", *sorted((DOCS / "cluster").iterdir())]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_command_is_one_that_is_understood(file, monkeypatch):
    ran = []
    monkeypatch.setattr("semid.cli.config_files.write_beside", lambda *_: None)
    for command in (Prepare, Tokenize, Train):
        monkeypatch.setattr(command, "run", lambda self: ran.append(type(self).__name__.lower()))
    commands = _commands(file)
    assert commands
    for program, name, *arguments in commands:
        if program == "dask":
            DASK[name].make_context(name, arguments)
        else:
            main([name, *arguments])
            assert ran.pop() == name


def test_an_option_that_is_not_there_would_be_found(tmp_path):
    with pytest.raises(SystemExit):
        main(["tokenize", "--out", "codes", "--sheduler", "tcp://head:8786"])
    with pytest.raises(click.NoSuchOption):
        dask_worker.make_context("worker", ["tcp://head:8786", "--workers", "2"])


def test_training_pods_are_told_what_the_code_reads():
    (service, job), (container,) = _documents(DOCS / "cluster/train.yaml"), _containers(DOCS / "cluster/train.yaml")
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert tuple(environment) == processes._OURS
    assert int(environment["JAX_NUM_PROCESSES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert environment["JAX_COORDINATOR_ADDRESS"].startswith(f"{first}:")
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (ended, taken) = job["spec"]["podFailurePolicy"]["rules"]
    assert ended["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [143]}
    assert (ended["action"], taken["action"]) == ("Ignore", "Ignore")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # else the policy is refused
    assert all(f"`{name}`" in (DOCS / "cluster.md").read_text() for name in processes._OURS)
