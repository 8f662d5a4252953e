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
from packaging.requirements import Requirement

import mft_kernels
from building.requirements import requirements
from mft.cli.app import app
from mft.cli.estimate import parse_bytes
from mft.serving.api.api_keys import ApiKeys
from mft.serving.key import Key

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


def test_the_image_has_todays_version_and_pinned_packages():
    assert pod()["containers"][0]["image"].endswith(f"/mft-serve:{mft_kernels.__version__}")
    assert re.search(r":[\d.]+-\S+@sha256:[0-9a-f]{64}$", dict(instructions())["FROM"])
    lines = (EXAMPLES / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for need in map(Requirement, requirements("train", "serve")):
        assert need.specifier.contains(pinned[need.name.lower().replace("_", "-")]), need


def test_a_pods_limit_holds_its_cache_and_its_volumes_claim_what_is_there():
    given = SERVE.make_context("mft serve", COMMANDS["kubernetes.yaml"]()).params
    limit = pod()["containers"][0]["resources"]["limits"]["memory"]
    assert parse_bytes(given["cache"], "--cache") + 2 * 2**30 < parse_bytes(f"{limit}B", "memory")
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    claims = {each["metadata"]["name"] for each in documents if each["kind"] == "PersistentVolumeClaim"}
    volumes = pod()["volumes"]
    assert {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each} == claims


def test_the_manifests_keys_are_keys_of_mft_serve(tmp_path):
    for name, text in manifests()["Secret"]["stringData"].items():
        (tmp_path / name).write_text(text)
    keys = ApiKeys(tmp_path / "api-keys", lambda _: None, tmp_path / "admin-keys")
    assert keys.find("replace-me-too") == Key("bob", frozenset({"python"}))
    assert keys.find("replace-me-three").is_admin


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
