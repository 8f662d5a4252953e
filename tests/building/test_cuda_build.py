"""The build of the CUDA library: which nvcc, which files, what is left out and why. Nothing is compiled here."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from building import compile, cuda, left_out, nvcc, register_hazards
from building.compile import CannotBuild, Unit

ROOT = Path(__file__).parents[2]
READERS = register_hazards.Readers("cuobjdump", "nvdisasm")


def toolkit(folder: Path, version: str, ptxas: str | None = None) -> Path:
    """Make a fake CUDA toolkit; return its nvcc."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    (folder / "include" / "cccl").mkdir(parents=True)
    for name, release in (("nvcc", version), ("ptxas", ptxas or version)):
        program = folder / "bin" / name
        program.write_text(
            f'#!/bin/sh\ncase $1 in --dryrun) echo "#\\$ _HERE_={folder}/bin" >&2;;\n'
            f'*) echo "Cuda compilation tools, release {release}, V{release}.88";; esac\n'
        )
        program.chmod(0o755)
    return folder / "bin" / "nvcc"


@pytest.fixture(autouse=True)
def no_toolkit(monkeypatch):
    """Hide every toolkit of this machine."""
    for name in ("CUDA_HOME", "MFT_NVCC", "MFT_CUDA", "CUTLASS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(nvcc, "find_spec", lambda name: None)
    monkeypatch.setattr(register_hazards, "find_spec", lambda name: None)


def test_nvcc_is_found_in_cuda_home_in_the_path_and_in_pypis_package(tmp_path, monkeypatch):
    home, path = toolkit(tmp_path / "home", "12.8"), toolkit(tmp_path / "path", "12.6")
    pypi = toolkit(tmp_path / "site/nvidia/cu13", "13.5")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.find_nvcc().path == home
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    assert nvcc.find_nvcc().path == path
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "site/nvidia")]})
    monkeypatch.setattr(nvcc, "find_spec", lambda name: spec if name == "nvidia" else None)
    found = nvcc.find_nvcc()
    assert (found.path, found.root, found.version, found.ptxas) == (pypi, pypi.parent.parent, (13, 5), (13, 5))
    assert str(found) == f"nvcc 13.5 ({pypi})"


def test_the_newest_assembler_wins_and_a_named_nvcc_is_the_only_one(tmp_path, monkeypatch):
    old, new = toolkit(tmp_path / "a", "13.0", ptxas="13.4"), toolkit(tmp_path / "b", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("PATH", f"{new.parent}:/usr/bin:/bin")
    assert nvcc.find_nvcc().path == old
    monkeypatch.setenv("MFT_NVCC", str(new))
    assert nvcc.find_nvcc().path == new
    monkeypatch.setenv("MFT_NVCC", str(tmp_path / "nowhere"))
    with pytest.raises(CannotBuild, match="nowhere does not run: No such file"):
        nvcc.find_nvcc()


def test_a_script_that_calls_nvcc_leads_to_its_toolkit(tmp_path, monkeypatch):
    real = toolkit(tmp_path / "cuda", "13.0")
    script = tmp_path / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = nvcc.find_nvcc()
    assert (found.path, found.root) == (script, tmp_path / "cuda")
    assert found.include == [tmp_path / "cuda/include", tmp_path / "cuda/include/cccl"]
    assert found.runtime == tmp_path / "cuda/lib64/libcudart_static.a"
    found.runtime.unlink()
    with pytest.raises(CannotBuild, match="no libcudart_static.a below .*pip install nvidia-cuda-runtime"):
        _ = found.runtime


def test_no_nvcc_and_an_old_one_are_refused_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(CannotBuild, match="no nvcc found .*; pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or"):
        nvcc.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    with pytest.raises(CannotBuild, match="old/bin/nvcc does not run"):
        nvcc.find_nvcc()
    toolkit(tmp_path / "old", "12.2")
    with pytest.raises(CannotBuild, match="nvcc must be 12.3 or newer, got nvcc 12.2 .*pip install"):
        nvcc.find_nvcc()


def test_cutlass_is_found_by_its_path_or_in_pypis_package(tmp_path, monkeypatch):
    assert nvcc.find_cutlass() is None
    include = tmp_path / "source" / "include"
    (include / "cute").mkdir(parents=True)
    (include / "cutlass").mkdir()
    (include / "cute" / "tensor.hpp").touch()
    (include / "cutlass" / "version.h").write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"
    )
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(nvcc, "find_spec", lambda name: spec if name == "cutlass_library" else None)
    assert nvcc.find_cutlass() == ("4.2.0", include)
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "source"))
    assert nvcc.find_cutlass() == ("4.2.0", include)
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert nvcc.find_cutlass() is None


