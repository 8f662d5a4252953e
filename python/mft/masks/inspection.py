"""Mask statistics per layer: kept share, flips since initialisation, overlap with the magnitude mask."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft.config import layer_ranges
from mft.masks.convert import masked_modules
from mft_kernels import MaskedLayer


@dataclass
class MaskStatistics:
    """Statistics of one masked layer, or of several together. Shares are of all weights, except overlap."""

    name: str
    weights: int
    kept: float
    flips: float | None  # share of weights whose bit differs from the initial mask's; None if unknown
    overlap: float  # share of the dropped weights that an equally large magnitude mask (per expert) drops too


def initial_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the current masks, on the CPU, to count flips later."""
    return {name: module.mask().cpu() for name, module in masked_modules(model).items()}


def mask_statistics(model: nn.Module, initial: dict[str, Tensor] | None = None) -> list[MaskStatistics]:
    """Return one entry per masked layer, in the model's order."""
    rows = []
    for name, module in masked_modules(model).items():
        mask = module.mask()
        flips = None if initial is None else (mask.cpu() != initial[name]).float().mean().item()
        rows.append(MaskStatistics(name, mask.numel(), mask.float().mean().item(), flips, _overlap(module, mask)))
    return rows


def combine_statistics(rows: Sequence[MaskStatistics], name: str) -> MaskStatistics:
    """Return the statistics of several rows as if they were one layer."""
    weights = sum(row.weights for row in rows)
    dropped = [row.weights * (1 - row.kept) for row in rows]
    flips = [row.weights * row.flips for row in rows if row.flips is not None]
    return MaskStatistics(
        name,
        weights,
        sum(row.weights * row.kept for row in rows) / weights,
        sum(flips) / weights if len(flips) == len(rows) else None,
        sum(row.overlap * count for row, count in zip(rows, dropped)) / sum(dropped) if any(dropped) else 1.0,
    )


def group_by_kind(rows: Iterable[MaskStatistics]) -> list[MaskStatistics]:
    """Return one row for all layers whose names differ only in their numbers: model.layers.0-2,7.mlp.up_proj."""
    groups: dict[tuple[str, ...], list[MaskStatistics]] = {}
    for row in rows:
        kind = tuple("" if part.isdecimal() else part for part in row.name.split("."))
        groups.setdefault(kind, []).append(row)
    found = []
    for alike in groups.values():
        parts = zip(*(row.name.split(".") for row in alike))
        joined = (layer_ranges(set(map(int, each))) if each[0].isdecimal() else each[0] for each in parts)
        found.append(combine_statistics(alike, ".".join(joined)))
    return found


def flip_share(model: nn.Module, initial: dict[str, Tensor]) -> float:
    """Return the share of all masked weights whose bit differs from the initial mask's."""
    masks = ((name, module.mask().cpu()) for name, module in masked_modules(model).items())  # one at a time
    flipped = sum(int((mask != initial[name]).sum()) for name, mask in masks)
    return flipped / sum(mask.numel() for mask in initial.values())


def kept_weights(packed: Iterable[Tensor]) -> int:
    """Return the number of weights that these masks of pack_mask keep. Waits for the device once."""
    return int(torch.stack([count_bits(words) for words in packed]).sum())


def count_bits(words: Tensor) -> Tensor:
    """Return the number of set bits in int32 words, int64 (): summed per pair of bits, four bits, byte and word."""
    pairs = words - (words >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    counts = ((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24
    return counts.sum(dtype=torch.int64)


def describe_size(size: int, weights: int, modules_to_save: list[str] | None = None) -> str:
    """Describe a mask file of ``size`` bytes: its bits per weight, or the modules saved in it."""
    if modules_to_save:
        return f"{size} bytes, with {', '.join(modules_to_save)}"
    return f"{size} bytes, {8 * size / weights:.3g} bits per weight"


@torch.no_grad()
def _overlap(module: MaskedLayer, mask: Tensor) -> float:
    """Return the share of the dropped weights that an equally large magnitude mask drops too."""
    dropped = both = 0
    weight = module.weight
    for each, keep in zip(weight, mask) if weight.dim() == 3 else [(weight, mask)]:  # each expert selects by itself
        if count := int((~keep).sum()):
            # The count-th smallest magnitude; ties with it count as dropped by the magnitude mask.
            magnitudes = each.float().abs()
            cut = magnitudes.flatten().kthvalue(count).values
            dropped, both = dropped + count, both + int((~keep & (magnitudes <= cut)).sum())
    return both / dropped if dropped else 1.0
