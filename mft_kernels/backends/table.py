"""The table: which implementation serves an op on a device, which one ``auto`` takes, and why not the others.

Other packages enter theirs by ``register``; docs/adding-a-kernel.md shows how.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import torch

from .. import reference
from ..reference import grouped as reference_grouped
from ..reference import quantized as reference_quantized
from ..reference import step as reference_step
from . import faster

logger = logging.getLogger("mft_kernels")

#: ``auto`` takes the first of these that can serve the op; the reference serves everything.
PREFERENCE = ("cuda", "triton", "cpu", "reference")
#: Modules that other packages name under this group of entry points are imported with mft_kernels.
ENTRY_POINTS = "mft_kernels.backends"


@dataclass(frozen=True)
class Backend:
    """One set of implementations: functions with the names and arguments of ``reference``."""

    name: str
    device_types: frozenset[str]  # empty: every device
    dtypes: frozenset[torch.dtype]  # of weight and scores; empty: every floating dtype
    ops: Mapping[str, Callable]
    unavailable: str | None = None  # why it cannot run on this machine; None when it can
    detail: str = ""  # what is running, for instance the instruction set
    automatic: Mapping[str, Callable] = field(default_factory=dict)  # what "auto" runs in place of those of ``ops``
    on_request: str | None = None  # why "auto" passes it over; None when it does not
    short: Mapping[str, Callable] = field(default_factory=dict)  # what declines, with None, a call that is not usual

    def refusal(self, op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why this backend cannot serve ``op`` there; None when it can."""
        if self.unavailable is not None:
            return self.unavailable
        if op not in self.ops:
            return f"it has no {op}"
        if self.device_types and device.type not in self.device_types:
            return f"it runs on {', '.join(sorted(self.device_types))}, got a tensor on {device}"
        if self.dtypes and not self.dtypes.issuperset(dtypes):
            have = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"it takes {have}, got {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
        return None


_TABLE: dict[str, Backend] = {}
_order = list(PREFERENCE)  # with the backends from outside that have a place
_announced: set[tuple[str, str]] = set()
_chosen: dict[tuple, Callable] = {}  # what choose() has found, since the last backend was registered
#: The short ways of what "auto" has taken for an op and a weight's dtype, since then too.
short_ways: dict[tuple[str, torch.dtype], Callable] = {}


def register(backend: Backend, *, before: str | None = None) -> None:
    """Enter a backend into the table, under a name that is still free.

    Args:
        before: the backend that "auto" is to ask after this one. None: "auto" passes it over, and a request by name,
            backend= or MFT_KERNELS, takes it.
    Raises: ValueError for a name that is taken or an op that there is not.
    """
    if backend.name in ("", "auto"):
        raise ValueError(f"name of a backend must be a word of its own, got {backend.name!r}")
    if backend.name in _TABLE:
        raise ValueError(f"backend {backend.name!r} is registered already; take another name")
    ops = _TABLE["reference"].ops if "reference" in _TABLE else backend.ops
    if unknown := backend.ops.keys() - ops.keys():
        raise ValueError(f"ops of {backend.name!r} must be among {tuple(ops)}, got {', '.join(sorted(unknown))}")
    if before is not None:
        if before not in _order:
            raise ValueError(f"before must be a backend that auto asks, one of {tuple(_order)}, got {before!r}")
        _order.insert(_order.index(before), backend.name)
    _TABLE[backend.name] = backend
    _chosen.clear()
    short_ways.clear()


def registered(name: str) -> Backend:
    """The backend of that name, for instance to borrow ops from. Raises: ValueError if there is none."""
    if name not in _TABLE:
        raise ValueError(f"name must be one of {tuple(_TABLE)}, got {name!r}; import the module that registers it")
    return _TABLE[name]


def asked_for() -> str:
    """What the environment variable MFT_KERNELS asks for: the name of a backend, or "auto"."""
    return os.environ.get("MFT_KERNELS") or "auto"


def import_entry_points() -> None:
    """Import what other packages name in the group ENTRY_POINTS: each registers its backends."""
    for entry_point in metadata.entry_points(group=ENTRY_POINTS):
        entry_point.load()


