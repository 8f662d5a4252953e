"""examples/serving: the container, the unit and the manifest start commands that the command line accepts."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from mft.cli.app import app

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"
SERVE = typer.main.get_command(app).commands["serve"]


def instructions():
    """Return (instruction, the rest) of each line of the Containerfile."""
    text = re.sub(r"\\\n\s*", "", (EXAMPLES / "Containerfile").read_text())
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]


def listed(name):
    """Return a JSON list, which no shell parses."""
    (found,) = (rest for instruction, rest in instructions() if instruction == name)
    return json.loads(found)


def manifests():
    return {each["kind"]: each for each in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())}


def pod():
    return manifests()["Deployment"]["spec"]["template"]["spec"]


def unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(EXAMPLES / "mft-serve.service")
    return parser["Service"]


def by_entry_point(arguments):
    command = [*listed("ENTRYPOINT"), *arguments]
    assert command[:2] == ["mft", "serve"]
    return command[2:]


COMMANDS = {
    "Containerfile": lambda: by_entry_point(listed("CMD")),
    "kubernetes.yaml": lambda: by_entry_point(pod()["containers"][0]["args"]),
    "mft-serve.service": lambda: shlex.split(unit()["ExecStart"])[2:],
}


@pytest.mark.parametrize("file", COMMANDS)
def test_the_command_line_takes_what_an_example_starts(file):
    given = SERVE.make_context("mft serve", COMMANDS[file]()).params
    assert given["masks_file"] == Path("/etc/mft/masks.txt")
    assert given["api_keys_file"].name == "api-keys"


def test_the_manifest_probes_routes_that_there_are():
    from mft.serving.api import service

    text = Path(service.__file__).read_text()
    container = pod()["containers"][0]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    metrics = manifests()["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    assert all(f'Route("{path}"' in text for path in (*probes.values(), metrics))


def test_answers_have_their_time_before_a_server_is_killed():
    """5 seconds more than --grace, for uvicorn's own, which server.py names."""
    grace = SERVE.make_context("mft serve", COMMANDS["kubernetes.yaml"]()).params["grace"]
    (_, before) = pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert pod()["terminationGracePeriodSeconds"] >= int(before) + grace + 5
    grace = SERVE.make_context("mft serve", COMMANDS["mft-serve.service"]()).params["grace"]
    assert int(unit()["TimeoutStopSec"]) >= grace + 5


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = (EXAMPLES / "mft-serve.service").read_text().replace("/opt/mft/bin/mft", "/bin/true")
    (tmp_path / "mft-serve.service").write_text(unit)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "mft-serve.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "mft-serve" in line]
    assert ours == []
