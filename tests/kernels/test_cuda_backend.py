"""The cuda backend on a machine without a GPU: the library loads, and every refusal gives its reason.

cuda_kernels/test_bindings.py tests what its ops do with tensors, and its neighbours what the kernels compute.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mft_kernels
from mft_kernels.backends import built, cpu, cuda
from mft_kernels.backends import table as backends
from mft_kernels.codes import Int4, Int8, Nf4
from mft_kernels.operands import Experts, KeepByTask
from mft_kernels.testing import integer_inputs

LIBRARY = Path(cuda.__file__).with_name("libmft_cuda.so")
NO_LIBRARY = cuda.load("cuda")  # what the module itself asked when it was imported

needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=f"cuda backend: {NO_LIBRARY}; make cuda")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@needs_library
def test_the_ops_are_registered_for_cuda_tensors():
    for name in ("product", "score_grad_", "kept_threshold", "pack_mask", "pack_signs"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mft_cuda::{name}", "CUDA"), name
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"mft_cuda::{name}", "CPU"), name


@needs_library
def test_a_tensor_on_the_cpu_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="'mft_cuda::kept_threshold' .* 'CPU' backend"):
        cuda.select(torch.ones(2, 2), 0.5, "magnitude")


@needs_library
def test_the_library_says_what_it_holds():
    targets, *kernels = torch.ops.mft_cuda.contents().split()
    report = built.report("cuda")
    assert targets.split(".") == report["targets"]
    assert {*kernels} == {"product_sm90", "score_grad_sm90"} - report["left_out"].keys()
    assert torch.ops.mft_cuda.versions()[0] >= 12030
    assert all(
        kernel in cuda._detail() for kernel in ("product_sm90", "score_grad_sm90")
    )  # if the library lacks it, with the reason


@needs_library
def test_the_library_needs_torch_and_nothing_of_cuda():
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True)
    if needed.returncode != 0:
        pytest.skip(f"readelf cannot read the library: {needed.stderr}")
    libraries = [line.split("[")[1].rstrip("]") for line in needed.stdout.splitlines() if "(NEEDED)" in line]
    assert "libtorch.so" in libraries  # it provides the stream getter of a CUDA build
    assert not [name for name in libraries if name.startswith(("libcuda", "libnv", "libpython", "libc10"))]
    undefined = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True).stdout
    symbols = dict(reversed(line.split()[-2:]) for line in undefined.splitlines())
    assert symbols["aoti_torch_get_current_cuda_stream"] == "w"
    assert not [s for s in symbols if s.startswith(("cu", "__cuda", "Py", "_Py")) or "c10" in s or "at6native" in s]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_a_request_raises_and_the_report_says_why():
    t = integer_inputs(2, 3, 4, BFLOAT16, BFLOAT16)
    row = mft_kernels.backend_report()["backends"]["cuda"]
    expected = "no GPU found by torch" if NO_LIBRARY is None else "its library is not built: "
    assert not row["available"]
    assert row["reason"].startswith(expected)
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot serve masked_linear: {expected}"):
        mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0), backend="cuda")


@pytest.fixture
def backend(monkeypatch):
    """Return the backend as on a machine with the library and a GPU."""
    monkeypatch.setattr(cuda, "_device_refusal", lambda index: None)
    registered = backends._TABLE["cuda"]
    return cuda._Cuda(
        registered.name,
        registered.device_types,
        registered.dtypes,
        registered.functions,
        registered.takes,
        on_request=registered.on_request,
    )


def test_products_in_float32_are_tritons_and_scores_in_float32_are_not(backend):
    gpu = torch.device("cuda", 0)
    for function in ("product", "gradients", "score_grad"):
        assert backend.refusal(function, gpu, (FLOAT32,)) == (
            "its products take bfloat16 or float16, got float32: the triton backend takes float32"
        )
        assert backend.refusal(function, gpu, (BFLOAT16, FLOAT32)) is None
    for function in ("select", "pack", "signs"):
        assert backend.refusal(function, gpu, (FLOAT32,)) is None
    assert "it takes bfloat16, float16, float32, got float64" in backend.refusal("pack", gpu, (torch.float64,))
    assert "it runs on cuda, got a tensor on cpu" in backend.refusal("pack", torch.device("cpu"), (FLOAT32,))


@pytest.mark.parametrize("operand", [Experts, KeepByTask, Nf4, Int8, Int4])
def test_what_it_does_not_take_is_refused_by_its_name(backend, operand):
    refusal = backend.refusal("product", torch.device("cuda", 0), (BFLOAT16,), frozenset({operand}))
    assert refusal == f"its product takes no {operand.__name__}"


@pytest.mark.parametrize(
    ("capability", "targets", "refusal"),
    [
        (75, ["sm_80", "compute_80"], "it needs compute capability 8.0 or newer, got 7.5"),
        (80, ["sm_80"], None),
        (89, ["sm_80"], None),
        (90, ["sm_80"], "it was built for sm_80, got compute capability 9.0; build it with another MFT_CUDA"),
        (90, ["sm_80", "sm_90"], None),
        (86, ["sm_90"], "it was built for sm_90, got compute capability 8.6; build it with another MFT_CUDA"),
        (120, ["sm_80", "sm_90", "compute_80"], None),
        (121, ["sm_120"], None),
        (103, ["sm_120", "sm_90"], "it was built for sm_120, sm_90, got compute capability 10.3; build"),
    ],
)
def test_a_gpu_needs_code_of_its_own_generation_or_portable_code(capability, targets, refusal):
    reason = cuda._capability_refusal(capability, targets)
    assert reason is None if refusal is None else reason.startswith(refusal)


def test_a_driver_must_know_the_runtimes_major_version():
    assert cuda._driver_refusal(13050, 13000) is None
    assert cuda._driver_refusal(12080, 13000) is None
    reason = cuda._driver_refusal(13050, 12080)
    assert reason.startswith(
        "it was built with CUDA 13.5, and the driver serves up to 12.8; update the driver, or build"
    )


def test_what_is_not_built_or_does_not_load_is_told(tmp_path):
    for part in ("cpu", "cuda"):
        assert "not built: setup.py has not run" in built.load(part, tmp_path)
    (tmp_path / "_build.json").write_text('{"cuda": {"built": false, "reason": "no nvcc found"}}')
    assert "its library is not built: no nvcc found; see setup.py" in built.load("cuda", tmp_path)
    assert "not built: setup.py has not run" in built.load("cpu", tmp_path)
    (tmp_path / "libmft_cuda.so").write_bytes(b"not a library")
    assert "does not load with torch" in built.load("cuda", tmp_path)
    shutil.copy(torch._C.__file__, tmp_path / "libmft_cpu.so")
    assert "has no mft_register_ops: it was built from other sources" in built.load("cpu", tmp_path)


needs_cpu = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")


@needs_cpu
def test_a_library_defines_its_ops_in_as_many_namespaces_as_are_asked_for():
    library, x = built.library_path("cpu"), torch.tensor([[3.0, -1.0, 2.0]])
    for _ in range(2):  # the second call has nothing left to do
        built.load_ops(library, "test_built_cpu")
    assert torch.ops.test_built_cpu.kept_thresholds(x, 2, True) == torch.ops.mft_cpu.kept_thresholds(x, 2, True) == 2


@needs_cpu
def test_two_libraries_do_not_share_a_namespace(tmp_path):
    copy = tmp_path / "copy.so"  # to the loader, another file is another library
    shutil.copy(built.library_path("cpu"), copy)
    built.load_ops(copy, "test_built_copy")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the ops of .*copy.so cannot be defined in mft_cpu: "):
            built.load_ops(copy, "mft_cpu")
    assert torch.ops.mft_cpu.capability() == torch.ops.test_built_copy.capability()
