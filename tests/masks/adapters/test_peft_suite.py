"""PEFT's own common tests, unchanged, with masks as the method: MFT_PEFT=path/to/a/checkout/of/peft gives their place.

Every _test_* of tests/testing_common.py there runs on a tiny Llama and on a tiny mixture, except those in OTHERS.
"""

import inspect
import os
import sys
import types

import pytest
import torch
from tiny import make_llama
from tiny_mixtures import mixture
from transformers import AutoModelForCausalLM

from mft.masks.peft import MaskPeftConfig

CHECKOUT = os.environ.get("MFT_PEFT")
if CHECKOUT is None:
    pytest.skip("needs MFT_PEFT=path/to/a/checkout/of/peft, whose tests it runs", allow_module_level=True)

OTHERS = {
    "merge_layers_multi": "merges two adapters at once, and expects another draw of one configuration",
    "add_adapter_no_autocast_adapter_dtype": "scores have the dtype of their configuration, not of the base",
    "mixed_adapter_batches": "of LoRA and RoAd",
    "generate_with_mixed_adapter_batches_and_beam_search": "of LoRA",
    "weighted_combination_of_adapters": "of LoRA and IA3",
    "weighted_combination_of_adapters_lora": "of LoRA",
    "weighted_combination_of_adapters_ia3": "of IA3",
    "training_prompt_learning_tasks": "of prompts",
}
BASES = {
    "llama": (make_llama, {"target_modules": ["q_proj", "up_proj"]}),
    "mixture": (lambda: mixture("Olmoe"), {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}
ARGUMENTS = {"raises_err": [False], "use_reentrant": [True, False], "safe_serialization": [True, False]}


def common_tester():
    """Return the class of PEFT's tests, from the checkout."""
    if "diffusers" not in sys.modules:  # they import one name, for models that are not tested here
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    sys.path.insert(0, CHECKOUT)
    try:
        from tests.testing_common import PeftCommonTester
    finally:
        sys.path.remove(CHECKOUT)
        del sys.modules["diffusers"]
    return PeftCommonTester


class Tester(common_tester()):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self):
        tokens = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}


def cases():
    """Yield (name, arguments beyond the common three) of each test."""
    for attribute in sorted(vars(Tester.__base__)):
        name = attribute.removeprefix("_test_")
        if name == attribute or name in OTHERS:
            continue
        parameters = inspect.signature(getattr(Tester, attribute)).parameters
        extra = next((key for key in ARGUMENTS if key in parameters), None)
        for value in ARGUMENTS.get(extra, [None]):
            arguments = {} if extra is None else {extra: value}
            if "test_name" in parameters:
                arguments["test_name"] = name
            yield pytest.param(attribute, arguments, id=name if extra is None else f"{name}-{value}")


@pytest.fixture(scope="module", params=BASES.values(), ids=BASES)
def base(request, tmp_path_factory):
    """Save a model; return its directory, and which of its layers are masked."""
    make, targets = request.param
    directory = tmp_path_factory.mktemp("base")
    make().save_pretrained(directory)
    return str(directory), targets


@pytest.mark.filterwarnings("default")  # their own tests do not turn warnings into errors
@pytest.mark.parametrize(("attribute", "arguments"), cases())
def test_peft(base, attribute, arguments):
    directory, targets = base
    settings = {"task_type": "CAUSAL_LM", "keep_ratio": 0.7, "init": "normal"} | targets
    getattr(Tester(), attribute)(model_id=directory, config_cls=MaskPeftConfig, config_kwargs=settings, **arguments)
