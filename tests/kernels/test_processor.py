"""The detected processor, and which path of the cpu library is taken and why."""

import pytest

from mft_kernels.backends import cpu
from mft_kernels.backends.processor import read_processor

AVX512 = "avx512f avx512bw avx512dq avx512vl"
XEON = f"""\
processor	: 0
cpu family	: 6
model		: 143
model name	: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags		: fpu fma avx2 {AVX512} avx512_bf16 amx_bf16 amx_tile amx_int8

processor	: 1
model name	: the second
"""
EPYC = XEON.replace("amx_bf16 amx_tile amx_int8", "").replace("model name	: Intel", "model name	: AMD")
ARM = "processor	: 0\nBogoMIPS	: 2000.00\nFeatures	: fp asimd bf16\n"


def test_the_first_processor_and_the_features_that_our_kernels_use_are_read():
    found = read_processor(XEON)
    assert str(found) == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz family 6 model 143"
    assert found.features == ("amx", "avx512_bf16", "avx512", "avx2")
    assert read_processor(EPYC).features == ("avx512_bf16", "avx512", "avx2")
    assert read_processor(XEON.replace("amx_tile", "")).features == ("avx512_bf16", "avx512", "avx2")
    assert read_processor(XEON.replace("avx512vl", "")).features == ("amx", "avx2")


@pytest.mark.parametrize("text", [ARM, ""])
def test_a_processor_that_tells_less_is_named_by_the_system(text):
    found = read_processor(text)
    assert found.name
    assert (found.family, found.features) == ("", ())


needs_library = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")


@needs_library
@pytest.mark.parametrize("asked", cpu.capabilities())
def test_the_path_that_is_asked_for_is_named_with_those_that_are_passed_over(monkeypatch, asked):
    monkeypatch.setenv("MFT_CPU_CAPABILITY", asked)
    path, reasons = cpu.path_taken()
    assert path == f"{asked}: MFT_CPU_CAPABILITY={asked} asks for it"
    told = dict(reason.split(": ", 1) for reason in reasons)
    ahead = cpu.capabilities()[: cpu.capabilities().index(asked)]
    assert all(f"MFT_CPU_CAPABILITY={asked}" in told[name] for name in ahead)


@needs_library
def test_the_best_path_says_what_it_does_and_no_worse_one_is_excused(monkeypatch):
    monkeypatch.delenv("MFT_CPU_CAPABILITY", raising=False)
    best = cpu.capabilities()[0]
    path, reasons = cpu.path_taken()
    assert path == f"{best}: {cpu.PATHS[best]}"
    assert not {reason.split(":")[0] for reason in reasons} & set(cpu.capabilities())


def test_without_the_library_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", "its library is not built: no compiler")
    assert cpu.path_taken() == ("none, plain PyTorch instead", ["the library: its library is not built: no compiler"])
