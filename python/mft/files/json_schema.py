"""Make a JSON Schema (draft 2020-12) of nested dataclasses, with which editors complete and check YAML.

The schema holds what the annotations, their rules, the comments and the defaults say. Rules about two fields together,
such as steps and epochs, are checked only when a file is loaded.
"""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from mft.checks import Rule, Text, split_hint, type_hints

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema_of(cls: type, title: str) -> dict[str, Any]:
    """Return the schema of a mapping from which cls is made."""
    definitions: dict[str, Any] = {}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return head | _section(cls, definitions) | {"$defs": definitions}


def _section(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of cls itself, and add the dataclasses below it to definitions."""
    hints, comments = type_hints(cls, include_extras=True), _comments(cls)
    properties = {}
    for item in dataclasses.fields(cls):
        said = {"description": comments[item.name]} if item.name in comments else {}
        properties[item.name] = said | _value(hints[item.name], {}, definitions) | _default(item)
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split()),
        "properties": properties,
        "required": [item.name for item in dataclasses.fields(cls) if not _default(item)],
        "additionalProperties": False,
    }


def _value(annotation: Any, rules: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value of this type. rules: keywords for its numbers and strings."""
    hint, beside = split_hint(annotation)
    for rule in beside:
        rules = rules | (rule.keywords if isinstance(rule, Rule) else {})
    texts = [{"type": "string", "pattern": text.pattern} for text in beside if isinstance(text, Text)]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _any_of([_value(option, rules, definitions) for option in arguments] + texts)
    if origin is list:
        return _any_of([{"type": "array", "items": _value(arguments[0], rules, definitions)}, *texts])
    if origin is tuple:
        items = _value(arguments[0], rules, definitions)
        return {"type": "array", "items": items, "minItems": len(arguments), "maxItems": len(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(arguments[1], rules, definitions)}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = _section(hint, definitions)
        optional = not definitions[hint.__name__]["required"]  # "mask:" with nothing below it
        return _any_of([{"$ref": f"#/$defs/{hint.__name__}"}] + [{"type": "null"}] * optional)
    if hint is Any:
        return {}
    if hint is type(None):
        rules = {}
    return {"type": _TYPES[hint]} | ({"minLength": 1} if hint is str else {}) | rules


def _any_of(options: list[dict[str, Any]]) -> dict[str, Any]:
    flat: list[dict[str, Any]] = []
    for option in options:
        flat += [one for one in option.get("anyOf", [option]) if one not in flat]
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _default(item: dataclasses.Field) -> dict[str, Any]:
    """Return {"default": value}, or {} if the field must be given."""
    if item.default is not dataclasses.MISSING:
        return {"default": item.default}
    if item.default_factory is dataclasses.MISSING:
        return {}
    value = item.default_factory()
    return {"default": dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value}  # type: ignore[arg-type]


def _comments(cls: type) -> dict[str, str]:
    """Return {field: the comment in its line, or in the lines above it} from the sources of cls and its bases."""
    found: dict[str, str] = {}
    above: list[str] = []
    sources = [inspect.getsource(each) for each in reversed(cls.__mro__) if dataclasses.is_dataclass(each)]
    for line in "".join(sources).splitlines():
        field = re.match(r"    (\w+): ", line)
        comment = re.search(r"(?:^    |  )# (.*)$", line)
        if field:
            if said := [comment.group(1)] if comment else above:
                found[field.group(1)] = " ".join(said)
            above = []
        else:
            above = [*above, comment.group(1)] if comment else []
    return found
