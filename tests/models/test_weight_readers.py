"""Modules that use a child's weight without calling the child are found from their source, and only those."""

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, JambaConfig, MambaConfig, MambaForCausalLM, T5Config
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.t5.modeling_t5 import T5DenseActDense

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.models.weight_readers import why_read


class Reader(nn.Module):
    def __init__(self, shortcut=True):
        super().__init__()
        self.called, self.read, self.later, self.asked = (nn.Linear(4, 4) for _ in range(4))
        self.shortcut = shortcut

    def forward(self, x):
        x = self.asked(self.called(x.to(self.asked.weight.dtype)))
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight.shape[0] > 3:
            x = self.called(x)
        if self.shortcut:
            return self.product(x)
        return x if self.training else x @ self.later.weight

    def product(self, x):
        return x @ self.read.weight

    def never_called(self):
        return self.called.weight


class Grandchild(Reader):
    """Reads through inherited methods."""


@pytest.mark.parametrize("kind", [Reader, Grandchild])
def test_what_forward_reads_is_found_and_what_it_only_asks_or_never_reaches_is_not(kind):
    assert [name for name, _ in kind().named_children() if why_read(kind(), name)] == ["read", "later"]
    assert f"{kind.__name__}.product (test_weight_readers.py) computes with read.weight" in why_read(kind(), "read")


def test_a_branch_that_the_module_never_takes_does_not_count():
    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4))
    attention = model.transformer.h[0].self_attention
    assert why_read(attention, "dense") is None
    attention.pretraining_tp, attention.slow_but_exact = 2, True
    assert "BloomAttention.forward (modeling_bloom.py)" in why_read(attention, "dense")
    with pytest.raises(ValueError, match="cannot mask transformer.h.0.self_attention.dense: BloomAttention.forward"):
        mask_model(model, MaskConfig())


def test_transformers_own():
    assert why_read(T5DenseActDense(T5Config(d_model=8, d_ff=16)), "wo") is None  # it only asks for the dtype
    jamba = JambaMambaMixer(JambaConfig(hidden_size=16, mamba_d_state=4, num_hidden_layers=2), layer_idx=0)
    assert why_read(jamba, "dt_proj")
    assert not why_read(jamba, "in_proj")


def test_a_mamba_refuses_masks_that_it_would_leave_out_and_takes_the_others():
    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(ValueError, match=r"backbone.layers.0.mixer.dt_proj: MambaMixer.* computes with dt_proj.weight"):
        mask_model(model, MaskConfig(target_modules=["dt_proj"]))
    assert not masked_modules(model)
    mask_model(model, MaskConfig(target_modules=["in_proj"], keep_ratio=0.5))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        y = model(ids).logits
        torch.testing.assert_close(merge_model(model)(ids).logits, y)


def test_a_class_without_a_source_is_taken_at_its_word():
    space = {}
    exec("from torch import nn\nclass Made(nn.Module):\n    def forward(self, x):\n        return self.a.weight", space)
    assert why_read(space["Made"](), "a") is None
