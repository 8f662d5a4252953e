"""The held-out loss around a model, on a plane in the space of some layers' weights: a grid, and its contours.

There are two kinds of planes: along two random directions whose rows are as long as the weights' rows (filter
normalisation, Li et al. 2018, arXiv 1712.09913), or through three models, so that all three lie in the picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.evaluation.evaluate import evaluate
from mft.files.figure import COLOURS, new_figure, save_figure
from mft.models.causal_lm import clone_with_own_weights
from mft.models.frozen_layers import PrefixMemory
from mft_kernels import MaskedLinear

_LEVELS = 19
_ROWS = 8  # evaluated at once
_MARKS = [COLOURS[name] for name in ("full fine-tune", "control", "mask")]

Weights = dict[str, Tensor]  # linear layer -> (N, K) fp32


@dataclass(frozen=True)
class Plane:
    """origin + x * across + y * up; marks are the models that lie in it."""

    origin: Weights
    across: Weights
    up: Weights
    marks: dict[str, tuple[float, float]]
    unit: str  # of x and y, for the axes


@dataclass(frozen=True)
class Surface:
    """The loss on a grid of a plane. losses (len(ys), len(xs)): mean nats per token."""

    xs: Tensor
    ys: Tensor
    losses: Tensor
    marks: dict[str, tuple[float, float]]
    unit: str


def weights_of(model: nn.Module, names: Sequence[str]) -> Weights:
    """Return the weights that the named linear layers multiply with: a masked layer's with its mask applied."""
    found = {}
    for name in names:
        module: Any = model.get_submodule(name)
        weight = module.weight.detach().float()
        found[name] = torch.where(module.mask(), weight, 0) if isinstance(module, MaskedLinear) else weight.clone()
    return found


def random_plane(origin: Weights, *, seed: int = 0, name: str = "origin") -> Plane:
    """Return the plane of two normal directions. Each row d is scaled to the norm of the origin's row: d |w| / |d|."""
    generator = torch.Generator().manual_seed(seed)

    def direction() -> Weights:
        drawn = {key: torch.randn(weight.shape, generator=generator) for key, weight in origin.items()}
        return {key: d * (origin[key].norm(dim=1) / d.norm(dim=1))[:, None] for key, d in drawn.items()}

    return Plane(origin, direction(), direction(), {name: (0.0, 0.0)}, "filter norms")


def plane_through(models: Mapping[str, Weights]) -> Plane:
    """Return the plane of three models: the first at 0, the second at 1 on the x axis, axes orthogonal and alike.

    Raises: ValueError if the models lie on one line.
    """
    check_rule(len(models) == 3, "models", "be three, which span a plane", len(models))
    (first, origin), (second, a), (third, b) = models.items()
    across = {key: a[key] - origin[key] for key in origin}
    towards = {key: b[key] - origin[key] for key in origin}
    length = _dot(across, across)
    x = _dot(towards, across) / length if length else 0.0
    up = {key: towards[key] - x * across[key] for key in origin}
    height = _dot(up, up)
    if not height > 1e-12 * length:
        raise ValueError(f"models must not lie on one line to span a plane, got {', '.join(models)} on one")
    scale = (length / height) ** 0.5
    up = {key: value * scale for key, value in up.items()}
    marks = {first: (0.0, 0.0), second: (1.0, 0.0), third: (x, 1 / scale)}
    return Plane(origin, across, up, marks, f"distance from {first} to {second}")


def loss_surface(
    model: nn.Module,
    plane: Plane,
    dataset,
    *,
    reach: float = 1.0,
    points: int = 11,
    first: int = 0,
    on_point: Callable[[int, int], None] | None = None,
) -> Surface:
    """Compute the loss on a grid of points x points that covers all marks, and ``reach`` beyond them on every side.

    Args: model: unmasked, with the plane's layers, not changed; first: leading layers that the plane does not change;
        on_point: called with the points done and their number.
    """
    check_rule(points >= 2, "points", "be at least 2", points)
    check_rule(reach > 0, "reach", "be positive", reach)
    ends = [(min(marks) - reach, max(marks) + reach) for marks in zip(*plane.marks.values())]
    xs, ys = (torch.linspace(*each, points, dtype=torch.float64) for each in ends)
    clone = clone_with_own_weights(model, plane.origin)
    memory = PrefixMemory()
    losses = torch.empty(points, points, dtype=torch.float64)
    for j, y in enumerate(ys.tolist()):
        for i, x in enumerate(xs.tolist()):
            _move(clone, plane, x, y)
            losses[j, i] = evaluate(clone, dataset, batch_size=_ROWS, first=first, memory=memory).loss
            if on_point is not None:
                on_point(j * points + i + 1, points * points)
    return Surface(xs, ys, losses, plane.marks, plane.unit)


def plot_surfaces(surfaces: Mapping[str, Surface], path: Path) -> None:
    """Plot contours side by side, in one colour scale and with the models marked."""
    lowest = min(surface.losses.min().item() for surface in surfaces.values())
    top = max(surface.losses.max().item() for surface in surfaces.values())
    # Squared steps, so that the basin, where the models lie, gets more lines.
    shares = torch.linspace(0, 1, _LEVELS, dtype=torch.float64).square()
    levels = (lowest + shares * max(top - lowest, 1e-6)).tolist()
    figure = new_figure(5.6 * len(surfaces) + 0.8, 5)
    panels = figure.subplots(1, len(surfaces), squeeze=False)[0]
    for axes, (title, surface) in zip(panels, surfaces.items()):
        grid = surface.xs.numpy(), surface.ys.numpy(), surface.losses.numpy()
        filled = axes.contourf(*grid, levels=levels, cmap="viridis", extend="max")
        axes.contour(*grid, levels=levels, colors="white", linewidths=0.4)
        for number, (name, (x, y)) in enumerate(surface.marks.items()):
            axes.plot(x, y, "o", color=_MARKS[number % len(_MARKS)], markeredgecolor="white", markersize=9, label=name)
        axes.set_title(title)
        axes.set_xlabel(surface.unit)
        axes.set_ylabel(surface.unit)
        axes.set_aspect("equal")
        axes.legend(loc="upper right")
    label = "held-out loss, nats per token (lower is better)"
    figure.colorbar(filled, ax=list(panels), label=label, ticks=levels[::3], format="%.4f")
    save_figure(figure, path)


@torch.no_grad()
def _move(model: nn.Module, plane: Plane, x: float, y: float) -> None:
    for name, origin in plane.origin.items():
        module: Any = model.get_submodule(name)
        module.weight.copy_(origin + x * plane.across[name] + y * plane.up[name])


def _dot(a: Weights, b: Weights) -> float:
    return sum((a[key].double() * b[key].double()).sum().item() for key in a)
