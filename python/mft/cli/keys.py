"""Describe the keys of a configuration by its JSON Schema: for --help, --help KEY and docs/reference/configuration.md.

`mft train --help` lists the keys by section, and `mft train --help train.lr` explains one. Torch is not loaded.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from typer.core import TyperCommand

from mft.checks import nearest
from mft.config import FinetuneConfig, RunConfig
from mft.config_file import FOREIGN_NAMES
from mft.files.json_schema import schema_of
from mft.tracking.console import console, say

_NO_BOUND = 2**32  # bounds from here on, such as a seed's, are not shown
NAME = "NAME"  # a placeholder for a name that the file chooses, as in data.sources.NAME.weight
_TYPES = {"integer": "int", "number": "float", "boolean": "true or false", "string": "text", "null": "null"}
_TYPES["object"] = "mapping"


@dataclass(frozen=True)
class Key:
    """One key: its path such as train.lr, the values it takes, its default as YAML (None: must be given), a line."""

    path: str
    type: str
    default: str | None
    said: str

    @property
    def assigned(self) -> str:
        """The key with its default, as on the command line."""
        return f"{self.path}={'...' if self.default is None else self.default}"


@dataclass(frozen=True)
class Section:
    """Keys with the same path before the last dot, "" for the first section. kind: the class whose fields these are."""

    path: str
    kind: str
    said: str
    keys: tuple[Key, ...]


def run_schema(config: type[RunConfig] = RunConfig) -> dict[str, Any]:
    return schema_of(config, "A run of mft train, finetune, evaluate or sensitivity")


def sections(schema: Mapping[str, Any]) -> list[Section]:
    """Return every section of a configuration. The sections inside another one follow it."""
    return list(_sections("", "", schema, {}, schema["$defs"]))


def explain(asked: str, schema: Mapping[str, Any]) -> None:
    """Print the description of a key, or of every key with this last name, or the keys of a section.

    Raises: ValueError for an unknown key. It suggests the nearest one.
    """
    known = sections(schema)
    keys = [key for section in known for key in section.keys]
    if asked not in (section.path for section in known):
        asked = FOREIGN_NAMES.get(asked, asked)
    found = [key for key in keys if _matches(asked, key.path)]
    found = found or [key for key in keys if _last(key.path) == asked]
    if found:
        for key in found:
            _print_key(key)
        return
    named = {section: section.path.removesuffix(f".{NAME}") for section in known}
    inside = [section for section, path in named.items() if _matches(asked, path) or _last(path) == asked]
    if not inside:
        by_last_name = {key.path: _last(key.path) for key in keys}
        paths = [key.path for key in keys]
        beginning = [path for path in paths if path.startswith(asked) or _last(path).startswith(asked)][:3]
        close = f"; did you mean {' or '.join(beginning)}?" if beginning else nearest(asked, paths)
        close = close or nearest(_last(asked), by_last_name.values(), paths=by_last_name)
        known_sections = ", ".join(section.path for section in known if section.path)
        raise ValueError(f"unknown key {asked!r}{close or f'; sections: {known_sections}'}")
    for section in inside:
        _print_section(section)


class Keyed(TyperCommand):
    """A command whose --help KEY explains a key of its configuration. It refuses a key that is given as an option."""

    def schema(self) -> dict[str, Any]:
        return run_schema()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        after = args[args.index("--help") + 1 :] if "--help" in args else []
        if after and not after[0].startswith("-"):
            for asked in after:
                explain(asked.partition("=")[0], self.schema())
            ctx.exit()
        known = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        for argument, following in zip(args, [*args[1:], ""]):
            option, equals, value = argument.partition("=")
            if option.startswith("--") and option not in known and (paths := self._keys_named(option[2:])):
                value = value if equals or following.startswith("-") else following
                keys = " or ".join(f"{path}={value or '...'}" for path in paths)
                raise ValueError(f"a key must be given without dashes, got {option}: write {keys}")
        return super().parse_args(ctx, args)

    def _keys_named(self, name: str) -> list[str]:
        """Return the paths of keys with this path or last name, or with this name in other trainers."""
        name = name.replace("-", "_")
        asked = FOREIGN_NAMES.get(name, name)
        paths = [key.path for section in sections(self.schema()) for key in section.keys]
        return [path for path in paths if asked == path] or [path for path in paths if asked == _last(path)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        self.print_keys(ctx.command_path)

    def print_keys(self, verb: str) -> None:
        say(f" {verb} --help KEY explains a key or a section; mft train --help lists those of a run.")


class ListedKeys(Keyed):
    """A command whose --help also lists all keys."""

    def print_keys(self, verb: str) -> None:
        for section in sections(self.schema()):
            _print_section(section)
        say(f"\n {verb} --help KEY explains one; mft schema run has them for editors.")


class FinetuneKeys(ListedKeys):
    """The same with the defaults of mft finetune."""

    def schema(self) -> dict[str, Any]:
        return run_schema(FinetuneConfig)


# ---------------------------------------------------------------------------------------------- private


def _sections(
    prefix: str, kind: str, schema: Mapping[str, Any], defaults: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[Section]:
    """Yield a section, then the sections in it. defaults: {key: default} if they differ from those of its class."""
    keys, inside = [], []
    for name, value in schema["properties"].items():
        if value is False:  # a key that must be left out
            continue
        path, said = prefix + name, value.get("description", "")
        default = defaults.get(name, value.get("default"))
        section, named = _definition(value)
        if section is None:
            given = name in defaults or "default" in value
            keys.append(Key(path, _type(value), _yaml(default) if given else None, said))
            continue
        definition = definitions[section]
        properties = definition["properties"] | value.get("properties", {})
        own = definition | {"properties": properties, "description": said or definition["description"]}
        place = f"{path}.{NAME}." if named else f"{path}."
        inside.append((place, section, own, {} if named or default is None else default))
    yield Section(prefix.removesuffix("."), kind, schema["description"], tuple(keys))
    for each in inside:
        yield from _sections(*each, definitions)


def _definition(value: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return (the section that a value is, or None; whether there is one for each of several names)."""
    for option in value.get("anyOf", [value]):
        if "$ref" in option:
            return option["$ref"].rpartition("/")[2], False
        if isinstance(items := option.get("additionalProperties"), dict):
            return _definition(items)[0], True
    return None, False


