"""Choose kernels by measuring them once (MFT_AUTOTUNE=1), and remember the choices in the process and on disk.

With torch.use_deterministic_algorithms(True) nothing is measured.
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

#: A measured winner must be this much faster to replace the choice that is made without measuring. Less is noise.
_MARGIN = 1.03


def measuring() -> bool:
    """Return whether measurements are asked for. Raises: ValueError if the variable is neither 0 nor 1."""
    asked = os.environ.get(AUTOTUNE) or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"{AUTOTUNE} must be 0 or 1, got {asked!r}; unset it to measure nothing")
    return asked == "1" and not torch.are_deterministic_algorithms_enabled()


def fastest(times: Mapping[str, float], default: str) -> str:
    """Return the name with the least time if it is clearly faster than the default, else the default."""
    return min(times, key=lambda name: times[name] * (1 if name == default else _MARGIN))


class Choices:
    """Choices that were measured, in a file for one machine and version. Another machine or version measures again.

    The file lies in $MFT_CACHE/kernels, else ~/.cache/mft/kernels; without it each process makes its own measurements.

    Args:
        made_for: names and values that differ if a measurement would not hold.
        is_choice: tells whether a key can have a choice. A file with a choice that cannot be is ignored.
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
            logger.warning("%s is ignored, and its measurements are repeated: %s", self.file, error)
            self._known = {}

    def get(self, key: Mapping[str, Any]) -> str | None:
        """Return the choice for these facts, or None if it was not measured."""
        return self._known.get(_text(key))

    def add(self, key: Mapping[str, Any], choice: str) -> None:
        """Remember a choice, and add all known choices to the file, which is replaced atomically."""
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
        """Return the choices of the file. Raises: OSError; ValueError if it is damaged or made for something else."""
        stored = _parsed(self.file.read_bytes())
        if not isinstance(stored, dict) or stored.get("made_for") != self._made_for:
            raise ValueError(f"it must be made for {self._made_for}")
        choices = stored.get("choices")
        if not isinstance(choices, dict):
            raise ValueError("its choices must be a table")
        for key, choice in choices.items():
            facts = _parsed(key)
            if not isinstance(facts, dict) or not self._is_choice(facts, choice):
                raise ValueError(f"{choice!r} is not a known choice for {key}")
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
    """Parse JSON. Raises: ValueError if text is no JSON, or is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it must be JSON of few levels, got one nested too deeply") from None


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
