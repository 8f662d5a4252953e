"""Where a layer's weight lies in a server's fused matrices, found with the model's own load_weights, without copies."""

import pytest
import torch
from served import Served, is_plain
from tiny import make_llama

from mft.vllm.slices import Slices

Q, K, DOWN = (f"model.layers.1.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


@pytest.fixture
def served():
    return Served(make_llama())


def find(served, name, shape, plain=is_plain):
    return Slices(served, plain).find(name, shape, torch.float32)


def test_a_slice_is_memory_of_the_fused_matrix_and_nothing_is_copied(served):
    before = served.weights()
    k = find(served, K, (16, 32))
    assert torch.equal(k, before[K])
    k.fill_(7)
    after = served.weights()
    assert (after.pop(K) == 7).all()
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.9.mlp.down_proj", (32, 64), r"Served does not take \(.*layers.9.*\): serve the base"),
        (K, (32, 32), r"the mask is for a weight of \(32, 32\), which vLLM's Served does not take"),
        ("model.layers.0.mlp.experts", (4, 32, 64), "experts in one parameter .* mft merge"),
    ],
)
def test_what_the_model_does_not_take_is_refused_by_name(served, name, shape, words):
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        find(served, name, shape)


def test_a_repacked_layer_is_refused_by_name():
    served = Served(make_llama(), repacked=("down_proj",))
    with pytest.raises(ValueError, match=rf"^{DOWN}: .* ordinary matrix \(32, 64\), got a part of layer.*Repacked"):
        find(served, DOWN, (32, 64))


def test_a_weight_that_goes_to_no_place_or_to_two_is_refused(served):
    load = served.load_weights
    served.load_weights = lambda weights: None
    with pytest.raises(ValueError, match="one place of vLLM's Served, got 0"):
        find(served, Q, (32, 32))
    served.load_weights = lambda weights: [load(weights), load(weights)]
    with pytest.raises(ValueError, match="one place of vLLM's Served, got 2"):
        find(served, Q, (32, 32))
