"""Time kept_threshold and pack_mask against PyTorch's ways to a k-th largest magnitude and to a mask."""

import functools
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..rivals import KEEP_RATIO
from .cases import CUDA, FUSED, Case
from .competitors import MODE
from .device import Device
from .kernels import kernels
from .timing import FAILURES, add_floors, reason, time_calls


def time_threshold(case: Case, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """samples and failures; case.detail is the dtype of the scores. All must agree on the threshold."""
    device.tidy()
    dtype = getattr(torch, case.detail)
    generator = torch.Generator(device.torch_device).manual_seed(0)
    first = torch.randn(case.n, case.k, generator=generator, device=device.torch_device).mul_(0.02).to(dtype)
    copies = [first] + [first.clone() for _ in range(math.ceil(4 * device.l2_bytes / first.nbytes) - 1)]
    dropped = int((1 - KEEP_RATIO) * first.numel())
    kept = first.numel() - dropped
    ours = {"": kernels(FUSED)} | ({f", {CUDA}": kernels(CUDA)} if CUDA not in device.without else {})
    selections: dict[str, Callable[[Tensor], Tensor]] = {
        **{f"kept_threshold{of}": functools.partial(_selected, by) for of, by in ours.items()},
        "sort": lambda s: s.abs().flatten().sort().values[dropped],
        "kthvalue": lambda s: s.abs().flatten().kthvalue(dropped + 1).values,
        "topk": lambda s: s.abs().flatten().topk(kept, sorted=False).values.min(),
    }
    threshold = selections["sort"](first)
    masks: dict[str, Callable[[Tensor], object]] = {
        **{f"pack_mask{of}": functools.partial(_packed, by, threshold) for of, by in ours.items()},
        **{f"pack_signs{of}": by.pack_signs for of, by in ours.items()},
        "boolean mask, eager": lambda s: s.abs() >= threshold,
    }
    failures: dict[str, str] = {}
    for name, find in selections.items():
        try:
            found = find(first).item()
        except FAILURES as error:
            failures[name] = reason(error, device)
            continue
        if found != threshold.item():
            failures[name] = f"wrong: {found!r}, the sort says {threshold.item()!r}"
    calls = {
        name: functools.partial(_on_copy, call, copies)
        for name, call in {**selections, **masks}.items()
        if name not in failures
    }
    # PyTorch's selections allocate and launch as they see fit; a graph would have to hold several times their input.
    samples, failed = time_calls(calls, len(copies), device, not_captured=frozenset({"sort", "kthvalue", "topk"}))
    for name, sample in samples.items():
        written = {"pack_mask": 1 / 8, "pack_signs": 1 / 8, "boolean mask": 1}.get(name.split(",")[0], 0)
        add_floors(sample, [(first.nbytes + first.numel() * written, 0.0)], ceilings)
        if "sort" in samples and name in selections:
            sample["times_faster_than_sort"] = samples["sort"]["ms"]["median"] / sample["ms"]["median"]
    return {
        "copies": len(copies),
        "samples": samples,
        "failures": {**failures, **failed},
        "left_out": dict(device.without),
    }


def _selected(by: SimpleNamespace, scores: Tensor) -> Tensor:
    return by.kept_threshold(scores, KEEP_RATIO, MODE)


def _packed(by: SimpleNamespace, threshold: Tensor, scores: Tensor) -> Tensor:
    return by.pack_mask(scores, threshold, MODE)


def _on_copy(call: Callable[[Tensor], object], copies: list[Tensor], copy: int) -> object:
    return call(copies[copy])
