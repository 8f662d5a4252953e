"""Objectives: keys, data and models that are not theirs."""

import json
from types import SimpleNamespace

from tiny import make_llama, make_rows, masked_llama

from mft.config import DataConfig, TrainConfig
from mft.config_file import load_config
from mft.data.formats import read_pair
from mft.data.sources import Records
from mft.data.splits import load_splits
from mft.data.tokenization import open_documents
from mft.objectives.dpo import DPO
from mft.objectives.kl import KL
from mft.training.loop import finetune, train_masks

from .registry import accepted, refused

STEP = TrainConfig(steps=1)
PAIR = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


def records(row):
    return Records([row], lambda i: f"data.jsonl:{i + 1}", sorted(row), [0])


@accepted("both conversations begin with what was asked, so that is the prompt, as TRL reads them")
def a_prompt_in_words_beside_two_conversations():
    asked, right, wrong = (
        {"role": r, "content": c} for r, c in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5"))
    )
    chosen, _ = read_pair({"prompt": "of a sum", "chosen": [asked, right], "rejected": [asked, wrong]}, "data.jsonl:1")
    assert (chosen.messages, chosen.first) == ([asked, right], 1)


@refused(
    ValueError,
    where="objective.beta",
    got="got 0.2",
    rule="must be null with the objective distill",
    remedy="it belongs to kl and dpo; set objective.name",
)
def a_key_of_another_objective():
    load_config(None, ["objective.name=distill", "objective.teacher=my-model", "objective.beta=0.2"])


@refused(
    ValueError,
    where="data.streaming",
    got="got true",
    rule="must be false with preference pairs",
    remedy="load them",
)
def pairs_in_a_stream(tmp):
    path = tmp / "pairs.jsonl"
    path.write_text(json.dumps(PAIR))
    load_splits(DataConfig(source=str(path), streaming=True), SimpleNamespace(eos_token_id=0), pairs=True)


@refused(ValueError, where="objective.teacher", got="got None", rule="must name a model for distill")
def distillation_without_a_teacher():
    load_config(None, ["objective.name=distill"])


@refused(
    ValueError,
    where="mask.modules_to_save",
    got="got ['lm_head']",
    rule="must be null with the objective dpo, which holds masks to the base",
)
def a_head_that_learns_beside_masks_that_are_held_to_the_base():
    load_config(None, ["objective.name=dpo", "mask.modules_to_save=[lm_head]"])


@refused(
    ValueError,
    where="objective kl",
    got="got model.embed_tokens.weight to train",
    rule="must train masks alone",
    remedy="take another objective",
)
def weights_that_learn_while_they_are_the_reference():
    finetune(make_llama(), make_rows(), STEP, objective=KL())


@refused(
    ValueError,
    where="objective dpo",
    got="got rows without starts",
    rule="dataset must hold pairs",
    remedy="give data with chosen and rejected",
)
def preferences_of_rows_that_are_texts():
    train_masks(masked_llama(), make_rows(), STEP, objective=DPO())


@refused(
    ValueError,
    where="dataset",
    got="got 1 in row 1",
    rule="must hold pairs for the objective dpo, two examples each",
    remedy="give data with chosen and rejected",
)
def a_row_with_one_answer():
    rows = make_rows(2).add_column("starts", [[0, 6], [0]])
    train_masks(masked_llama(), rows, STEP, objective=DPO())


@refused(
    ValueError,
    where="data.jsonl:1",
    got="got completion, prompt",
    rule="must have the columns chosen and rejected for the objective dpo",
    remedy="give preference pairs, or set objective.name to another",
)
def preferences_of_data_without_any():
    open_documents(records({"prompt": "2 + 2 =", "completion": " 4"}), None, assistant_only=True, pairs=True)


@refused(
    ValueError,
    where="data.jsonl:1",
    got="columns chosen and rejected",
    rule="must not be preference pairs",
    remedy="set objective.name=dpo, or rename the column of the answers to learn to completion",
)
def preferences_that_no_objective_compares():
    open_documents(records(PAIR), None, assistant_only=True)


@refused(
    ValueError,
    where="data.jsonl:1",
    got="got ' 4' (str) and [{'role': 'assistant', 'content': '5'}] (list)",
    rule="must both be strings or both lists of messages",
)
def a_string_that_is_preferred_to_messages():
    read_pair({**PAIR, "rejected": [{"role": "assistant", "content": "5"}]}, "data.jsonl:1")


@refused(ValueError, where="label_smoothing", got="got 0.5", rule="must lie in [0, 0.5)")
def preferences_of_which_half_are_wrong():
    DPO(label_smoothing=0.5)
