"""The report on the compiled CUDA kernels finds what is wrong with a kernel, and finds nothing in what is built here.

`make cuda` builds the kernels, `python -m benchmarks.kernel_code --only cuda` prints the table. No GPU is needed.
"""

import gzip
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from triton import knobs

if knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.kernel_code import __main__ as command
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


def test_names_are_those_that_a_reader_knows():
    cutlass = "_ZN7cutlass13device_kernelI_N3mft4cuda13ScoreEpilogueINS1P_8BFloat16E"
    assert cuda_object.short_name(cutlass + "fEES12_", "") == "ScoreGradSm90<BFloat16, float>"
    assert cuda_object.short_name(cutlass + "S1R_EES12_", "") == "ScoreGradSm90<BFloat16, BFloat16>"
    demangled = "void mft::cuda::isa::entry<mft::cuda::SelectKernel<unsigned short, true, 0, 15> >(mft::Arguments)"
    assert cuda_object.short_name("", demangled) == "SelectKernel<unsigned short, true, 0, 15>"
    with pytest.raises(ValueError, match="a kernel must be isa::entry<...> or have ScoreEpilogue<...>, got f()"):
        cuda_object.short_name("_Z1fv", "f()")
    assert cuda.numbers("SelectKernel<unsigned short, true, 0, 15>") == ["0", "15"]
    assert cuda.numbers("ProductSm90<BFloat16, MaskKind 2, false, 64>") == ["64"]
    assert cuda.numbers("ClearKernel") == []


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


def test_a_good_loop_has_no_fault():
    row = cuda.row(kernel_of(*GOOD), {90: Launch(384, 230400)})
    assert row.faults == ()
    assert row.loops == ("HGMMA 1 (1 from registers), waits 0+1, LDSM 1, 4 instructions",)
    assert (row.blocks, row.declared, row.shared) == (1, 1, 230400)


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


def test_a_hopper_kernel_that_copies_without_tma_is_a_fault():
    kernel = kernel_of(*GOOD)
    kernel.code.counts["UTMALDG"] = 0
    assert faults(kernel) == ("no copies by TMA",)


def test_the_operands_that_triton_3_6_overwrites_would_be_a_fault():
    kernel = replace(kernel_of(*GOOD), text=gzip.decompress(TRITON_36.read_bytes()).decode())
    assert any(found.startswith("41 hazards") for found in faults(kernel))


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


def test_what_a_launch_asks_for_is_judged_on_each_gpu_that_runs_the_code():
    kernel = kernel_of("FADD R1, R2, R3", name="SelectKernel<unsigned short, true, 0, 15>", target="sm_80")
    kernel = replace(kernel, threads=1024, code=replace(kernel.code, registers=40))
    assert faults(kernel, {80: Launch(1024, 131072), 86: Launch(1024, 8192)}) == ()
    (fault,) = faults(kernel, {80: Launch(1024, 8192), 86: Launch(1024, 131072)})
    assert fault == "131072 bytes of shared memory, 8.6 gives a block 101376"
    assert faults(kernel, {80: Launch(512, 0)}) == ("launched with 512 threads, compiled for 1024",)
    (fault,) = faults(kernel, {})
    assert fault.startswith("nothing launches it")


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


def test_how_many_blocks_fit_is_asked_of_the_launch_on_the_target_s_own_gpu():
    general = {"name": "ProductKernel<Float16, float, true, true, 128>", "target": "sm_80", "registers": 128}
    kernel = kernel_of("HMMA.16816.F32 R24, R20, R68, R24", **general, threads=256, blocks=2)
    assert faults(kernel, {80: Launch(256, 65536), 89: Launch(256, 98304)}) == ()  # 8.9 has room for only one
    (fault,) = faults(kernel, {80: Launch(256, 98304), 89: Launch(256, 65536)})
    assert fault == "2 blocks shall share a multiprocessor, registers and shared memory let 1"


def test_a_loop_in_which_threads_part_is_still_a_loop():
    """Each barrier is used repeatedly: here before the loop and inside it, for each tile."""
    lines = [
        ".L_tiles:", "BSSY B0, `(.L_a)", "@P1 BRA `(.L_b)", "NOP", ".L_b:", "BSYNC B0", ".L_a:", "NOP",
        ".L_loop:", "BSSY B0, `(.L_c)", "@P1 BRA `(.L_d)", "NOP", ".L_d:", "BSYNC B0", ".L_c:",
        "HMMA.16816.F32 R24, R20, R68, R24", "@P0 BRA `(.L_loop)",
        "@P2 BRA `(.L_tiles)", "EXIT",
    ]  # fmt: skip
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    (loop,) = sass.code_of("\n".join(text), 0, 0, 0).loops
    assert loop.counts == Counter(BSSY=1, BRA=2, NOP=1, BSYNC=1, HMMA=1)


