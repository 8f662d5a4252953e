"""Memory of training with rewards, compared with a run's allocations on this machine, and which recipes fit."""

import pytest
import torch
from known_shapes import SMALL

from benchmarks.memory.tracker import MemoryTracker
from mft.memory.rewards_memory import rewards_memory, rewards_peak
from mft.memory.shapes import known_config, shape_from_config

CONFIG = SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True, "hidden_size": 256, "intermediate_size": 1024}
ANSWERS, PROMPT, COMPLETION = 16, 48, 16


def tracked(learns, generations):
    """Return the peak of a step's sampling and learning on a real model, as in train_rewards."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from mft.config import MaskConfig, TrainConfig
    from mft.engines.plain import make_stepper
    from mft.evaluation.continuation import continue_prompts, generating
    from mft.masks.convert import mask_model, masked_modules
    from mft.rewards.log_probs import token_log_probs
    from mft.rewards.shared_prompts import states_before_answers
    from mft_study.peft_methods import add_adapter, lora_options

    values = {name: value for name, value in CONFIG.items() if name != "model_type"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).bfloat16()
    model.requires_grad_(learns == "everything")
    if learns == "adapters":
        names = [name for name, _ in model.named_modules() if name.endswith("gate_proj")]
        add_adapter(model, names, lora_options(8))
    if learns == "scores":
        mask_model(model, MaskConfig(target_modules=["gate_proj"]))
        for module in masked_modules(model).values():
            module.scores.requires_grad_()
    settings = GenerationConfig(max_new_tokens=COMPLETION, min_new_tokens=COMPLETION, do_sample=True, pad_token_id=0)
    prompts = [[1 + i // generations] * PROMPT for i in range(ANSWERS)]
    tracker = MemoryTracker()
    tracker.track(model)
    with tracker, make_stepper(model, TrainConfig(steps=1)) as stepper:
        for _ in range(2):  # moments exist from the first update on
            with torch.no_grad(), generating(model, settings):
                said = continue_prompts(prompts, model, 0)
            ids = torch.tensor([prompt + answer for prompt, answer in zip(prompts, said)])
            hidden = states_before_answers(model, ids, torch.ones_like(ids), COMPLETION)
            log_probs, _ = token_log_probs(
                model.lm_head, hidden.reshape(-1, hidden.shape[-1]), ids[:, -COMPLETION:].reshape(-1), 1.0
            )
            log_probs.sum().backward()
            del hidden, log_probs
            stepper.step()
    return tracker.device_peak


@pytest.mark.slow
@pytest.mark.parametrize("learns", ["scores", "adapters", "everything"])
def test_a_step_holds_no_more_than_is_estimated_and_not_much_less(learns):
    phases = rewards_memory(
        shape_from_config(CONFIG),
        learns=learns,
        answers=ANSWERS,
        prompt=PROMPT,
        completion=COMPLETION,
        target_modules=["gate_proj"],
    )
    own = shape_from_config(CONFIG).parameters * 2 if learns == "everything" else 0  # here the start is not a copy
    assert 1 <= (rewards_peak(phases) - own) / tracked(learns, generations=1) <= 1.3
    assert rewards_peak(phases) - own >= tracked(learns, generations=2)  # each question is read once


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b"])
@pytest.mark.parametrize("learns", ["scores", "weights", "everything"])
def test_what_fits_in_24_gb(name, learns):
    """All weights fit at half a billion, and not at one and a half."""
    recipe = {"answers": 64, "prompt": 256, "completion": 512, "micro_batch": 4}
    targets = None if learns == "everything" else ["gate_proj"]
    phases = rewards_memory(shape_from_config(known_config(name)), learns=learns, target_modules=targets, **recipe)
    too_large = (name, learns) == ("qwen2.5-1.5b", "everything")
    assert rewards_peak(phases) > 24e9 if too_large else rewards_peak(phases) < 22e9


def test_what_grows_with_what():
    shape = shape_from_config(known_config("qwen2.5-0.5b"))
    options = {"learns": "scores", "answers": 8, "prompt": 100, "completion": 28, "target_modules": ["gate_proj"]}
    phases = rewards_memory(shape, **options)
    assert phases["sampling"]["cache"] == 2 * 24 * 2 * 64 * 2 * 8 * 128
    twice = rewards_memory(shape, **options | {"answers": 16, "micro_batch": 8})
    assert twice["sampling"]["cache"] == 2 * phases["sampling"]["cache"]
    assert twice["learning"]["activations"] == phases["learning"]["activations"]
    less = rewards_memory(shape, **options, gradient_checkpointing=True)
    assert less["learning"]["activations"] < phases["learning"]["activations"] / 2
    assert phases["update"]["gradients"] == phases["update"]["learned"] == 4 * 24 * 896 * 4864
    with pytest.raises(ValueError, match="layers must lie in 0 to 23"):
        rewards_memory(shape, **options, layers=[24])
    with pytest.raises(ValueError, match="learns must be one of scores, weights, adapters, everything, got 'mask'"):
        rewards_memory(shape, **options | {"learns": "mask"})
