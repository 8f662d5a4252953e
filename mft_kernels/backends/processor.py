"""Detect the processor, and which of the instruction sets that our kernels use it has."""

import platform
from dataclasses import dataclass
from pathlib import Path

# Best first, in the order of the cpu library: its name for each, and the flags of /proc/cpuinfo that it needs.
NEEDS = {
    "amx": ("amx_tile", "amx_bf16"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma"),
}


@dataclass(frozen=True)
class Processor:
    """A processor. ``features`` are those of NEEDS that it has, best first; Linux may still refuse the use of one."""

    name: str
    family: str  # "family 25 model 17", or "" if unknown
    features: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.family}".strip()


def this_processor() -> Processor:
    """Return the first processor of /proc/cpuinfo; on systems without that file, only its name."""
    try:
        return read_processor(Path("/proc/cpuinfo").read_text())
    except OSError:
        return read_processor("")


def read_processor(text: str) -> Processor:
    """Return the first processor in the text of /proc/cpuinfo."""
    lines = text.strip().split("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        family=family,
        features=tuple(name for name, needed in NEEDS.items() if flags.issuperset(needed)),
    )
