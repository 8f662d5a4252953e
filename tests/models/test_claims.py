"""A config that claims more than its weight files can hold is refused before anything is built."""

import json

import pytest
import torch
from hub_stub.asked import hub_for
from huggingface_hub import constants
from limits import peak_of
from tiny import make_llama, save_llama
from tiny_gguf import write_tiny_gguf

from mft.config import ModelConfig
from mft.files.hub import hub_is_reachable
from mft.models import claims
from mft.models.pretrained import load_model, load_outline, load_tokenizer

MOST = 300 * 2**20  # bytes that a refusal may take, with imports: it builds a model on the meta device
LOAD = "from mft.models.pretrained import load_model"
EACH = """
for name in {}:
    try:
        load_model(name)
        print(name, "read")
    except ValueError as error:
        print(error)
"""
LAYERS = "num_hidden_layers must be at most 256, got 30000 for 39 tensors in its weights: copy config and weights again"
PARAMETERS = "must have weights for all that its config claims, got "
NAME = "someone/small"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the directory of an ordinary model with 39 tensors."""
    directory = tmp_path_factory.mktemp("models") / "small"
    save_llama(directory)
    return directory


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_for(tmp_path, monkeypatch, token=None) as hub:
        yield hub


def claiming(small, directory, **claimed):
    """Copy the model to ``directory``, with a config that claims other values."""
    directory.mkdir()
    for path in small.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | claimed))
    return directory


CLAIMED = [
    ({"num_hidden_layers": 30_000}, LAYERS),
    ({"text_config": {"num_hidden_layers": 10**12}}, "num_hidden_layers must be at most 256, got 1000000000000"),
    ({"hidden_size": 200_000}, PARAMETERS),
    ({"intermediate_size": 10_000_000}, PARAMETERS),
    ({"vocab_size": 10_000_000}, PARAMETERS),
]


@pytest.mark.slow
def test_small_files_that_claim_a_large_model_are_refused_in_little_time_and_memory(small, tmp_path):
    expected = {claiming(small, tmp_path / str(i), **claimed): said for i, (claimed, said) in enumerate(CLAIMED)}
    write_tiny_gguf(tmp_path / "large.gguf", feed_forward=5_000_000)
    expected[tmp_path / "large.gguf"] = PARAMETERS
    taken = peak_of(LOAD, EACH.format(list(map(str, expected))))
    for line, (path, words) in zip(taken.said.splitlines(), expected.items()):
        assert str(path) in line
        assert words in line
    assert taken.bytes < MOST
    assert taken.seconds < 30


@pytest.mark.parametrize("load", [load_tokenizer, load_outline])
def test_its_tokenizer_and_outline_are_refused_too(small, tmp_path, load):
    directory = claiming(small, tmp_path / "large", num_hidden_layers=30_000)
    with pytest.raises(ValueError, match=LAYERS):
        load(ModelConfig(str(directory)))


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_and_tied_models_hold_what_they_claim(small, tmp_path, monkeypatch, tied):
    monkeypatch.setattr(claims, "_ANY_PARAMETERS", 0)
    directory = claiming(small, tmp_path / "sharded")
    (directory / "model.safetensors").unlink()
    model = make_llama(torch.bfloat16, tie_word_embeddings=tied)
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert load_model(str(directory))[0].num_parameters() == model.num_parameters()


def test_weights_of_two_bits_and_layers_that_share_theirs_are_no_contradiction(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "_ANY_PARAMETERS", 0)
    with torch.device("meta"):
        outline = torch.nn.Linear(4096, 4096, bias=False)
    claims.check_parameters(outline, 4096 * 4096 // 4, "two bits")
    claims.check_parameters(outline, 4096 * 4096 // 8, "a bit")
    with pytest.raises(ValueError, match=f"{PARAMETERS}16777216 parameters for 2000000 bytes of weights"):
        claims.check_parameters(outline, 2_000_000, "less")
    claims.check_layers(tmp_path, {"num_hidden_layers": 96, "max_window_layers": 10**6, "layer_norm_eps": 1e-5}, 12)
    claims.check_layers(tmp_path, {"vision_config": {"depth": 27}, "text_config": {"n_layer": 1000}}, 4000)


# ---------------------------------------------------------------------------------------------- of the hub


def put(hub, directory):
    return hub.add(NAME, {path.name: path.read_bytes() for path in directory.iterdir()})


@pytest.mark.parametrize("kept", ["one file", "shards"])
def test_a_model_of_the_hub_is_that_of_its_directory_online_and_offline(small, tmp_path, hub, monkeypatch, kept):
    directory = claiming(small, tmp_path / "model")
    if kept == "shards":
        (directory / "model.safetensors").unlink()
        make_llama().save_pretrained(directory, max_shard_size="20KB")
    commit = put(hub, directory).branches["main"]
    hub.repositories[NAME].files()["other.safetensors"] = hub.repositories[NAME].files()["config.json"]
    load_tokenizer(ModelConfig(NAME))
    assert not [request for request in hub.requests if request.endswith(".safetensors")]
    model, _ = load_model(ModelConfig(NAME, dtype="float32"))
    assert model.config._name_or_path == NAME
    assert not [request for request in hub.requests if request.endswith("other.safetensors")]
    for name, tensor in make_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_is_reachable.cache_clear()
    del hub.requests[:]
    for revision in (None, commit):
        again, _ = load_model(ModelConfig(NAME, revision=revision, dtype="float32"))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match=r"at model.revision 'v2' is neither .* and the hub cannot be reached"):
        load_model(ModelConfig(NAME, revision="v2"))
    assert hub.requests == []


def test_files_of_the_hub_are_checked_before_transformers_reads_them(small, tmp_path, hub):
    directory = claiming(small, tmp_path / "model")
    (directory / "tokenizer_config.json").write_text("[3]")
    put(hub, directory)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected an object, got list"):
        load_model(NAME)


def test_what_the_hub_does_not_have_is_named(hub, small):
    with pytest.raises(ValueError, match=r"model.name 'someone/none' cannot be loaded: the hub has no 'someone/none'"):
        load_model("someone/none")
    put(hub, small)
    with pytest.raises(ValueError, match=r"at model.revision 'v2' cannot be loaded: the hub's .* got 'v2'"):
        load_model(ModelConfig(NAME, revision="v2"))
