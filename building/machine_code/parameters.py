"""Read where a cubin expects each kernel parameter: the EIATTR_KPARAM_INFO of its section .nv.info.KERNEL."""

import struct

#: Attribute and format of an entry of .nv.info: 12 bytes of index, ordinal, offset, and the size above bit 18.
_KPARAM_INFO, _SIZED = 0x17, 0x04


def parameters(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """Return (offset, size) in bytes, in the order of the parameters.

    Raises: ValueError if the cubin has no such kernel.
    """
    info = _sections(cubin).get(f".nv.info.{kernel}")
    if info is None:
        raise ValueError(f"the cubin must hold the kernel {kernel}, its sections are {', '.join(_sections(cubin))}")
    found, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if (form, attribute) == (_SIZED, _KPARAM_INFO):
            _, ordinal, offset, packed = struct.unpack_from("<IHHI", info, at + 4)
            found[ordinal] = offset, packed >> 18
        at += 4 + (size if form == _SIZED else 0)  # other formats store their value in place of a size
    return [found[i] for i in range(len(found))]


def _sections(elf: bytes) -> dict[str, bytes]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = elf[headers[of_names][4] :]
    return {names[h[0] : names.index(b"\0", h[0])].decode(): elf[h[4] : h[4] + h[5]] for h in headers}
