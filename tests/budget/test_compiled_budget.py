"""Masks under a budget in torch.compile: thresholds that change at every step compile nothing again."""

import pytest
import torch
from peft import get_peft_model
from tiny import make_llama, make_rows
from tiny_mixtures import mixture
from torch._dynamo.testing import CompileCounterWithBackend

from mft.config import MaskConfig
from mft.masks.budget import grow_budget
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig
from mft.masks.quantize import quantize_model

STEPS = 3
ROUNDING = 1e-4  # relative to the norm of a gradient; decompositions round differently
MASK = {"target_modules": ["gate_proj", "up_proj"], "budget": 0.05}
BATCH = {name: torch.tensor(make_rows(2)[name]) for name in ("input_ids", "labels")}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def masked():
    return mask_model(make_llama(num_hidden_layers=1), MaskConfig(**MASK))


def quantised():
    return quantize_model(masked(), "int8", masked=True)


def experts():
    return mask_model(mixture("Qwen3Moe"), MaskConfig(target_modules=["down_proj"], budget=0.05))


def adapted():
    return get_peft_model(make_llama(num_hidden_layers=1), MaskPeftConfig(**MASK, task_type="CAUSAL_LM"))


def adapted_experts():
    config = MaskPeftConfig(target_modules=["down_proj"], budget=0.05, task_type="CAUSAL_LM")
    return get_peft_model(mixture("Qwen3Moe"), config)


def gradients(forward, model, scores):
    model.zero_grad()
    forward(**BATCH, use_cache=False).loss.backward()
    return [each.grad.clone() for each in scores]


def graphs_by_step(model, scores, **options):
    """Return the number of graphs after each step under a growing budget; gradients must be the model's own."""
    optimizer = torch.optim.AdamW(scores, lr=1e-3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, **options)
    graphs = []
    for step in range(STEPS):
        grow_budget(model, step, STEPS)
        expected = gradients(model, model, scores)
        for ours, theirs in zip(gradients(compiled, model, scores), expected, strict=True):
            assert (ours - theirs).norm() <= ROUNDING * theirs.norm()
        graphs.append(counter.frame_count)
        optimizer.step()
    return graphs


@pytest.mark.parametrize("make", [masked, *(pytest.param(m, marks=pytest.mark.slow) for m in (quantised, experts))])
def test_thresholds_that_move_are_read_by_one_graph(make):
    model = make()
    scores = [module.scores for module in masked_modules(model).values()]
    assert graphs_by_step(model, scores, fullgraph=True) == [1] * STEPS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT calls it
@pytest.mark.parametrize("make", [adapted, adapted_experts])
def test_an_adapter_takes_several_graphs_and_later_steps_make_no_more(make):
    model = make()
    first, *later = graphs_by_step(model, [p for p in model.parameters() if p.requires_grad])
    assert later == [first] * (STEPS - 1)
