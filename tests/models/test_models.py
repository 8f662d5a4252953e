"""mft.models.pretrained and what it uses: loading, saving, and errors."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft.config import ModelConfig
from mft.files import hub
from mft.files.atomic import NotWritten, atomic_directory
from mft.models.causal_lm import clone_with_own_weights
from mft.models.pretrained import load_model, save_model


@pytest.fixture
def no_hub(monkeypatch):
    """Make the hub's client believe that it is online, with an endpoint where nothing listens."""
    hub.hub_is_reachable.cache_clear()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    yield
    hub.hub_is_reachable.cache_clear()


@pytest.fixture
def saved(tiny_llama, tokenizer, tmp_path):
    return save_model(tiny_llama, tokenizer, tmp_path / "model")


def test_the_shorthand_gives_a_dense_model_with_tied_embeddings(smollm2_dir):
    model, tokenizer = load_model(ModelConfig(name="smollm2-135m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == 2
    assert model.config._name_or_path == "smollm2-135m"
    assert not model.training


def test_the_loaded_model_knows_english(smollm2_dir):
    model, tokenizer = load_model(ModelConfig(name="smollm2-135m"))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_loads_bit_equal_with_plain_transformers(tiny_llama, tokenizer, tmp_path, dtype):
    tiny_llama.to(getattr(torch, dtype))
    directory = save_model(tiny_llama, tokenizer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(directory)
    for (name, before), (same, after) in zip(tiny_llama.state_dict().items(), again.state_dict().items()):
        assert name == same
        assert torch.equal(before, after)
        assert before.dtype == after.dtype
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(directory)("def f(x):")["input_ids"] == tokenizer("def f(x):")["input_ids"]


def test_a_saved_model_loads_in_the_dtype_that_the_config_asks_for(saved):
    model, _ = load_model(ModelConfig(name=str(saved), dtype="float16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_a_model_that_came_from_gguf_can_be_saved(tiny_llama, tokenizer, tmp_path):
    tiny_llama.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf"}
    tiny_llama.is_quantized, tiny_llama.hf_quantizer = True, object()
    directory = save_model(tiny_llama, tokenizer, tmp_path / "model")
    assert "quantization_config" not in (directory / "config.json").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(directory).lm_head.weight, tiny_llama.lm_head.weight)


def test_saving_replaces_a_model_and_leaves_no_traces(saved, tiny_llama, tokenizer):
    tiny_llama.model.norm.weight.data.fill_(5)
    save_model(tiny_llama, tokenizer, saved)
    assert load_model(ModelConfig(name=str(saved)))[0].model.norm.weight.unique().tolist() == [5]
    assert os.listdir(saved.parent) == ["model"]


def test_a_failed_save_keeps_what_was_there(saved, tiny_llama, tokenizer, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def fail(directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny_llama, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(tiny_llama, tokenizer, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert os.listdir(saved.parent) == ["model"]


def test_saving_refuses_a_directory_with_other_files(tiny_llama, tokenizer, tmp_path):
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(ValueError, match=r"directory must be new, empty or a model's, got .* with thesis.docx"):
        save_model(tiny_llama, tokenizer, tmp_path)
    assert (tmp_path / "thesis.docx").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{dir}/no/model", "no such file or directory (nor {dir}/no)"),
        ("./nowhere.gguf", "model.name must be a model that exists, got './nowhere.gguf'"),
        ("{dir}/adapter", "got {dir}/adapter, which holds masks or an adapter: load the base"),
        ("{dir}/ggufs", "without one: name the file, {dir}/ggufs/broken.gguf"),
        (
            "{dir}/ggufs/broken.gguf",
            "{dir}/ggufs/broken.gguf: expected a GGUF file, got one with magic",
        ),
        ("{dir}/model/config.json", "must be a GGUF file if it is a file, got {dir}/model/config.json, which begins"),
        (
            "smollm2",
            "and the hub cannot be reached: check the name and the network, or give a local directory; "
            "did you mean smollm2-135m?",
        ),
        ("someone/some-model", "the hub cannot be reached"),
        ("not a model", "model.name must be smollm2-135m, a directory, a *.gguf file or a hub id, got 'not a model'"),
    ],
)
def test_a_wrong_name_says_what_it_is_and_what_to_do(saved, no_hub, name, message):
    directory = saved.parent
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    (directory / "ggufs").mkdir()
    (directory / "ggufs" / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message.format(dir=directory))):
        load_model(ModelConfig(name=name.format(dir=directory)))
    assert time.monotonic() - start < 10


def without_a_weight(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def without_a_tokenizer(directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def with_a_token_more(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without_a_weight, {}, r"must hold every weight .* 1 are missing, such as model.layers.2.mlp.up"),
        (
            lambda path: os.truncate(path / "model.safetensors", 1000),
            {},
            r"model.safetensors: expected a safetensors file, got 1000 bytes .* damaged",
        ),
        (pickled, {}, "cannot be loaded as a causal language model"),
        (without_a_tokenizer, {}, "cannot be loaded as a tokenizer: "),
        (with_a_token_more, {}, "must embed every token of its tokenizer, got 49153 tokens and 49152"),
        (None, {"attn_implementation": "flash"}, "as a causal language model with attn_implementation='flash': "),
        (
            None,
            {"chat_template": "tula"},
            "chat_template must be tulu, or a Jinja file that exists, got 'tula'; did you",
        ),
    ],
    ids=["a weight", "cut off", "pickled", "no tokenizer", "a token more", "attention", "template"],
)
def test_what_cannot_be_loaded_is_refused(saved, change, config, message):
    if change is not None:
        change(saved)
    with pytest.raises(ValueError, match=message):
        load_model(ModelConfig(name=str(saved), **config))


def test_a_file_that_holds_no_object_where_one_is_due_is_named(saved):
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in [*names, "special_tokens_map.json", "added_tokens.json"]:
        path = saved / name
        kept = path.read_bytes() if path.exists() else None
        for content, got in {b"null": "null", b"[3]": "list"}.items():
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{path}: expected an object, got {got}"):
                load_model(ModelConfig(name=str(saved)))
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)


def test_values_that_make_no_sense_to_transformers_are_one_error(saved):
    for name, changes in (
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"model_type": []}),
        ("config.json", {"vocab_size": 2**62}),
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer.json", {"normalizer": 3}),  # tokenizers raises Exception itself
        ("tokenizer.json", {"added_tokens": 3}),
    ):
        path = saved / name
        kept = path.read_bytes()
        path.write_text(json.dumps(json.loads(kept) | changes))
        with pytest.raises(ValueError, match=f"model.name '{saved}' cannot be loaded as a "):
            load_model(ModelConfig(name=str(saved)))
        path.write_bytes(kept)


def test_what_transformers_would_not_raise_of_a_file_is_not_blamed_on_it(saved, monkeypatch):
    def interrupted(*_, **__):
        raise StopIteration

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(StopIteration):
        load_model(ModelConfig(name=str(saved)))


def test_the_first_of_two_writers_of_the_same_directory_wins(tmp_path):
    def write(number):
        with atomic_directory(tmp_path / "target", replace=lambda: False) as scratch:
            (scratch / "file").write_text(str(number))
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert os.listdir(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() in "01234567"


def test_the_tulu_template_scores_answers_with_their_end_token_and_is_saved(tiny_llama, tokenizer, tmp_path):
    save_model(tiny_llama, tokenizer, tmp_path / "base")
    _, tulu = load_model(ModelConfig(name=str(tmp_path / "base"), dtype="float32", chat_template="tulu"))
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]
    eos = tulu.eos_token
    assert tulu.apply_chat_template(chat, tokenize=False) == (
        f"<|user|>\na\n<|assistant|>\nb{eos}\n<|user|>\nc\n<|assistant|>\nd{eos}"
    )
    assert tulu.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True).endswith("<|assistant|>\n")
    output = tulu.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    scored = [i for i, wanted in zip(output["input_ids"], output["assistant_masks"]) if wanted]
    assert tulu.decode(scored) == f"b{eos}d{eos}"
    save_model(tiny_llama, tulu, tmp_path / "tuned")
    assert load_model(ModelConfig(name=str(tmp_path / "tuned")))[1].chat_template == tulu.chat_template


def test_a_tokenizer_that_cannot_be_written_names_the_directory(tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            raise Exception("Input/output error (os error 5)")

    with pytest.raises(NotWritten, match=r"base could not be written \(Input/output error"):
        save_model(make_llama(), Tokenizer(), tmp_path / "base")
    assert os.listdir(tmp_path) == []


def test_a_clone_shares_all_weights_but_its_own():
    model = make_llama()
    own = "model.layers.3.mlp.up_proj"
    clone = clone_with_own_weights(model, [own])
    for (name, theirs), ours in zip(clone.named_parameters(), model.parameters()):
        assert (theirs.data_ptr() == ours.data_ptr()) == (name != f"{own}.weight")
        assert torch.equal(theirs, ours)
    assert clone.lm_head is not model.lm_head
