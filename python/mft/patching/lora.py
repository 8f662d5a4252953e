"""Write masks as a LoRA adapter for runtimes that can only add: W + B A, where B A is minus the dropped weights."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFType

from mft.files.atomic import atomic_file
from mft.files.gguf_file import GgufTensor
from mft.patching.locks import check_new, lock_for_reading
from mft.patching.patch_plan import LoadBase, Plan, plan_patch, tensor_values


@dataclass(frozen=True)
class Adapter:
    """A written adapter and its rounding error."""

    path: Path
    bytes: int
    dropped: int  # weights
    rounded: int  # dropped weights that float16 does not hold exactly
    largest_error: float  # largest |value| that remains of a dropped weight
    base: str  # a sentence that says whether the file was the masks' base

    @property
    def is_exact(self) -> bool:
        return self.rounded == 0


def write_gguf_lora(
    model: str | os.PathLike,
    masks: str | os.PathLike,
    output: str | os.PathLike,
    *,
    load_base: LoadBase | None = None,
    force: bool = False,
) -> Adapter:
    """Write masks as a LoRA adapter of full rank for a GGUF file, in float16: for runtimes that can only add.

    ``W + B A = where(mask, W, 0)`` for each masked tensor W, (N, K), of any type. A is the identity, (K, K), and B is
    minus the dropped weights, (N, K). If N < K, B is the identity, (N, N), and A is minus the dropped weights. The
    equation is exact if float16 holds the dropped weights exactly; is_exact tells. The adapter may have more bytes than
    the model.

    Args: as for patch_gguf; model: the file that the adapter is for, only read.
    Raises: as patch_gguf; ValueError also for experts, because their tensors have three dimensions.
    """
    with lock_for_reading(Path(model)):
        return write_adapter(plan_patch(model, masks, load_base=load_base, force=force), output)


def adapter_size(plan: Plan) -> int:
    """Return the number of bytes of an adapter's tensors. Raises: ValueError if a tensor has three dimensions."""
    return sum(2 * rank * (rows + columns) for rank, rows, columns in map(_ranks, _tensors(plan)))


def write_adapter(plan: Plan, output: str | os.PathLike) -> Adapter:
    """Do write_gguf_lora for a plan."""
    target = Path(output)
    check_new(target)
    tensors = _tensors(plan)
    rounded, largest = 0, 0.0
    with atomic_file(target) as scratch:
        writer = GGUFWriter(scratch, plan.header.architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # with alpha 0, llama.cpp uses no scale at any rank
        for tensor in tensors:
            rank, rows, columns = _ranks(tensor)
            for part, shape in (("lora_a", (rank, columns)), ("lora_b", (rows, rank))):
                writer.add_tensor_info(
                    f"{tensor.name}.{part}",
                    shape,
                    np.dtype(np.float16),
                    2 * shape[0] * shape[1],
                    GGMLQuantizationType.F16,
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            rank, rows, _ = _ranks(tensor)
            minus, exact = _minus_dropped(plan, tensor)
            error = np.abs(exact - minus.astype(np.float32))
            rounded += int((error != 0).sum())
            largest = max(largest, float(error.max(initial=0)))
            identity = np.eye(rank, dtype=np.float16)
            for factor in (minus, identity) if rank < tensor.shape[1] else (identity, minus):
                writer.write_tensor_data(factor)
        writer.close()
    return Adapter(target, target.stat().st_size, plan.count, rounded, largest, plan.base)


def _tensors(plan: Plan) -> list[GgufTensor]:
    tensors = [plan.tensor(name) for name in plan.dropped]
    for tensor in tensors:
        if len(tensor.shape) != 2:
            raise ValueError(
                f"{plan.path}: an adapter's tensors must have two dimensions, got {tensor.shape} of {tensor.name}: "
                "patch the model itself"
            )
    return tensors


def _ranks(tensor: GgufTensor) -> tuple[int, int, int]:
    """Return (rank, rows, columns). The identity is on the smaller side."""
    rows, columns = tensor.shape
    return min(rows, columns), rows, columns


def _minus_dropped(plan: Plan, tensor: GgufTensor) -> tuple[np.ndarray, np.ndarray]:
    """Return minus the dropped weights, 0 elsewhere: in float16, and exact in float32."""
    exact = np.zeros(tensor.shape, np.float32)
    elements = plan.dropped[tensor.name]
    exact.flat[elements] = -tensor_values(plan.path, tensor).reshape(-1)[elements]
    with np.errstate(over="ignore"):
        return exact.astype(np.float16), exact
