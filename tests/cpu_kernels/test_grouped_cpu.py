"""The cpu backend's products over experts, with each of its paths, several threads and any layout.

tests/ops/test_expert_products.py tests the results, which are the same for every backend.
"""

import pytest
import torch
from by_name import oracle
from experts import integer_experts
from products import DTYPES

from mft_kernels import reference

PATHS = ("few", "fused", "slabs")
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])


def _product(x, weight, mask, offsets, bias, transposed, path):
    """Call the op; mask: its arguments scores, threshold and bits."""
    return torch.ops.mft_cpu.grouped_product(x, weight, *mask, offsets, bias, True, transposed, path)


def _score_grad(out, grad, x, offsets, weight, scores, signs, accumulate, path):
    torch.ops.mft_cpu.grouped_score_grad_(out, grad, x, offsets, weight, scores, signs, accumulate, path)
    return out


def _random(rows, n, k, dtype, seed=0):
    """Return x, grad_output, weight, packed, signs and offsets of experts with ``rows`` rows."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(sum(rows), size, generator=generator).to(dtype) for size in (k, n))
    weight = torch.randn(len(rows), n, k, generator=generator).to(dtype)
    words = [
        torch.randint(-(1 << 31), 1 << 31, (len(rows), n, -(-k // 32)), generator=generator, dtype=torch.int32)
        for _ in range(2)
    ]
    return x, grad, weight, *words, torch.tensor(rows).cumsum(0).int()


@pytest.mark.parametrize("path", PATHS)
@LAYOUTS
@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_the_reference_on_integers(capability, dtype, scores_dtype, transposed, path):
    t = integer_experts(45, 57, dtype, scores_dtype, rows=(0, 1, 20, 0, 33), transposed=transposed)
    scores, threshold, none = t.scores, t.threshold, (None, None)
    packed = t.words()
    for mask in ((scores, threshold, None), (*none, packed)):
        for bias in (t.bias, None):
            expected = oracle.grouped_product(t.x, t.weight, *mask, t.offsets, bias, "magnitude", transposed)
            assert torch.equal(_product(t.x, t.weight, mask, t.offsets, bias, transposed, path), expected)


@pytest.mark.parametrize("path", ["fused", "slabs"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_gradients_equal_the_reference_on_integers(capability, dtype, out_dtype, path):
    t = integer_experts(45, 57, dtype, rows=(0, 1, 20, 0, 33))
    signs = torch.stack([reference.pack_signs(s)[0] for s in t.scores])
    for weight, scores, bits in ((t.weight, t.scores, None), (t.weight, None, signs), (None, None, None)):
        for accumulate in (False, True):
            arguments = t.grad_output, t.x, t.offsets, weight, scores, bits
            out = torch.full(t.weight.shape, 2.0, dtype=out_dtype)
            expected = out.clone()
            mode = "value" if scores is None and bits is None else "magnitude"
            oracle.grouped_score_grad(expected, *arguments, mode, accumulate)
            assert torch.equal(_score_grad(out, *arguments, accumulate, path), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows", [(300, 0, 3), (1, 1, 1), (9, 8, 7, 6, 5), (40,) * 7], ids=["one long", "three", "five", "seven"]
)
def test_neither_threads_nor_other_experts_change_a_bit(capability, rows, dtype, threads):
    x, grad, weight, packed, signs, offsets = _random(rows, 200, 136, dtype)
    mask = None, None, packed
    bias = torch.arange(len(rows) * 336).remainder(7).to(dtype).split([len(rows) * 200, len(rows) * 136])
    bias = [each.view(len(rows), -1) for each in bias]

    def everything(path, x, grad, offsets):
        out = torch.empty(weight.shape, dtype=dtype)
        return [
            _product(x, weight, mask, offsets, bias[0], False, path),
            _product(grad, weight, mask, offsets, bias[1], True, path),
            *([_score_grad(out, grad, x, offsets, weight, None, signs, False, path)] if path == "fused" else []),
        ]

    # Slabs use torch's own GEMM, which may sum in a different order with more threads.
    for path in ["few"] if capability in ("avx2", "portable") else ["few", "fused"]:
        threads(1)
        expected = everything(path, x, grad, offsets)
        for count in (2, 3, 7):
            threads(count)
            for got, want in zip(everything(path, x, grad, offsets), expected):
                assert torch.equal(got, want)
        end = int(offsets[0])
        first = everything(path, x[:end], grad[:end], offsets.clamp(max=end))
        for got, want in zip(first[:2], expected):
            assert torch.equal(got, want[:end])
        for got, want in zip(first[2:], expected[2:]):
            assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_is_added_before_the_one_rounding(capability, path):
    # 257 is not a bf16 number. Rounding before 1 is added would give 256, which stays. So many columns take two slabs.
    weight = torch.zeros(1, 40, 30000, dtype=torch.bfloat16)
    weight[0, :2] = torch.tensor([[256.0], [1.0]])
    x, bias = torch.ones(3, 40, dtype=torch.bfloat16), torch.ones(1, 30000, dtype=torch.bfloat16)
    bias[:, 15000:] = 3
    mask = None, None, torch.full((1, 40, 938), -1, dtype=torch.int32)
    y = _product(x, weight, mask, torch.tensor([3], dtype=torch.int32), bias, True, path)
    assert y[:, :15000].eq(258).all()
    assert y[:, 15000:].eq(260).all()


@pytest.mark.parametrize("path", PATHS)
@LAYOUTS
def test_weights_with_gaps_and_transposed_ones_equal_their_copies(transposed, path):
    whole = torch.randn(6, 90, 140, generator=torch.Generator().manual_seed(0))
    for weight in (whole[:, 30:70, :60], whole[::2, ::2], whole[:, :64].transpose(1, 2), whole[:1].expand(4, -1, -1)):
        experts, n, k = weight.shape
        x, grad, _, packed, signs, offsets = _random((5, 0, 40, 2, 0, 9)[:experts], n, k, torch.float32)
        if transposed:
            x, grad = grad, x
        arguments = (None, None, packed), offsets, None, transposed, path
        assert torch.equal(_product(x, weight, *arguments), _product(x, weight.contiguous(), *arguments))
        if not transposed:
            grads = [
                _score_grad(torch.empty(experts, n, k), grad, x, offsets, w, None, signs, False, path)
                for w in (weight, weight.contiguous())
            ]
            assert torch.equal(*grads)


def test_new_gradients_too_large_for_a_cache_are_whole(threads):
    # Beyond 32 MiB, pages are mapped block by block, and experts without rows are cleared in the same way.
    threads(2)
    x, grad, weight, _, signs, offsets = _random((4, 0, 3), 1024, 4100, torch.bfloat16)
    out = torch.full(weight.shape, torch.nan)
    _score_grad(out, grad, x, offsets, weight, None, signs, False, "auto")
    assert out[1].eq(0).all()
    expected = torch.zeros_like(out)
    _score_grad(expected, grad, x, offsets, weight, None, signs, True, "auto")
    assert torch.equal(out, expected)
