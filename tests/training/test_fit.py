"""Reports and refusals of a run before any weight is loaded."""

import shutil

import pytest
import torch
from tiny_gguf import write_tiny_gguf

import mft.training.memory_plan
import mft.training.training_run
from mft.config import DataConfig, MaskConfig, ModelConfig, RunConfig, TrainConfig
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.training.memory_plan import plan_training, workload_of
from mft.training.resume import Begin


def config_of(name="llama2-7b", memory="auto", **sections):
    return RunConfig(
        model=ModelConfig(name=name, quantization=sections.pop("quantization", None)),
        data=DataConfig(sequence_length=4096),
        mask=MaskConfig(**{"layers_to_transform": "4-7"} | sections.pop("mask", {})),
        train=TrainConfig(steps=1, **sections.pop("train", {})),
        memory=memory,
        output_dir="run",
    )


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.fixture
def with_free(monkeypatch, tmp_path):
    """Return with_free(gigabytes), which sets the free memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mft.training.memory_plan, "default_device", lambda: torch.device("cpu"))
    return lambda gigabytes: monkeypatch.setattr(
        mft.training.memory_plan, "_available_host_bytes", lambda: gigabytes * 1e9
    )


@pytest.mark.parametrize(("free", "way"), [(400, "plain"), (33, "resident"), (26.2, "layerwise")])
def test_auto_takes_the_fastest_that_fits_and_says_why(with_free, free, way):
    with_free(free)
    plan = plan_training(config_of())
    assert plan.mode.name == way
    assert f"memory: {way}, an estimated " in plan.reason
    assert f"of {free:.1f} GB on cpu" in plan.reason
    if way != "plain":
        assert "plain cannot be taken: needs " in plan.reason


def test_a_run_takes_as_many_batches_at_once_as_fit(with_free):
    config = config_of(train={"accumulation": 128})
    for free, at_once in ((400, None), (80, 32)):
        with_free(free)
        config.memory = "layerwise"
        assert plan_training(config).config.train.batches_at_once == at_once


def test_processes_on_one_machine_share_its_memory(with_free, monkeypatch):
    with_free(400)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "of 100.0 GB on cpu" in plan_training(config_of()).reason


ALL = {"memory": "quantized", "mask": {"layers_to_transform": None}}


def test_layers_that_the_model_does_not_have_are_refused(with_free):
    with_free(400)
    with pytest.raises(ValueError, match=r"must lie in 0 to 31, llama2-7b has 32 layers"):
        plan_training(config_of(mask={"layers_to_transform": "30-32"}))


def test_the_nearest_setting_fits(with_free):
    with_free(24)
    with pytest.raises(ValueError, match="nothing fits") as caught:
        plan_training(config_of())
    changes = str(caught.value).rpartition("the nearest setting that fits: ")[2].split()
    assert changes
    overrides = dict(change.split("=") for change in changes)
    assert set(overrides) <= set(mft.training.memory_plan._KEYS.values())
    config = config_of(
        memory=overrides.get("memory", "auto"),
        quantization=overrides.get("model.quantization"),
        mask={"scores_dtype": overrides.get("mask.scores_dtype", "float32")},
        train={"moments": overrides.get("train.moments", "float32")},
    )
    config.model.quantize_masked = overrides.get("model.quantize_masked") == "true"
    assert plan_training(config).mode.name == config.memory


def test_the_exact_weights_have_to_fit_before_they_are_quantised(with_free):
    """NF4 needs 6 GB in a step, but 14 GB while the weights for it are read."""
    config = config_of(memory="quantized", mask={"layers_to_transform": "4", "scores_dtype": "int16"})
    with_free(12)
    with pytest.raises(ValueError, match="quantized: needs 13.9 GB of 12.0 GB, 1.9 GB missing, in loading"):
        plan_training(config)
    with_free(14.5)
    assert plan_training(config).mode.name == "quantized"


def test_no_weight_is_loaded_before_the_refusal(with_free, monkeypatch):
    with_free(1)
    monkeypatch.setattr("mft.engines.placed.load_model", lambda *_: pytest.fail("a weight was loaded"))
    with pytest.raises(ValueError, match="nothing fits"):
        mft.training.training_run.run_train(Begin(config_of()))


def test_quantized_means_nf4_unless_said_otherwise(with_free):
    with_free(400)
    everything = config_of(**ALL)
    everything.model.quantization, everything.model.quantize_masked = "nf4", True
    assert plan_training(everything).mode.name == "quantized"
    assert plan_training(config_of(memory="quantized")).config.model.quantization == "nf4"
    assert plan_training(config_of(memory="quantized", quantization="int8")).config.model.quantization == "int8"
    plan = plan_training(config_of(quantization="int8"))
    assert (plan.mode.name, plan.config.model.quantization) == ("quantized", "int8")
    assert plan_training(config_of()).config.model.quantization is None


def test_frozen_layers_are_remembered_where_there_is_room_and_a_tenth_to_save(with_free):
    upper = {"layers_to_transform": "24-31"}
    with_free(400)
    assert plan_training(config_of(mask=upper)).remember
    assert not plan_training(config_of()).remember  # four of 32 layers take a thirtieth of the step
    needed = mft.training.memory_plan.choose(
        shape_from_config(known_config("llama2-7b")), workload_of(config_of(mask=upper), torch.device("cpu")), None
    ).estimates["layerwise"]
    with_free((needed.device_peak + 1e9) / 1e9)
    plan = plan_training(config_of(memory="layerwise", mask=upper))
    assert not plan.remember


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        ({}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": ["q_proj"]}, ("q_proj",)),
        ({"target_parameters": ["experts.gate_up_proj"]}, ("experts.gate_up_proj",)),
        ({"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight"]}, ("q_proj", "o_proj")),
    ],
    ids=str,
)
def test_what_is_masked_is_what_is_estimated(mask, named):
    assert workload_of(config_of("mixtral-8x7b", mask=mask), torch.device("cpu")).target_modules == named


@pytest.mark.parametrize(
    ("name", "mask", "free", "message"),
    [
        ("llama2-7b", {}, 10_000_000, "with 0.2 GB free, run has 0.0 GB"),
        ("mixtral-8x7b", EXPERTS, 4 * 8 * 3 * 14336 * 4096 // 8, "with 0.8 GB free, run has 0.7 GB"),
    ],
)
def test_masks_need_room_on_the_disk(with_free, monkeypatch, name, mask, free, message):
    with_free(2000)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(ValueError, match=f"output_dir must lie on a disk {message}"):
        plan_training(config_of(name, mask=mask))


def test_shapes_that_are_not_known_are_not_refused(with_free, tmp_path):
    with_free(1)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    plan = plan_training(config_of(name=str(tmp_path)))
    assert plan.mode.name == "plain"
    assert plan.reason.startswith("memory: plain, not estimated: model must be of a family")
    assert plan_training(config_of(name=str(tmp_path), memory="layerwise")).mode.name == "layerwise"
    assert plan_training(config_of(name=str(tmp_path), mask={"scores_dtype": "int16"})).mode.name == "in_place"
    assert plan_training(config_of(name=str(tmp_path), quantization="nf4")).mode.name == "quantized"


def test_a_model_that_is_not_there_is_refused_in_the_words_of_its_loader(with_free, monkeypatch):
    with_free(1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"^model.name must be a model that exists, got 'runs/ful/model'"):
        plan_training(config_of(name="runs/ful/model"))
    with pytest.raises(ValueError, match=r"^model.name 'smollm2-135' is neither .*did you mean smollm2-135m\?"):
        plan_training(config_of(name="smollm2-135"))


def test_a_gguf_file_is_estimated(with_free, tmp_path, monkeypatch):
    with_free(1)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf")
    plan = plan_training(config_of(name="tiny.gguf", mask={"layers_to_transform": "1"}))
    assert plan.reason.startswith("memory: plain, an estimated ")


def test_a_setting_is_what_the_configuration_says():
    config = config_of(
        memory="layerwise",
        mask={"scores_dtype": "int16", "target_modules": ["up_proj"]},
        train={"moments": "8bit", "grad_dtype": "float32", "batch_size": 3},
    )
    workload = workload_of(config, torch.device("cuda"))
    assert workload.layers == (4, 5, 6, 7)
    assert (workload.scores, workload.moments, workload.grad_dtype) == ("int16", "8bit", "float32")
    assert (workload.sequence, workload.micro_batch, workload.accumulation) == (4096, 3, 1)
    assert (workload.memory, workload.device, workload.target_modules) == ("layerwise", "cuda", ("up_proj",))
    shape = shape_from_config(known_config("llama2-7b"))
    assert 3e9 < estimate(shape, workload).device_peak < 5e9
