"""The report on the compiled CUDA kernels finds what is wrong with a kernel, and finds nothing in what is built here.

`make cuda` builds the kernels, `python -m benchmarks.kernel_code --only cuda` prints the table. No GPU is needed.
"""

import subprocess

import pytest
from triton import knobs

if knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.kernel_code import cuda
from benchmarks.kernel_code.__main__ import summary
from building import ptxas_log
from building.cuda import GROUPS
from mft_kernels.backends import built

# A kernel with 8 blocks per multiprocessor may use 32 registers per thread, and this one keeps 64 numbers at once.
PTX = """\
.version 8.0
.target {target}
.address_size 64
.visible .entry {name}(.param .u64 memory)
.maxntid 256, 1, 1
.minnctapersm {blocks}
{{
  .reg .f32 %f<{count}>;
  .reg .u64 %p;
  .shared .align 4 .b8 room[512];
  ld.param.u64 %p, [memory];
  cvta.to.global.u64 %p, %p;
{body}
  ret;
}}
"""
NAME = "_ZN3mft4cuda3isa5entryINS0_11ProductSm90INS0_8BFloat16ELNS0_8MaskKindE2ELb0ELi64EEEEEvNT_9ArgumentsE"
SERIALISED = (
    "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage"
)


def assembled(folder, *, blocks, target="sm_90a", count=64):
    """Return (object, log) of a kernel that keeps ``count`` numbers at once, from the assembler that Triton brings."""
    load = [f"  ld.volatile.global.f32 %f{i}, [%p+{4 * i}];" for i in range(count)]
    store = [f"  st.volatile.global.f32 [%p+{4 * i}], %f{count - 1 - i};" for i in range(count)]
    text = PTX.format(name=NAME, blocks=blocks, target=target, count=count, body="\n".join(load + store))
    source, cubin = folder / "kernel.ptx", folder / f"kernel.{target}.cubin"
    source.write_text(text)
    tool = knobs.nvidia.ptxas.path
    ran = subprocess.run([tool, "-v", f"-arch={target}", source, "-o", cubin], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return cubin, ran.stderr


def read(folder, more="", **asked):
    cubin, log = assembled(folder, **asked)
    (kernel,) = cuda.kernels(cubin, log + more)
    return kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_a_kernel_is_read_from_its_object(tmp_path, target):
    kernel = read(tmp_path, blocks=2, target=target)
    assert (kernel.call, kernel.kernel) == ("ProductSm90<BFloat16, MaskKind 2, false, 64>", "ProductSm90")
    assert (kernel.target, kernel.tiles, kernel.spills, kernel.shared) == (target, "64", 0, 512)
    assert 64 < kernel.registers <= 128


def test_a_spill_is_a_fault(tmp_path):
    kernel = read(tmp_path, blocks=8)
    assert kernel.spills > 0
    assert any("stores to local memory" in fault for fault in kernel.faults)
    assert any("a stack of" in fault for fault in kernel.faults)


def test_a_serialised_mma_is_a_fault(tmp_path):
    for where in (f" in the function '{NAME}'", ""):
        assert SERIALISED in read(tmp_path, SERIALISED + where, blocks=2).faults
    assert SERIALISED not in read(tmp_path, f"{SERIALISED} in the function 'another'", blocks=2).faults


MMA = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
FROM_SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, "
GOOD = ["LDSM.16.M88.4 R8, [R9]", MMA, f"{WAIT}0x1"]


def code(*lines):
    """Return nvdisasm's text of a loop of these instructions."""
    lines = ("UTMALDG.2D [UR8], [UR4]", *lines, "@P0 BRA `(.L_loop)", "EXIT")
    text = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    return "\n".join([text[0], ".L_loop:", *text[1:]])


def faults(*lines, name="ProductSm90<BFloat16, MaskKind 2, false, 64>", target="sm_90a"):
    return cuda.row(name, target, code(*lines), 168, 0, 0).faults


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([MMA, "MOV R4, R9", f"{WAIT}0x1"], "hazards, the first: 0x0020 writes R4"),
        ([MMA, f"{WAIT}0x0"], "1 full waits in a loop of 1 HGMMA"),
        ([MMA, FROM_SHARED, f"{WAIT}0x1"], "1 of 2 HGMMA take no operand from registers"),
        (["HMMA.16816.F32.BF16 R24, R20, R68, R24"], "no loop with HGMMA"),
        (["FADD R1, R2, R3"], "no loop with HGMMA"),
        ([*GOOD, "STL [R1], R2"], "1 stores to local memory, 0 loads"),
    ],
)
def test_faults_of_hopper_are_seen(lines, fault):
    assert any(fault in found for found in faults(*lines))


