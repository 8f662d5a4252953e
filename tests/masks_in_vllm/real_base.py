"""Helpers that tests with the real vLLM share: SmolLM2 as an ordinary model, random masks on it, merged models.

MFT_VLLM_BASE names the base; make vllm-test sets it. Each vLLM runs in a process of its own: python real_base.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import save_masks
from mft.vllm.versions import reason_against

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine, spinning threads take time from those they wait for
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = {"enforce_eager": True, "max_model_len": 1024}
# The first prompt is longer than a block of the prefix cache; cached answers of another task would be wrong.
PROMPTS = [
    "Count: " + ", ".join(map(str, range(70))) + ",",
    "def add(a, b):",
    "Q: What is 7 + 5?\nA:",
    "Once upon a time",
]
TOKENS = 12
SHARE = 0.03  # of the weights are dropped


def missing():
    """Return why these tests cannot run here; "" if they can."""
    if reason := reason_against():
        return f"{reason}; make vllm-test runs these tests"
    return "" if os.environ.get("MFT_VLLM_BASE") else "MFT_VLLM_BASE names no base: make vllm-test"


def masked_base(seed, dtype, share=SHARE, **mask):
    """Return SmolLM2 with random scores: the mask drops this share of each linear layer."""
    model = AutoModelForCausalLM.from_pretrained(os.environ["MFT_VLLM_BASE"], dtype=dtype)
    masked = mask_model(model, MaskConfig(keep_ratio=1 - share, **mask))
    set_scores(masked, seed)
    return masked


def set_scores(masked, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in masked_modules(masked).values():
        layer.scores.data = torch.rand(layer.scores.shape, generator=generator) + 0.1


def make_tasks(root, dtype, *, merged=True):
    """Return {task: directory of its masks}; next to each is merged-TASK, an ordinary model."""
    directories = {}
    tokenizer = AutoTokenizer.from_pretrained(os.environ["MFT_VLLM_BASE"])
    for seed, task in enumerate(("code", "maths")):
        model = masked_base(seed, dtype)
        directories[task] = str(save_masks(model, root / task))
        if merged:
            merge_model(model).save_pretrained(root / f"merged-{task}")
            tokenizer.save_pretrained(root / f"merged-{task}")
    return directories


def run_session(kind, *arguments):
    """What python real_base.py KIND ARGUMENTS prints as JSON, before vLLM's last words."""
    command = [sys.executable, __file__, kind, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


# ---------------------------------------------------------------------------------------------- in its process


def answers(llm, prompts=PROMPTS, requests=None):
    """Return each prompt's greedy tokens, their log-probabilities, and how many tokens the prefix cache had."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0)
    made = llm.generate(prompts, asked, use_tqdm=False, lora_request=requests)
    outputs = [each.outputs[0] for each in made]
    return {
        "tokens": [list(each.token_ids) for each in outputs],
        "logprobs": [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids)] for o in outputs],
        "cached": [each.num_cached_tokens for each in made],
    }


def look(llm):
    """Greedy tokens, and the checksum of every tensor. One prompt at a time: a batch's size changes how bf16 rounds."""
    return {"tokens": [answers(llm, [prompt])["tokens"][0] for prompt in PROMPTS], "checksums": checksums(llm)}


def checksums(llm):
    return llm.collective_rpc("compute_weight_checksums")[0]


def plain_session(directory):
    """Run a model without masks."""
    from vllm import LLM

    return look(LLM(model=directory, quantization="mft", **OPTIONS))


def masks_session(root):
    """Run a base, its tasks, what it refuses, a stream of flips, and the end of its engine."""
    import psutil

    import mft.vllm

    root = Path(root)
    llm = mft.vllm.load(os.environ["MFT_VLLM_BASE"], {"code": root / "code"}, **OPTIONS)
    seen = {"base": look(llm)}
    mft.vllm.use(llm, "code")
    mft.vllm.add_tasks(llm, {"maths": root / "maths"})
    seen["refused"] = {
        "unknown task": refusal(lambda: mft.vllm.use(llm, "math")),
        "wrong base": refusal(lambda: mft.vllm.add_tasks(llm, {"other": root / "other-base"})),
        "other shapes": refusal(lambda: mft.vllm.add_tasks(llm, {"other": root / "other-shapes"})),
    }
    seen["code"] = look(llm)
    for task in ("maths", None):
        mft.vllm.use(llm, task)
        seen[task or "base again"] = look(llm)
    seen["milliseconds"] = timed(llm)
    model = masked_base(0, torch.bfloat16)
    stream = mft.vllm.MaskStream(llm, "policy", model)
    seen["stream bytes"] = [stream.update()]
    seen["stream"] = [look(llm)]
    set_scores(model, 1)
    seen["stream bytes"].append(stream.update())
    seen["stream"].append(look(llm))
    for process in psutil.Process().children(recursive=True):
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
            process.kill()
            process.wait(30)
    seen["refused"]["killed engine"] = refusal(lambda: mft.vllm.use(llm, "code"))
    return seen


def switching_session(root, dtype):
    """The answers of each task in turn: test_real_llm.py shows that they are the merged model's."""
    import mft.vllm

    llm = mft.vllm.load(os.environ["MFT_VLLM_BASE"], tasks_of(root), dtype=dtype, **OPTIONS)
    seen = {"base": answers(llm)}
    for task in tasks_of(root):
        mft.vllm.use(llm, task)
        seen[task] = answers(llm)
    mft.vllm.use(llm, None)
    return seen | {"checksums": checksums(llm)}


def per_request_session(root, dtype):
    """The same with a task for each request: one task a batch, twice, then all in one batch."""
    import mft.vllm

    tasks = tasks_of(root)
    llm = mft.vllm.load(os.environ["MFT_VLLM_BASE"], tasks, per_request=True, dtype=dtype, **OPTIONS)
    requests = {task or "base": mft.vllm.request_of(llm, task) for task in (*tasks, None)}
    seen = {name: [answers(llm, requests=request) for _ in range(2)] for name, request in requests.items()}
    pairs = [(prompt, name) for prompt in PROMPTS for name in requests]
    seen["mixed"] = answers(llm, [prompt for prompt, _ in pairs], [requests[name] for _, name in pairs])
    seen["refused"] = {
        "unknown task": refusal(lambda: mft.vllm.request_of(llm, "math")),
        "switch": refusal(lambda: mft.vllm.use(llm, "code")),
        "more tasks": refusal(lambda: mft.vllm.add_tasks(llm, {"more": tasks["code"]})),
    }
    seen["code again"] = answers(llm, requests=requests["code"])
    return seen | {"checksums": checksums(llm)}


def tasks_of(root):
    return {path.parent.name: path.parent for path in sorted(Path(root).glob("*/adapter_config.json"))}


def timed(llm):
    """Return milliseconds for each kind of switch."""
    import time

    import mft.vllm

    found = {"base to code": [], "code to maths": [], "maths to base": []}
    for _ in range(10):
        for kind in found:
            task = kind.rpartition(" ")[2]
            begin = time.perf_counter()
            mft.vllm.use(llm, None if task == "base" else task)
            found[kind].append(1e3 * (time.perf_counter() - begin))
    return found


def refusal(call):
    try:
        call()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


if __name__ == "__main__":
    sessions = {"plain": plain_session, "masks": masks_session}
    sessions |= {"switching": switching_session, "per request": per_request_session}
    print("\n" + json.dumps(sessions[sys.argv[1]](*sys.argv[2:])), flush=True)
