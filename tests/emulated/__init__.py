"""The CUDA kernels on CPU tensors: every kernel's file compiled with g++ for the emulator, called like the reference.

It has a backend's functions, the ops by name (by_name.py), and keywords for what a device would decide:
``multiprocessors``, ``capability``, ``shared_bytes`` and ``arch``. ``arch`` is "sm_80" or "sm_90"; "decode" or
"general" for one of sm_80's two products; or "hopper" for sm_90's if it takes the operands, else sm_80's. Rows may
have any stride.

Outputs begin as NaN or as bits of alternating sign, so that an element that is never written is detected. With
``outputs_at_guard_pages()`` they lie between forbidden pages. A fault of the emulator is a RuntimeError.
"""

import ctypes
import fcntl
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from by_name import ByName
from guarded import guarded
from torch import Tensor

from building import compile
from building.compile import CannotBuild, Link, Unit
from mft_kernels import operands
from mft_kernels.reference.linear import Gradients, kept_count

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "cuda_kernels"
PROGRAMS = SOURCES / "programs"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # only nvcc knows "unroll"
NUMBERS = "-ffp-contract=off"  # round products and sums separately, even if the host could fuse them
INCLUDE = [f"-I{folder}" for folder in (ROOT / "csrc/cuda", PROGRAMS, SOURCES)]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", NUMBERS, *WARNINGS, *INCLUDE]
NOT_EMULATED = ("score_grad_sm90_", "bindings")  # these need CUTLASS, torch or the driver

usual_arch = "sm_80"

ASYNCHRONIES = ("at_issue", "as_late_as_possible", "random")
SCHEDULES = ("in_turn", "by_rank")  # by rank, a warp may run far ahead of another

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POISON = -1431655766  # 0xaaaaaaaa

Pointer, Int, Int64, Bool = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_bool


class NotBuilt(RuntimeError):
    """Why there is no library on this machine."""


