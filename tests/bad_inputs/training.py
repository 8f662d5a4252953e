"""Training and evaluation of a random Llama of four layers, masks on layers 2 and 3, on eight rows of twelve tokens;
`run_in(tmp)` is the directory of a run that was stopped, `nan_at(model, step)` makes a gradient of that step NaN.
"""

import json
import math

import torch
from tiny import make_llama, make_phi3, make_rows, masked_llama
from transformers import BertConfig, BertLMHeadModel, BloomConfig, BloomForCausalLM

from mft.cli.estimate import parse_bytes
from mft.cli.study import run_plot
from mft.config import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig
from mft.config_file import load_config, save_config
from mft.engines.distributed import Processes, joined
from mft.engines.step import NonFiniteLoss
from mft.evaluation.evaluate import evaluate, paired_difference
from mft.evaluation.evaluated_base import check_exact
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.peft import MaskPeftConfig
from mft.masks.quantize import quantize_model
from mft.masks.unmasked import unmasked_model
from mft.models.longrope import refuse_long_batches
from mft.models.packed_rows import check_kept_apart
from mft.study.config import ArmConfig, StudyConfig
from mft.training import plan
from mft.training.best import Best
from mft.training.checkpoint import BadCheckpoint, check_space, newest_checkpoint, write_checkpoint
from mft.training.loop import finetune, train_loop, train_masks
from mft.training.resume import Resume, find_checkpoint
from mft.training.run_directory import check_run_directory
from mft.training.run_lock import LOCK, hold
from mft.training.saver import Saver
from mft.training.validation import Validation
from mft_kernels.ops.checks import NonFiniteScores

from .registry import accepted, refused

DOWN = "model.layers.3.mlp.down_proj"


def steps(count=1, **changes):
    return TrainConfig(**{"lr": 1e-2, "steps": count} | changes)


def run_in(tmp):
    save_config(RunConfig(train=steps(30)), tmp / "run" / "config.yaml")
    return tmp / "run"


def nan_at(model, step):
    """Spoils a gradient of that step."""

    def spoil(now, _):
        if now == step:
            model.get_submodule(DOWN).weight.grad.fill_(torch.nan)

    return spoil


