"""Where a training run stands between two steps, beside model, data and configuration: taken from a runner, put back.

learned.NAME           fp32 masters of weights, or scores, as they rest
optimizer.PLACE.KEY    moments and their scales; PLACE counts the learned tensors
random.cpu, random.cuda.INDEX
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mft.engines.randomness import put_random_states, take_random_states
from mft.engines.step import Runner
from mft_kernels import MaskAdamW

_MOMENTS = 8  # bytes an element of torch's AdamW


def take_state(runner: Runner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers), the tensors those of the runner itself: the next step changes them."""
    tensors = {f"learned.{name}": tensor for name, tensor in runner.learned().items()}
    numbers: dict[str, Any] = {}
    for place, values in runner.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"optimizer.{place}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                numbers[name] = value
    return tensors | take_random_states(), numbers


def put_state(runner: Runner, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Continue from take_state's of a run with the same model and configuration.

    Raises: ValueError, naming a tensor that is missing, unknown or of another shape or dtype.
    """
    learned = {f"learned.{name}": tensor for name, tensor in runner.learned().items()}
    found = {name for name in tensors if name.startswith("learned.")}
    if found != learned.keys():
        name = min(found ^ learned.keys())
        raise ValueError(f"the checkpoint must hold what this run trains, but {name} is {_where(name, found)}")
    for name, tensor in learned.items():
        saved = tensors[name]
        if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, the checkpoint has {saved.dtype} of "
                f"shape {tuple(saved.shape)}"
            )
    with torch.no_grad():
        for name, tensor in learned.items():
            tensor.copy_(tensors[name])
    states: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *numbers.items()):
        if name.startswith("optimizer."):
            _, place, key = name.split(".")
            states.setdefault(int(place), {})[key] = value
    runner.optimizer.load_state_dict(runner.optimizer.state_dict() | {"state": states})
    runner.relearned()
    put_random_states(tensors)


def state_bytes(runner: Runner) -> int:
    """What take_state's tensors will take once every moment exists."""
    learned, optimizer = runner.learned().values(), runner.optimizer
    if isinstance(optimizer, MaskAdamW):
        return sum(tensor.nbytes for p in learned for tensor in optimizer.tensors(p).values())
    return sum(p.nbytes + _MOMENTS * p.numel() for p in learned)


def _where(name: str, found: set[str]) -> str:
    return "in the checkpoint alone" if name in found else "missing there"
