"""Helpers that tests of mft.vllm share: a Llama's linear weights, fused as in a server, and random masks."""

import torch
from torch import nn

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import save_masks

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up", "up_proj": "gate_up"}


class Plain(nn.Module):
    """A layer that computes with its weight as stored."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Repacked(Plain):
    """A layer that does not."""


class Served(nn.Module):
    """A model's linears by a server's names; load_weights fills them by a checkpoint's names."""

    def __init__(self, model, repacked=()):
        super().__init__()
        self._where, parts = {}, {}
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name != "lm_head":
                path, _, part = name.rpartition(".")
                parts.setdefault((path, FUSED.get(part, part)), []).append((name, linear.weight.detach()))
        for number, ((_, part), weights) in enumerate(parts.items()):
            kind = Repacked if part in repacked else Plain
            self.add_module(f"layer{number}_{part}", kind(torch.cat([weight for _, weight in weights]).clone()))
            begin = 0
            for name, weight in weights:
                self._where[name] = (f"layer{number}_{part}", begin, len(weight))
                begin += len(weight)

    def load_weights(self, weights):
        for name, weight in weights:
            layer, begin, rows = self._where[name.removesuffix(".weight")]
            target = self.get_submodule(layer).weight.data.narrow(0, begin, rows)
            assert target.shape == weight.shape
            target.copy_(weight)

    def weights(self):
        """Return the current weights by the checkpoint's names."""
        found = {}
        for name, (layer, begin, rows) in self._where.items():
            found[name] = self.get_submodule(layer).weight[begin : begin + rows].clone()
        return found


def is_plain(layer):
    return type(layer) is Plain


def scattered(model, share, seed):
    """Return the model with a random mask that drops this share."""
    masked = mask_model(model, MaskConfig(keep_ratio=1 - share))
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_modules(masked).values():
        layer.scores.data = torch.rand(layer.scores.shape, generator=generator).to(layer.scores) + 0.1
    return masked


def save_scattered(make_model, directory, share=0.1, seed=0):
    """Save an export of such masks; return the weights of the merged model by layer."""
    masked = scattered(make_model(), share, seed)
    save_masks(masked, directory)
    return {name: layer.merged_weight() for name, layer in masked_modules(masked).items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )
