"""A model shared by processes. `start(model, count, **changes)` begins memory: sharded as the first of count processes.

`as_deepspeed(model)` marks a parameter as ZeRO-3 marks parameters that it has partitioned.
"""

import torch
from tiny import make_llama, make_rows, masked_llama

from mft.config import MaskConfig, TrainConfig
from mft.engines.distributed import Processes, joined
from mft.engines.mode import place
from mft.engines.sharded.model import spread
from mft.masks.convert import mask_model
from mft.masks.quantize import quantize_model
from mft.memory.workload import Workload
from mft.objectives.kl import KL
from mft.training.loop import train_masks
from mft_kernels import MaskAdamW

FEW = torch.ones(1, 4, dtype=torch.int64)


def start(model, count=2, objective=None, **changes):
    options = {} if objective is None else {"objective": objective}
    placed = place(model, way="sharded", device="cpu", processes=Processes(0, count), **options)
    return placed.start(FEW, TrainConfig(**{"steps": 1} | changes))


def start_plain(model, **changes):
    return place(model).start(FEW, TrainConfig(steps=1, **changes))


def as_deepspeed(model):
    next(model.parameters()).ds_id = 0
    return model


def hooked(model):
    model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *_: None)
    return model


TABLE = """
micro-batches that the processes cannot share evenly
    start(masked_llama(), accumulation=3)
    -> ValueError: train.accumulation | must be a multiple of 2, the number of processes, with memory: sharded | 3

sums of gradients in each micro-batch, in another way
    start_plain(masked_llama(), reduce_every="micro_batch")
    -> ValueError: train.reduce_every | must be step with memory: plain | micro_batch

an objective that runs the base
    start(masked_llama(), accumulation=2, objective=KL())
    -> ValueError: objective.name | must be one that does not run the base, with memory: sharded | kl

more processes than a layer has rows
    spread(masked_llama(), FEW, torch.device("cpu"), Processes(0, 17))
    -> ValueError: memory: sharded | takes at most as many processes as each masked layer has rows
        | got 17 processes and 16 rows in model.layers.2.self_attn.k_proj | start fewer processes

a quantised base
    spread(quantize_model(masked_llama(), "nf4"), FEW, torch.device("cpu"), Processes(0, 2))
    -> ValueError: the base | must be exact with memory: sharded | layers that are quantised | set memory: quantized

a quantised base, in what is estimated
    Workload(memory="sharded", quantization="nf4")
    -> ValueError: memory | be quantized, layerwise or auto over a quantised base | sharded

a layer with a hook of its own
    spread(hooked(masked_llama()), FEW, torch.device("cpu"), Processes(0, 2))
    -> ValueError: model.layers.2.self_attn.q_proj | must have no hooks of its own
        | which an ordinary layer in its place would lose | add them while masks are in place

whole modules beside the scores
    model = mask_model(make_llama(), MaskConfig(modules_to_save=["lm_head"]))
    train_masks(model, make_rows(), TrainConfig(steps=1), way="sharded")
    -> ValueError: memory | must be plain to train modules_to_save | got sharded

a model that DeepSpeed's ZeRO-3 has partitioned
    mask_model(as_deepspeed(make_llama()), MaskConfig())
    -> ValueError: model | must not be DeepSpeed's | got a LlamaForCausalLM that its ZeRO-3 has partitioned
        | use FSDP2, by memory: sharded under torchrun, or by accelerate launch with fsdp_version: 2

its parameters in MaskAdamW
    MaskAdamW(as_deepspeed(make_llama()).parameters())
    -> ValueError: params | must not be partitioned by DeepSpeed | (61, 32) | use FSDP2

mft train under accelerate launch with DeepSpeed
    patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    joined().__enter__()
    -> ValueError: mft train | must not be started with DeepSpeed's configuration | got ACCELERATE_USE_DEEPSPEED=true
        | start it by torchrun with memory=sharded

one process, which torchrun did not start
    runner = start(masked_llama(), count=1)
    assert torch.distributed.get_world_size() == 1
    runner.close()
    assert not torch.distributed.is_initialized()
    -> accepted: a group of one, which ends with the run
"""
