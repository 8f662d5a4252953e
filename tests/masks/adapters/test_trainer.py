"""transformers.Trainer on a masked Llama learns what a plain loop learns, and continues where it stopped."""

import pytest
import torch
from datasets import Dataset
from tiny import WORDS, make_llama, masked_llama
from tiny_ways import scores_of
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.quantize import quantize_model
from mft_kernels import MaskAdamW

STEPS = 6
LR = 1e-3
POISONED = WORDS - 1  # a token that make_rows does not use


def make_rows(count=10, length=12):
    """Return rows that count upwards, some with fewer labels than others."""
    ids = [[(7 * row + i) % POISONED for i in range(length)] for row in range(count)]
    labels = [[-100] * (row % 3 * 2) + values[row % 3 * 2 :] for row, values in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def run(model, path, rows=None, *, resume=None, optimizer=None, optimizers=(None, None), callbacks=None, **changes):
    """Train with the Trainer; return the losses that it logs at each step, and the scores."""
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(path), **options | changes),
        train_dataset=make_rows() if rows is None else rows,
        optimizer_cls_and_kwargs=optimizer,
        optimizers=optimizers,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], scores_of(model)


def plain_loop(model, optimizer, autocast=False, batch_size=2):
    """Do what the Trainer does, written out."""
    model.train()
    losses, rows = [], make_rows()
    for step in range(STEPS):
        chosen = [(step * batch_size + i) % len(rows) for i in range(batch_size)]
        batch = {name: torch.tensor([rows[i][name] for i in chosen]) for name in ("input_ids", "labels")}
        count = batch["labels"][:, 1:].ne(-100).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, scores_of(model)


def assert_same(got, expected):
    """Assert bitwise equality, and that something was learned."""
    assert got[0] == expected[0]
    assert len(set(got[0])) == len(got[0])
    for name, scores in expected[1].items():
        assert torch.equal(got[1][name], scores), name


def assert_close(got, expected, start, share=1e-3):
    """Assert that losses agree, and learned changes up to a share of their size, to allow for rounding."""
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for name, scores in expected[1].items():
        learned = scores - start[name]
        assert (got[1][name] - scores).norm() <= share * learned.norm(), name
        assert learned.any(), name


def adamw(model):
    return torch.optim.AdamW([m.scores for m in masked_modules(model).values()], LR, weight_decay=0.0, foreach=False)


def mask_adamw(model):
    return MaskAdamW([m.scores for m in masked_modules(model).values()], LR)


# ---------------------------------------------------------------------------------------------- a plain loop's equal


def test_it_is_the_plain_loop(tmp_path):
    ours, theirs = masked_llama(), masked_llama()
    assert_same(run(ours, tmp_path), plain_loop(theirs, adamw(theirs)))


def test_autocast_is_the_plain_loop_s(tmp_path):
    ours, theirs = masked_llama(), masked_llama()
    assert_same(run(ours, tmp_path, bf16=True), plain_loop(theirs, adamw(theirs), autocast=True))


@pytest.mark.parametrize("given", ["class", "instance"])
def test_scores_of_16_bits_learn_by_mask_adamw(tmp_path, given):
    ours, theirs = masked_llama(scores_dtype="bfloat16"), masked_llama(scores_dtype="bfloat16")
    if given == "class":
        got = run(ours, tmp_path, optimizer=(MaskAdamW, {"lr": LR}))
    else:
        got = run(ours, tmp_path, optimizers=(mask_adamw(ours), None))
    assert_same(got, plain_loop(theirs, mask_adamw(theirs)))


@pytest.mark.parametrize(("kind", "masked"), [("nf4", False), ("int8", True)])
def test_a_quantised_base_is_the_plain_loop_s(tmp_path, kind, masked):
    ours, theirs = (quantize_model(masked_llama(), kind, masked=masked) for _ in range(2))
    assert_same(run(ours, tmp_path), plain_loop(theirs, adamw(theirs)))


# ---------------------------------------------------------------------------------------------- what may be switched on


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(tmp_path, use_reentrant):
    expected = run(masked_llama(), tmp_path)
    got = run(
        masked_llama(),
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert_same(got, expected)


def test_accumulating_two_batches_is_one_batch_of_their_rows(tmp_path):
    # SGD, because a step of Adam is just as large if a gradient is only rounding error.
    options = {"optim": "sgd", "learning_rate": 1.0}
    start = scores_of(masked_llama())
    whole = run(masked_llama(), tmp_path, per_device_train_batch_size=4, **options)
    halves = run(masked_llama(), tmp_path, gradient_accumulation_steps=2, **options)
    assert_close(halves, whole, start)


@pytest.mark.slow
def test_torch_compile_changes_nothing_but_rounding(tmp_path):
    def tiny():
        return mask_model(make_llama(num_hidden_layers=1), MaskConfig.paper())

    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 3}
    start = scores_of(tiny())
    torch._dynamo.reset()
    # Inductor, the default of torch_compile, takes 12 s: test_compiled_model.py has it.
    compiled = run(tiny(), tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert_close(compiled, run(tiny(), tmp_path, **options), start)


# ---------------------------------------------------------------------------------------------- going on


OPTIMIZERS = {
    "AdamW": lambda model: {},
    "the class MaskAdamW": lambda model: {"optimizer": (MaskAdamW, {"lr": LR})},
    "a MaskAdamW": lambda model: {"optimizers": (mask_adamw(model), None)},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_that_goes_on_is_one_that_never_stopped(tmp_path, kind):
    options, scores_dtype = OPTIMIZERS[kind], "float32" if kind == "AdamW" else "bfloat16"
    settings = {"lr_scheduler_type": "linear", "train_sampling_strategy": "random", "warmup_steps": 2}
    straight = masked_llama(scores_dtype=scores_dtype)
    expected = run(straight, tmp_path, save_strategy="steps", save_steps=3, **options(straight), **settings)
    resumed = masked_llama(scores_dtype=scores_dtype, seed=9)  # the checkpoint's scores are a different draw
    got = run(resumed, tmp_path, resume=str(tmp_path / "checkpoint-3"), **options(resumed), **settings)
    assert_same(got, expected)


# ---------------------------------------------------------------------------------------------- a loss that is NaN


class LossLog(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **_):
        self.losses.append(logs["loss"])


@pytest.mark.parametrize("filtered", [True, False])
def test_after_a_nan_loss_the_next_forward_stops_the_run_whatever_the_log_says(tmp_path, filtered):
    model = masked_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISONED] = float("nan")
    rows = make_rows(8)
    rows = Dataset.from_dict({name: [*rows[name][:4], [POISONED] * 12, *rows[name][5:]] for name in rows.column_names})
    log = LossLog()
    with pytest.raises(ValueError, match=r"scores of module 'model\.layers\.2\.self_attn\.q_proj' must be finite"):
        run(model, tmp_path, rows, logging_nan_inf_filter=filtered, callbacks=[log])
    assert log.losses[2:] == ([0.0] if filtered else [pytest.approx(float("nan"), nan_ok=True)])
