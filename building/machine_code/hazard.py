"""Find registers that are overwritten while a warpgroup MMA still reads them: a static scan of sm_90 code.

An HGMMA returns at once. If its first operand is in registers, they must keep their values until a wait has covered it,
and nothing in the hardware enforces that:

    HGMMA.64x256x16.F32.BF16 R24, R156, gdesc[UR12], R24, gsb0     reads R156 to R159; gsb0 closes a group
    LDSM.16.M88.4 R156, [R16+UR14]                                 overwrites them: wrong sums, now and then
    WARPGROUP.DEPBAR.LE gsb0, 0x1                                  leaves one group in flight, too late

Triton 3.6 inserts too few waits (Triton issue 9433), and ptxas older than 13.3 removes the copies that later versions
insert against it (Triton pull requests 9514 and 11781).
"""

from dataclasses import dataclass

from .sass import a_registers, is_warpgroup_mma, parse, waited_groups, written_registers

#: More groups in flight than any wait can leave there (wgmma.wait_group takes 0 to 7); older ones are merged into one.
_MOST_GROUPS = 8


@dataclass(frozen=True, order=True)
class Hazard:
    """The instruction at ``address`` writes ``register``, which the HGMMA at ``mma`` may still be reading."""

    address: int
    register: int
    mma: int

    def __str__(self) -> str:
        return f"{self.address:#06x} writes R{self.register}, an operand of the HGMMA in flight from {self.mma:#06x}"


def hazards(sass: str) -> list[Hazard]:
    """Return the hazards on any path through the kernel, by address; ``sass`` is nvdisasm's text.

    Every path is followed together with its groups in flight. A path that reaches an instruction with groups already
    seen there is dropped, so loops are followed until they bring nothing new.
    """
    program = parse(sass)
    found: set[Hazard] = set()
    # In flight: closed groups, oldest first, then the open one. A group is a set of indices of HGMMAs.
    nothing: tuple[frozenset[int], ...] = (frozenset(),)
    seen = {(0, nothing)}
    paths = [(0, nothing)]
    while paths:
        i, flight = paths.pop()
        instruction = program.instructions[i]
        written = set(written_registers(instruction))
        if written:
            for mma in frozenset().union(*flight):
                reading = program.instructions[mma]
                found |= {Hazard(instruction.address, r, reading.address) for r in written & {*a_registers(reading)}}
        *groups, unclosed = flight
        if is_warpgroup_mma(instruction):
            unclosed |= {i}
            if "gsb0" in instruction.operands:
                groups, unclosed = [*groups, unclosed], frozenset()
                if len(groups) > _MOST_GROUPS:
                    groups = [groups[0] | groups[1], *groups[2:]]
        left = waited_groups(instruction)
        if left is not None:
            groups = groups[max(0, len(groups) - left) :]
        for after in program.successors[i]:
            state = (after, (*groups, unclosed))
            if state not in seen:
                seen.add(state)
                paths.append(state)
    return sorted(found)
