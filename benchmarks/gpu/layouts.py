"""Every op of csrc/cuda on small, odd and strided shapes, and in a graph, against the reference, bit for bit.

On compute capability 9.0 everything runs twice: as it is, and by the general kernels (MFT_CUDA_CAPABILITY=80).
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from mft_kernels import reference
from mft_kernels.testing import Inputs, integer_inputs

from .cases import CUDA
from .codes import code_checks
from .competitors import MODE
from .device import Device
from .equality import Check, assert_equal, name_of, op_checks, poisoned, selection_checks
from .experts import expert_checks
from .kernels import OPS, kernels

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_EVERYTHING = [True, True, True, True]

#: (M, N, K)
SMALL = (
    (1, 24, 40),  # one token
    (5, 33, 47),  # odd: rows begin anywhere, only the general kernels take them
    (64, 256, 128),  # whole tiles; words of a row are 16 bytes, which Hopper's packed product asks for
    (70, 264, 136),  # ragged in every direction; words of a row are 20 bytes
    (130, 392, 256),  # more than one tile in every direction
    (3, 8, 1024),  # a long sum, which the general product cuts into parts
    (17, 1, 1),
    (0, 16, 32),  # no tokens
)
#: Wide enough that product_sm90 takes tiles of 256 and of 128 tokens, in the forward and, turned round, in d_x: it
#: takes the most tokens that give each cluster a tile, of 256 features; an H100 has 66 clusters.
WIDE = ((500, 8448, 64), (160, 8448, 64), (500, 64, 8448), (160, 64, 8448))
#: (weight, scores, mode, a threshold a row): what compute-sanitizer and a dry run have time for.
_FEW = ((_BF16, _BF16, MODE, False), (_FP16, _FP32, MODE, True), (_BF16, _BF16, "value", True))
_ALL = tuple(
    (dtype, scores_dtype, mode, by_row)
    for dtype in (_BF16, _FP16)
    for scores_dtype in (dtype, _FP32)
    for mode in (MODE, "value")
    for by_row in (False, True)
)
_CUT = (64, 256, 128)  # of a wider matrix
#: (N, K) of experts: the second's rows are whole chunks, tiles are more than one in every direction.
_EXPERTS = ((33, 47), (264, 136))


def checks(device: Device) -> Iterator[Check]:
    """All of them, by name."""
    on = device.torch_device
    small, wide, some, cut = (SMALL, WIDE, _ALL, _CUT) if not device.dry else (((5, 33, 47),), (), _FEW, (8, 24, 40))
    for capability in capabilities(on):
        made = [
            *(check for size in small for kind in some for check in _check(size, on, *kind)),
            *(check for size in wide for check in _check(size, on, *_FEW[0])),
            *_strided(cut, on),
            ("in a graph", functools.partial(_graph, cut, device)),
            *(check for n, k in _EXPERTS[: 1 if device.dry else None] for check in _experts(n, k, on)),
        ]
        yield from ((f"{name}, {capability}", functools.partial(_by, capability, run)) for name, run in made)


def few(device: torch.device) -> Iterator[Check]:
    """One check a kernel and kind of memory access: compute-sanitizer takes a hundred times as long."""
    for capability in capabilities(device):
        for size, some in (
            ((5, 33, 47), _FEW),
            ((70, 264, 136), _FEW),
            ((64, 256, 128), _FEW),
            ((3, 8, 1024), _FEW[:1]),  # a sum in parts
            (WIDE[1], _FEW[:1]),
        ):
            for name, run in (check for kind in some for check in _check(size, device, *kind)):
                yield f"{name}, {capability}", functools.partial(_by, capability, run)
    for n, k in _EXPERTS:  # one kernel for every capability
        yield from _experts(n, k, device, (_BF16,))


def capabilities(device: torch.device) -> tuple[str, ...]:
    """Whose kernels can run here: "90" and "80", or the device's own."""
    if device.type == "cpu":
        return "90", "80"
    major, minor = torch.cuda.get_device_capability(device)
    return (f"{major}{minor}", "80") if major == 9 else (f"{major}{minor}",)


def _check(
    size: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    scores_dtype: torch.dtype,
    mode: str,
    by_row: bool,
) -> Iterator[Check]:
    by, t = poisoned(kernels(CUDA)), _inputs(*size, device, dtype, scores_dtype)
    threshold = _threshold(t.scores, by_row)
    row = ", by row" if by_row else ""
    label = f"{size}, {name_of(dtype)}, scores {name_of(scores_dtype)}, {mode}{row}"
    yield from op_checks(label, t, threshold, by, mode, _EVERYTHING)
    if t.scores.numel() > 1:
        yield from selection_checks(label, t.scores, threshold, by)
    if (scores_dtype, mode, by_row) == (dtype, MODE, False):
        yield from code_checks(label, t, threshold, by, mode)


