"""Which base a verb runs on, exact weights or quantised ones, and the words for it."""

import contextlib
from collections.abc import Iterator

from torch import nn

from mft.config import ModelConfig
from mft.convert import masked_modules
from mft.export_file import MaskExport


def check_exact(model: ModelConfig, verb: str) -> None:
    """Raise ValueError if the configuration quantises the base of a verb that trains weights."""
    if model.quantization is not None:
        raise ValueError(
            f"model.quantization must be null for mft {verb}, which trains weights, got {model.quantization}"
        )


def evaluated_base(model: ModelConfig, export: MaskExport | None, unquantized: bool) -> tuple[str | None, bool]:
    """(what the base is quantised to, whether the masked layers are too): as the masks were learned.

    Raises: ValueError if the configuration asks for another quantisation than that.
    """
    if unquantized:
        return None, False
    asked = (model.quantization, model.quantize_masked)
    if export is None:
        return asked
    learned = (export.base_quantization, export.quantize_masked)
    if model.quantization is not None and asked != learned:
        raise ValueError(
            f"model.quantization must be that of the base on which the masks were learned, {_words(*learned)}, got "
            f"{_words(*asked)}: leave it out, or pass --unquantized for the exact base"
        )
    return learned


def base_words(kind: str | None, quantize_masked: bool, export: MaskExport | None) -> str:
    """A line that says which base was evaluated, and on which one the masks were learned."""
    if export is None:
        return f"base: {_words(kind, True)}"
    base = f"base: {_words(kind, quantize_masked)}"
    learned = (export.base_quantization, export.quantize_masked)
    if learned == (kind, quantize_masked):
        return f"{base}, as the masks were learned"
    return f"{base}; the masks were learned on {_words(*learned)}"


@contextlib.contextmanager
def keeping_all(model: nn.Module) -> Iterator[None]:
    """Masked layers keep every weight meanwhile: a model without its masks, and without a second copy of it."""
    masked = masked_modules(model).values()
    before = [(module.threshold, module.keep_ratio) for module in masked]
    for module in masked:
        module.threshold, module.keep_ratio = None, 1.0
    try:
        yield
    finally:
        for module, (threshold, keep_ratio) in zip(masked, before):
            module.threshold, module.keep_ratio = threshold, keep_ratio


def _words(kind: str | None, quantize_masked: bool) -> str:
    if kind is None:
        return "exact weights"
    return f"{kind} weights{'' if quantize_masked else ', those of masked layers exact'}"
