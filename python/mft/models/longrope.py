"""Rotary frequencies that depend on the longest example of a call (longrope, as in Phi-3): use each example's length.

Up to original_max_position_embeddings tokens such a model uses one set of frequencies, beyond that another one.
transformers looks at the largest position in the whole call, so one long example changes all the others. Here, a run of
positions that rise by one is an example, and its last position decides. Padding must not count, so inputs_of renumbers
it.
"""

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mft.data.batches import MicroBatch
from mft.models.next_tokens import rotary_settings


def switch_length(model: Any) -> int | None:
    """Return the length of the longest example that uses the first set of frequencies; None if there is one set."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    ropes = rotary_settings(config.get_text_config(decoder=True))
    return min((rope["original_max_position_embeddings"] for rope in ropes if _switches(rope)), default=None)


@contextlib.contextmanager
def by_own_length(model: nn.Module, last: Tensor | None = None) -> Iterator[None]:
    """Make each example use the frequencies of its own length in this context. Other models stay unchanged.

    last: for each of position_ids (B, T), the last position of its example, if the call does not hold whole examples.
    """
    rotary = [] if switch_length(model) is None else [m for m in model.modules() if hasattr(m, "rope_type")]
    hook = partial(_own_length_rotations, last=last)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in rotary]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_long_batches(model: nn.Module) -> RemovableHandle:
    """Make calls with several rows beyond the switch raise ValueError, until the returned hook is removed."""
    return model.register_forward_pre_hook(_refuse_long_batch, with_kwargs=True)


def inputs_of(batch: MicroBatch, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return input_ids and position_ids (or None) for model; padding restarts at 0 in rows that may be long."""
    switch = switch_length(model)
    if switch is None or batch.input_ids.shape[1] <= switch:
        return batch.inputs(device)
    return batch.input_ids.to(device), batch.positions_without_padding().to(device)


def _refuse_long_batch(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    switch = switch_length(model)
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("attention_mask"))
    rows, tokens = (max(each.shape[i] for each in given if isinstance(each, Tensor)) for i in (0, -1))
    if switch is not None and rows > 1 and tokens > switch:
        raise ValueError(
            f"batch_size must be 1 for rows of more than {switch} tokens, because {type(model).__name__} then uses "
            f"other frequencies for the whole batch, got {rows} rows of up to {tokens} tokens"
        )


def _switches(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") == "longrope"


def _own_length_rotations(module: Any, args: tuple, kwargs: dict[str, Any], output: Any, *, last: Tensor | None) -> Any:
    """Return the cosines and sines (B, T, D), taking for each position the set of frequencies that fits its example."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    positions, kind = call.arguments["position_ids"], call.arguments.get("layer_type")
    rope = module.config.rope_parameters if kind is None else module.config.rope_parameters[kind]
    if not _switches(rope):
        return output
    switch = rope["original_max_position_embeddings"]

    def rotations(of: Tensor) -> tuple[Tensor, ...]:
        call.arguments["position_ids"] = of
        return module.forward(*call.args, **call.kwargs)

    first = rotations(positions.clamp(max=switch - 1))
    beyond = positions.new_full((*positions.shape[:-1], 1), switch)  # one more position makes it a long call
    second = (each[..., :-1, :] for each in rotations(torch.cat([positions, beyond], -1)))
    is_long = ((_last_of_example(positions) if last is None else last) >= switch)[..., None]
    return tuple(torch.where(is_long, b, a) for a, b in zip(first, second, strict=True))


def _last_of_example(positions: Tensor) -> Tensor:
    """Return for each of positions (..., T) the last position of its run, in which positions rise by one."""
    length = positions.shape[-1]
    ends = F.pad(positions.diff(dim=-1) != 1, (0, 1), value=True)
    places = torch.arange(length, device=positions.device).expand_as(positions)
    end = torch.where(ends, places, length - 1).flip(-1).cummin(-1).values.flip(-1)
    return positions.gather(-1, end)
