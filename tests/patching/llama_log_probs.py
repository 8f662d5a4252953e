"""llama.cpp's log-probabilities of the token after each prompt: PYTHON llama_log_probs.py MODEL OUT.npy [ADAPTER]

Prompts are lists of token ids in JSON on standard input. It needs only xllamacpp and numpy, in its own environment.
"""

import json
import sys

import numpy as np
import xllamacpp


def main() -> None:
    """Write float32 (prompts, vocabulary)."""
    model, target, *adapter = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 256, 1, False, 2
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter[0], 1.0)]
    server = xllamacpp.Server(params)
    rows = [_log_probs(server, prompt) for prompt in json.load(sys.stdin)]
    np.save(target, np.array(rows, np.float32))


def _log_probs(server: xllamacpp.Server, prompt: list[int]) -> list[float]:
    asked = {"prompt": prompt, "max_tokens": 1, "logprobs": 1 << 20, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])]


if __name__ == "__main__":
    main()