STUBS = """
#include "api.h"
extern "C" {
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*);
int cudaFuncSetAttribute(const void*, int, int);
int cudaLaunchKernelExC(const void*, const void*, void**);
}
namespace mft::cuda {
char kernel;
std::string launch(size_t bytes) {
  struct { unsigned grid[3] = {1, 1, 1}, block[3] = {256, 1, 1}; size_t bytes; void* stream = nullptr;
           void* attributes = nullptr; unsigned count = 0; } shape;
  shape.bytes = bytes;
  return cudaLaunchKernelExC(&shape, &kernel, nullptr) ? "no launch" : "";
}
bool takes_decode(const Product&) { return false; }
std::string decode_sm80(const Product&, const Device&) { return ""; }
std::string product_general(const Product& p, const Device&) {
  __cudaRegisterFunction(nullptr, &kernel, nullptr, "one_kernel", 0, nullptr, nullptr, nullptr, nullptr, nullptr);
  ASK
  return launch(p.transposed ? 65536 : 512);
}
std::string score_grad_sm80(const ScoreGrad&, const Device&) { return ""; }
std::string kept_threshold(const Select&, const Device&) { return ""; }
std::string pack_mask(const PackMask&, const Device&) { return ""; }
std::string pack_signs(const PackSigns&, const Device&) { return ""; }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="the calls are compiled with g++, and there is none")
def test_launches_are_recorded_and_what_a_driver_would_refuse_is_refused(tmp_path):
    source, compiled = tmp_path / "stubs.cpp", tmp_path / "stubs.o"

    def launches(ask):
        source.write_text(STUBS.replace("ASK", ask))
        folder = f"-I{cuda.SOURCES}"
        subprocess.run(["g++", "-std=c++17", folder, "-c", source, "-o", compiled], check=True)
        return cuda_launches.launches([compiled])

    found = launches("cudaFuncSetAttribute(&kernel, 8, 65536);")
    assert found == {"one_kernel": dict.fromkeys((80, 86, 87, 89, 90, 100, 120), Launch(256, 65536))}
    with pytest.raises(ValueError, match="every call must launch, got 'no launch' for 8.0"):
        launches("")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Make a source with a header, and its object, log and report."""
    for name, text in {"a.cu": '#include "a.h"\n', "a.h": "", "a.cu.o": "", "a.cu.o.log": ""}.items():
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1000, 2000 if name.startswith("a.cu.o") else 1000))
    monkeypatch.setattr(cuda, "SOURCES", tmp_path)
    monkeypatch.setattr(cuda, "OBJECTS", tmp_path)
    return tmp_path


def test_kernels_that_are_not_there_are_told(tree, monkeypatch, capsys):
    report = {"built": True, "kernels": {"a.cu": {}}}
    assert cuda.missing(report) is None
    os.utime(tree / "a.h", (3000, 3000))
    assert cuda.missing(report) == "a.h has changed since a.cu was compiled; make cuda"
    (tree / "a.cu.o.log").unlink()
    assert cuda.missing(report) == "a.cu.o or its log is not in build/cuda; make cuda"
    assert cuda.missing({}) == "it was never built; make cuda"
    monkeypatch.setattr(built, "report", lambda part: {"built": False, "reason": "no nvcc found"})
    document = tree / "table.md"
    document.write_text("# Old title\n\nOld words.\n\n## Triton\n\nkept\n\n## CUDA C++\n\nreplaced\n")
    assert command.main(["--only", "cuda", "--out", str(document)]) == 0
    assert "without the CUDA kernels: no nvcc found" in capsys.readouterr().out
    text = document.read_text()
    assert text.startswith(command._TITLE)
    assert text.endswith("## Triton\n\nkept\n\n## CUDA C++\n\nNot read: no nvcc found.\n")
    assert command.main(["--only", "cuda", "--out", str(tree / "new" / "table.md")]) == 0
    assert f"## Triton\n\n{command._UNREAD}\n\n## CUDA" in (tree / "new" / "table.md").read_text()


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
