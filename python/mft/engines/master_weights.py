"""AdamW on fp32 masters of 16-bit weights: no update is lost to rounding.

A step of 1e-5 on a bf16 weight of 0.1 (spacing 5e-4) rounds away. The model computes in 16 bits. Gradients of
micro-batches are summed in fp32, AdamW updates the fp32 master, and the model gets its rounded copy. In the demo's
full fine-tune (rate 1e-4, 24 steps), AdamW on the bf16 weights themselves moves only 13 % of them; the validation loss
is then 2.308 instead of 2.241. fp32 parameters (scores among them) are their own masters.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mft.config import TrainConfig

_BLOCK = 1 << 20  # elements added at once


class MasterAdamW:
    """AdamW over parameters of any float dtype. Use it as a context, which installs hooks on the gradients.

    Memory in addition to the model, per trained weight: 12 bytes for fp32 parameters, 16 bytes for 16-bit ones.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], train: TrainConfig) -> None:
        self.parameters: list[Tensor] = list(parameters)
        if not self.parameters:
            raise ValueError("the model must have a trainable parameter, all are frozen: mask it or unfreeze layers")
        self.masters: list[Tensor] = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
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
        """Scale the gradients down to max_norm; return their norm before that."""
        return nn.utils.clip_grad_norm_(self.masters, max_norm)

    @torch.no_grad()
    @record_function("MasterAdamW.step")
    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.copy_masters()

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Write the rounded masters into the model."""
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
    """Compute total += grad in blocks, because on a CPU torch first makes an fp32 copy of a 16-bit operand.

    For a tied head's gradient (49,152 x 576) this takes 6 ms instead of 38 ms (2 Zen 4 cores, torch 2.13).
    """
    if not (total.is_contiguous() and grad.is_contiguous()):
        total.add_(grad)
        return
    for part, added in zip(total.view(-1).split(_BLOCK), grad.view(-1).split(_BLOCK)):
        part.add_(added)
