"""The table of backends: whose function serves an op on a device, which one ``auto`` takes, and why not the others.

Other packages add their backends by ``register``; docs/how-to/adding-a-kernel.md shows how.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import NamedTuple

import torch

from ..codes import Codes
from ..operands import Experts, KeepByTask
from ..reference import functions as reference
from . import faster
from .gradients import by_two_functions
from .selection import select_by_pieces

logger = logging.getLogger("mft_kernels")

#: ``auto`` takes the first of these that can serve the op; the reference serves everything.
PREFERENCE = ("cuda", "triton", "cpu", "reference")
#: Modules that other packages name under this group of entry points are imported with mft_kernels.
ENTRY_POINTS = "mft_kernels.backends"


Dtypes = tuple[torch.dtype, ...]
#: Functions that a backend may serve; reference/functions.py says what each computes. A backend without "gradients"
#: uses "product" and "score_grad" for them. The last three are passes for masks in place, which the reference has too.
#: choose() also finds "select_mask", which is put together from "select", "pack" and "signs".
FUNCTIONS = (
    *("product", "score_grad", "gradients", "select", "pack", "signs", "step", "decode"),
    *("put_aside", "put_back", "drop"),
)
#: What a function may be given instead of a matrix, scores or one packed mask; each backend says which it takes.
OPERANDS = frozenset({Codes, Experts, KeepByTask})


@dataclass(frozen=True)
class Backend:
    """One set of implementations: functions with the names and arguments of reference/functions.py."""

    name: str
    device_types: frozenset[str]  # empty: every device
    dtypes: frozenset[torch.dtype]  # of weight and scores; empty: every floating dtype
    functions: Mapping[str, Callable]
    takes: frozenset[type] = frozenset()  # of OPERANDS or their subclasses; a class stands for its own subclasses too
    unavailable: str | None = None  # why it cannot run on this machine; None when it can
    detail: str = ""  # what is running, for instance the instruction set
    automatic: Mapping[str, Callable] = field(default_factory=dict)  # what "auto" runs in place of some functions
    on_request: str | None = None  # why "auto" passes it over; None when it does not
    short: Mapping[str, Callable] = field(default_factory=dict)  # by op: declines an unusual call by returning None

    def function(self, name: str, *, automatic: bool = False) -> Callable:
        """Return one of FUNCTIONS, as a request by name runs it, or as "auto" does if automatic."""
        chosen = {**self.functions, **self.automatic} if automatic else self.functions
        if name in chosen:
            return chosen[name]
        return functools.partial(by_two_functions, chosen["product"], chosen["score_grad"])

    def takes_operand(self, operand: type) -> bool:
        """Return whether one of ``takes`` stands for this class."""
        return issubclass(operand, tuple(self.takes))

    def refusal(
        self, function: str, device: torch.device, dtypes: Dtypes, operands: frozenset[type] = frozenset()
    ) -> str | None:
        """Return why this backend cannot serve ``function`` there; None if it can."""
        if self.unavailable is not None:
            return self.unavailable
        needed = ("product", "score_grad") if function == "gradients" else (function,)
        missing = [name for name in needed if function not in self.functions and name not in self.functions]
        if missing:
            return f"it has no {missing[0]}"
        if unknown := [each for each in operands if not self.takes_operand(each)]:
            return f"its {function} takes no {' and no '.join(sorted(each.__name__ for each in unknown))}"
        if self.device_types and device.type not in self.device_types:
            return f"it runs on {', '.join(sorted(self.device_types))}, got a tensor on {device}"
        if self.dtypes and not self.dtypes.issuperset(dtypes):
            have = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"it takes {have}, got {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
        return None


class Request(NamedTuple):
    """What choose() is asked for."""

    op: str  # the op's name, for messages and measurements
    function: str
    operands: frozenset[type]
    device: torch.device
    dtypes: Dtypes


_TABLE: dict[str, Backend] = {}
_order = list(PREFERENCE)  # with the registered backends that "auto" asks
_announced: set[tuple[str, str]] = set()
_chosen: dict[tuple, Callable] = {}  # what choose() has found, since the last backend was registered
#: By op and a weight's dtype, the short way of the backend that "auto" has taken, since the last registration too.
short_ways: dict[tuple[str, torch.dtype], Callable] = {}


def register(backend: Backend, *, before: str | None = None) -> None:
    """Add a backend to the table, under a name that is still free.

    Args:
        before: the backend that "auto" asks after this one. None: "auto" never takes this one; only a request by
            name does, with backend= or MFT_KERNELS.
    Raises: ValueError for a name that is taken or an unknown function.
    """
    if backend.name in ("", "auto"):
        raise ValueError(f"name of a backend must not be empty or 'auto', got {backend.name!r}")
    if backend.name in _TABLE:
        raise ValueError(f"backend {backend.name!r} is registered already; take another name")
    if unknown := backend.functions.keys() - set(FUNCTIONS):
        raise ValueError(f"functions of {backend.name!r} must be among {FUNCTIONS}, got {', '.join(sorted(unknown))}")
    if before is not None:
        if before not in _order:
            raise ValueError(f"before must be a backend that auto tries, one of {tuple(_order)}, got {before!r}")
        _order.insert(_order.index(before), backend.name)
    _TABLE[backend.name] = backend
    _chosen.clear()
    short_ways.clear()


def registered(name: str) -> Backend:
    """Return the backend of that name, for instance to use its functions. Raises: ValueError if there is none."""
    if name not in _TABLE:
        raise ValueError(f"name must be one of {tuple(_TABLE)}, got {name!r}; import the module that registers it")
    return _TABLE[name]


def asked_for() -> str:
    """Return what the environment variable MFT_KERNELS asks for: the name of a backend, or "auto"."""
    return os.environ.get("MFT_KERNELS") or "auto"


def import_entry_points() -> None:
    """Import the modules that other packages name in the group ENTRY_POINTS. Each registers its backends."""
    for entry_point in metadata.entry_points(group=ENTRY_POINTS):
        entry_point.load()


def choose(
    function: str,
    device: torch.device,
    dtypes: Dtypes,
    requested: str = "auto",
    *,
    op: str | None = None,
    operands: frozenset[type] = frozenset(),
) -> Callable:
    """Return the function that serves a call on ``device``.

    Args:
        function: one of FUNCTIONS.
        operands: the classes among the call's operands that are OPERANDS or their subclasses.
        requested: "auto" or a backend's name; with "auto" the environment variable MFT_KERNELS may name one.
        op: the op that asks; by default the function's name.
    Raises: ValueError for an unknown name; RuntimeError, with the reason, when a named backend cannot serve the call.
    """
    source = "backend"
    if requested == "auto":
        requested, source = asked_for(), "MFT_KERNELS"
    call = Request(op or function, function, operands, device, dtypes), requested, source
    found = _chosen.get(call)
    if found is None:
        found = _chosen[call] = _find(*call)
    return found


def backend_report() -> dict[str, dict]:
    """Return which backends are available, which one ``auto`` chooses without MFT_KERNELS, and why not the others.

    Returns: {"backends": {name: {"available": bool, "detail": str, "reason": str | None}},
    "auto": {device type: name}}, for the device types that this machine has.
    """
    backends = {}
    for name in _names():
        reason = _TABLE[name].unavailable if name in _TABLE else "not implemented yet"
        detail = _TABLE[name].detail if name in _TABLE else ""
        backends[name] = {"available": reason is None, "detail": detail, "reason": reason}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    auto = {d: _automatic(_usual(torch.device(d))).name for d in devices}
    return {"backends": backends, "auto": auto}


def _usual(device: torch.device) -> Request:
    return Request("masked_linear", "product", frozenset(), device, (torch.float32,))


def _find(call: Request, requested: str, source: str) -> Callable:
    if call.function == "select_mask":  # experts are selected together, and packed as one matrix
        pieces = (
            Request("kept_threshold", "select", call.operands, call.device, call.dtypes),
            Request("pack_mask", "pack", frozenset(), call.device, call.dtypes),
            Request("pack_signs", "signs", frozenset(), call.device, call.dtypes),
        )
        select, pack, signs = (_find(piece, requested, source) for piece in pieces)
        return functools.partial(select_by_pieces, select, pack, signs)
    if requested == "auto":
        backend = _automatic(call)
        run = backend.function(call.function, automatic=True)
        is_timed = call.device.type == "cuda" and _refusal("cuda", call) is None
        if short := backend.short.get(call.op):
            short_ways[call.op, call.dtypes[0]] = faster.unless_faster(call, short) if is_timed else short
        return faster.where_faster(call, run, _TABLE["cuda"].function(call.function)) if is_timed else run
    if requested not in _names():
        raise ValueError(
            f"{source} must be one of {('auto', *_names())}, got {requested!r}; import the module that registers "
            "another backend before you name it"
        )
    reason = _refusal(requested, call)
    if reason is not None:
        other = next(name for name in _order if _refusal(name, call) is None)
        raise RuntimeError(f"{source}={requested!r} cannot serve {call.op}: {reason}; use 'auto' or {other!r}")
    return _TABLE[requested].function(call.function)


def _names() -> list[str]:
    """Return the names in the order in which "auto" asks, then those that it does not ask."""
    return [*_order, *(name for name in _TABLE if name not in _order)]


def _refusal(name: str, call: Request) -> str | None:
    if name not in _TABLE:
        return "not implemented yet"
    return _TABLE[name].refusal(call.function, call.device, call.dtypes, call.operands)


def _automatic(call: Request) -> Backend:
    refusals: list[tuple[str, str]] = []
    for name in _order:
        reason = _refusal(name, call)
        if reason is None:
            reason = _TABLE[name].on_request
        if reason is None:
            _announce(call, name, refusals)
            return _TABLE[name]
        refusals.append((name, reason))
    raise AssertionError(f"the reference backend must serve every function, but refuses {call}")


def _announce(call: Request, chosen: str, refusals: list[tuple[str, str]]) -> None:
    device_type = call.device.type
    if (call.op, device_type) in _announced:
        return
    _announced.add((call.op, device_type))
    # A slow path deserves a warning if one of our kernels exists for this device. The rest is information.
    missed = [n for n, _ in refusals if n in _TABLE and device_type in _TABLE[n].device_types]
    level = logging.WARNING if chosen == "reference" and missed else logging.INFO
    why = "; ".join(f"not {name}: {reason}" for name, reason in refusals)
    logger.log(level, "%s on %s: %s (%s)", call.op, device_type, chosen, why)


register(
    Backend(
        name="reference",
        device_types=frozenset(),
        dtypes=frozenset(),
        functions={name: getattr(reference, name) for name in FUNCTIONS if name != "gradients"},
        takes=OPERANDS,
        detail="plain PyTorch",
    )
)
