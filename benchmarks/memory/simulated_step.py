"""Run one training step of a masked model under FakeTensorMode: peaks of the engines, without needing the memory.

    python -m benchmarks.memory.simulated_step llama2-7b --layers 4-7    # or make simulate
    python -m benchmarks.memory.simulated_step llama2-7b --ways layerwise --accumulation 128 --batches-at-once 8 \
        --scores int16 --moments 8bit --steps 1    # the paper's step in 64 GB of host memory: 5 minutes

The unchanged engines run on the fake CPU, with a mover that copies as to a device and marks what is kept on the host.
"""

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.memory.simulated_shards import sharded_processes, sharded_runner
from benchmarks.memory.tracker import MemoryTracker
from mft.config import MaskConfig, TrainConfig, parse_layers
from mft.data.batches import Labelled, MicroBatch
from mft.engines.distributed import ALONE, Processes
from mft.engines.in_place_engine import InPlace, InPlaceStates
from mft.engines.layer_calls import LayerCalls
from mft.engines.mode import ResidentMode, place
from mft.engines.offload import Mover
from mft.engines.plain import Plain
from mft.engines.score_states import HeldMask, grad_dtype, score_groups, score_optimizer
from mft.masks.convert import convert, masked_modules
from mft.masks.masked_experts import mask_experts
from mft.masks.quantize import QuantizedLinear, QuantizedMaskedGroupedLinear, QuantizedMaskedLinear
from mft.masks.targets import select_targets
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, known_models, shape_from_config
from mft.memory.workload import Workload
from mft.models.causal_lm import decoder_layers, head_of, run_decoder
from mft.models.codes.quantized_experts import QuantizedGroupedLinear
from mft.models.codes.weight import QuantizedWeight
from mft.models.routed_experts import expert_projections
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.kl import KL
from mft.objectives.log_prob_objective import LogProbObjective
from mft.objectives.objective import Objective
from mft_kernels import MaskedGroupedLinear, MaskedLinear
from mft_kernels.mask.masked_in_place import MaskedInPlace
from mft_kernels.reference import functions as reference

DTYPE = torch.bfloat16
# sdpa without a mask, as for real tensors of whole rows; for fake ones transformers makes a mask of T x T.
_CAUSAL = "sdpa_causal"
_EAGER = ("gpt_oss",)  # models for which transformers has no other attention without a further package


def simulate_step(config: Mapping[str, Any], workload: Workload, *, steps: int = 1) -> MemoryTracker:
    """Return the tracker after ``steps`` whole optimiser steps of workload.own_accumulation micro-batches each.

    Args:
        config: config.json of the model, as a dictionary; the model is built in bfloat16.
        workload: memory must not be auto, and quantization must be given if it is quantized.
    """
    tracker = MemoryTracker()
    with FakeTensorMode(), tracker, _known_number_aside(workload), sharded_processes(workload, tracker):
        model = _masked_model(config, workload)
        batches = [fake_batch(workload) for _ in range(workload.own_accumulation)]
        runner = _runner(model, workload, tracker)
        tracker.reset_peaks()
        for _ in range(steps):
            runner.step(batches, 1.0, 1e-3, None, lambda batch, total: None)
    return tracker


class _Compared(LogProbObjective):
    """DPO without its memory of rows, for which it needs numbers."""

    of_base = True

    def loss(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Tensor:
        assert reference is not None, "it is not remembered"
        return -nn.functional.logsigmoid((log_probs - reference).sum())


_OBJECTIVES: dict[str, Objective] = {"cross_entropy": CROSS_ENTROPY, "kl": KL(), "dpo": _Compared()}


class SimulatedMover(Mover):
    """Copies between two memories that are both on the fake CPU."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__("cpu", separate=True)
        self._tracker = tracker

    def rest(self, tensor: Tensor) -> Tensor:
        self._tracker.mark_host(tensor)
        return tensor

    def host(self) -> AbstractContextManager:
        return self._tracker.host()


class SimulatedProcesses(Processes):
    """Simulated processes: the others send nothing."""

    def together(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _add_up(self, total: Tensor) -> Any:
        return self

    def wait(self) -> None:
        """Do nothing: nothing is in flight."""


def fake_model(config: Mapping[str, Any]) -> Any:
    """Return a causal language model of this config in bfloat16; it is fake under FakeTensorMode."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    known = AutoConfig.for_model(config["model_type"], **options)
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    AttentionMaskInterface.register(_CAUSAL, lambda *args, **kwargs: None)
    attention = "eager" if known.model_type in _EAGER else _CAUSAL
    return AutoModelForCausalLM.from_config(known, attn_implementation=attention, dtype=DTYPE)


def fake_batch(workload: Workload) -> MicroBatch:
    """Return a micro-batch of this workload's size in which every token is scored."""
    rows, tokens = workload.micro_batch, workload.sequence
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    batch = MicroBatch(list(range(rows)), ids, ids, [0] * rows)
    # The result of find_labelled if every token is scored; under FakeTensorMode it cannot read values.
    scored = rows * (tokens - 1)
    found = Labelled(torch.zeros(scored, dtype=torch.int64), torch.zeros(scored, dtype=torch.int64))
    vars(batch)["labelled"] = found
    return batch


# ---------------------------------------------------------------------------------------------- private


def checkpoint(model: Any) -> None:
    """Recompute activations in the backward, by the name of this in the installed transformers."""
    # TODO: drop the old name when transformers >= 6 is the floor
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})


