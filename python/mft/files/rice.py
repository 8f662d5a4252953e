"""Code matrices of bits at about their entropy: Golomb-Rice codes of the gaps between the rarer bits.

If bits are independent and a share p of them is of the rarer kind, the gaps between the rarer bits are geometric. The
Rice code of a gap g is g >> k in unary and its k low bits (as in FLAC, RFC 9639). Each block of the matrix has the best
k. The code takes 0.4 % more than the entropy H(p) at p = 0.01, at most 5 % more, and never more than the bits as they
are.

An arithmetic coder would save these per cents. But every reader of masks would then need its library. Such a library
has wheels for fewer machines than masks are used on, and its next version may produce other bits, which a file may not.

A stream has blocks of the matrix's words of 32 bits, in their order: by default one for each 131,072 words. Both sides
may agree on shorter blocks, which suit a matrix whose bits are rarer in some places than in others. A block has:

    kind   1 byte: k if the 0 bits are coded; 32 + k if the 1 bits are coded; 64 if the words follow as they are
    count  4 bytes, little endian: how many bits are coded, with one gap each; 0 for kind 64
    low    count * k bits: the k low bits of each gap, lowest first, then 0 up to a whole byte
    high   for each gap, g >> k bits of 0 and one of 1; then 0 up to a whole byte

A gap is the number of columns since the coded bit before, or since the start of the block. It runs along rows and on
into the next one; the padding of a row's last word does not count as columns. A stream is filled up with zeros to at
least 1/1024 of the words' bytes, so a small file cannot ask for much memory.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

BLOCK = 1 << 17  # most words of a block: half a megabyte, or 4 megabytes with one byte per bit
_HEAD = 5  # bytes of kind and count
_ONES, _RAW = 32, 64  # kinds
_MOST_K = 22  # a block has at most 2^22 bits, so no gap needs more
_MOST_EXPANSION = 1024


def words_of(bits: NDArray[np.bool_]) -> Words:
    """Pack bits (rows, columns) into the words that encode takes."""
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4))).view("<u4")


def bits_of(words: Words, columns: int) -> NDArray[np.bool_]:
    """Unpack the words that decode returns into bits (rows, columns)."""
    flat = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=1, bitorder="little")
    return flat[:, :columns].view(np.bool_)


def encode(words: Words, columns: int, blocks: Sequence[int] | None = None) -> bytes:
    """Return the stream of a matrix.

    words: (rows, ceil(columns / 32)); bit j % 32 of word j // 32 is column j, or 0 past the last. blocks: how many
    words each block has, at most BLOCK and all in total. By default each has BLOCK words, and the last one the rest.
    """
    rows, width = words.shape
    flat = np.ascontiguousarray(words, "<u4").reshape(-1)
    coded = [_encode_block(flat[begin:end], begin, width, columns) for begin, end in _places(len(flat), blocks)]
    return b"".join(coded).ljust(fewest_bytes(rows, columns), b"\0")


def decode(stream: Bytes, rows: int, columns: int, blocks: Sequence[int] | None = None) -> Words:
    """Return the matrix of a stream. blocks: those that encode was given. Blocks of kind 64 keep their padding bits.

    Raises: ValueError if no matrix of this shape has this stream.
    """
    return join_pieces(decoded_blocks(stream, rows, columns, blocks), rows, columns)


def decoded_blocks(stream: Bytes, rows: int, columns: int, blocks: Sequence[int] | None = None) -> Iterator[Words]:
    """Return an iterator over the flattened blocks of decode's matrix; one is in memory at a time.

    Raises: ValueError as decode, for a wrong length at once, and else when the damaged block comes.
    """
    check_length(len(stream), rows, columns, None if blocks is None else len(blocks))
    return _decoded_blocks(stream, rows, columns, blocks)


def join_pieces(pieces: Iterable[Words], rows: int, columns: int) -> Words:
    """Return the matrix whose flattened words come in pieces."""
    flat, place = np.empty(rows * -(-columns // 32), "<u4"), 0
    for piece in pieces:
        flat[place : place + len(piece)] = piece
        place += len(piece)
    return flat.reshape(rows, -1)


def check_length(length: int, rows: int, columns: int, blocks: int | None = None) -> None:
    """Raise ValueError if no stream of such a matrix has length bytes. Call it before memory is allocated."""
    fewest, most = fewest_bytes(rows, columns), most_bytes(rows, columns, blocks)
    if not fewest <= length <= most:
        raise ValueError(f"stream must have {fewest} to {most} bytes for {rows} x {columns} bits, got {length}")


def fewest_bytes(rows: int, columns: int) -> int:
    """Return the smallest number of bytes that a stream of a matrix of this shape has."""
    return -(-_raw_bytes(rows, columns) // _MOST_EXPANSION)


def most_bytes(rows: int, columns: int, blocks: int | None = None) -> int:
    """Return the largest number of bytes that a stream of a matrix of this shape has. blocks: as for check_length."""
    raw = _raw_bytes(rows, columns)
    return raw + _HEAD * (-(-raw // (4 * BLOCK)) if blocks is None else blocks)


# ---------------------------------------------------------------------------------------------- private


def _raw_bytes(rows: int, columns: int) -> int:
    return 4 * rows * -(-columns // 32)


def _decoded_blocks(stream: Bytes, rows: int, columns: int, blocks: Sequence[int] | None) -> Iterator[Words]:
    width, place = -(-columns // 32), 0
    for begin, end in _places(rows * width, blocks):
        words, size = _decode_block(stream[place:], end - begin, begin, width, columns)
        place += size
        yield words
    end = max(place, fewest_bytes(rows, columns))
    if len(stream) != end or stream[place:].any():
        raise ValueError(f"stream must end after {end} bytes, with 0 from {place} on, got {len(stream)}")


def _places(words: int, blocks: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    """Yield the word at which each block begins and the one at which it ends."""
    sizes = [min(BLOCK, words - begin) for begin in range(0, words, BLOCK)] if blocks is None else blocks
    return itertools.pairwise(itertools.accumulate(sizes, initial=0))


def _columns_before(word: int, width: int, columns: int) -> int:
    """Return the number of columns, over all rows, before a word of the flattened matrix."""
    row, rest = divmod(word, width)
    return row * columns + min(32 * rest, columns)


def _encode_block(words: Words, start: int, width: int, columns: int) -> bytes:
    """Return the code of one block. start: the place of its words in the flattened matrix."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)
    first = _columns_before(start, width, columns)
    total = _columns_before(start + len(words), width, columns) - first
    kind = _ONES if 2 * np.count_nonzero(bits) <= total else 0
    places = np.flatnonzero(bits if kind == _ONES else ~bits) + 32 * start
    if columns % 32:
        row, column = np.divmod(places, 32 * width)
        places = (row * columns + column)[column < columns]
    if not len(places):
        return _head(kind, 0)
    gaps = np.diff(places, prepend=first - 1) - 1
    longest = (total // len(gaps)).bit_length()
    highs = {k: len(gaps) + int((gaps >> k).sum()) for k in range(max(0, longest - 2), longest + 1)}  # bits
    sizes = {k: -(-len(gaps) * k // 8) - (-high // 8) for k, high in highs.items()}
    k = min(sizes, key=sizes.__getitem__)
    if sizes[k] >= words.nbytes:
        return _head(_RAW, 0) + words.tobytes()
    low = (gaps[:, None].astype(np.uint32) >> np.arange(k, dtype=np.uint32)) & 1
    ends = np.cumsum((gaps >> k) + 1) - 1
    high = np.zeros(highs[k], np.uint8)
    high[ends] = 1
    return _head(kind + k, len(gaps)) + _packed(low.astype(np.uint8)) + _packed(high)


def _decode_block(stream: Bytes, size: int, start: int, width: int, columns: int) -> tuple[Words, int]:
    """Return the ``size`` words of the block at the start of stream, and the number of bytes read."""
    if len(stream) < _HEAD:
        raise ValueError(f"stream must have a block from word {start} on, got its end")
    kind, count = int(stream[0]), int.from_bytes(stream[1:_HEAD].tobytes(), "little")
    first = _columns_before(start, width, columns)
    total = _columns_before(start + size, width, columns) - first
    k = kind % _ONES
    # No encoder writes low bits that take more than the words, and they take much memory here.
    most = 0 if kind == _RAW else min(total, 32 * size // max(k, 1))
    if kind > _RAW or k > _MOST_K or count > most:
        raise ValueError(f"stream must have known kinds and counts up to {most}, got {kind} and {count}")
    stream = stream[_HEAD:]
    if kind == _RAW:
        raw = stream[: 4 * size]
        if len(raw) < 4 * size:
            raise ValueError(f"stream must have {4 * size} bytes of words, got {len(raw)}")
        return raw.copy().view("<u4"), _HEAD + 4 * size
    split = -(-count * k // 8)
    low = _unpacked(stream[:split], count * k)
    # The gaps together span at most `total` columns, which bounds the length of the unary part.
    most = count + (total >> k) if count else 0
    high = np.unpackbits(stream[split : split - (-most // 8)], bitorder="little")
    ends = np.flatnonzero(high)[:count]
    if low is None or len(ends) < count:
        raise ValueError(f"stream must have {count} gaps before word {start + size}, got fewer, or too long ones")
    used = -(-(int(ends[-1]) + 1) // 8) if count else 0
    if high[ends[-1] + 1 if count else 0 : 8 * used].any():
        raise ValueError("stream must have 0 in what fills up its bytes")
    gaps = (np.diff(ends, prepend=-1) - 1) << k
    gaps += low.reshape(count, k) @ (1 << np.arange(k))
    places = np.cumsum(gaps + 1) - 1  # below 2^22 * (2^22 + 2)
    if count and places[-1] >= total:
        raise ValueError(f"stream must have gaps within {total} columns, got {places[-1]}")
    places += first
    if columns % 32:
        row, column = np.divmod(places, columns)
        places = row * (32 * width) + column
    bits = np.zeros(32 * size, np.uint8)
    bits[places - 32 * start] = 1
    words = np.packbits(bits, bitorder="little").view("<u4")
    if kind < _ONES:
        np.invert(words, out=words)
        if columns % 32:
            words[(width - 1 - start) % width :: width] &= np.uint32((1 << columns % 32) - 1)
    return words, _HEAD + split + used


def _head(kind: int, count: int) -> bytes:
    return bytes([kind]) + count.to_bytes(4, "little")


def _packed(bits: Bytes) -> bytes:
    return np.packbits(bits, axis=None, bitorder="little").tobytes()


def _unpacked(stream: Bytes, count: int) -> Bytes | None:
    """Return the first count bits, or None if stream has fewer or has a 1 after them."""
    bits = np.unpackbits(stream, bitorder="little")
    return None if len(bits) < count or bits[count:].any() else bits[:count]
