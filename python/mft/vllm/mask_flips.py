"""Code the change between two masks of a model in few bytes: the bits that flip, by their gaps (files/rice.py)."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mft.files import rice
from mft.files.rice import Words

Places = NDArray[np.int32]  # ascending positions in a weight (N, K), row by row
Shape = tuple[int, int]


@dataclass(frozen=True)
class Flips:
    """One step of a task's masks.

    step: the number of steps before this one. dropped: weights that all masks together drop after it. streams: by
    layer, if its mask changes. Only step 0 has base_hash and the shapes and dtypes of all masked layers.
    """

    step: int
    dropped: int
    streams: dict[str, bytes]
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    base_hash: str | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of all streams."""
        return sum(map(len, self.streams.values()))

    def message(self, *, text: bool) -> dict[str, Any]:
        """Return the flips as plain values. text: encode the streams in base64, for JSON."""
        streams = {name: base64.b64encode(s).decode() if text else s for name, s in self.streams.items()}
        said = {"step": self.step, "dropped": self.dropped, "streams": streams}
        if self.step == 0:
            shapes = {name: list(shape) for name, shape in self.shapes.items()}
            said |= {"shapes": shapes, "dtypes": self.dtypes, "base_hash": self.base_hash}
        return said


def read_flips(message: Any) -> Flips:
    """Return the Flips from what message() returned. Raises: ValueError for anything else."""
    try:
        streams = {name: _bytes_of(stream) for name, stream in message["streams"].items()}
        shapes = {name: (int(rows), int(columns)) for name, (rows, columns) in message.get("shapes", {}).items()}
        return Flips(
            step=int(message["step"]),
            dropped=int(message["dropped"]),
            streams=streams,
            shapes=shapes,
            dtypes=dict(message.get("dtypes", {})),
            base_hash=message.get("base_hash"),
        )
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(
            f"flips must be what mft.vllm.MaskStream sends, got another message ({type(error).__name__}: {error})"
        ) from None


def flips_between(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> dict[str, bytes]:
    """Return the streams of all layers whose packed mask differs. A layer missing from before kept everything."""
    streams = {}
    for name, packed in after.items():
        words = words_of_mask(packed)
        flipped = words ^ (words_of_mask(before[name]) if name in before else _all_kept(shapes[name]))
        if flipped.any():
            streams[name] = rice.encode(flipped, shapes[name][1])
    return streams


def flipped_places(name: str, stream: bytes, shape: Shape) -> Places:
    """Return the positions that a stream flips. Raises: ValueError if no mask of this shape has this stream."""
    try:
        words = rice.decode(np.frombuffer(stream, np.uint8), *shape)
        if shape[1] % 32 and (words[:, -1] >> shape[1] % 32).any():
            raise ValueError("it flips padding")
    except ValueError as error:
        raise ValueError(
            f"{name}: its flips must be a stream for a weight of {shape}, got one with a fault: {error}"
        ) from None
    return places_of(words, shape[1])


def dropped_places(packed: Tensor, shape: Shape) -> Places:
    """Return the positions that a packed mask drops."""
    return places_of(words_of_mask(packed) ^ _all_kept(shape), shape[1])


def mask_without(places: NDArray[np.integer], shape: Shape) -> Tensor:
    """The packed mask that drops these positions, in any order."""
    kept = np.ones(shape[0] * shape[1], np.bool_)
    kept[places] = False
    return torch.from_numpy(rice.words_of(kept.reshape(shape)).view(np.int32))


def words_of_mask(packed: Tensor) -> Words:
    """Return a packed mask (N, ceil(K / 32)) as the words that rice.encode takes."""
    return packed.detach().cpu().contiguous().numpy().view(np.uint32)


def places_of(words: Words, columns: int) -> Places:
    """Return the positions of a matrix's set bits. Only words with a set bit are unpacked."""
    rows, at = np.nonzero(words)
    found, bits = np.nonzero(
        np.unpackbits(words[rows, at].astype("<u4").view(np.uint8), bitorder="little").reshape(-1, 32)
    )
    return (rows[found] * columns + at[found] * 32 + bits).astype(np.int32)


def _all_kept(shape: Shape) -> Words:
    """Return the packed mask that keeps everything, with 0 in each row's padding."""
    row = rice.words_of(np.ones((1, shape[1]), np.bool_))
    return np.repeat(row, shape[0], axis=0)


def _bytes_of(stream: Any) -> bytes:
    return base64.b64decode(stream, validate=True) if isinstance(stream, str) else bytes(stream)