def _masked_model(config: Mapping[str, Any], workload: Workload) -> nn.Module:
    mask = MaskConfig.paper(  # its scores are drawn in place, without a temporary of a weight's size
        target_modules=None if workload.target_modules is None else list(workload.target_modules),
        layers_to_transform=None if workload.layers is None else list(workload.layers),
        scores_dtype=workload.scores,
    )
    with unset_fake_temporarily(), torch.device("meta"):
        names = select_targets(fake_model(config), mask)  # ties are found by addresses, which fake weights lack
    model = fake_model(config)
    convert(model, names, mask)
    if workload.quantization is not None:
        _quantize(model, workload.quantization, masked=workload.quantize_masked)
    if workload.gradient_checkpointing:
        checkpoint(model)
    return model.train()


def _quantize(model: Any, kind: str, *, masked: bool) -> None:
    """quantize_model for weights without values."""
    layers = decoder_layers(model)
    for name, module in list(layers.named_modules()):
        for part in expert_projections(module):
            mask_experts(module, part, functools.partial(_empty_experts, kind=kind))
        grouped = isinstance(module, MaskedGroupedLinear)
        is_masked = grouped or isinstance(module, MaskedLinear)
        if not (masked if is_masked else isinstance(module, nn.Linear)):
            continue
        quantized = _empty(module.weight, kind)
        if is_masked:
            del module.weight
            module.__class__ = QuantizedMaskedGroupedLinear if grouped else QuantizedMaskedLinear
            module.quantized = quantized
        else:
            parent, _, child = name.rpartition(".")
            setattr(layers.get_submodule(parent), child, QuantizedLinear(quantized))


def _empty_experts(weight: Tensor, bias: Tensor | None, *, transposed: bool, kind: str) -> QuantizedGroupedLinear:
    return QuantizedGroupedLinear(_empty(weight, kind), len(weight), bias, transposed=transposed)


def _empty(weight: Tensor, kind: str) -> QuantizedWeight:
    """Return empty codes of a matrix, or of all experts' matrices in one."""
    *rows, columns = weight.shape
    return QuantizedWeight.empty((math.prod(rows), columns), DTYPE, kind)


def _runner(model: nn.Module, workload: Workload, tracker: MemoryTracker) -> Any:
    at_once = workload.batches_at_once
    train = TrainConfig(steps=1, moments=workload.moments, grad_dtype=workload.grad_dtype, batches_at_once=at_once)
    processes, objective = SimulatedProcesses(count=workload.processes), _OBJECTIVES[workload.objective]
    placed = place(model, way=workload.memory, device="cpu", processes=processes, objective=objective)
    if workload.memory == "sharded":
        return sharded_runner(model, workload, train, objective, tracker)
    if workload.memory == "plain":
        alone = replace(placed, processes=ALONE)
        return Plain(alone, run_decoder, head_of(model), train)
    masks = [
        HeldMask(name, module, _packed(module.scores), torch.zeros((), dtype=module.scores.dtype))
        for name, module in masked_modules(model).items()
    ]
    if workload.memory == "in_place":
        optimizer = score_optimizer(score_groups(mask.module for mask in masks), train)
        in_place = InPlaceStates(placed, optimizer, masks=masks, copied=(), grad_dtype=grad_dtype(train))
        return InPlace(placed, run_decoder, head_of(model), in_place)
    mode, calls = placed.mode, LayerCalls(model, run_decoder)
    assert isinstance(mode, ResidentMode), "the other modes run the model's own forward"
    engine = mode.engine(placed, calls, head_of(model), masks, SimulatedMover(tracker), train)
    with tracker.host():
        for mask in masks:
            engine.states.optimizer.tensors(mask.module.scores)
    return engine


def _known_number_aside(workload: Workload) -> AbstractContextManager[Any]:
    """Flip masks by plain PyTorch, which takes the most memory, with a given number of dropped weights.

    Fake masks cannot tell that number.
    """
    share = 1 - workload.keep_ratio

    def run(held: MaskedInPlace, function: str) -> Callable:
        if function == "put_aside":
            return lambda weight, packed, before: weight.new_empty(math.ceil(share * weight.numel()))
        return getattr(reference, function)

    return patch.object(MaskedInPlace, "_run", run)


def _packed(scores: Tensor) -> Tensor:
    *rows, columns = scores.shape
    return torch.zeros(*rows, -(-columns // 32), dtype=torch.int32)


def main() -> None:
    """Print the estimate and the simulation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help=f"one of {', '.join(known_models())}")
    parser.add_argument("--layers", default="all", help="masked layers, such as 4-7")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--ways", default="plain,resident,layerwise")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--batches-at-once", type=int, help="micro-batches at once in layerwise; default: all")
    parser.add_argument("--scores", default="float32")
    parser.add_argument("--moments", default="float32")
    parser.add_argument("--steps", type=int, default=2, help="steps; plain makes its moments in the first")
    asked = parser.parse_args()
    config = known_config(asked.model)
    layers = None if asked.layers == "all" else tuple(parse_layers(asked.layers))
    step = f"{asked.accumulation} micro-batches of 1 x {asked.sequence} tokens"
    print(f"{asked.model}, layers {asked.layers}, {step}; peaks in GB = 1e9 bytes")
    print(f"{'way':10} {'estimate':>9} {'simulated':>9} {'host':>9} {'simulated':>9}")
    for way in asked.ways.split(","):
        workload = Workload(
            memory=way,
            layers=layers,
            sequence=asked.sequence,
            accumulation=asked.accumulation,
            batches_at_once=asked.batches_at_once,
            scores=asked.scores,
            moments=asked.moments,
        )
        expected = estimate(shape_from_config(config, asked.model), workload)
        found = simulate_step(config, workload, steps=asked.steps)
        peaks = (expected.device_peak, found.device_peak, expected.host_peak, found.host_peak)
        print(f"{way:10}", *(f"{peak / 1e9:9.3f}" for peak in peaks), f" in {expected.phase}")


if __name__ == "__main__":
    main()