def _experts(n: int, k: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = (_BF16, _FP16)) -> Iterator[Check]:
    for dtype in dtypes:
        yield from expert_checks(f"experts of {(n, k)}", n, k, dtype, poisoned(kernels(CUDA)), device)


def _strided(size: tuple[int, int, int], device: torch.device) -> Iterator[Check]:
    """Views that the kernels read where they lie, and some that are copied first."""
    by = poisoned(kernels(CUDA))
    m, n, k = size
    wide = _inputs(m, n + 16, k + 24, device, _BF16, _BF16)

    def cut(of: int) -> Inputs:
        """From element ``of`` on: at 8, every row still begins at a multiple of 16 bytes."""
        rows, columns = slice(of % 3, of % 3 + n), slice(of, of + k)
        return Inputs(wide.x[:, columns], wide.weight[rows, columns], wide.scores[rows, columns], wide.bias[:n],
                      wide.grad_output[:, of : of + n])  # fmt: skip

    aligned, misaligned, plain = cut(8), cut(1), _inputs(m, n, k, device, _BF16, _BF16)
    layouts = {
        "rows of a wider matrix": aligned,
        "rows of a wider matrix, misaligned": misaligned,
        "column-major": Inputs(*(_column_major(v) for v in vars(plain).values())),
        "every other token": Inputs(**vars(plain) | {"x": plain.x[::2], "grad_output": plain.grad_output[::2]}),
        "an expanded gradient": Inputs(**vars(plain) | {"grad_output": plain.grad_output[:1, :1].expand(m, n)}),
        "three dimensions": Inputs(
            **vars(plain) | {"x": plain.x.view(4, -1, k), "grad_output": plain.grad_output.view(4, -1, n)}
        ),
        "one dimension": Inputs(**vars(plain) | {"x": plain.x[0], "grad_output": plain.grad_output[0]}),
    }
    for name, t in layouts.items():
        yield from op_checks(name, t, _threshold(t.scores, False), by, MODE, _EVERYTHING)
        yield from selection_checks(name, t.scores, _threshold(t.scores, True), by)


def _column_major(v: Tensor) -> Tensor:
    return v.T.contiguous().T if v.dim() == 2 else v


def _graph(size: tuple[int, int, int], device: Device) -> None:
    """What a training step launches, captured once and replayed on other values."""
    by, sizes = poisoned(kernels(CUDA)), (*size, device.torch_device, _BF16, _BF16)
    t, sums = _inputs(*sizes), torch.zeros(size[1:], device=device.torch_device)

    def step(of: SimpleNamespace) -> tuple[Tensor, ...]:
        threshold = of.kept_threshold(t.scores, 0.5, MODE)
        packed, (signs, zeros) = of.pack_mask(t.scores, threshold, MODE), of.pack_signs(t.scores)
        y = of.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, MODE)
        again = of.masked_linear_packed(t.x, t.weight, packed, t.bias)
        gradients = of.masked_linear_backward(t.grad_output, t.x, t.weight, t.scores, threshold, MODE, _EVERYTHING)
        sums.zero_()
        of.accumulate_score_grad(sums, t.grad_output, t.x, t.weight, None, signs, MODE)
        return threshold, packed, signs, zeros, y, again, *gradients, sums.clone()

    replay = device.graph(lambda: step(by))
    for seed in (1, 2):
        for value, new in zip(vars(t).values(), vars(_inputs(*sizes, seed=seed)).values()):
            value.copy_(new)
        assert_equal(replay, lambda: step(_wide(t)))


def _wide(t: Inputs) -> SimpleNamespace:
    """The reference, its sums in fp32."""

    def widened(op: str) -> Callable:
        def run(*arguments):
            return getattr(reference, op)(*(v.float() if _is_16_bit(v) else v for v in arguments))

        return run

    return SimpleNamespace(**{op: widened(op) for op in OPS})


def _is_16_bit(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (_BF16, _FP16)


def _inputs(
    m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, scores_dtype: torch.dtype, *, seed: int = 0
) -> Inputs:
    return Inputs(*(v.to(device) for v in vars(integer_inputs(m, n, k, dtype, scores_dtype, seed=seed)).values()))


def _threshold(scores: Tensor, by_row: bool) -> Tensor:
    if by_row:
        return (torch.arange(scores.shape[0], device=scores.device) % 5 - 1).to(scores.dtype)
    return torch.tensor(1, dtype=scores.dtype, device=scores.device)


def _by(capability: str, run: Callable[[], object]) -> None:
    with _capability(capability):
        run()


@contextmanager
def _capability(capability: str) -> Iterator[None]:
    """The kernels of that compute capability, wherever they can run."""
    before = os.environ.get("MFT_CUDA_CAPABILITY")
    os.environ["MFT_CUDA_CAPABILITY"] = capability
    try:
        yield
    finally:
        if before is None:
            del os.environ["MFT_CUDA_CAPABILITY"]
        else:
            os.environ["MFT_CUDA_CAPABILITY"] = before
