"""The readers of generated code see what it contains, and especially what is wrong. No device is needed."""

import gzip
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

if knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from masked_dot import compile_masked_dot

from building.machine_code import sass
from building.machine_code.flow import natural_loops
from building.machine_code.hazard import Hazard, hazards

SM90 = GPUTarget("cuda", 90, 32)
TRITON_36 = Path(__file__).parent / "data" / "rs_hazard_triton36.sass.gz"

safe_triton = pytest.mark.skipif(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9),
    reason=f"Triton {triton.__version__} is older than 3.9, whose waits these are",
)


@pytest.fixture(scope="module")
def hopper():
    return compile_masked_dot(SM90, 128, 128, 8)


@pytest.fixture(scope="module")
def clean(hopper):
    return sass.disassemble(hopper.asm["cubin"])


@safe_triton
def test_no_operand_is_overwritten_in_flight(clean):
    assert hazards(clean) == []


@safe_triton
def test_each_wait_is_needed(clean):
    waits = list(re.finditer(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", clean))
    assert len(waits) == 2
    for wait in waits:
        found = hazards(clean[: wait.end() - 1] + "7" + clean[wait.end() :])
        assert found, f"the scan must see that the wait at character {wait.start()} is gone"


def test_operands_that_triton_3_6_overwrites_are_found():
    found = hazards(gzip.decompress(TRITON_36.read_bytes()).decode())
    assert len(found) == 41
    # From reading it by hand: the loop ends with three HGMMAs in flight, and begins with
    #     /*0fb0*/ LDSM.16.M88.4 R88, [R7+UR12+0x14000]
    # while /*1970*/ HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 is the oldest of them.
    assert {Hazard(0xFB0, register, 0x1970) for register in range(88, 92)} <= set(found)
    # Its fourth group, which reads R100 to R103, is the first one of the next iteration: it is waited for in time.
    assert not any(100 <= hazard.register < 104 for hazard in found)


HGMMA = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"
HMMA = "HMMA.16816.F32 R24, R20, R68, R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, "
OTHER = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"


def kernel(*lines):
    """Return text as nvdisasm writes it: instructions 16 bytes apart, labels between them, a spin at the end."""
    text, address = [], 0
    for line in (*lines, "EXIT", ".L_end:", "BRA `(.L_end)"):
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([f"{HGMMA}, gsb0", f"{WAIT}0x0", "MOV R4, R9"], []),
        ([f"{HGMMA}, gsb0", "MOV R7, R9", f"{WAIT}0x0"], [(0x10, 7, 0x00)]),
        ([f"{HGMMA}, gsb0", "MOV R8, R4", "STS.128 [R4], R4"], []),
        ([f"{HGMMA}, gsb0", "@!P0 MOV R5, R9"], [(0x10, 5, 0x00)]),
        ([f"{HGMMA}, gsb0", "LDS.64 R6, [R9]"], [(0x10, 6, 0x00), (0x10, 7, 0x00)]),
        ([f"{HGMMA}, gsb0", "LDSM.16.M88.4 R0, [R9]"], []),
        ([f"{HGMMA}, gsb0", "IMAD.WIDE.U32 R2, R9, 0x2, R4", "LDG.E.128 R0, desc[UR4][R2.64]"], []),
        ([f"{HGMMA}, gsb0", "LOP3.LUT P0, R4, R9, 0x1, RZ, 0xc0, !PT"], [(0x10, 4, 0x00)]),
        ([f"{HGMMA}, gsb0", "ISETP.GE.AND P0, PT, R4, R5, PT", "@P0 BRA `(.L_end)"], []),
        ([f"{HGMMA}, gsb0", OTHER.replace("R24", "R0")], [(0x10, r, 0x00) for r in range(4, 8)]),
        # A wait for all but one covers the older group, not the newer one.
        ([f"{HGMMA}, gsb0", OTHER, f"{WAIT}0x1", "MOV R4, R9"], []),
        ([OTHER, f"{HGMMA}, gsb0", f"{WAIT}0x1", "MOV R4, R9"], [(0x30, 4, 0x10)]),
        # A group counts as one, however many HGMMAs it holds. No wait covers an HGMMA whose group is not closed.
        ([HGMMA, OTHER, OTHER, f"{WAIT}0x1", "MOV R4, R9"], []),
        ([HGMMA, OTHER, f"{WAIT}0x1", "MOV R4, R9"], [(0x30, 4, 0x00)]),
        ([HGMMA, f"{WAIT}0x0", "MOV R4, R9"], [(0x20, 4, 0x00)]),
        # A group that nothing waits for stays in flight.
        ([f"{HGMMA}, gsb0", ".L_a:", OTHER, "@P0 BRA `(.L_a)", f"{WAIT}0x7", "MOV R4, R9"], [(0x40, 4, 0x00)]),
        # A hazard only around the loop; only after a jump out of it; only through a call.
        ([".L_a:", "MOV R4, R9", f"{HGMMA}, gsb0", "@P0 BRA `(.L_a)", f"{WAIT}0x0"], [(0x00, 4, 0x10)]),
        ([".L_a:", "MOV R4, R9", f"{HGMMA}, gsb0", f"{WAIT}0x0", "@P0 BRA `(.L_a)"], []),
        ([f"{HGMMA}, gsb0", "@P0 BRA `(.L_b)", f"{WAIT}0x0", ".L_b:", "MOV R4, R9"], [(0x30, 4, 0x00)]),
        ([f"{HGMMA}, gsb0", "BRA.U UP0, `(.L_b)", f"{WAIT}0x0", ".L_b:", "MOV R4, R9"], [(0x30, 4, 0x00)]),
        (
            [
                f"{HGMMA}, gsb0",
                "CALL.REL.NOINC `(f)",
                f"{WAIT}0x0",
                "EXIT",
                "f:",
                "MOV R4, R9",
                "RET.REL.NODEC R2 `(k)",
            ],
            [(0x40, 4, 0x00)],
        ),
        (
            ["BSSY B0, `(.L_c)", f"{HGMMA}, gsb0", ".L_b:", "BSYNC B0", f"{WAIT}0x0", ".L_c:", "MOV R4, R9"],
            [(0x40, 4, 0x10)],
        ),
    ],
)
def test_hazards_of_written_code(lines, expected):
    assert hazards(kernel(*lines)) == [Hazard(*values) for values in expected]


