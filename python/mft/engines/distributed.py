"""Training on several processes: each runs its share of a step's micro-batches; gradients are summed once per step.

    step of 4 micro-batches    process 0: 0, 2      process 1: 1, 3
    then on both               the sum of the gradients -> the same optimiser step -> the same scores

The memory mode layerwise sums a layer's gradients just before it updates that layer's scores. The other modes sum the
gradients of all layers at the end. With sharded (sharded.py) each process holds some rows of every tensor.

torchrun starts the processes for torch.distributed: gloo between CPUs, nccl between GPUs, with one GPU per process.
"""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mft.config import TrainConfig
from mft.engines.failures import Failures, OtherFailed
from mft.engines.randomness import draws_at_random
from mft_kernels import __version__

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, and the rank of this one. All must communicate in the same order."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"  # of the tensors that are sent

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the console output."""
        return self.rank == 0

    def check(self, train: TrainConfig) -> None:
        """Raise ValueError if this number of processes cannot train with these settings. One process always can."""
        if train.accumulation < self.count:
            raise ValueError(
                f"train.accumulation must be at least {self.count}, the number of processes, as each takes whole "
                f"micro-batches of a step; got {train.accumulation}: set train.accumulation={self.count}, and "
                f"train.batch_size so that a step keeps its {train.batch_size * train.accumulation} rows"
            )

    def check_model(self, model: nn.Module, sample: Tensor) -> None:
        """Raise ValueError if a row's result could depend on which process computes it; sample: see Mode.place."""
        if self.count > 1 and draws_at_random(model, sample):
            raise ValueError(
                "model must have no dropout, and use no other random numbers, on several processes, got "
                f"{type(model).__name__} on {self.count}: each process would draw other numbers than a single "
                "process does; set the dropout of the model's configuration to 0"
            )

    def share(self, micro_batches: list[T]) -> list[T]:
        """Return the micro-batches that this process runs; the counts of two processes may differ by one."""
        return micro_batches[self.rank :: self.count]

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each .grad by its sum over all processes. It stays None if it is None on all of them."""
        if self.count == 1:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        dist.all_reduce(present)
        buffers = []
        for p, anywhere in zip(parameters, present.tolist()):
            if anywhere:
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad).contiguous()
                buffers.append(p.grad)
        for _ in self.summed(buffers):
            pass

    def summed(self, buffers: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield each buffer once it is summed over all processes (16 bits in fp32); the next one is on its way."""
        if self.count == 1 or not buffers:
            yield from buffers
            return
        finish: Callable[[], Tensor] | None = self._begin_sum(buffers[0])
        for following in (*buffers[1:], None):
            assert finish is not None
            done, finish = finish(), None  # free the fp32 copy before the next one is made
            finish = None if following is None else self._begin_sum(following)
            yield done

    def _begin_sum(self, buffer: Tensor) -> Callable[[], Tensor]:
        """Start the sum; return a function that waits for it, writes it into buffer and returns buffer."""
        total = buffer.float() if buffer.dtype.itemsize == 2 else buffer
        work = self._add_up(total)

        def finish() -> Tensor:
            work.wait()
            return buffer if total is buffer else buffer.copy_(total)

        return finish

    def _add_up(self, total: Tensor) -> dist.Work:
        work = dist.all_reduce(total, async_op=True)
        assert work is not None, "this process is one of those that are summed"
        return work

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without communication: if it fails in one process, it fails in all, so that none waits forever.

        Raises: the block's error in the process that failed; OtherFailed, with its message and rank, in the others.
        """
        try:
            yield
        except Exception as error:  # not KeyboardInterrupt, which leaves at once
            self._tell(f"{type(error).__name__}: {error}")
            raise
        self._tell(None)

    def _tell(self, failure: str | None) -> None:
        """Tell the others how this process failed, or that it did not. Raises: OtherFailed if only others failed."""
        if self.largest(int(failure is not None)):
            told = self.gather(failure)
            if failure is None:
                rank, words = next((rank, words) for rank, words in enumerate(told) if words is not None)
                raise OtherFailed([rank], len(told), words)

    def all_rows(self, rows: Tensor, count: int) -> Tensor:
        """Gather the whole tensor of count rows. Each process has ceil(count / processes) rows; the last ones fewer."""
        if self.count == 1:
            return rows
        most = -(-count // self.count)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = padded.new_empty(most * self.count, *rows.shape[1:])
        # As bytes: gloo does not send int16.
        dist.all_gather(list(whole.view(torch.uint8).chunk(self.count)), padded.view(torch.uint8))
        return whole[:count]

    def rows_on_first(self, rows: Tensor, count: int) -> Tensor | None:
        """Gather the whole tensor, as all_rows does, on the first process only; None on the others."""
        if self.count == 1:
            return rows
        most = -(-count // self.count)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = padded.new_empty(most * self.count, *rows.shape[1:]) if self.first else None
        parts = None if whole is None else list(whole.view(torch.uint8).chunk(self.count))
        dist.gather(padded.view(torch.uint8), parts)
        return None if whole is None else whole[:count]

    def broadcast_first(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the first process's tensor, of this shape and dtype, on all of them."""
        if self.count == 1:
            assert tensor is not None, "this process is the first one"
            return tensor
        there = torch.empty(shape, dtype=dtype, device=self.device)
        if self.first:
            assert tensor is not None, "the first process sends it"
            there.copy_(tensor)
        dist.broadcast(there.view(torch.uint8), 0)
        return there

    def add_up(self, counts: Tensor) -> None:
        """Replace counts by their sums over the processes, in place."""
        if self.count > 1:
            there = counts.to(self.device)
            dist.all_reduce(there)
            counts.copy_(there)

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over the processes, in fp64."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """Return the largest value of all processes."""
        if self.count == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.largest(0)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank. For small values, such as settings."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError in all processes if their facts differ."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            differ = [
                f"{key} is {other.get(key)} in process {rank}, {first.get(key)} in process 0"
                for key in first | other
                if other.get(key) != first.get(key)
            ]
            if differ:
                raise ValueError(
                    f"every process must have the same versions, configuration, data and scores, but "
                    f"{'; '.join(differ[:3])}: start all with one command, on the same files and machines of one kind"
                )

    def agree_on(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError in all processes if their tensors differ in a bit; hashes are compared."""
        if self.count > 1:
            hashes = {name: torch.hash_tensor(tensor.detach()).view(torch.int64) for name, tensor in tensors.items()}
            self.agree({f"the hash of {name}": int(value) for name, value in hashes.items()})


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes of this run: as many as torchrun started (WORLD_SIZE), or this one alone; all leave together.

    Raises: what the block raises; OtherFailed if the block failed because another process did.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "mft train must not be started with DeepSpeed's configuration, got ACCELERATE_USE_DEEPSPEED=true: start it "
            "by torchrun with memory=sharded, which spreads the model by FSDP2"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(_own_gpu())
    store, rank, count = next(dist.rendezvous("env://"))
    # torchrun --max-restarts keeps the store, and so the addresses of processes that have ended (pytorch#135712).
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=count)
    processes = Processes(rank, count, device)
    failures = Failures(store, rank, count)
    try:
        with contextlib.ExitStack() as silence:
            if not processes.first:
                nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
            processes.agree(_software())
            yield processes
        processes.wait()  # until the first process has written the result
    except BaseException as error:
        failures.report(error)
        raise
    failures.close()
    processes.wait()  # one process holds the store, which others may still read
    dist.destroy_process_group()  # not after an error: it could wait for processes that wait for this one


def _software() -> dict[str, str]:
    """Return the software versions and settings that decide the computed bits and may differ between machines."""
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "mft_kernels": __version__}
    versions["transformers"] = importlib.metadata.version("transformers")
    found = {f"the version of {name}": version for name, version in versions.items()}
    return found | {"MFT_KERNELS": os.environ.get("MFT_KERNELS", "not set")}


def _own_gpu() -> int:
    """Return the number of this process's GPU: its local rank on its machine."""
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ValueError(
            f"--nproc-per-node must be at most {count}, the GPUs of this machine, as each process takes one of its "
            f"own; got a process with LOCAL_RANK={place}"
        )
    return place
