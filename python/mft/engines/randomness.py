"""torch's random generators in a run: seeded by the run's seed, saved in checkpoints, and restored for the caller."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_CPU, _CUDA = "random.cpu", "random.cuda.{}"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators of the CPU and of every GPU inside the context; restore the caller's states after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def take_random_states() -> dict[str, Tensor]:
    """Return the states of the CPU's generator and of each GPU's, by name."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {_CPU: torch.get_rng_state()} | {_CUDA.format(i): state for i, state in enumerate(cuda)}


def put_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Restore the states of take_random_states. A GPU without a saved state keeps its own."""
    torch.set_rng_state(tensors[_CPU])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(_CUDA.format(i))) is not None:
            torch.cuda.set_rng_state(state, i)


@torch.no_grad()
def draws_at_random(model: Any, input_ids: Tensor) -> bool:
    """Return whether a causal LM draws random numbers in training, tested by forward passes over a few tokens."""
    was_training, before = model.training, take_random_states()
    model.train()
    model(input_ids=input_ids, use_cache=False)
    model.train(was_training)
    after = take_random_states()
    put_random_states(before)
    return not all(torch.equal(after[name], state) for name, state in before.items())
