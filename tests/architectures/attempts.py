"""Try one architecture and say why it is converted, refused by mask_model, wrong, or not made by transformers.

Converted means three things. With everything kept, the outputs are the model's own bit for bit; for a mixture of
experts, which sums in a different order, they are within 1e-5 of the largest output. With a share kept, the scores of
every masked layer that was called get a gradient. After merging, the outputs stay within 1e-5 of the largest.
A causal model that predicts next tokens also takes a step of mft train's. An error of that step is added to what is
left out.
"""

import contextlib
import copy
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.models.next_tokens import check_next_tokens
from mft.training.loop import train_masks
from mft_kernels import MaskedGroupedLinear

from .inputs import answer, model_inputs
from .rows import UNTRAINED, Row
from .sizes import INSTEAD, NOT_HERE, WHERE_REFUSED
from .small import small_model
from .sweeps import Sweep

# Errors that other code may raise at untested sizes.
THEIRS = (
    *(AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError),
    *(ValueError, ZeroDivisionError, StrictDataclassError),
)


def attempt(sweep: Sweep, kind: str, make: Callable[[Any], Any]) -> Row:
    """Try one model type."""
    if kind in NOT_HERE:
        return Row(kind, "not made", NOT_HERE[kind])
    try:
        # Frozen, as in mask_model: torch's own attention takes another path if weights need gradients.
        base = small_model(kind, sweep.name, make).requires_grad_(False)
        given = model_inputs(base, kind, sweep)
        with torch.no_grad(), _contiguous(base):
            expected = answer(base, given)
        if not expected.isfinite().all():
            raise ValueError("its outputs are not finite")
    except THEIRS as error:
        return Row(kind, "not made", first_line(error))
    choice, note, masked = INSTEAD.get(kind, {}), "", None
    try:
        masked, note = _masked(base, choice, keep_ratio=1.0)
    except ValueError as error:
        if kind not in WHERE_REFUSED:
            return Row(kind, "refused", first_line(error))
        choice, note = WHERE_REFUSED[kind], f"by default refused: {first_line(error)}"
    try:
        masked = masked or _masked(base, choice, keep_ratio=1.0)[0]
        row = _held(kind, base, masked, choice, given, expected, note)
    except THEIRS as error:
        return Row(kind, "wrong", f"masked, it raised {first_line(error)}")
    if row.state == "converted" and sweep.name == "causal":
        untrained = _untrained(base, kind, choice)
        row.left = "; ".join(filter(None, (row.left, untrained)))
    return row


def _untrained(base: nn.Module, kind: str, choice: dict[str, Any]) -> str:
    """Return why mft train cannot take a step with the model; "" if it can."""
    tokens = (torch.arange(48).reshape(4, 12) % 40 + 3).tolist()
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens, "document": [0, 1, 2, 3]})
    try:
        check_next_tokens(base.config, kind)
        train_masks(_masked(base, choice, keep_ratio=0.7)[0], rows, TrainConfig(steps=1, batch_size=2))
    except THEIRS as error:
        return f"{UNTRAINED}{first_line(error)}"
    return ""


def _held(
    kind: str,
    base: nn.Module,
    masked: nn.Module,
    choice: dict[str, Any],
    given: dict[str, Any],
    expected: Tensor,
    note: str,
) -> Row:
    """Check a model that keeps everything, and one that keeps a share, against the requirements above."""
    with torch.no_grad(), _contiguous(masked), _reference_kernels():
        found = answer(masked, given)
        is_mixture = any(isinstance(module, MaskedGroupedLinear) for module in masked.modules())
        same = _are_close(found, expected) if is_mixture else torch.equal(found, expected)
        if not same:
            return Row(kind, "wrong", f"with everything kept the outputs differ by {(found - expected).abs().max()}")
    masked, _ = _masked(base, choice, keep_ratio=0.7)
    layers = masked_modules(masked)
    silent, called = _without_gradient(masked, layers, given)
    if silent or not called:
        return Row(kind, "wrong", f"no gradient reached {', '.join(silent[:3]) or 'any layer: none was called'}")
    with torch.no_grad():
        found = answer(masked, given)
        merged = answer(merge_model(masked), given)
    if not _are_close(merged, found):
        return Row(kind, "wrong", f"merging changed the outputs by {(merged - found).abs().max()}")
    suffixes = sorted({name.rpartition(".")[2] for name in layers})
    asked = "".join(f", with {name}={value}" for name, value in choice.items())
    return Row(kind, "converted", f"{len(layers)} layers: {', '.join(suffixes)}{asked}", note)


def _are_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def _masked(base: nn.Module, choice: dict[str, Any], keep_ratio: float) -> tuple[nn.Module, str]:
    """Return a masked copy, and what the default leaves out. Scores are magnitudes if all is kept, else random."""
    config = MaskConfig(keep_ratio=1.0) if keep_ratio == 1.0 else MaskConfig.paper(keep_ratio=keep_ratio)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masked = mask_model(copy.deepcopy(base), dataclasses.replace(config, **choice))
    return masked, _left_out(str(warning.message) for warning in told)


def first_line(error: BaseException) -> str:
    """Return an error's first line; for our own errors, the rule without the remedy."""
    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0]
    line = re.sub(
        r" \(\d+ more cannot be masked either\)|\. (Choose other target_modules|Untie it first|You can install).*",
        "",
        line,
    )
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


@contextlib.contextmanager
def _contiguous(model: nn.Module) -> Iterator[None]:
    """Give linear layers contiguous inputs; for others, torch adds the bias separately, with one more rounding."""

    def straighten(_: nn.Module, arguments: tuple) -> tuple:
        return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(straighten) for module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _reference_kernels() -> Iterator[None]:
    """Use PyTorch's own product; other kernels sum in a different order, so bits could not be compared."""
    with mock.patch.dict(os.environ, MFT_KERNELS="reference"):
        yield


def _without_gradient(model: nn.Module, layers: dict[str, Any], given: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Return the layers whose scores got no gradient, and all layers that were called with more than zeros.

    A decoder's first layer may receive only zeros (DETR's queries); then the gradient of its scores is zero too.
    """
    called: set[str] = set()

    def note(name: str, arguments: tuple) -> None:
        if not arguments or arguments[0].any():
            called.add(name)

    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, arguments, __, name=name: note(name, arguments))
    answer(model, given).float().square().sum().backward()
    return [name for name in layers if name in called and not _has_gradient(layers[name].scores)], called


def _has_gradient(scores: Any) -> bool:
    return scores.grad is not None and bool(scores.grad.isfinite().all()) and bool(scores.grad.any())


def _left_out(messages: Iterable[str]) -> str:
    """Return what mask_model's warnings name."""
    said = "; ".join(messages)
    endings = re.findall(r"neither by name or shape: (.*?) \(\S+ and \d+ more\)", said)
    return "; ".join(endings + re.findall(r"and leaves out those of (.*?)\. Name", said))
