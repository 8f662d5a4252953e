"""No op touches memory outside its tensors: they end or begin at a forbidden page, where an access ends the process.

test_products.py and test_many.py do the same for the products of one matrix.
"""

import mmap
from dataclasses import replace
from functools import partial

import pytest
import torch
from by_name import oracle
from experts import assert_product_equals_reference, assert_sums_equal_reference, integer_experts
from forms import INSTRUCTION_SETS, OTHERS, every_backend_but_cuda, every_form
from guarded import check_that_the_guard_bites, forbid, guarded
from products import DTYPES, MODES, Operands, assert_same, before, every_sum, row_thresholds
from score_steps import DEFAULTS, arguments

from mft_kernels.testing import integer_inputs


@pytest.fixture(params=[True, False], ids=["end", "begin"])
def guard(kernels, request):
    """Return a function that copies a tensor to such a page; results lie at one too if the backend allows it."""
    if kernels.device.type != "cpu":
        pytest.skip("the pages are those of the CPU's memory")
    with kernels.guarded_outputs(at_end=request.param):
        yield partial(guarded, at_end=request.param)


def test_the_guard_bites():
    check_that_the_guard_bites()


@every_form
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 97, 31), (33, 47, 33), (17, 24, 72), (5, 257, 545)], ids=str)
def test_sums(kernels, guard, shape):
    if kernels.interpreted and shape[1] > 100:
        pytest.skip("the interpreter takes seconds")
    dtype = kernels.dtypes[shape[0] % len(kernels.dtypes)]
    t = integer_inputs(*shape, dtype)
    o = Operands.of(t, row_thresholds(t))
    for out_dtype in (torch.float32, dtype):
        out = before(o, out_dtype)
        expected = dict(every_sum(oracle, o, out))
        for name, got in every_sum(kernels, o.change(guard), out, copy=guard):
            assert_same(got, expected[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_and_packing(kernels, guard, dtype):
    for i, shape in enumerate(kernels.fewer(((1, 1), (3, 33), (5, 257), (2, 1030), (70, 1), (31, 515)), 2)):
        mode, scores = MODES[i % 2], integer_inputs(1, *shape, scores_dtype=dtype).scores
        rows, ours = torch.arange(shape[0]).to(dtype), guard(scores)
        assert_same(kernels.kept_threshold(ours, 0.7, mode), oracle.kept_threshold(scores, 0.7, mode))
        assert_same(kernels.pack_mask(ours, guard(rows), mode), oracle.pack_mask(scores, rows, mode))
        for got, expected in zip(kernels.pack_signs(ours), oracle.pack_signs(scores), strict=True):
            assert_same(got, expected)


@every_backend_but_cuda
def test_steps(kernels, guard):
    for shape in kernels.fewer(((1, 1), (13, 31), (5, 545), (3, 300)), 3):
        for dtype, eight_bit in ((torch.int16, True), (torch.float32, False)):
            tensors = arguments(shape, dtype, eight_bit) | {"threshold": torch.zeros((), dtype=dtype)}
            given = {name: None if tensor is None else guard(tensor) for name, tensor in tensors.items()}
            kernels.score_step(**DEFAULTS | given | {"grad_scale": guard(torch.ones(()))})


@pytest.mark.parametrize("kernels", [*INSTRUCTION_SETS, "triton", "triton-H100", *OTHERS], indirect=True)
@pytest.mark.parametrize("ends", [None, (99, 7, 8), (-5, 2, 1 << 30)], ids=["in order", "falling", "outside"])
def test_experts(kernels, guard, ends):
    for sizes, transposed in kernels.fewer((((31, 37), False), ((40, 48), True), ((97, 33), True)), 2):
        t = integer_experts(*sizes, torch.float16, rows=(6, 0, 7), transposed=transposed)
        if ends is not None:
            t.offsets = torch.tensor(ends, dtype=torch.int32)
        t = replace(t, **{name: guard(value) for name, value in vars(t).items() if isinstance(value, torch.Tensor)})
        for mask in ((t.scores, t.threshold, None), (None, None, guard(t.words()))):
            forward, d_x = (t.x, t.bias, transposed), (t.grad_output, None, not transposed)
            for rows, bias, turned in (forward, d_x):
                given = (t.offsets, bias, "magnitude", turned)
                assert_product_equals_reference(kernels, rows, t.weight, *mask, *given)
        assert_sums_equal_reference(kernels, t, "scores", torch.float32, accumulate=True, copy=guard)
        assert_sums_equal_reference(kernels, t, "signs", torch.float16, accumulate=False, copy=guard)


@pytest.mark.parametrize("kernels", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_of_an_expert_without_rows_is_not_read(kernels, transposed):
    """Each of the three experts is one page. If the weight is transposed, the experts with rows are copied first."""
    size = mmap.PAGESIZE // 128
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    weight = torch.frombuffer(memory, dtype=torch.float32).view(3, size, 32)
    forbid(memory, mmap.PAGESIZE)
    packed = torch.zeros(3, 32 if transposed else size, 1, dtype=torch.int32)
    mask, offsets = (None, None, packed), torch.tensor((2, 2, 5), dtype=torch.int32)
    weight = weight.mT if transposed else weight
    y = kernels.grouped_product(torch.ones(5, 32), weight, *mask, offsets, None, "value", transposed)
    assert not y.any()