def test_cutlasss_loop_may_take_both_operands_from_shared_memory():
    assert faults(FROM_SHARED, f"{WAIT}0x0", name="ScoreGradSm90<Float16, float>") == ()


def test_a_general_product_without_hmma_is_a_fault():
    general = {"name": "ProductKernel<Float16, Words, true, true, 128>", "target": "sm_80"}
    product = "HMMA.16816.F32 R24, R20, R68, R24"
    assert faults("FFMA R1, R2, R3, R4", **general) == ("no loop with HMMA",)
    assert faults(product, **general) == ()
    decode = {"name": "DecodeKernel<BFloat16, Words, true, 2, 7>", "target": "sm_90"}
    assert faults(product, **decode) == ("no barrier of a cluster, which is launched there",)
    assert faults(product, "UCGABAR_ARV", **decode) == ()


@pytest.fixture
def library():
    """Return what _build.json says about the CUDA library."""
    report = built.report("cuda")
    if reason := cuda.missing(report):
        pytest.skip(f"the CUDA kernels are not built: {reason}")
    return report


GENERAL = (
    *("PackKernel", "ClearKernel", "ProductKernel", "DecodeKernel"),
    *("ScoreGradKernel", "SumPartsKernel", "FinishPartsKernel"),
    "SelectKernel",
)
OF_HOPPER = {"product_sm90": "ProductSm90", "score_grad_sm90": "ScoreEpilogue"}  # the latter is within CUTLASS's kernel


def test_every_group_is_compiled_for_hopper_and_the_general_kernels_for_every_target(library):
    compiled = [
        one for name in library["kernels"] for one in ptxas_log.kernels((cuda.OBJECTS / f"{name}.o.log").read_text())
    ]

    def targets(kernel):  # a symbol has each name after its length
        return {one.architecture for one in compiled if f"{len(kernel)}{kernel}" in one.name}

    general = {target for target in library["targets"] if target.startswith("sm_")}
    assert {kernel: targets(kernel) for kernel in GENERAL} == dict.fromkeys(GENERAL, general)
    assert OF_HOPPER.keys() == set(GROUPS)
    for group in OF_HOPPER.keys() - library["left_out"].keys():
        assert targets(OF_HOPPER[group]) == {"sm_90a"}


@pytest.mark.slow
def test_compiled_kernels_are_as_they_should_be(library):
    """Read the smaller files of every kind of code; of files that differ only in their type, those for bf16.

    `make cuda` builds the kernels, reads all files in a minute, and ends with exit code 1 if it finds a fault.
    """
    objects = {name: cuda.OBJECTS / f"{name}.o" for name in library["kernels"]}
    read = [name for name, path in objects.items() if "_fp16" not in name and path.stat().st_size < 2e6]
    kinds = {"decode_sm80.cu", "product_sm90_bf16.cu", "score_grad_sm80.cu", "select.cu"}
    left_out = tuple(library["left_out"])  # groups, such as product_sm90 for product_sm90_bf16.cu
    assert {kind for kind in kinds if not kind.startswith(left_out)} <= {*read}
    rows = cuda.rows(library | {"kernels": read})
    print("\n" + summary(rows))
    assert {(row.target, row.kernel): row.faults for row in rows if row.faults} == {}
