"""Whole training steps in each formulation, on models with random weights: no cost depends on the values.

full fine-tune     all weights, bf16 with fp32 masters, AdamW
LoRA               peft, rank 16, on every linear of the decoder; bf16 adapters with fp32 masters
the paper's MFT    see memory/rival_loops.py, also for the careful form in eager PyTorch
ours, <way>        masks on every linear of the decoder, in each way of running (docs/how-to/memory.md); all but plain
                   store int16 scores and 8-bit moments
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mft.config import MaskConfig, TrainConfig
from mft.data.batches import MicroBatch
from mft.engines.mode import MODES, place
from mft.masks.convert import mask_model
from mft.masks.quantize import quantize_model
from mft.memory.shapes import known_config
from mft.memory.workload import Workload
from mft.models.causal_lm import FEW

from .memory.rival_loops import RIVALS, RivalLoop
from .rivals import LORA, LORA_RANK

FULL, PAPER, EAGER = "full fine-tune", "the paper's MFT", "eager PyTorch"
# Compact scores and moments: 4 bytes per weight, compared with 12 in the paper.
COMPACT = {"scores": "int16", "moments": "8bit"}
# way: (whether the base is quantised, masked layers too; storage of states)
WAYS: Mapping[str, tuple[bool, dict[str, str]]] = {
    "plain": (False, {"scores": "float32", "moments": "float32"}),
    "in_place": (False, COMPACT),
    "resident": (False, COMPACT),
    "quantized": (True, COMPACT),
    "layerwise": (False, COMPACT),
}
OURS = tuple(f"ours, {way}" for way in WAYS)
COMPETITORS = (FULL, LORA, PAPER, *OURS)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def workload_of(way: str, tokens: int, accumulation: int, device: str, quantization: str = "nf4") -> Workload:
    """Return the workload of mft estimate for one of our ways."""
    quantised, states = WAYS[way]
    return Workload(
        memory=way,
        sequence=tokens,
        accumulation=accumulation,
        quantization=quantization if quantised else None,
        quantize_masked=quantised,
        device=device,
        **states,
    )


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
        quantization: of the base, in the way that quantises it.
    """

    def __init__(
        self,
        competitor: str,
        model: Any,
        tokens: int,
        accumulation: int = 1,
        layers: list[int] | None = None,
        device: str | torch.device = "cpu",
        quantization: str = "nf4",
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (accumulation, 1, tokens), generator=generator)
        self._batches = [MicroBatch([i], row, row, [i]) for i, row in enumerate(ids)]
        self._device, self._quantization = torch.device(device), quantization
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
        if competitor in (PAPER, EAGER):
            loop = RivalLoop(RIVALS["paper" if competitor == PAPER else "eager"], model, train, layers)
            return lambda batches: loop.step(batches).item()
        way = "plain"
        if competitor == FULL:
            model.requires_grad_(True)
        elif competitor == LORA:
            import peft  # which the GPU suite does not need

            config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LINEARS)
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()
        elif competitor in OURS:
            way = competitor.removeprefix("ours, ")
            quantised, states = WAYS[way]
            train.moments = states["moments"]
            model.requires_grad_(False)
            mask_model(model, MaskConfig.paper(scores_dtype=states["scores"], layers_to_transform=layers))
            if quantised:
                quantize_model(model, self._quantization, masked=True)
        else:
            raise ValueError(f"competitor must be among {', '.join((*COMPETITORS, EAGER))}, got {competitor!r}")
        MODES[way].move(model, self._device)
        few = self._batches[0].input_ids[:, :FEW].to(next(model.parameters()).device)
        runner = place(model, way=way, device=self._device).start(few, train)
        self._closing.callback(runner.close)
        return lambda batches: _run(runner, batches, train.lr)


def _run(runner: Any, batches: Sequence[MicroBatch], lr: float) -> float:
    count = sum(len(batch.labelled.targets) for batch in batches)
    totals: list[float] = []
    runner.step(batches, 1 / count, lr, None, lambda batch, total: totals.append(total.item()))
    runner.states.check()
    return sum(totals) / count
