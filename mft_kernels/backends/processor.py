"""Which processor this is, and which instruction sets it has that kernels here are written in."""

import platform
from dataclasses import dataclass
from pathlib import Path

# Best first, as the cpu library asks: what it calls each, and the flags of /proc/cpuinfo that it takes.
NEEDS = {
    "amx": ("amx_tile", "amx_bf16"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma"),
}


@dataclass(frozen=True)
class Processor:
    """``features`` are those of NEEDS that it has, best first; the kernel may still refuse the use of one."""

    name: str
    family: str  # "family 25 model 17", or "" where nothing says it
    features: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.family}".strip()


def this_processor() -> Processor:
    """The first of /proc/cpuinfo; elsewhere its name alone."""
    try:
        return read_processor(Path("/proc/cpuinfo").read_text())
    except OSError:
        return read_processor("")


def read_processor(text: str) -> Processor:
    """The first processor that the text of /proc/cpuinfo tells of."""
    lines = text.strip().split("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        family=family,
        features=tuple(name for name, needed in NEEDS.items() if flags.issuperset(needed)),
    )
