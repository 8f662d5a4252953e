"""MaskedMultiheadAttention compared with torch's own: every option, masked projections, and conversion both ways."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mft_kernels import MaskedLinear, MaskedMultiheadAttention

# torch warns of this in its encoder's own batching.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

WIDTH, HEADS, ROWS, QUERIES, KEYS = 16, 4, 3, 5, 7
OPTIONS = {
    "batch_first": (False, True),
    "bias": (False, True),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "dropout": (0.0, 0.3),
    "inputs": ("self", "cross", "three", "kdim and vdim"),
    "padding": (False, True),
    "attn_mask": (None, "2d", "3d", "causal"),
    "result": ("weights", "each head's weights", "no weights"),
    "batched": (False, True),
}


def attention(**options):
    made = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in made.parameters():  # biases too, which torch initialises to 0
        nn.init.normal_(parameter, std=0.3)
    return made


def masked(made, names=None, keep_ratio=0.5):
    """Return a MaskedMultiheadAttention of ``made``, with masked projections of these names, or all."""
    made = MaskedMultiheadAttention.from_attention(copy.deepcopy(made))
    for name, child in list(made.named_children()):
        if names is None or name in names:
            setattr(made, name, MaskedLinear.from_linear(child, keep_ratio=keep_ratio))
    return made


def merged(made):
    made = copy.deepcopy(made)
    for name, child in list(made.named_children()):
        if isinstance(child, MaskedLinear):
            setattr(made, name, child.merge())
    return made.to_attention()


def case(choice):
    """Return (constructor's options, inputs, call's options) of one choice of OPTIONS."""
    names = ("batch_first", "bias", "add_bias_kv", "add_zero_attn", "dropout")
    options = {name: choice[name] for name in names}
    keys = QUERIES if choice["inputs"] == "self" or choice["attn_mask"] == "causal" else KEYS
    widths = (6, 10) if choice["inputs"] == "kdim and vdim" else (WIDTH, WIDTH)
    if choice["inputs"] == "kdim and vdim":
        options |= {"kdim": 6, "vdim": 10}

    def tensor(tokens, width):
        rows_first = (ROWS, tokens, width) if choice["batch_first"] else (tokens, ROWS, width)
        return torch.randn(rows_first if choice["batched"] else (tokens, width)).requires_grad_()

    query, key = tensor(QUERIES, WIDTH), tensor(keys, widths[0])
    inputs = {"self": [query] * 3, "cross": [query, key, key]}.get(
        choice["inputs"], [query, key, tensor(keys, widths[1])]
    )
    call = {"need_weights": choice["result"] != "no weights", "average_attn_weights": choice["result"] == "weights"}
    if choice["padding"]:
        ends = torch.tensor([[keys], [keys - 2], [1]])
        call["key_padding_mask"] = torch.arange(keys) >= (ends if choice["batched"] else keys - 2)
    heads = HEADS * (ROWS if choice["batched"] else 1)
    shape = {"2d": (QUERIES, keys), "3d": (heads, QUERIES, keys), "causal": (QUERIES, QUERIES)}.get(choice["attn_mask"])
    if choice["attn_mask"] == "causal":
        later = torch.ones(shape, dtype=torch.bool).triu(1)
        call |= {"attn_mask": later, "is_causal": True}
    elif shape is not None:
        call["attn_mask"] = torch.rand(shape) < 0.2 if choice["padding"] else torch.randn(shape)
        if choice["padding"]:
            call["attn_mask"][..., 0] = False  # otherwise a row might have no key at all, and be NaN
    return options, inputs, call


def results(module, inputs, call):
    """Return outputs, attention weights and the inputs' gradients, with the same dropout each time."""
    torch.manual_seed(1)
    y, weights = module(*inputs, **call)
    total = y.sin().sum() + (0 if weights is None else weights.square().sum())
    leaves = list({id(x): x for x in inputs}.values())
    return [y, *([] if weights is None else [weights]), *torch.autograd.grad(total, leaves)]


def test_every_option_gives_torchs_results():
    """100 of 24,576 choices, drawn with a seed; bitwise equal if torch also multiplies the tokens in their order."""
    choices = [dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())]
    for choice in random.Random(0).sample(choices, 100):
        options, inputs, call = case(choice)
        expected = attention(**options)
        ours = MaskedMultiheadAttention.from_attention(expected)
        found, wanted = results(ours, inputs, call), results(expected, inputs, call)
        for y, z in zip(found, wanted, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
        if choice["inputs"] == "self" and not choice["batched"]:
            assert all(map(torch.equal, found[:-1], wanted[:-1])), choice  # all but the gradient


@pytest.mark.parametrize("names", [None, ["in_proj"], ["out_proj"], ["q_proj", "v_proj"]])
def test_masked_projections_compute_what_the_merged_attention_does(names):
    choices = [dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())]
    apart = names is not None and "q_proj" in names
    choices = [c for c in choices if names is None or apart == (c["inputs"] == "kdim and vdim")]
    for choice in random.Random(1).sample(choices, 20):
        options, inputs, call = case(choice)
        ours = masked(attention(**options), names)
        expected = merged(ours)
        for y, wanted in zip(results(ours, inputs, call), results(expected, inputs, call), strict=True):
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        y = ours(*inputs, **call)[0]
        y.sum().backward()
        assert all(child.scores.grad.any() for child in ours.children() if isinstance(child, MaskedLinear)), choice


