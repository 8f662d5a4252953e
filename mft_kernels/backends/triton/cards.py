"""Published figures of the cards that tiles are planned for, and the choice of the nearest one for any other card."""

from dataclasses import dataclass, replace

KIB, MIB = 1024, 1024**2
#: Bytes per cycle from L2 to a multiprocessor; csrc/cuda/tile_cost.h has the same. Read by gpu-l2-cache of
#: https://github.com/RRZE-HPC/gpu-benches from 10 to 28 MB, at the boost clock: 9.75 TB/s on an H200 (37 at 1.98 GHz),
#: 6.9 on an H100 PCIe (34 at 1.755), 5.4 on an A100 80 GB (35.5 at 1.41). Others: an estimate. make gpu measures it.
L2_RATE = 36


@dataclass(frozen=True)
class Card:
    """A card's figures, in bytes, bytes per second and Hz. ``arch`` is as in target.Target.

    ``multiply_adds``: per cycle and multiprocessor, dense, for 16-bit operands with fp32 sums.
    """

    name: str
    arch: int | str
    multiprocessors: int
    shared: int  # per multiprocessor
    block_shared: int  # what one block may use of ``shared``
    l2: int
    bandwidth: float  # of its memory
    clock: float  # at which the data sheet's dense rate holds
    multiply_adds: int
    l2_rate: float = L2_RATE


#: Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". The rest: NVIDIA's
#: architecture white papers (A100, H100, Ada, RTX Blackwell) and data sheets (H200, HGX B200), AMD's CDNA 3 white paper
#: and MI300X data sheet. ``multiply_adds`` is the power of 2 that gives the sheet's dense TFLOP/s of bf16 at about the
#: boost clock. ``clock`` is what gives it exactly: 312, 989, 756 (PCIe), 989, 2250, 165, 209.5, 1307. The L2 of B200 is
#: what its device reports.
A100 = Card("A100 80 GB SXM", 80, 108, 164 * KIB, 163 * KIB, 40 * MIB, 2.039e12, 1.41e9, 1024)
H100 = Card("H100 SXM", 90, 132, 228 * KIB, 227 * KIB, 50 * MIB, 3.35e12, 1.83e9, 2048)
H100_PCIE = Card("H100 PCIe", 90, 114, 228 * KIB, 227 * KIB, 50 * MIB, 2.0e12, 1.62e9, 2048)
H200 = Card("H200", 90, 132, 228 * KIB, 227 * KIB, 50 * MIB, 4.8e12, 1.83e9, 2048)
B200 = Card("B200", 100, 148, 228 * KIB, 227 * KIB, 126 * MIB, 8.0e12, 1.85e9, 4096)
RTX_4090 = Card("RTX 4090", 89, 128, 100 * KIB, 99 * KIB, 72 * MIB, 1.008e12, 2.52e9, 256)
RTX_5090 = Card("RTX 5090", 120, 170, 100 * KIB, 99 * KIB, 96 * MIB, 1.792e12, 2.41e9, 256)
MI300X = Card("MI300X", "gfx942", 304, 64 * KIB, 64 * KIB, 256 * MIB, 5.3e12, 2.1e9, 1024)  # l2: Infinity Cache

CARDS = (A100, H100, H100_PCIE, H200, B200, RTX_4090, RTX_5090, MI300X)


def card_of(arch: int | str, multiprocessors: int, block_shared: int, bandwidth: float = 0) -> Card:
    """Return the card with these figures; ``bandwidth`` 0: not known.

    The other figures come from the nearest card in the table: first by architecture, then by a block's shared memory,
    then by multiprocessors. If the bandwidth is not known, the table's is scaled by the number of multiprocessors.
    """

    def distance(card: Card) -> tuple[bool, int, int]:
        return card.arch != arch, abs(card.block_shared - block_shared), abs(card.multiprocessors - multiprocessors)

    nearest = min(CARDS, key=distance)
    return replace(
        nearest,
        arch=arch,
        multiprocessors=multiprocessors,
        block_shared=block_shared,
        bandwidth=bandwidth or nearest.bandwidth * multiprocessors / nearest.multiprocessors,
    )