def needs_2_to_60_bytes(layer, *_):
    if layer.training:
        torch.empty(1 << 60, dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------- NaN, and lack of memory


@refused(
    NonFiniteLoss,
    where="step 1 of 3 in the batch of rows",
    got="got nan",
    rule="the loss must stay finite",
    remedy="lower train.lr (now 0.01) or look at these rows",
)
def a_loss_that_becomes_nan():
    model = masked_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    train_masks(model, make_rows(), steps(3))


@refused(
    NonFiniteScores,
    where=f"scores of module '{DOWN}'",
    got="got 1 NaN or Inf",
    rule="must be finite",
    remedy="lower the learning rate, or look for NaN or Inf in the weight",
)
def a_dropped_weight_of_inf_whose_score_learns():
    model = masked_llama()
    with torch.no_grad():
        model.get_submodule(DOWN).weight[0, 0] = torch.inf
        model.get_submodule(DOWN).scores[0, 0] = 1e-9
    train_masks(model, make_rows(), steps(3))


@refused(
    NonFiniteLoss,
    where=f"{DOWN}.weight",
    got="got 2048 NaN or Inf after the last step",
    rule="must stay finite",
    remedy="lower train.lr, or look for NaN or Inf in the model's weights",
)
def a_gradient_of_nan_in_the_last_step():
    model = make_llama()
    finetune(model, make_rows(), steps(), before_update=nan_at(model, 1))


@refused(
    NonFiniteLoss,
    where=f"{DOWN}.weight",
    got="got 2048 NaN or Inf",
    rule="must stay finite",
    remedy="lower train.lr",
)
def a_checkpoint_of_weights_that_are_nan(tmp):
    model = make_llama()
    try:
        finetune(model, make_rows(), steps(3), before_update=nan_at(model, 2), saver=Saver(tmp, 0))
    finally:
        assert newest_checkpoint(tmp)[0].step == 1  # the good one stays


@refused(
    NonFiniteLoss,
    where="after step 1 of 3",
    got="got nan",
    rule="the validation loss must stay finite",
    remedy="lower train.lr (now 0.01)",
)
def a_validation_loss_that_is_nan():
    model = make_llama()
    validation = Validation(make_rows())
    finetune(model, make_rows(), steps(3, eval_every=1), before_update=nan_at(model, 1), validation=validation)


@refused(NonFiniteScores, where=DOWN, got="got 1 NaN or Inf", rule="must be finite", remedy="lower the learning rate")
def a_merge_of_nan_scores():
    model = masked_llama()
    with torch.no_grad():
        model.get_submodule(DOWN).scores[0, 0] = torch.nan
    merge_model(model)


@refused(
    RuntimeError,
    where="out of memory at rows [",
    got="you tried to allocate 1152921504606846976 bytes",
    rule="all weights and activations are live on cpu under memory: plain",
    remedy="Set train.batch_size or data.sequence_length lower, or train.gradient_checkpointing",
    other=r"\[enforce.*?(?=DefaultCPU)",
)
def a_step_that_needs_more_memory_than_there_is():
    model = masked_llama()
    model.model.layers[2].register_forward_hook(needs_2_to_60_bytes)
    train_masks(model, make_rows(), steps())


@refused(
    ValueError,
    where="plain: needs",
    got="of 17.0 GB",
    rule="nothing fits",
    remedy="the nearest setting that fits: memory=layerwise train.moments=8bit",
    other=r"\d+\.\d(?= GB)",
)
def a_model_that_does_not_fit(patch):
    patch.setattr(plan, "default_device", lambda: torch.device("cpu"))
    patch.setattr(plan, "_free_memory", lambda device: (17e9, None))
    plan.plan_training(load_config(None, ["model.name=llama2-7b", "train.steps=1", "mask.layers_to_transform=[4, 5]"]))


@refused(
    ValueError,
    where="layerwise: needs 242.4 GB of the host's 64.0 GB",
    got="resident: needs 30.9 GB (and 0.6 GB for the context) of 12.0 GB",
    rule="nothing fits",
    remedy="the nearest setting that fits: memory=layerwise",
)
def a_model_whose_states_the_host_cannot_hold(patch):
    patch.setattr(plan, "default_device", lambda: torch.device("cuda"))
    patch.setattr(plan, "_free_memory", lambda device: (12e9, 64e9))
    sizes = ["data.sequence_length=4096", "train.steps=1", "train.accumulation=128"]
    plan.plan_training(load_config(None, ["model.name=llama3.1-8b", *sizes]))


@refused(
    ValueError,
    where="quantized",
    got="every linear layer is masked",
    rule="nothing would be quantised without quantize_masked",
    remedy="the nearest setting that fits: memory=quantized model.quantize_masked=true",
)
def a_quantised_base_of_which_nothing_is_quantised(patch):
    patch.setattr(plan, "_free_memory", lambda device: (400e9, None))
    plan.plan_training(load_config(None, ["model.name=llama2-7b", "train.steps=1", "model.quantization=nf4"]))


# ---------------------------------------------------------------------------------------------- what is trained


@refused(ValueError, where="dataset", got="got 0", rule="must hold at least one row to train on")
def training_on_no_rows():
    finetune(make_llama(), make_rows().select([]), steps())


@refused(
    ValueError,
    where="validation",
    got="got NoneType",
    rule="must be given where train.eval_every is 2 and train.eval_minutes is None",
)
def an_evaluation_during_training_without_rows():
    finetune(make_llama(), make_rows(), steps(4, eval_every=2))


@refused(
    BadCheckpoint,
    where="best/step-00000040",
    got="No such file or directory",
    rule="expected a file that can be read",
    remedy="export the last step instead, with train.keep_best=false --force",
)
def a_best_step_that_is_lost(tmp):
    Best(tmp / "best").put(masked_llama(), 40)


@refused(
    ValueError,
    where="model",
    got="found none",
    rule="must hold masked layers",
    remedy="call mask_model(model, config) first",
)
def training_masks_that_are_not_there():
    train_masks(make_llama(), make_rows(), steps())


@refused(
    ValueError,
    where="the model",
    got="all are frozen",
    rule="must have a trainable parameter",
    remedy="mask it or unfreeze layers",
)
def training_a_frozen_model():
    train_loop(make_llama().requires_grad_(False), make_rows(), steps())


@refused(
    ValueError,
    where="data.sequence_length",
    got="got 12",
    rule="must be at most 8, as many positions as 'LlamaForCausalLM' has",
    remedy="set data.sequence_length=8 or less, or a rope scaling that reaches further in its config.json",
)
def training_on_rows_longer_than_the_model_reads():
    finetune(make_llama(max_position_embeddings=8), make_rows(), steps())


@refused(
    ValueError,
    where="model.name",
    got="got 'BertLMHeadModel': a model of type bert with is_decoder false",
    rule="must be a causal language model",
    remedy="name a decoder, or set is_decoder to true in its config.json if it is one",
)
def training_a_masked_language_model_on_next_tokens():
    finetune(BertLMHeadModel(BertConfig(num_hidden_layers=1)), make_rows(), steps())


@refused(ValueError, where="way", got="'fast'", rule="must be one of plain, resident, quantized, layerwise")
def training_in_an_unknown_way():
    train_masks(masked_llama(), make_rows(), steps(), way="fast")


@refused(ValueError, where="memory", got="int16 scores", rule="must not be plain", remedy="set memory: resident")
def training_fixed_point_scores_by_autograd():
    train_masks(masked_llama(scores_dtype="int16"), make_rows(), steps())


@refused(
    ValueError,
    where="memory",
    got="got resident",
    rule="must be plain for a model with dropout, or other noise in training",
    remedy="set the dropout of the model's configuration to 0",
)
def training_with_dropout_layer_by_layer():
    model = mask_model(make_llama(attention_dropout=0.2), MaskConfig(layers_to_transform=3))
    train_masks(model, make_rows(), steps(), way="resident")


@refused(
    ValueError,
    where="train.max_grad_norm",
    got="got 1",
    rule="must be null with memory: layerwise",
    remedy="memory: resident has one",
)
def clipping_one_layer_at_a_time():
    train_masks(masked_llama(), make_rows(), steps(max_grad_norm=1.0), way="layerwise")


@refused(
    ValueError,
    where="train.accumulation",
    got="got 3",
    rule="must be at least 4, the number of processes",
    remedy="set train.accumulation=4, and train.batch_size so that a step keeps its 6 rows",
)
def more_processes_than_micro_batches():
    settings = steps(accumulation=3, batch_size=2)
    train_masks(masked_llama(), make_rows(), settings, way="layerwise", processes=Processes(0, 4))


@refused(
    ValueError,
    where="model",
    got="got LlamaForCausalLM on 2",
    rule="must have no dropout, nor draw at random otherwise, on several processes",
    remedy="set the dropout of the model's configuration to 0",
)
def dropout_on_several_processes():
    model = mask_model(make_llama(attention_dropout=0.2), MaskConfig(layers_to_transform=3))
    train_masks(model, make_rows(), steps(accumulation=2), processes=Processes(0, 2))


@refused(
    ValueError,
    where="--nproc-per-node",
    got="got a process with LOCAL_RANK=2",
    rule="must be at most 2, the GPUs of this machine",
)
def more_processes_than_gpus(patch):
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setenv("WORLD_SIZE", "3")
    patch.setenv("LOCAL_RANK", "2")
    with joined():
        pass


@refused(ValueError, where="train.moments", got="got 8bit", rule="must be float32 where weights are trained")
def fine_tuning_weights_on_8_bit_moments():
    finetune(make_llama(), make_rows(), steps(moments="8bit"))


@refused(ValueError, where="model.quantization", got="got int8", rule="must be null for mft finetune")
def fine_tuning_quantised_weights():
    check_exact(ModelConfig(quantization="int8"), "finetune")


@refused(
    ValueError,
    where="masks",
    got="got 28 layers that are quantised",
    rule="must be merged into exact weights",
    remedy="save_masks, and load_masks on the unquantised model",
)
def a_merge_into_quantised_weights():
    merge_model(quantize_model(masked_llama(), "int8", masked=True))


@refused(
    ValueError,
    where="model",
    got="got 1 other parameters (lm_head.weight, ...)",
    rule="must train scores alone",
    remedy="load the base a second time",
)
def the_base_of_a_model_that_trains_its_head():
    unmasked_model(mask_model(make_llama(), MaskConfig(modules_to_save=["lm_head"])))


@refused(
    AttributeError,
    where="trainable_token_indices",
    got="got tokens that were added to the tokenizer",
    rule="are not for masks, which leave embeddings as they are",
    remedy="give a chat template without new ones",
)
def tokens_that_trl_adds_for_a_chat_template():
    print(MaskPeftConfig().trainable_token_indices)


@refused(
    ValueError,
    where="model",
    got="14 layers that are (model.layers.0.",
    rule="must not be quantised already",
    remedy="load it anew",
)
def a_model_quantised_twice():
    quantize_model(quantize_model(masked_llama(), "int8"), "int8")


@refused(ValueError, where="weight", got="NaN or infinite values", rule="must be finite to be quantised")
def a_weight_of_nan_to_quantise():
    model = masked_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    quantize_model(model, "int8")


@refused(ValueError, where="dataset", got="got 2 rows without a label", rule="must score at least one token")
def an_evaluation_of_rows_without_labels():
    rows = make_rows(2).map(lambda row: row | {"labels": [-100] * 12})
    evaluate(make_llama(), rows)


@refused(
    ValueError,
    where="starts of row 1",
    got="got [0, 12]",
    rule="must begin with 0 and rise below its 12 tokens",
)
def starts_of_examples_behind_the_end_of_their_row():
    train_masks(masked_llama(), make_rows(2).add_column("starts", [[0, 5], [0, 12]]), steps())


@refused(
    ValueError,
    where="BloomForCausalLM",
    got="moves an example by",
    rule="data.packing must be false",
)
def packed_rows_for_a_model_that_cannot_keep_examples_apart():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4))
    train_masks(mask_model(bloom, MaskConfig.paper()), make_rows(2).add_column("starts", [[0, 5], [0]]), steps())


