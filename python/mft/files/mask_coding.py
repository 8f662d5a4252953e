"""The codings of a mask in an export: what tensor of a file each makes of a packed mask, and the mask of that tensor.

packed     int32 (..., N, ceil(K / 32)): the packed mask as it is, 1 bit per weight
rice       uint8 (bytes,): a stream of files/rice.py, experts' rows after each other
by_weight  uint8 (bytes,): a stream of files/by_weight.py, which only the weight's owner can read
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mft.files import by_weight, rice
from mft.files.rice import Bytes, Words

Shape = tuple[int, ...]


class MaskCoding(ABC):
    """One way. version: the first of the export's format that has it. needs_weight: whether both sides need the weight.

    In all methods shape is the weight's, (N, K), or of experts (E, N, K).
    """

    version: int
    needs_weight = False

    @abstractmethod
    def store(self, packed: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        """The tensor of a file."""

    @abstractmethod
    def restore(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        """The packed mask. stored: of a stranger, but check_declared passed. Raises: ValueError if it is damaged."""

    @abstractmethod
    def check_declared(self, key: str, dtype: str, stored: Shape, shape: Shape) -> None:
        """Raise ValueError unless a tensor of this dtype and shape may be a mask. key: its place, for the message."""

    @abstractmethod
    def most_bytes(self, shape: Shape) -> int:
        """Of such a tensor."""


class _Packed(MaskCoding):
    version = 2

    def store(self, packed: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        return packed

    def restore(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        return stored

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

    def restore(self, stored: Tensor, shape: Shape, weight: Tensor | None) -> Tensor:
        words = self._decode(stored.numpy(), *_matrix(shape), weight)
        return torch.from_numpy(words.view(np.int32)).view(_packed_shape(shape))

    def check_declared(self, key: str, dtype: str, stored: Shape, shape: Shape) -> None:
        if dtype != "U8" or len(stored) != 1:
            raise ValueError(f"{key} must be uint8 (bytes,) as its coding says, got {dtype} {stored}")
        try:
            self._check_length(stored[0], *_matrix(shape))
        except ValueError as error:
            raise damaged(key, error) from None

    def most_bytes(self, shape: Shape) -> int:
        return rice.most_bytes(*_matrix(shape))

    def _encode(self, words: Words, columns: int, weight: Tensor | None) -> bytes:
        return rice.encode(words, columns)

    def _decode(self, stream: Bytes, rows: int, columns: int, weight: Tensor | None) -> Words:
        return rice.decode(stream, rows, columns)

    def _check_length(self, length: int, rows: int, columns: int) -> None:
        rice.check_length(length, rows, columns)


class _ByWeight(_Rice):
    version = 4
    needs_weight = True

    def most_bytes(self, shape: Shape) -> int:
        return by_weight.most_bytes(*_matrix(shape))

    def _encode(self, words: Words, columns: int, weight: Tensor | None) -> bytes:
        assert weight is not None, "who writes has asked for it"
        return by_weight.encode(words, columns, weight)

    def _decode(self, stream: Bytes, rows: int, columns: int, weight: Tensor | None) -> Words:
        assert weight is not None, "who reads has asked for it"
        return by_weight.decode(stream, rows, columns, weight)

    def _check_length(self, length: int, rows: int, columns: int) -> None:
        by_weight.check_length(length, rows, columns)


BY_NAME: dict[str, MaskCoding] = {"packed": _Packed(), "rice": _Rice(), "by_weight": _ByWeight()}  # config.CODINGS


def of_version(version: int) -> list[str]:
    """The codings that an export of this format_version may name; a version without the key has but one."""
    return [name for name, coding in BY_NAME.items() if coding.version == max(version, BY_NAME["packed"].version)]


def damaged(key: str, error: ValueError) -> ValueError:
    """What is wrong with a stream, with its place."""
    return ValueError(f"{key}: {error}: damaged; copy the export again")


def coded_size(mask: Tensor, weight: Tensor | None = None) -> int:
    """Bytes that a boolean mask (N, K), or of experts (E, N, K), takes in an export, its name apart.

    Of coding rice; or, if the weight is given that it masks, of coding by_weight.
    """
    if weight is None:
        return len(coded_mask(mask))
    bits = _bits(mask)
    return len(by_weight.encode(rice.words_of(bits), bits.shape[1], weight))


def coded_mask(mask: Tensor) -> bytes:
    """A boolean mask (N, K), or of experts (E, N, K), as an export of coding rice has it."""
    bits = _bits(mask)
    return rice.encode(rice.words_of(bits), bits.shape[1])


def decoded_mask(stream: bytes, shape: tuple[int, int]) -> Tensor:
    """The mask (N, K) of what coded_mask gave. Raises: ValueError if no mask of this shape has it."""
    words = rice.decode(np.frombuffer(stream, np.uint8), *shape)
    return torch.from_numpy(rice.bits_of(words, shape[1]).copy())


# ---------------------------------------------------------------------------------------------- private


def _bits(mask: Tensor) -> NDArray[np.bool_]:
    return mask.detach().to("cpu", torch.bool).flatten(0, -2).numpy()


def _packed_shape(shape: Shape) -> Shape:
    return *shape[:-1], -(-shape[-1] // 32)


def _matrix(shape: Shape) -> tuple[int, int]:
    """Rows, of all experts together, and columns."""
    return math.prod(shape[:-1]), shape[-1]
