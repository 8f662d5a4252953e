"""The weights that a mask drops from one matrix: their places, and the base's values to restore them bit for bit."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mft.vllm.mask_flips import Places

Chosen = NDArray[np.bool_]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class Dropped:
    """The places, ascending in row-major order, and for each place a value in the weight's dtype."""

    places: Places
    values: Tensor

    def put_back(self, weight: Tensor) -> None:
        _write(weight, self.places, self.values)

    def drop(self, weight: Tensor) -> None:
        _write(weight, self.places, weight.new_zeros(1))

    def values_at(self, places: Places, weight: Tensor) -> Tensor:
        """Return the base's values at these places of a weight from which this mask's places are dropped."""
        at, inside = self._find(places)
        values = weight.view(-1)[_index(places)]
        values[torch.from_numpy(inside)] = self.values[torch.from_numpy(at[inside])]
        return values

    def flipped(self, flips: "Dropped") -> tuple["Dropped", Chosen]:
        """Return what is dropped after the bits at flips.places flip, and which of these places are then dropped."""
        at, inside = self._find(flips.places)
        stays = np.ones(len(self.places), np.bool_)
        stays[at[inside]] = False
        kept, came = self.places[stays], flips.places[~inside]
        new = np.zeros(len(kept) + len(came), np.bool_)
        new[np.searchsorted(kept, came) + np.arange(len(came))] = True
        places = np.empty(len(new), np.int32)
        places[new], places[~new] = came, kept
        values = torch.empty(len(new), dtype=self.values.dtype, device=self.values.device)
        values[torch.from_numpy(new)] = flips.values[torch.from_numpy(~inside)]
        values[torch.from_numpy(~new)] = self.values[torch.from_numpy(stays)]
        return Dropped(places, values), ~inside

    def _find(self, places: Places) -> tuple[NDArray[np.intp], Chosen]:
        """Return, for each of these places, its index in self.places (by order) and whether it is there."""
        at = np.searchsorted(self.places, places)
        inside = at < len(self.places)
        inside[inside] = self.places[at[inside]] == places[inside]
        return at, inside


def nothing_dropped(weight: Tensor) -> Dropped:
    return Dropped(np.empty(0, np.int32), weight.new_empty(0))


def _write(weight: Tensor, places: Places, values: Tensor) -> None:
    """Write one value per place, or one value to all places: on a CPU with NumPy, on one thread.

    PyTorch's own assignment waits for several threads, on a busy processor for seconds.
    """
    if weight.is_cpu:
        _bits(weight)[places.astype(np.intp)] = _bits(values)
    else:
        weight.view(-1)[_index(places).to(weight.device)] = values


def _bits(tensor: Tensor) -> NDArray[np.generic]:
    """Return the bits of a tensor on the CPU, flat, in the same memory."""
    return tensor.view(-1).view(_INTEGERS[tensor.element_size()]).numpy()


def _index(places: Places) -> Tensor:
    return torch.from_numpy(places.astype(np.int64))  # on one thread, unlike long()
