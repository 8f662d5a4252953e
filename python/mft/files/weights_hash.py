"""The hash of a model's weights, which identifies the base that masks were learned on."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 24  # bytes hashed at once


def weights_hash(names: Iterable[str], weights: Callable[[str], Tensor]) -> str:
    """Return the sha256 over name, dtype, shape and bytes of all weights. Raises: ValueError if there are no names."""
    digest = hashlib.sha256()
    count = 0
    for name in sorted(names):
        weight = weights(name)
        digest.update(f"{name}\0{dtype_name(weight)}\0{tuple(weight.shape)}\0".encode())
        for chunk in _chunks(weight):
            digest.update(chunk)
        count += 1
    if not count:
        raise ValueError("model has no masked layers whose base could be hashed: give their names")
    return f"sha256:{digest.hexdigest()}"


def dtype_name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _chunks(weight: Tensor) -> Iterator[bytes]:
    if weight.dim() > 2:
        weight = weight.flatten(0, -2)
    rows = max(1, _CHUNK // max(1, weight.shape[1] * weight.element_size()))
    for start in range(0, weight.shape[0], rows):
        # A copy: memory that numpy has seen cannot be resized, and FSDP2 frees gathered weights by resizing.
        yield weight[start : start + rows].to("cpu", copy=True).contiguous().view(torch.uint8).numpy().tobytes()