def test_merged_it_is_torchs_again_with_kept_weights_bit_equal():
    class Named(nn.MultiheadAttention):
        pass

    for widths in ({}, {"kdim": 6, "vdim": 10}):
        base = Named(WIDTH, HEADS, add_bias_kv=True, dropout=0.1, **widths).eval()
        base.remark = "kept"
        ours = masked(base)
        ours.dropout = 0.2
        ours.train()
        state, expected = merged(ours).state_dict(), base.state_dict()
        assert list(state) == list(expected)
        for name, child in ours.named_children():
            weight = "out_proj.weight" if name == "out_proj" else f"{name}_weight"
            expected[weight] = torch.where(child.mask(), expected[weight], 0)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        back = merged(ours)
        assert type(back) is Named
        assert type(back.out_proj) is nn.Linear  # MaskedLinear.merge() returns no other class
        assert (back.remark, back.dropout, back.training) == ("kept", 0.2, True)


def test_unmasked_it_gives_back_the_very_parameters():
    base = attention(kdim=6)
    shared = {name: p for name, p in base.named_parameters() if name != "in_proj_bias"}
    back = MaskedMultiheadAttention.from_attention(base).to_attention()
    assert all(dict(back.named_parameters())[name] is p for name, p in shared.items())
    assert torch.equal(back.in_proj_bias, base.in_proj_bias)
    assert dict(base.named_parameters()).keys() == dict(back.named_parameters()).keys()


# ---------------------------------------------------------------------------------------------- torch's encoder


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_torchs_encoder_keeps_off_its_fast_path_and_nests_its_batches(layers):
    model = encoder()
    for index in layers:
        model.layers[index].self_attn = masked(model.layers[index].self_attn)
    expected = copy.deepcopy(model)
    for index in layers:
        expected.layers[index].self_attn = merged(expected.layers[index].self_attn)
        expected.layers[index].activation_relu_or_gelu = 1
    x, padding = torch.randn(2, QUERIES, WIDTH), torch.arange(QUERIES) >= torch.tensor([[QUERIES], [3]])
    for mask in (None, padding):
        with torch.no_grad():
            y, wanted = model(x, src_key_padding_mask=mask), expected(x, src_key_padding_mask=mask)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_a_nested_batch_gives_each_row_what_it_gives_alone_and_an_empty_one_is_no_nan():
    ours = masked(attention(batch_first=True))
    rows = [torch.randn(n, WIDTH) for n in (QUERIES, 0, 2)]
    x = torch.nested.as_nested_tensor(rows)
    y = ours(x, x, x, need_weights=False)[0]
    assert y.is_nested
    for row, found in zip(rows, y.unbind(), strict=True):
        torch.testing.assert_close(found, ours(row, row, row, need_weights=False)[0] if len(row) else row)
    torch.cat(y.unbind()).sum().backward()
    assert ours.in_proj.scores.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- what is refused


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Calling(nn.MultiheadAttention):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def hooked():
    made = attention()
    made.register_forward_pre_hook(lambda module, args: None)
    return made


def longer():
    made = attention()
    made.gate = nn.Parameter(torch.ones(1))
    return made


def parametrised():
    return parametrize.register_parametrization(attention(), "in_proj_weight", nn.Identity())


@pytest.mark.parametrize(
    ("make", "why"),
    {
        "own": (
            lambda: Own(WIDTH, HEADS),
            r"test_masked_attention\.Own, not a plain nn.MultiheadAttention: it has its own forward",
        ),
        "call": (lambda: Calling(WIDTH, HEADS), r"Calling, not a plain nn.MultiheadAttention"),
        "hook": (hooked, "it has hooks"),
        "more": (longer, "it lies in an nn.MultiheadAttention that also holds gate"),
        "parametrised": (parametrised, "that also holds parametrizations"),
    }.values(),
)
def test_an_attention_that_does_more_is_refused(make, why):
    with pytest.raises(ValueError, match=f"attention cannot be masked: .*{why}"):
        MaskedMultiheadAttention.from_attention(make())


def test_nested_tensors_are_taken_where_torch_takes_them_alone():
    ours = MaskedMultiheadAttention.from_attention(attention(batch_first=True))
    x = torch.nested.as_nested_tensor([torch.randn(2, WIDTH)])
    with pytest.raises(
        ValueError, match="nested tensors must be used for self-attention with batch_first, need_weights=False"
    ):
        ours(x, x, x)
    with pytest.raises(ValueError, match="nested tensors must be used for self-attention"):
        ours(x, x, x, attn_mask=torch.zeros(2, 2), need_weights=False)
