"""Texts as files for data.source: one document per line."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mft.files.atomic import write_whole

DOCUMENTS = 400  # per text: with fewer than a tenth of these in test, an interval would be wide
CHARACTERS = 8_000  # per document, so that no long file dominates a text


def write_texts(path: Path, texts: Mapping[str, str]) -> Path:
    """Write a JSONL file of the first DOCUMENTS different texts by the order of their hashes, cut to CHARACTERS."""
    cut = {text[:CHARACTERS] for text in texts.values()}
    ordered = sorted(cut, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{json.dumps({'text': text})}\n" for text in ordered[:DOCUMENTS]))
    return path
