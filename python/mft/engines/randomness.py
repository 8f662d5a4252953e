"""torch's random numbers in a run: from its seed alone, the caller's own kept, taken and put back with a checkpoint."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_CPU, _CUDA = "random.cpu", "random.cuda.{}"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators, of the CPU and of every GPU, begin at seed, and are the caller's again afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def take_random_states() -> dict[str, Tensor]:
    """Of the CPU's generator and each GPU's, by name."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {_CPU: torch.get_rng_state()} | {_CUDA.format(i): state for i, state in enumerate(cuda)}


def put_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Go on from take_random_states'; a GPU that was not there then keeps its state."""
    torch.set_rng_state(tensors[_CPU])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(_CUDA.format(i))) is not None:
            torch.cuda.set_rng_state(state, i)


@torch.no_grad()
def draws_at_random(model: Any, input_ids: Tensor) -> bool:
    """Whether a causal LM draws random numbers in training (dropout, noise of a router): two passes then differ.

    Tried on a few tokens: no list of names knows every model's.
    """
    was_training, before = model.training, take_random_states()
    model.train()
    model(input_ids=input_ids, use_cache=False)
    model.train(was_training)
    after = take_random_states()
    put_random_states(before)
    return not all(torch.equal(after[name], state) for name, state in before.items())
