"""kept_threshold on scores of any bits."""

import pytest
import torch

from mft_kernels import reference
from mft_kernels.backends.triton import select

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@hypothesis.given(data=st.data(), mode=st.sampled_from(("magnitude", "value")), dtype=st.sampled_from(list(WORDS)))
@hypothesis.settings(max_examples=80, deadline=None)
def test_any_bits_give_the_threshold_of_the_reference(device, data, mode, dtype):
    word = WORDS[dtype]
    top = 2 ** (8 * word.itemsize - 1)
    # Small integers next to any bits: subnormals, zeros of both signs (-top is -0.0), and ties.
    bits = st.one_of(st.integers(-top, top - 1), st.integers(-top, -top + 2), st.integers(0, 2))
    scores = torch.tensor(data.draw(st.lists(bits, min_size=1, max_size=40)), dtype=word).view(dtype)
    if data.draw(st.booleans()):
        scores = scores.nan_to_num(0, 1, -1)
    kept = data.draw(st.integers(0, scores.numel()))
    keep_ratio = max(kept - 0.5, 0) / scores.numel()  # keeps just so many
    got = select.kept_threshold(scores.to(device), keep_ratio, mode).cpu()
    expected = reference.kept_threshold(scores, keep_ratio, mode)
    assert torch.equal(got, expected) or (got.isnan() and expected.isnan())
    assert torch.equal(reference.keep_mask(scores, got, mode), reference.keep_mask(scores, expected, mode))
