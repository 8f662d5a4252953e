"""An Arrow stream that a stranger may have written: mapped from its file, and of no more memory than that has bytes.

    message, body; message, body; ... (flatbuffers: a table's fields stand where its vtable says)

A body that is compressed may be a thousand times as long in memory; save_to_disk of datasets writes none.
"""

import struct
from pathlib import Path

import pyarrow

_HEADER, _COMPRESSION, _DATA = 2, 3, 1  # fields: of a message; of a record batch; of a dictionary's batch


def map_arrow(path: Path) -> pyarrow.Table:
    """The table in the file, whose values are not checked yet.

    Raises: ValueError that names the file, if it is compressed; pyarrow.ArrowException and OSError as pyarrow does.
    """
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
    """Where the table begins that is pointed to from place."""
    return place + struct.unpack_from("<I", content, place)[0]


def _field(content: memoryview, table: int, number: int) -> int:
    """Where a field of a table stands; the table's own place if it has none."""
    entries = table - struct.unpack_from("<i", content, table)[0]
    offset = 4 + 2 * number
    if offset + 2 > struct.unpack_from("<H", content, entries)[0]:
        return table
    return table + struct.unpack_from("<H", content, entries + offset)[0]
