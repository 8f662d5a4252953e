"""Measure the machine's own limits: torch's best GEMM, and reading and copying the weight's bytes.

    share = max(flops / GEMM, bytes / memory) / time

Memory is the read rate for the forward pass and d_x, which write little, and the copy rate for ops that make a gradient
of the weight's size. Both are measured on as many bytes as the weight has. If the cache is large, they are therefore
rates of the cache, which a layer that is called again and again reaches too.
"""

import torch

from .harness import Spread
from .roofline import Work, least_seconds

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
READERS = {"sum": torch.sum, "amax": torch.amax, "dot": lambda t: torch.dot(t, t)}


class CpuCeilings:
    """Ceilings in flop/s and bytes/s, sampled during the run with torch's thread count; the fastest way counts."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._gemm, self._read, self._copy = ({dtype: list[float]() for dtype in DTYPES} for _ in range(3))

    def sample(self, dtype: str) -> None:
        """Take one sample of each ceiling."""
        size = self._size
        # All are written first. Unwritten pages are one shared page of zeros in a near cache: on one thread of Sapphire
        # Rapids 32 MB of them were read at 144 GB/s, but written pages at 14 (4 KB pages) to 27 GB/s (huge pages).
        a, b, product = (torch.ones(size, size, dtype=DTYPES[dtype]) for _ in range(3))
        took = min(least_seconds(lambda other=other: torch.mm(a, other, out=product)) for other in (b, b.T))
        self._gemm[dtype].append(2 * size**3 / took)
        floats = a.view(-1).view(torch.float32)  # the same bytes; bf16 would be converted on reading
        self._read[dtype].append(a.nbytes / min(least_seconds(lambda f=f: f(floats), 3) for f in READERS.values()))
        self._copy[dtype].append(2 * a.nbytes / least_seconds(lambda: b.copy_(a), 3))

    def share(self, op: str, dtype: str, work: Work, milliseconds: float) -> float:
        """Return the time that the ceilings allow / the time taken."""
        memory = self._read if op in ("forward", "d_x") else self._copy
        least = max(work.flops / Spread.of(self._gemm[dtype]).median, work.bytes / Spread.of(memory[dtype]).median)
        return least / (milliseconds * 1e-3)

    def record(self, threads: int) -> dict:
        """Return GFLOP/s and GB/s with quartiles for each dtype."""
        return {
            "threads": threads,
            **{
                dtype: {
                    "gemm_gflops": _spread(self._gemm[dtype]),
                    "read_gb_per_s": _spread(self._read[dtype]),
                    "copy_gb_per_s": _spread(self._copy[dtype]),
                }
                for dtype in DTYPES
                if self._gemm[dtype]
            },
        }


def _spread(values: list[float]) -> dict[str, float]:
    return vars(Spread.of([value / 1e9 for value in values]))
