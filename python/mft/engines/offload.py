"""Copy tensors between host memory and the device ahead of the work that needs them.

    main stream   | layer 3 ......... | layer 4 ......... |
    copy stream   | weights of 4, boundary of 3 to host   |

All copies run in one stream, in the order in which they were asked for, so a tensor that is stored and then fetched
again needs no further ordering. The host queues work far ahead of the device. Therefore a tensor that leaves the device
is kept until the main stream has been told to wait for its copy. Only one such tensor exists at a time, so queued work
holds no more memory than running work. If device and host share one memory, nothing is copied.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from mft_kernels.internal import empty_locked, page_locked


@dataclass(frozen=True)
class Arrival:
    """Tensors on their way to the device."""

    tensors: list[Tensor]
    event: torch.cuda.Event | None

    def wait(self) -> list[Tensor]:
        """Return the tensors, for work that is queued from now on. The host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream(self.tensors[0].device).wait_event(self.event)
        return self.tensors


class Mover:
    """Copies to and from ``device``.

    separate: whether tensors at rest are in another memory than the device's. None: True unless the device is the CPU.
    True on a CPU copies as on a GPU, for tests and for the simulation of memory.
    """

    def __init__(self, device: torch.device | str, *, separate: bool | None = None) -> None:
        self.device = torch.device(device)
        self.separate = self.device.type != "cpu" if separate is None else separate
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" and self.separate else None
        self._free: dict[tuple, list[Tensor]] = {}  # host buffers that may be written again
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None

    def bring(self, tensors: Sequence[Tensor]) -> Arrival:
        """Copy host tensors to the device; if nothing has to be copied, return the tensors themselves."""
        if not self.separate or not tensors:
            return Arrival(list(tensors), None)
        copies = [torch.empty_like(t, device=self.device) for t in tensors]
        with self._copying():
            for copy, tensor in zip(copies, tensors):
                copy.copy_(tensor, non_blocking=True)
            return Arrival(copies, self._stream.record_event() if self._stream else None)

    def bring_each(self, resting: Iterable[Sequence[Tensor]], most: float = math.inf) -> Iterator[list[Tensor]]:
        """Yield the tensors of each list on the device, while those of the next list are being copied.

        A list of more than ``most`` bytes is copied only when the one before it has left the device.
        """
        ahead: Arrival | None = None
        for tensors in resting:
            if ahead is None:
                ahead = self.bring(tensors)
                continue
            arrived = ahead.wait()
            ahead = self.bring(tensors) if sum(tensor.nbytes for tensor in tensors) <= most else None
            yield arrived
            del arrived  # free these before the next ones are asked for
            ahead = ahead or self.bring(tensors)
        if ahead is not None:
            yield ahead.wait()

    def store(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy a tensor from the device to host memory: to ``out``, or to a buffer that give_back() takes."""
        if not self.separate:
            if out is not None and out is not tensor and out.data_ptr() != tensor.data_ptr():
                out.copy_(tensor)
            return tensor if out is None else out
        out = self._buffer(tensor) if out is None else out
        self.let_go()
        with self._copying():
            out.copy_(tensor, non_blocking=True)
            if self._stream:
                self._leaving = tensor, self._stream.record_event()
        return out

    def let_go(self) -> None:
        """Let work that is queued from now on use the memory of the tensor stored last."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[1])
            self._leaving = None

    def give_back(self, buffer: Tensor) -> None:
        """Let a later store() write to the host buffer of an earlier one."""
        if self.separate:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def rest(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` in pinned memory, so that copies overlap with work; itself if nothing is copied."""
        if self.device.type != "cuda" or not self.separate:
            return tensor
        return page_locked(tensor)

    def finish(self) -> None:
        """Wait until every copy is done. The host must call this before it reads what was stored."""
        if self._stream:
            self._stream.synchronize()

    def host(self) -> AbstractContextManager:
        """Return a context for allocations of host memory; a simulation overrides it to count them separately."""
        return contextlib.nullcontext()

    def _buffer(self, like: Tensor) -> Tensor:
        free = self._free.get((like.shape, like.dtype))
        if free:
            return free.pop()
        with self.host():
            return (empty_locked if self._stream else torch.empty)(like.shape, dtype=like.dtype)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Enter the copy stream, after all work that is queued so far: freed memory must not be written earlier."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