def _of(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    """Return the fields of these names, in order."""
    return tuple((name, kind) for name in names.split())


class Matrix(ctypes.Structure):
    _fields_ = _of(Pointer, "data") + _of(Int, "type") + _of(Int64, "rows columns stride")


class Keep(ctypes.Structure):
    _fields_ = _of(Pointer, "words") + _of(Matrix, "scores") + _of(Pointer, "thresholds")
    _fields_ += _of(Int64, "threshold_stride") + _of(Bool, "magnitude")


class Sign(ctypes.Structure):
    _fields_ = _of(Matrix, "scores") + _of(Pointer, "words")


class Product(ctypes.Structure):
    _fields_ = _of(Matrix, "out in weight") + _of(Keep, "keep") + _of(Pointer, "bias") + _of(Bool, "transposed")
    _fields_ += _of(Pointer, "workspace") + _of(Int, "tokens parts")


class ScoreGrad(ctypes.Structure):
    _fields_ = _of(Matrix, "d_scores d_weight grad_output x weight") + _of(Sign, "sign") + _of(Keep, "keep")
    _fields_ += _of(Bool, "accumulate") + _of(Pointer, "workspace")


class Select(ctypes.Structure):
    _fields_ = _of(Pointer, "scores") + _of(Int, "type") + _of(Int64, "count k") + _of(Bool, "magnitude")
    _fields_ += _of(Pointer, "threshold workspace")


class PackMask(ctypes.Structure):
    _fields_ = _of(Pointer, "words") + _of(Keep, "keep")


class PackSigns(ctypes.Structure):
    _fields_ = _of(Pointer, "words zeros") + _of(Matrix, "scores")


class Device(ctypes.Structure):
    _fields_ = _of(Pointer, "stream") + _of(Int, "multiprocessors capability shared_bytes l2_bytes")


class Plan(ctypes.Structure):
    _fields_ = _of(ctypes.c_double, "cycles") + _of(Int, "tokens parts") + _of(Int64, "workspace")


_STRUCTS = {"product": Product, "score_grad": ScoreGrad, "select": Select, "pack_mask": PackMask}
_STRUCTS |= {"pack_signs": PackSigns, "device": Device, "plan": Plan}

# ------------------------------------------------------------------------------------------------------- building


@functools.cache
def library() -> ctypes.CDLL:
    """Build what has changed. MFT_EMULATED=select,pack builds only files with these prefixes, in a separate folder."""
    wanted = tuple(filter(None, os.environ.get("MFT_EMULATED", "").split(",")))
    sources = [s for pattern in ("*.cu", "*.cpp") for s in sorted((ROOT / "csrc/cuda").glob(pattern))]
    kernels = [s for s in sources if not s.name.startswith(NOT_EMULATED) and s.name.startswith(wanted or "")]
    sources = [*kernels, SOURCES / "emulator/machine.cpp", PROGRAMS / "emulated.cpp"]
    directory, gxx = ROOT / "build" / "-".join(["cuda_emulated", *wanted]), compiler()
    units = [Unit(source, gxx, [*FLAGS, "-x", "c++"]) for source in sources]  # "-x": also what ends in .cu
    build(directory, units, Link("libemulated.so", gxx, []))
    path = directory / "libemulated.so"
    loaded = ctypes.CDLL(str(path))
    for name, struct in _STRUCTS.items():
        size = getattr(loaded, f"emulated_size_of_{name}")
        size.restype = Int64
        assert size() == ctypes.sizeof(struct), f"{struct.__name__} is not the struct of csrc/cuda/api.h"
    return loaded


def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        raise NotBuilt("the emulator is compiled with g++, and there is none in PATH")
    return path


def build(directory: Path, units: Sequence[Unit], link: Link | None = None) -> None:
    """Compile and link what has changed, while no other process builds there.

    Raises: RuntimeError with the compiler's output.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            compile.build(directory, units, link)
        except CannotBuild as error:
            said = "".join(log.read_text() for log in sorted(directory.glob("*.log")))
            raise RuntimeError(f"{directory.name} does not compile: {error}\n{said}") from None


def set_settings(seed: int = 0, asynchrony: str = "random", schedule: str = "in_turn") -> None:
    """Set the order of warps and blocks, and when background work happens, for all later launches."""
    library().emulated_set_settings(ctypes.c_uint(seed), ASYNCHRONIES.index(asynchrony), SCHEDULES.index(schedule))


# ------------------------------------------------------------------------------------------ a backend's functions


def product(x: Tensor, weight: Tensor, keep: operands.Keep, bias: Tensor | None, *, transposed: bool = False, **device):
    rows = _rows(x)
    out = _new((len(rows), weight.shape[1 if transposed else 0]), x.dtype)
    asked = Product(out=_matrix(out), weight=_matrix(weight), keep=_keep(keep), transposed=transposed)
    setattr(asked, "in", _matrix(rows))  # a Python keyword
    if bias is not None:
        assert bias.is_contiguous()
        assert bias.dtype == weight.dtype
        asked.bias = bias.data_ptr()
    kernel = f"product_{device.get('arch', usual_arch).replace('_', '')}"
    if kernel == "product_hopper":  # its own kernel if it takes the operands, like the bindings
        kernel = "product_sm90" if plan("product_sm90", asked, device).tokens else "product_sm80"
    _call_with_workspace(kernel, asked, device)
    return out.view(*x.shape[:-1], out.shape[1])


def gradients(asked: operands.Backward, **device) -> Gradients:
    grad, weight, wants = asked.grad_output, asked.weight, asked.output_mask
    d_x = d_weight = d_scores = d_bias = grad.new_empty(0)
    if wants[0]:
        d_x = product(grad, weight, asked.keep, None, transposed=True, **device)
    if wants[1]:
        d_weight = _new(weight.shape, weight.dtype)
    if wants[2]:
        d_scores = _new(weight.shape, asked.score_dtype)
    if wants[1] or wants[2]:
        wanted = {"d_scores": d_scores if wants[2] else None, "d_weight": d_weight if wants[1] else None}
        score_grad(operands.Sums(grad, asked.x, weight, asked.sign, **wanted, keep=asked.keep), **device)
    if wants[3]:
        d_bias = _rows(grad).sum(0)
    return d_x, d_weight, d_scores, d_bias


def score_grad(sums: operands.Sums, **device) -> None:
    grad, rows = _rows(sums.grad_output), _rows(sums.x)
    n, k = grad.shape[1], rows.shape[1]
    weight = Matrix(None, _TYPES[rows.dtype], n, k, k) if sums.weight is None else _matrix(sums.weight)
    asked = ScoreGrad(grad_output=_matrix(grad), x=_matrix(rows), weight=weight, accumulate=sums.accumulate)
    if sums.d_weight is not None:
        asked.d_weight, asked.keep = _matrix(sums.d_weight), _keep(sums.keep)
    if sums.d_scores is not None:
        asked.d_scores, asked.sign = _matrix(sums.d_scores), _sign(sums.sign)
    _call_with_workspace("score_grad_sm80", asked, device)


def select(scores: Tensor, keep_ratio: float, mode: str, **device) -> Tensor:
    scores = scores.contiguous()
    threshold = _new((), scores.dtype)
    size = library().emulated_select_workspace
    size.restype = Int64
    workspace = _new((size(_TYPES[scores.dtype]),), torch.uint8)
    asked = Select(
        scores=scores.data_ptr(),
        type=_TYPES[scores.dtype],
        count=scores.numel(),
        k=kept_count(scores.numel(), keep_ratio),
        magnitude=mode == "magnitude",
        threshold=threshold.data_ptr(),
        workspace=workspace.data_ptr(),
    )
    _call("kept_threshold", asked, device)
    return threshold


def pack(scores: Tensor, threshold: Tensor, mode: str, **device) -> Tensor:
    words = _new((scores.shape[0], -(-scores.shape[1] // 32)), torch.int32)
    keep = _keep(operands.Keep(scores, threshold, mode))
    _call("pack_mask", PackMask(words=words.data_ptr(), keep=keep), device)
    return words


def signs(scores: Tensor, **device) -> tuple[Tensor, Tensor]:
    words = _new((scores.shape[0], -(-scores.shape[1] // 32)), torch.int32)
    zeros = _new((), torch.int64)
    asked = PackSigns(words=words.data_ptr(), zeros=zeros.data_ptr(), scores=_matrix(scores))
    _call("pack_signs", asked, device)
    return words, zeros


_by_name = ByName(globals())
masked_linear, masked_linear_backward = _by_name.masked_linear, _by_name.masked_linear_backward
masked_linear_packed = _by_name.masked_linear_packed
masked_linear_packed_backward = _by_name.masked_linear_packed_backward
accumulate_score_grad, accumulate_product = _by_name.accumulate_score_grad, _by_name.accumulate_product
kept_threshold, pack_mask, pack_signs = _by_name.kept_threshold, _by_name.pack_mask, _by_name.pack_signs


# ---------------------------------------------------------------------------------------------- plans and rates


def plan(kernel: str, asked: ctypes.Structure, device: dict) -> Plan:
    """Return how the kernel would be launched; all 0 if it refuses."""
    found = Plan()
    getattr(library(), f"emulated_plan_{kernel}")(
        ctypes.byref(asked), ctypes.byref(_device(device)), ctypes.byref(found)
    )
    return found


def decode_cut(asked: Product, device: dict) -> tuple[int, ...]:
    """Return how decode_sm80 cuts a product with a workspace.

    These are: slices, parts, units of a part and of a slab, blocks of a cluster, features of a block.
    """
    found = (ctypes.c_int * 6)()
    library().emulated_decode_cut(ctypes.byref(asked), ctypes.byref(_device(device)), found)
    return tuple(found)


def decodes(asked: Product, device: dict) -> bool:
    """Return whether product_sm80 passes the product to decode_sm80."""
    asks = library().emulated_decodes
    asks.restype = ctypes.c_bool
    return asks(ctypes.byref(asked), ctypes.byref(_device(device)))


def rates(capability: int) -> tuple[float, float, float, float]:
    """Return what tile_cost.h has for a card.

    These are: multiply-adds and bytes per cycle and multiprocessor, cycles of a launch, and bytes from L2.
    """
    found = (ctypes.c_double * 4)()
    library().emulated_rates(capability, found)
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------- private


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _matrix(tensor: Tensor) -> Matrix:
    rows, columns = tensor.shape
    assert columns <= 1 or tensor.stride(1) == 1, "the kernels take matrices of unit column stride"
    data = tensor.data_ptr() or _nowhere()  # null would mean that the matrix is not wanted
    return Matrix(data, _TYPES[tensor.dtype], rows, columns, tensor.stride(0))


def _keep(keep: operands.Keep) -> Keep:
    if keep.words is not None:
        return Keep(words=_words(keep.words))
    assert keep.thresholds.dtype == keep.scores.dtype
    return Keep(
        scores=_matrix(keep.scores),
        thresholds=keep.thresholds.data_ptr() or _nowhere(),
        threshold_stride=keep.threshold_stride,
        magnitude=keep.magnitude,
    )


def _sign(sign: Tensor | None) -> Sign:
    if sign is None:
        return Sign()
    return Sign(words=_words(sign)) if sign.dtype == torch.int32 else Sign(scores=_matrix(sign))


def _words(packed: Tensor) -> int:
    assert packed.is_contiguous()
    assert packed.dtype == torch.int32
    return packed.data_ptr() or _nowhere()


_NOWHERE = ctypes.create_string_buffer(64)


def _nowhere() -> int:
    return ctypes.addressof(_NOWHERE)


def _call_with_workspace(function: str, asked: Product | ScoreGrad, device: dict) -> None:
    workspace = _new((plan(function, asked, device).workspace // 4,), torch.float32)
    asked.workspace = workspace.data_ptr() or None
    _call(function, asked, device)


def _call(function: str, asked: ctypes.Structure, device: dict) -> None:
    kernel = getattr(library(), f"emulated_{function}")
    kernel.restype = ctypes.c_char_p
    error = kernel(ctypes.byref(asked), ctypes.byref(_device(device))).decode()
    if error:
        raise RuntimeError(f"{function}: {error}")


def _device(asked: dict) -> Device:
    settings = dict(asked)
    arch = settings.pop("arch", usual_arch)
    of_arch = (90, 228 * 1024) if arch in ("sm_90", "hopper") else (80, 164 * 1024)
    usual = {"multiprocessors": 4, "l2_bytes": 40 << 20}
    settings = usual | dict(zip(("capability", "shared_bytes"), of_arch, strict=True)) | settings
    return Device(None, **settings)


_guards: list[bool] = []  # whether outputs end at a guard page, or begin behind one; empty: neither


@contextmanager
def outputs_at_guard_pages(*, at_end: bool) -> Iterator[None]:
    """Within the context, an access behind (or, unless ``at_end``, before) an output ends the process."""
    _guards.append(at_end)
    try:
        yield
    finally:
        _guards.pop()


def _new(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if _guards:
        tensor = guarded(tensor, at_end=_guards[-1])
    if dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    return tensor.fill_({torch.uint8: 0xAA, torch.int16: -21846}.get(dtype, _POISON))
