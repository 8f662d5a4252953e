"""TRL's trainers on masks: PEFT and mask_model learn the same, the base is the reference, and runs continue."""

from itertools import pairwise

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_masks import STILL_CALLED, assert_same, scores
from tiny import make_llama
from transformers import AutoTokenizer

from mft import MaskConfig, mask_model, merged_weights, unmasked_model
from mft.masks.peft import MaskPeftConfig
from mft.models.block_attention import NAME as IN_BLOCKS
from mft.models.block_attention import SHORT
from mft.models.pretrained import read_chat_template
from mft_kernels import MaskAdamW

pytest.importorskip("trl")

import datasets
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

pytestmark = STILL_CALLED

MASK = {"keep_ratio": 0.7, "init": "normal"}  # far from the base
OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def words(smollm2_dir):
    """Return SmolLM2's tokenizer with a chat template that marks the assistant's text."""
    return AutoTokenizer.from_pretrained(smollm2_dir, local_files_only=True, chat_template=read_chat_template("tulu"))


def base(**changes):
    sizes = {"vocab_size": 49152, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return make_llama(**sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2} | changes)


def mask(**changes):
    return MaskPeftConfig(**MASK | {"task_type": "CAUSAL_LM"} | changes)


def ours(**changes):
    return mask_model(base(), MaskConfig(**MASK | changes))


def question(i):
    return {"role": "user", "content": f"What is {i} plus {i}?"}


def answer(text):
    return {"role": "assistant", "content": text}


CHATS = datasets.Dataset.from_list([{"messages": [question(i), answer(f"It is {2 * i}.")]} for i in range(8)])
PROMPTS = datasets.Dataset.from_list([{"prompt": [question(i)]} for i in range(8)])
PREFERENCES = datasets.Dataset.from_list(
    [{"prompt": [question(i)], "chosen": [answer(f"It is {2 * i}.")], "rejected": [answer("No.")]} for i in range(8)]
)


def sft(path, words, model=None, rows=CHATS, trainer=None, **options):
    """Return an SFTTrainer of a mask by PEFT, unless a model is given."""
    given = {"model": base(), "peft_config": mask()} if model is None else {"model": model}
    arguments = SFTConfig(str(path), **OPTIONS | {"assistant_only_loss": rows is CHATS} | options)
    return SFTTrainer(**given, args=arguments, train_dataset=rows, processing_class=words, **trainer or {})


def dpo(path, words, model=None, ref_model=None, **options):
    given = {"model": base(), "peft_config": mask()} if model is None else {"model": model, "ref_model": ref_model}
    return DPOTrainer(
        **given, args=DPOConfig(str(path), **OPTIONS | options), train_dataset=PREFERENCES, processing_class=words
    )


def grpo(path, words, model=None, **options):
    given = {"model": base(), "peft_config": mask()} if model is None else {"model": model}
    settings = {"num_generations": 2, "max_completion_length": 6}
    arguments = GRPOConfig(str(path), **OPTIONS | settings | options)
    return GRPOTrainer(**given, args=arguments, reward_funcs=long_words, train_dataset=PROMPTS, processing_class=words)


def long_words(completions, **_):
    return [float(len(message["content"])) for (message,) in completions]


def trained(trainer, **options):
    trainer.train(**options)
    found = scores(trainer.model)
    assert found
    assert all((value != start).any() for value, start in zip(found.values(), scores(ours()).values()))
    return found


# ---------------------------------------------------------------------------------------------- SFT


def test_sft_by_peft_learns_what_mask_model_does_bit_for_bit(tmp_path, words):
    by_peft = sft(tmp_path, words, bf16=None, max_steps=1)
    assert by_peft.args.bf16
    assert by_peft.args.gradient_checkpointing  # TRL's defaults
    learned = trained(by_peft)
    assert_same(trained(sft(tmp_path, words, ours(), bf16=True, max_steps=1)), learned)
    assert_same(trained(sft(tmp_path, words, bf16=True, max_steps=1, gradient_checkpointing=False)), learned)


