"""Time the product with one mask per row, as in one batch for many users.

fused    Triton's kernels: the weight is read once, for any masks
cuBLAS   on the dense weight, unmasked
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_kernels import reference

from .cases import DENSE, FUSED, Case
from .equality import REFERENCE
from .timing import Bench, Competitor

#: Kept shares of the weight, one per mask.
_RATIOS = (0.95, 0.9, 0.8, 0.5)


def time_many(case: Case, bench: Bench) -> dict[str, Any]:
    """Time one case of case.m rows, which use the masks in turn."""
    operands = bench.inputs.get(case.n, case.k, case.m)
    first = operands[0]
    keys = first.scores.abs().flatten().sort().values
    cuts = [keys[int((1 - ratio) * keys.numel())].clone() for ratio in _RATIOS]
    packed = [reference.pack_mask(first.scores, cut, "magnitude") for cut in cuts]
    masks = [[one.clone() for one in packed] for _ in operands]
    tasks = torch.arange(case.m, device=first.x.device) % len(_RATIOS)

    def by(backend: str, copy: int) -> Tensor:
        o = operands[copy]
        return torch.ops.mft.masked_linear_many(o.x, o.weight, masks[copy], tasks, None, backend)

    taken = min(case.m, len(_RATIOS))
    tokens, operations = 2.0 * case.m * (case.n + case.k), 2.0 * case.m * case.n * case.k
    weight, mask_bytes = 2.0 * case.n * case.k, taken * case.n * case.k / 8
    found = {DENSE: Competitor(lambda copy: F.linear(operands[copy].x, operands[copy].weight),
                               phases=[(weight + tokens, operations)])}  # fmt: skip
    backend = bench.device.backends[FUSED]
    found[FUSED] = Competitor(
        lambda copy: by(backend, copy),
        by(REFERENCE, 0),
        phases=[(weight + mask_bytes + tokens, operations)],
    )
    return bench.compare(found, len(operands), with_cuda=False)
