"""Layers with a forward of their own: one that is nn.Linear's takes a mask; of others it is said what differs."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from mft_kernels import MaskedLinear
from mft_kernels.layers.maskable import why_no_mask

IN, OUT = 100, 48


class Product(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Settings(nn.Linear):
    """Flags, texts and numbers that choose, and a bound that is not asked for."""

    def __init__(self, *args, bounded=False, groups=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.bounded, self.groups, self.way, self.width = bounded, groups, "plain", self.in_features
        self.register_buffer("bound", torch.tensor(torch.inf))

    def forward(self, x):
        if self.groups > 1:
            x = x.view(-1, self.groups, self.width // self.groups)
        y = F.linear(x, self.weight.to(next(self.parameters()).dtype), self.bias)
        return y.clamp(max=self.bound) if self.bounded or self.way != "plain" else y


class Standing(nn.Module):
    """No nn.Linear, but in its place."""

    def __init__(self, width, size):
        super().__init__()
        self.size, self.bias = size, None
        self.weight = nn.Parameter(torch.randn(size, width))

    def forward(self, x):
        return (x.reshape(-1, x.shape[-1]) @ self.weight.mT).view(*x.shape[:-1], self.size)


def linear(forward, **held):
    """An nn.Linear with this forward, which holds these: buffers, or attributes."""

    def init(self, *args, **kwargs):
        nn.Linear.__init__(self, *args, **kwargs)
        for name, value in held.items():
            self.register_buffer(name, value) if isinstance(value, torch.Tensor) else setattr(self, name, value)

    return type("Own", (nn.Linear,), {"forward": forward, "__init__": init})


def plain(self, x):
    return F.linear(x, self.weight, self.bias)


def noting(self, x):
    self.calls = 1
    return plain(self, x)


def emptying(self, x):
    y = plain(self, x)
    return y if x.requires_grad else (y, x.zero_())[0]


def swallowing(self, x):
    try:
        return plain(self, x).clamp(self.bound)
    except Exception:  # noqa: BLE001
        return plain(self, x)


class Calling(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


WIDE = torch.tensor(-torch.inf)
MORE = {
    "other values": (
        linear(lambda self, x: 2 * plain(self, x)),
        r"its forward gives -?\S+ where F.linear has -?\S+, in ev",
    ),
    "a call of its own": (Calling, "its forward gives"),
    "dropout": (linear(lambda self, x: F.dropout(plain(self, x), 0.1, self.training)), "in training mode, in float64"),
    "bounds in its code": (linear(lambda self, x: plain(self, x.clamp(-65504, 65504))), "its forward gives"),
    "bounds as buffers": (
        linear(lambda self, x: plain(self, x).clamp(self.low), low=WIDE),
        "its forward reads low, a Ten",
    ),
    "any of its buffers": (
        linear(lambda self, x: plain(self, x).clamp(*self._buffers.values()), low=WIDE),
        "reads low, a T",
    ),
    "a read that it hides": (linear(swallowing, bound=WIDE), "its forward reads bound, a Tensor of its own"),
    "a bound as a number": (
        linear(lambda self, x: plain(self, x.clamp(max=self.most)), most=1e30),
        "computes with most, wh",
    ),
    "a factor of 1": (
        linear(lambda self, x: self.scale * plain(self, x), scale=1.0),
        "computes with scale, which is 1.0 now",
    ),
    "a rate of 0": (
        linear(lambda self, x: plain(self, x + self.rate * x.square()), rate=0.0),
        "computes with rate, which is 0.0 now",
    ),
    "a whole factor": (
        linear(lambda self, x: self.scale * plain(self, x), scale=1),
        "computes with scale, which is 1 now",
    ),
    "an activation": (
        linear(lambda self, x: self.act(plain(self, x)), act=nn.functional.relu),
        "reads act, a function of i",
    ),
    "a module": (
        linear(lambda self, x: self.more(plain(self, x)), more=nn.Identity()),
        "reads more, a Identity of its own",
    ),
    "state": (linear(noting), "its forward sets calls"),
    "fp32 within": (
        linear(lambda self, x: F.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)),
        r"its forward gives (-?\d+\.\d+) where F.linear has (?!\1,)",
    ),
    "another dtype": (
        linear(lambda self, x: plain(self, x).float()),
        "gives torch.float32 on cpu where F.linear has torch.flo",
    ),
    "another shape": (
        linear(lambda self, x: plain(self, x)[..., None]),
        r"gives \(2, 3, 32, 1\) where F.linear has \(2, 3, 32\)",
    ),
    "a tuple": (linear(lambda self, x: (plain(self, x), None)), "its forward returns a tuple"),
    "no gradient of its weight": (
        linear(lambda self, x: F.linear(x, self.weight.detach(), self.bias)),
        "its forward gives weight no gradient in eval mode",
    ),
    "another gradient": (
        linear(lambda self, x: plain(self, x - 0.5 * (x - x.detach()))),
        r"its gradient of x is -?\S+ where F.linear has",
    ),
    "another way without gradients": (
        linear(lambda self, x: plain(self, x) + (0 if torch.is_grad_enabled() else 1)),
        "without gradients its forward gives",
    ),
    "NaN taken away": (
        linear(lambda self, x: plain(self, x if torch.is_grad_enabled() else x.nan_to_num())),
        "F.linear has nan",
    ),
    "another way for one token": (
        linear(lambda self, x: plain(self, x) * (1 + (x.shape[-2] == 1))),
        "its forward gives",
    ),
    "an emptied input": (linear(emptying), "its forward writes into its input"),
    "an error": (
        linear(lambda self, x: plain(self, x).view(7, 7)),
        r"its forward raises RuntimeError: shape '\[7, 7\]'",
    ),
}


@pytest.mark.parametrize(("kind", "what"), MORE.values(), ids=MORE)
def test_a_layer_that_does_more_is_refused_with_what_differs(kind, what):
    with pytest.raises(ValueError, match=rf"it is a \S+\.{kind.__name__}, not a plain nn.Linear: .*{what}"):
        MaskedLinear.from_linear(kind(IN, OUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Product, Settings])
def test_a_layer_that_computes_as_linear_does_is_masked(kind, bias, dtype):
    own = kind(IN, OUT, bias=bias).to(dtype)
    layer = MaskedLinear.from_linear(own, keep_ratio=1)
    x = torch.randn(3, IN, dtype=dtype)
    rounding = 8 * torch.finfo(dtype).eps  # Product's bias is added apart
    torch.testing.assert_close(layer(x), own(x), rtol=rounding, atol=rounding)
    assert layer.weight.data_ptr() == own.weight.data_ptr()


def test_what_stands_in_a_linears_place_is_tried_too():
    assert why_no_mask(Standing(IN, OUT)) is None
    assert why_no_mask(Standing(8, 16)) is None
    other = Standing(IN, OUT)
    other.size = OUT // 2
    assert "its forward raises RuntimeError: shape" in why_no_mask(other)


def test_layers_of_one_class_are_told_apart_by_what_their_forward_reads():
    assert why_no_mask(Settings(IN, OUT)) is None
    assert "reads bound" in why_no_mask(Settings(IN, OUT, bounded=True))
    assert "raises" in why_no_mask(Settings(IN, OUT, groups=3))
    assert why_no_mask(Settings(IN, OUT)) is None


def test_a_class_is_tried_once_not_once_a_layer():
    calls = []

    def counted(self, x):
        calls.append(x.shape)
        return plain(self, x.view(*x.shape[:-1], self.in_features))  # which differs, and is nobody's setting

    kind = linear(counted)
    layers = [kind(IN, OUT), kind(IN, OUT), kind(16, 8), kind(5000, 4000, device="meta")]
    assert why_no_mask(layers[0]) is None
    tried = len(calls)
    assert tried
    assert max(shape[-1] for shape in calls) == 32
    assert all(why_no_mask(layer) is None for layer in layers)
    assert len(calls) == tried
    assert why_no_mask(kind(IN, OUT, dtype=torch.bfloat16)) is None
    assert len(calls) > tried


def test_a_class_whose_forward_is_replaced_is_tried_again():
    kind = linear(plain)
    assert why_no_mask(kind(IN, OUT)) is None
    kind.forward = lambda self, x: 2 * plain(self, x)
    assert "its forward gives" in why_no_mask(kind(IN, OUT))


def test_layers_without_values_are_tried_on_the_cpu():
    large = {"device": "meta", "dtype": torch.bfloat16}
    assert why_no_mask(Product(16384, 53248, **large)) is None
    assert "where F.linear has" in why_no_mask(MORE["other values"][0](16384, 53248, **large))
    with FakeTensorMode():
        assert why_no_mask(linear(plain)(IN, OUT)) is None
        assert "computes with scale" in why_no_mask(MORE["a factor of 1"][0](IN, OUT))


def test_what_the_caller_is_under_changes_nothing():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert why_no_mask(linear(Product.forward)(IN, OUT, device="cpu")) is None


def test_the_layer_and_random_states_stay_as_they_are():
    noisy = linear(lambda self, x: plain(self, x) + torch.rand(()), low=WIDE)(IN, OUT)
    before, weight = torch.get_rng_state(), noisy.weight.clone()
    held = dict(vars(noisy))
    assert why_no_mask(noisy) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noisy.weight, weight)
    assert vars(noisy) == held
    assert noisy.weight.grad is None


def test_a_trial_takes_milliseconds_whatever_the_size():
    layer = linear(Product.forward)(1 << 15, 1 << 15, device="meta")
    start = time.process_time()
    assert why_no_mask(layer) is None
    assert time.process_time() - start < 1
