"""Compare every op of csrc/cuda with the reference bit for bit: small, odd and strided shapes, and in a graph.

On compute capability 9.0 everything runs twice: with its own kernels, and with the general ones
(MFT_CUDA_CAPABILITY=80). There product_sm90 also runs with each tile size, and with its sum in one part and in several,
regardless of its plan.

python -m benchmarks.gpu.layouts runs a part of this, for compute-sanitizer (programs.py); its last line has the counts.
Without a GPU the kernels are emulated.
"""

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from mft_kernels import reference
from mft_kernels.backends import built
from mft_kernels.testing import Inputs, integer_inputs

from . import on_host
from .cases import CUDA
from .device import Device
from .equality import (
    EVERYTHING,
    REFERENCE,
    Check,
    accumulating_calls,
    assert_equal,
    dense_calls,
    equal,
    name_of,
    poisoned,
    results,
    selection_checks,
    widened,
)
from .operands import MODE

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

Size = tuple[int, int, int]  # (M, N, K)
SMALL: tuple[Size, ...] = (
    (1, 24, 40),  # one token
    (5, 33, 47),  # odd: rows begin anywhere, which only the general kernels take
    (64, 256, 128),  # whole tiles; words of a row are 16 bytes, which Hopper's packed product needs
    (70, 264, 136),  # ragged in every direction; words of a row are 20 bytes
    (130, 392, 256),  # more than one tile in every direction
    (3, 8, 1024),  # a long sum, which the general product cuts into parts
    (17, 1, 1),
    (0, 16, 32),  # no tokens
)
#: Tokens per tile of product_sm90, parts of a sum, and the source of the mask. Then a product that is ragged in each:
#: one to four tiles of tokens, two of features, three and five pairs of steps.
TILES, PARTS, MASKED_BY = (64, 128, 256), (1, 2, 3), ("words", MODE, "value")
_TILED: Size = (200, 264, 640)
_CUT: Size = (64, 256, 128)  # a part of a wider matrix
#: (weight, scores, mode, whether there is one threshold per row)
Kind = tuple[torch.dtype, torch.dtype, str, bool]
#: The kinds that compute-sanitizer and a dry run have time for.
_FEW: tuple[Kind, ...] = ((_BF16, _BF16, MODE, False), (_FP16, _FP32, MODE, True), (_BF16, _BF16, "value", True))
_ALL: tuple[Kind, ...] = tuple(
    (dtype, scores_dtype, mode, by_row)
    for dtype in (_BF16, _FP16)
    for scores_dtype in (dtype, _FP32)
    for mode in (MODE, "value")
    for by_row in (False, True)
)
_ALL_SIZES = [(size, _ALL) for size in SMALL]
_DRY_SIZES = [(SMALL[1], _FEW)]
#: One size per kernel; the fourth's sum is in parts.
_FEW_SIZES = [*((size, _FEW) for size in (SMALL[1], SMALL[3], SMALL[2])), (SMALL[5], _FEW[:1])]


def checks(device: Device) -> Iterator[Check]:
    """Yield all checks with their names."""
    on, backend, dry = device.torch_device, device.backends[CUDA], device.dry
    cut = (8, 24, 40) if dry else _CUT
    yield from _by_each_capability(_DRY_SIZES if dry else _ALL_SIZES, on, backend)
    for capability in capabilities(on):
        for name, run in (*_strided(cut, on, backend), ("in a graph", functools.partial(in_a_graph, cut, device))):
            yield f"{name}, {capability}", functools.partial(_by, capability, run)
    yield from tile_checks((_BF16,) if dry else (_BF16, _FP16), on)


def few(on: torch.device, backend: str) -> Iterator[Check]:
    """Yield one check per kernel and kind of memory access: compute-sanitizer takes a hundred times as long."""
    yield from _by_each_capability(_FEW_SIZES, on, backend)
    yield from tile_checks((_BF16,), on, PARTS[:2])


