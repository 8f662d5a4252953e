"""Find modules that compute with a child's weight instead of calling the child, from the source of their forward.

    time_step = self.dt_proj.weight @ time_step      MambaMixer: a mask on dt_proj would be ignored silently
    qkv = x @ self.attn.in_proj_weight.T             likewise for an nn.MultiheadAttention with masked projections

The search covers forward and the methods that it calls on self. Reading a weight's dtype, device or shape does not
count. Neither does code under an ``if`` that depends on self only and is false (BLOOM's slow_but_exact).
"""

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn

_LOOKED_AT = {"dtype", "device", "shape", "size", "dim", "ndim"}


@dataclass(frozen=True)
class _Read:
    """self.CHILD.weight in a method's source, and the conditions on self around it with the values that they need."""

    child: str
    place: str
    conditions: tuple[tuple[CodeType, bool], ...]

    def happens(self, module: nn.Module) -> bool:
        return all(bool(eval(test, {}, {"self": module})) == value for test, value in self.conditions)


def why_read(parent: nn.Module, child: str) -> str | None:
    """Return where parent computes with child.weight itself (child: its path), or None. Needs the class's source."""
    kind: Any = type(parent)
    for read in _reads(kind):
        if read.child == child and read.happens(parent):
            return f"{read.place} computes with {child}.weight itself, and would bypass the layer that replaces {child}"
    return None


@functools.cache
def _reads(kind: Any) -> tuple[_Read, ...]:
    found: list[_Read] = []
    seen, left = set(), ["forward"]
    while left:
        name = left.pop()
        method = getattr(kind, name, None)
        if name in seen or not inspect.isfunction(method):
            continue
        seen.add(name)
        method = inspect.unwrap(method)
        parents = _parents(method)
        for node in parents:
            if isinstance(node, ast.Attribute) and _is_self(node.value):
                left.append(node.attr)
            child = _read_child(node, parents)
            if child is not None:
                place = f"{kind.__name__}.{name} ({Path(inspect.getfile(method)).name})"
                found.append(_Read(child, place, tuple(_conditions(node, parents))))
    return tuple(found)


def _parents(method: Any) -> dict[Any, ast.AST]:
    """Return each node of the method's source with its parent node."""
    try:
        source = inspect.getsource(method)
    except OSError:  # made at run time, or shipped without its source
        return {}
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _read_child(node: Any, parents: dict[Any, ast.AST]) -> str | None:
    """Return CHILD if node is self.CHILD.weight, or self.CHILD_weight of an attention, and is used in a computation."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
        return None
    around: Any = parents[node]
    looked_at = isinstance(around, ast.Attribute) and around.attr in _LOOKED_AT
    asked = isinstance(around, ast.Call) and getattr(around.func, "id", None) in ("isinstance", "hasattr", "getattr")
    *path, name = _path(node)
    if not path or looked_at or asked:
        return None
    if name.endswith("_proj_weight"):
        return ".".join([*path, name.removesuffix("_weight")])
    return ".".join(path) if name == "weight" else None


def _path(node: Any) -> list[str]:
    """Return ["attn", "out_proj", "weight"] for self.attn.out_proj.weight; [""] if it does not start at self."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    return path if _is_self(node) else [""]


def _conditions(node: Any, parents: dict[Any, ast.AST]) -> Iterator[tuple[CodeType, bool]]:
    """Yield the ifs around node that depend on self only. Calls, and self.training, which changes, are excluded."""
    while node in parents:
        inner, node = node, parents[node]
        if not isinstance(node, ast.If) or inner is node.test:
            continue
        parts = list(ast.walk(node.test))
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        changes = any(isinstance(part, ast.Call) or getattr(part, "attr", None) == "training" for part in parts)
        if names == {"self"} and not changes:
            yield compile(ast.Expression(node.test), "<condition>", "eval"), inner in node.body
