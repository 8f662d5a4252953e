"""mft patch: write masks into a GGUF file, restore the original, or write a LoRA adapter for the file.

Its arguments are checked before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mft.patching.locks import check_there
from mft.tracking.console import say

if TYPE_CHECKING:
    from torch import nn

    from mft.patching.patch import Patched


@dataclass(frozen=True)
class Request:
    """The arguments of mft patch. Raises: ValueError if they do not go together; FileNotFoundError without a model."""

    model: Path
    rest: tuple[str, ...]  # MASKS OUTPUT; with undo OUTPUT alone; without OUTPUT in place and for lora
    undo: bool
    in_place: bool
    widen: str | None
    lora: Path | None
    base: str | None
    dtype: str | None
    force: bool

    def __post_init__(self) -> None:
        if self.undo:
            for option, value in (("--widen", self.widen), ("--lora", self.lora), ("--base", self.base)):
                if value is not None:
                    raise ValueError(f"{option} must not come with --undo, got {value}")
        elif self.lora is not None:
            for option, given in (("--in-place", self.in_place), ("--widen", self.widen)):
                if given:
                    raise ValueError(f"{option} must not come with --lora, which leaves the model as it is, got both")
        elif self.in_place and self.widen is not None:
            raise ValueError(f"--widen must not come with --in-place, got {self.widen}: wider tensors do not fit")
        names = [] if self.undo else ["MASKS"]
        names += [] if self.in_place or self.lora is not None else ["OUTPUT"]
        if len(self.rest) != len(names):
            wanted = " ".join(["MODEL", *names])
            given = " ".join((str(self.model), *self.rest))
            raise ValueError(f"arguments must be {wanted} with these options, got {given}")
        check_there(self.model)


def run_patch(request: Request) -> None:
    """mft patch"""
    if request.undo:
        _undo(request)
    elif request.lora is not None:
        _write_lora(request)
    else:
        _patch(request)


def _patch(request: Request) -> None:
    from mft.patching.patch import patch_gguf, patch_gguf_in_place

    if request.in_place:
        (masks,) = request.rest
        say(
            f"warning: a running llama.cpp that has {request.model} open computes with the new weights at once",
            "yellow",
        )
        patched = patch_gguf_in_place(request.model, masks, load_base=_loader(request, masks), force=request.force)
    else:
        masks, output = request.rest
        patched = patch_gguf(
            request.model,
            masks,
            output,
            widen=request.widen,
            load_base=_loader(request, masks),
            force=request.force,
        )
    _report(request, patched)


def _report(request: Request, patched: Patched) -> None:
    say(patched.base)
    how = f", where {patched.changed:,} bytes of codes changed" if patched.widened < patched.dropped else ""
    if patched.grown:
        how += (
            f"; {patched.widened:,} of them lie in tensors that are now float32, which makes the file "
            f"{patched.grown:,} bytes longer"
        )
    say(f"patched: {patched.dropped:,} weights are 0 in {patched.path}{how}")
    how = "--undo --in-place" if request.in_place else "ORIGINAL --undo"
    say(f"the old bytes lie in {patched.undo}: mft patch {patched.path} {how} restores the original")


def _undo(request: Request) -> None:
    from mft.patching.patch import undo_gguf_patch, undo_gguf_patch_in_place

    if request.in_place:
        restored = undo_gguf_patch_in_place(request.model)
    else:
        restored = undo_gguf_patch(request.model, *request.rest)
    say(f"restored: {restored} has the SHA-256 of the file that was patched")


def _write_lora(request: Request) -> None:
    from mft.patching.lora import adapter_size, write_adapter
    from mft.patching.patch_plan import plan_patch

    (masks,) = request.rest
    plan = plan_patch(request.model, masks, load_base=_loader(request, masks), force=request.force)
    size = adapter_size(plan)
    assert request.lora is not None
    say(f"{plan.base}; the adapter takes {size} bytes, the model {request.model.stat().st_size}")
    adapter = write_adapter(plan, request.lora)
    exact = "float16 holds each of them exactly"
    if not adapter.is_exact:
        exact = f"float16 rounds {adapter.rounded:,} of them, by {adapter.largest_error:.2g} at the most"
    say(f"{adapter.path}: an adapter that subtracts {adapter.dropped:,} dropped weights; {exact}")


def _loader(request: Request, masks: str) -> Callable[[], nn.Module]:
    """Return a function that loads the base of the masks, as mft verify does."""
    from mft.masks.location import masks_directory
    from mft.training.inputs import read_base

    return lambda: read_base(masks_directory(masks), request.base, request.dtype)[0]
