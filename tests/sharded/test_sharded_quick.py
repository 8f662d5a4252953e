"""memory: sharded on two processes, and on one, updates like masks in place; test_sharded_run.py has the rest."""

import torch
from ranks import in_processes
from tiny import make_rows, masked_llama

from mft.config import TrainConfig
from mft.engines.distributed import Processes
from mft.masks.convert import masked_modules
from mft.training.loop import train_masks


def trained(rank, way, count):
    """Return (losses, scores) of two steps with clipping, 8-bit moments aside."""
    model = masked_llama()
    train = TrainConfig(lr=1e-2, steps=2, batch_size=2, accumulation=2, seed=3, max_grad_norm=0.1)
    # A remembered row was computed in a batch with other rows, and may have other last bits.
    options = {"way": way, "processes": Processes(rank, count), "remember": False}
    reports = train_masks(model, make_rows(6), train, **options)
    return [report.loss for report in reports], {n: m.scores.detach() for n, m in masked_modules(model).items()}


def test_two_processes_and_one_give_the_update_of_masks_in_place(tmp_path):
    losses, scores = trained(0, "in_place", 1)
    for count in (1, 2):
        for found, its_scores in in_processes(trained, count, tmp_path / str(count), "sharded", count):
            assert found == losses
            assert all(torch.equal(its_scores[name], tensor) for name, tensor in scores.items())
