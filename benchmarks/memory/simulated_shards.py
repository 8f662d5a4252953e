"""The sharded engine for simulated_step.py: one process of several; the others send nothing.

torch's "fake" process group stands for the others. The loaded model is on the host.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.memory.tracker import MemoryTracker
from mft.config import TrainConfig
from mft.engines.distributed import Processes
from mft.engines.mode import MODES
from mft.engines.placed import Placed
from mft.engines.sharded import model as spread_model
from mft.engines.sharded.engine import Sharded, ShardedStates
from mft.engines.sharded.model import spread
from mft.memory.workload import Workload
from mft.models.causal_lm import head_of, run_decoder
from mft.objectives.objective import Objective
from mft_kernels.shards import is_spread, rows_here


class _Alone(Processes):
    """A process group in which the others agree to everything."""

    def together(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def largest(self, value: int) -> int:
        return value


class _States(ShardedStates):
    """States whose masks are arbitrary bits: fake scores have no order."""

    def select(self) -> None:
        self._take(self._rows, [rows_here(mask.scores).new_zeros(_ways(mask)) for mask in self._rows])

    def check(self) -> None:
        """Do nothing: fake values cannot be checked."""


@contextlib.contextmanager
def sharded_processes(workload: Workload, tracker: MemoryTracker) -> Iterator[None]:
    """Set up this process's group around a simulated step, and track what FSDP2 gathers and frees without operators."""
    if workload.memory != "sharded":
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=workload.processes)
    with contextlib.ExitStack() as patches:
        for name in ("alloc_storage", "free_storage"):
            seen = _track_calls(getattr(_fsdp_param, name), tracker)
            for module in (_fsdp_param, _fsdp_param_group):
                if hasattr(module, name):
                    patches.enter_context(patch.object(module, name, seen))
        patches.enter_context(patch.object(spread_model, "init_device_mesh", _real_mesh))
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded_runner(
    model: nn.Module, workload: Workload, train: TrainConfig, objective: Objective, tracker: MemoryTracker
) -> Sharded:
    """Return the engine that runs the step."""
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.mark_host(tensor)
    processes = _Alone(0, workload.processes)
    few, device = torch.zeros(1, 4, dtype=torch.int64), torch.device("cpu")
    copy = spread(model, few, device, processes, split=lambda model, few: (run_decoder, head_of(model)))
    for p in (p for p in copy.head.parameters() if not is_spread(p)):
        tracker.mark_device(p)  # a tensor shared with the embedding is copied whole
    placed = Placed(model, MODES["sharded"], device, processes, objective)
    return Sharded(placed, copy, _States(placed, copy, train), every_batch=workload.reduces_every_batch)


def _real_mesh(*args: Any) -> Any:
    """Make a mesh from real tensors, because it reads its numbers."""
    with unset_fake_temporarily():
        return init_device_mesh(*args)


def _track_calls(function: Any, tracker: MemoryTracker) -> Any:
    def call(tensor: Tensor) -> None:
        function(tensor)
        tracker.track([tensor])

    return call


def _ways(mask: Any) -> tuple[int, ...]:
    """Return the shape of a threshold."""
    return () if mask.scores.dim() == 2 else (len(rows_here(mask.scores)),)
