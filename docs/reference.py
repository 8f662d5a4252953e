"""Print the site's page of functions and classes, from the docstrings of all public names: make reference."""

import ast
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parent.parent
PACKAGES = ("mft_kernels", "mft")
HEAD = """# Reference

Every public name with its signature. M tokens, N out_features, K in_features. By `make reference`, from the docstrings.
"""
LONGEST = 100  # characters of a signature on one line
SECTION = re.compile(r"(Args|Shapes|Returns|Yields|Raises):(?: (.*))?$")
ARGUMENT = re.compile(r"(\w+(?:, \w+)*): (.*)")
CODE = re.compile(r"(``.+?``|`.+?`)")
# Markdown's markup that no docstring means: emphasis, links, tags, a list that begins with a plus.
MARKUP = re.compile(r"\*|(?<!\w)_|_(?!\w)|\](?=\()|<|^[+#>]", re.MULTILINE)


def main() -> None:
    """Print the page."""
    sys.stdout.write(reference())


def reference() -> str:
    """Return the page."""
    public = public_objects()
    # Not a name like "gathered", which prose may use as a word.
    links = {name for objects in public.values() for name in objects if "_" in name or not name.islower()}
    parts = [HEAD]
    for package, objects in public.items():
        parts += [f"## {package}\n", documentation(importlib.import_module(package).__doc__ or "", set())]
        parts.append(", ".join(f"[{name}](#{anchor(name)})" for name in objects) + "\n")
        for name, described in objects.items():
            parts += entry(name, described, links)
    return "\n".join(parts)


def public_objects() -> dict[str, dict[str, griffe.Object]]:
    """Return {package: {name of its __all__: its description from the sources}}; imports only the package itself."""
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "python"], allow_inspection=False)
    modules = {package: loader.load(package) for package in PACKAGES}
    loader.resolve_aliases()
    found: dict[str, dict[str, griffe.Object]] = {}
    for package, module in modules.items():
        found[package] = {}
        for name in importlib.import_module(package).__all__:
            if name not in module.members:
                where = module.filepath.relative_to(ROOT)
                raise ValueError(f"{where} must import {name} of __all__, be it under TYPE_CHECKING")
            member = module[name]
            found[package][name] = member.final_target if member.is_alias else member
    return found


def entry(name: str, described: griffe.Object, links: set[str], level: int = 3) -> Iterator[str]:
    """Yield heading, signature and docstring of a name; then its methods and properties."""
    yield f"{'#' * level} {name}\n"
    yield f"```python\n{signature(name, described)}\n```\n"
    yield documentation(text_of(described), links - {name})
    if described.is_class:
        for member in own_members(described):
            yield from entry(f"{name}.{member.name}", member, links - {name}, level + 1)


def text_of(described: griffe.Object) -> str:
    return described.docstring.value if described.docstring else ""


def own_members(described: griffe.Object) -> Iterator[griffe.Object]:
    """Yield public methods and properties with a docstring, except those of a torch base, such as state_dict."""
    paths = [base if isinstance(base, str) else base.canonical_path for base in described.bases]
    bases = [pkgutil.resolve_name(path) for path in paths if path.startswith("torch.")]
    for name, member in described.members.items():
        is_one = member.is_function or "property" in member.labels
        if is_one and text_of(member) and not name.startswith("_") and not any(hasattr(base, name) for base in bases):
            yield member


# ---------------------------------------------------------------------------------------------- signatures


def signature(name: str, described: griffe.Object) -> str:
    """Return the signature as source text: on one line, or with one parameter per line."""
    if described.is_attribute:
        value = "" if described.value is None or "property" in described.labels else f" = {described.value}"
        return f"{name}: {annotated(described.annotation)}{value}"
    is_method = described.is_class or (described.parent.is_class and "staticmethod" not in described.labels)
    parameters = [p for p in described.parameters if not (is_method and p.name in ("self", "cls"))]
    written_ones = list(written(parameters))
    comments = [comment_on(described, line.partition(":")[0]) if described.is_class else "" for line in written_ones]
    result = "" if described.is_class or described.returns is None else f" -> {annotated(described.returns)}"
    manager = "@contextmanager\n" if any("contextmanager" in str(d.value) for d in described.decorators) else ""
    short = f"{name}({', '.join(written_ones)}){result}"
    if len(short) <= LONGEST and not any(comments):
        return manager + short
    body = "".join(f"    {line},{comment}\n" for line, comment in zip(written_ones, comments))
    return f"{manager}{name}(\n{body}){result}"


