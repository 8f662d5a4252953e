"""Which memory of this process is a file's, mapped: weights of safetensors, torch.load(mmap=True) and numpy.memmap.

Known on Linux, from /proc/self/maps; elsewhere no mapping is seen. Whether a write would reach the file is not asked.
"""

from bisect import bisect_right
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # "7f00-7f80 rw-p offset device inode   /path"


class Mappings:
    """The mappings of files as they are now."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        fields = [line.split(maxsplit=5) for line in lines]
        ranges = [each[0].split("-") for each in fields if len(each) == 6 and each[5].startswith("/")]
        self._ranges = sorted((int(start, 16), int(end, 16)) for start, end in ranges)

    def hold(self, address: int) -> bool:
        """Whether address lies in one."""
        place = bisect_right(self._ranges, (address, float("inf"))) - 1
        return place >= 0 and address < self._ranges[place][1]
