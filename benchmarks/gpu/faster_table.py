"""From a run to the table by which "auto" takes CUDA's kernels (backends/faster.py), once they were correct."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .cases import AUTO, CUDA, CUDA_CHECKS, FUSED, SANITIZERS
from .once_a_step import SCHEMES, TRITON
from .results import FAILED, MEASURED, Document, Record

FASTER = "gpu-faster.json"

#: Of the time of what "auto" takes else: below, CUDA's kernel is faster and not merely timed so.
_FASTER = 0.98

#: One measurement of an op: (size, milliseconds by "auto", by CUDA).
_Times = tuple[int, float, float]
_BF16 = "bfloat16"


def table(documents: Sequence[Document]) -> dict[str, Any] | None:
    """What faster.json holds; None unless every check of CUDA's kernels was made and passed, and something was timed.

    What was timed counts where it was the card and the sources that were checked. A size counts as faster where it is
    on every shape that was timed.
    """
    checked = next((document["environment"] for document in documents if document["what"] == "correctness"), {})
    same = [document for document in documents if _identity(document["environment"]) == _identity(checked)]
    records = _records(same)
    passed = {record["detail"] for record in records if _is_check(record) and record["status"] == MEASURED}
    if not passed.issuperset(CUDA_CHECKS) or is_wrong(same):
        return None
    ops = []
    for op, dtypes, times in _ops(records):
        sizes: dict[int, bool] = {}
        for size, by_auto, by_cuda in times:
            sizes[size] = sizes.get(size, True) and by_cuda <= _FASTER * by_auto
        if sizes:
            ops.append({"op": op, "dtypes": dtypes, "sizes": {str(size): sizes[size] for size in sorted(sizes)}})
    if not ops:
        return None
    return {
        "device": checked.get("device"),
        "date": checked.get("date"),
        "sources": checked.get("sources"),
        "triton": ".".join(str(checked.get("triton", "")).split(".")[:2]),  # they decide the form of its kernels
        "capability": checked.get("capability"),  # a dry run has none, and its table is for no card
        "ops": ops,
    }


def is_wrong(documents: Iterable[Document]) -> bool:
    """Whether a check of CUDA's kernels failed, or one of them where it was timed: then an earlier table goes too."""
    return any(
        (_is_check(record) and record["status"] == FAILED) or any(CUDA in name for name in record.get("failures", {}))
        for record in _records(documents)
    )


def _records(documents: Iterable[Document]) -> list[Record]:
    return [record for document in documents for record in document["cases"]]


def _identity(environment: Mapping[str, Any]) -> tuple[Any, ...]:
    return environment.get("device"), environment.get("sources")


def _is_check(record: Record) -> bool:
    return record["what"] == "correctness" and record["detail"] in (*CUDA_CHECKS, *SANITIZERS)


def _ops(records: Sequence[Record]) -> Iterable[tuple[str, list[str], list[_Times]]]:
    both = [_BF16, _BF16]
    forward = _pairs(records, "forward", AUTO, CUDA)
    yield "masked_linear", both, [(m, *times) for (_, _, m), times in forward.items()]
    # A step is a forward and a backward.
    steps = _pairs(records, "step", AUTO, CUDA)
    backward = {key: [a - b for a, b in zip(steps[key], forward[key])] for key in steps.keys() & forward.keys()}
    yield "masked_linear_backward", both, [(m, by_auto, by_cuda) for (_, _, m), (by_auto, by_cuda) in backward.items()]
    accumulate = _pairs(records, "accumulate", FUSED, CUDA)
    yield "accumulate_score_grad", [_BF16, "float32"], [(m, *times) for (_, _, m), times in accumulate.items()]
    for op in ("kept_threshold", "pack_mask", "pack_signs"):
        for dtype in (_BF16, "float32"):
            found = _pairs(records, "threshold", op, f"{op}, {CUDA}", lambda r, dtype=dtype: r["detail"] == dtype)
            yield op, [dtype], [(n * k, *times) for (n, k, _), times in found.items()]
    added = _pairs(records, "accumulate_product", FUSED, CUDA)
    yield "accumulate_product", [_BF16, "float32"], [(m, *times) for (_, _, m), times in added.items()]
    for scheme, (scores, _) in SCHEMES.items():
        # int16 is no dtype of the table of backends.
        dtypes = [*(["float32"] if scores.is_floating_point else []), "float32", _BF16]
        steps = _pairs(records, "score_step", f"{scheme}, {TRITON}", f"{scheme}, {CUDA}")
        yield "score_step", dtypes, [(n * k, *times) for (n, k, _), times in steps.items()]


def _pairs(
    records: Iterable[Record], what: str, auto: str, cuda: str, only: Callable[[Record], bool] = lambda _: True
) -> dict[tuple[int, int, int], tuple[float, float]]:
    """{(n, k, m): medians of both} of the cases in which both were timed; no end of CUDA's kernels is infinite."""
    found = {}
    for record in records:
        times = {name: sample["ms"]["median"] for name, sample in record.get("samples", {}).items() if "ms" in sample}
        times |= dict.fromkeys([cuda] if CUDA in record.get("slow", {}) else [], math.inf)
        if record["what"] == what and only(record) and {auto, cuda} <= times.keys():
            found[record["n"], record["k"], record["m"]] = times[auto], times[cuda]
    return found
