"""mft.models.head_input: a batch's last positions are a single product with a frozen head."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import make_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from mft.config import MaskConfig
from mft.evaluation.continuation import continue_prompts, generating
from mft.masks.convert import mask_model, merge_model
from mft.masks.peft import MaskPeftConfig
from mft.masks.quantize import quantize_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT calls it

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
OPTIONS = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}


class Products(TorchDispatchMode):
    """Records the largest operand of a batched product; the head's weight copied for each row would be one."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.elements = max(self.elements, *(operand.numel() for operand in args))
        return function(*args, **(kwargs or {}))


def largest_operand(call):
    with Products() as products, torch.no_grad():
        call()
    return products.elements


def generate(model):
    model.generate(torch.tensor(PROMPTS), attention_mask=torch.ones(3, 4, dtype=torch.int64), **OPTIONS)


@pytest.fixture
def llama():
    return make_llama(vocab_size=4096)  # the head has more weights than attention's products have elements


def test_a_frozen_head_is_not_copied_for_each_row_of_a_masked_model(llama):
    head = llama.lm_head.weight.numel()
    masked = mask_model(llama, MaskConfig())
    assert largest_operand(lambda: generate(masked)) < head
    assert largest_operand(lambda: generate(copy.deepcopy(masked))) < head
    merged = merge_model(masked)
    assert not any(module._forward_pre_hooks for module in merged.modules())


def test_nor_of_a_quantised_one(llama):
    head = llama.lm_head.weight.numel()
    quantized = quantize_model(llama.requires_grad_(False), "int8")
    assert largest_operand(lambda: generate(quantized)) < head


def test_nor_of_a_model_that_the_recipe_lets_answer(llama):
    head = llama.lm_head.weight.numel()
    frozen = llama.requires_grad_(False)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    with generating(frozen, settings):
        assert largest_operand(lambda: continue_prompts(PROMPTS, frozen, 0)) < head
    assert not any(module._forward_pre_hooks for module in frozen.modules())


def test_nor_of_a_mask_under_peft(llama):
    head = llama.lm_head.weight.numel()
    adapted = get_peft_model(llama, MaskPeftConfig(layers_to_transform=[3], task_type="CAUSAL_LM"))
    assert largest_operand(lambda: generate(adapted)) < head
    assert not any(module._forward_pre_hooks for module in adapted.merge_and_unload().modules())