def written(parameters: list[griffe.Parameter]) -> Iterator[str]:
    """Yield each parameter with its annotation and default, and the marks between kinds."""
    kind = griffe.ParameterKind
    kinds = [parameter.kind for parameter in parameters]
    for i, parameter in enumerate(parameters):
        if parameter.kind is kind.keyword_only and {kind.keyword_only, kind.var_positional}.isdisjoint(kinds[:i]):
            yield "*"
        stars = {kind.var_positional: "*", kind.var_keyword: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is None else f": {annotated(parameter.annotation)}"
        default = "" if stars or parameter.default is None else str(parameter.default)
        default = re.sub(r"^\(lambda: (.*)\)\(\)$", r"\1", default)  # a dataclass's default_factory
        if default.startswith("'"):
            default = json.dumps(ast.literal_eval(default))  # in double quotes, as in the sources
        equals = " = " if annotation else "="
        yield f"{stars}{parameter.name}{annotation}{equals + default if default else ''}"
        if parameter.kind is kind.positional_only and kind.positional_only not in kinds[i + 1 :]:
            yield "/"


def annotated(annotation: griffe.Expr | str | None) -> str:
    """Return a type without the rules that Annotated adds to it; our aliases of types are written out."""
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
        return annotated(annotation.slice.elements[0])
    if isinstance(annotation, griffe.ExprName):
        try:
            value = getattr(annotation.parent.modules_collection[annotation.canonical_path], "value", None)
        except KeyError:  # from another package
            value = None
        is_type = isinstance(value, griffe.ExprBinOp | griffe.ExprSubscript)
        return annotated(value) if is_type else str(annotation)
    if isinstance(annotation, griffe.ExprBinOp):
        return f"{annotated(annotation.left)} {annotation.operator} {annotated(annotation.right)}"
    return str(annotation)


def comment_on(described: griffe.Object, field: str) -> str:
    """Return the trailing comment of a dataclass's field."""
    member = described.members.get(field)
    if member is None or not member.is_attribute or member.lineno is None:
        return ""
    _, hash_sign, comment = described.filepath.read_text().splitlines()[member.endlineno - 1].partition("  # ")
    return f"{hash_sign}{comment}"


# ---------------------------------------------------------------------------------------------- docstrings


def documentation(docstring: str, links: set[str]) -> str:
    """Return prose unchanged, and sections as lists and paragraphs."""
    parts: list[str] = []
    lines = docstring.splitlines()
    while lines:
        if opening := SECTION.match(lines[0]):
            body = [opening[2]] if opening[2] else []
            lines.pop(0)
            # A list continues while it is indented. Text next to the title ends at a blank line or the next section.
            while lines and (lines[0].startswith(" ") or (opening[2] and lines[0] and not SECTION.match(lines[0]))):
                body.append(lines.pop(0))
            parts.append(section(opening[1], body, links))
        else:
            paragraph = []
            while lines and not SECTION.match(lines[0]):
                paragraph.append(lines.pop(0))
            if any(paragraph):
                parts.append(prose("\n".join(paragraph), links))
    return "\n".join(parts)


def section(title: str, body: list[str], links: set[str]) -> str:
    """Return a list if there is one line per name, as in Args, else a paragraph."""
    items: list[str] = []
    for line in body:
        if line.startswith("    ") and not line.startswith("     ") and (named := ARGUMENT.match(line.strip())):
            names = ", ".join(f"`{name}`" for name in named[1].split(", "))
            items.append(f"- {names}: {prose(named[2], links).strip()}")
        elif items and line:
            items.append(f"  {prose(line.strip(), links).strip()}")
    if items:
        return f"**{title}**\n\n" + "\n".join(items) + "\n"
    return f"**{title}**: " + prose("\n".join(line.strip() for line in body).strip(), links)


def prose(text: str, links: set[str]) -> str:
    """Return paragraphs in which only code is markup and public names are links; indented paragraphs are Python."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.startswith("    "):
            code = "\n".join(line.removeprefix("    ") for line in paragraph.splitlines())
            parts.append(f"```python\n{code}\n```\n")
            continue
        pieces = CODE.split(paragraph.strip())
        pieces[::2] = [linked(MARKUP.sub(r"\\\g<0>", piece), links) for piece in pieces[::2]]
        parts.append("".join(pieces).replace("``", "`") + "\n")
    return "\n".join(parts)


def linked(text: str, links: set[str]) -> str:
    """Return text with links from public names to their entries, and from docs/how-to/x.md to that page."""
    text = re.sub(r"docs/([\w-]+/([\w-]+\.md))", r"[\2](../\1)", text)
    return re.sub(
        r"(?<![\w./])[A-Za-z_]+(?![\w/]|\.\w)",
        lambda word: f"[{word[0]}](#{anchor(word[0])})" if word[0] in links else word[0],
        text,
    )


def anchor(title: str) -> str:
    return re.sub(r"[^\w\-]", "", title.lower())


if __name__ == "__main__":
    main()
