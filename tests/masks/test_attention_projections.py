"""Projections of nn.MultiheadAttention, which are parameters; test_linear_subclasses.py has those of SigLIP's head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_architectures import names
from torch import nn

from mft.config import MaskConfig
from mft.masks.bank import load_mask_bank
from mft.masks.convert import mask_model, merge_model
from mft.masks.export import save_masks
from mft.masks.merged_weights import merged_weights
from mft_kernels import MaskedMultiheadAttention


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, "dropout": 0.0} | options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


class TimeFirst(nn.Module):
    """Takes (rows, tokens, width), and computes in (tokens, rows, width)."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.attn(x, x, x)[0].transpose(0, 1)


def test_rows_of_a_batch_take_their_masks_where_torch_puts_the_tokens_first(tmp_path):
    base, x = TimeFirst(), torch.randn(3, 3, 8)  # as many tokens as rows, so that mixing them up raises no error
    model = mask_model(copy.deepcopy(base), MaskConfig(target_modules=["in_proj", "out_proj"], keep_ratio=0.5))
    save_masks(model, tmp_path)
    bank = load_mask_bank(copy.deepcopy(base), {"task": tmp_path})
    with torch.no_grad(), bank.use(["task", None, "task"]):
        y = bank.model(x)
    torch.testing.assert_close(y, torch.stack([model(x)[0], base(x)[1], model(x)[2]]))


def test_by_default_attention_is_masked_whole():
    model = mask_model(encoder(), MaskConfig(keep_ratio=0.5))
    parts = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert names(model) == [f"layers.{layer}.{part}" for layer in range(2) for part in parts]
    x = torch.randn(2, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(merge_model(model)(x, src_key_padding_mask=padding), y)


def test_queries_keys_and_values_of_other_widths_are_projected_apart():
    base = nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=4, vdim=6)])
    model = mask_model(copy.deepcopy(base), MaskConfig(target_modules=["q_proj", "k_proj", "v_proj"], keep_ratio=0.5))
    assert names(model) == ["0.q_proj", "0.k_proj", "0.v_proj"]
    given = list(merged_weights(model))
    merge_model(model)
    assert [name for name, _ in given] == [name for name, _ in base.named_parameters()]
    assert all(torch.equal(dict(given)[name], p) for name, p in model.named_parameters())
    assert not torch.equal(model[0].k_proj_weight, base[0].k_proj_weight)
    assert torch.equal(model[0].in_proj_bias, base[0].in_proj_bias)


def test_a_model_that_is_an_attention_is_masked_when_it_calls_its_projections():
    base = nn.MultiheadAttention(8, 2)
    model = MaskedMultiheadAttention.from_attention(copy.deepcopy(base))
    assert names(mask_model(model, MaskConfig(target_modules=["in_proj"], keep_ratio=1.0))) == ["in_proj"]
    assert merge_model(model) is model
    assert torch.equal(model.to_attention().in_proj_weight, base.in_proj_weight)


# ---------------------------------------------------------------------------------------------- what is refused


class Reader(nn.Module):
    """Computes with the parameters of the attention that it contains."""

    def __init__(self):
        super().__init__()
        self.attn, self.called = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = self.called(x, x, x)[0]
        if self.called.out_proj.weight.dtype == x.dtype:
            x = F.linear(x, self.attn.in_proj_weight[:8])
        return x @ self.attn.out_proj.weight


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_a_parent_that_computes_with_the_attentions_parameters_is_found(name):
    with pytest.raises(
        ValueError, match=rf"attn.{name}: Reader.forward \(test_attention_pro\S+ computes with attn.{name}.wei"
    ):
        mask_model(Reader(), MaskConfig(target_modules=[f"attn.{name}"]))
    config = MaskConfig(target_modules=[f"called.{name}"], keep_ratio=0.9)
    assert names(mask_model(Reader(), config)) == [f"called.{name}"]


class Own(nn.MultiheadAttention):
    def forward(self, *args):
        return super().forward(*args)


def wrapped():
    """Return an attention wrapped as PEFT's LoRA wraps it."""
    wrapper = nn.Module()
    wrapper.base_layer = nn.MultiheadAttention(8, 2)
    return nn.ModuleList([wrapper])


def tied():
    made = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    made[1].in_proj_weight = made[0].in_proj_weight
    return made


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: nn.ModuleList([Own(8, 2)]),
            r"cannot mask 0.in_proj: it lies in a \S+Own, not a plain nn.MultiheadAtt",
        ),
        (lambda: nn.MultiheadAttention(8, 2), "cannot mask in_proj: it lies in the model itself, which cannot be repl"),
        (wrapped, r"cannot mask 0.base_layer.in_proj: it belongs to the Module around it"),
        (tied, r"cannot mask 0.in_proj: its weight is tied to 1.in_proj_weight"),
    ],
)
def test_an_attention_that_cannot_be_replaced_is_refused_by_name(make, why):
    model = make()
    with pytest.raises(ValueError, match=why):
        mask_model(model, MaskConfig(target_modules=["in_proj"]))
    assert not any(isinstance(module, MaskedMultiheadAttention) for module in model.modules())