def choose(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], requested: str = "auto") -> Callable:
    """The function that serves ``op`` on ``device``.

    ``requested`` is "auto" or a backend's name; with "auto" the environment variable MFT_KERNELS may name one.
    Raises: ValueError for an unknown name; RuntimeError, with the reason, when a named backend cannot serve the op.
    """
    source = "backend"
    if requested == "auto":
        requested, source = asked_for(), "MFT_KERNELS"
    call = op, device, dtypes, requested, source
    found = _chosen.get(call)
    if found is None:
        found = _chosen[call] = _find(*call)
    return found


def backend_report() -> dict[str, dict]:
    """What is available, what ``auto`` chooses (MFT_KERNELS aside) and why not the others.

    Returns: {"backends": {name: {"available": bool, "detail": str, "reason": str | None}},
    "auto": {device type: name}}, for the device types that this machine has.
    """
    backends = {}
    for name in _names():
        reason = _TABLE[name].unavailable if name in _TABLE else "not implemented yet"
        detail = _TABLE[name].detail if name in _TABLE else ""
        backends[name] = {"available": reason is None, "detail": detail, "reason": reason}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    auto = {d: _automatic("masked_linear", torch.device(d), (torch.float32,)).name for d in devices}
    return {"backends": backends, "auto": auto}


def _find(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], requested: str, source: str) -> Callable:
    if requested == "auto":
        backend = _automatic(op, device, dtypes)
        if op in backend.short:
            short_ways[op, dtypes[0]] = backend.short[op]
        return _or_faster(op, device, dtypes, backend.automatic.get(op, backend.ops[op]))
    if requested not in _names():
        raise ValueError(
            f"{source} must be one of {('auto', *_names())}, got {requested!r}; one from elsewhere is there once the "
            "module that registers it is imported"
        )
    reason = _refusal(requested, op, device, dtypes)
    if reason is not None:
        raise RuntimeError(f"{source}={requested!r} cannot serve {op}: {reason}; use 'auto' or 'reference'")
    return _TABLE[requested].ops[op]


def _names() -> list[str]:
    """In the order in which "auto" asks, then those that it does not ask."""
    return [*_order, *(name for name in _TABLE if name not in _order)]


def _refusal(name: str, op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    return _TABLE[name].refusal(op, device, dtypes) if name in _TABLE else "not implemented yet"


def _automatic(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Backend:
    refusals: list[tuple[str, str]] = []
    for name in _order:
        reason = _refusal(name, op, device, dtypes)
        if reason is None:
            reason = _TABLE[name].on_request
        if reason is None:
            _announce(op, device, name, refusals)
            return _TABLE[name]
        refusals.append((name, reason))
    raise AssertionError(f"the reference serves every op, but not {op}")


def _or_faster(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], run: Callable) -> Callable:
    """What "auto" runs: ``run``, and CUDA's kernel where a stored measurement says that it is faster."""
    if device.type != "cuda" or _refusal("cuda", op, device, dtypes) is not None:
        return run
    return faster.where_faster(op, device, dtypes, run, _TABLE["cuda"].ops[op])


def _announce(op: str, device: torch.device, chosen: str, refusals: list[tuple[str, str]]) -> None:
    if (op, device.type) in _announced:
        return
    _announced.add((op, device.type))
    # A slow path where a kernel of ours exists for this device is worth a warning; the rest is information.
    missed = [n for n, _ in refusals if n in _TABLE and device.type in _TABLE[n].device_types]
    level = logging.WARNING if chosen == "reference" and missed else logging.INFO
    why = "; ".join(f"not {name}: {reason}" for name, reason in refusals)
    logger.log(level, "%s on %s: %s (%s)", op, device.type, chosen, why)


register(
    Backend(
        name="reference",
        device_types=frozenset(),
        dtypes=frozenset(),
        ops={
            f.__name__: f
            for f in (
                reference.masked_linear,
                reference.masked_linear_backward,
                reference.masked_linear_packed,
                reference.masked_linear_packed_backward,
                reference.masked_linear_many,
                reference.masked_linear_many_backward,
                reference.accumulate_score_grad,
                reference.accumulate_product,
                reference.kept_threshold,
                reference.pack_mask,
                reference.pack_signs,
                reference_step.score_step,
                reference_quantized.dequantize,
                reference_quantized.masked_linear_quantized,
                reference_quantized.masked_linear_quantized_d_x,
                reference_grouped.grouped_product,
                reference_grouped.grouped_score_grad,
                reference_grouped.kept_thresholds,
            )
        },
        detail="plain PyTorch",
    )
)
