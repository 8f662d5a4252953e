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


def adapted(model):
    return get_peft_model(model, MaskPeftConfig(layers_to_transform=[3], task_type="CAUSAL_LM"))


def masked(model):
    return mask_model(model, MaskConfig())


@pytest.mark.parametrize(
    ("make", "undone"),
    [
        (masked, merge_model),
        (lambda model: copy.deepcopy(masked(model)), merge_model),
        (lambda model: quantize_model(model.requires_grad_(False), "int8"), None),
        (adapted, lambda model: model.merge_and_unload()),
    ],
    ids=["masked", "copied", "quantised", "peft"],
)
def test_a_frozen_head_is_not_copied_for_each_row(llama, make, undone):
    head, model = llama.lm_head.weight.numel(), make(llama)
    assert largest_operand(lambda: generate(model)) < head
    if undone is not None:
        assert not any(module._forward_pre_hooks for module in undone(model).modules())


def test_nor_of_a_model_that_the_recipe_lets_answer(llama):
    frozen = llama.requires_grad_(False)
    with generating(frozen, GenerationConfig(**OPTIONS)):
        assert largest_operand(lambda: continue_prompts(PROMPTS, frozen, 0)) < llama.lm_head.weight.numel()
    assert not any(module._forward_pre_hooks for module in frozen.modules())