@refused(
    ValueError,
    where="Phi3ForCausalLM",
    got="got a change by",
    rule="data.sequence_length must be at most 16",
    remedy="run the model inside mft.models.longrope.by_own_length(model)",
)
def long_packed_rows_for_a_model_whose_frequencies_depend_on_the_longest_example():
    check_kept_apart(make_phi3(switch=16), torch.arange(8)[None], 1, longest=24)


@refused(
    ValueError,
    where="Phi3ForCausalLM",
    got="got 2 rows of up to 24 tokens",
    rule="batch_size must be 1 for rows of more than 16 tokens",
)
def a_batch_of_long_rows_from_lm_eval_for_such_a_model():
    model = make_phi3(switch=16)
    refuse_long_batches(model)
    model(torch.zeros(2, 24).long())


@refused(
    ValueError,
    where="a and b",
    got="got 1 and 2 documents of 22 and 44 tokens",
    rule="must be evaluated on the same documents and tokens",
)
def a_difference_on_other_documents():
    model = make_llama()
    paired_difference(evaluate(model, make_rows(2)), evaluate(model, make_rows(4)))


# ---------------------------------------------------------------------------------------------- settings


@refused(
    ValueError,
    where="steps or epochs",
    got="got steps=10 and epochs=1.0",
    rule="must be given (exactly one of them)",
    remedy="set the other to null",
)
def steps_and_epochs_at_once():
    TrainConfig(steps=10, epochs=1)


