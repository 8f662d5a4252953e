"""Our optimisers under the Trainer: its rate, our master weights, our clipping."""

import torch
from torch import nn

from mft.config import TrainConfig
from mft.engines.plain import make_stepper
from mft.rewards.optimizer import SteppedOptimizer, make_scheduler


def test_weights_of_16_bits_step_on_clipped_gradients_of_their_masters_at_the_schedules_rate():
    model, train = nn.Linear(8, 8, bias=False).bfloat16(), TrainConfig(lr=0.5, steps=4, max_grad_norm=0.1)
    seen, calls = [], []
    with make_stepper(model, train) as stepper:
        before = stepper.masters[0].clone()
        optimizer = SteppedOptimizer(stepper, train, lambda: calls.append(stepper.masters[0].grad.norm().item()))
        stepper.optimizer.register_step_pre_hook(
            lambda inner, *_: seen.append((inner.param_groups[0]["lr"], stepper.masters[0].grad.norm().item()))
        )
        scheduler = make_scheduler(optimizer, train)
        for _ in range(2):
            (model(torch.ones(1, 8, dtype=torch.bfloat16)) * 100).sum().backward()
            assert model.weight.grad is None  # the master weight has it
            optimizer.step()
            scheduler.step()
    assert [round(lr, 6) for lr, _ in seen] == [0.5, 0.375]
    assert max(norm for _, norm in seen) <= 0.1 + 1e-6
    assert min(calls) > 100
    assert stepper.masters[0].dtype == torch.float32
    assert not torch.equal(stepper.masters[0], before)
    assert torch.equal(model.weight, stepper.masters[0].bfloat16())
