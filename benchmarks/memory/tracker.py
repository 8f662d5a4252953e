"""Peak memory without a GPU: follows every storage from its creation until it is freed, by kind, on device and host.

Works on real CPU tensors and under FakeTensorMode, where no storage is ever filled: LLaMA2-7B is simulated in a few
hundred megabytes. Not seen: fragmentation, and what an operator allocates and frees inside its own C++ or CUDA code.
Sizes are rounded up as CUDA's caching allocator rounds them.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: CUDA's caching allocator allocates multiples of it
OTHER = "other"


class _Place:
    """The contents of one memory now, and at its peak."""

    def __init__(self) -> None:
        self.current: Counter[str] = Counter()
        self.total = self.peak = 0
        self.breakdown: dict[str, int] = {}
        self.phase = ""

    def add(self, kind: str, nbytes: int, phase: str) -> None:
        self.current[kind] += nbytes
        self.total += nbytes
        if self.total > self.peak:
            self.peak, self.phase = self.total, phase
            self.breakdown = {name: size for name, size in self.current.items() if size}


class MemoryTracker(TorchDispatchMode):
    """Follows the storages that operators make while it is active, or that track() adds.

        with FakeTensorMode(), MemoryTracker() as tracker:  # it has to be entered after a FakeTensorMode
            with tracker.kind("weights"):
                model = build()
            with tracker.phase("forward"):
                loss = model(x)
        tracker.device_peak, tracker.device_breakdown, tracker.device_phase

    A view adds nothing. An in-place operator adds nothing unless it enlarges its storage. Sizes are bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places = {"device": _Place(), "host": _Place()}
        self._alive: dict[int, tuple[str, str, int]] = {}  # id of a storage -> (place, kind, rounded bytes)
        self._kind, self._place, self._phase = OTHER, "device", ""

    @property
    def device_peak(self) -> int:
        return self._places["device"].peak

    @property
    def host_peak(self) -> int:
        return self._places["host"].peak

    @property
    def device_breakdown(self) -> dict[str, int]:
        """Bytes by kind at the device's peak."""
        return self._places["device"].breakdown

    @property
    def device_phase(self) -> str:
        """The phase of the device's peak."""
        return self._places["device"].phase

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self._places["device"].total

    @property
    def host_bytes(self) -> int:
        return self._places["host"].total

    def kind(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Give this kind to what is made inside the context."""
        return self._set("_kind", name)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Report a peak inside the context as this phase's."""
        return self._set("_phase", name)

    def host(self) -> contextlib.AbstractContextManager[None]:
        """Count what is made inside the context as on the host."""
        return self._set("_place", "host")

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
            place.peak = 0
            place.add(OTHER, 0, self._phase)

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
            self._hold(key, self._place, self._kind, size)
        elif self._alive[key][2] != size:
            place, kind, _ = self._alive[key]
            self._forget(key)
            self._hold(key, place, kind, size)

    def _hold(self, key: int, place: str, kind: str, size: int) -> None:
        self._alive[key] = (place, kind, size)
        self._places[place].add(kind, size, self._phase)

    def _forget(self, key: int) -> None:
        place, kind, size = self._alive.pop(key)
        self._places[place].add(kind, -size, self._phase)

    def _move(self, tensor: Tensor, place: str) -> None:
        self._see(tensor)
        key = id(tensor.untyped_storage())
        _, kind, size = self._alive[key]
        self._forget(key)
        self._hold(key, place, kind, size)

    @contextlib.contextmanager
    def _set(self, attribute: str, value: str) -> Iterator[None]:
        before = getattr(self, attribute)
        setattr(self, attribute, value)
        try:
            yield
        finally:
            setattr(self, attribute, before)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
