"""A study from strict YAML and overrides, and back to plain values."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from mft.checks import nearest, shown
from mft.config import CONFIGS
from mft.config_file import FOREIGN_NAMES, find_config, plain_values, read_mapping
from mft.files.json_schema import schema_of
from mft.files.yaml_file import parse_yaml
from mft.study.config import CROSS_ENTROPY, StudyConfig

SHIPPED = CONFIGS / "compare"
_NAMED = ("arms", "domains", "general", "questions")  # mappings of names that the file chooses
_NEEDED = ("arms", "domains")
_ONLY_DOMAIN = "data"  # in an override, as mft train calls it
_FROM_ARMS = ("lr", "steps", "epochs", "seed")  # of full and stage: what the arms and seeds decide


def load_study(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> StudyConfig:
    """The study in the file of this name, shipped (such as "small") or a path; then overrides.

    An override is a key and a YAML value: seeds=[0,1], stage.batch_size=8, arms.MFT.lrs=[1e-3]. data.KEY is the key of
    the only domain, in a study of one.
    Raises: ValueError that names the file or the override, the key, the rule and the value.
    """
    path = find_config(name, SHIPPED)
    values = read_mapping(path)
    origin = f"{path}: "
    _check_keys(StudyConfig, values, "", origin)
    for override in overrides:
        _apply(values, override)
    after = f" (with the overrides {' '.join(overrides)})" if overrides else ""
    for section in ("full", "stage", "rewards"):
        for key in _FROM_ARMS:
            if key in (values.get(section) or {}):
                where = "seeds" if key == "seed" else "arms"
                raise ValueError(f"{origin}{section}.{key} must be left out: {where} decide it{after}")
    for section in _NEEDED:
        if not values.get(section):
            raise ValueError(f"{origin}{section} must hold at least one name, got {shown(values.get(section))}{after}")
    try:
        return _build(StudyConfig, values, "")
    except ValueError as error:
        raise ValueError(f"{origin}{error}{after}") from None


def study_values(study: StudyConfig) -> dict[str, Any]:
    """Plain values from which load_study makes an equal study."""
    values = plain_values(dataclasses.asdict(study))
    for section in ("full", "stage", "rewards"):
        for key in _FROM_ARMS:
            values[section].pop(key, None)
    if study.objective == CROSS_ENTROPY:  # as a study of before had it
        del values["objective"], values["rewards"], values["questions"]
    return values


def study_schema() -> dict[str, Any]:
    """The JSON Schema of a study's file."""
    schema = schema_of(StudyConfig, "A study of mft compare")
    for section in ("full", "stage", "rewards"):
        schema["properties"][section]["properties"] = dict.fromkeys(_FROM_ARMS, False)
    return schema


def _apply(values: dict[str, Any], override: str) -> None:
    """Set what a key=value override says."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ValueError(f"an override must look like stage.batch_size=8, got {override!r}")
    origin = f"override {override!r}: "
    value = parse_yaml(text, origin.removesuffix(": "))
    parts = key.split(".")
    if parts[0] == _ONLY_DOMAIN:
        domains = list(values.get("domains") or ())
        if len(domains) != 1 or len(parts) != 2:
            raise ValueError(
                f"{origin}must be data.KEY, in a study of one domain; its domains are {', '.join(domains)}"
            )
        parts = ["domains", domains[0], parts[1]]
    if parts[0] in _NAMED:  # a name may hold dots, its keys hold none
        if len(parts) < 3:
            known = ", ".join(values.get(parts[0]) or ())
            raise ValueError(f"{origin}must name one key, such as {parts[0]}.NAME.KEY; the names are {known}")
        name = ".".join(parts[1:-1])
        names = list(values.get(parts[0]) or ())
        if name not in names:
            raise ValueError(f"{origin}unknown name {name!r}{nearest(name, names) or '; known: ' + ', '.join(names)}")
        parts = [parts[0], name, parts[-1]]
    section = _section(parts)
    if section is not None and value is not None:  # scratch=null is a value
        keys = ", ".join(f"{key}.{item.name}" for item in dataclasses.fields(section))
        raise ValueError(f"{origin}must name one key, got the section {key!r}: its keys are {keys}")
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    _check_keys(StudyConfig, nested, "", origin)
    target = values
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
    target[parts[-1]] = value


def _section(parts: list[str]) -> type | None:
    """The dataclass that a key of nested sections stands for; None if it stands for a value, or nothing."""
    cls: type | None = StudyConfig
    for part in parts:
        if cls is None or part not in {item.name for item in dataclasses.fields(cls)}:
            return None
        cls, named = _inner(cls, part)
        if named:
            return None
    return cls


def _check_keys(cls: type, values: Any, prefix: str, origin: str) -> None:
    """Raise on the first key that no dataclass has, wherever it stands."""
    if values is None:
        return
    if not isinstance(values, dict):
        raise ValueError(f"{origin}{prefix.rstrip('.') or 'config'} must be a mapping of keys, got {shown(values)}")
    names = [item.name for item in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{origin}unknown key '{prefix}{key}'{_suggestion(str(key), prefix, names)}")
        inner, named = _inner(cls, key)
        if inner is None:
            continue
        if not named:
            _check_keys(inner, value, f"{prefix}{key}.", origin)
            continue
        if not isinstance(value, dict | None):
            raise ValueError(f"{origin}{prefix}{key} must be a mapping of names, got {shown(value)}")
        for name, item in (value or {}).items():
            _check_keys(inner, item, f"{prefix}{key}.{name}.", origin)


def _suggestion(name: str, prefix: str, names: list[str]) -> str:
    foreign = FOREIGN_NAMES.get(name, "").rpartition(".")[2]
    if foreign in names:
        return f"; did you mean {prefix}{foreign}?"
    return nearest(name, names, prefix=prefix) or f"; known here: {', '.join(prefix + known for known in names)}"


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """cls(**values); a section that is given in part keeps the other values of its default."""
    built = dict(values)
    for item in dataclasses.fields(cls):
        inner, named = _inner(cls, item.name)
        given = values.get(item.name)
        if inner is None or item.name not in values:
            continue
        path = f"{prefix}{item.name}."
        if named:
            built[item.name] = {
                name: _build(inner, item_values or {}, f"{path}{name}.") for name, item_values in (given or {}).items()
            }
        elif given is None:
            del built[item.name]  # "mask:" with nothing below it
        else:
            built[item.name] = _build(inner, _defaults(item) | given, path)
    try:
        return cls(**built)
    except TypeError as error:
        missing = [
            item.name
            for item in dataclasses.fields(cls)
            if item.default is item.default_factory is dataclasses.MISSING and item.name not in built
        ]
        if not missing:
            raise
        raise ValueError(f"{prefix}{missing[0]} must be given, got none") from error
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _defaults(item: dataclasses.Field) -> dict[str, Any]:
    """The values of a field's default, one level deep; none where the default is null."""
    if item.default_factory is dataclasses.MISSING:
        return {}
    default = item.default_factory()
    return {inner.name: getattr(default, inner.name) for inner in dataclasses.fields(default)}


def _inner(cls: type, name: str) -> tuple[type | None, bool]:
    """(the dataclass below a key or None, whether the key maps names to it)."""
    hint = typing.get_type_hints(cls)[name]
    named = typing.get_origin(hint) is dict
    candidates = typing.get_args(hint) or (hint,)
    found = next((option for option in candidates if dataclasses.is_dataclass(option)), None)
    return (found if isinstance(found, type) else None), named
