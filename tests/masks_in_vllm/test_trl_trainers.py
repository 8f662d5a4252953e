"""masks_in_trl without vLLM: what TRL starts, what it sends before each answer, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from served import Served, is_plain, same_bits
from tiny import make_llama

import mft.vllm
from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.masks.merged_weights import merged_weights
from mft.vllm.mask_flips import read_flips
from mft.vllm.slices import Slices
from mft.vllm.task_masks import Tasks

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

from trl.generation import vllm_generation  # noqa: E402

from mft.masks.peft import MaskPeftConfig  # noqa: E402
from mft.vllm import trl_trainers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT calls it


class Engine:
    """A vLLM of a Llama, as far as a MaskStream uses it. made: the arguments that it was made with."""

    def __init__(self, model, **options):
        self.made = {"model": model, **options}
        self.served = Served(make_llama(torch.bfloat16))
        self.tasks = Tasks(Slices(self.served, is_plain).find)
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: False, engine_core=None)

    def start_weight_update(self):
        pass

    def finish_weight_update(self, task):
        pass

    def update_weights(self, update):
        info = update["update_info"]
        if "flips" in info:
            self.tasks.flip(info["task"], read_flips(info["flips"]))
        else:
            self.tasks.use(info["task"])

    def reset_prefix_cache(self):
        return True


class Generation:
    """TRL's class, as far as it is replaced."""

    enable_sleep_mode, mode, quantization = False, "colocate", None

    def __init__(self, model, **given):
        vars(self).update(given, model=model)
        self._init_vllm()

    def _init_vllm(self):
        self.llm = vllm_generation.LLM(model="base", seed=3, quantization=self.quantization)

    def sync_weights(self):
        raise AssertionError("TRL's own way sends all weights")


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    monkeypatch.setattr(trl_trainers, "check_vllm", lambda: None)
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Generation)
    monkeypatch.setattr(vllm_generation, "LLM", "TRL's", raising=False)
    monkeypatch.setattr(trl_trainers, "load", lambda base, tasks, **options: Engine(base, **options))


def masked(kind):
    model = make_llama(torch.bfloat16)
    if kind == "mask_model":
        return mask_model(model, MaskConfig(keep_ratio=0.99))
    return peft.get_peft_model(model, MaskPeftConfig(keep_ratio=0.99, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["mask_model", "peft"])
def test_before_each_answer_vllm_has_the_merged_model(kind, capsys):
    model = masked(kind)
    with mft.vllm.masks_in_trl():
        generation = Generation(model)
    assert vllm_generation.LLM == "TRL's"
    assert generation.llm.made == {"model": "base", "seed": 3, "dtype": torch.bfloat16}
    for _ in range(3):
        generation.sync_weights()
        merged = {name.removesuffix(".weight"): weight for name, weight in merged_weights(model)}
        served = generation.llm.served.weights()
        assert same_bits(served, {name: merged[name] for name in served})
        for name, scores in model.named_parameters():
            if "scores" in name:
                scores.data.view(-1)[:5] *= -3
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(":")] for line in lines] == [f"policy, step {step}" for step in range(3)]
    assert lines[2].split()[3] < lines[0].split()[3]


def test_outside_of_the_context_trl_does_as_always():
    with mft.vllm.masks_in_trl():
        pass
    with pytest.raises(TypeError, match="'str' object is not callable"):
        Generation(masked("peft"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "server"}, "vllm_mode must be 'colocate' for masks, got 'server'"),
        ({"enable_sleep_mode": True}, "vllm_enable_sleep_mode must be False for masks, got True"),
        ({"quantization": "bitsandbytes"}, "model must have exact weights for masks in vLLM, got bitsandbytes"),
    ],
)
def test_what_masks_cannot_follow_is_refused(given, words):
    with mft.vllm.masks_in_trl(), pytest.raises(ValueError, match=words):
        Generation(masked("peft"), **given)


def test_a_model_that_trains_more_than_masks_is_refused():
    with mft.vllm.masks_in_trl(), pytest.raises(ValueError, match="must have masks, got a LlamaForCausalLM without"):
        Generation(make_llama())
    model = masked("mask_model")
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"nothing but scores, .* got 1 more such as model.norm.weight: freeze"):
        mft.vllm.MaskStream(None, "policy", model)


def test_another_trl_is_refused(monkeypatch):
    monkeypatch.delattr(vllm_generation, "LLM")
    words = "TRL must start vLLM by .*vllm_generation, as 1.16 does, got none"
    with pytest.raises(RuntimeError, match=words), mft.vllm.masks_in_trl():
        pass
