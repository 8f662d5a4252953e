"""MaskedLinear works wherever nn.Linear does."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from mft_kernels import MaskedLinear


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(37, 19)


def test_from_linear_shares_the_weights_memory_and_freezes_it(linear):
    masked = MaskedLinear.from_linear(linear)
    assert masked.weight.data_ptr() == linear.weight.data_ptr()
    assert [n for n, p in masked.named_parameters() if p.requires_grad] == ["scores"]
    assert linear.weight.requires_grad  # the original is unchanged


def test_merge_keeps_weights_bit_equal_and_drops_to_plus_zero(linear):
    with torch.no_grad():
        linear.weight[0, 0] = -1e-30
    masked = MaskedLinear.from_linear(linear, keep_ratio=0.7)
    with torch.no_grad():
        masked.scores[0, 0] = 0  # dropped
    merged, mask = masked.merge(), masked.mask()
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight[mask], linear.weight[mask])
    dropped = merged.weight[~mask]
    assert not dropped.any()
    assert not dropped.signbit().any()
    x = torch.randn(4, 37)
    torch.testing.assert_close(merged(x), masked(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merged_by_alpha_dropped_weights_are_scaled_in_fp32_and_rounded_once(linear, dtype):
    masked = MaskedLinear.from_linear(linear.to(dtype), keep_ratio=0.7)
    weight, mask = linear.weight.detach(), masked.mask()
    assert torch.equal(masked.merge(alpha=1).weight, masked.merge().weight)
    for alpha in (0.8, 0.3, 1e-3):
        merged = masked.merge(alpha=alpha).weight
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = (weight.to(wide) * torch.tensor(1 - alpha, dtype=wide)).to(dtype)
        assert torch.equal(merged, torch.where(mask, weight, expected))


@pytest.mark.parametrize("alpha", [0, -0.5, 1.5, math.nan, math.inf, True, "1", torch.tensor(0.5)])
def test_alpha_is_a_number_above_0_and_up_to_1(linear, alpha):
    with pytest.raises((ValueError, TypeError), match="alpha must (lie in .0, 1.*got|be a number, got)"):
        MaskedLinear.from_linear(linear).merge(alpha=alpha)


@pytest.mark.parametrize("bias", [True, False])
def test_copies_carry_the_state(bias):
    masked = MaskedLinear(37, 19, bias, keep_ratio=0.5)
    x = torch.randn(4, 37)
    expected = masked(x)
    assert torch.equal(copy.deepcopy(masked)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(masked))(x), expected)
    other = MaskedLinear(37, 19, bias, keep_ratio=0.5)
    buffer = io.BytesIO()
    torch.save(masked.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), expected)
    assert set(masked.state_dict()) == {"weight", "scores", "_extra_state", *(["bias"] if bias else [])}


def test_casting_moves_weights_but_leaves_scores_in_fp32(linear):
    masked = MaskedLinear.from_linear(linear)
    scores = masked.scores.detach().clone()
    masked.scores.grad = torch.ones_like(masked.scores)
    masked.to(torch.bfloat16)
    assert masked.weight.dtype == masked.bias.dtype == torch.bfloat16
    assert torch.equal(masked.scores, scores)
    assert masked.scores.grad.dtype == torch.float32
    assert masked.half()(torch.randn(2, 37).half()).dtype == torch.float16
    assert nn.Sequential(masked).double()[0].scores.dtype == torch.float32


def test_meta_construction_and_to_empty():
    masked = MaskedLinear(37, 19, device="meta")
    assert masked.scores.device.type == "meta"
    masked.to_empty(device="cpu")
    assert masked.scores.device.type == "cpu"


def test_autocast_gives_the_low_dtype_and_trains_fp32_scores(linear):
    masked = MaskedLinear.from_linear(linear, keep_ratio=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked(torch.randn(4, 37))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert masked.scores.grad.dtype == torch.float32
    assert masked.scores.grad.any()


def test_compiles_with_autocast_and_gradients(linear):
    torch._dynamo.reset()
    masked = MaskedLinear.from_linear(linear, keep_ratio=0.9)
    x = torch.randn(4, 37)

    def step(module):
        masked.scores.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        y.float().sum().backward()
        return y.detach(), masked.scores.grad.clone()

    for a, b in zip(step(masked), step(torch.compile(masked, fullgraph=True, backend="aot_eager"))):
        torch.testing.assert_close(a, b)


def test_initialisations(linear):
    normal = MaskedLinear(400, 100, init="normal").scores
    assert normal.std().item() == pytest.approx(0.02, rel=0.05)
    assert normal.mean().abs().item() < 1e-3
    magnitude = MaskedLinear.from_linear(linear, init="magnitude", keep_ratio=0.5)
    cut = linear.weight.abs().flatten().kthvalue(int(0.5 * linear.weight.numel()) + 1).values
    assert torch.equal(magnitude.mask(), linear.weight.abs() >= cut)
    assert magnitude.scores.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
    constant = MaskedLinear(400, 100, init="constant").scores
    assert constant.mean().item() == pytest.approx(0.02, rel=0.01)
    assert 0 < constant.std().item() < 0.001


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of"):
        MaskedLinear(4, 4, mode="max")


def test_a_layer_of_zeros_is_kept_whole_under_magnitude_initialisation():
    linear = nn.Linear(8, 8)
    nn.init.zeros_(linear.weight)
    assert MaskedLinear.from_linear(linear, init="magnitude", keep_ratio=0.9).mask().all()


@pytest.mark.parametrize("init", ["normal", "magnitude", "constant"])
def test_no_score_begins_at_zero_where_it_would_never_learn(init, monkeypatch):
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[0] = 0
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *args, **kwargs: self.zero_())
    scores = MaskedLinear.from_linear(linear, init=init).scores
    assert (scores != 0).all()
    assert init == "magnitude" or scores[0].max() < 1e-30


def test_weights_of_zero_take_no_dropped_places_under_magnitude_initialisation():
    linear = nn.Linear(32, 32)
    with torch.no_grad():
        linear.weight[:16] = 0
    mask = MaskedLinear.from_linear(linear, init="magnitude", keep_ratio=0.9).mask()
    assert mask[:16].all()
    assert (~mask[16:]).sum() == 102  # a tenth of all weights


def test_nan_scores_are_reported_with_the_modules_name():
    masked = MaskedLinear(8, 8)
    masked.module_name = "model.layers.3.mlp.up_proj"
    with torch.no_grad():
        masked.scores[0, 0] = torch.nan
    for use in (lambda: masked(torch.ones(1, 8)), masked.mask, masked.merge):
        with pytest.raises(ValueError, match=r"scores of module 'model.layers.3.mlp.up_proj' must be finite, got 1"):
            use()


def test_scores_are_refused_by_a_layer_that_selects_otherwise():
    saved = MaskedLinear(8, 4, keep_ratio=0.5).state_dict()
    layer = MaskedLinear(8, 4, keep_ratio=0.5)
    layer.load_state_dict(saved)
    expected = layer.mask()
    for change in ({"keep_ratio": 0.9}, {"threshold": 0.0}, {"mode": "value"}):
        other = MaskedLinear(8, 4, **{"keep_ratio": 0.5, **change})
        with pytest.raises(RuntimeError) as error:
            torch.nn.Sequential(other).load_state_dict({f"0.{name}": value for name, value in saved.items()})
        (name, value), text = next(iter(change.items())), str(error.value)
        assert "0.scores" in text
        assert "keep_ratio=0.5, threshold=None, mode='magnitude', pattern='matrix', got one with" in text
        assert f"{name}={value!r}" in text.split("got one with")[1]
        other.keep_ratio, other.threshold, other.mode = 0.5, None, "magnitude"
        other.load_state_dict(saved)
        assert torch.equal(other.mask(), expected)


def test_the_rule_is_saved_as_a_tensor_that_safetensors_takes(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    layer = MaskedLinear(8, 4, keep_ratio=0.9, threshold=0.25, mode="value")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    MaskedLinear(8, 4, keep_ratio=0.9, threshold=0.25, mode="value").load_state_dict(
        load_file(tmp_path / "layer.safetensors")
    )


def test_a_state_dict_of_before_the_rule_was_saved_loads():
    old = {name: value for name, value in MaskedLinear(8, 4).state_dict().items() if name != "_extra_state"}
    assert set(old) == {"weight", "bias", "scores"}
    layer = MaskedLinear(8, 4)
    assert not any(layer.load_state_dict(old))
    assert torch.equal(layer.scores, old["scores"])
