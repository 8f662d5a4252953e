"""Reproduce, on any processor, the errors of torch's 16-bit GEMM on processors with AMX (oneDNN 3.12).

On AMX, the GEMM reads each row of an operand up to the next multiple of 32 elements. It multiplies the elements behind
the row (the pitch or the next row) by 0, so a NaN or Inf there becomes NaN in the result.
`PYTHONPATH=tests pytest -p amx_gemm` runs any tests with these errors.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 32  # 16-bit elements in a row of an AMX tile


@contextlib.contextmanager
def amx_gemm() -> Iterator[None]:
    """Within the context, every CPU product of two matrices has these errors, also one that C++ calls."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the replacement, which is intended here
            library.impl("mm", _mm, "CPU")
            library.impl("mm.out", _mm_out, "CPU")
            library.impl("addmm", _addmm, "CPU")
            library.impl("addmm.out", _addmm_out, "CPU")
        yield
    finally:
        library._destroy()


def pytest_configure(config) -> None:
    """As a pytest plugin: apply the errors to all tests."""
    context = amx_gemm()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    product = torch.bmm(a.to(wide)[None], b.to(wide)[None])[0]
    if a.element_size() == 2:
        product[_leaks(a)] = torch.nan
        product[:, _leaks(b.T)] = torch.nan
    return product.to(a.dtype)


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_mm(a, b))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    leaks = _mm(a, b).isnan() if a.element_size() == 2 else torch.zeros((), dtype=torch.bool)
    product = torch.baddbmm(bias.to(wide), a.to(wide)[None], b.to(wide)[None], beta=beta, alpha=alpha)[0]
    return product.masked_fill(leaks, torch.nan).to(a.dtype)


def _addmm_out(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    return out.copy_(_addmm(bias, a, b, beta=beta, alpha=alpha))


def _leaks(operand: Tensor) -> Tensor:
    """Return which rows of an operand (P, Q) the memory behind them spoils, in a product that sums over Q."""
    rows = len(operand)
    spoilt = torch.zeros(rows, dtype=torch.bool)
    if operand.numel() == 0:
        return spoilt
    if operand.stride(1) == 1 and operand.stride(0) > 0:
        return ~_behind(operand).isfinite().all(1)
    if operand.stride(0) == 1 and operand.stride(1) > rows:  # transposed: it is copied correctly unless it has a pitch
        return spoilt | ~_behind(operand.T).isfinite().all()
    return spoilt


def _behind(operand: Tensor) -> Tensor:
    """Return the elements behind each row, up to a multiple of _TILE elements; 0 beyond the end of the memory."""
    rows, columns = operand.shape
    memory = torch.empty(0, dtype=operand.dtype).set_(operand.untyped_storage())
    end = operand.storage_offset() + torch.arange(rows) * operand.stride(0) + columns
    index = end[:, None] + torch.arange(math.ceil(columns / _TILE) * _TILE - columns)
    return torch.where(index < len(memory), memory[index.clamp(max=len(memory) - 1)], 0)
