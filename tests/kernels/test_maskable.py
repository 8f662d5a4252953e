"""Which linear layers take a mask, by hand and by mask_model; and parents that read a child's weight themselves."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

from mft_kernels import MaskedLinear
from mft_kernels.layers.maskable import why_no_mask

# torch warns of this in its encoder's own batching.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])  # padded on the right, so that torch nests the batch


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Inherits nn.Linear's forward."""


class Product(nn.Linear):
    """Has its own forward, which computes the same as nn.Linear's, and declares it."""

    computes_linear = True

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class RenamedProduct(Product):
    """Inherits Product's forward, so Product's declaration holds."""


class ClampedProduct(Product):
    """Has its own forward, to which Product's declaration does not apply."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Calling(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class CallingProduct(Product):
    def __call__(self, x):
        return 2 * super().__call__(x)


class InPlaceOfLinear(nn.Module):
    """Is not an nn.Linear; declares that it computes like one."""

    computes_linear = True

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = None

    def forward(self, x):
        return x @ self.weight.mT


def hooked():
    linear = nn.Linear(16, 8)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


def patched():
    linear = nn.Linear(16, 8)
    linear.forward = torch.sin
    return linear


def whole_numbers(kind=nn.Linear):
    linear = kind(16, 8)
    linear.weight = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
    return linear


# mask_model refuses these too: it calls the same function.
UNMASKABLE = {
    "a forward of its own": (
        lambda: Doubling(16, 8),
        r"test_maskable\.Doubling, not a plain nn\.Linear: it has its own forward .* would leave out\. "
        r"If it computes what nn\.Linear does and no more, set Doubling\.computes_linear = True",
    ),
    "a call of its own": (lambda: Calling(16, 8), r"Calling, not a plain nn\.Linear: it has its own forward"),
    "a forward over one that is a linear's": (lambda: ClampedProduct(16, 8), r"ClampedProduct, not a plain nn\.Linear"),
    "a call over one that is a linear's": (lambda: CallingProduct(16, 8), r"CallingProduct, not a plain nn\.Linear"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)), "its weight is not a parameter"),
    "pruning": (lambda: prune.random_unstructured(nn.Linear(16, 8), "weight", 0.5), "its weight is not a parameter"),
    "int8": (whole_numbers, "it holds a Tensor of torch.int8"),
    "int8 and a forward of its own": (
        lambda: whole_numbers(Doubling),
        r"Doubling, not .*, and holds a Tensor of torch.in",
    ),
    "a hook": (hooked, "it has hooks"),
    "a replaced forward": (patched, "its forward is replaced"),
}


@pytest.mark.parametrize(("make", "why"), UNMASKABLE.values(), ids=UNMASKABLE)
def test_by_hand_too_a_layer_that_computes_otherwise_is_refused(make, why):
    with pytest.raises(ValueError, match=f"linear cannot be masked: .*{why}"):
        MaskedLinear.from_linear(make())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Renamed, Product, RenamedProduct])
def test_a_subclass_that_computes_as_linear_does_is_masked(kind, bias, dtype):
    linear = kind(100, 48, bias=bias, dtype=dtype)
    layer = MaskedLinear.from_linear(linear, keep_ratio=1)
    x = torch.randn(3, 100, dtype=dtype)
    rounding = 8 * torch.finfo(dtype).eps  # Product adds its bias separately
    torch.testing.assert_close(layer(x), linear(x), rtol=rounding, atol=rounding)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()


def test_what_a_class_says_counts_from_then_on():
    class Late(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    assert "set Late.computes_linear = True" in why_no_mask(Late(16, 8))
    Late.computes_linear = True
    assert why_no_mask(Late(16, 8)) is None


def test_what_stands_in_a_linears_place_needs_a_parameter_or_none_as_bias():
    layer = InPlaceOfLinear(16, 8)
    assert why_no_mask(layer) is None
    layer.bias = torch.zeros(8)
    assert why_no_mask(layer).startswith("its bias must be a parameter or None, got ")
    del layer.bias
    assert why_no_mask(layer).startswith("its bias must be a parameter or None, got ")


@pytest.mark.parametrize("kind", [nn.Linear, Product, Doubling])
def test_layers_without_values_are_judged_alike(kind):
    is_refused = kind is Doubling
    assert (why_no_mask(kind(16384, 53248, device="meta", dtype=torch.bfloat16)) is not None) == is_refused
    with FakeTensorMode():
        assert (why_no_mask(kind(16, 8)) is not None) == is_refused


@pytest.fixture
def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3).eval()


def masked(linear):
    return MaskedLinear.from_linear(linear, keep_ratio=0.5)


def merged(model):
    """Return a copy with every masked layer merged, on torch's slow path: the fast path rounds differently."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.activation_relu_or_gelu = 0
        for name in ("linear1", "linear2"):
            child = getattr(layer, name)
            setattr(layer, name, child.merge() if isinstance(child, MaskedLinear) else child)
    return model


