"""Build nested dataclasses from the values of a YAML file and `section.key=value` overrides.

A key that is unknown, or a value of the wrong type or out of range, is a ValueError that names key, rule and value.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft.checks import nearest, shown, type_hints
from mft.files.yaml_file import parse_yaml

CLASS_BY_VALUES = "class_by_values"  # in a field's metadata: a function from a section's values to its class
YAML = (".yaml", ".yml")
_DATA = (".jsonl", ".json", ".parquet", ".csv", ".gz")
# If the first is given, other than its default, the defaults of the others do not apply.
_REPLACES = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "budget": ("keep_ratio", "mode"),
    "keep_ratio": ("budget", "mode"),
    "threshold": ("budget", "keep_ratio", "mode"),
    "pattern": ("budget", "keep_ratio", "mode"),
}


@dataclass(frozen=True)
class Nested:
    """Builds cls, whose fields hold values, other dataclasses (sections) or mappings of names to sections.

    example: what an override looks like. foreign: our keys by other programs' names. elsewhere: whether a message about
    a key in the wrong section names the right one.
    """

    cls: type
    example: str
    foreign: Mapping[str, str]
    elsewhere: bool = False

    def apply_override(self, values: dict[str, Any], override: str) -> None:
        """Apply a key=value override to values."""
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise ValueError(f"an override must look like {self.example}, got {override!r}{_key_of_file(override)}")
        try:
            path, section = self._place(key, values)
        except ValueError as error:
            raise ValueError(f"override {override!r}: {error}") from None
        value = parse_yaml(text, f"override {override!r}")
        if section is not None and value is not None:  # null resets a section to its default
            keys = ", ".join(f"{key}.{name}" for name in _names(section))
            raise ValueError(f"an override must name one key, got the section {key!r}: its keys are {keys}")
        target = values
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                raise ValueError(f"override {override!r}: {part} must be a mapping, got {shown(target)}")
        target[path[-1]] = value

    def build(
        self, values: Mapping[str, Any], path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()
    ) -> Any:
        """Return a cls; a section given in part keeps its defaults. Raises: ValueError with path and overrides."""
        try:
            return self._build(self.cls, values, "")
        except ValueError as error:
            origin = f"{path}: " if path is not None else ""
            after = f" (with the overrides {' '.join(overrides)})" if overrides else ""
            raise ValueError(f"{origin}{error}{after}") from None

    def _build(self, cls: type, values: Mapping[str, Any], prefix: str) -> Any:
        """Return a cls with these values. prefix: the path of the section and a dot, or "" for the whole."""
        if unknown := [str(name) for name in values if name not in _names(cls)]:
            raise self._unknown_key(unknown[0], prefix, _names(cls))
        built = dict(values)
        for item in dataclasses.fields(cls):
            if item.name not in values and item.default is item.default_factory is dataclasses.MISSING:
                raise ValueError(f"{prefix}{item.name} must be given, got none")
            below, given, path = _below(cls, item.name), values.get(item.name), f"{prefix}{item.name}"
            if below is None or item.name not in values:
                continue
            if below.named and not isinstance(given, Mapping | None):
                raise ValueError(f"{path} must be a mapping of names, got {shown(given)}")
            if below.named:
                sections = (given or {}).items()
                built[item.name] = {name: self._section(below, one, f"{path}.{name}.") for name, one in sections}
            elif given is None:
                del built[item.name]  # "mask:" with nothing below it
            else:
                built[item.name] = self._section(below, given, f"{path}.", item.default_factory)
        try:
            return cls(**built)
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None

    def _section(self, below: "_Below", given: Any, prefix: str, default: Any = dataclasses.MISSING) -> Any:
        """Return a section. default: makes the default section, which gives the values of all keys not in given."""
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"{prefix.removesuffix('.')} must be a mapping of keys, got {shown(given)}")
        begun = None if default is dataclasses.MISSING else default()
        kept = {} if begun is None else {name: getattr(begun, name) for name in _names(type(begun))}
        for one, others in _REPLACES.items():
            if given.get(one) not in (None, getattr(type(begun), one, None)):
                kept = {name: value for name, value in kept.items() if name not in others}
        return self._build(below.section_of(given, prefix), kept | dict(given), prefix)

    def _place(self, key: str, values: dict[str, Any]) -> tuple[list[str], type | None]:
        """Return (path of an override's key in values, the section at that path or None if it is a value)."""
        section, path, rest, given = self.cls, list[str](), key, values
        while rest:
            prefix, known = "".join(f"{part}." for part in path), _names(section)
            name, _, after = rest.partition(".")
            below = _below(section, name) if name in known else None
            if name not in known or (after and below is None and not _holds_names(section, name)):
                raise self._unknown_key(rest, prefix, known)
            path.append(name)
            if below is None:
                return [*path, *(after.split(".") if after else [])], None
            rest, given = after, _mapping(given.get(name))
            if below.named:
                one = _name_in(list(given), rest, f"{prefix}{name}")
                path.append(one)
                rest, given = rest.removeprefix(f"{one}."), _mapping(given[one])
            section = below.section_of(given, f"{'.'.join(path)}.")
        return path, section

    def _unknown_key(self, name: str, prefix: str, names: list[str]) -> ValueError:
        """Return the error about an unknown key, with the same name elsewhere, the nearest name, or all names."""
        elsewhere = _paths(self.cls) if self.elsewhere else {}
        last = name.rpartition(".")[2]
        foreign = self.foreign.get(last, "")
        exact = [path for path, known in elsewhere.items() if known == last or path == foreign]
        if not exact and (own := foreign.rpartition(".")[2]) in names:
            exact = [f"{prefix}{own}"]
        close = f"; did you mean {' or '.join(exact)}?" if exact else nearest(name, names, prefix=prefix)
        close = close or nearest(name, list(elsewhere.values()), paths=elsewhere)
        close = close or f"; known here: {', '.join(prefix + known for known in names)}"
        return ValueError(f"unknown key '{prefix}{name}'{close}")


# ---------------------------------------------------------------------------------------------- private


@dataclass(frozen=True)
class _Below:
    """What a key holds: one section or, if named is true, a section for each of several names."""

    section: type
    named: bool
    choose: Callable[[Mapping[str, Any]], type] | None  # returns the class of a section, if its values decide it

    def section_of(self, values: Any, where: str) -> type:
        """Return the class of a section with these values. where: the start of the message if choose raises."""
        if self.choose is None or not isinstance(values, dict):
            return self.section
        try:
            return self.choose(values)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None


def _key_of_file(name: str) -> str:
    """Return how to give a file, or "" if this is no name of one."""
    path = Path(name)
    if path.suffix in YAML:
        return f": give a configuration as --config {name}"
    if path.suffix in _DATA or path.is_file():
        return f": give data as data.source={name}"
    return f": give a directory as data.source={name} or model.name={name}" if path.is_dir() else ""


def _mapping(value: Any) -> dict[str, Any]:
    """Return value, or {} if it is not a mapping."""
    return value if isinstance(value, dict) else {}


def _names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _below(cls: type, name: str) -> _Below | None:
    """Return the dataclass that a key holds, or None for a value, such as a mapping that may be null."""
    hint = type_hints(cls)[name]
    options = typing.get_args(hint) or (hint,)
    section = next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)
    (item,) = (item for item in dataclasses.fields(cls) if item.name == name)
    named = typing.get_origin(hint) is dict
    return None if section is None else _Below(section, named, item.metadata.get(CLASS_BY_VALUES))


def _holds_names(cls: type, name: str) -> bool:
    """Return whether a value is a mapping of names, or a mapping or null, such as data.sources."""
    hint = type_hints(cls)[name]
    return any(typing.get_origin(option) is dict for option in (hint, *typing.get_args(hint)))


def _name_in(names: list[str], rest: str, path: str) -> str:
    """Return the name at the start of the rest of a key. A name may contain dots."""
    found = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
    if found is not None:
        return found
    if rest in names or "." not in rest:
        raise ValueError(f"must name one key, such as {path}.NAME.KEY; the names are {', '.join(names)}")
    name = rest.rpartition(".")[0]
    raise ValueError(f"unknown name {name!r}{nearest(name, names) or '; known: ' + ', '.join(names)}")


def _paths(cls: type, prefix: str = "") -> dict[str, str]:
    """Return {path such as train.lr: its last name} for every key of cls and of the sections below it."""
    found: dict[str, str] = {}
    for name in _names(cls):
        below = _below(cls, name)
        if below is None:
            found[f"{prefix}{name}"] = name
        elif not below.named:
            found |= _paths(below.section, f"{prefix}{name}.")
    return found
