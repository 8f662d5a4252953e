"""Training and evaluation of a random Llama of four layers, masks on layers 2 and 3, on eight rows of twelve tokens.
`steps(n)` are n steps at a rate of 0.01, `train_in(tmp, model)` makes one from the newest checkpoint there, and
`run_in(tmp)` is the directory of a run that was stopped. `having(model, parameter, place, value)` changes a value of a
model, `nan_at(model, step)` makes a gradient of that step NaN, and `plan_on` plans for a device and its host with a
given number of free bytes.
"""

import json
import math

import torch
from tiny import make_llama, make_phi3, make_rows, masked_llama
from transformers import BertConfig, BertLMHeadModel, BloomConfig, BloomForCausalLM

from mft.cli.estimate import parse_bytes
from mft.config import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig
from mft.config_file import load_config, save_config
from mft.engines.distributed import Processes, joined
from mft.engines.in_place_adamw import in_place
from mft.engines.step import NonFiniteLoss
from mft.evaluation.evaluate import evaluate, paired_difference
from mft.evaluation.evaluated_base import check_exact
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks
from mft.masks.peft import MaskPeftConfig
from mft.masks.quantize import quantize_model
from mft.masks.unmasked import unmasked_model
from mft.models.longrope import refuse_long_batches
from mft.models.packed_rows import check_kept_apart
from mft.training import memory_plan
from mft.training.best import Best
from mft.training.checkpoint import BadCheckpoint, check_space, newest_checkpoint, write_checkpoint
from mft.training.loop import finetune, train_loop, train_masks
from mft.training.resume import Resume, find_checkpoint
from mft.training.run_directory import check_run_directory
from mft.training.run_lock import LOCK, hold
from mft.training.saver import Saved, Saver
from mft.training.validation import Validation
from mft_kernels.ops.checks import NonFiniteScores
from mft_study.arms.kinds import make_arm
from mft_study.cli.compare import run_plot
from mft_study.config import LeadersConfig, StudyConfig
from mft_study.evidence.sums import read_sums

DOWN = "model.layers.3.mlp.down_proj"


def steps(count=1, **changes):
    return TrainConfig(**{"lr": 1e-2, "steps": count} | changes)


def having(model, parameter, place, value):
    """Return the model with another value at that place of a parameter."""
    with torch.no_grad():
        model.get_parameter(parameter)[place] = value
    return model


def with_dropout():
    return mask_model(make_llama(attention_dropout=0.2), MaskConfig(layers_to_transform=3))


def unlabelled_rows():
    return make_rows(2).map(lambda row: row | {"labels": [-100] * 12})


def nan_at(model, step):
    """Return a callback that makes a gradient of that step NaN."""

    def spoil(now, _):
        if now == step:
            model.get_submodule(DOWN).weight.grad.fill_(torch.nan)

    return spoil


def needs_2_to_60_bytes(layer, *_):
    if layer.training:
        torch.empty(1 << 60, dtype=torch.uint8)


def plan_on(patch, device, free, *overrides):
    """Plan a run on a device, and on its host, with ``free`` bytes each."""
    patch.setattr(memory_plan, "default_device", lambda: torch.device(device))
    patch.setattr(memory_plan, "free_memory", lambda _: free)
    memory_plan.plan_training(load_config(None, ["train.steps=1", *overrides]))


def run_in(tmp):
    save_config(RunConfig(train=steps(30)), tmp / "run" / "config.yaml")
    return tmp / "run"


def train_in(tmp, model, **facts):
    """Train one step, from the newest checkpoint there, if any."""
    train_masks(model, make_rows(), steps(), saver=Saver(tmp, 0, newest_checkpoint(tmp)[0], saved=Saved(facts)))


def plot(tmp, what, table):
    """Call mft plot on a study with that table."""
    (tmp / "table.json").write_text(json.dumps(table))
    run_plot(what, [tmp], None, domain=None, arm=None, rows=32, points=11)