def _type(value: Mapping[str, Any]) -> str:
    """Return the values that a key takes, in words, null last."""
    words = dict.fromkeys(word for option in value.get("anyOf", [value]) for word in _words(option))
    *first, last = sorted(words, key="null".__eq__)
    return f"{', '.join(first)} or {last}" if first else last


def _words(value: Mapping[str, Any]) -> list[str]:
    if "enum" in value:
        return list(value["enum"])
    if value["type"] == "array":
        items = _type(value["items"])
        return [f"[{', '.join([items] * value['maxItems'])}]" if "maxItems" in value else f"list of {items}"]
    return [_TYPES[value["type"]] + _bounds(value)]


def _bounds(value: Mapping[str, Any]) -> str:
    """Return the bounds of a number, such as " from 0 to below 1", or "" if there are none."""
    found = [(" from", value.get("minimum")), (" above", value.get("exclusiveMinimum"))]
    found += [(" to", value.get("maximum")), (" to below", value.get("exclusiveMaximum"))]
    return "".join(f"{word} {bound:g}" for word, bound in found if bound is not None and bound < _NO_BOUND)


def _yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _matches(asked: str, path: str) -> bool:
    """Return whether asked is this path, or this path with a name in place of NAME."""
    return bool(path) and re.fullmatch(re.escape(path).replace(NAME, ".+"), asked) is not None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _print_section(section: Section) -> None:
    if not section.keys:
        return
    first = section.said.partition(". ")[0].removesuffix(".")
    say(f"\n {f'{section.path}: ' if section.path else ''}{first}", style="bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key in section.keys:
        table.add_row(f"   {key.assigned}", f"{key.type}{f': {key.said}' if key.said else ''}")
    console.print(table)


def _print_key(key: Key) -> None:
    say(key.assigned, style="bold")
    say(f"   {key.type}; {'must be given' if key.default is None else f'by default {key.default}'}")
    if key.said:
        say(f"   {key.said}")
    if elsewhere := [name for name, path in FOREIGN_NAMES.items() if path == key.path]:
        say(f"   called {' or '.join(elsewhere)} by other trainers")
