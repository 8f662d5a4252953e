"""The parts of a causal language model that the recipe uses: decoder layers, decoder, head.

decoder(input_ids) -> hidden (B, T, D); head(hidden) -> logits (B, T, V). If a row holds several examples, position_ids
(B, T) that restart at 0 keep them apart: see packed_rows.py.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mft.models.linears import layer_stacks

Run = Callable[..., Tensor]  # run(model, input_ids, position_ids=None, attention_mask=None) -> input of the head

FEW = 8  # tokens; enough to test how a model is built


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers in execution order. Raises: ValueError unless the model has exactly one such list."""
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        raise ValueError(
            f"model must have one list of decoder layers, {type(model).__name__} has {len(stacks)}: {', '.join(stacks)}"
        )
    return next(iter(stacks.values()))


def decoder_of(model: Any) -> nn.Module:
    """Return the part of the model below the head."""
    base = model.base_model
    if base is not model:
        return base
    below = [child for child in model.children() if child is not head_of(model)]
    return below[0] if len(below) == 1 else model  # Llama 4's decoder has another name than transformers looks for


def head_of(model: Any) -> nn.Module:
    """Return the module that turns hidden states into logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have output embeddings, {type(model).__name__} has none")
    return head


def run_decoder(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """Return the hidden states (B, T, D) that the head reads."""
    return decoder_of(model)(input_ids=input_ids, use_cache=False, **_given(position_ids, attention_mask))[0]


@torch.no_grad()
def split_at_head(model: nn.Module, input_ids: Tensor) -> tuple[Run, nn.Module]:
    """Return (run, head) with head(run(model, input_ids)) == logits, so that logits can be computed in chunks.

    If the model caps or scales its logits after the head, run returns the logits and head is the identity.
    """
    few, head = input_ids[:1, :FEW], head_of(model)
    with evaluating(model):
        own, hidden = _run_model(model, few).float(), run_decoder(model, few)
        width = hidden.shape[-1]
        ours = hidden.float()
        if getattr(head, "in_features", width) == width:  # RemBERT's head is wider: more layers follow its decoder
            ours = head(hidden).float()
    if own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-3, atol=1e-3):
        return run_decoder, head
    return _run_model, nn.Identity()


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the model's inputs: the CPU if its weights are in files, on the meta device."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def first_trainable_layer(model: nn.Module) -> int:
    """Return the number of leading layers with nothing trainable in or before them. The head is above all layers."""
    layers = decoder_layers(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in decoder_of(model).parameters()):
        return 0
    for number, layer in enumerate(layers):
        if any(p.requires_grad for p in layer.parameters()):
            return number
    return len(layers)


@contextlib.contextmanager
def replace_forwards(layers: Iterable[nn.Module], forward_for: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Replace each layer's forward by forward_for(layer) in this context."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer, _ in before:
        object.__setattr__(layer, "forward", forward_for(layer))
    try:
        yield
    finally:
        for layer, own in before:
            if own is None:
                del layer.__dict__["forward"]
            else:
                object.__setattr__(layer, "forward", own)


def clone_with_own_weights(model: nn.Module, names: Iterable[str] = ()) -> nn.Module:
    """Return a copy of model that shares all parameters but those of these names, or of modules of these names."""
    own = set()
    for name in names:
        path, _, part = name.rpartition(".")
        alone = model.get_submodule(path)._parameters.get(part)
        own |= {id(p) for p in (model.get_submodule(name).parameters() if alone is None else [alone])}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put model in evaluation mode in this context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _run_model(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    return model(input_ids=input_ids, use_cache=False, **_given(position_ids, attention_mask)).logits


def _given(position_ids: Tensor | None, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Return the arguments that are not None: models have their own defaults, and some take no positions."""
    named = {"position_ids": position_ids, "attention_mask": attention_mask}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