def tile_checks(dtypes: Sequence[torch.dtype], on: torch.device, parts: Sequence[int] = PARTS) -> Iterator[Check]:
    """Yield checks of product_sm90 for each tile, mask source and direction, and each number of parts of the sum."""
    if "90" not in capabilities(on) or "product_sm90" not in built.cuda_ops.contents():
        return
    for way in itertools.product(dtypes, MASKED_BY, (False, True), TILES, parts):
        dtype, masked_by, transposed, tokens, count = way
        name = f"product_sm90, {name_of(dtype)}, {masked_by}, {'d_x' if transposed else 'forward'}"
        yield (
            f"{name}, tiles of {tokens}, parts {count}",
            functools.partial(_by, "90", lambda way=way: _in_tile(*way, on)),
        )


def _in_tile(dtype: torch.dtype, masked_by: str, transposed: bool, tokens: int, parts: int, on: torch.device) -> None:
    t, by_words = _inputs(_TILED, on, dtype, dtype), masked_by == "words"
    threshold = _threshold(t.scores, False)
    a, bias = (t.grad_output, None) if transposed else (t.x, t.bias)
    packed = reference.pack_mask(t.scores, threshold, MODE if by_words else masked_by)
    mask = (None, None, packed) if by_words else (t.scores, threshold, None)
    weight = torch.where(reference.unpack_mask(packed, t.weight.shape), t.weight, 0).float()

    def product() -> list[Tensor]:
        return [built.cuda_ops.product(a, t.weight, *mask, bias, masked_by == MODE, transposed, tokens, parts)]

    def expected() -> list[Tensor]:
        return [a.float() @ weight if transposed else a.float() @ weight.T + t.bias.float()]

    assert_equal(product, expected, poison=True)


def capabilities(device: torch.device) -> tuple[str, ...]:
    """Return the capabilities whose kernels can run here: "90" and "80", or the device's own."""
    if device.type == "cpu":
        return "90", "80"
    major, minor = torch.cuda.get_device_capability(device)
    return (f"{major}{minor}", "80") if major == 9 else (f"{major}{minor}",)


def in_a_graph(size: Size, device: Device) -> None:
    """Capture what a training step launches once, and replay it on other values."""
    t, sums = _inputs(size, device.torch_device), torch.zeros(size[1:], device=device.torch_device)

    def step(backend: str) -> Iterator[Tensor]:
        cast: Callable = widened if backend == REFERENCE else lambda value: value  # in fp32 every sum is exact
        x, weight, scores, bias, grad = (cast(v) for v in (t.x, t.weight, t.scores, t.bias, t.grad_output))
        (threshold,) = results("kept_threshold", backend, (scores, 0.5, MODE))
        (packed,) = results("pack_mask", backend, (scores, threshold, MODE))
        signs, zeros = results("pack_signs", backend, (scores,))
        yield from (threshold, packed, signs, zeros)
        yield from results("masked_linear", backend, (x, weight, scores, threshold, bias, MODE))
        yield from results("masked_linear_packed", backend, (x, weight, packed, bias))
        gradients = (grad, x, weight, scores, threshold, MODE, EVERYTHING)
        yield from results("masked_linear_backward", backend, gradients)
        yield from results("accumulate_score_grad", backend, (sums, grad, x, weight, None, signs, MODE))

    def launches() -> list[Tensor]:
        with poisoned():
            return list(step(device.backends[CUDA]))

    replay = device.graph(launches)
    for seed in (1, 2):
        for value, new in zip(vars(t).values(), vars(_inputs(size, device.torch_device, seed=seed)).values()):
            value.copy_(new)
        assert_equal(replay, lambda: step(REFERENCE))


def _by_each_capability(
    sizes: Sequence[tuple[Size, Sequence[Kind]]], on: torch.device, backend: str
) -> Iterator[Check]:
    for capability in capabilities(on):
        for size, kind in ((size, kind) for size, kinds in sizes for kind in kinds):
            for name, run in _of_size(size, kind, on, backend):
                yield f"{name}, {capability}", functools.partial(_by, capability, run)


