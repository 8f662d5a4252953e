"""Functions that the launchers of the matrix kernels share: what TMA can read, the arithmetic, the sign's source."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...operands import Keep
from .plan import Operands
from .target import Target, interpreting


def sign_kind(sign: Tensor | None) -> str:
    """Return where the sign of d_scores comes from: "bits" (int32 words), "scores" or "none"."""
    if sign is None:
        return "none"
    return "bits" if sign.dtype == torch.int32 else "scores"


def is_exact(tensor: Tensor) -> bool:
    """Return whether the tensor's products are computed in full fp32 precision."""
    return tensor.dtype == torch.float32 and _precision() == "ieee"


def operands(weight: Tensor, keep: Keep | None, is_aligned: bool) -> Operands:
    """Return the properties of these tensors that decide the tiles."""
    keep_bytes = 0 if keep is None or keep.mode == "packed" else keep.source.element_size()
    return Operands(weight.element_size(), keep_bytes, is_exact(weight), is_aligned)


def arithmetic(weight: Tensor) -> dict[str, str | bool]:
    """Return the constexprs that say how tiles are multiplied."""
    return {
        "PRECISION": _precision() if weight.dtype == torch.float32 else "ieee",
        "UPCAST": interpreting() and weight.dtype == torch.bfloat16,
    }


def aligned(*tensors: Tensor) -> bool:
    """Return whether rows begin at multiples of 16 bytes and have no gaps. Wide loads and TMA need both."""
    return all(
        t.stride(1) == 1 and t.stride(0) > 0 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )


def describable(target: Target, operands: Operands) -> bool:
    """Return whether tiles are read through TMA descriptors.

    Exact fp32 does not use them: it multiplies in ordinary registers, which would spill.
    """
    return target.descriptors and operands.aligned and not operands.exact


def tiled(tensor: Tensor, block: list[int], described: bool) -> Tensor | TensorDescriptor:
    """Return the tensor, or its descriptor for tiles of ``block``."""
    return TensorDescriptor.from_tensor(tensor, block) if described else tensor


def strides(tensor: Tensor | None, axes: int = 2) -> tuple[int, ...]:
    """Return the tensor's strides; zeros for None, which a kernel does not read."""
    return (0,) * axes if tensor is None else tensor.stride()


def _precision() -> str:
    # PyTorch's own setting, which torch.set_float32_matmul_precision changes.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
