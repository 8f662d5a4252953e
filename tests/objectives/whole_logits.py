"""Losses and gradients of the scores: from each way, and from plain PyTorch with all logits at once."""

import functools

import torch
from tiny import WORDS, make_llama
from torch.utils._python_dispatch import TorchDispatchMode

import mft.engines.mode
from mft.config import MaskConfig, TrainConfig
from mft.engines.mode import place
from mft.engines.offload import Mover
from mft.masks.convert import keep_all_weights, mask_model, masked_modules
from mft.masks.quantize import quantize_model

WAYS = ["plain", "in_place", "resident", "quantized", "layerwise"]


def make_masked(way, layers=(1, 3)):
    """Return a model with a tenth dropped at random, so that it is far from its base; quantised for "quantized"."""
    model = mask_model(make_llama(), MaskConfig.paper(layers_to_transform=list(layers)))
    return quantize_model(model, "int8", masked=True) if way == "quantized" else model


def step(model, way, objective, batches, patch, *, separate=False):
    """Return (losses, gradient of each layer's scores) of one step, which changes nothing."""
    patch.setattr(mft.engines.mode, "Mover", functools.partial(Mover, separate=separate))
    losses, grads = [], {}
    for p in model.parameters():
        p.requires_grad_(way == "plain" and any(p is module.scores for module in masked_modules(model).values()))

    def keep_plain():
        for name, module in masked_modules(model).items():
            grads[name] = module.scores.grad.clone()

    model.train()
    placed = place(model, way=way, device="cpu", objective=objective)
    runner = placed.start(batches[0].input_ids[:1, :8], TrainConfig(steps=1), keep_plain)
    if way != "plain":

        def keep(masks, *_):
            for mask in masks:
                sign = mask.module.scores.detach().sign()
                grads[mask.name] = mask.grad.clone() * mask.weight() * sign

        runner.states.update = keep
    count = sum(map(objective.count, batches))
    runner.step(batches, 1 / count, 0.0, None, lambda _, total: losses.append(total.item()))
    runner.close()
    return losses, grads


def by_hand(model, batches, count, loss_of):
    """Return the same from plain PyTorch, with loss_of(logits (B, T, V), base's logits, batch) -> sum of losses."""
    masked = masked_modules(model)
    model.requires_grad_(False)
    for module in masked.values():
        module.scores.requires_grad_(True)
        module.scores.grad = None
    losses = []
    for batch in batches:
        given = {"input_ids": batch.input_ids, "use_cache": False}
        given |= {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        with torch.no_grad(), keep_all_weights(model):
            base = model(**given).logits
        total = loss_of(model(**given).logits, base, batch)
        (total / count).backward()
        losses.append(total.item())
    return losses, {name: module.scores.grad for name, module in masked.items()}


def assert_same(ours, theirs, tolerance=1e-5):
    """Assert equality up to fp32 rounding, relative to the largest gradient."""
    (losses, grads), (other_losses, other_grads) = ours, theirs
    for loss, other in zip(losses, other_losses, strict=True):
        assert abs(loss - other) <= tolerance * max(1.0, abs(other))
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        largest = other_grads[name].abs().max()
        assert largest > 0, name
        assert (grad - other_grads[name]).abs().max() <= tolerance * largest, name


class Widths(TorchDispatchMode):
    """Records the rows of every tensor that is as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = set()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == WORDS:
                self.rows.add(tensor.shape[:-1].numel())
        return out
