"""Kernels that are chosen by measuring them once: MFT_AUTOTUNE=1, remembered by the process and on disk.

torch.use_deterministic_algorithms(True) takes what is chosen without measuring.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("mft_kernels")

AUTOTUNE = "MFT_AUTOTUNE"

#: A measured winner has to be this much faster to overrule what would be taken without measuring: less is noise.
_MARGIN = 1.03


def measuring() -> bool:
    """Whether measurements are asked for. Raises: ValueError for what is neither 0 nor 1."""
    asked = os.environ.get(AUTOTUNE) or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"{AUTOTUNE} must be 0 or 1, got {asked!r}; unset it to measure nothing")
    return asked == "1" and not torch.are_deterministic_algorithms_enabled()


def fastest(times: Mapping[str, float], default: str) -> str:
    """The name of the least time, if that is clearly ahead of the default's."""
    return min(times, key=lambda name: times[name] * (1 if name == default else _MARGIN))


class Choices:
    """What was chosen, in a file that belongs to what it was measured for: another machine or version measures anew.

    The file lies in $MFT_CACHE/kernels, else ~/.cache/mft/kernels; without it each process makes its own measurements.

    Args:
        made_for: names and values, which differ wherever a measurement would not hold.
        is_choice: whether a key can have that choice; of a file whose choices are not, nothing is taken.
    """

    def __init__(self, made_for: Mapping[str, str], is_choice: Callable[[dict[str, Any], str], bool]) -> None:
        self._made_for, self._is_choice = dict(made_for), is_choice
        base = os.environ.get("MFT_CACHE") or Path.home() / ".cache" / "mft"
        parts = json.dumps(self._made_for, sort_keys=True)
        self.file = Path(base, "kernels", f"choices-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.json")
        self._told = False
        try:
            self._known = self._read()
        except FileNotFoundError:
            self._known = {}
        except (OSError, ValueError) as error:
            logger.warning("%s is ignored and its measurements are made anew: %s", self.file, error)
            self._known = {}

    def get(self, key: Mapping[str, Any]) -> str | None:
        """The choice for these facts; None: not measured."""
        return self._known.get(_text(key))

    def add(self, key: Mapping[str, Any], choice: str) -> None:
        """Remember a choice, and add what is known to the file: whole or not at all."""
        self._known[_text(key)] = choice
        try:
            others = self._read()
        except (OSError, ValueError):
            others = {}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._write(others | self._known)
        except OSError as error:
            if not self._told:
                logger.warning("cannot keep measurements in %s: %s", self.file.parent, error)
            self._told = True

    def _read(self) -> dict[str, str]:
        """Raises: OSError; ValueError if the file is damaged or another's."""
        stored = _parsed(self.file.read_bytes())
        if not isinstance(stored, dict) or stored.get("made_for") != self._made_for:
            raise ValueError(f"it must be made for {self._made_for}")
        choices = stored.get("choices")
        if not isinstance(choices, dict):
            raise ValueError("its choices must be a table")
        for key, choice in choices.items():
            facts = _parsed(key)
            if not isinstance(facts, dict) or not self._is_choice(facts, choice):
                raise ValueError(f"{choice!r} is no choice for {key}")
        return choices

    def _write(self, choices: Mapping[str, str]) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.file.parent, suffix=".tmp", delete=False) as aside:
            try:
                json.dump({"made_for": self._made_for, "choices": choices}, aside, indent=1, sort_keys=True)
                aside.flush()
                os.fsync(aside.fileno())
                os.replace(aside.name, self.file)
            except BaseException:
                os.unlink(aside.name)
                raise


def _parsed(text: str | bytes) -> Any:
    """Raises: ValueError for what is no JSON, or nests deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it must be JSON of few levels, got one nested too deeply") from None


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
