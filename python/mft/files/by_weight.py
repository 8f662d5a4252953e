"""Matrices of bits in the order of |weight|: shorter streams than those of files/rice.py, for readers with the weights.

Training drops small weights more often than large ones. Put in the order of |weight|, the dropped bits are dense at the
begin and rare at the end, and each block has its own Rice parameter. The order is not stored: both sides derive it.

    section  2^22 weights of the flattened matrix, (rows, columns) or of experts; the last one may be shorter
    order    within a section: ascending by the 15 bits of float32(weight) after the sign, which are the exponent and
             7 bits of the mantissa; equal ones stay in the matrix's order
    blocks   a section's words of 32 ordered bits: the upper half; the upper half of what is left; and so on, until at
             most 128 words are left; the first block in the stream is the one of the smallest weights

The stream is rice.py's, of one row with all bits in this order, in these blocks. It can be read only with the weights
that it was written with: others give another matrix, which nothing in the stream can tell.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mft.files import rice
from mft.files.rice import Bytes, Words

_SMALLEST = 128  # words: with heads of 5 bytes, shorter blocks cost more than they save


def encode(words: Words, columns: int, weight: Tensor) -> bytes:
    """The stream of a matrix, as rice.encode takes it. weight: of as many numbers, in any shape and dtype."""
    bits = rice.bits_of(words, columns).reshape(-1)
    ordered = np.empty_like(bits)
    for section, order in _orders(weight):
        ordered[section] = bits[section][order]
    return rice.encode(rice.words_of(ordered[None]), len(bits), _blocks(len(bits)))


def decode(stream: Bytes, rows: int, columns: int, weight: Tensor) -> Words:
    """The matrix of a stream. weight: the one that encode was given. Raises: ValueError if no such matrix has it."""
    check_length(len(stream), rows, columns)
    count = rows * columns
    words = rice.decode(stream, 1, count, _blocks(count))
    if count % 32 and words[0, -1] >> count % 32:
        raise ValueError(f"stream must have 0 in the {32 - count % 32} bits that fill up its last word")
    ordered = rice.bits_of(words, count)[0]
    bits = np.empty_like(ordered)
    for section, order in _orders(weight):
        bits[section][order] = ordered[section]
    return rice.words_of(bits.reshape(rows, columns))


def check_length(length: int, rows: int, columns: int) -> None:
    """Raise ValueError if no stream of a matrix of this shape has so many bytes: before memory is asked for."""
    rice.check_length(length, 1, rows * columns, _count_blocks(rows * columns))


def most_bytes(rows: int, columns: int) -> int:
    """Of a stream of a matrix of this shape."""
    return rice.most_bytes(1, rows * columns, _count_blocks(rows * columns))


# ---------------------------------------------------------------------------------------------- private


def _orders(weight: Tensor) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Each section's place in the flattened matrix, and the order of its weights."""
    flat, size = weight.detach().reshape(-1), 32 * rice.BLOCK
    for begin in range(0, len(flat), size):
        # A copy: memory that numpy has seen cannot be resized, which is how FSDP2 frees gathered weights.
        numbers = flat[begin : begin + size].to("cpu", torch.float32, copy=True).numpy()
        keys = (numbers.view(np.uint32) >> 16 & 0x7FFF).astype(np.uint16)
        yield slice(begin, begin + size), np.argsort(keys, kind="stable")


def _blocks(count: int) -> list[int]:
    """How many words each block of a matrix of so many bits has."""
    whole, rest = divmod(-(-count // 32), rice.BLOCK)
    return whole * _section(rice.BLOCK) + _section(rest)


def _count_blocks(count: int) -> int:
    """len(_blocks(count)), of whatever a stranger's file claims."""
    whole, rest = divmod(-(-count // 32), rice.BLOCK)
    return whole * len(_section(rice.BLOCK)) + len(_section(rest))


def _section(words: int) -> list[int]:
    """The blocks of a section."""
    if words <= _SMALLEST:
        return [words] if words else []
    return [*_section(words // 2), words - words // 2]