def _of_size(size: Size, kind: Kind, on: torch.device, backend: str) -> Iterator[Check]:
    dtype, scores_dtype, mode, by_row = kind
    t = _inputs(size, on, dtype, scores_dtype)
    threshold = _threshold(t.scores, by_row)
    row = ", by row" if by_row else ""
    label = f"{size}, {name_of(dtype)}, scores {name_of(scores_dtype)}, {mode}{row}"
    calls = [*dense_calls(t, threshold, mode, EVERYTHING), *accumulating_calls(t, mode)]
    yield from equal(backend, label, calls, poison=True)
    if t.scores.numel() > 1:
        yield from selection_checks(label, t.scores, threshold, backend, poison=True)


def _strided(size: Size, on: torch.device, backend: str) -> Iterator[Check]:
    """Yield checks on views that the kernels read in place, and on some that are copied first."""
    m, n, k = size
    wide = _inputs((m, n + 16, k + 24), on)

    def cut(of: int) -> Inputs:
        """Return inputs from element ``of`` on: at 8, every row still begins at a multiple of 16 bytes."""
        rows, columns = slice(of % 3, of % 3 + n), slice(of, of + k)
        return Inputs(wide.x[:, columns], wide.weight[rows, columns], wide.scores[rows, columns], wide.bias[:n],
                      wide.grad_output[:, of : of + n])  # fmt: skip

    plain = _inputs(size, on)
    x, grad = plain.x, plain.grad_output
    layouts = {
        "rows of a wider matrix": cut(8),
        "rows of a wider matrix, misaligned": cut(1),
        "column-major": Inputs(*(_column_major(v) for v in vars(plain).values())),
        "every other token": Inputs(**vars(plain) | {"x": x[::2], "grad_output": grad[::2]}),
        "an expanded gradient": Inputs(**vars(plain) | {"grad_output": grad[:1, :1].expand(m, n)}),
        "three dimensions": Inputs(**vars(plain) | {"x": x.view(4, -1, k), "grad_output": grad.view(4, -1, n)}),
        "one dimension": Inputs(**vars(plain) | {"x": x[0], "grad_output": grad[0]}),
    }
    for name, t in layouts.items():
        calls = [*dense_calls(t, _threshold(t.scores, False), MODE, EVERYTHING), *accumulating_calls(t)]
        yield from equal(backend, name, calls, poison=True)
        yield from selection_checks(name, t.scores, _threshold(t.scores, True), backend, poison=True)


def _column_major(v: Tensor) -> Tensor:
    return v.T.contiguous().T if v.dim() == 2 else v


def _inputs(
    size: Size, on: torch.device, dtype: torch.dtype = _BF16, scores_dtype: torch.dtype = _BF16, *, seed: int = 0
) -> Inputs:
    return Inputs(*(v.to(on) for v in vars(integer_inputs(*size, dtype, scores_dtype, seed=seed)).values()))


def _threshold(scores: Tensor, by_row: bool) -> Tensor:
    if by_row:
        return (torch.arange(scores.shape[0], device=scores.device) % 5 - 1).to(scores.dtype)
    return torch.tensor(1, dtype=scores.dtype, device=scores.device)


def _by(capability: str, run: Callable[[], object]) -> None:
    """Run with the kernels of that compute capability, if they can run."""
    with mock.patch.dict(os.environ, MFT_CUDA_CAPABILITY=capability):
        run()


def main() -> int:
    """Run the few checks; return 0 if all are right."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (reason := on_host.install()):
        print(reason, file=sys.stderr)
        return 2
    passed = failed = 0
    for name, run in few(device, on_host.BACKEND if device.type == "cpu" else CUDA):
        try:
            run()
            passed += 1
        except AssertionError as error:
            failed += 1
            print(f"wrong: {name}: {error}", flush=True)
    print(f"sanitized: {passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
