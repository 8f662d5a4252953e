"""Chats about the functions of Python files: the user names one with its signature, the answer is its docstring.

Left out are private functions, short docstrings, and docstrings that an earlier function has, so that no answer is on
both sides of a split.
"""

import ast
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

SHORTEST = 40  # characters; a shorter docstring says little more than the function's name


def docstring_chats(files: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Return {path: chats}, in the order of files ({path: source}), without files that give none."""
    found, seen = {}, set[str]()
    for path, source in files.items():
        chats = []
        for signature, answer in _documented(_module_name(path), _parsed(source)):
            if len(answer) >= SHORTEST and answer not in seen:
                seen.add(answer)
                question = f"Write the docstring of `{signature}` in Python's standard library."
                said = (("user", question), ("assistant", answer))
                chats.append({"messages": [{"role": role, "content": text} for role, text in said]})
        if chats:
            found[path] = chats
    return found


def _module_name(path: str) -> str:
    """Return "json.decoder" for "json/decoder.py", and "json" for "json/__init__.py"."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _parsed(source: str) -> ast.AST:
    """Return the syntax tree; an empty one for source of another Python version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the file, not ours to report
        try:
            return ast.parse(source)
        except SyntaxError:
            return ast.Module([], [])


def _documented(prefix: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (signature with the full name, docstring or "") of public functions and methods, as the file has them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _documented(f"{prefix}.{child.name}", child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}({ast.unparse(child.args)})", (ast.get_docstring(child) or "").strip()
