"""Every op repeats bit for bit on every backend that runs here. Deterministic mode changes and refuses nothing."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mft_kernels
from mft_kernels import reference
from mft_kernels.backends import cpu
from mft_kernels.backends import table as backends
from mft_kernels.testing import random_inputs

REPEATS, RACES = 100, 5  # threads wait long for each other on a busy machine
INTERPRETED = 20  # a call takes up to a tenth of a second; only the memory that it gets may differ
KEPT = 0.7
#: M, N, K. Triton's interpreter takes milliseconds per call, whatever the size. Threads share large scores.
SMALL, LARGER = (2, 3, 29), (7, 1031, 257)
STEPS = {  # scores and moments of the optimiser's step
    "bf16, 8 bits": (torch.bfloat16, torch.uint8),
    "int16, 8 bits": (torch.int16, torch.uint8),
    "fp32": (torch.float32, torch.float32),
}
EVERYTHING = ("x", "weight", "scores", "bias")


@contextmanager
def deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def calls(backend, shape, dtype=torch.float32, learned=EVERYTHING):
    """Return a function for each op, by name; it computes the op again on the same inputs and returns all outputs.

    Args: learned: which gradients to ask for, if the op has them.
    """
    t = random_inputs(*shape, dtype)
    threshold = mft_kernels.kept_threshold(t.scores, KEPT)
    packed = mft_kernels.pack_mask(t.scores, threshold)
    signs = reference.pack_signs(t.scores)[0]

    def differentiated(op, *names):
        leaves = [getattr(t, name).clone().requires_grad_(name in learned) for name in names]
        y = op(*leaves)
        y.backward(t.grad_output)
        return y, *[leaf.grad for leaf in leaves if leaf.requires_grad]

    def linear(x, weight, scores, bias):
        return mft_kernels.masked_linear(x, weight, scores, threshold, bias, backend=backend)

    def linear_packed(x, weight, bias):
        return mft_kernels.masked_linear_packed(x, weight, packed, bias, backend=backend)

    def linear_many(x):
        tasks = torch.arange(len(x)) % 2 - 1
        return mft_kernels.masked_linear_many(x, t.weight, [packed], tasks, t.bias, backend=backend)

    codes = torch.arange(t.weight.numel()).sub(1).mul(7).to(torch.int8).view(t.weight.shape)
    absmax = t.weight.float().abs().amax(1)

    def linear_quantized(x):
        return mft_kernels.masked_linear_quantized(
            x, codes, absmax, packed, t.bias, shape=codes.shape, kind="int8", backend=backend
        )

    def dequantized():
        return mft_kernels.dequantize(codes, absmax, shape=codes.shape, kind="int8", dtype=dtype, backend=backend)

    def linear_by_ratio(x, weight, scores, bias):
        return mft_kernels.masked_linear_by_ratio(x, weight, scores, bias, keep_ratio=KEPT, backend=backend)

    def accumulated(weight, **signs):
        return lambda: mft_kernels.accumulate_score_grad(
            torch.ones(shape[1:]), t.grad_output, t.x, weight, backend=backend, **signs
        )

    def stepped(scores_dtype, moments_dtype, number=int):
        """Return the state after a step on scores and on moments that are not zero."""
        fixed_point = scores_dtype == torch.int16
        scores = mft_kernels.fixed_from_float(t.scores) if fixed_point else t.scores.to(scores_dtype, copy=True)
        moments = [(2000 * t.weight.abs()).to(moments_dtype) for _ in range(2)]
        scales = torch.full((2, -(-scores.numel() // 256)), 0.01) if moments_dtype == torch.uint8 else None
        before = mft_kernels.kept_threshold(scores, KEPT)
        options = {"step": number(3), "lr": 1e-2, "keep_ratio": KEPT, "threshold": before, "backend": backend}
        found = mft_kernels.score_step(scores, t.weight.flip(0), t.weight, *moments, scales, **options)
        return scores, *moments, *([] if scales is None else [scales]), *found

    # Two experts, each with half of the rows, in both layouts; the second's scores are the first's upside down.
    half = len(t.x) // 2
    offsets = torch.tensor([half, len(t.x)], dtype=torch.int32)

    def of_experts(tensor):
        return torch.stack([tensor, tensor.flip(0)])

    def grouped(op, *names, transposed=False, **given):
        def run():
            tensors = [t.x, *(of_experts(getattr(t, name)) for name in names if name != "x")]
            turned = [v.mT.contiguous() if transposed and v.dim() == 3 else v for v in tensors]
            leaves = [v.clone().requires_grad_(name in learned) for name, v in zip(names, turned)]
            y = op(**dict(zip(names, leaves)), offsets=offsets, transposed=transposed, backend=backend, **given)
            y.backward(t.grad_output)
            return y, *[leaf.grad for leaf in leaves if leaf.requires_grad]

        return run

    two_packed = of_experts(packed)

    def accumulated_of_experts():
        out = torch.ones(2, *shape[1:])
        return mft_kernels.accumulate_score_grad_grouped(out, t.grad_output, t.x, offsets, backend=backend)

    return {
        "masked_linear_grouped": grouped(mft_kernels.masked_linear_grouped, *EVERYTHING, threshold=threshold),
        "masked_linear_grouped transposed": grouped(
            mft_kernels.masked_linear_grouped, *EVERYTHING, threshold=threshold, transposed=True
        ),
        "masked_linear_grouped_packed": grouped(
            mft_kernels.masked_linear_grouped_packed, "x", "weight", "bias", packed=two_packed
        ),
        "masked_linear_grouped_by_ratio": grouped(
            mft_kernels.masked_linear_grouped_by_ratio, *EVERYTHING, keep_ratio=KEPT
        ),
        "accumulate_score_grad_grouped": accumulated_of_experts,
        "kept_thresholds": lambda: mft_kernels.kept_thresholds(of_experts(t.scores), KEPT, backend=backend),
        "select_mask": lambda: torch.ops.mft.select_mask(of_experts(t.scores), KEPT, None, "magnitude", True, backend),
        "masked_linear": lambda: differentiated(linear, *EVERYTHING),
        "masked_linear_packed": lambda: differentiated(linear_packed, "x", "weight", "bias"),
        "masked_linear_many": lambda: differentiated(linear_many, "x"),
        "masked_linear_by_ratio": lambda: differentiated(linear_by_ratio, *EVERYTHING),
        "masked_linear_quantized": lambda: differentiated(linear_quantized, "x"),
        "dequantize": dequantized,
        "accumulate_score_grad by scores": accumulated(t.weight, scores=t.scores),
        "accumulate_score_grad by signs": accumulated(t.weight, signs=signs),
        "accumulate_score_grad of the product": accumulated(None),
        "kept_threshold": lambda: mft_kernels.kept_threshold(t.scores, KEPT, backend=backend),
        "pack_mask": lambda: mft_kernels.pack_mask(t.scores, threshold, backend=backend),
        "unpack_mask": lambda: mft_kernels.unpack_mask(packed, t.weight.shape),
        "pack_signs": lambda: torch.ops.mft.pack_signs(t.scores, backend),
        "score_step_on_device": lambda: stepped(torch.bfloat16, torch.uint8, number=torch.tensor),
    } | {f"score_step of {name}": lambda name=name: stepped(*STEPS[name]) for name in STEPS}


def bits(tensors):
    """Return the bytes of each tensor, so that -0 differs from 0."""
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return [t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


OPS = list(calls("reference", SMALL))
#: The first form of each op, for the interpreter, where a call takes up to a tenth of a second.
FIRST = list({op.split()[0]: op for op in reversed(OPS)}.values())


@pytest.mark.parametrize("op", OPS)
def test_many_calls_in_deterministic_mode_give_the_bits_of_one_without(op, backend):
    if backend == "triton" and op not in FIRST:
        pytest.skip("the interpreter takes one form of each op, to be done in time")
    needs = {"masked_linear_quantized": "product", "dequantize": "decode"}.get(op)
    if needs and (needs not in backends.registered(backend).functions or not backends.registered(backend).takes):
        pytest.skip(f"{backend} does not serve it")
    call = calls(backend, SMALL)[op]
    expected = bits(call())
    with deterministic_mode():
        for _ in range(INTERPRETED if backend == "triton" else REPEATS):
            assert bits(call()) == expected


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_neither_threads_nor_their_races_change_a_bit(op, backend, threads):
    """Where torch multiplies, its GEMM may cut its sums by threads (docs/explanation/kernels.md)."""
    torchs = op.startswith(("masked_linear", "accumulate")) and (
        backend == "reference" or cpu.capabilities()[0] in ("avx2", "portable")
    )
    call = calls(backend, LARGER, torch.bfloat16, learned=("x", "scores"))[op]
    expected = bits(call())
    for count in (2, 3):
        threads(count)
        if torchs:
            expected = bits(call())
        for _ in range(RACES if backend == "cpu" else 1):
            assert bits(call()) == expected, count


class Recorder(TorchDispatchMode):
    """Records which of our ops were called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mft":
            self.seen.add(func.name())
        return func(*args, **kwargs or {})


def test_no_op_is_left_out():
    with Recorder() as recorder:
        for call in calls("reference", SMALL).values():
            call()
    assert recorder.seen == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mft::")}


def test_the_reference_takes_nothing_that_deterministic_mode_refuses_on_a_gpu(monkeypatch):
    def thresholds():
        scores = random_inputs(1, 7, 33).scores
        scores[0] = scores[1]  # ties
        found = [(ratio, mode) for ratio in (0, 0.3, 0.9, 1) for mode in ("magnitude", "value")]
        return bits([reference.kept_threshold(scores, ratio, mode) for ratio, mode in found])

    def kthvalue(*args):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")

    expected = thresholds()
    monkeypatch.setattr(torch.Tensor, "kthvalue", kthvalue)
    with deterministic_mode():
        assert thresholds() == expected
