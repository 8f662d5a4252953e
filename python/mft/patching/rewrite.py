"""Rewrite a GGUF file in one pass: drop weights from its tensors, and record what restores the original."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType

from mft.files.gguf_file import GgufHeader, GgufTensor
from mft.patching.block_codes import CODES, Code, code_of
from mft.patching.patch_plan import Plan, decode_tensor
from mft.patching.threads import Digest
from mft.patching.undo_file import Facts, Undo

_F32 = CODES["F32"]


class Rewrite:
    """The patched file, written piece by piece, and what its undo file will hold.

    sink: None to compute only hash and changed bytes. widened: names of tensors that are stored in float32.
    """

    def __init__(self, plan: Plan, sink: BinaryIO | None, widened: frozenset[str] = frozenset()) -> None:
        self.plan, self._sink, self._widened = plan, sink, widened
        self._before, self._after = Digest(), Digest()
        self._segments: list[list[int]] = []
        self._moved: list[bytes] = []
        self._places: list[np.ndarray] = []
        self._old: list[np.ndarray] = []
        self._new: list[np.ndarray] = []
        self.bytes_before = self.bytes_after = 0

    def run(self) -> "Rewrite":
        """Read and write the whole file. Raises: ValueError if a dropped weight's scale is infinite or NaN."""
        for tensor, piece in _pieces(self.plan.path, self.plan.header):
            self._before.update(piece)
            self._take(tensor, piece)
            self.bytes_before += len(piece)
        return self

    @property
    def places(self) -> np.ndarray:
        """The bytes of the original that have changed: int64, ascending."""
        return np.concatenate([np.empty(0, np.int64), *self._places])

    @property
    def new(self) -> np.ndarray:
        """The new values of the changed bytes: uint8."""
        return np.concatenate([np.empty(0, np.uint8), *self._new])

    def undo(self) -> Undo:
        """Return what restores the original."""
        facts = Facts(
            sha256_before=self._before.hexdigest(),
            sha256_after=self._after.hexdigest(),
            bytes_before=self.bytes_before,
            masks=self.plan.masks_hash,
            dropped=self.plan.count,
        )
        old = np.concatenate([np.empty(0, np.uint8), *self._old])
        moved = np.frombuffer(bytearray().join(self._moved), np.uint8)
        return Undo(facts, np.array(self._segments, np.int64), moved, self.places, old)

    # ------------------------------------------------------------------------------------------ private

    def _take(self, tensor: GgufTensor | None, piece: np.ndarray) -> None:
        if tensor is None:
            if not self._widened:
                self._keep(piece)
            elif self.bytes_before == 0:
                self._replace(piece, widened_header(piece, self.plan.header, self._widened))
            else:
                self._replace(piece, piece[:0])  # padding: each tensor gets new padding below
            return
        if tensor.name in self._widened:
            wide = decode_tensor(self.plan.path, tensor, piece).reshape(-1).view(np.uint8)
            self._replace(piece, self._clear(_F32, tensor, wide))
        elif tensor.name in self.plan.dropped:
            code = code_of(tensor.kind)
            assert code is not None, "what has no zero is widened"
            cleared = self._clear(code, tensor, piece)
            places = np.flatnonzero(cleared != piece)
            self._places.append(tensor.start + places)
            self._old.append(piece[places])
            self._new.append(cleared[places])
            self._keep(cleared)
        else:
            self._keep(piece)
        if self._widened:
            self._emit(np.zeros(-self.bytes_after % self.plan.header.alignment, np.uint8))

    def _clear(self, code: Code, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
        try:
            return code.clear(data, self.plan.dropped[tensor.name])
        except ValueError as error:
            raise ValueError(
                f"{self.plan.path}: {tensor.name} must have finite scales where weights are dropped, got {error}: "
                "quantise the model again"
            ) from None

    def _keep(self, piece: np.ndarray) -> None:
        last = self._segments[-1] if self._segments else None
        if last is not None and last[0] == 0 and last[1] + last[2] == self.bytes_after:
            last[2] += len(piece)
        else:
            self._segments.append([0, self.bytes_after, len(piece)])
        self._emit(piece)

    def _replace(self, piece: np.ndarray, new: np.ndarray) -> None:
        self._segments.append([1, sum(map(len, self._moved)), len(piece)])
        self._moved.append(piece.tobytes())
        self._emit(new)

    def _emit(self, piece: np.ndarray) -> None:
        self._after.update(piece)
        self.bytes_after += len(piece)
        if self._sink is not None:
            self._sink.write(piece.data)


def widened_header(head: np.ndarray, header: GgufHeader, widened: frozenset[str]) -> np.ndarray:
    """Return the bytes before the tensors for a file in which these are float32, with ggml's alignment."""
    changed, offset = head.copy(), 0
    for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.start):
        kind, size = tensor.kind, tensor.size
        if tensor.name in widened:
            kind, size = GGMLQuantizationType.F32, 4 * int(np.prod(tensor.shape, dtype=np.int64))
        struct.pack_into("<IQ", changed.data, tensor.entry, kind, offset)
        offset += size + -size % header.alignment
    return changed


def _pieces(path: Path, header: GgufHeader) -> Iterator[tuple[GgufTensor | None, np.ndarray]]:
    """Yield a whole file in order: (tensor, its bytes), and (None, bytes) for all before, between and after tensors."""
    end = 0
    with path.open("rb") as file:
        for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start > end:
                yield None, np.fromfile(file, np.uint8, tensor.start - end)
            stored = np.fromfile(file, np.uint8, tensor.size)
            if len(stored) < tensor.size:
                raise ValueError(f"{path} must not change while it is read, got a shorter one: start again")
            yield tensor, stored
            end = tensor.start + tensor.size
        rest = np.fromfile(file, np.uint8)
        if len(rest):
            yield None, rest
