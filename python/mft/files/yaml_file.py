"""Read and write YAML as people mean it: 3e-4 is a number, `no` and dates are strings, a key occurs once.

PyYAML follows YAML 1.1, where 3e-4 is a string, 1:30 is 90, `off` is false and the second of two equal keys wins
silently. This reader and writer follow the core schema of YAML 1.2 and refuse duplicates.
"""

import re
from typing import Any

import yaml

from mft.checks import MOST_BITS

_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)
_MOST_NODES = 100_000  # values: more than the longest accepted configuration can write out


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (a class variable upstream too, which its stubs do not say)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (a class variable upstream too, which its stubs do not say)


for _tag, _pattern, _first in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _count_nodes(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """Return the number of values with aliases written out: ten lines of ten aliases each stand for ten billion."""
    if node not in counted:
        counted[node] = _MOST_NODES  # for a node that contains itself
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = [] if isinstance(node, yaml.ScalarNode) else inside
        counted[node] = 1 + sum(_count_nodes(part, counted) for part in parts)
    if counted[node] > _MOST_NODES:
        problem = f"aliases that stand for more than {_MOST_NODES} values: write out what is meant"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return counted[node]


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: dict[str, yaml.Mark] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key.value!r} stands twice, first in line {seen[key.value].line + 1}: leave one out",
                problem_mark=key.start_mark,
            )
        if isinstance(key, yaml.ScalarNode):
            seen[key.value] = key.start_mark
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _decimal_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Read an integer. 0755 is 755: a leading zero means octal only in YAML 1.1."""
    text = loader.construct_scalar(node).replace("_", "")
    value = int(text, 16) if text.startswith("0x") else int(text)
    if value.bit_length() > MOST_BITS:
        raise yaml.MarkedYAMLError(problem=f"an integer of more than {MOST_BITS} bits", problem_mark=node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal_int)


def parse_yaml(text: str, origin: str) -> Any:
    """Return the one document in text. A syntax error is a ValueError "origin:line:column: problem"."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{place}: broken YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{origin}: broken YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{origin}: broken YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Return text from which parse_yaml gives back an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
