"""Processes forked from this one, which has everything imported: ranks as torchrun starts them."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_run import free_port


def in_processes(work, count, folder, *arguments):
    """Return [work(rank, *arguments)] of ``count`` processes that are joined by gloo and write into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def run(rank):
        dist.init_process_group("gloo")
        torch.save(work(rank, *arguments), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
        return 0

    ended = Ranks(folder, count, run).wait(600)
    assert not any(each.code for each in ended), "\n".join(each.output[-5000:] for each in ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def torchrun_variables(count: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for all of ``count`` ranks."""
    told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return told | {"GLOO_SOCKET_IFNAME": "lo"}


def refusal(call, kind=ValueError):
    """Return the message of the error that call must raise."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


class Ranks:
    """Children of this process that work as ranks, as if torchrun had started them.

    Args: directory: where they work and print, with the file pids. count: number of ranks. work: called with the rank
        in the child; returns its exit code.
    """

    def __init__(self, directory: Path, count: int, work: Callable[[int], int]) -> None:
        self.directory, self.count = directory, count
        told, self.pids = torchrun_variables(count), []
        for rank in range(count):
            pid = os.fork()
            if not pid:
                self._be(rank, told | {"RANK": str(rank)}, work)
            self.pids.append(pid)
        (directory / "pids").write_text(json.dumps(self.pids))

    def _be(self, rank: int, told: dict[str, str], work: Callable[[int], int]) -> None:
        code = 1
        try:
            os.environ |= told
            os.chdir(self.directory)
            output = os.open(f"output of {rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            # The child must not write to pytest's streams.
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            torch.set_num_threads(1)
            code = work(rank)
        except BaseException:  # noqa: BLE001  (the child must end here)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 120.0) -> "list[Ended]":
        """Return how each rank ended. Raises: TimeoutError after ``seconds``; all are then killed."""
        left, found = dict(enumerate(self.pids)), {}
        until = time.monotonic() + seconds
        while left:
            late = time.monotonic() > until
            for rank, pid in list(left.items()):
                if late:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
                if ended:
                    del left[rank]
                    found[rank] = Ended(os.waitstatus_to_exitcode(status), self._output_of(rank), time.time())
            if late:
                raise TimeoutError(f"ranks did not end within {seconds:g} seconds: {found}")
            time.sleep(0.02)
        return [found[rank] for rank in range(self.count)]

    def _output_of(self, rank: int) -> str:
        return (self.directory / f"output of {rank}").read_text()


@dataclass(frozen=True)
class Ended:
    """How a rank ended. code: the exit code, or minus the signal. when: time.time()."""

    code: int
    output: str
    when: float

    @property
    def error(self) -> str:
        """Return the last error that mft printed."""
        said = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return said[-1] if said else self.output[-2000:]
