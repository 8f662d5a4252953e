"""The CUDA kernels on CPU tensors: every kernel's file compiled with g++ for the emulator, called like the reference.

The functions have the names and arguments of ``mft_kernels.reference``, and keywords for what a device would decide:
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
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from guarded import guarded
from torch import Tensor

from mft_kernels.reference.linear import Gradients, kept_count

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "cuda_kernels"
PROGRAMS = SOURCES / "programs"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # only nvcc knows "unroll"
NUMBERS = "-ffp-contract=off"  # round products and sums separately, even if the host could fuse them
INCLUDE = [f"-I{folder}" for folder in (ROOT / "csrc/cuda", PROGRAMS, SOURCES)]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", NUMBERS, *WARNINGS, *INCLUDE]
NOT_EMULATED = (
    "score_grad_sm90_",
    "bindings",
)  # these need CUTLASS, torch or the driver

usual_arch = "sm_80"

ASYNCHRONIES = ("at_issue", "as_late_as_possible", "random")
SCHEDULES = ("in_turn", "by_rank")  # by rank, a warp may run far ahead of another

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POISON = -1431655766  # 0xaaaaaaaa

Pointer, Int64 = ctypes.c_void_p, ctypes.c_int64


class NotBuilt(RuntimeError):
    """Why there is no library on this machine."""


class Matrix(ctypes.Structure):
    _fields_ = (("data", Pointer), ("type", ctypes.c_int), ("rows", Int64), ("columns", Int64), ("stride", Int64))


class Keep(ctypes.Structure):
    _fields_ = (
        ("words", Pointer),
        ("scores", Matrix),
        ("thresholds", Pointer),
        ("threshold_stride", Int64),
        ("magnitude", ctypes.c_bool),
    )


class Sign(ctypes.Structure):
    _fields_ = (("scores", Matrix), ("words", Pointer))


class Product(ctypes.Structure):
    _fields_ = (
        ("out", Matrix),
        ("in", Matrix),
        ("weight", Matrix),
        ("keep", Keep),
        ("bias", Pointer),
        ("transposed", ctypes.c_bool),
        ("workspace", Pointer),
        ("tokens", ctypes.c_int),
        ("parts", ctypes.c_int),
    )


class ScoreGrad(ctypes.Structure):
    _fields_ = (
        ("d_scores", Matrix),
        ("d_weight", Matrix),
        ("grad_output", Matrix),
        ("x", Matrix),
        ("weight", Matrix),
        ("sign", Sign),
        ("keep", Keep),
        ("accumulate", ctypes.c_bool),
        ("workspace", Pointer),
    )


class Select(ctypes.Structure):
    _fields_ = (
        ("scores", Pointer),
        ("type", ctypes.c_int),
        ("count", Int64),
        ("k", Int64),
        ("magnitude", ctypes.c_bool),
        ("threshold", Pointer),
        ("workspace", Pointer),
    )


class PackMask(ctypes.Structure):
    _fields_ = (("words", Pointer), ("keep", Keep))


class PackSigns(ctypes.Structure):
    _fields_ = (("words", Pointer), ("zeros", Pointer), ("scores", Matrix))


class Device(ctypes.Structure):
    _fields_ = (
        ("stream", Pointer),
        ("multiprocessors", ctypes.c_int),
        ("capability", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("l2_bytes", ctypes.c_int),
    )


class Plan(ctypes.Structure):
    _fields_ = (
        ("cycles", ctypes.c_double),
        ("tokens", ctypes.c_int),
        ("parts", ctypes.c_int),
        ("workspace", Int64),
    )


_STRUCTS = {
    "product": Product,
    "score_grad": ScoreGrad,
    "select": Select,
    "pack_mask": PackMask,
    "pack_signs": PackSigns,
    "device": Device,
    "plan": Plan,
}

# ------------------------------------------------------------------------------------------------------- building


@functools.cache
def library() -> ctypes.CDLL:
    """Build what has changed. MFT_EMULATED=select,pack builds only files with these prefixes, in a separate folder."""
    wanted = tuple(filter(None, os.environ.get("MFT_EMULATED", "").split(",")))
    sources = [s for pattern in ("*.cu", "*.cpp") for s in sorted((ROOT / "csrc/cuda").glob(pattern))]
    kernels = [s for s in sources if not s.name.startswith(NOT_EMULATED) and s.name.startswith(wanted or "")]
    path = _build(
        ROOT / "build" / "-".join(["cuda_emulated", *wanted]),
        [*kernels, SOURCES / "emulator/machine.cpp", PROGRAMS / "emulated.cpp"],
    )
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


def _build(directory: Path, sources: list[Path]) -> Path:
    gxx, ninja = compiler(), _ninja()
    directory.mkdir(parents=True, exist_ok=True)
    # fmt: off
    lines = [
        "rule compile", f"  command = {gxx} {' '.join(FLAGS)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d", "  deps = gcc",
        "rule link", f"  command = {gxx} -shared $in -o $out",
        *(f"build {source.name}.o: compile {source}" for source in sources),
        f"build libemulated.so: link {' '.join(f'{source.name}.o' for source in sources)}", "",
    ]
    # fmt: on
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs build one after the other
        (directory / "build.ninja").write_text("\n".join(lines))
        built = subprocess.run([ninja, "-C", str(directory), "-j2"], capture_output=True, text=True)
        if built.returncode != 0:
            raise RuntimeError(f"the emulated kernels do not compile:\n{built.stdout}{built.stderr}")
    return directory / "libemulated.so"


def _ninja() -> str:
    beside_python = Path(sys.executable).parent / "ninja"
    path = shutil.which("ninja") or (str(beside_python) if beside_python.exists() else None)
    if path is None:
        raise NotBuilt("the emulator is built with ninja, and there is none; pip install ninja")
    return path


def set_settings(seed: int = 0, asynchrony: str = "random", schedule: str = "in_turn") -> None:
    """Set the order of warps and blocks, and when background work happens, for all later launches."""
    library().emulated_set_settings(ctypes.c_uint(seed), ASYNCHRONIES.index(asynchrony), SCHEDULES.index(schedule))


# ---------------------------------------------------------------------------------------- the reference's functions


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor, bias: Tensor | None, mode: str, **device
) -> Tensor:
    return _linear(x, weight, _keep(scores, threshold, mode), bias, device)


def masked_linear_packed(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, **device) -> Tensor:
    return _linear(x, weight, Keep(words=_words(packed)), bias, device)


def masked_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    mode: str,
    output_mask: list[bool],
    **device,
) -> Gradients:
    keep = _keep(scores, threshold, mode)
    return _backward(grad_output, x, weight, keep, scores, None, mode, output_mask, device)


def masked_linear_packed_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    output_mask: list[bool],
    **device,
) -> Gradients:
    keep = Keep(words=_words(packed))
    return _backward(grad_output, x, weight, keep, scores, signs, mode, output_mask, device)


def accumulate_score_grad(
    out: Tensor,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    **device,
) -> None:
    grad, rows = _rows(grad_output), _rows(x)
    asked = ScoreGrad(
        d_scores=_matrix(out),
        grad_output=_matrix(grad),
        x=_matrix(rows),
        weight=_matrix(weight),
        sign=_sign(scores, signs, mode),
        accumulate=True,
    )
    _score_grad(asked, device)


def accumulate_product(out: Tensor, grad_output: Tensor, x: Tensor, **device) -> None:
    grad, rows = _rows(grad_output), _rows(x)
    weight = Matrix(None, _TYPES[x.dtype], *out.shape, out.shape[1])
    asked = ScoreGrad(d_scores=_matrix(out), grad_output=_matrix(grad), x=_matrix(rows), weight=weight, accumulate=True)
    _score_grad(asked, device)


def kept_threshold(scores: Tensor, keep_ratio: float, mode: str, **device) -> Tensor:
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


def pack_mask(scores: Tensor, threshold: Tensor, mode: str, **device) -> Tensor:
    words = _new((scores.shape[0], -(-scores.shape[1] // 32)), torch.int32)
    _call("pack_mask", PackMask(words=words.data_ptr(), keep=_keep(scores, threshold, mode)), device)
    return words


def pack_signs(scores: Tensor, **device) -> tuple[Tensor, Tensor]:
    words = _new((scores.shape[0], -(-scores.shape[1] // 32)), torch.int32)
    zeros = _new((), torch.int64)
    asked = PackSigns(words=words.data_ptr(), zeros=zeros.data_ptr(), scores=_matrix(scores))
    _call("pack_signs", asked, device)
    return words, zeros


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


def _linear(x: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, device: dict) -> Tensor:
    rows = _rows(x)
    out = _new((rows.shape[0], weight.shape[0]), x.dtype)
    _product(out, rows, weight, keep, bias, False, device)
    return out.view(*x.shape[:-1], weight.shape[0])


def _product(
    out: Tensor, rows: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, transposed: bool, device: dict
) -> None:
    asked = Product(out=_matrix(out), weight=_matrix(weight), keep=keep, transposed=transposed)
    setattr(asked, "in", _matrix(rows))  # a Python keyword
    if bias is not None:
        assert bias.is_contiguous()
        assert bias.dtype == weight.dtype
        asked.bias = bias.data_ptr()
    kernel = f"product_{device.get('arch', usual_arch).replace('_', '')}"
    if kernel == "product_hopper":  # its own kernel if it takes the operands, like the bindings
        kernel = "product_sm90" if plan("product_sm90", asked, device).tokens else "product_sm80"
    workspace = _new((plan(kernel, asked, device).workspace // 4,), torch.float32)
    asked.workspace = workspace.data_ptr() or None
    _call(kernel, asked, device)


def _score_grad(asked: ScoreGrad, device: dict) -> None:
    workspace = _new((plan("score_grad_sm80", asked, device).workspace // 4,), torch.float32)
    asked.workspace = workspace.data_ptr() or None
    _call("score_grad_sm80", asked, device)


def _backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Keep,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    output_mask: list[bool],
    device: dict,
) -> Gradients:
    grad, rows = _rows(grad_output), _rows(x)
    empty = grad_output.new_empty(0)
    d_x = d_weight = d_scores = d_bias = empty
    if output_mask[0]:
        d_x = _new((grad.shape[0], weight.shape[1]), weight.dtype)
        _product(d_x, grad, weight, keep, None, True, device)
        d_x = d_x.view(*grad_output.shape[:-1], weight.shape[1])
    if output_mask[1] or output_mask[2]:
        asked = ScoreGrad(grad_output=_matrix(grad), x=_matrix(rows), weight=_matrix(weight))
        if output_mask[1]:
            d_weight = _new(weight.shape, weight.dtype)
            asked.d_weight, asked.keep = _matrix(d_weight), keep
        if output_mask[2]:
            d_scores = _new(weight.shape, scores.dtype if scores is not None else torch.float32)
            asked.d_scores, asked.sign = _matrix(d_scores), _sign(scores, signs, mode)
        _score_grad(asked, device)
    if output_mask[3]:
        d_bias = grad.sum(0)
    return d_x, d_weight, d_scores, d_bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _matrix(tensor: Tensor) -> Matrix:
    rows, columns = tensor.shape
    assert columns <= 1 or tensor.stride(1) == 1, "the kernels take matrices of unit column stride"
    data = tensor.data_ptr() or _nowhere()  # null would mean that the matrix is not wanted
    return Matrix(data, _TYPES[tensor.dtype], rows, columns, tensor.stride(0))


def _keep(scores: Tensor, threshold: Tensor, mode: str) -> Keep:
    assert threshold.dtype == scores.dtype
    return Keep(
        scores=_matrix(scores),
        thresholds=threshold.data_ptr() or _nowhere(),
        threshold_stride=threshold.stride(0) if threshold.dim() == 1 else 0,
        magnitude=mode == "magnitude",
    )


def _sign(scores: Tensor | None, signs: Tensor | None, mode: str) -> Sign:
    if mode == "value":
        return Sign()
    if signs is not None:
        return Sign(words=_words(signs))
    assert scores is not None, "magnitude mode takes the sign from scores or signs"
    return Sign(scores=_matrix(scores))


def _words(packed: Tensor) -> int:
    assert packed.is_contiguous()
    assert packed.dtype == torch.int32
    return packed.data_ptr() or _nowhere()


_NOWHERE = ctypes.create_string_buffer(64)


def _nowhere() -> int:
    return ctypes.addressof(_NOWHERE)


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
