"""Code matrices of bits in the order of |weight|: shorter streams than files/rice.py, for readers with the weights.

Training drops small weights more often than large ones. In the order of |weight|, the dropped bits are dense at the
start and rare at the end, and each block has its own Rice parameter. The order is not stored: both sides derive it.

    section  2^22 weights of the flattened matrix, (rows, columns) or of experts; the last section may be shorter
    order    within a section: ascending by the 15 bits of float32(weight) after the sign, which are the exponent and
             7 bits of the mantissa; equal weights stay in the matrix's order
    blocks   a section's words of 32 ordered bits: the upper half; the upper half of the rest; and so on, until at
             most 128 words are left; the first block in the stream has the smallest weights

The stream has the format of rice.py: one row with all bits in this order, in these blocks. It can be read only with the
weights that it was written with. Other weights give another matrix, and nothing in the stream reveals this.
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
    """Return the stream of a matrix in the form that rice.encode takes. weight has one number per bit of the matrix."""
    bits = rice.bits_of(words, columns).reshape(-1)
    ordered = np.empty_like(bits)
    for section, order in _orders(weight):
        ordered[section] = bits[section][order]
    return rice.encode(rice.words_of(ordered[None]), len(bits), _blocks(len(bits)))


def decode(stream: Bytes, rows: int, columns: int, weight: Tensor) -> Words:
    """Return the matrix of a stream that encode made with this weight. Raises: ValueError if no matrix fits."""
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
    """Raise ValueError if no stream of a matrix of this shape has length bytes. Call it before memory is allocated."""
    rice.check_length(length, 1, rows * columns, _count_blocks(rows * columns))


def most_bytes(rows: int, columns: int) -> int:
    """Return the largest number of bytes that a stream of a matrix of this shape has."""
    return rice.most_bytes(1, rows * columns, _count_blocks(rows * columns))


# ---------------------------------------------------------------------------------------------- private


def _orders(weight: Tensor) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield each section's slice of the flattened matrix, and the order of its weights."""
    flat, size = weight.detach().reshape(-1), 32 * rice.BLOCK
    for begin in range(0, len(flat), size):
        # A copy: memory that numpy has seen cannot be resized, and FSDP2 frees gathered weights by resizing.
        numbers = flat[begin : begin + size].to("cpu", torch.float32, copy=True).numpy()
        keys = (numbers.view(np.uint32) >> 16 & 0x7FFF).astype(np.uint16)
        yield slice(begin, begin + size), np.argsort(keys, kind="stable")


def _blocks(count: int) -> list[int]:
    """Return the number of words in each block of a matrix of count bits."""
    whole, rest = divmod(-(-count // 32), rice.BLOCK)
    return whole * _section(rice.BLOCK) + _section(rest)


def _count_blocks(count: int) -> int:
    """Return len(_blocks(count)) without the list, since count may come from an untrusted file."""
    whole, rest = divmod(-(-count // 32), rice.BLOCK)
    return whole * len(_section(rice.BLOCK)) + len(_section(rest))


def _section(words: int) -> list[int]:
    """Return the number of words in each block of a section."""
    if words <= _SMALLEST:
        return [words] if words else []
    return [*_section(words // 2), words - words // 2]
