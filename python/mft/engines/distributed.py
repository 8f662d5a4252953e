"""Training on several processes: each takes its share of a step's micro-batches, and gradients are summed once a step.

    step of 4 micro-batches    process 0: 0, 2      process 1: 1, 3
    then on both               the sum of the gradients -> the same optimiser step -> the same scores

The processes are torch.distributed's, as torchrun starts them: gloo between CPUs; nccl between GPUs, one a process.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mft.config import TrainConfig
from mft.engines.randomness import draws_at_random


@dataclass(frozen=True)
class Processes:
    """Those that train together, and which of them this one is. All call what sends, in the same order."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"  # of what is sent

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def check(self, train: TrainConfig, way: str) -> None:
        """Raise ValueError unless so many processes can train so; one alone always can."""
        if self.count == 1:
            return
        if way != "plain":
            raise ValueError(
                f"memory must be plain (or auto) on several processes, got {way} on {self.count}: only plain sums its "
                "gradients over processes; set memory=plain, or start one process"
            )
        if train.accumulation < self.count:
            raise ValueError(
                f"train.accumulation must be at least {self.count}, the number of processes, as each takes whole "
                f"micro-batches of a step; got {train.accumulation}: set train.accumulation={self.count}, and "
                f"train.batch_size so that a step keeps its {train.batch_size * train.accumulation} rows"
            )

    def check_model(self, model: nn.Module, few: Tensor) -> None:
        """Raise ValueError unless each process computes of a row what one alone does; few: tokens to try it on."""
        if self.count > 1 and draws_at_random(model, few):
            raise ValueError(
                "model must have no dropout, nor draw at random otherwise, on several processes, got "
                f"{type(model).__name__} on {self.count}: each would draw otherwise than one process does; set the "
                "dropout of the model's configuration to 0"
            )

    def share(self, micro_batches: list[list[int]]) -> list[list[int]]:
        """Those that this process runs; counts may differ by one."""
        return micro_batches[self.rank :: self.count]

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each .grad becomes the sum over all processes; it stays None where it is None on all of them."""
        if self.count == 1:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        dist.all_reduce(present)
        for p, anywhere in zip(parameters, present.tolist()):
            if anywhere:
                own = torch.zeros_like(p) if p.grad is None else p.grad
                total = (own.float() if own.dtype.itemsize == 2 else own).contiguous()  # 16 bits are rounded once
                dist.all_reduce(total)
                p.grad = total.to(own.dtype)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in fp64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """Of all processes' values."""
        if self.count == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; small ones, such as settings."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, on all, unless all have the same facts."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            differ = [
                f"{key} is {other.get(key)} in process {rank}, {value} in process 0"
                for key, value in first.items()
                if other.get(key) != value
            ]
            if differ:
                raise ValueError(
                    f"every process must have the same configuration, data and scores, but {'; '.join(differ[:3])}"
                    ": start all with one command, on the same files and machines of one kind"
                )

    def agree_on(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError, on all, unless all hold tensors of the same bits, as far as a hash tells."""
        if self.count > 1:
            hashes = {name: torch.hash_tensor(tensor.detach()).view(torch.int64) for name, tensor in tensors.items()}
            self.agree({f"the hash of {name}": int(value) for name, value in hashes.items()})


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run: as many as torchrun started (WORLD_SIZE), else this one alone.

    Of the others than the first, standard output is not shown.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    processes = Processes(dist.get_rank(), dist.get_world_size(), device)
    with contextlib.ExitStack() as silence:
        if not processes.first:
            nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
        yield processes
    dist.destroy_process_group()  # not after an error: it could wait for others, who wait for this one
