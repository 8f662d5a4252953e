"""Nested dataclasses from the values of a YAML file, and `section.key=value` overrides.

Whatever is unknown, of the wrong type or out of range is a ValueError that names the key, the rule and the value.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mft.checks import nearest, shown
from mft.files.yaml_file import parse_yaml

CLASS_BY_VALUES = "class_by_values"  # in a field's metadata: a function from a section's values to its class
_EITHER = (("steps", "epochs"), ("epochs", "steps"))  # one that is given takes the place of the other's default


@dataclass(frozen=True)
class Nested:
    """Reads cls, whose fields hold values, other dataclasses (sections) or mappings of names to those.

    example: what an override looks like. foreign: what others call the keys. elsewhere: whether a key that stands in
    the wrong section is told the right one.
    """

    cls: type
    example: str
    foreign: Mapping[str, str]
    elsewhere: bool = False

    def apply_override(self, values: dict[str, Any], override: str) -> None:
        """Set in values what a key=value override says."""
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise ValueError(f"an override must look like {self.example}, got {override!r}")
        try:
            path, section = self._place(key, values)
        except ValueError as error:
            raise ValueError(f"override {override!r}: {error}") from None
        value = parse_yaml(text, f"override {override!r}")
        if section is not None and value is not None:  # null takes a section back to its default
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
        """A cls of values; a section that is given in part keeps the rest of its default.

        Raises: ValueError that begins with the path, and ends with the overrides.
        """
        try:
            return self._built(self.cls, values, "")
        except ValueError as error:
            origin = f"{path}: " if path is not None else ""
            after = f" (with the overrides {' '.join(overrides)})" if overrides else ""
            raise ValueError(f"{origin}{error}{after}") from None

    def _built(self, cls: type, values: Mapping[str, Any], prefix: str) -> Any:
        """prefix: the path of a section, and a dot."""
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
        """default: makes the section that stands there by default; what is given in part keeps the rest of it."""
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"{prefix.removesuffix('.')} must be a mapping of keys, got {shown(given)}")
        kept = {} if default is dataclasses.MISSING else _shallow(default())
        for one, other in _EITHER:
            if one in given:
                kept.pop(other, None)
        return self._built(below.section_of(given, prefix), kept | dict(given), prefix)

    def _place(self, key: str, values: dict[str, Any]) -> tuple[list[str], type | None]:
        """(where the key of an override stands in values, the section that it is; None: it is a value)."""
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
        """With the same name in another section, else the nearest in this one or elsewhere, else all of this one."""
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
    """What a key holds: a section, or with named a section for each of several names."""

    section: type
    named: bool
    choose: Callable[[Mapping[str, Any]], type] | None  # the class of a section, where its values decide it

    def section_of(self, values: Any, where: str) -> type:
        """where: begins the message of what choose raises."""
        if self.choose is None or not isinstance(values, dict):
            return self.section
        try:
            return self.choose(values)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None


def _shallow(section: Any) -> dict[str, Any]:
    """The values of a dataclass, one level deep."""
    return {name: getattr(section, name) for name in _names(type(section))}


def _mapping(value: Any) -> dict[str, Any]:
    """value, or what stands for it where it is none."""
    return value if isinstance(value, dict) else {}


def _names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _below(cls: type, name: str) -> _Below | None:
    """None for a key that holds a value; a mapping of names or null is a value, which its own class reads."""
    hint = typing.get_type_hints(cls)[name]
    options = typing.get_args(hint) or (hint,)
    section = next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)
    (item,) = (item for item in dataclasses.fields(cls) if item.name == name)
    named = typing.get_origin(hint) is dict
    return None if section is None else _Below(section, named, item.metadata.get(CLASS_BY_VALUES))


def _holds_names(cls: type, name: str) -> bool:
    """Whether a value is a mapping of names, or such a one or null, such as data.sources."""
    hint = typing.get_type_hints(cls)[name]
    return any(typing.get_origin(option) is dict for option in (hint, *typing.get_args(hint)))


def _name_in(names: list[str], rest: str, path: str) -> str:
    """The name, which may hold dots, that begins the rest of a key."""
    found = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
    if found is not None:
        return found
    if rest in names or "." not in rest:
        raise ValueError(f"must name one key, such as {path}.NAME.KEY; the names are {', '.join(names)}")
    name = rest.rpartition(".")[0]
    raise ValueError(f"unknown name {name!r}{nearest(name, names) or '; known: ' + ', '.join(names)}")


def _paths(cls: type, prefix: str = "") -> dict[str, str]:
    """{path such as train.lr: its last name} of every key of cls and of the sections below it."""
    found: dict[str, str] = {}
    for name in _names(cls):
        below = _below(cls, name)
        if below is None:
            found[f"{prefix}{name}"] = name
        elif not below.named:
            found |= _paths(below.section, f"{prefix}{name}.")
    return found
