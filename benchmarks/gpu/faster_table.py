"""Make the table by which "auto" takes CUDA's kernels (backends/faster.py) from a run, if they were correct."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .cases import AUTO, AUTO_PACKED, CUDA, CUDA_CHECKS, CUDA_PACKED, FUSED, SANITIZERS
from .results import FAILED, MEASURED, Document, Record

FASTER = "gpu-faster.json"

#: Share of the time of auto's other choice: below this, CUDA's kernel is faster beyond the noise of timing.
_FASTER = 0.98

#: One measurement of an op: (size, milliseconds by "auto", by CUDA).
_Times = tuple[int, float, float]
_BF16 = "bfloat16"


def table(documents: Sequence[Document]) -> dict[str, Any] | None:
    """Return the content of faster.json, or None.

    None unless every check of CUDA's kernels ran and passed, and something was timed. Timings count only from the card
    and sources that were checked. A size counts as faster if it is faster on every timed shape.
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
        "triton": ".".join(str(checked.get("triton", "")).split(".")[:2]),  # decides the form of its kernels
        "capability": checked.get("capability"),  # None in a dry run, whose table is for no card
        "ops": ops,
    }


def is_wrong(documents: Iterable[Document]) -> bool:
    """Whether CUDA's kernels failed a check or a timed case. Then an earlier table must go too."""
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
    for op, dtypes, names in (
        ("masked_linear", [_BF16, _BF16], (AUTO, CUDA)),
        ("masked_linear_packed", [_BF16], (AUTO_PACKED, CUDA_PACKED)),
    ):
        forward, steps = _pairs(records, "forward", *names), _pairs(records, "step", *names)
        yield op, dtypes, _of_tokens(forward)
        # A step is a forward and a backward.
        both = steps.keys() & forward.keys()
        backward = {key: (steps[key][0] - forward[key][0], steps[key][1] - forward[key][1]) for key in both}
        yield f"{op}_backward", dtypes, _of_tokens(backward)
    yield "masked_linear_many", [_BF16], _of_tokens(_pairs(records, "many", FUSED, CUDA))
    accumulate = _pairs(records, "accumulate", FUSED, CUDA)
    yield "accumulate_score_grad", [_BF16, "float32"], _of_tokens(accumulate)
    for op in ("kept_threshold", "pack_mask", "pack_signs"):
        for dtype in (_BF16, "float32"):
            found = _pairs(records, "threshold", op, f"{op}, {CUDA}", dtype)
            yield op, [dtype], [(n * k, *times) for (n, k, _), times in found.items()]
    added = _pairs(records, "accumulate_product", FUSED, CUDA)
    yield "accumulate_product", [_BF16, "float32"], _of_tokens(added)


def _of_tokens(found: Mapping[tuple[int, int, int], tuple[float, float]]) -> list[_Times]:
    return [(m, *times) for (_, _, m), times in found.items()]


def _pairs(
    records: Iterable[Record], what: str, auto: str, cuda: str, detail: str = ""
) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Return {(n, k, m): medians of both} of the cases that timed both; a CUDA kernel that did not end has infinity."""
    found = {}
    for record in records:
        times = {name: sample["ms"]["median"] for name, sample in record.get("samples", {}).items() if "ms" in sample}
        times |= dict.fromkeys([cuda] if CUDA in record.get("slow", {}) else [], math.inf)
        if (record["what"], record["detail"]) == (what, detail) and {auto, cuda} <= times.keys():
            found[record["n"], record["k"], record["m"]] = times[auto], times[cuda]
    return found