@refused(
    ValueError,
    where="steps or epochs",
    got="got neither",
    rule="must be given (exactly one of them)",
    remedy="set steps=100 or epochs=1",
)
def neither_steps_nor_epochs():
    TrainConfig()


@refused(ValueError, where="lr", got="got 0.0", rule="must be positive")
def a_learning_rate_of_zero():
    TrainConfig(lr=0, steps=1)


@refused(ValueError, where="lr", got="got nan", rule="must be a finite number")
def a_learning_rate_of_nan():
    TrainConfig(lr=math.nan, steps=1)


@refused(
    ValueError,
    where="schedule",
    got="got 'cosin'",
    rule="must be one of linear, constant, cosine",
    remedy="did you mean cosine?",
)
def a_schedule_that_is_misspelt():
    TrainConfig(steps=1, schedule="cosin")


@refused(ValueError, where="threshold", got="got -1.0", rule="must be at least 0 in magnitude mode")
def a_negative_threshold_of_magnitudes():
    MaskConfig(threshold=-1.0)


@refused(ValueError, where="--gpu", got="'24 gigs'", rule="must be a size with its unit, such as 24GB or 24GiB")
def a_size_in_unknown_units():
    parse_bytes("24 gigs", "--gpu")


@refused(ValueError, where="--gpu", got="'12'", rule="must be a size with its unit", remedy="did you mean 12GB?")
def a_size_without_a_unit():
    parse_bytes("12", "--gpu")


