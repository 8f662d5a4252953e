"""Check what users give: compare fields with annotations and rules, and suggest what to do: a known name, a command.

Every message begins with the field's name, so that a reader of files can put the section before it.
"""

import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

_NAME = re.compile(r"[A-Za-z0-9_-]+")
MOST_BITS = 64  # most bits of an integer: no setting needs more, and Python refuses to print one of 20,000
_LONGEST = 200  # most characters of a typed name that is compared with known ones
_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "enum": lambda value, known: value in known,
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}

# The annotations of a class. Where they are text, as under "from __future__ import annotations", reading takes long.
type_hints: Callable[..., dict[str, Any]] = functools.cache(typing.get_type_hints)


class Rule:
    """A rule for a field's value, or for each item of a list: in words and in JSON Schema. null always passes."""

    def __init__(self, words: str, **keywords: Any) -> None:
        self.words, self.keywords = words, keywords

    def check(self, name: str, value: Any) -> None:
        for item in value if isinstance(value, list | tuple) else (value,):
            if not all(_HOLDS[key](item, bound) for key, bound in self.keywords.items()):
                close = nearest(item, self.keywords["enum"]) if "enum" in self.keywords else ""
                raise ValueError(f"{name} must {self.words}, got {value!r}{close}")


@dataclass(frozen=True)
class Text:
    """Part of an annotation: the field also accepts a string of this pattern, which read turns into the value."""

    pattern: str
    read: Callable[[str], Any]


def one_of(known: tuple[str, ...]) -> Rule:
    return Rule(f"be one of {', '.join(known)}", enum=known)


def at_least(least: int) -> Rule:
    return Rule(f"be at least {least}", minimum=least)


POSITIVE = Rule("be positive", exclusiveMinimum=0)
POSITIVE_OR_NULL = Rule("be positive (or null)", exclusiveMinimum=0)
SHARE = Rule("lie in [0, 1]", minimum=0, maximum=1)
BETA = Rule("lie in [0, 1)", minimum=0, exclusiveMaximum=1)
SEED = Rule("lie in [0, 2**63)", minimum=0, exclusiveMaximum=2**63)


