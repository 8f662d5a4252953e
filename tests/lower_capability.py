"""Print the environment in which our library and torch's use a lower instruction set than the processor has.

    env $(python tests/lower_capability.py) pytest tests/ops           the one below the best
    env $(python tests/lower_capability.py avx2) pytest tests/ops      the one that is named

Sums of products have another order there, as on another processor: a test that compares bits of two ways to compute
may fail there alone.
"""

import os
import sys
import tempfile
from pathlib import Path

from mft_kernels.backends import cpu

HOLDS_BACK = {
    "amx": {},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"},
}


def lower(capabilities: list[str]) -> str:
    """Return the instruction set below the best one; the best one if there is no other.

    capabilities: best first, as returned by the cpu backend. The emulation of AMX is none of a processor.
    """
    real = [name for name in capabilities if name in HOLDS_BACK]
    if not real:
        raise SystemExit(f"no instruction set can be chosen: {cpu.unavailable}")
    return real[min(1, len(real) - 1)]


def settings(capability: str) -> dict[str, str]:
    """Return the environment variables that hold our library, oneDNN, MKL and torch's own kernels back to it."""
    if capability not in HOLDS_BACK:
        raise SystemExit(f"the capability must be one of {', '.join(HOLDS_BACK)}, got {capability!r}")
    # torch.compile finds a stored graph again whatever the width of its vectors, and then fails if it is not the width
    # of this process (torch 2.13). So each capability stores its own.
    stored = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{capability}"
    return {"MFT_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(stored), **HOLDS_BACK[capability]}


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else lower(cpu.capabilities())
    print(f"by {chosen}; this processor has {', '.join(cpu.capabilities())}", file=sys.stderr)
    print(*(f"{name}={value}" for name, value in settings(chosen).items()))
