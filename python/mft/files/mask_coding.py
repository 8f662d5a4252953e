"""The codings of a mask in an export: each turns a packed mask into a tensor of the file, and back.

packed     int32 (..., N, ceil(K / 32)): the packed mask as it is, 1 bit per weight
rice       uint8 (bytes,): a stream of files/rice.py; the experts' rows follow one another
by_weight  uint8 (bytes,): a stream of files/by_weight.py, which can be read only with the weight
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from mft.files import by_weight, rice
from mft.files.rice import Words

Shape = tuple[int, ...]


class MaskCoding(ABC):
    """One coding of a mask. version: the first format_version that has it. needs_weight: to write and to read.

    In all methods, shape is the weight's: (N, K), or (E, N, K) for experts.
    """

    version: int
    needs_weight = False

    @abstractmethod
    def store(self, packed: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        """Return the tensor that goes into the file."""

    @abstractmethod
    def pieces(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Iterator[Words]:
        """Return an iterator over the flattened words. Raises: ValueError, also while it is iterated, if damaged."""

    @abstractmethod
    def check_declared(self, key: str, dtype: str, stored: Shape, shape: Shape) -> None:
        """Raise ValueError unless a tensor of this dtype and shape can be a mask. key: its name, for the message."""

    @abstractmethod
    def most_bytes(self, shape: Shape) -> int:
        """Return the largest number of bytes of the stored tensor."""


class _Packed(MaskCoding):
    version = 2

    def store(self, packed: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        return packed

    def pieces(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Iterator[Words]:
        words = stored.numpy().view(np.uint32).reshape(-1)
        return (words[begin : begin + rice.BLOCK] for begin in range(0, len(words), rice.BLOCK))

    def check_declared(self, key: str, dtype: str, stored: Shape, shape: Shape) -> None:
        expected = _packed_shape(shape)
        if dtype != "I32" or stored != expected:
            raise ValueError(f"{key} must be int32 {expected} for a weight of {shape}, got {dtype} {stored}")

    def most_bytes(self, shape: Shape) -> int:
        return 4 * math.prod(_packed_shape(shape))


class _Rice(MaskCoding):
    version = 3

    def store(self, packed: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        words = packed.numpy().view(np.uint32).reshape(-1, packed.shape[-1])
        return torch.frombuffer(bytearray(self._encode(words, shape[-1], weight)), dtype=torch.uint8)

    def pieces(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Iterator[Words]:
        return rice.decoded_blocks(stored.numpy(), *_matrix(shape))

    def check_declared(self, key: str, dtype: str, stored: Shape, shape: Shape) -> None:
        if dtype != "U8" or len(stored) != 1:
            raise ValueError(f"{key} must be uint8 (bytes,) as its coding says, got {dtype} {stored}")
        try:
            self._check_length(stored[0], *_matrix(shape))
        except ValueError as error:
            raise damage_error(key, error) from None

    def most_bytes(self, shape: Shape) -> int:
        return rice.most_bytes(*_matrix(shape))

    def _encode(self, words: Words, columns: int, weight: Tensor | None) -> bytes:
        return rice.encode(words, columns)

    def _check_length(self, length: int, rows: int, columns: int) -> None:
        rice.check_length(length, rows, columns)


class _ByWeight(_Rice):
    version = 4
    needs_weight = True

    def pieces(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Iterator[Words]:
        assert weight is not None, "who reads has asked for it"
        return iter((by_weight.decode(stored.numpy(), *_matrix(shape), weight).reshape(-1),))

    def most_bytes(self, shape: Shape) -> int:
        return by_weight.most_bytes(*_matrix(shape))

    def _encode(self, words: Words, columns: int, weight: Tensor | None) -> bytes:
        assert weight is not None, "who writes has asked for it"
        return by_weight.encode(words, columns, weight)

    def _check_length(self, length: int, rows: int, columns: int) -> None:
        by_weight.check_length(length, rows, columns)


BY_NAME: dict[str, MaskCoding] = {"packed": _Packed(), "rice": _Rice(), "by_weight": _ByWeight()}  # config.CODINGS


def codings_of(version: int) -> list[str]:
    """Return the codings that an export of this format_version may name. A version without the key has only packed."""
    return [name for name, coding in BY_NAME.items() if coding.version == max(version, BY_NAME["packed"].version)]


def packed_mask(pieces: Iterable[Words], shape: Shape) -> Tensor:
    """Return the packed mask of a weight of this shape whose flattened words come in pieces."""
    return torch.from_numpy(rice.join_pieces(pieces, *_matrix(shape)).view(np.int32)).view(_packed_shape(shape))


def damage_error(key: str, error: ValueError) -> ValueError:
    """Return an error that says what is wrong with a stream, and where."""
    return ValueError(f"{key}: {error}: damaged; copy the export again")


def coded_size(mask: Tensor, weight: Tensor | None = None) -> int:
    """Return the bytes of a mask (N, K) or (E, N, K) in an export: as by_weight if weight is given, else as rice."""
    words, columns = _words(mask)
    return len(rice.encode(words, columns) if weight is None else by_weight.encode(words, columns, weight))


def coded_mask(mask: Tensor) -> bytes:
    """Return a boolean mask, (N, K) or (E, N, K) for experts, as the stream that an export of coding rice has."""
    return rice.encode(*_words(mask))


def decoded_mask(stream: bytes, shape: tuple[int, int]) -> Tensor:
    """Return the mask (N, K) from a stream of coded_mask. Raises: ValueError if no mask of this shape has it."""
    words = rice.decode(np.frombuffer(stream, np.uint8), *shape)
    return torch.from_numpy(rice.bits_of(words, shape[1]).copy())


# ---------------------------------------------------------------------------------------------- private


def _words(mask: Tensor) -> tuple[Words, int]:
    """Return (words of all rows, columns) of a boolean mask."""
    return rice.words_of(mask.detach().to("cpu", torch.bool).flatten(0, -2).numpy()), mask.shape[-1]


def _packed_shape(shape: Shape) -> Shape:
    return *shape[:-1], -(-shape[-1] // 32)


def _matrix(shape: Shape) -> tuple[int, int]:
    """Return (rows of all experts together, columns)."""
    return math.prod(shape[:-1]), shape[-1]
