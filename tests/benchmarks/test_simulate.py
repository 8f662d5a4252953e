"""The memory tracker: peaks computed by hand, PyTorch's own tracker, and fake tensors compared with real ones."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

from benchmarks.memory.tracker import BLOCK, MemoryTracker
from mft.memory.activations import Layer
from mft.memory.shapes import known_config, shape_from_config

KB = 1024


def floats(kilobytes):
    return torch.empty(kilobytes * KB // 4)


def test_a_peak_by_hand():
    with MemoryTracker() as tracker:
        a = floats(1)
        b = floats(2)
        del a
        c = floats(4)
        assert (tracker.device_bytes, tracker.device_peak) == (6 * KB, 6 * KB)
        del b, c
    assert (tracker.device_bytes, tracker.device_peak) == (0, 6 * KB)


def test_backward_by_hand():
    """y = (x * x).exp(): the square is freed, exp keeps its output, and its gradient passes through both."""
    with MemoryTracker() as tracker:
        x = floats(1).requires_grad_()
        y = (x * x).exp()
        assert (tracker.device_bytes, tracker.device_peak) == (2 * KB, 3 * KB)  # now x, y; at the peak x, x * x, y
        y.sum().backward()
        del y
    # x, y, twice the sum's block (with its gradient of one), grad * y, and for x * x the gradient of each x, and their
    # sum
    assert tracker.device_bytes == 2 * KB
    assert tracker.device_peak == 5 * KB + 2 * BLOCK


def test_views_and_in_place_operators_make_nothing():
    with MemoryTracker() as tracker:
        a = floats(4)
        kept = [a[3:], a.view(2, -1).t(), a.detach(), a.add_(1), a.mul_(2).reshape(-1)]
        assert tracker.device_bytes == 4 * KB
        del a
        assert tracker.device_bytes == 4 * KB  # the views keep it alive
        del kept
        assert tracker.device_bytes == 0


def toy():
    return nn.Sequential(nn.Linear(128, 256, bias=False), nn.GELU(), nn.Linear(256, 128, bias=False))


def test_pytorch_own_tracker_sees_the_same_peak():
    model, x = toy(), torch.empty(64, 128)
    theirs = MemTracker()
    theirs.track_external(model, x)
    with theirs:
        model(x).square().sum().backward()
    (found,) = theirs.get_tracker_snapshot("peak").values()
    model, x = toy(), torch.empty(64, 128)
    with MemoryTracker() as ours:
        ours.track([*model.parameters(), x])
        model(x).square().sum().backward()
    # PyTorch's tracker counts a scalar as 4 bytes on a CPU, not as the block that a GPU allocates.
    assert ours.device_peak == pytest.approx(found["Total"], abs=4 * BLOCK)


def run_layer(config, tokens, *, frozen=False):
    """Run one decoder layer forward and back; return (tracker, bytes after forward), without its weights."""
    layer = LlamaDecoderLayer(config, 0).requires_grad_(not frozen)
    rotations = [torch.empty(1, tokens, config.head_dim) for _ in range(2)]
    with MemoryTracker() as tracker:
        x = torch.empty(1, tokens, config.hidden_size, requires_grad=True)
        grad = torch.empty(1, tokens, config.hidden_size)
        edge = get_gradient_edge(layer(x, position_embeddings=rotations, attention_mask=None))
        held = tracker.device_bytes
        torch.autograd.backward((edge,), (grad,))
    return tracker, held


@pytest.fixture
def bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_fake_and_real_tensors_agree(bfloat16):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"
    )
    real, held = run_layer(config, 32)
    with FakeTensorMode():
        fake, fake_held = run_layer(config, 32)
    assert (fake.device_peak, fake_held) == (real.device_peak, held)


class Masked(torch.autograd.Function):
    """A layer that saves only its input, like a held masked layer."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad_output):
        _ = ctx.saved_tensors
        return grad_output @ ctx.weight, None


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "tokens"), [("llama2-7b", 4096), ("llama3.1-8b", 1024), ("llama2-70b", 4096)])
def test_activations_of_one_layer(name, tokens, masked, monkeypatch, bfloat16):
    """A whole layer of the published size is recomputed from its input and taken backward, under FakeTensorMode."""
    config = known_config(name)
    shape = shape_from_config(config, name)
    known = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}, attn_implementation="sdpa")
    if masked:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: Masked.apply(x, self.weight))
    with FakeTensorMode():
        tracker, held = run_layer(known, tokens, frozen=True)
    layer = Layer(shape, tokens, set(shape.linears) if masked else set())
    assert layer.saved + 2 * layer.hidden == pytest.approx(held, rel=0.01)
    assert layer.peak == pytest.approx(tracker.device_peak, rel=0.01)
