"""What mft_study does for a verb that also takes a study."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def study_function(verb: str) -> Callable[..., Any]:
    """Return what mft_study does for this verb."""
    return entry_points(group="mft.studies")[verb].load()
