"""The memory modes, one class each. A new mode is a class here, and one in memory/ways.py that estimates it."""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mft.config import ModelConfig, TrainConfig
from mft.engines.distributed import Processes
from mft.engines.in_place_engine import InPlace, InPlaceStates
from mft.engines.layer_calls import LayerCalls
from mft.engines.layer_engine import LayerEngine
from mft.engines.layerwise import Layerwise
from mft.engines.offload import Mover
from mft.engines.own_forward import Forward
from mft.engines.placed import Hook, Mode, Placed
from mft.engines.plain import Plain
from mft.engines.randomness import draws_at_random
from mft.engines.resident import Resident
from mft.engines.score_states import current_masks, grad_dtype, score_groups, score_optimizer
from mft.engines.sharded.engine import SpreadForward, start_forward, start_sharded
from mft.engines.sharded.score_rows import ScoreRows, score_rows
from mft.masks.convert import masked_modules
from mft.models.causal_lm import Run, input_device, split_at_head
from mft.models.pretrained import load_unread
from mft.models.weight_files import weight_files

Device = torch.device | str | None


class PlainMode(Mode):
    """Autograd over the model's own forward."""

    name = "plain"
    trains_by_autograd, runs_by_layers, is_whole_on_device = True, False, True

    def place(self, placed: Placed, sample: Tensor, train: TrainConfig | None = None, hook: Hook = None) -> Any:
        run, head = split_at_head(placed.model, sample)
        if train is None:
            return Forward(placed, run, head)
        if placed.memory is not None and draws_at_random(placed.model, sample):
            placed = dataclasses.replace(placed, memory=None)
        return self.train(placed, run, head, train, hook)

    def train(self, placed: Placed, run: Run, head: nn.Module, train: TrainConfig, hook: Hook) -> Plain | InPlace:
        """Return the engine that trains."""
        return Plain(placed, run, head, train, hook)


class InPlaceMode(PlainMode):
    """Autograd over weights that hold their masks."""

    name = "in_place"
    trains_by_autograd = False

    def train(self, placed: Placed, run: Run, head: nn.Module, train: TrainConfig, hook: Hook) -> InPlace:
        optimizer = score_optimizer(score_groups(masked_modules(placed.model).values()), train)
        states = InPlaceStates(placed, optimizer, grad_dtype=grad_dtype(train))
        with contextlib.ExitStack() as undo:
            undo.callback(states.close)
            runner = InPlace(placed, run, head, states)
            undo.pop_all()
        return runner


class ResidentMode(Mode):
    """Layer by layer, with all weights on the device."""

    name = "resident"
    engine: type[LayerEngine] = Resident

    def place(self, placed: Placed, sample: Tensor, train: TrainConfig | None = None, hook: Hook = None) -> LayerEngine:
        masks = current_masks(masked_modules(placed.model))
        with contextlib.ExitStack() as undo:
            for mask in masks:  # an earlier engine may have left the scores on another device than the weights
                mask.packed = mask.packed.to(sample.device)
                mask.hold(None)
                undo.callback(mask.module.release)
            if train is not None and draws_at_random(placed.model, sample):
                raise ValueError(
                    "memory must be plain for a model with dropout, or other noise in training, got "
                    f"{self.name}: layers are run twice, and the two runs must agree; set the dropout of the model's "
                    "configuration to 0"
                )
            run, head = split_at_head(placed.model, sample)
            calls = LayerCalls(placed.model, run)
            calls.check(sample)
            engine = self.engine(placed, calls, head, masks, Mover(placed.device), train)
            undo.pop_all()
        return engine


class QuantizedMode(ResidentMode):
    """Resident over a base that is quantised already."""

    name = "quantized"


class LayerwiseMode(ResidentMode):
    """Layer by layer, with two layers' weights on the device."""

    name = "layerwise"
    engine = Layerwise


class ShardedMode(Mode):
    """Autograd over a copy that is spread over processes; the model itself stays on the CPU or in files."""

    name = "sharded"
    runs_by_layers = False

    def load(self, config: ModelConfig, device: torch.device, processes: Processes) -> nn.Module:
        """Return a model whose weights stay in their files, if they can be read there; else the whole model."""
        model, _ = load_unread(config)
        if weight_files(model) is not None:
            ScoreRows(model, processes, device)
        return model

    def reading_mode(self, placed: Placed) -> Mode:
        """Return another mode for a model that is whole in host memory."""
        if score_rows(placed.model) is not None:
            return self
        return MODES["plain" if placed.device.type == "cpu" else "layerwise"]

    def place(
        self, placed: Placed, sample: Tensor, train: TrainConfig | None = None, hook: Hook = None
    ) -> SpreadForward:
        return start_forward(placed, sample) if train is None else start_sharded(placed, sample, train)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (PlainMode(), InPlaceMode(), ResidentMode(), QuantizedMode(), LayerwiseMode(), ShardedMode())
}


def place(model: nn.Module | Placed, *, way: str = "plain", device: Device = None, **options: Any) -> Placed:
    """Return the model in the memory mode ``way``; a model that is placed already only gets the options.

    Args: way: see docs/how-to/memory.md; device: None for the first GPU, or the CPU (plain and in_place run the model
        where it is); options: further fields of Placed, such as objective and processes.
    """
    if isinstance(model, Placed):
        return dataclasses.replace(model, **options)
    if way not in MODES:
        raise ValueError(f"way must be one of {', '.join(MODES)}, got {way!r}")
    where = input_device(model) if MODES[way].is_whole_on_device else device_named(device)
    return Placed(model, MODES[way], where, **options)


def device_named(device: Device) -> torch.device:
    """Return the device of this name; for None the first GPU, or the CPU if there is none."""
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch finds, got {device} and no GPU: leave it out, or say cpu")
    return device


def default_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