TABLE = r"""
# NaN, and lack of memory
a loss that becomes nan
    train_masks(having(masked_llama(), "lm_head.weight", 5, torch.nan), make_rows(), steps(3))
    -> NonFiniteLoss: step 1 of 3 in the batch of rows | the loss must stay finite | got nan
        | lower train.lr (now 0.01) or look at these rows
a dropped weight of inf whose score learns
    model = having(masked_llama(), f"{DOWN}.weight", (0, 0), torch.inf)
    train_masks(having(model, f"{DOWN}.scores", (0, 0), 1e-9), make_rows(), steps(3))
    -> NonFiniteScores: scores of module 'model.layers.3.mlp.down_proj' | must be finite | got 1 NaN or Inf
        | lower the learning rate, or look for NaN or Inf in the weight
a gradient of nan in the last step
    model = make_llama()
    finetune(model, make_rows(), steps(), before_update=nan_at(model, 1))
    -> NonFiniteLoss: model.layers.3.mlp.down_proj.weight | must stay finite | got 2048 NaN or Inf after the last step
        | lower train.lr, or look for NaN or Inf in the model's weights
a checkpoint of weights that are nan
    model = make_llama()
    try:
        finetune(model, make_rows(), steps(3), before_update=nan_at(model, 2), saver=Saver(tmp, 0))
    finally:
        assert newest_checkpoint(tmp)[0].step == 1  # the good one stays
    -> NonFiniteLoss: model.layers.3.mlp.down_proj.weight | must stay finite | got 2048 NaN or Inf | lower train.lr
a validation loss that is nan
    model = make_llama()
    validation = Validation(make_rows())
    finetune(model, make_rows(), steps(3, eval_every=1), before_update=nan_at(model, 1), validation=validation)
    -> NonFiniteLoss: after step 1 of 3 | the validation loss must stay finite | got nan | lower train.lr (now 0.01)
a merge of nan scores
    merge_model(having(masked_llama(), f"{DOWN}.scores", (0, 0), torch.nan))
    -> NonFiniteScores: model.layers.3.mlp.down_proj | must be finite | got 1 NaN or Inf | lower the learning rate
a step that needs more memory than there is
    model = masked_llama()
    model.model.layers[2].register_forward_hook(needs_2_to_60_bytes)
    train_masks(model, make_rows(), steps())
    -> RuntimeError: out of memory at rows [ | all weights and activations are live on cpu under memory: plain
        | (...DefaultCPUAllocator: can't allocate memory: you tried to allocate 1152921504606846976 bytes
        | Set train.batch_size or data.sequence_length lower, or train.gradient_checkpointing
a model that does not fit
    wide = "mask.scores_dtype=float32", "train.moments=float32"
    plan_on(patch, "cpu", (17e9, None), "model.name=llama2-7b", "mask.layers_to_transform=[4, 5]", *wide)
    -> ValueError: plain: needs | nothing fits
        | needs ... GB of 17.0 GB, ... missing, in loss; resident: needs ... missing, in backward; layerwise: needs
        | the nearest setting that fits: memory=layerwise train.moments=8bit
a model whose states the host cannot hold
    sizes = "data.sequence_length=4096", "train.accumulation=128", "mask.scores_dtype=float32", "train.moments=float32"
    plan_on(patch, "cuda", (12e9, 64e9), "model.name=llama3.1-8b", *sizes)
    -> ValueError: layerwise: needs 115.8 GB of the host's 64.0 GB | nothing fits
        | resident: needs 30.9 GB (and 0.6 GB for the context) of 12.0 GB
        | the nearest setting that fits: memory=layerwise
a quantised base of which nothing is quantised
    plan_on(patch, "cpu", (400e9, None), "model.name=llama2-7b", "model.quantization=nf4")
    -> ValueError: quantized | nothing would be quantised without quantize_masked | every linear layer is masked
        | the nearest setting that fits: memory=quantized model.quantize_masked=true

# what is trained
training on no rows
    finetune(make_llama(), make_rows().select([]), steps())
    -> ValueError: dataset | must hold at least one row to train on | got 0
an evaluation during training without rows
    finetune(make_llama(), make_rows(), steps(4, eval_every=2))
    -> ValueError: validation | must be given if train.eval_every is 2 and train.eval_minutes is None | got NoneType
a best step that is lost
    Best(tmp / "best").put(masked_llama(), 40)
    -> BadCheckpoint: best/step-00000040 | expected a file that can be read | No such file or directory
        | export the last step instead, with train.keep_best=false --force
training masks that are not there
    train_masks(make_llama(), make_rows(), steps())
    -> ValueError: model | must hold masked layers | found none | call mask_model(model, config) first
training a frozen model
    train_loop(make_llama().requires_grad_(False), make_rows(), steps())
    -> ValueError: the model | must have a trainable parameter | all are frozen | mask it or unfreeze layers
training a masked language model on next tokens
    finetune(BertLMHeadModel(BertConfig(num_hidden_layers=1)), make_rows(), steps())
    -> ValueError: model.name | must be a causal language model
        | got 'BertLMHeadModel': a model of type bert with is_decoder false
        | name a decoder, or set is_decoder to true in its config.json if it is one
training in an unknown way
    train_masks(masked_llama(), make_rows(), steps(), way="fast")
    -> ValueError: way | must be one of plain, in_place, resident, quantized, layerwise | 'fast'
training fixed point scores by autograd
    train_masks(masked_llama(scores_dtype="int16"), make_rows(), steps())
    -> ValueError: memory | must not be plain | int16 scores | set memory: resident
putting masks in place that are not there
    in_place(make_llama())
    -> ValueError: model | must have masked layers | a LlamaForCausalLM without | mask_model or load_masks first
putting masks in place over codes
    in_place(quantize_model(masked_llama(), "int8", masked=True))
    -> ValueError: masks | must lie on exact weights to be in place | model.layers.2.self_attn.q_proj
        | or train with memory: quantized
merging masks that are in place
    model = masked_llama()
    in_place(model)
    merge_model(model)
    -> RuntimeError: model | must not have its masks in place here | LlamaForCausalLM | leave mft.in_place(model) first
stepping in place without a gradient
    in_place(masked_llama()).step()
    -> RuntimeError: step | must follow a backward() | no gradient | call loss.backward() first
stepping in place after the end
    optimizer = in_place(masked_llama())
    optimizer.close()
    optimizer.step()
    -> RuntimeError: step | must come before close() | an optimiser that was closed | call mft.in_place(model) again
clipping one layer at a time
    train_masks(masked_llama(), make_rows(), steps(max_grad_norm=1.0), way="layerwise")
    -> ValueError: train.max_grad_norm | must be null with memory: layerwise | got 1 | memory: resident has one
more processes than micro batches
    settings = steps(accumulation=3, batch_size=2)
    train_masks(masked_llama(), make_rows(), settings, way="layerwise", processes=Processes(0, 4))
    -> ValueError: train.accumulation | must be at least 4, the number of processes | got 3
        | set train.accumulation=4, and train.batch_size so that a step keeps its 6 rows
dropout on several processes
    train_masks(with_dropout(), make_rows(), steps(accumulation=2), processes=Processes(0, 2))
    -> ValueError: model | must have no dropout, and use no other random numbers, on several processes
        | got LlamaForCausalLM on 2 | set the dropout of the model's configuration to 0
more processes than gpus
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setenv("WORLD_SIZE", "3")
    patch.setenv("LOCAL_RANK", "2")
    with joined():
        pass
    -> ValueError: --nproc-per-node | must be at most 2, the GPUs of this machine | got a process with LOCAL_RANK=2
fine tuning weights on 8 bit moments
    finetune(make_llama(), make_rows(), steps(moments="8bit"))
    -> ValueError: train.moments | must be float32 if weights are trained | got 8bit
fine tuning quantised weights
    check_exact(ModelConfig(quantization="int8"), "finetune")
    -> ValueError: model.quantization | must be null for mft finetune | got int8
a merge into quantised weights
    merge_model(quantize_model(masked_llama(), "int8", masked=True))
    -> ValueError: masks | must be merged into exact weights | got 28 layers that are quantised
        | save_masks, and load_masks on the unquantised model
the base of a model that trains its head
    unmasked_model(mask_model(make_llama(), MaskConfig(modules_to_save=["lm_head"])))
    -> ValueError: model | must train scores alone | got 1 other parameters (lm_head.weight, ...)
        | load the base a second time
tokens that trl adds for a chat template
    print(MaskPeftConfig().trainable_token_indices)
    -> AttributeError: trainable_token_indices | are not for masks, which leave embeddings as they are
        | got tokens that were added to the tokenizer | give a chat template without new ones
a model quantised twice
    quantize_model(quantize_model(masked_llama(), "int8"), "int8")
    -> ValueError: model | must not be quantised already | 14 layers that are (model.layers.0. | load it again
a weight of nan to quantise
    quantize_model(having(masked_llama(), "model.layers.0.mlp.up_proj.weight", (0, 0), torch.nan), "int8")
    -> ValueError: weight | must be finite to be quantised | NaN or infinite values
an evaluation of rows without labels
    evaluate(make_llama(), unlabelled_rows())
    -> ValueError: dataset | must score at least one token | got 2 rows without a label
a difference on other documents
    model = make_llama()
    paired_difference(evaluate(model, make_rows(2)), evaluate(model, make_rows(4)))
    -> ValueError: a and b | must be evaluated on the same documents and tokens
        | got 1 and 2 documents of 22 and 44 tokens

# settings
steps and epochs at once
    TrainConfig(steps=10, epochs=1)
    -> ValueError: steps or epochs | must be given (exactly one of them) | got steps=10 and epochs=1.0
        | set the other to null
a learning rate of zero
    TrainConfig(lr=0, steps=1)
    -> ValueError: lr | must be positive | got 0.0
a schedule that is misspelt
    TrainConfig(steps=1, schedule="cosin")
    -> ValueError: schedule | must be one of linear, constant, cosine | got 'cosin' | did you mean cosine?
a negative threshold of magnitudes
    MaskConfig(threshold=-1.0)
    -> ValueError: threshold | must be at least 0 in magnitude mode | got -1.0
a size in unknown units
    parse_bytes("24 gigs", "--gpu")
    -> ValueError: --gpu | must be a size with its unit, such as 24GB or 24GiB | '24 gigs'
a size without a unit
    parse_bytes("12", "--gpu")
    -> ValueError: --gpu | must be a size with its unit | '12' | did you mean 12GB?

# runs that go on
a resumed run with another configuration
    Resume(run_in(tmp), overrides=["train.lr=2e-2"]).look()
    -> ValueError: the configuration | must be that of the run | train.lr was 0.01, now 0.02
        | undo the changes, or pass --force
a resumed run that is finished
    (run_in(tmp) / "masks").mkdir()
    Resume(tmp / "run").look()
    -> ValueError: --resume | must name a run that is not finished | has its masks/ already
a resumed run whose checkpoint another program wrote
    train_in(run_in(tmp) / "checkpoints", masked_llama())
    Resume(tmp / "run").look()
    -> BadCheckpoint: state.json | expected the config and events of a run of this version of mft | got []
        | go on with the version or the program that wrote it
masks of a run that is not finished
    load_masks(make_llama(), run_in(tmp))
    -> ValueError: run | must hold masks | got a run that is not finished
        | mft train --resume /tmp/dir/run goes on with it
masks of a run of mft finetune
    (run_in(tmp) / "model").mkdir()
    load_masks(make_llama(), tmp / "run")
    -> ValueError: run | must hold masks | got a run of mft finetune
        | it trains all weights, and its result is an ordinary model, /tmp/dir/run/model
a summary of a run
    plot(tmp, "summary", {"before": {"loss": 1.44}})
    -> ValueError: directory | must be a finished study's | with a table without domains
        | a run of mft train has its curves in plot.png, and mft plot flips draws how its masks moved
a study whose leaders run with no more seeds than the others
    arms = {"full": make_arm("full", lrs=[1.0])}
    StudyConfig(arms, {"code": DataConfig()}, leaders=LeadersConfig(seeds=3))
    -> ValueError: leaders.seeds | must be more than the study's own 3 | got 3
a study whose seeds draw a model that is loaded
    StudyConfig({"full": make_arm("full", lrs=[1.0])}, {"code": DataConfig()}, vary=["base"])
    -> ValueError: vary | must leave out base without scratch | got ['base']
a study's sums in a file that is none
    (tmp / "sums.npz").write_text("loss")
    read_sums(tmp / "sums.npz")
    -> ValueError: sums.npz | must be the sums.npz of a study | got a file that is not an archive of arrays
a study that trains weights in codes
    codes = make_arm("quantized", quantization="nf4")
    arms = {"full": make_arm("full", lrs=[1.0]), "NF4": codes, "control": make_arm("control", lrs=[1.0], start="NF4")}
    StudyConfig(arms, {"code": DataConfig()})
    -> ValueError: arms.control.start | must lead to no quantized arm for the kind control | got NF4
        | train them exactly, and round them in an arm {kind: quantized, start: control, quantization: nf4}
a plot by bytes of a table without them
    row = {"arm": "MFT", "kind": "mask", "minus_full": {"estimate": -0.1, "low": -0.2, "high": 0.0}}
    plot(tmp, "bytes", {"domains": {"code": {"full": "full fine-tune", "rows": [row]}}})
    -> ValueError: domain | must have a domain with arms that began at the full fine-tune and whose bytes are known
        | got none | run mft compare again if its table.json is older than that
a compressed arm that says not how many weights
    make_arm("ternary", of="control")
    -> ValueError: shares | must be given for this kind | got []
a plot of forgetting where none was measured
    plot(tmp, "forgetting", {"domains": {"code": {"rows": []}}, "seeds": [0]})
    -> ValueError: a study | must have a general text for its forgetting to be drawn | got none
        | name one in its file, such as general: {stdlib: {source: stdlib}}
checkpoints on a disk that is too small
    check_space(tmp, 10**18)
    -> OSError: checkpoints | checkpoints take 1000000000.00 GB more | ; ... GB are free
        | make room, or name another output_dir

# accepted
a batch without labels
    model = masked_llama()
    before = {name: module.scores.clone() for name, module in masked_modules(model).items()}
    train_masks(model, unlabelled_rows(), steps(batch_size=2))
    assert all(torch.equal(module.scores, before[name]) for name, module in masked_modules(model).items())
    -> accepted: nothing is learned from them, and nothing breaks
more steps than rows
    assert len(train_masks(masked_llama(), make_rows(2), steps(5))) == 5
    -> accepted: rows are seen again, each epoch in another order
a lock that a killed process left
    (tmp / LOCK).write_text("what it wrote")
    with hold(tmp):
        assert "what it wrote" not in (tmp / LOCK).read_text()
    -> accepted: the system has dropped it with the process: the run goes on
a resumed run with another log every
    asked, _ = Resume(run_in(tmp), overrides=["train.log_every=7", "checkpoint_minutes=1", "coding=rice"]).look()
    assert (asked.train.log_every, asked.checkpoint_minutes, asked.coding) == (7, 1, "rice")
    -> accepted: free: how often progress is shown, where the run lies, when checkpoints are written and how masks
        are stored change no result
a dropped weight of nan in a model
    model = having(masked_llama(), f"{DOWN}.weight", (0, 0), torch.nan)
    assert math.isfinite(evaluate(having(model, f"{DOWN}.scores", (0, 0), 1e-9), make_rows(2)).loss)
    -> accepted: the masked layer selects, so the loss stays finite while the weight stays dropped and its score still
"""
