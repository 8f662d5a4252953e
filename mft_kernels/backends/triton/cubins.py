"""Cubins: kernels compiled ahead of time by a newer Triton (make cubins), found by a launch's identity (specialise.py).

MFT_TRITON chooses who compiles: "cubins" allows only cubins, "jit" only the installed Triton. If it is not set, a
launch takes its cubin if there is one. The library of csrc/cuda launches cubins as Triton's own launcher would.
"""

import contextlib
import functools
import hashlib
import json
import os
import struct
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import built
from ..built import load
from .specialise import identity

FOLDER = Path(__file__).parents[2] / "cubins"
MANIFEST = "manifest.json"
CUBINS, JIT = "cubins", "jit"


class NoCubin(RuntimeError):
    """There is no cubin for a launch that only a cubin can serve."""


@dataclass(frozen=True)
class Bundle:
    """The cubins of one target, by the identity of their launches; ``path`` is the archive."""

    path: Path
    triton: str
    ptxas: str
    cubins: dict[str, dict[str, Any]]

    @property
    def compiler(self) -> tuple[int, int]:
        """(major, minor) of the Triton that compiled them."""
        major, minor = self.triton.split(".")[:2]
        return int(major), int(minor)

    @property
    def assembler(self) -> tuple[int, int]:
        """(major, minor) of its ptxas."""
        major, minor = self.ptxas.split(".")[:2]
        return int(major), int(minor)


def asked() -> str | None:
    """Return what MFT_TRITON asks for: CUBINS, JIT, or None for either.

    Raises:
        ValueError: MFT_TRITON is anything else.
    """
    value = os.environ.get("MFT_TRITON") or None
    if value not in (None, "auto", CUBINS, JIT):
        raise ValueError(
            f"MFT_TRITON must be {CUBINS!r} or {JIT!r}, got {value!r}; unset it to use whichever is available"
        )
    return None if value == "auto" else value


def bundle(target: str) -> tuple[Bundle | None, str]:
    """Return (the cubins, "") of a target such as "sm_90", or (None, why there are none)."""
    return _bundle(target, FOLDER)


@functools.cache
def _bundle(target: str, folder: Path) -> tuple[Bundle | None, str]:
    path = folder / f"{target}.zip"
    if not path.exists():
        return None, f"no cubins for {target} in {folder}; run `make cubins` to compile them"
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read(MANIFEST))
    if about["kernels"] != kernels_hash():
        return None, f"{path} was compiled from other sources than these kernels; run `make cubins` to compile it again"
    if (reason := load("cuda")) is not None:
        return None, f"the library that launches cubins is missing: {reason}"
    return Bundle(path, about["triton"], about["ptxas"], about["cubins"]), ""


def kernels_hash() -> str:
    """Return the SHA-256 of the text of every file that has kernels."""
    files = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(text for text in files if b"\n@triton.jit" in text)).hexdigest()


class Cubin:
    """One kernel of a bundle, ready to be launched on any device of its target."""

    def __init__(self, bundle: Bundle, key: str) -> None:
        about = bundle.cubins[key]
        with zipfile.ZipFile(bundle.path) as archive:
            image = bytearray(archive.read(about["file"]))
        self._name, self._swapped = about["name"], "MASK_ON_A=True" in key
        layout = [number for p in about["parameters"] for number in p.get("map", [0] * 5)]
        self._number = built.cuda_ops.add_cubin(
            torch.frombuffer(image, dtype=torch.uint8), about["name"], about["warps"], about["shared"], layout
        )

    def launch(self, device: int, grid: tuple[int, ...], kernel: Any, args: Sequence[Any]) -> None:
        """Launch on the device's current stream; see launch.launch."""
        values, addresses, numbers = values_of(kernel, args)
        whole = [*grid, 1, 1][:3]
        built.cuda_ops.launch_cubin(self._number, device, whole, values)
        note(Launched(self._name, self._swapped, self._number, whole, values, addresses, numbers))


