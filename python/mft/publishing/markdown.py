"""Write facts from untrusted files as Markdown: one line each, no markup or HTML, no directory of this machine."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft.data.sources import NAMED
from mft.escaping import one_line
from mft.files.hub import split_hub_id
from mft.models.pretrained import SHORTHANDS

LONGEST = 500  # most characters of a fact
# The models from which our shorthands are dequantised.
_OF_SHORTHANDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_PLAIN = re.compile(r"(?!.*(://|www\.))[\w .,:;%()+/=±-]*")  # what Markdown leaves as it is


def hub_base(name: str | None) -> str | None:
    """Return the name of a base on the hub, or None if name is a path or None."""
    if name is None or name in SHORTHANDS:
        return _OF_SHORTHANDS.get(name or "")
    named = split_hub_id(name)
    return name if named is not None and named[1] is None and not Path(name).exists() else None


def base_in_a_sentence(base: str) -> str:
    """Return the base's name as Markdown, with a link if it is on the hub."""
    found = hub_base(base)
    if base in SHORTHANDS:
        return f"`{base}` ([{found}](https://huggingface.co/{found}), dequantised as mft fetches it)"
    return _code(hide_directory(base)) if found is None else f"[{base}](https://huggingface.co/{base})"


def hide_directory(name: str) -> str:
    """Return a name as it is, and of a path only the last part: a machine's directories are private."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.exists(name)
    return Path(name).name if is_path and name not in (*SHORTHANDS, *NAMED) else name


def short_line(text: str) -> str:
    """Return one_line of text with backslashes doubled, cut to LONGEST characters."""
    seen = one_line(text[: LONGEST + 1].replace("\\", "\\\\"))
    return seen if len(seen) <= LONGEST else seen[: LONGEST - 3] + "..."


def text(fact: str) -> str:
    """Return a fact as it is, or as code if Markdown might change it."""
    return fact if len(fact) <= LONGEST and _PLAIN.fullmatch(fact) else _code(fact)


def block(language: str, lines: Sequence[str]) -> str:
    """Return a block of code."""
    code = "\n".join(lines)
    fence = _fence(code, 3)
    return f"{fence}{language}\n{code}\n{fence}"


def table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    """Return a table. Bars in cells are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(fact: str) -> str:
    """Return a fact as inline code, between more backticks than it contains in a row."""
    fact = short_line(fact)
    fence = _fence(fact, 1)
    space = " " if fact.startswith("`") or fact.endswith("`") else ""
    return f"{fence}{space}{fact}{space}{fence}"


def _fence(code: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", code)), default=0))
