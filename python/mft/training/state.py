"""Save and restore the state of a training run between two steps, without model, data and configuration.

learned.NAME           fp32 masters of weights, or scores, as they are stored
optimizer.PLACE.KEY    moments and their scales; PLACE is the number of the learned tensor
random.cpu, random.cuda.INDEX

With memory: sharded the first two are DTensors, which are read in place (spread_rows.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mft.engines.randomness import put_random_states, take_random_states
from mft.engines.step import Runner
from mft.training.spread_rows import read_rows, shapes_in
from mft_kernels import MaskAdamW
from mft_kernels.internal import is_spread

_MOMENTS = 8  # bytes per element of torch's AdamW


def take_state(runner: Runner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, numbers). The tensors are the runner's own, so the next step changes them."""
    tensors = {f"learned.{name}": tensor for name, tensor in runner.states.learned().items()}
    numbers: dict[str, Any] = {}
    for place, values in runner.states.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"optimizer.{place}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                numbers[name] = value
    return tensors | take_random_states(), numbers


def put_state(runner: Runner, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], folder: Path) -> None:
    """Restore the result of take_state. Raises: ValueError, which names a tensor that does not fit the runner."""
    learned = {f"learned.{name}": tensor for name, tensor in runner.states.learned().items()}
    own = _learned_and_moments(runner, learned) if runner.in_lockstep else learned
    there = shapes_in(folder) if runner.in_lockstep else {n: (t.shape, t.dtype) for n, t in tensors.items()}
    found = {name for name in there if name.startswith("learned.")}
    if found != learned.keys() or not own.keys() <= there.keys():
        name = min(found ^ learned.keys() or own.keys() - there.keys())
        where = "only in the checkpoint" if name in found else "missing there"
        raise ValueError(f"the checkpoint must hold what this run trains, but {name} is {where}")
    for name, tensor in own.items():
        shape, dtype = there[name]
        if (shape, dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, the checkpoint has {dtype} of "
                f"shape {tuple(shape)}"
            )
    if runner.in_lockstep:
        read_rows(own, folder)
        tensors = {**tensors, **own}
    else:
        with torch.no_grad():
            for name, tensor in learned.items():
                tensor.copy_(tensors[name])
    states: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *numbers.items()):
        if name.startswith("optimizer."):
            _, place, key = name.split(".")
            states.setdefault(int(place), {})[key] = value
    runner.states.optimizer.load_state_dict(runner.states.optimizer.state_dict() | {"state": states})
    runner.states.refresh()
    put_random_states(tensors)


def _learned_and_moments(runner: Runner, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trained tensors and their moments. Moments that do not exist yet are created."""
    optimizer = runner.states.optimizer
    assert isinstance(optimizer, MaskAdamW), "what steps scores that are spread"
    for p in learned.values():
        optimizer.tensors(p)
    return {**learned, **{n: t for n, t in take_state(runner)[0].items() if is_spread(t)}}


def state_bytes(runner: Runner) -> int:
    """Return the bytes of take_state's tensors once all moments exist; for a runner in lockstep, of the local rows."""
    learned, optimizer = runner.states.learned().values(), runner.states.optimizer
    if isinstance(optimizer, MaskAdamW):
        return sum(tensor.nbytes for p in learned for tensor in optimizer.tensors(p).values())
    return sum(p.nbytes + _MOMENTS * p.numel() for p in learned)
