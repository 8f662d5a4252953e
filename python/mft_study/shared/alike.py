"""Check what all processes of a study must share besides its declaration: packages, base weights, rows of data."""

import json
from pathlib import Path
from typing import Any

from mft.files.atomic import write_whole
from mft.files.json_file import parse_object, short
from mft.files.weights_hash import weights_hash
from mft_study.evidence.host import this_host
from mft_study.outcome import Outcome, Tested
from mft_study.shared.claims import Claims
from mft_study.store import ALIKE
from mft_study.workspace import Workspace

_REMEDY = {
    "versions": "install those, or name another output_dir",
    "base": "copy the same model to every machine, or name another output_dir",
    "data": "copy the same data to every machine, or name another output_dir",
}


def check_alike(workspace: Workspace, directory: Path, claims: Claims) -> None:
    """Record what this process has, if it is the first. Raises: ValueError if a later one has something else."""
    path = directory / ALIKE
    claims.call_once("alike", path.is_file, lambda: write_whole(path, json.dumps(_values(workspace), indent=1) + "\n"))
    if claims.shares:
        check_same(read_noted(path), workspace, "--join")


def read_noted(path: Path) -> dict[str, Any]:
    """Return what check_alike() wrote. Raises: ValueError that names the file."""
    noted = parse_object(path.read_bytes(), path)
    for section, values in noted.items():
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}: {section} must be an object, got {short(values)}: delete the file if no process of this "
                "study runs"
            )
    return noted


def check_same(noted: dict[str, Any], workspace: Workspace, what: str) -> None:
    """Raise ValueError that names the first thing that differs from noted. what: the option that asks for it."""
    ours = _values(workspace)
    for section, remedy in _REMEDY.items():
        before, now = noted.get(section, {}), ours[section]
        for name in (name for name in before if name in now and now[name] != before[name]):
            raise ValueError(
                f"{what} must have the {section} of the process that began the study, noted in its {ALIKE}: {name} "
                f"{before[name]}; got {now[name]} on {this_host().host}: {remedy}"
            )


def check_processor(found: list[Outcome] | list[Tested]) -> None:
    """Raise ValueError if any of these ran on another kind of processor than this process, or on an unknown one."""
    ours = this_host().kind
    for one in found:
        theirs = "a processor that it does not name" if one.where is None else one.where.kind
        if theirs != ours:
            host = "" if one.where is None else f", host {one.where.host}"
            raise ValueError(
                f"--same-processor must run where the study's units did: {one.unit} ran on {theirs}{host}, got {ours}: "
                "start it on such a machine, or leave --same-processor out"
            )


def _values(workspace: Workspace) -> dict[str, dict[str, Any]]:
    study, base = workspace.study, workspace.base
    data = {name: workspace.splits(name).key for name in study.domains}
    data |= {f"general.{name}": workspace.general(name).key for name in study.general}
    data |= {f"questions.{name}": workspace.questions(name).key for name in study.questions}
    weights = {name: weight for name, weight in base.named_parameters() if weight.dim() > 1}
    name = study.model.name if study.scratch is None else "from scratch"
    return {
        "versions": this_host().versions,
        "base": {name: weights_hash(weights, weights.__getitem__)},
        "data": data,
    }