def assert_computes_with_its_masks(encoder):
    """Compare with and without padding (nested inside), also with the fast path of the merged model."""
    x = torch.randn(2, 5, 16)
    slow, fast = merged(encoder), merged(encoder)
    for layer in fast.layers:
        layer.activation_relu_or_gelu = 1
    with torch.no_grad():
        for padding in (None, PADDING):
            y = encoder(x, src_key_padding_mask=padding)
            torch.testing.assert_close(y, slow(x, src_key_padding_mask=padding), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(y, fast(x, src_key_padding_mask=padding), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "layers"), [(("linear1",), (0,)), (("linear2",), (1, 2)), (("linear1", "linear2"), (0, 1, 2))]
)
def test_an_encoder_masked_by_hand_computes_with_its_masks(encoder, layers, names):
    for layer in layers:
        for name in names:
            setattr(encoder.layers[layer], name, masked(getattr(encoder.layers[layer], name)))
    assert_computes_with_its_masks(encoder)


def test_copies_pickles_and_stacks_of_a_masked_encoder_layer_keep_it_right(encoder):
    layer = encoder.layers[0]
    layer.linear1 = masked(layer.linear1)
    assert_computes_with_its_masks(copy.deepcopy(encoder))
    with pytest.warns(UserWarning, match="use_nested_tensor is False because encoder_layer.activation_relu_or_gelu"):
        stack = nn.TransformerEncoder(layer, 2).eval()
    assert_computes_with_its_masks(stack)
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    assert_computes_with_its_masks(torch.load(file, weights_only=False))


def test_a_nested_batch_gives_each_row_what_it_gives_alone():
    layer = masked(nn.Linear(16, 8))
    rows = [torch.randn(5, 16), torch.randn(0, 16), torch.randn(3, 16)]
    result = layer(torch.nested.as_nested_tensor(rows))
    assert result.is_nested
    for row, y in zip(rows, result.unbind(), strict=True):
        torch.testing.assert_close(y, layer(row))
    torch.cat(result.unbind()).sum().backward()
    assert layer.scores.grad is not None


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        pytest.param(lambda: nn.MultiheadAttention(16, 2), "out_proj", id="MultiheadAttention"),
        pytest.param(
            lambda: nn.LinearCrossEntropyLoss(16, 4),
            "linear",
            id="LinearCrossEntropyLoss",
            marks=pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13 has none"),
        ),
    ],
)
def test_a_parent_that_computes_with_the_childs_weight_takes_no_masked_layer(parent, name):
    parent = parent()
    before = getattr(parent, name)
    for put in (setattr, nn.Module.add_module):
        with pytest.raises(
            ValueError, match=rf"{name} of .* must not be a MaskedLinear: .* computes with {name}\.weight"
        ):
            put(parent, name, masked(nn.Linear(16, 16)))
    assert getattr(parent, name) is before
    setattr(parent, name, nn.Linear(16, 16))  # other layers can be assigned as usual
