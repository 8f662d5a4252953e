"""Encode what an arm trained as bytes, with few bits per number and entropy coding, and decode the bytes again.

    bf16        each number rounded to bfloat16
    int8        absmax * code / 127 in blocks of 64
    nf4, int4   levels[code] * absmax / largest level, with the levels and blocks of mft_kernels.codes

Blocks lie along each tensor; absmax is bfloat16. With a share, only that share of each tensor's largest numbers is
kept, and the others are 0. The positions are coded like a mask of one row (files/rice.py). Two codes of 4 bits share a
byte; bfloat16 is split into its high and its low bytes. Each of these runs of bytes is coded by deflate (RFC 1951), by
deflate with Huffman coding alone if that is shorter, or stored as it is.

A stream holds the positions, the codes and the scales of all tensors. Before each run stand one byte for its kind
(1: deflate) and four bytes for its length. Names and shapes are not stored: they are those of what the arm began with.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mft.files.mask_coding import coded_mask, decoded_mask
from mft_kernels.internal import INT8_LARGEST, Int4, Nf4
from mft_study.arms.weights import Weights

_LENGTH = 4  # bytes


class _Bf16:
    """bfloat16."""

    def encode(self, numbers: Tensor) -> list[bytes]:
        """Return the runs of bytes for a tensor's numbers (n,), fp32."""
        both = numbers.bfloat16().view(torch.uint8).view(-1, 2)
        return [_bytes_of(both[:, 1]), _bytes_of(both[:, 0])]

    def decode(self, runs: list[bytes], counts: list[int]) -> list[Tensor]:
        """Return the numbers of each tensor, counts[i] of them, from runs that hold all tensors one after the other."""
        high, low = (_numbers_of(run) for run in runs)
        return list(torch.stack((low, high), 1).view(torch.bfloat16).view(-1).float().split(counts))


@dataclass(frozen=True)
class _Levels:
    """Levels in ascending order, and the numbers per block. The last level stands for a block's largest number."""

    levels: tuple[float, ...]
    block: int

    @property
    def shares(self) -> Tensor:
        """What each code stands for, as a share of its block's largest number."""
        return torch.tensor(self.levels) / self.levels[-1]

    @property
    def is_halved(self) -> bool:
        """Whether two codes share a byte, the first in the high bits."""
        return len(self.levels) <= 16

    def encode(self, numbers: Tensor) -> list[bytes]:
        shares = self.shares
        blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % self.block)).view(-1, self.block)
        scales = blocks.abs().amax(1).bfloat16()
        scaled = torch.where(scales[:, None] > 0, blocks / scales[:, None].float(), 0).view(-1)[: len(numbers)]
        codes = torch.bucketize(scaled, (shares[1:] + shares[:-1]) / 2).to(torch.uint8)
        return [_bytes_of(_halved(codes) if self.is_halved else codes), *_Bf16().encode(scales)]

    def decode(self, runs: list[bytes], counts: list[int]) -> list[Tensor]:
        read, coded = _numbers_of(runs[0]), counts
        if self.is_halved:
            read, coded = torch.stack((read >> 4, read & 15), 1).view(-1), [count + count % 2 for count in counts]
        codes = (code[:count].int() for code, count in zip(read.split(coded), counts))
        scales = _Bf16().decode(runs[1:], [-(-count // self.block) for count in counts])
        shares = self.shares
        return [shares[code] * scale.repeat_interleave(self.block)[: len(code)] for code, scale in zip(codes, scales)]


_FORMATS: dict[str, _Bf16 | _Levels] = {
    "bf16": _Bf16(),
    "int8": _Levels(tuple(map(float, range(-INT8_LARGEST, INT8_LARGEST + 1))), 64),
    "nf4": _Levels(Nf4.levels, Nf4.block),
    "int4": _Levels(Int4.levels, Int4.block),
}


def encode(weights: Mapping[str, Tensor], kind: str, share: float | None = None) -> bytes:
    """Return the stream of these tensors. kind: one of number_formats.CODED_FORMATS. Raises: ValueError if not finite.

    share: how much of each tensor, its largest numbers, is kept; in (0, 1].
    """
    numbers = [weight.detach().to("cpu", torch.float32).reshape(-1) for weight in weights.values()]
    if wrong := [one[~one.isfinite()] for one in numbers if not one.isfinite().all()]:
        raise ValueError(f"what was trained must be finite to be coded, got {wrong[0][0]}")
    places = b""
    if share is not None:
        kept = [_largest(one, share) for one in numbers]
        numbers = [one[where] for one, where in zip(numbers, kept)]
        places = _run(coded_mask(torch.cat(kept)[None]))
    runs = [b"".join(parts) for parts in zip(*map(_FORMATS[kind].encode, numbers))]
    return b"".join([places, *map(_run, runs)])


def decode(stream: bytes, like: Mapping[str, Tensor], kind: str, share: float | None = None) -> Weights:
    """Return what encode was given, rounded, in fp32. like: tensors of the same names and shapes, in the same order."""
    runs, counts = list(_runs(stream)), [weight.numel() for weight in like.values()]
    kept = [torch.ones(count, dtype=torch.bool) for count in counts]
    if share is not None:
        places, *runs = runs
        kept = list(decoded_mask(places, (1, sum(counts)))[0].split(counts))
    counts = [int(where.sum()) for where in kept]
    found = _FORMATS[kind].decode(runs, counts)
    numbers = [torch.zeros(len(where)).masked_scatter(where, one) for where, one in zip(kept, found)]
    return {name: one.view(weight.shape) for (name, weight), one in zip(like.items(), numbers)}


# ---------------------------------------------------------------------------------------------- private


def _largest(numbers: Tensor, share: float) -> Tensor:
    """Return a mask of the share of numbers that are largest in magnitude; at least one."""
    count = max(1, round(share * len(numbers)))
    return torch.zeros(len(numbers), dtype=torch.bool).scatter_(0, numbers.abs().topk(count).indices, True)


def _halved(codes: Tensor) -> Tensor:
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _bytes_of(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()


def _numbers_of(run: bytes) -> Tensor:
    return torch.frombuffer(bytearray(run), dtype=torch.uint8) if run else torch.empty(0, dtype=torch.uint8)


def _run(plain: bytes) -> bytes:
    coded = min((_deflated(plain, way) for way in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)), key=len)
    kind, run = (1, coded) if len(coded) < len(plain) else (0, plain)
    return bytes([kind]) + len(run).to_bytes(_LENGTH, "little") + run


def _deflated(plain: bytes, way: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, way)
    return packer.compress(plain) + packer.flush()


def _runs(stream: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(stream):
        begin = place + 1 + _LENGTH
        end = begin + int.from_bytes(stream[place + 1 : begin], "little")
        yield zlib.decompress(stream[begin:end], -zlib.MAX_WBITS) if stream[place] else stream[begin:end]
        place = end
