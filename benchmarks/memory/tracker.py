"""Peak memory without a GPU: follows every storage from its creation until it is freed, on device and host.

Works on real CPU tensors and under FakeTensorMode, where no storage is ever filled: LLaMA2-7B is simulated in a few
hundred megabytes. Not seen: fragmentation, and what an operator allocates and frees inside its own C++ or CUDA code.
Sizes are rounded up as CUDA's caching allocator rounds them.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: CUDA's caching allocator allocates multiples of it


class _Place:
    """The bytes in one memory now, and at its peak."""

    def __init__(self) -> None:
        self.total = self.peak = 0

    def add(self, nbytes: int) -> None:
        self.total += nbytes
        self.peak = max(self.peak, self.total)


class MemoryTracker(TorchDispatchMode):
    """Follows the storages that operators make while it is active, or that track() adds.

        with FakeTensorMode(), MemoryTracker() as tracker:  # it has to be entered after a FakeTensorMode
            build()(x)
        tracker.device_peak

    A view adds nothing. An in-place operator adds nothing unless it enlarges its storage. Sizes are bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places = {"device": _Place(), "host": _Place()}
        self._alive: dict[int, tuple[str, int]] = {}  # id of a storage -> (place, rounded bytes)
        self._place = "device"  # of what is made

    @property
    def device_peak(self) -> int:
        return self._places["device"].peak

    @property
    def host_peak(self) -> int:
        return self._places["host"].peak

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self._places["device"].total

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """Count what is made inside the context as on the host."""
        before, self._place = self._place, "host"
        try:
            yield
        finally:
            self._place = before

    def mark_host(self, tensor: Tensor) -> None:
        """Count the tensor's storage as on the host from now on."""
        self._move(tensor, "host")

    def mark_device(self, tensor: Tensor) -> None:
        """Count the tensor's storage as on the device from now on."""
        self._move(tensor, "device")

    def track(self, tensors: nn.Module | Iterable[Tensor]) -> None:
        """Add storages as if made now: they existed before, or no operator shows their creation."""
        if isinstance(tensors, nn.Module):
            tensors = [*tensors.parameters(), *tensors.buffers()]
        for tensor in tensors:
            self._see(tensor)

    def reset_peaks(self) -> None:
        """Forget the peaks, as torch.cuda.reset_peak_memory_stats does."""
        for place in self._places.values():
            place.peak = place.total

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:
            given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in made:
                key = id(tensor.untyped_storage())
                if key in self._alive or key not in given:  # a view of an untracked storage is not made here
                    self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), _rounded(storage.nbytes())
        if key not in self._alive:
            weakref.finalize(storage, self._forget, key).atexit = False
            self._hold(key, self._place, size)
        elif self._alive[key][1] != size:
            self._hold(key, self._forget(key), size)

    def _hold(self, key: int, place: str, size: int) -> None:
        self._alive[key] = place, size
        self._places[place].add(size)

    def _forget(self, key: int) -> str:
        """Count a storage no longer, and return its place."""
        place, size = self._alive.pop(key)
        self._places[place].add(-size)
        return place

    def _move(self, tensor: Tensor, place: str) -> None:
        self._see(tensor)
        key = id(tensor.untyped_storage())
        _, size = self._alive[key]
        self._forget(key)
        self._hold(key, place, size)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