# ---------------------------------------------------------------------------------------------- runs that go on


@refused(
    ValueError,
    where="the configuration",
    got="train.lr was 0.01, now 0.02",
    rule="must be the run's own",
    remedy="take the changes back, or pass --force",
)
def a_resumed_run_with_another_configuration(tmp):
    Resume(run_in(tmp), overrides=["train.lr=2e-2"]).look()


@refused(
    ValueError,
    where="step-00000001",
    got="data was old, now new",
    rule="must be of this very run",
    remedy="take the change back, or pass --force",
)
def a_resumed_run_on_other_data(tmp):
    train_masks(masked_llama(), make_rows(), steps(), saver=Saver(tmp, 0, facts={"data": "old"}))
    saver = Saver(tmp, 0, newest_checkpoint(tmp)[0], facts={"data": "new"})
    train_masks(masked_llama(), make_rows(), steps(), saver=saver)


@refused(
    ValueError,
    where="learned.model.layers.1.mlp.down_proj.scores",
    got="is missing there",
    rule="the checkpoint must hold what this run trains",
)
def a_resumed_run_with_other_layers(tmp):
    train_masks(masked_llama(), make_rows(), steps(), saver=Saver(tmp, 0))
    saver = Saver(tmp, 0, newest_checkpoint(tmp)[0])
    train_masks(masked_llama(layers=(1, 2, 3)), make_rows(), steps(), saver=saver)


@refused(
    ValueError,
    where=".scores",
    got="the checkpoint has torch.float32",
    rule="must be torch.bfloat16 of shape",
)
def a_resumed_run_with_scores_in_another_format(tmp):
    train_masks(masked_llama(), make_rows(), steps(), saver=Saver(tmp, 0))
    saver = Saver(tmp, 0, newest_checkpoint(tmp)[0])
    train_masks(masked_llama(scores_dtype="bfloat16"), make_rows(), steps(), saver=saver)


@refused(ValueError, where="--resume", got="has no config.yaml", rule="must name the output_dir of a run")
def a_resumed_run_that_never_was(tmp):
    Resume(tmp).check()


@refused(ValueError, where="--resume", got="has its masks/ already", rule="must name a run that is not finished")
def a_resumed_run_that_is_finished(tmp):
    (run_in(tmp) / "masks").mkdir()
    Resume(tmp / "run").look()


@refused(
    ValueError,
    where="state.json",
    got="got 2",
    rule="no other checkpoint verifies",
    remedy="--overwrite begins anew",
)
def a_resumed_run_whose_only_checkpoint_is_damaged(tmp):
    path = write_checkpoint(tmp / "checkpoints", 3, {}, {}).path
    (path / "state.json").write_text("{}")
    find_checkpoint(tmp)


@refused(
    BadCheckpoint,
    where="state.json",
    got="got []",
    rule="expected the config and events of a run of this version of mft",
    remedy="go on with the version or the program that wrote it",
)
def a_resumed_run_whose_checkpoint_another_program_wrote(tmp):
    train_masks(masked_llama(), make_rows(), steps(), saver=Saver(run_in(tmp) / "checkpoints", 0))
    Resume(tmp / "run").look()


@refused(
    RuntimeError,
    where="output_dir",
    got='is in use by {"process": ',
    rule="is in use by",
    remedy="wait for it, stop it, or name another output_dir",
    other=r'(?<=in use by ){"process".*?}',
)
def two_processes_in_one_run(tmp):
    with hold(tmp), hold(tmp):
        pass


@refused(OSError, where=".lock", got="got a symbolic link", rule="must be a file of mft's own", remedy="remove it")
def a_lock_that_points_elsewhere(tmp):
    (tmp / LOCK).symlink_to(tmp / "precious")
    with hold(tmp):
        pass


@refused(
    ValueError,
    where="directory",
    got="with a table of no domains",
    rule="must be a finished study's",
    remedy="a run of mft train has its curves in plot.png, and mft plot flips draws how its masks moved",
)
def a_summary_of_a_run(tmp):
    (tmp / "table.json").write_text('{"before": {"loss": 1.44}}')
    run_plot("summary", [tmp], None, domain=None, arm=None, rows=32, points=11)


