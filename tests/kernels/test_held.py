"""The product while a mask is held: values, gradients, and what stays unchanged."""

import pytest
import torch

from mft_kernels import MaskedLinear, pack_mask
from mft_kernels.mask.held import masked_linear_held
from mft_kernels.testing import integer_inputs, random_inputs

SHAPES = [(5, 7, 33), (1, 1, 1), (4, 64, 96), (0, 3, 5)]


def held(inputs, threshold=2.0):
    return pack_mask(inputs.scores, torch.tensor(threshold))


def masked_weight(inputs, threshold=2.0):
    return torch.where(inputs.scores.abs() >= threshold, inputs.weight, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_value_and_gradients_are_those_of_the_masked_weight(m, n, k, dtype):
    inputs = integer_inputs(m, n, k, dtype)
    x = inputs.x.requires_grad_()
    buffer = torch.ones(n, k)
    y = masked_linear_held(x, inputs.weight, held(inputs), inputs.bias, grad_buffer=buffer)
    y.backward(inputs.grad_output)
    dense = masked_weight(inputs).float()
    assert torch.equal(y.float(), x.float() @ dense.T + inputs.bias.float())
    assert torch.equal(x.grad.float(), inputs.grad_output.float() @ dense)
    assert torch.equal(buffer, 1 + inputs.grad_output.float().T @ x.detach().float())


def test_a_buffer_in_sixteen_bits():
    inputs = random_inputs(64, 16, 32, torch.bfloat16)
    buffer = torch.zeros(16, 32, dtype=torch.bfloat16)
    masked_linear_held(inputs.x, inputs.weight, held(inputs, 0.01), grad_buffer=buffer).backward(inputs.grad_output)
    exact = inputs.grad_output.double().T @ inputs.x.double()
    assert (buffer.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_weight_and_bias_get_no_gradient():
    inputs = integer_inputs(5, 4, 6)
    weight, bias, x = inputs.weight.requires_grad_(), inputs.bias.requires_grad_(), inputs.x.requires_grad_()
    for buffer in (None, torch.zeros(4, 6)):
        masked_linear_held(x, weight, held(inputs), bias, grad_buffer=buffer).backward(inputs.grad_output)
        assert weight.grad is None
        assert bias.grad is None
        assert x.grad is not None


def test_a_weight_is_made_once_for_each_product():
    inputs, made = integer_inputs(5, 4, 6), []
    x = inputs.x.requires_grad_()

    def weight():
        made.append(1)
        return inputs.weight

    y = masked_linear_held(x, weight, held(inputs), grad_buffer=torch.zeros(4, 6))
    assert len(made) == 1
    y.backward(inputs.grad_output)
    assert len(made) == 2
    assert torch.equal(x.grad, inputs.grad_output @ masked_weight(inputs))


def test_only_x_is_saved():
    inputs = random_inputs(8, 16, 32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear_held(inputs.x, inputs.weight, held(inputs, 0.01), grad_buffer=torch.zeros(16, 32))
    assert [t.data_ptr() for t in saved] == [inputs.x.data_ptr()]


def test_without_autograd_nothing_is_accumulated():
    inputs, buffer = integer_inputs(5, 4, 6), torch.zeros(4, 6)
    with torch.no_grad():
        y = masked_linear_held(inputs.x.requires_grad_(), inputs.weight, held(inputs), grad_buffer=buffer)
    assert not y.requires_grad
    assert not buffer.any()


def test_a_module_computes_with_what_it_holds_until_it_is_released():
    layer = MaskedLinear(32, 8, keep_ratio=0.5)
    x = torch.randn(3, 32)
    own = layer(x)
    everything = torch.full((8, 1), -1, dtype=torch.int32)
    layer.hold(everything)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    buffer = torch.zeros(8, 32)
    layer.hold(everything, buffer)
    layer(x).sum().backward()
    assert layer.scores.grad is None
    assert torch.allclose(buffer, torch.ones(3, 8).T @ x, atol=1e-5)
    layer.release()
    assert torch.equal(layer(x), own)


@pytest.mark.parametrize("init", ["normal", "magnitude", "constant"])
def test_fixed_point_scores_begin_as_the_others(init):
    linear = torch.nn.Linear(64, 32)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    exact = MaskedLinear.from_linear(linear, init=init, keep_ratio=0.9, generator=generators[0])
    fixed = MaskedLinear.from_linear(
        linear, init=init, keep_ratio=0.9, generator=generators[1], scores_dtype=torch.int16
    )
    assert fixed.scores.dtype == torch.int16
    assert not fixed.scores.requires_grad
    assert (fixed.mask() != exact.mask()).float().mean() < 0.01
    assert fixed.to(torch.bfloat16).scores.dtype == torch.int16
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    fixed(x).sum().backward()
    assert x.grad is not None


def test_a_weight_that_changes_before_the_backward_pass_is_refused():
    inputs = integer_inputs(5, 4, 6)
    for name, change in (("weight", inputs.weight), ("packed", held(inputs))):
        packed = change if name == "packed" else held(inputs)
        x = inputs.x.clone().requires_grad_()
        y = masked_linear_held(x, inputs.weight, packed, grad_buffer=torch.zeros(4, 6))
        change.add_(1)
        with pytest.raises(RuntimeError, match=f"{name} must stay as it is until the backward pass"):
            y.sum().backward()
