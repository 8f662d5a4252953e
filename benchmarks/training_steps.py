"""Whole training steps in each formulation, on models with random weights: their time does not depend on the values.

full fine-tune     all weights, bf16 with fp32 masters, AdamW
LoRA               peft, rank 16, on every linear of the decoder; bf16 adapters with fp32 masters
the paper's MFT    see memory/rivals.py
ours, <way>        masks on every linear of the decoder, in each way of running (docs/how-to/memory.md); all but plain
                   store int16 scores and 8-bit moments
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft.config import MaskConfig, TrainConfig
from mft.data.batches import MicroBatch, take_rows
from mft.engines.mode import place
from mft.masks.convert import mask_model
from mft.masks.quantize import quantize_model
from mft.memory.shapes import known_config
from mft.models.causal_lm import FEW

from .layer_competitors import LORA, LORA_RANK
from .memory.rivals import RIVALS, RivalLoop
from .memory.worker import WAYS, Rows

FULL, PAPER = "full fine-tune", "the paper's MFT"
OURS = tuple(f"ours, {way}" for way in WAYS)
COMPETITORS = (FULL, LORA, PAPER, *OURS)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a causal LM of this configuration."""
    fields = dict(config)
    family = fields.pop("model_type")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=dtype)


def small_config(width: int, layers: int) -> dict[str, Any]:
    """Return a LLaMA with this hidden size, heads of 64, an MLP three times as wide, and a small vocabulary."""
    return known_config("llama2-7b") | {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 512,
    }


class TrainingStep:
    """Steps of one competitor on a model, which it changes; call() runs one, close() gives the model back.

    Args:
        layers: the layers that learn, or all if None; full fine-tune and LoRA support only all.
        tokens, accumulation: tokens per micro-batch, and micro-batches per step.
    """

    def __init__(
        self, competitor: str, model: Any, tokens: int, accumulation: int = 1, layers: list[int] | None = None
    ) -> None:
        rows = Rows(model, tokens, accumulation)
        self._batches = [take_rows(rows, [row]) for row in range(accumulation)]
        self._closing = ExitStack()
        model.train()
        self._step = self._start(competitor, model, TrainConfig(steps=1, accumulation=accumulation), layers)

    def __call__(self) -> float:
        """Run one optimiser step and return the mean loss per token."""
        return self._step(self._batches)

    def close(self) -> None:
        """Release the model; the last call."""
        self._closing.close()

    def _start(
        self, competitor: str, model: Any, train: TrainConfig, layers: list[int] | None
    ) -> Callable[[Sequence[MicroBatch]], float]:
        few = self._batches[0].input_ids[:, :FEW]
        if competitor == PAPER:
            loop = RivalLoop(RIVALS["paper"], model, train, layers)
            return lambda batches: loop.step(batches).item()
        way = "plain"
        if competitor == FULL:
            model.requires_grad_(True)
        elif competitor == LORA:
            config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LINEARS)
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()
        elif competitor in OURS:
            way, quantization, quantize_masked, states = WAYS[competitor.removeprefix("ours, ")]
            train.moments = states["moments"]
            model.requires_grad_(False)
            mask_model(model, MaskConfig.paper(scores_dtype=states["scores"], layers_to_transform=layers))
            if quantization is not None:
                quantize_model(model, quantization, masked=quantize_masked)
        else:
            raise ValueError(f"competitor must be among {', '.join(COMPETITORS)}, got {competitor!r}")
        runner = place(model, way=way, device="cpu").start(few, train)
        self._closing.callback(runner.close)
        return lambda batches: _run(runner, batches, train.lr)


def _run(runner: Any, batches: Sequence[MicroBatch], lr: float) -> float:
    count = sum(len(batch.labelled.targets) for batch in batches)
    totals: list[float] = []
    runner.step(batches, 1 / count, lr, None, lambda batch, total: totals.append(total.item()))
    runner.check()
    return sum(totals) / count
