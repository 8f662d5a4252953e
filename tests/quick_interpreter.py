"""Triton's interpreter without what it does in vain: a third of its time and more.

At each call of a device function it asks which members of triton.language are builtins; the answer never changes. For
each sum and product of 32-bit integers it computes whether they overflow, and asserts it in its debug mode alone.

Imported for what it does, before the first launch.
"""

import functools
import inspect
from dataclasses import replace
from types import SimpleNamespace

from triton.language.core import is_builtin
from triton.runtime import interpreter


@functools.cache
def _builtins_of(package: object) -> list[str]:
    """Found at the first launch, when none has been replaced yet."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _members(package: object) -> list[tuple[str, object]]:
    """As they are now, of which the interpreter replaces those that are still builtins."""
    return [(name, getattr(package, name)) for name in _builtins_of(package)]


interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _members})
_builder = interpreter.interpreter_builder
_builder.options = replace(_builder.options, sanitize_overflow=_builder.options.debug)
