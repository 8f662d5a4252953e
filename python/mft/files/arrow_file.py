"""Map an Arrow stream from an untrusted file, using no more memory than the file has bytes.

    message, body; message, body; ... (flatbuffers: a table's vtable gives the places of its fields)

A compressed body may take a thousand times as much memory as it has bytes, so such a file is refused. save_to_disk of
datasets does not compress.
"""

import struct
from pathlib import Path

import pyarrow

_HEADER, _COMPRESSION, _DATA = 2, 3, 1  # field numbers: in a message; in a record batch; in a dictionary batch


def map_arrow(path: Path) -> pyarrow.Table:
    """Return the table in the file, unchecked. Raises: ValueError if it is compressed; pyarrow's errors."""
    source = pyarrow.memory_map(str(path))
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        try:
            compressed = _is_compressed(message)
        except (struct.error, IndexError):
            raise pyarrow.ArrowInvalid("a message that is damaged") from None
        if compressed:
            raise ValueError(
                f"{path} must be an Arrow stream that is not compressed, as save_to_disk of datasets writes it, got a "
                "compressed one: load it with datasets and save it again"
            )
    source.seek(0)
    return pyarrow.ipc.open_stream(source).read_all()


def _is_compressed(message: pyarrow.ipc.Message) -> bool:
    if message.type not in ("record batch", "dictionary"):
        return False
    content = memoryview(message.metadata)
    batch = _table(content, _field(content, _table(content, 0), _HEADER))
    if message.type == "dictionary":
        batch = _table(content, _field(content, batch, _DATA))
    return _field(content, batch, _COMPRESSION) != batch


def _table(content: memoryview, place: int) -> int:
    """Return the start of the table to which the offset at place points."""
    return place + struct.unpack_from("<I", content, place)[0]


def _field(content: memoryview, table: int, number: int) -> int:
    """Return the place of a table's field, or the table's own place if the field is absent."""
    entries = table - struct.unpack_from("<i", content, table)[0]
    offset = 4 + 2 * number
    if offset + 2 > struct.unpack_from("<H", content, entries)[0]:
        return table
    return table + struct.unpack_from("<H", content, entries + offset)[0]
