"""pack_mask and pack_signs of the triton backend at sizes that need a GPU; tests/ops/test_pack.py has the rest."""

import pytest
import torch

from mft_kernels.backends.triton import bits
from mft_kernels.backends.triton.target import interpreting


@pytest.mark.skipif(interpreting(), reason="2^31 scores are too many for the interpreter")
def test_more_than_2_to_the_31_scores_are_packed(device):
    scores = torch.zeros(2**20 + 1, 2**11, dtype=torch.bfloat16, device=device)
    scores[-1, -33:] = 1
    signs, zeros = bits.pack_signs(scores)
    assert zeros == scores.numel() - 33
    assert signs[-1, -2:].tolist() == [-(2**31), -1]
    assert signs[:-1].count_nonzero() == 0
    packed = bits.pack_mask(scores, torch.tensor(1, dtype=torch.bfloat16, device=device), "value")
    assert torch.equal(packed, signs)
