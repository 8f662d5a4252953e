"""Stored answers: one JSON file per question and instruction set, so that machines can be compared.

    ops-cpu-amx.json, ops-cpu-avx512_bf16.json     times and measured memory, which depend on the processor
    memory_cards-cpu.json                          simulated memory, which does not
    cpu-amx.json                                   the question `cpu`
    ops-cpu-mine.json                              a backend named in MFT_KERNELS, next to ours (side_by_side.py)

The instruction set is the one that the CPU library uses, or the name of the backend that replaces it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mft_kernels.backends.processor import NEEDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TIMINGS = ROOT / "runs" / "paths"  # rows that only fit_choice reads
# Independent of the processor: simulated memory.
ON_ANY = frozenset({"memory_cards"})

Record = Mapping[str, Any]
_NAME = re.compile(r"(?:(?P<question>\w+)-)?cpu(?:-(?P<instruction_set>\w+))?\.json")


def file_name(question: str, instruction_set: str) -> str:
    """Return the file name of the answer to a question on a CPU."""
    name = "cpu" if question == "cpu" else f"{question}-cpu"
    return f"{name}.json" if question in ON_ANY else f"{name}-{instruction_set}.json"


def instruction_set_of(record: Record) -> str:
    """Return the instruction set of a record. Old records have it only in their description of the backend."""
    where = record["environment"]
    return where.get("instruction_set") or where.get("backend", "").removeprefix("C++, ")


def select_records(records: Iterable[tuple[str, Record]], instruction_set: str) -> dict[str, Record]:
    """Select from (file name, record) pairs those of one instruction set and those that need none, by question."""
    found = {}
    for name, record in records:
        if (parts := _NAME.fullmatch(name)) is None:
            continue
        question = parts["question"] or "cpu"
        own = parts["instruction_set"] or ("" if question in ON_ANY else instruction_set_of(record))
        if own in ("", instruction_set):
            found[question] = record
    return found


def read_all(folder: Path) -> list[tuple[str, Record]]:
    """Return (file name, record) of every answer on a CPU in a folder."""
    paths = sorted(path for path in folder.glob("*.json") if question_of(path.name))
    return [(path.name, json.loads(path.read_text())) for path in paths]


def read_records(folder: Path, instruction_set: str) -> dict[str, Record]:
    """Return select_records of a folder."""
    return select_records(read_all(folder), instruction_set)


def read_machines(folder: Path, question: str) -> dict[str, Record]:
    """Return the answers to one question by instruction set, best first, including those of ON_ANY."""
    found = {instruction_set_of(record): record for name, record in read_all(folder) if question_of(name) == question}
    return {name: found[name] for name in sorted(found, key=_rank)}


def machine(record: Record) -> str:
    """Return processor and instruction set, short enough for a column's head."""
    name = re.sub(r"\(R\)|\(TM\)|Processor|CPU|@.*|family.*", "", record["environment"]["device"])
    return f"{' '.join(name.split())}, {instruction_set_of(record)}"


def question_of(name: str) -> str | None:
    """Return the question that a file of this name answers; None if it is not an answer on a CPU."""
    parts = _NAME.fullmatch(name)
    return None if parts is None else parts["question"] or "cpu"


def _rank(instruction_set: str) -> tuple[int, str]:
    order = [*NEEDS, "portable"]
    return (order.index(instruction_set) if instruction_set in order else len(order), instruction_set)
