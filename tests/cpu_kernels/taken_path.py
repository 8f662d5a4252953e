"""The cpu backend on one path: wherever that can serve it is taken, not the one that would be chosen."""

import pytest
import torch

from mft_kernels.backends import cpu


def take_path(patch: pytest.MonkeyPatch, path: str) -> None:
    """Take "few", "fused" or "slabs" until the patch is undone; where it cannot serve, what the model chooses."""

    def taken(product, prepare):
        return path if path in product.paths(torch.ops.mft_cpu.capability()) else "auto"

    patch.setattr(cpu, "measuring", lambda: True)
    patch.setattr(cpu, "measured_path", taken)