@refused(
    ValueError,
    where="arms.control.start",
    got="got NF4",
    rule="must lead to no quantized arm for the kind control",
    remedy="train them exactly, and round them in an arm {kind: quantized, start: control, quantization: nf4}",
)
def a_study_that_trains_weights_in_codes(tmp):
    codes = ArmConfig("quantized", quantization="nf4")
    arms = {"full": ArmConfig("full", lrs=[1.0]), "NF4": codes, "control": ArmConfig("control", lrs=[1.0], start="NF4")}
    StudyConfig(arms, {"code": DataConfig()})


@refused(
    ValueError,
    where="domain",
    got="got none",
    rule="must have a domain with arms that began at the full fine-tune and whose bytes are known",
    remedy="run mft compare again if its table.json is older than that",
)
def a_plot_by_bytes_of_a_table_without_them(tmp):
    row = {"arm": "MFT", "kind": "mask", "minus_full": {"estimate": -0.1, "low": -0.2, "high": 0.0}}
    (tmp / "table.json").write_text(json.dumps({"domains": {"code": {"full": "full fine-tune", "rows": [row]}}}))
    run_plot("bytes", [tmp], None, domain=None, arm=None, rows=32, points=11)


@refused(
    ValueError,
    where="shares",
    got="got []",
    rule="must hold at least one number for the kinds ternary and sparse_delta, and be left out for others",
)
def a_compressed_arm_that_says_not_how_many_weights(tmp):
    ArmConfig("ternary", of="control")


@refused(
    ValueError,
    where="a study",
    got="got none",
    rule="must have a general text for its forgetting to be drawn",
    remedy="name one in its file, such as general: {stdlib: {source: stdlib}}",
)
def a_plot_of_forgetting_where_none_was_measured(tmp):
    (tmp / "table.json").write_text('{"domains": {"code": {"rows": []}}, "seeds": [0]}')
    run_plot("forgetting", [tmp], None, domain=None, arm=None, rows=32, points=11)


@refused(
    ValueError,
    where="output_dir",
    got="already holds a run (config.yaml)",
    rule="already holds a run",
    remedy="name another one, or pass --overwrite to delete it",
)
def a_run_over_an_earlier_one(tmp):
    check_run_directory(run_in(tmp))


@refused(
    OSError,
    where="checkpoints",
    got="GB are free",
    rule="checkpoints take 1000000000.00 GB more",
    remedy="make room, or name another output_dir",
    other=r"\d+\.\d\d(?= GB are free)",
)
def checkpoints_on_a_disk_that_is_too_small(tmp):
    check_space(tmp, 10**18)


# ---------------------------------------------------------------------------------------------- accepted


@accepted("nothing is learned from them, and nothing breaks")
def a_batch_without_labels():
    model = masked_llama()
    before = {name: module.scores.clone() for name, module in masked_modules(model).items()}
    rows = make_rows(2).map(lambda row: row | {"labels": [-100] * 12})
    train_masks(model, rows, steps(batch_size=2))
    assert all(torch.equal(module.scores, before[name]) for name, module in masked_modules(model).items())


@accepted("rows are seen again, each epoch in another order")
def more_steps_than_rows():
    assert len(train_masks(masked_llama(), make_rows(2), steps(5))) == 5


@accepted("the system has dropped it with the process: the run goes on")
def a_lock_that_a_killed_process_left(tmp):
    (tmp / LOCK).write_text("what it wrote")
    with hold(tmp):
        assert "what it wrote" not in (tmp / LOCK).read_text()


@accepted(
    "free: how often progress is shown, where the run lies, when checkpoints are written and how masks are stored "
    "change no result"
)
def a_resumed_run_with_another_log_every(tmp):
    asked, _ = Resume(run_in(tmp), overrides=["train.log_every=7", "checkpoint_minutes=1", "coding=rice"]).look()
    assert (asked.train.log_every, asked.checkpoint_minutes, asked.coding) == (7, 1, "rice")


@accepted("the masked layer selects, so the loss stays finite while the weight stays dropped and its score still")
def a_dropped_weight_of_nan_in_a_model():
    model = masked_llama()
    down = model.get_submodule(DOWN)
    with torch.no_grad():
        down.weight[0, 0] = torch.nan
        down.scores[0, 0] = 1e-9
    assert math.isfinite(evaluate(model, make_rows(2)).loss)
