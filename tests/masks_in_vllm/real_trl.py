"""Run TRL's GRPO with the real vLLM in its process, and print as JSON how far vLLM is from the trained model.

python real_trl.py KIND DIRECTORY: KIND is peft, mask_model, or stale (vLLM gets the first masks only).
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import mft.vllm
from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.masks.merged_weights import merged_weights
from mft.masks.peft import MaskPeftConfig
from mft.vllm.plain_linear import is_plain
from mft.vllm.slices import Slices

STEPS = 3


def base(directory):
    """Save a small Llama in fp32 with SmolLM2's tokenizer, and return it. Its weights are large, so masks matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 256}
    config = LlamaConfig(vocab_size=49152, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(os.environ["MFT_VLLM_BASE"])
    tokenizer.save_pretrained(directory)
    LlamaForCausalLM(config).save_pretrained(directory)
    return LlamaForCausalLM.from_pretrained(directory), tokenizer


def length(completion_ids, **_):
    return [float(sum(ids) % 97) for ids in completion_ids]


def run(kind, directory):
    model, tokenizer = base(directory)
    masks = {"peft_config": MaskPeftConfig(task_type="CAUSAL_LM")} if kind != "mask_model" else {}
    args = GRPOConfig(
        str(directory / "runs"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_steps=STEPS,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        beta=0.0,
    )
    with mft.vllm.masks_in_trl():
        trainer = GRPOTrainer(
            model=model if masks else mask_model(model, MaskConfig()),
            args=args,
            reward_funcs=length,
            train_dataset=Dataset.from_list([{"prompt": f"Q: What is {i} + {i}?\nA:"} for i in range(8)]),
            processing_class=tokenizer,
            **masks,
        )
    generation = trainer.vllm_generation
    if kind == "stale":
        update, sent = generation.sync_weights, []
        generation.sync_weights = lambda: None if sent else sent.append(update())
    trainer.train()
    generation.sync_weights()
    return {
        "difference": [
            log["sampling/sampling_logp_difference/max"] for log in trainer.state.log_history if "reward" in log
        ],
        "differing": differing(trainer.model, generation.llm),
    }


def differing(model, llm):
    """Return how many masked weights of vLLM's model are not the merged model's, bit for bit, and of how many."""
    served = llm.llm_engine.model_executor.driver_worker.model_runner.model
    find, count, of = Slices(served, is_plain).find, 0, 0
    for name, weight in merged_weights(model):
        if name.endswith("_proj.weight"):
            inside = find(name.removesuffix(".weight"), tuple(weight.shape), weight.dtype)
            count += int((inside.view(torch.int32) != weight.view(torch.int32)).sum())
            of += weight.numel()
    return [count, of]


if __name__ == "__main__":
    print("\n" + json.dumps(run(sys.argv[1], Path(sys.argv[2]))), flush=True)