def split_hint(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type and the metadata of Annotated, if any."""
    return (typing.get_args(hint)[0], hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def coerce_fields(config: Any) -> None:
    """Check each field against its annotation. A float field turns 1 into 1.0; an int field turns 1e6 into 1000000."""
    for name, annotation in type_hints(type(config), include_extras=True).items():
        hint, beside = split_hint(annotation)
        value = getattr(config, name)
        for text in beside:
            if isinstance(text, Text) and isinstance(value, str):
                value = text.read(value)
        accepted, coerced = _match(value, hint)
        if not accepted:
            hint_text = "; quote it" if hint in (str, str | None) and value is not None else ""
            raise ValueError(f"{name} must be {_hint_words(hint)}, got {shown(value)}{hint_text}")
        if isinstance(coerced, float) and not math.isfinite(coerced):
            raise ValueError(f"{name} must be a finite number, got {coerced}")
        if isinstance(coerced, list | tuple) and not all(math.isfinite(x) for x in coerced if isinstance(x, float)):
            raise ValueError(f"{name} must hold finite numbers, got {coerced}")
        setattr(config, name, coerced)
        for rule in beside:
            if isinstance(rule, Rule) and coerced is not None:
                rule.check(name, coerced)


def shown(value: Any) -> str:
    text = repr(value)
    return "null" if value is None else f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def expand_home(config: Any, *names: str) -> None:
    """Expand a leading ~ in the paths of these fields: no shell does so in a YAML file or after "output_dir="."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            setattr(config, name, os.path.expanduser(value))


def check_rule(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value}")


def check_text(name: str, text: str) -> None:
    """Raise ValueError unless text can be written as UTF-8, which a tokenizer needs."""
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        kind = "a byte that is not UTF-8" if "\udc80" <= bad <= "\udcff" else "half a surrogate pair"
        raise ValueError(f"{name} must be Unicode text, got {kind} at character {error.start}: {shown(bad)}") from None


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    one_of(known).check(name, value)


def check_not_empty(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value in ("", []) or (isinstance(value, list) and "" in value):
            raise ValueError(f"{name} must not be empty, got {value!r}: leave the key out for its default")


def check_seed(seed: int) -> None:
    SEED.check("seed", seed)


def read_named(field: str, given: Any, cls: type) -> Any:
    """Return a mapping of names to mappings as {name: cls}; any other value unchanged. Raises: ValueError."""
    if not isinstance(given, dict):
        return given
    check_rule(bool(given), field, "hold at least one name", given)
    keys, built = {item.name: item for item in dataclasses.fields(cls)}, {}
    for name, values in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{field} must have names of letters, digits, - and _, got {shown(name)}")
        where = f"{field}.{name}"
        if isinstance(values, cls):
            built[name] = values
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{where} must be a mapping of keys such as {next(iter(keys))}:, got {shown(values)}")
        for key in values:
            if key not in keys:
                close = nearest(str(key), keys) or f"; known here: {', '.join(keys)}"
                raise ValueError(f"{where}: unknown key {str(key)!r}{close}")
        for key, item in keys.items():
            if key not in values and item.default is item.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}.{key} must be given, got none")
        try:
            built[name] = cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
    return built


def nearest(name: str, known: Iterable[str], *, prefix: str = "", paths: Mapping[str, str] | None = None) -> str:
    """Return "; did you mean X?" with the closest known name, or "". paths: that of each name, to show instead."""
    if len(name) > _LONGEST:
        return ""
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if not close:
        return ""
    answer = folded[close[0]]
    if paths is not None:
        answer = " or ".join(path for path, last in paths.items() if last == answer)
    return f"; did you mean {prefix}{answer}?"


def nearest_path(path: Path) -> str:
    """Return the same for a missing file or directory, with the names in its parent directory."""
    if not path.parent.is_dir():
        return f" (nor {path.parent})"
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()], prefix=f"{path.parent}/")


def install_command(extra: str) -> str:
    """Return how to add an extra, in a clone and with a wheel. No package index has mft_kernels."""
    return f"pip install --no-build-isolation -e '.[{extra}]' in the clone, or pip install 'WHEEL[{extra}]'"


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    """Return (whether value fits the type hint, the value in that type)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        for option in arguments:
            accepted, coerced = _match(value, option)
            if accepted:
                return True, coerced
        return False, value
    if origin is list:
        pairs = [_match(item, arguments[0]) for item in value] if isinstance(value, list | tuple) else [(False, None)]
        return all(ok for ok, _ in pairs), [item for _, item in pairs]
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            return False, value
        pairs = [_match(item, option) for item, option in zip(value, arguments, strict=True)]
        return all(ok for ok, _ in pairs), tuple(item for _, item in pairs)
    if origin is dict:
        if not isinstance(value, dict):
            return False, value
        pairs = [_match(item, arguments[1]) for item in value.values()]
        named = all(isinstance(key, arguments[0]) for key in value)
        return named and all(ok for ok, _ in pairs), dict(zip(value, (item for _, item in pairs)))
    if hint is Any:
        return True, value
    if isinstance(value, bool) and hint in (int, float):
        return False, value
    if hint is float and isinstance(value, int):
        return True, float(value)
    if hint is int and isinstance(value, float) and value.is_integer() and int(value).bit_length() <= MOST_BITS:
        return True, int(value)
    return isinstance(value, hint), value


def _hint_words(hint: Any) -> str:
    if typing.get_origin(hint) is types.UnionType:
        return " or ".join(_hint_words(option) for option in typing.get_args(hint))
    words = {str: "a string", int: "an int", float: "a number", bool: "true or false", type(None): "null"}
    if typing.get_origin(hint) is dict:
        return f"a mapping of names to {getattr(typing.get_args(hint)[1], '__name__', 'values')}"
    if typing.get_origin(hint) is list:
        return f"a list of {typing.get_args(hint)[0].__name__}"
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} numbers"
    return words.get(hint, getattr(hint, "__name__", str(hint)))
