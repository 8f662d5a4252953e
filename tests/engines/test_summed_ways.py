"""Two processes train like one, in every way but sharded: the same scores, errors and checkpoints."""

import math
import os
import shutil
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from ranks import Ranks, in_processes
from tiny import make_llama, make_rows, masked_llama, save_llama
from tiny_run import assert_same_masks, steps, stop_after, write_run
from tiny_ways import masked_mixture, scores_of
from tiny_ways import rows_with_few_labels as rows

import mft.training.memory_plan
import mft.training.saver
from mft.config import MaskConfig, ModelConfig, TrainConfig
from mft.config_file import load_config
from mft.engines.distributed import Processes
from mft.engines.mode import MODES
from mft.masks.convert import mask_model, masked_modules
from mft.masks.quantize import quantize_model
from mft.memory.estimate import estimate
from mft.memory.model_config import read_model_config
from mft.memory.shapes import shape_from_config
from mft.models.pretrained import load_model
from mft.training.checkpoint import newest_checkpoint
from mft.training.loop import finetune, train_masks
from mft.training.resume import Resume
from mft.training.saver import Saver, Stopped
from mft.training.training_run import run_train

COUNT, STEPS, STOP = 2, 4, 2
WAYS = ("plain", "in_place", "resident", "quantized", "layerwise")
# ---------------------------------------------------------------------------------------------- what is computed


def make(way, layers=(1, 2, 3), dtype=torch.float32, mixture=False, **mask):
    if mask.get("nothing"):
        return make_llama(dtype)
    model = masked_mixture(**mask) if mixture else masked_llama(layers=layers, dtype=dtype, **mask)
    if way == "quantized":
        quantize_model(model, "nf4", masked=True)
    return model


def packed_rows():
    """Return rows with two examples each, which must not see each other."""
    return rows().add_column("starts", [[0, 3 + i % 5] for i in range(10)])


# name: (model, rows, settings, exactness). A sum of two terms has the same bits in either order. The last bits depend
# on the order for three terms, for a remembered row that was batched with others, and for 16-bit buffers, to which a
# second micro-batch is added before rounding. Scores then differ too: exactness is their distance relative to their
# movement.
BITS, LAST_BITS, SIXTEEN_BITS = 0.0, 1e-3, 0.1
CASES = {
    "fp32": ({}, rows, {}, BITS),
    "int16 scores, 8-bit moments": ({"scores_dtype": "int16"}, rows, {"moments": "8bit"}, BITS),
    "bf16, sums in fp32": (
        {"dtype": torch.bfloat16, "scores_dtype": "bfloat16"},
        rows,
        {"moments": "8bit", "grad_dtype": "float32"},
        BITS,
    ),
    "bf16, sums in bf16": ({"dtype": torch.bfloat16}, rows, {}, SIXTEEN_BITS),
    "clipped": ({}, rows, {"max_grad_norm": 1e-3}, BITS),
    "uneven shares": ({}, rows, {"accumulation": 3}, LAST_BITS),
    "uneven portions": ({}, rows, {"accumulation": 3, "batches_at_once": 1}, LAST_BITS),  # two, and one
    "remembered layers": ({"layers": (2, 3)}, rows, {"batch_size": 3, "steps": 6}, LAST_BITS),
    "packed rows": ({}, packed_rows, {}, BITS),
    "a mixture": ({"mixture": True}, rows, {}, BITS),
    "a row at a time": ({}, rows, {"batch_size": 1}, BITS),
    "16 and 8 bits": ({"scores_dtype": "bfloat16"}, rows, {"moments": "8bit"}, BITS),
    "a budget": ({"keep_ratio": None, "budget": 0.03, "mode": "auto", "init": "magnitude"}, rows, {}, BITS),
    "weights": ({"nothing": True, "dtype": torch.bfloat16}, rows, {"lr": 1e-2}, SIXTEEN_BITS),
}
# Over codes the engine is resident's, with its weights read from elsewhere, whatever the dtype, and for a mixture too.
OVER_CODES = ("fp32", "int16 scores, 8-bit moments", "bf16, sums in fp32", "a mixture")
BY_AUTOGRAD = ("a row at a time", "16 and 8 bits", "a budget", "weights")
BY_LAYERS = [name for name in CASES if name not in BY_AUTOGRAD]
NAMES = {
    "plain": ("fp32", "clipped", "uneven shares", "remembered layers", *BY_AUTOGRAD),
    "in_place": ("fp32", "bf16, sums in fp32", "clipped"),
    "resident": [name for name in BY_LAYERS if name != "uneven portions"],
    "quantized": OVER_CODES,
    "layerwise": [name for name in BY_LAYERS if name != "clipped"],
}


def slow(*values):
    """Return the parameters of a test, which is slow except for plain."""
    return pytest.param(*values, marks=[] if values[0] == "plain" else pytest.mark.slow)


def settings(**changes):
    return TrainConfig(**{"lr": 1e-3, "steps": STEPS, "batch_size": 2, "accumulation": COUNT, "seed": 3} | changes)


