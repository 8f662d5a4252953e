"""The real vLLM with a task for each request: in a batch of all tasks each answer is its merged model's."""

import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import torch
from real_base import PROMPTS, SETTINGS, make_tasks, masked_base, missing, run_session
from real_http import ADDRESS, BASE, command, complete, running

import mft.vllm
from mft.masks.export import save_masks
from mft_kernels import backend_report

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
TASKS = ("code", "maths", "prose")
NAMES = (*TASKS, "base")
# Of a token's log-probability. A product by masks adds in another order than the merged model's: in bf16 that moved one
# by up to 0.21 on a Xeon with AMX. So fp32 decides, and bf16 only looks for gross errors.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.5}


@pytest.fixture(scope="module", params=BOUNDS)
def seen(request, tmp_path_factory):
    """(dtype, answers with a task for each request, answers of the merged models); prose masks one layer alone."""
    root, dtype = tmp_path_factory.mktemp("real"), request.param
    make_three(root, getattr(torch, dtype))
    return dtype, run_session("per request", root, dtype), run_session("switching", root, dtype)


def make_three(root, dtype):
    prose = save_masks(masked_base(2, dtype, share=0.3, layers_to_transform=[1]), root / "prose")
    return make_tasks(root, dtype, merged=False) | {"prose": str(prose)}


def distance(found, wanted):
    """(the most by which log-probabilities differ while tokens agree, in how many answers a token differs)"""
    most, differing = 0.0, 0
    for number, tokens in enumerate(wanted["tokens"]):
        for place, token in enumerate(tokens):
            if found["tokens"][number][place] != token:
                differing += 1
                break
            most = max(most, abs(found["logprobs"][number][place] - wanted["logprobs"][number][place]))
    return most, differing


def test_the_environment_of_the_page_has_compiled_kernels():
    assert backend_report()["auto"]["cpu"] == "cpu"


def of_name(mixed, name):
    """The answers of one task in the batch of all."""
    return {key: values[NAMES.index(name) :: len(NAMES)] for key, values in mixed.items()}


@pytest.mark.parametrize("name", NAMES)
def test_each_task_alone_and_in_a_mixed_batch_is_its_merged_model(seen, name):
    dtype, found, wanted = seen
    distances = [distance(each, wanted[name]) for each in (*found[name], of_name(found["mixed"], name))]
    print(f"{dtype}, {name}: {distances}")
    assert max(most for most, _ in distances) < BOUNDS[dtype]
    if dtype == "float32":
        assert {differing for _, differing in distances} == {0}


def test_the_tasks_answers_differ(seen):
    _, _, wanted = seen
    assert len({str(wanted[name]["tokens"]) for name in NAMES}) == len(NAMES)


def test_weights_stay_the_bases(seen):
    _, found, wanted = seen
    assert found["checksums"] == wanted["checksums"]


def test_no_task_reads_the_prefix_cache_of_another(seen):
    _, found, _ = seen
    for name in NAMES:
        first, second = found[name]
        assert (first["cached"][0], second["cached"][0] > 0) == (0, True), name
    assert len(found["mixed"]["cached"]) == len(PROMPTS) * len(NAMES)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unknown task", "task must be one of the server's (code, maths, prose), got 'math'; did you mean maths?"),
        ("switch", "task must come with each request, as its model or as lora_request=mft.vllm.request_of(llm, task)"),
        ("more tasks", "tasks must be given at the start with masks per request, got more later"),
    ],
)
def test_what_it_refuses_is_one_sentence_and_it_goes_on(seen, what, words):
    _, found, _ = seen
    assert words in found["refused"][what]
    assert found["code again"]["tokens"] == found["code"][1]["tokens"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"parallel_config": {"world_size": 2}}, "one process without parallelism, got 2"),
        ({"lora_config": {"target_modules": ["q_proj"]}}, "no LoRA, got True"),
        ({"model_config": {"use_mla": True}}, "an attention without absorbed weights (MLA), got True"),
        ({"model_config": {"quantization": "fp8"}}, "quantization='mft', got fp8"),
        ({"model_config": {"enforce_eager": False}}, "an eager model (enforce_eager), got False"),
        ({"model_config": {"is_multimodal_model": True}}, "a model of text alone, got True"),
    ],
)
def test_the_engine_refuses_a_vllm_that_was_started_otherwise(change, words):
    from mft.vllm.weight_transfer import NO_MODULES, PerRequestEngine, _check

    model = {"use_mla": False, "quantization": "mft", "enforce_eager": True, "is_multimodal_model": False}
    given = {
        "parallel_config": {"world_size": 1},
        "lora_config": {"target_modules": NO_MODULES},
        "model_config": model,
    }
    config = SimpleNamespace(**{key: SimpleNamespace(**(value | change.get(key, {}))) for key, value in given.items()})
    if words is None:
        _check(PerRequestEngine.must_have(config))
        return
    with pytest.raises(ValueError, match=re.escape(f"masks in vLLM must have {words}: start vLLM that way")):
        _check(PerRequestEngine.must_have(config))


@pytest.mark.parametrize(
    ("task", "options", "environment", "words"),
    [
        ("base", {"served-model-name": "base"}, {}, "--masks must name no task as the base, got 'base'"),
        ("code", {"enable-lora": True}, {}, "--enable-lora must be left out with --per-request"),
        ("code", {"lora-modules": ["a=b"]}, {}, "--lora-modules must be left out with --per-request"),
        ("code", {}, {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING must be left out"),
    ],
)
def test_a_start_with_another_use_of_the_slots_is_refused(tmp_path, task, options, environment, words):
    """The options stand in a file of vLLM's --config, which mft does not read itself."""
    masks = save_masks(masked_base(0, torch.float32, layers_to_transform=[1]), tmp_path / "masks")
    (tmp_path / "options.yaml").write_text(json.dumps(options))  # JSON is YAML too
    started = command("--masks", f"{task}={masks}", "--per-request", "--config", str(tmp_path / "options.yaml"))
    done = subprocess.run(
        started, env={**os.environ, **SETTINGS, **environment}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 2, done.stderr[-2000:]
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_server_takes_the_task_as_the_model(tmp_path):
    with running(make_three(tmp_path, torch.float32), tmp_path / "server.log", "--per-request"):
        asked = [(prompt, model) for prompt in PROMPTS for model in (*TASKS, BASE)]
        alone = [complete(*each) for each in asked]
        assert len({tuple(alone[number :: len(NAMES)]) for number in range(len(NAMES))}) == len(NAMES)
        with ThreadPoolExecutor(len(asked)) as pool:
            assert list(pool.map(lambda each: complete(*each), asked)) == alone
        with urllib.request.urlopen(f"{ADDRESS}/v1/models", timeout=60) as answer:
            assert [each["id"] for each in json.load(answer)["data"]] == [BASE, *TASKS]
        with pytest.raises(urllib.error.HTTPError) as unknown:
            complete(PROMPTS[0], "math")
        unknown.value.close()
        assert unknown.value.code == 404
        for change in (
            lambda: mft.vllm.use(ADDRESS, "code"),
            mft.vllm.MaskStream(ADDRESS, "new", masked_base(0, torch.float32)).update,
        ):
            with pytest.raises(ValueError, match="task must come with each request, as its model"):
                change()
        assert [complete(*each) for each in asked] == alone
    assert "experimental" in (tmp_path / "server.log").read_text()