def test_jumps_without_a_known_target_are_refused():
    with pytest.raises(ValueError, match="jumps must name their target"):
        hazards(kernel("BRX R4 -0x10"))
    with pytest.raises(ValueError, match="jumps must name a label"):
        hazards(kernel("BRA `(.L_elsewhere)"))
    with pytest.raises(ValueError, match="code of one kernel"):
        hazards(kernel("NOP") + kernel("NOP"))


def test_written_registers_are_those_of_nvdisasm(hopper, tmp_path):
    """nvdisasm -plr draws a column for each register: ^ for written, v for read, x for both."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(hopper.asm["cubin"])
    command = [knobs.nvidia.nvdisasm.path, "-c", "-plr", str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    if "life ranges" in result.stderr:
        pytest.skip(f"this nvdisasm draws no life ranges: {result.stderr.splitlines()[-1]}")
    header = next(line for line in result.stdout.splitlines() if re.search(r"// \|\s*#\s+0\s", line))
    start = header.index("#")
    columns = {match.end() - 1: int(match[0]) for match in re.finditer(r"\d+", header[: header.index("|", start)])}
    lines = [line for line in result.stdout.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    instructions = sass.parse(result.stdout).instructions
    assert len(lines) == len(instructions)
    writing = 0
    for line, instruction in zip(lines, instructions):
        drawn = {register for column, register in columns.items() if line[column : column + 1] in ("^", "x")}
        assert drawn == set(sass.written_registers(instruction)), line
        writing += bool(drawn)
    assert writing > len(lines) / 3  # the others store, jump, wait or compute on uniform registers


def test_a_loop_in_which_threads_part_is_still_a_loop():
    """Each barrier is used repeatedly: here before the loop and inside it, for each tile."""
    before = [".L_tiles:", "BSSY B0, `(.L_a)", "@P1 BRA `(.L_b)", "NOP", ".L_b:", "BSYNC B0", ".L_a:", "NOP"]
    inside = [".L_loop:", "BSSY B0, `(.L_c)", "@P1 BRA `(.L_d)", "NOP", ".L_d:", "BSYNC B0", ".L_c:", HMMA]
    text = kernel(*before, *inside, "@P0 BRA `(.L_loop)", "@P2 BRA `(.L_tiles)")
    (loop,) = sass.code_of(text, 0, 0, 0).loops
    assert loop.counts == Counter(BSSY=1, BRA=2, NOP=1, BSYNC=1, HMMA=1)


def test_spins_behind_the_end_are_no_loops():
    #   0 -> 1 -> 2 -> 3 -> 4, where 3 -> 1 closes the loop and 1 may spin in 5, which jumps back to 2
    loops = natural_loops([(1,), (2, 5), (3,), (1, 4), (), (5, 2)])
    assert sorted(map(sorted, loops)) == [[1, 2, 3, 5], [5]]
