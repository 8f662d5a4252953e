"""The report on the compiled CUDA kernels finds what is wrong with a kernel, and finds nothing in what is built here.

`make cuda` builds the kernels, `python -m benchmarks.kernel_code --only cuda` prints the table. No GPU is needed.
"""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from triton import knobs

if knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.kernel_code import cuda, cuda_launches, cuda_object
from benchmarks.kernel_code.cuda_launches import Launch
from building import ptxas_log
from building.cuda import GROUPS
from building.machine_code import sass
from mft_kernels.backends import built

TRITON_36 = Path(__file__).parent / "data" / "rs_hazard_triton36.sass.gz"

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


def read(folder, **asked):
    cubin, log = assembled(folder, **asked)
    (kernel,) = cuda_object.kernels(cubin, log)
    return kernel


def test_a_kernel_is_read_from_its_object_and_its_log(tmp_path):
    kernel = read(tmp_path, blocks=2)
    assert (kernel.symbol, kernel.name) == (NAME, "ProductSm90<BFloat16, MaskKind 2, false, 64>")
    assert (kernel.target, kernel.threads, kernel.blocks) == ("sm_90a", 256, 2)
    assert (kernel.spilled, kernel.code.stack, kernel.code.spills, kernel.warnings) == (0, 0, 0, ())
    assert 64 < kernel.code.registers <= 128
    assert kernel.code.shared == 512
    assert kernel.code.counts["LDG"] == kernel.code.counts["STG"] == 64


@pytest.mark.parametrize(("target", "blocks"), [("sm_80", 1), ("sm_80", 4), ("sm_90a", 1), ("sm_90a", 3)])
def test_launch_bounds_and_shared_memory_are_read_for_each_target(tmp_path, target, blocks):
    kernel = read(tmp_path, blocks=blocks, target=target, count=8)
    assert (kernel.target, kernel.threads, kernel.blocks, kernel.code.shared) == (target, 256, blocks, 512)


def test_a_spill_is_a_fault(tmp_path):
    kernel = read(tmp_path, blocks=8)
    assert kernel.spilled > 0
    assert kernel.code.spill_stores > 0
    found = faults(kernel)
    assert f"{kernel.spilled} bytes spilled" in found
    assert f"a stack of {kernel.code.stack} bytes" in found


def test_a_serialised_mma_is_a_fault(tmp_path):
    cubin, log = assembled(tmp_path, blocks=2)
    for where in (f" in the function '{NAME}'", ""):
        (kernel,) = cuda_object.kernels(cubin, log + SERIALISED + where)
        assert SERIALISED in faults(kernel)
    (kernel,) = cuda_object.kernels(cubin, log + SERIALISED + f" in the function '{NAME}'")
    assert len(kernel.warnings) == 1


def test_a_log_of_another_compilation_is_refused(tmp_path):
    cubin, log = assembled(tmp_path, blocks=2)
    with pytest.raises(ValueError, match="must be of one compilation"):
        cuda_object.kernels(cubin, "")
    with pytest.raises(ValueError, match="must be of one compilation"):
        cuda_object.kernels(cubin, log + log.replace("sm_90a", "sm_80"))
    with pytest.raises(ValueError, match="must be of one compilation"):
        cuda_object.kernels(cubin, log.replace("Used ", "Used 1"))


MMA = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
FROM_SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, "
GOOD = ["LDSM.16.M88.4 R8, [R9]", MMA, f"{WAIT}0x1"]


def code(*lines):
    """Return nvdisasm's text of a loop of these instructions."""
    lines = ("UTMALDG.2D [UR8], [UR4]", *lines, "@P0 BRA `(.L_loop)", "EXIT")
    text = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    return "\n".join([text[0], ".L_loop:", *text[1:]])


def kernel_of(*lines, name="ProductSm90<BFloat16, MaskKind 2, false, 64>", target="sm_90a", registers=168, **changed):
    text = code(*lines)
    read = sass.code_of(text, registers, 0, 0)
    return replace(cuda_object.Kernel(NAME, name, target, 384, 1, 0, read, text, ()), **changed)


def faults(kernel, launched=None):
    return cuda.row(kernel, {90: Launch(kernel.threads, 230400)} if launched is None else launched).faults


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
    assert any(fault in found for found in faults(kernel_of(*lines)))


def test_cutlasss_loop_may_take_both_operands_from_shared_memory():
    assert faults(kernel_of(FROM_SHARED, f"{WAIT}0x0", name="ScoreGradSm90<Float16, float>")) == ()


def test_a_general_product_without_hmma_is_a_fault():
    general = {"name": "ProductKernel<Float16, Words, true, true, 128>", "target": "sm_80", "registers": 128}
    launched = {80: Launch(384, 4096)}
    assert faults(kernel_of("FFMA R1, R2, R3, R4", **general), launched) == ("no loop with HMMA",)
    assert faults(kernel_of("HMMA.16816.F32 R24, R20, R68, R24", **general), launched) == ()
    decode = general | {"name": "DecodeKernel<BFloat16, Words, true, 2, 7>", "target": "sm_90"}
    product = "HMMA.16816.F32 R24, R20, R68, R24"
    alone = ("no barrier of a cluster, which is launched there",)
    assert faults(kernel_of(product, **decode), launched) == alone
    assert faults(kernel_of(product, "UCGABAR_ARV", **decode), launched) == ()


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (168, 384, 230400, 1),
        (176, 384, 0, 0),  # 12 warps of 5,632 registers: a quarter holds 2
        (128, 256, 0, 2),
        (129, 256, 0, 1),
        (136, 160, 0, 2),  # 5 warps of 4,352 registers: a quarter holds 3, all together 12
        (32, 256, 116224, 1),  # half of the total, without the system's KiB
        (32, 256, 113 * 1024, 2),
        (16, 1024, 0, 2),  # the most threads possible
    ],
)
def test_blocks_that_fit_a_multiprocessor(registers, threads, shared, blocks):
    assert cuda.blocks_that_fit(registers, threads, shared, cuda._GPUS[90]) == blocks


def test_a_kernel_that_does_not_fit_as_often_as_it_says_is_a_fault():
    kernel = kernel_of(*GOOD, blocks=2, threads=256, registers=128)
    launched = {90: Launch(256, 120 * 1024)}
    assert faults(kernel, launched) == ("2 blocks shall share a multiprocessor, registers and shared memory let 1",)


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
def test_compiled_kernels_are_as_they_should_be(library, monkeypatch):
    """Read the smaller files of every kind of code; of files that differ only in their type, those for bf16.

    `make cuda` builds the kernels, reads all files in a minute, and ends with exit code 1 if it finds a fault.
    """
    objects = {name: cuda.OBJECTS / f"{name}.o" for name in library["kernels"]}
    read = [name for name, path in objects.items() if "_fp16" not in name and path.stat().st_size < 2e6]
    kinds = {"decode_sm80.cu", "product_sm90_bf16.cu", "score_grad_sm80.cu", "select.cu"}
    left_out = tuple(library["left_out"])  # groups, such as product_sm90 for product_sm90_bf16.cu
    assert {kind for kind in kinds if not kind.startswith(left_out)} <= {*read}
    others = [path for name, path in objects.items() if name not in read]  # they link with each other
    monkeypatch.setattr(cuda, "launches", lambda some: cuda_launches.launches([*some, *others]))
    rows = cuda.rows(library | {"kernels": read})
    print("\n" + cuda.table(rows))
    assert {(row.target, row.kernel): row.faults for row in rows if row.faults} == {}
