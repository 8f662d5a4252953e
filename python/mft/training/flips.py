"""Flips over training: the share of bits that differ from the first mask, and the share that changes per step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mft.engines.step import StepReport
from mft.files.figure import new_figure, save_figure
from mft.masks.inspection import flip_share, initial_masks
from mft.tracking.metrics import read_metrics
from mft_kernels import pack_mask, unpack_mask

PHASE = "flips"  # the phase of the events in a run's metrics file
POINTS = 100  # the most points of a run's curve, so that counting costs little


@dataclass
class FlipCurve:
    """Flips as shares of all masked weights: bits that differ from the first mask, and bits that changed per step."""

    steps: list[int]
    from_start: list[float]
    a_step: list[float]


class FlipCounter:
    """Counts flips every ``every`` steps and at the last step. Call it after each step.

    initial: the masks before the first step. write: called with step, from_start and a_step (see FlipCurve).
    take_state has the masks that were counted last.
    """

    def __init__(
        self, model: nn.Module, initial: dict[str, Tensor], write: Callable[..., object], *, every: int = 1
    ) -> None:
        self._model, self._write, self._every = model, write, every
        self._initial = self._last = initial
        self._counted = 0  # the step of _last

    def __call__(self, report: StepReport) -> None:
        if report.step % self._every == 0 or report.step == report.steps:
            self.finish(report)

    def finish(self, report: StepReport) -> None:
        """Count the last step of a run, which may have ended early, unless it has been counted."""
        since = report.step - self._counted
        if since:
            from_start, changed = flip_share(self._model, self._initial), flip_share(self._model, self._last)
            self._write(step=report.step, from_start=from_start, a_step=changed / since)
            self._last, self._counted = initial_masks(self._model), report.step

    def take_state(self) -> dict[str, Tensor]:
        """Return the tensors that put_state needs: 1 bit per weight."""
        return _packed("flips.mask", self._last) | {"flips.step": torch.tensor(self._counted)}

    def put_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue counting from take_state's tensors. Raises: ValueError, which names a missing tensor."""
        _check_there(self.take_state(), tensors)
        self._last = _unpacked("flips.mask", self._last, tensors)
        self._counted = int(tensors["flips.step"])


class FirstMasks:
    """The masks before the first step, by layer, if data chose them; put_state takes those of a checkpoint."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self._masks = masks

    def take_state(self) -> dict[str, Tensor]:
        """Return the tensors that put_state needs: 1 bit per weight."""
        return _packed("flips.first", self._masks)

    def put_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the masks of take_state. Raises: ValueError, which names a missing tensor."""
        _check_there(self.take_state(), tensors)
        self._masks.update(_unpacked("flips.first", self._masks, tensors))


def _packed(key: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    half = torch.tensor(0.5)
    return {f"{key}.{name}": pack_mask(mask.float(), half) for name, mask in masks.items()}


def _unpacked(key: str, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unpack the tensors stored under key to the names and shapes of masks."""
    return {name: unpack_mask(tensors[f"{key}.{name}"], mask.shape) for name, mask in masks.items()}


def _check_there(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"the checkpoint must hold the masks that flips were last counted on, {missing[0]} is missing there: "
            "go on with the version of mft that wrote it, or start again with --overwrite"
        )


def read_flips(metrics: Path) -> FlipCurve:
    """Read the curve from a run's metrics file. Raises: ValueError if there is none."""
    if not metrics.is_file():
        raise ValueError(f"a directory must be the output_dir of mft train, got one without {metrics}")
    events = [event for event in read_metrics(metrics) if event.get("phase") == PHASE]
    if not events:
        raise ValueError(
            f"a run must have counted flips to plot them, got none in {metrics}: mft train counts them if memory is "
            "plain"
        )
    return FlipCurve(*([event[name] for event in events] for name in ("step", "from_start", "a_step")))


def plot_flips(curves: Mapping[str, FlipCurve], path: Path) -> None:
    """Plot the flips since the start and the flips per step over training."""
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(curve.steps, [100 * share for share in curve.from_start], label=name)
        right.plot(curve.steps, [100 * share for share in curve.a_step], label=name)
    ends = ", ".join(f"{100 * curve.from_start[-1]:.2g} %" for curve in curves.values())
    left.set_title(f"{ends} of the mask's bits differ at the end", loc="left")
    left.set_ylabel("bits that differ from the first mask, %")
    right.set_ylabel("bits that change per step, %")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("optimiser step")
    left.legend()
    save_figure(figure, path)