@pytest.mark.parametrize(
    ("value", "targets", "required"),
    [
        ("", ["sm_80", "sm_90", "compute_80"], False),
        ("1", ["sm_80", "sm_90", "compute_80"], True),
        ("90", ["sm_90"], True),
        ("120, 80,80", ["sm_80", "sm_120"], True),
    ],
)
def test_mft_cuda_names_the_architectures(value, targets, required, monkeypatch):
    monkeypatch.setenv("MFT_CUDA", value)
    asked = cuda.wanted()
    assert (asked.targets, asked.required) == (targets, required)


def test_mft_cuda_can_refuse_and_cannot_name_what_is_unknown(monkeypatch):
    monkeypatch.setenv("MFT_CUDA", "0")
    assert cuda.wanted() is None
    for value, named in (("89", "89"), ("80,sm_90", "sm_90"), ("yes", "yes"), ("80,", "")):
        monkeypatch.setenv("MFT_CUDA", value)
        with pytest.raises(ValueError, match=f"0, 1 or a list of 80, 90, 100, 120, got '{named}'; for 8.6 and 8.9 say"):
            cuda.wanted()


@pytest.fixture
def sources(tmp_path):
    """Make a fake csrc/cuda."""
    files = {
        "bindings.cpp": "",
        "select.cu": "",
        "product_sm80.cu": "",
        "product_sm80.cpp": "",
        "product_sm90.cpp": "",
        "product_sm90_bf16.cu": '#include "api.h"',
        "score_grad_sm90.cpp": "",
        "score_grad_sm90.cuh": '#include "epilogue.h"',
        "epilogue.h": '#include "score_grad_sm90.cuh"\n#include <cute/tensor.hpp>',
        "score_grad_sm90_bf16.cu": '#include "score_grad_sm90.cuh"',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def compiler(ptxas=(13, 5)):
    return nvcc.Nvcc(Path("/cuda/bin/nvcc"), Path("/cuda"), (13, 0), ptxas)


def planned(sources, *, asked=None, ptxas=(13, 5), cutlass=True, readers=None):
    general, groups, left_out = cuda.plan(sources, asked or cuda.Wanted(), compiler(ptxas), cutlass, readers)
    assert [path.name for path in general] == ["product_sm80.cpp", "product_sm80.cu", "select.cu"]
    return {name: [path.name for path in files] for name, files in groups.items()}, left_out


def test_without_cutlass_only_what_includes_it_is_left_out(sources):
    groups, left_out = planned(sources, cutlass=False)
    assert list(groups) == ["product_sm90"]
    assert left_out == {
        "score_grad_sm90": "CUTLASS's headers are missing; pip install nvidia-cutlass, or set CUTLASS_PATH"
    }


def test_hopper_is_left_out_where_it_is_not_named(sources, monkeypatch):
    monkeypatch.setenv("MFT_CUDA", "80")
    groups, left_out = planned(sources, asked=cuda.wanted())
    assert groups == {}
    assert left_out["product_sm90"] == "it is for sm_90, and MFT_CUDA=80 does not name that"


def test_register_fed_code_needs_a_new_assembler_or_someone_to_read_it(sources):
    assert planned(sources, ptxas=(13, 3))[1] == {}
    assert planned(sources, ptxas=(13, 2), readers=READERS)[1] == {}
    groups, left_out = planned(sources, ptxas=(13, 2))
    assert list(groups) == ["score_grad_sm90"]
    assert "ptxas 13.2 can overwrite registers" in left_out["product_sm90"]
    assert "pip install 'nvidia-cuda-nvcc>=13.3'" in left_out["product_sm90"]


def test_a_file_of_no_group_and_a_tree_without_kernels_are_refused(sources, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CannotBuild, match="there are no kernels in"):
        cuda.plan(empty, cuda.Wanted(), compiler(), True, None)
    (sources / "pack_sm90.cu").touch()
    with pytest.raises(CannotBuild, match=r"must belong to one of product_sm90, score_grad_sm90, got pack_sm90.cu"):
        cuda.plan(sources, cuda.Wanted(), compiler(), True, None)


def test_each_file_is_compiled_for_its_own_gpus(sources):
    general, groups, _ = cuda.plan(sources, cuda.Wanted(), compiler(), True, None)
    general.append(Path("decode_sm80.cu"))
    units = cuda.kernel_units(general, groups, cuda.Wanted(), compiler(), "g++", [Path("/cutlass")])
    flags = {unit.source.name: unit.flags for some in units.values() for unit in some}
    assert "-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]" in flags["select.cu"]
    of_decode = {flag for flag in flags["decode_sm80.cu"] if flag.startswith("-gencode")}
    assert of_decode == {"-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90"}
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags["product_sm90_bf16.cu"]
    assert "--ptxas-options=-v" in flags["product_sm90_bf16.cu"]
    assert not any(flag.startswith(("-gencode", "--")) for flag in flags["product_sm90.cpp"])
    # Every CUDA 13 driver unpacks code of this mode; older drivers may not.
    assert "--compress-mode=size" in flags["select.cu"]
    older = cuda.kernel_units(general, groups, cuda.Wanted(), replace(compiler(), version=(12, 9)), "g++", [])
    assert not any("--compress-mode=size" in unit.flags for some in older.values() for unit in some)
    # Otherwise everything would be compiled again if CUTLASS is installed later.
    assert "/cutlass" in flags["product_sm90_bf16.cu"]
    assert "/cutlass" not in flags["select.cu"]


HGMMA = "        /*0000*/  HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;\n"
OVERWRITE = "        /*0010*/  MOV R5, RZ ;\n"
WAIT = "        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
EXIT = "        /*0030*/  EXIT ;\n"


@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        (HGMMA + WAIT + EXIT, None),
        (HGMMA + OVERWRITE + WAIT + EXIT, "ptxas 13.0 overwrites registers in flight .kernel: 0x0010 writes R5"),
        (WAIT + EXIT, "found no warpgroup MMA from registers"),
        (HGMMA + "        /*0010*/  BRX R4 -0x10 ;\n", "could not be checked .kernel: jumps must name"),
    ],
)
def test_an_old_assemblers_code_is_read(code, refusal, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(register_hazards, "disassemble", lambda readers, path: {"kernel": code})
    reason = register_hazards.refusal_after((13, 0), READERS, [tmp_path])
    assert register_hazards.refusal_after((13, 3), None, [tmp_path]) is None
    assert reason is None if refusal is None else re.search(refusal, reason)


@pytest.mark.parametrize("with_ninja", [True, False])
def test_logs_are_kept_and_the_first_error_is_the_reason(with_ninja, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "nvcc"
    fake.write_text(
        '#!/bin/sh\necho "Used 8 registers"\ncase "$*" in *bad*) echo "bad.cu(1): error: no"; exit 1;; esac\n'
    )
    fake.chmod(0o755)
    if not with_ninja:
        monkeypatch.setattr(compile, "find_ninja", lambda: None)
    elif compile.find_ninja() is None:
        pytest.skip("needs ninja")
    for name in ("good.cu", "bad.cu"):
        (tmp_path / name).touch()
    good, bad = (Unit(tmp_path / f"{name}.cu", str(fake), ["-O1"]) for name in ("good", "bad"))
    compile.build(tmp_path / "out", [good], jobs=1)
    assert (tmp_path / "out" / good.log).read_text() == "Used 8 registers\n"
    assert "good.cu" in capsys.readouterr().out
    with pytest.raises(CannotBuild, match=r"failed: bad.cu\(1\): error: no$"):
        compile.build(tmp_path / "out", [good, bad], jobs=1)


def setup_in(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py build_ext, or other arguments, in a copy of the tree with almost no sources, and no nvcc."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in ("building", "mft_kernels", "csrc/cpu", "csrc/cuda"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    for path in (*(ROOT / "building").glob("*.py"), ROOT / "mft_kernels" / "_version.py"):
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    (folder / "csrc" / "cpu" / "one.cpp").write_text("int one() { return 1; }\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "MFT_BUILD", "MFT_CUDA", "CUDA_HOME")}
    command = [sys.executable, "setup.py", "-q", *(arguments or ("build_ext", "--inplace"))]
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True)


def driver_with(folder: Path, *, gpus: int, status: int = 0) -> dict[str, str]:
    """Return an environment in which NVIDIA's driver is a fake that counts ``gpus`` GPUs; cuInit returns ``status``."""
    source = folder / "driver.cpp"
    source.write_text(
        f'extern "C" int cuInit(unsigned) {{ return {status}; }}\n'
        f'extern "C" int cuDeviceGetCount(int* count) {{ *count = {gpus}; return 0; }}\n'
    )
    library = folder / "libcuda.so.1"
    subprocess.run([compile.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


@pytest.mark.parametrize(("gpus", "status", "present"), [(2, 0, True), (0, 0, False), (1, 100, False)])
def test_a_gpu_is_present_if_the_driver_counts_one(tmp_path, gpus, status, present):
    environment = os.environ | driver_with(tmp_path, gpus=gpus, status=status)
    code = "from building.gpu import gpu_is_present; print(gpu_is_present())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(present), done.stderr


@pytest.mark.slow
def test_an_nvcc_is_not_run_without_a_gpu_unless_mft_cuda_asks(tmp_path):
    environment = driver_with(tmp_path, gpus=0) | {"MFT_NVCC": str(toolkit(tmp_path / "cuda", "13.0"))}
    result = setup_in(tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    reason = "no NVIDIA GPU was found; make cuda builds it anyway"
    assert f"mft_kernels: without libmft_cuda.so: {reason}\n" in result.stdout
    report = json.loads((tmp_path / "mft_kernels" / "_build.json").read_text())
    assert report["cuda"] == {"built": False, "reason": reason}
    assert left_out.lines(report) == [f"without libmft_cuda.so: {reason}"]
    for asked in ("1", "80,90"):
        demanded = setup_in(tmp_path, MFT_CUDA=asked, **environment)
        assert demanded.returncode != 0
        assert "there are no kernels in" in demanded.stderr


def test_the_install_goes_on_without_an_nvcc_and_keeps_the_reason(tmp_path):
    result = setup_in(tmp_path, MFT_NVCC=str(tmp_path / "nvcc"), **driver_with(tmp_path, gpus=1))
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if "libmft_cuda.so" in line] == [
        f"mft_kernels: without libmft_cuda.so: {tmp_path}/nvcc does not run: No such file or directory; {nvcc.INSTALL}"
    ]
    report = json.loads((tmp_path / "mft_kernels" / "_build.json").read_text())
    assert report["cpu"]["built"]
    assert (tmp_path / "mft_kernels" / "libmft_cpu.so").exists()
    assert not report["cuda"]["built"]
    assert report["cuda"]["reason"].startswith(f"{tmp_path}/nvcc does not run")


@pytest.mark.slow
def test_without_a_compiler_only_a_package_without_kernels_can_be_built(tmp_path):
    refused = setup_in(tmp_path, CXX="nowhere-g++")
    assert refused.returncode == 1
    assert refused.stdout == "", "nothing stands before what to do"
    assert refused.stderr == (
        "mft_kernels: its kernels cannot be built: no C++ compiler found (nowhere-g++); install one, for instance g++. "
        "Without kernels, in plain PyTorch: MFT_BUILD=0\n"
    )
    assert not (tmp_path / "mft_kernels" / "_build.json").exists()
    asked = setup_in(tmp_path, CXX="nowhere-g++", MFT_BUILD="0")
    assert asked.returncode == 0, asked.stderr
    report = json.loads((tmp_path / "mft_kernels" / "_build.json").read_text())
    assert [report[part]["reason"] for part in ("cpu", "cuda")] == ["the build was skipped: MFT_BUILD=0"] * 2
    assert setup_in(tmp_path, "--version", CXX="nowhere-g++").returncode == 0, "what builds nothing needs nothing"
    unknown = setup_in(tmp_path, MFT_BUILD="no")
    assert unknown.returncode != 0
    assert "MFT_BUILD must be 0 (no kernels) or 1, got 'no'" in unknown.stderr


def test_an_isolated_build_says_first_that_it_hides_torch(tmp_path):
    setup_in(tmp_path, "--version")
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['bdist_wheel']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch is not importable while building" in done.stderr
    assert "install torch, then pip install --no-build-isolation" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("kernels", "tag"), [("1", "py3-none-linux"), ("0", "py3-none-any")])
def test_a_wheel_is_for_every_python(tmp_path, kernels, tag):
    done = setup_in(tmp_path, "bdist_wheel", "--dist-dir", "out", MFT_BUILD=kernels, MFT_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert tag in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert ("mft_kernels/libmft_cpu.so" in archive.namelist()) == (kernels == "1")