def trained(way, name, **options):
    mask, data, changes, _ = CASES[name]
    model = make(way, **mask)
    train = partial(train_masks, way=way) if masked_modules(model) else finetune
    reports = train(model, data(), settings(**changes), **options)
    losses = [[report.step, report.loss, report.lr, report.tokens] for report in reports]
    return {"reports": losses, "scores": learned(model)}


def learned(model):
    return scores_of(model) or {name: p.detach().clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------- in both processes


def work(rank, folder, way):
    """Return what one process finds, for the tests to judge."""
    processes = Processes(rank, COUNT)
    found = {name: trained(way, name, processes=processes) for name in NAMES[way]}
    if way != "quantized":
        found["not finite"] = one_row_is_not_finite(way, processes)
    if way in STOPPED:
        found["stopped"] = stopped(way, folder / way, processes)
    if way in ("resident", "layerwise"):
        for data in (rows, make_rows):  # in the rehearsal, and in a step
            found["no memory", data.__name__] = one_lacks_memory(way, data, processes)
    return found


def failure(call):
    """Return (name of the error's class, its message)."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return type(caught.value).__name__, str(caught.value)


def one_row_is_not_finite(way, processes):
    """Each step has both rows, one per process; word 5 is in one of them."""
    model = make(way)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    ids = [[5] * 12, [7] * 12]
    data = make_rows(2).remove_columns(["input_ids", "labels"]).add_column("input_ids", ids).add_column("labels", ids)
    before = scores_of(model)
    kind, words = failure(
        lambda: train_masks(model, data, settings(batch_size=1), way=way, processes=processes, remember=False)
    )
    return kind, words, all(torch.equal(scores, before[name]) for name, scores in scores_of(model).items())


def one_lacks_memory(way, data, processes):
    """The second process lacks memory, in the last layer but one."""
    engine = MODES[way].engine
    backward = engine.backward_layer

    def failing(self, layer, *arguments):
        if processes.rank == 1 and layer == 2:
            raise RuntimeError(f"out of memory at layer {layer}")
        return backward(self, layer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "backward_layer", failing)
        return failure(lambda: train_masks(make(way), data(), settings(), way=way, processes=processes))


def stopped(way, root, processes):
    """Send a signal to the second process only, and continue the run."""
    options = {"saver": Saver(root, math.inf, processes=processes), "processes": processes}
    with pytest.raises(Stopped) as caught:
        trained(way, STOPPED[way], on_step=stop_after(STOP) if processes.rank == 1 else None, **options)
    return caught.value.code, goes_on(way, root, root / "on", processes)


def goes_on(way, root, new_root, processes):
    checkpoint, _ = newest_checkpoint(root)
    assert checkpoint.step == STOP
    saver = Saver(new_root, math.inf, checkpoint, processes=processes)
    return trained(way, STOPPED[way], saver=saver, processes=processes)


STOPPED = {"plain": "fp32"} | dict.fromkeys(("resident", "layerwise"), "int16 scores, 8-bit moments")
WIDEST = {"scores": "float32", "moments": "float32"}


def run_until_a_signal(rank, folder):
    """Run mft train with memory: auto, while the second process has no memory for any way faster than resident."""
    config = load_config(folder / "config.yaml", [f"output_dir={folder}/run"])
    peaks = [
        estimate(
            shape_from_config(read_model_config(config.model.name), "tiny", dtype="float32"),
            replace(mft.training.memory_plan.workload_of(config, torch.device("cpu"), COUNT), memory=way, **WIDEST),
        ).device_peak
        for way in ("plain", "resident")
    ]
    free = 2 * peaks[0] if rank == 0 else sum(peaks) / 2
    after_step = Saver.after_step

    def stop(self, runner, reports, ended):
        if (rank, reports[-1].step) == (1, STOP):
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, runner, reports, ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mft.training.memory_plan, "free_memory", lambda device: (free, None))
        patch.setattr(Saver, "after_step", stop)
        with pytest.raises(Stopped) as caught:
            run_train(config)
    return caught.value.code


# ---------------------------------------------------------------------------------------------- judged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a run's configuration, model and data."""
    folder = tmp_path_factory.mktemp("summed")
    learn = (
        "train: {lr: 1e-2, epochs: null, steps: 4, batch_size: 2, accumulation: 2}\nmask: {layers_to_transform: 2-3}\n"
    )
    write_run(folder, learn)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """Return a function of a way, which returns what each process found."""
    return cache(lambda way: in_processes(work, COUNT, folder / f"processes of {way}", folder, way))


@pytest.fixture(scope="module")
def stopped_run(folder):
    """Return how both processes ended a run that a signal stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_CACHE", str(folder / "cache"))
        return Ranks(folder, COUNT, lambda rank: run_until_a_signal(rank, folder)).wait()


def assert_equal(ours, theirs):
    assert ours["reports"] == theirs["reports"]
    assert ours["scores"].keys() == theirs["scores"].keys()
    assert all(torch.equal(ours["scores"][name], scores) for name, scores in theirs["scores"].items())


@pytest.mark.parametrize(("way", "name"), [slow(way, name) for way in WAYS for name in NAMES[way]])
def test_two_processes_learn_what_one_does(found, way, name):
    (one, other), alone = (each[name] for each in found(way)), trained(way, name)
    assert_equal(one, other)
    tolerance, start = CASES[name][-1], learned(make(way, **CASES[name][0]))
    if tolerance == BITS:
        assert_equal(one, alone)
    for report, wanted in zip(one["reports"], alone["reports"], strict=True):
        assert report == pytest.approx(wanted, rel=1e-5 if tolerance < SIXTEEN_BITS else 1e-3)
    for module, scores in alone["scores"].items():
        moved = (scores.float() - start[module].float()).norm()
        assert moved > 0
        assert (one["scores"][module].float() - scores.float()).norm() <= tolerance * moved, module


@pytest.mark.parametrize("way", map(slow, ("plain", "resident", "layerwise")))
def test_a_loss_that_is_not_finite_in_one_process_stops_both_before_a_score_changes(found, way):
    (kind, words), (other_kind, other) = sorted(each["not finite"][:2] for each in found(way))
    assert (kind, other_kind) == ("NonFiniteLoss", "OtherFailed")
    assert words.startswith("the loss must stay finite, got nan at step 1 of 4 in the batch of rows [0] (documents ")
    assert other in [
        f"process {rank} of 2 has stopped, so all processes stop: NonFiniteLoss: {words}" for rank in range(COUNT)
    ]
    assert all(each["not finite"][2] for each in found(way))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["rows_with_few_labels", "make_rows"])
@pytest.mark.parametrize("way", ["resident", "layerwise"])
def test_a_lack_of_memory_in_one_process_stops_both(found, way, data):
    first, second = (each["no memory", data] for each in found(way))
    error = ("RuntimeError", "out of memory at layer 2")
    assert second == error
    assert first == ("OtherFailed", f"process 1 of 2 has stopped, so all processes stop: {': '.join(error)}")


@pytest.mark.parametrize("way", map(slow, STOPPED))
def test_a_stopped_run_goes_on_with_two_processes_or_one(found, folder, tmp_path, way):
    straight = trained(way, STOPPED[way])
    for each in found(way):
        code, resumed = each["stopped"]
        assert code == 128 + signal.SIGTERM
        assert_equal(resumed, straight)
    assert_equal(goes_on(way, folder / way, tmp_path, Processes()), straight)


@pytest.mark.slow
def test_auto_is_the_way_that_every_process_has_memory_for(stopped_run):
    told = "".join(each.output for each in stopped_run)
    assert "memory: resident, an estimated" in told
    assert "(process 1 lacks the memory for a faster way)" in told
    assert told.count("memory: ") == 1  # the second process prints nothing
    assert [each.code for each in stopped_run] == [128 + signal.SIGTERM] * COUNT


@pytest.mark.slow
@pytest.mark.usefixtures("stopped_run")
def test_one_process_goes_on_with_the_run_of_two_and_ends_as_if_it_had_begun(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    run = shutil.copytree(folder / "run", tmp_path / "run")
    assert [step for step, _ in steps(run)] == [1, STOP]
    run_train(Resume(run))
    straight = tmp_path / "straight"
    run_train(load_config(folder / "config.yaml", [f"output_dir={straight}", "memory=resident"]))
    assert steps(run) == steps(straight)
    assert sorted(os.listdir(run)) == sorted(os.listdir(straight))
    assert_same_masks(run, straight)


# ---------------------------------------------------------------------------------------------- without processes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("way", ["resident", "layerwise"])
def test_frozen_weights_stay_mapped_from_their_file(tmp_path, way):
    """So the processes of a machine share them in memory."""
    save_llama(tmp_path / "model")
    model, _ = load_model(ModelConfig(str(tmp_path / "model"), dtype="float32"))
    mask_model(model, MaskConfig.paper(layers_to_transform=[2, 3]))
    train_masks(model, rows(), settings(steps=1), way=way)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for name, parameter in model.named_parameters():
        lies = any(start <= parameter.data_ptr() < end for start, end in mapped)
        assert lies != name.endswith(".scores"), name


class ThreeProcesses(Processes):
    """Processes as seen by one of three; the two others have 1 in every element."""

    def _add_up(self, total):
        total += 1
        total += 1
        return self

    def wait(self):
        pass


def test_sums_of_sixteen_bits_are_rounded_once():
    """In bf16 the number after 256 is 258. 256 + 1 lies halfway between them and rounds back to 256."""
    large, small = torch.full((3, 5), 256, dtype=torch.bfloat16), torch.zeros(2, 3)
    processes = ThreeProcesses(0, 3)
    found = [(each is large, each is small) for each in processes.summed([large, small])]
    assert found == [(True, False), (False, True)]
    assert (large == 258).all()
    assert (small == 2).all()
