"""Find the memory of this process that is mapped from files: by safetensors, torch.load(mmap=True) or numpy.memmap.

Works on Linux, from /proc/self/maps; on other systems no mapping is found. It does not tell whether a write would reach
the file.
"""

from bisect import bisect_right
from pathlib import Path

_MAPS = Path("/proc/self/maps")  # "7f00-7f80 rw-p offset device inode   /path"


class Mappings:
    """The file mappings at the time of construction."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        fields = [line.split(maxsplit=5) for line in lines]
        ranges = [each[0].split("-") for each in fields if len(each) == 6 and each[5].startswith("/")]
        self._ranges = sorted((int(start, 16), int(end, 16)) for start, end in ranges)

    def hold(self, address: int) -> bool:
        """Return whether address lies in a file mapping."""
        place = bisect_right(self._ranges, (address, float("inf"))) - 1
        return place >= 0 and address < self._ranges[place][1]
