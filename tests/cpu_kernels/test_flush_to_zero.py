"""If a processor treats subnormals as 0 (torch.set_flush_denormal), the masks are the same."""

import pytest
import torch

import mft_kernels
from mft_kernels import reference

# In each dtype, N(0, 1) times this number is mostly subnormal and sometimes normal.
SUBNORMAL = {torch.float32: 1e-38, torch.bfloat16: 1e-38, torch.float16: 5e-5, torch.float64: 2e-308}
N, K = 8, 70


@pytest.fixture
def flushing():
    """Return flushing(f), which calls f while subnormals are treated as 0."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor always computes with subnormals")

    def call(f):
        torch.set_flush_denormal(True)
        try:
            return f()
        finally:
            torch.set_flush_denormal(False)

    yield call
    torch.set_flush_denormal(False)


@pytest.fixture
def compared(backend):
    """Return a backend that computes on this processor as it will where it is used."""
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("triton's interpreter compares by numpy on this processor; a GPU has no such mode")
    return backend


def small_scores(dtype):
    scores = torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * SUBNORMAL[dtype]
    scores[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    scores = scores.to(dtype)
    tiny = torch.finfo(dtype).tiny
    assert ((scores.abs() < tiny) & (scores != 0)).sum() > N * K / 3 < (scores.abs() >= tiny).sum() * 4
    return scores


def bits(tensors):
    return [tensor.detach().reshape(-1).view(torch.uint8).tolist() for tensor in tensors]


@pytest.mark.parametrize("keep_ratio", [0.3, 0.9])
@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_selected_does_not_depend_on_it(dtype, mode, keep_ratio, compared, flushing):
    scores = small_scores(dtype)

    def selected():
        threshold = mft_kernels.kept_threshold(scores, keep_ratio, mode=mode, backend=compared)
        packed = mft_kernels.pack_mask(scores, threshold, mode=mode, backend=compared)
        rows = mft_kernels.pack_mask(scores, scores[:, 5].clone(), mode=mode, backend=compared)
        return threshold, packed, rows, *torch.ops.mft.pack_signs(scores, compared)

    expected = selected()
    kept = int(mft_kernels.unpack_mask(expected[1], [N, K]).sum())
    assert kept == reference.kept_count(N * K, keep_ratio)
    assert bits(flushing(selected)) == bits(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_select_the_same_and_every_score_keeps_its_sign(dtype, compared, flushing):
    scores = small_scores(dtype)
    threshold = scores[0, 6].abs()

    def results():
        x, weight, learned = torch.ones(3, K), torch.ones(N, K), scores.clone().requires_grad_()
        x.requires_grad_()
        y = mft_kernels.masked_linear(x, weight, learned, threshold, backend=compared)
        y.backward(torch.ones_like(y))
        return y, x.grad, learned.grad

    expected = results()
    assert torch.equal(expected[2], 3 * scores.sign())
    assert bits(flushing(results)) == bits(expected)


@pytest.mark.parametrize("moments", [torch.float32, torch.uint8])
def test_a_step_gives_subnormal_scores_their_sign(moments, compared, flushing):
    scores = small_scores(torch.float32)

    def stepped():
        new, ours = scores.clone(), [torch.zeros(N, K, dtype=moments) for _ in range(2)]
        scales = None if moments == torch.float32 else torch.zeros(2, -(-N * K // 256))
        weight = torch.ones(N, K)
        mft_kernels.score_step(new, torch.ones(N, K), weight, *ours, scales, step=1, lr=1e-2, backend=compared)
        return new, *ours

    found, expected = flushing(stepped), stepped()
    assert (expected[0] - scores)[scores != 0].abs().min() > 0.99e-2
    assert bits(found[1:]) == bits(expected[1:])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-37)  # the summed values are flushed


def test_small_weights_in_fp16_count_as_they_do_otherwise(compared, flushing):
    """0.25 % of N(0, 0.02) lies below 6e-5, where fp16 is subnormal."""
    weight = small_scores(torch.float16)
    weight[0, :4] = torch.tensor([0.0, 2.0**-24, -(2.0**-24), 2.0**-14])

    def gradients():
        out = torch.zeros(N, K)
        ones = torch.ones(1, N, dtype=torch.float16), torch.ones(1, K, dtype=torch.float16)
        mft_kernels.accumulate_score_grad(out, *ones, weight, mode="value", backend=compared)
        return (out,)

    (expected,) = gradients()
    assert torch.equal(expected, weight.float())
    assert bits(flushing(gradients)) == bits([expected])