def assert_close(found, expected):
    start = scores(ours())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * (value - start[name]).norm(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager", IN_BLOCKS])
def test_packed_examples_do_not_see_each_other(tmp_path, words, attention):
    long = datasets.Dataset.from_list([{"text": " ".join(map(str, range(i, i + 90)))} for i in range(6)])
    trainer = sft(
        tmp_path,
        words,
        get_peft_model(base(attn_implementation=attention), mask()),
        long,
        packing=True,
        max_length=700,
        per_device_train_batch_size=1,
    )
    together, apart, as_one = three_ways(trainer, trainer.model.get_base_model().model)
    assert together.shape[1] > SHORT
    torch.testing.assert_close(together, apart)
    assert (together - as_one).abs().max() > 0.1


def three_ways(trainer, decoder):
    """Return hidden states of a batch as TRL gives it, of its examples one at a time, and of all as one text."""
    batch = next(iter(trainer.get_train_dataloader()))
    bounds = batch["cu_seq_lens_q"].tolist()
    assert len(bounds) > 2
    ids = batch["input_ids"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    calls = [inputs, *({"input_ids": ids[:, a:b]} for a, b in pairwise(bounds)), {"input_ids": ids}]
    with torch.no_grad():
        together, *apart, as_one = (decoder.eval()(**call, use_cache=False).last_hidden_state for call in calls)
    return together, torch.cat(apart, 1), as_one


def test_a_step_on_a_packed_row_learns_what_one_on_its_examples_does(tmp_path, words):
    options = {"optim": "sgd", "learning_rate": 100.0, "max_steps": 1}
    rows = {"rows": CHATS.select(range(2)), "assistant_only_loss": True}
    padded = trained(sft(tmp_path, words, **rows, **options))
    packing = {"packing": True, "max_length": 128, "per_device_train_batch_size": 1}
    packed = sft(tmp_path, words, **rows, **options, **packing)
    assert len(packed.train_dataset) == 1
    assert_close(trained(packed), padded)


RESUMED = {
    "peft_config": lambda: (None, {}),
    "MaskAdamW": lambda: with_optimizer(get_peft_model(base(), mask())),
}


def with_optimizer(model):
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, {"optimizers": (MaskAdamW(learning, 1e-2), None)}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_that_goes_on_is_one_that_never_stopped(tmp_path, words, kind):
    def make():
        model, given = RESUMED[kind]()
        return sft(tmp_path, words, model, trainer=given, save_strategy="steps", save_steps=1)

    expected = trained(make())
    assert_same(trained(make(), resume_from_checkpoint=str(tmp_path / "checkpoint-1")), expected)


# ---------------------------------------------------------------------------------------------- DPO


def reference(trainer):
    """Return (log-probabilities of chosen and rejected answers by the reference, by the policy)."""
    batch = next(iter(trainer.get_train_dataloader()))
    of_reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
    return of_reference, log_probs(trainer.model, batch)


@torch.no_grad()
def log_probs(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    each = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.slow
def test_the_reference_of_dpo_is_the_base_and_stays_it(tmp_path, words):
    """The reference by PEFT, by unmasked_model and by a second copy are bitwise equal."""
    masked = ours()
    trainers = [
        dpo(tmp_path, words),
        dpo(tmp_path, words, masked, unmasked_model(masked)),
        dpo(tmp_path, words, ours(), base()),
    ]
    assert trainers[0].ref_model is None
    learned = [trained(trainer) for trainer in trainers]
    for trainer, found in zip(trainers, learned):
        assert_same(found, learned[0])
        of_reference, of_policy = reference(trainer)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.testing.assert_close(of_reference, log_probs(base(), batch), rtol=1e-5, atol=0)
        assert (of_policy - of_reference).abs().min() > 1e-3


@pytest.mark.slow
def test_the_reference_of_a_model_that_comes_with_a_mask_is_that_mask_and_stays_it(tmp_path, words):
    first = sft(tmp_path, words)
    first.train()
    first.save_model(str(tmp_path / "adapter"))

    def make():
        model = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
        return dpo(tmp_path, words, model, save_strategy="steps", save_steps=1)

    trainer = make()
    before = log_probs(trainer.model, next(iter(trainer.get_train_dataloader())))
    expected = trained(trainer)
    of_reference, of_policy = reference(trainer)
    torch.testing.assert_close(of_reference, before, rtol=1e-5, atol=0)
    assert (of_policy - of_reference).abs().min() > 1e-3
    assert_same(trained(make(), resume_from_checkpoint=str(tmp_path / "checkpoint-1")), expected)


def test_without_a_reference_trl_loads_the_base_of_a_masked_model_again(tmp_path, words):
    base().save_pretrained(tmp_path / "base")
    model = ours()
    model.config._name_or_path = str(tmp_path / "base")
    trainer = dpo(tmp_path, words, model)
    assert_same(dict(trainer.ref_model.named_parameters()), dict(base().named_parameters()))


def test_precomputed_references_are_the_base_s_by_peft_and_the_untrained_mask_s_of_a_masked_model(tmp_path, words):
    options = {"precompute_ref_log_probs": True}
    by_peft, masked = dpo(tmp_path, words, **options), dpo(tmp_path, words, ours(), **options)
    for trainer, expected in ((by_peft, base()), (masked, ours())):
        batch = next(iter(trainer.get_train_dataloader()))
        found = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        torch.testing.assert_close(found, log_probs(expected, batch), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------- GRPO


def test_grpo_by_peft_learns_what_mask_model_does_bit_for_bit(tmp_path, words):
    learned = trained(grpo(tmp_path, words, beta=0.0))
    assert_same(trained(grpo(tmp_path, words, ours(), beta=0.0)), learned)


def test_the_reference_of_grpo_is_the_base_and_stays_it(tmp_path, words):
    trainer = grpo(tmp_path, words, beta=0.5)
    learned = trained(trainer)
    assert trainer.ref_model is None
    found = trainer._generate_and_score_completions([PROMPTS[0], PROMPTS[0]])
    ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
    expected = found["completion_mask"] * by_token(base(), ids)[:, -found["completion_ids"].shape[1] :]
    torch.testing.assert_close(found["ref_per_token_logps"] * found["completion_mask"], expected, rtol=1e-5, atol=0)
    base().save_pretrained(tmp_path / "base")
    model = ours()
    model.config._name_or_path = str(tmp_path / "base")
    assert_same(trained(grpo(tmp_path, words, model, beta=0.5)), learned)


@torch.no_grad()
def by_token(model, ids):
    return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def test_what_trl_would_send_to_vllm_is_the_merged_model_and_the_weights_come_back(tmp_path, words):
    trainer = grpo(tmp_path, words)
    trainer.train()
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_hand = {name: tensor.clone() for name, tensor in merged_weights(model)}
    engine = VLLMGeneration.__new__(VLLMGeneration)  # walking over the weights needs no engine
    engine.model, engine._dist = model, DistributedBackend(trainer.accelerator)
    sent = {name: tensor.clone() for name, tensor in engine._iter_named_params()}
    assert list(sent) == [name for name, _ in base().named_parameters()]
    assert_same(sent, by_hand)
    assert_same(dict(model.state_dict()), before)
    assert sum((sent[name] == 0).sum() for name in sent) > 1000
    trainer.args.max_steps += 1
    trained(trainer)
