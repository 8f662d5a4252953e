"""Texts that every machine with mft has, as files for data.source: one document per line."""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from mft.data.corpora import stdlib_files
from mft.files.atomic import write_whole

DOCUMENTS = 400  # per text: with fewer than a tenth of these in test, an interval would be wide
CHARACTERS = 8_000  # per document, so that no long file dominates a text
SHORTEST_DOCSTRING = 500


def sources_of(package: str) -> dict[str, str]:
    """Return {path: source} of an installed package, without its tests."""
    return stdlib_files(_folder(package))


def docstrings_of(package: str) -> dict[str, str]:
    """Return {path:line: docstring} of an installed package's longer docstrings: prose, formulas and examples."""
    found = {}
    for path, source in sources_of(package).items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found[f"{path}:{node.lineno}"] = text
    return {place: text for place, text in found.items() if len(text) >= SHORTEST_DOCSTRING}


def write_texts(path: Path, texts: Mapping[str, str], documents: int = DOCUMENTS) -> Path:
    """Write a JSONL file of the first ``documents`` different texts by the order of their hashes, cut to CHARACTERS."""
    cut = {text[:CHARACTERS] for text in texts.values()}
    ordered = sorted(cut, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{json.dumps({'text': text})}\n" for text in ordered[:documents]))
    return path


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"package must be installed, got {package!r}: pip install {package}")
    return Path(found.origin).parent
