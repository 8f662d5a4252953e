"""Tests specific to the triton backend's score_step: groups of chunks, and a selection that may be skipped.

tests/ops/test_step.py tests the results, which are the same for every backend; test_step_window.py tests the window.
"""

from dataclasses import replace

import pytest
import torch
from by_name import ByName
from score_steps import arguments, assert_steps_equal_the_reference, normal

from mft_kernels import reference
from mft_kernels.backends.triton import score_step as kernels
from mft_kernels.backends.triton import select
from mft_kernels.backends.triton.target import assume, installed_triton, target_of

step = ByName({"step": kernels.score_step}).score_step

pytestmark = pytest.mark.usefixtures("correctly_rounded_sqrt")

needs_exact_fma = pytest.mark.skipif(
    installed_triton() < (3, 9), reason="the interpreter of older versions rounds a fused multiply-add twice"
)
EXACT = pytest.param(False, marks=needs_exact_fma, id="exact")
SCHEMES = pytest.mark.parametrize("eight_bit", [pytest.param(True, id="8bit"), EXACT])


@pytest.mark.slow
@SCHEMES
def test_the_number_of_programs_changes_no_bit(device, eight_bit):
    """Less than a group of chunks; whole groups; whole groups and a rest."""
    for numel in (1500, 4096, 2 * 4096 + 1500):
        tensors = arguments((1, numel), torch.bfloat16, eight_bit)
        results = []
        for multiprocessors in (1, 1000):
            with assume(replace(target_of(device), multiprocessors=multiprocessors)):
                ours, _ = assert_steps_equal_the_reference(step, tensors, device=device, message=f"{numel}")
                results.append(ours)
        for one, two in zip(*(r.values() for r in results)):
            assert one is two is None or torch.equal(one, two)


def test_the_full_selection_leaves_its_output_alone_where_it_is_not_asked_for(device):
    scores = normal(3000).to(device)
    for asked in (0, 1):
        into = torch.full((), 5.0, device=device)
        flag = torch.tensor(asked, dtype=torch.int32, device=device)
        assert select.select(scores, 0.9, "magnitude", into=into, only_if=flag) is into
        expected = reference.kept_threshold(scores.cpu(), 0.9, "magnitude") if asked else torch.tensor(5.0)
        assert torch.equal(into.cpu(), expected)
