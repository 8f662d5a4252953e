"""Loading and capturing cubins, as on a GPU but not in a dry run's interpreter, on a driver that records calls."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS, Card

from benchmarks.gpu.device import Gpu
from benchmarks.gpu.timing import Bench, Competitor
from building import cubins as archives
from building.ahead import recorded
from mft_kernels.backends import built
from mft_kernels.backends.triton import cubins, launch, ops, planned, target
from mft_kernels.backends.triton.specialise import identity
from mft_kernels.operands import Keep

pytestmark = pytest.mark.skipif(target.interpreting(), reason="the interpreter launches nothing")

BF16, SIDE = torch.bfloat16, 512
THRESHOLDS = torch.zeros(16, dtype=BF16)
X, WEIGHT, SCORES = (torch.zeros(SIDE, SIDE, dtype=BF16) for _ in range(3))


def forward(threshold):
    return ops.product(X, WEIGHT, Keep(SCORES, threshold, "magnitude"), None, transposed=False)


class Driver:
    """The part of a driver that the library uses: it records loaded binaries and launches."""

    def __init__(self):
        self.loaded, self.launched = [], []
        self.library = SimpleNamespace(
            add_cubin=self.add,
            launch_cubin=lambda number, device, grid, values: self.launched.append(number),
            planned_forward=lambda *_: None,
            remember_plan=lambda *_: None,
            forget_plans=lambda: None,
        )

    def add(self, image, name, warps, shared, layout):
        self.loaded.append((bytes(image.tolist()), name))
        return len(self.loaded) - 1


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Return the driver of a process whose card is an H100, with the cubins of one forward pass."""
    made, found = Driver(), {}
    for one in recorded(lambda: forward(THRESHOLDS[:1].view(())), target.H100):
        about = {"name": one.kernel.__name__, "warps": 4, "shared": 0, "parameters": []}
        found[identity(one.kernel, one.args, one.options)] = (about, b"code of sm_90")
    monkeypatch.setattr(archives, "installed_assembler", lambda arch: (13, 4))
    archives.write_archive(tmp_path, "sm_90", found)
    monkeypatch.setattr(cubins, "FOLDER", tmp_path)
    monkeypatch.setattr(cubins, "load", lambda part: None)
    monkeypatch.setattr(built, "cuda_ops", made.library)
    monkeypatch.setattr(target, "_ask", lambda index: (target.H100, target.H100_OLD_TRITON))
    for module in (launch, target):
        monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.delenv("MFT_TRITON", raising=False)
    yield made
    planned.forget()


@pytest.fixture
def bench(driver, monkeypatch):
    Card(monkeypatch)
    gpu = Gpu()
    gpu.torch_device = torch.device("cpu")
    return Bench(gpu, CEILINGS)


def timed(bench, threshold):
    return bench.compare({"ours": Competitor(lambda copy: forward(threshold))}, 1)


def test_cubins_are_loaded_once_and_captured_and_stand_in_the_record(bench, driver):
    fields = timed(bench, THRESHOLDS[:1].view(()))
    assert fields["failures"] == {}
    sample = fields["samples"]["ours"]
    assert (sample["method"], "note" in sample) == ("graph", False)
    assert sample["kernels"] == ["_masked_product_kernel: cubins, swapped form"]
    assert driver.loaded == [(b"code of sm_90", "_masked_product_kernel")]
    assert len(driver.launched) > sample["calls"]  # its check and estimate, then the capture
    assert str(bench.device.form) == "cubins, swapped form"


def test_a_threshold_that_is_not_aligned_has_no_cubin_and_is_not_timed(bench, driver, monkeypatch):
    """The installed Triton silently compiles another form. That fallback helps users, but must not be timed."""
    launches = []
    kernel = recorded(lambda: forward(THRESHOLDS[0]), target.H100)[0].kernel
    monkeypatch.setattr(
        type(kernel), "__getitem__", lambda self, grid: lambda *_, **options: launches.append(options["MASK_ON_A"])
    )
    monkeypatch.setattr(launch, "compiles_safely", lambda target: False)
    fields = timed(bench, THRESHOLDS[1])
    assert launches
    assert not any(launches)
    assert driver.launched == []
    assert fields["samples"] == {}
    assert fields["failures"]["ours"] == (
        "not what the record names: _masked_product_kernel came from the installed Triton, plain form, "
        "and the record says cubins, swapped form"
    )
