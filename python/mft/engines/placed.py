"""Placed, a model in a memory mode; and Mode, the interface of the memory modes, which mode.py has."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.config import ModelConfig, TrainConfig
from mft.data.batches import take_rows
from mft.engines.distributed import ALONE, Processes
from mft.engines.step import Reader, Runner
from mft.masks.surrogate import Surrogate
from mft.memory.ways import WAYS, Way
from mft.models.causal_lm import FEW, input_device
from mft.models.frozen_layers import PrefixMemory
from mft.models.packed_rows import keep_apart
from mft.models.pretrained import load_model
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective

Hook = Callable[[], None] | None


class Mode:
    """A memory mode: how a model is loaded, and placed in an engine, which has step, hidden_states and close."""

    name: str  # in the configuration
    trains_by_autograd = False  # whether autograd reaches the model's own parameters; then weights can be trained too
    runs_by_layers = True  # whether the layers run one by one, and can be rehearsed, instead of the model's own forward
    is_whole_on_device = False  # whether the whole model is on the device before and after training

    @property
    def estimate(self) -> Way:
        """The mode's estimate of bytes and time."""
        return WAYS[self.name]

    def load(self, config: ModelConfig, device: torch.device, processes: Processes) -> nn.Module:
        """Return the model that is to be placed on device."""
        model, _ = load_model(config)
        self.move(model, device)
        return model

    def move(self, model: nn.Module, device: torch.device) -> None:
        """Move a model to where the mode expects it."""
        if self.is_whole_on_device:
            model.to(device)

    def reading_mode(self, placed: "Placed") -> "Mode":
        """Return the mode that evaluates such a model."""
        return self

    def place(self, placed: "Placed", sample: Tensor, train: TrainConfig | None = None, hook: Hook = None) -> Runner:
        """Return the engine of the model; its close() gives the model back.

        Args: sample: a few tokens (1, T) on the model's device; train: None for an engine that is only a Reader; hook:
            called when a step's gradients are complete and not yet clipped or applied; only if autograd trains.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Placed:
    """A model in a memory mode, with what stays the same from one call to the next. mode.place makes one.

    Args:
        model: On the device if the mode runs the model's own forward; else on the CPU or on the device.
        processes: The processes that train or evaluate together. Each makes the same calls.
        objective: What is minimised, and measured in evaluations.
        surrogate: The gradient of the scores; None: the straight-through gradient.
        first, memory: In evaluations, the outputs of the first ``first`` layers are cached in memory (see
        FrozenPrefix).
            In training memory is such a cache for the frozen layers, shared with other runs on the same rows.
        remember: Whether training caches these outputs. If memory is None, they are cached only if rows are seen twice,
            and never if the model draws random numbers in training, because a frozen layer's dropout then differs.
        runner: The engine that is training the model, if one is; it then also runs evaluations.
    """

    model: nn.Module
    mode: Mode
    device: torch.device
    processes: Processes = ALONE
    objective: Objective = CROSS_ENTROPY
    surrogate: Surrogate | None = None
    first: int = 0
    memory: PrefixMemory | None = None
    remember: bool = True
    runner: Runner | None = None

    def start(self, sample: Tensor, train: TrainConfig, hook: Hook = None) -> Runner:
        """Return the runner that trains the model; see Mode.place."""
        estimate = self.mode.estimate
        check_rule(
            train.batches_at_once is None or estimate.holds_all_rows,
            "train.batches_at_once",
            f"be null with memory: {self.mode.name}, which runs one batch at a time",
            train.batches_at_once,
        )
        check_rule(
            train.reduce_every == "step" or estimate.spreads,
            "train.reduce_every",
            f"be step with memory: {self.mode.name}, which decides itself when gradients are summed",
            train.reduce_every,
        )
        return self.mode.place(self, sample, train, hook)

    def read(self, sample: Tensor) -> Reader:
        """Return what runs the model without gradients; see Mode.place."""
        return self.mode.reading_mode(self).place(self, sample)

    @contextlib.contextmanager
    def reading(self, dataset, batch_size: int) -> Iterator[Reader]:
        """Yield what runs the model over rows of dataset, batch_size at a time; it is ready for packed rows too."""
        sample = take_rows(dataset, [0]).input_ids[:, :FEW].to(input_device(self.model))
        with keep_apart(self.model, dataset, sample, batch_size), contextlib.ExitStack() as stack:
            reader: Reader | None = self.runner
            if reader is None:
                reader = self.read(sample)
                stack.callback(reader.close)
                reader.check_apart(dataset, sample, batch_size)
            yield reader
