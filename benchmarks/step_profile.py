"""Show where time goes: the profiler's self time of each operator, summed by kind."""

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# An operator belongs to the first kind that names it; if none does, to the kind of its caller, and so on upwards.
KINDS = {
    "optimiser": ("Optimizer.step", "MasterAdamW.step", "mft::score_step"),
    "threshold and packing": (
        "mft::select_mask",
        "mft::kept_threshold",
        "mft_cpu::kept_threshold",
        "mft::pack_",
        "_SortedSubnet",
        "aten::sort",
    ),
    "dequantisation": ("bitsandbytes::", "mft::dequantize"),
    "attention": ("aten::scaled_dot_product", "aten::_scaled_dot_product"),
    "loss": ("aten::cross_entropy", "aten::_softmax", "aten::_log_softmax", "aten::nll_loss", "aten::log_softmax"),
    "products": ("mft::masked_linear", "mft::accumulate_score_grad", "aten::linear", "aten::mm", "aten::addmm"),
}
REST = "elementwise and the rest"


def profile_step(step: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds by kind. Time outside all operators is the rest, so that the sum is the step's time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        total = (time.perf_counter() - start) * 1e3
    return time_by_kind(profiler, total)


def time_by_kind(profiler: profile, total: float) -> dict[str, float]:
    """Return milliseconds by kind from a profile that took ``total``."""
    spent = dict.fromkeys((*KINDS, REST), 0.0)
    for event in profiler.events():
        spent[kind_of(event)] += event.self_cpu_time_total / 1e3
    spent[REST] += total - sum(spent.values())
    return spent


def kind_of(event) -> str:
    """Return the kind of a profiler event, by its own name or its callers'."""
    while event is not None:
        for kind, prefixes in KINDS.items():
            if event.name.startswith(prefixes):
                return kind
        event = event.cpu_parent
    return REST
