"""How alike two masks are: the overlap of the weights that they drop, or that training flipped, against chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mft.files.figure import new_figure, save_figure

Sets = Mapping[str, Tensor]  # layer -> boolean (N, K): which of its weights belong to the set


@dataclass(frozen=True)
class Overlap:
    """The overlap of two sets of weights, A and B."""

    jaccard: float  # |A and B| / |A or B|; NaN if both sets are empty
    chance: float  # the same for random independent sets with as many weights in every layer


def overlap(a: Sets, b: Sets) -> Overlap:
    """Return the overlap of two sets, and the overlap that chance gives.

    Of a layer's n weights, n p q lie by chance in both of two sets with shares p and q.
    Raises: ValueError if the layers differ.
    """
    if list(a) != list(b) or any(a[name].shape != b[name].shape for name in a):
        raise ValueError(
            f"a and b must hold the same layers in the same shapes to be compared, got {len(a)} layers and {len(b)}: "
            "compare masks of one model and one choice of layers"
        )
    both = either = at_random = in_all = 0.0
    for name in a:
        x, y, n = int(a[name].sum()), int(b[name].sum()), a[name].numel()
        both += int((a[name] & b[name]).sum())
        either += int((a[name] | b[name]).sum())
        at_random += x * y / n
        in_all += x + y
    if not either:
        return Overlap(math.nan, math.nan)
    return Overlap(both / either, at_random / (in_all - at_random))


def overlaps(sets: Mapping[str, Sets]) -> dict[tuple[str, str], Overlap]:
    """Return the overlap of each pair of sets, in the order of their names: seeds, domains or methods."""
    names = list(sets)
    return {(one, other): overlap(sets[one], sets[other]) for i, one in enumerate(names) for other in names[i + 1 :]}


def plot_overlaps(found: Mapping[tuple[str, str], Overlap], path: Path, *, title: str) -> None:
    """Plot the overlaps as a matrix: below the diagonal the Jaccard overlap, above it what chance gives."""
    names = list(dict.fromkeys(name for pair in found for name in pair))
    table = torch.full((len(names), len(names)), torch.nan)
    for (one, other), value in found.items():
        low, high = sorted((names.index(one), names.index(other)))
        table[high, low], table[low, high] = value.jaccard, value.chance
    figure = new_figure(2.2 + 0.75 * len(names), 1.8 + 0.6 * len(names))
    axes = figure.subplots()
    image = axes.imshow(table.numpy(), vmin=0, vmax=max(0.01, table[~table.isnan()].max().item()), cmap="Blues")
    for i in range(len(names)):
        for j in range(len(names)):
            if i != j:
                dark = table[i, j] > 0.6 * image.get_clim()[1]
                axes.text(j, i, f"{table[i, j]:.3f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"{title}\nbelow the diagonal: Jaccard overlap; above: by chance", fontsize=10)
    save_figure(figure, path)
