"""Run the same work in several gloo processes forked from this one, and collect what each found."""

import os
from pathlib import Path

import torch
import torch.distributed as dist


def in_processes(work, count, folder, *arguments):
    """Return [work(rank, *arguments)] of ``count`` processes that meet in ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Forked processes have everything imported.
    torch.multiprocessing.start_processes(
        _run, (work, count, str(folder), arguments), nprocs=count, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank, work, count, folder, arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