def bits_of(number: float) -> int:
    """Return a number as a launch passes it: an integer as it is, a float as its bits in fp32."""
    return number if isinstance(number, int) else struct.unpack("<i", struct.pack("<f", number))[0]


def values_of(
    kernel: Any, args: Sequence[Any]
) -> tuple[list[int], list[tuple[int, str, torch.Tensor]], dict[str, int]]:
    """Return what a launch passes: (values, addresses, numbers).

    Returns:
        values: the bits of each argument that is not compiled in. A descriptor is passed as a matrix (address, shape,
            stride), followed by its shape and strides.
        addresses: which values are addresses: (index, parameter, tensor) for each.
        numbers: which values are numbers that no binary depends on: index by parameter.
    """
    values: list[int] = []
    addresses: list[tuple[int, str, torch.Tensor]] = []
    numbers: dict[str, int] = {}
    each = ((one, p) for a, p in zip(args, kernel.params) for one in (a if isinstance(a, tuple) else (a,)))
    for argument, parameter in each:
        if isinstance(argument, torch.Tensor):
            addresses.append((len(values), parameter.name, argument))
            values.append(argument.data_ptr())
        elif isinstance(argument, int | float):
            if isinstance(argument, float) or parameter.do_not_specialize:
                numbers[parameter.name] = len(values)
            if argument != 1 or parameter.name in numbers:
                values.append(bits_of(argument))
        elif argument is not None:
            shape, strides = argument.shape, argument.strides
            addresses.append((len(values), parameter.name, argument.base))
            values += [argument.base.data_ptr(), *shape, strides[0], *shape, *strides]
    return [*values, 0, 0], addresses, numbers  # two scratch addresses, which these kernels do not have


@dataclass(frozen=True)
class Launched:
    """A launch of a kernel.

    Attributes:
        swapped: the masked weight is the first operand.
        cubin: the cubin's number. None: the installed Triton compiled the kernel, and the attributes below are empty.
        grid, values: as launched.
        addresses, numbers: which values are addresses and numbers; see values_of.
    """

    kernel: str
    swapped: bool = False
    cubin: int | None = None
    grid: Sequence[int] = ()
    values: Sequence[int] = ()
    addresses: Sequence[tuple[int, str, torch.Tensor]] = ()
    numbers: dict[str, int] = field(default_factory=dict)


_noted = threading.local()
_watched: list[Launched] | None = None


@contextlib.contextmanager
def watching() -> Iterator[list[Launched]]:
    """Collect all launches that Python makes within the context, in every thread.

    Remembered calls (planned.py) are launched by C++ and not collected.
    """
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


@contextlib.contextmanager
def noting() -> Iterator[list[Launched]]:
    """Collect this thread's launches within the context, except those within a nested noting."""
    before = getattr(_noted, "launches", None)
    found: list[Launched] = []
    _noted.launches = found
    try:
        yield found
    finally:
        _noted.launches = before


def is_noting() -> bool:
    """Return whether this thread is within noting."""
    return getattr(_noted, "launches", None) is not None


def note(launched: Launched) -> None:
    """Append the launch to the lists of noting and watching, if any."""
    if _watched is not None:
        _watched.append(launched)
    if (launches := getattr(_noted, "launches", None)) is not None:
        launches.append(launched)


def find(target: str, kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> Cubin | None:
    """Return the cubin for a launch on a target; None if there is none or MFT_TRITON forbids it."""
    if asked() == JIT:
        return None
    found, _ = bundle(target)
    if found is None:
        return None
    key = identity(kernel, args, options)
    return _cubin(target, FOLDER, key) if key in found.cubins else None


def missing(target: str, kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> str:
    """Return the reason why find returned None."""
    if asked() == JIT:
        return f"MFT_TRITON={JIT} does not use cubins"
    _, reason = bundle(target)
    return reason or f"there is no cubin for {identity(kernel, args, options)} on {target}"


@functools.cache
def _cubin(target: str, folder: Path, key: str) -> Cubin:
    found, reason = _bundle(target, folder)
    assert found is not None, reason
    return Cubin(found, key)
