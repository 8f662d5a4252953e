"""Where numbers come from: command, commit, versions, processor."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return what a report says about its origin. commit: None outside a git checkout; + means changed files."""
    return {
        "command": " ".join(["mft", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": dict(_versions("torch", "transformers", "datasets", "peft")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads a unit": 1,
    }


def _versions(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return f"{commit}{'+' if changes else ''}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
