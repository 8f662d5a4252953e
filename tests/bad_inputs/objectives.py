"""Objectives: keys, data and models that do not fit them. PAIR is a preference pair of texts."""

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

STEP = TrainConfig(steps=1)
PAIR = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


def records(row):
    return Records([row], lambda i: f"data.jsonl:{i + 1}", sorted(row), [0])


def says(role, content):
    return {"role": role, "content": content}


TABLE = r"""
a prompt in words beside two conversations
    asked, right, wrong = says("user", "2 + 2?"), says("assistant", "4"), says("assistant", "5")
    chosen, _ = read_pair({"prompt": "of a sum", "chosen": [asked, right], "rejected": [asked, wrong]}, "data.jsonl:1")
    assert (chosen.messages, chosen.first) == ([asked, right], 1)
    -> accepted: both conversations begin with what was asked, so that is the prompt, as TRL reads them
a key of another objective
    load_config(None, ["objective.name=distill", "objective.teacher=my-model", "objective.beta=0.2"])
    -> ValueError: objective.beta | must be null with the objective distill | got 0.2
        | it belongs to kl and dpo; set objective.name
pairs in a stream
    path = tmp / "pairs.jsonl"
    path.write_text(json.dumps(PAIR))
    load_splits(DataConfig(source=str(path), streaming=True), SimpleNamespace(eos_token_id=0), pairs=True)
    -> ValueError: data.streaming | must be false with preference pairs | got true | load them
distillation without a teacher
    load_config(None, ["objective.name=distill"])
    -> ValueError: objective.teacher | must name a model for distill | got None
a head that learns beside masks that are held to the base
    load_config(None, ["objective.name=dpo", "mask.modules_to_save=[lm_head]"])
    -> ValueError: mask.modules_to_save | must be null with the objective dpo, which compares the masked model
        | got ['lm_head']
weights that learn while they are the reference
    finetune(make_llama(), make_rows(), STEP, objective=KL())
    -> ValueError: objective kl | must train masks alone | got model.embed_tokens.weight to train
        | take another objective
preferences of rows that are texts
    train_masks(masked_llama(), make_rows(), STEP, objective=DPO())
    -> ValueError: objective dpo | dataset must hold pairs | got rows without starts
        | give data with chosen and rejected
a row with one answer
    rows = make_rows(2).add_column("starts", [[0, 6], [0]])
    train_masks(masked_llama(), rows, STEP, objective=DPO())
    -> ValueError: dataset | must hold pairs for the objective dpo, two examples each | got 1 in row 1
        | give data with chosen and rejected
preferences of data without any
    open_documents(records({"prompt": "2 + 2 =", "completion": " 4"}), None, assistant_only=True, pairs=True)
    -> ValueError: data.jsonl:1 | must have the columns chosen and rejected for the objective dpo
        | got completion, prompt | give preference pairs, or set objective.name to another
preferences that no objective compares
    open_documents(records(PAIR), None, assistant_only=True)
    -> ValueError: data.jsonl:1 | must not be preference pairs | columns chosen and rejected
        | set objective.name=dpo, or rename the column of the answers to learn to completion
a string that is preferred to messages
    read_pair({**PAIR, "rejected": [says("assistant", "5")]}, "data.jsonl:1")
    -> ValueError: data.jsonl:1 | must both be strings or both lists of messages
        | got ' 4' (str) and [{'role': 'assistant', 'content': '5'}] (list)
preferences of which half are wrong
    DPO(label_smoothing=0.5)
    -> ValueError: label_smoothing | must lie in [0, 0.5) | got 0.5
"""
