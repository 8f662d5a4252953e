"""Build the model that a GGUF file describes on the meta device, in milliseconds: without vocabulary and weights."""

import contextlib
import logging
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from gguf.constants import GGMLQuantizationType, GGUFValueType
from transformers.integrations.gguf import is_gguf_arch_supported

from mft.files.gguf_file import MAGIC, GgufHeader
from mft.models.claims import check_parameters
from mft.models.pretrained import LOCAL, outline_of, refuse_unreadable

_ALIGNMENT = 32  # GGUF's default
_TOKENS = "tokenizer.ggml.tokens"
_LONGEST = 1 << 14  # bytes of a key with its value: fits a list for 2,000 layers, but not a list with an item per token


def gguf_outline(path: Path, header: GgufHeader) -> Any:
    """Return the transformers model of a GGUF file, on the meta device.

    Its configuration is made without lists of tokens: reading 49,152 tokens takes transformers five seconds.
    Raises: ValueError if transformers cannot read the file, or its model has more parameters than the file can hold.
    """
    if is_gguf_arch_supported(header.architecture):
        raise ValueError(
            f"{path}: its architecture must be one of those whose tensors transformers renames one by one, got "
            f"{header.architecture!r}: mft merge writes a model directory, which llama.cpp's converter takes"
        )
    with tempfile.TemporaryDirectory() as directory:
        shadow = Path(directory) / "shadow.gguf"
        shadow.write_bytes(_shadow(path, header))
        with refuse_unreadable(f"{path} must be a GGUF file that transformers can read"), _unheard():
            config = transformers.AutoConfig.from_pretrained(directory, gguf_file=shadow.name, **LOCAL)
            outline = outline_of(config, "float32")
    check_parameters(outline, path.stat().st_size, str(path))
    return outline


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Silence transformers' warning that there are no tokens to count."""
    logger = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shadow(path: Path, header: GgufHeader) -> bytes:
    """Return a GGUF file with the same keys and tensor names, in which each tensor has one number."""
    architecture = header.architecture
    with path.open("rb") as file:
        pairs = {}
        for key, (start, end) in header.pairs.items():
            if end - start <= _LONGEST:
                file.seek(start)
                pairs[key] = file.read(end - start)
    pairs.pop("general.alignment", None)
    tokens, size = header.metadata.get(_TOKENS), f"{architecture}.vocab_size"
    if size not in pairs and type(tokens) is int:
        pairs[size] = _text(size) + struct.pack("<II", GGUFValueType.UINT32, tokens & 0xFFFFFFFF)
    parts = [struct.pack("<4sIQQ", MAGIC, 3, len(header.tensors), len(pairs)), *pairs.values()]
    for number, name in enumerate(header.tensors):
        parts.append(_text(name) + struct.pack("<IQIQ", 1, 1, GGMLQuantizationType.F32, number * _ALIGNMENT))
    head = b"".join(parts)
    return head + bytes(-len(head) % _ALIGNMENT + len(header.tensors) * _ALIGNMENT)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
