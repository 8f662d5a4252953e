"""What `mft serve` is given, and what it is asked: what refuses a request comes as OpenAI's error object."""

import json
import socket

import torch
from tiny import make_llama
from transformers import MambaConfig, MambaForCausalLM

from mft.cli import serve
from mft.masks.bank import MaskBank
from mft.serving.body import ChatBody, CompletionBody, read_body
from mft.serving.length import row_length
from mft.serving.port import bind
from mft.serving.refusal import Refused
from mft.serving.running_batch import RunningBatch
from mft.serving.sampling import Sampling

from .registry import accepted, refused


def ask(**keys):
    return read_body(CompletionBody, json.dumps({"model": "code", "prompt": "def"} | keys).encode())


# ---------------------------------------------------------------------------------------------- the command


@refused(ValueError, where="--masks", got="got none", rule="must be given for each task, as name=DIRECTORY")
def serving_without_masks():
    serve.parse_masks([])


@refused(ValueError, where="--masks", got="'runs/code'", rule="must be name=DIRECTORY")
def masks_to_serve_without_a_name():
    serve.parse_masks(["runs/code"])


@refused(ValueError, where="--masks", got="'code' twice", rule="must name each task once")
def two_masks_of_one_name(tmp):
    serve.parse_masks([f"code={tmp}", f"code={tmp}"])


@refused(ValueError, where="--masks", got="'code' is", rule="must name a directory", remedy="did you mean")
def masks_to_serve_in_a_misspelt_directory(tmp):
    (tmp / "code").mkdir()
    serve.parse_masks([f"code={tmp / 'cod'}"])


@refused(
    RuntimeError,
    where="mft serve",
    got="openai, starlette, uvicorn, not installed here",
    rule="needs openai",
    remedy="pip install 'mft_kernels[serve]'",
)
def serving_without_its_packages(tmp, patch):
    patch.setattr(serve, "find_spec", lambda name: None)
    serve.run_serve([f"code={tmp}"], None, None)


@refused(
    OSError,
    where="--host and --port",
    got="got 127.0.0.1 and",
    rule="must be free here",
    other=r"(?<=and )\d+(?=: Address)",
)
def a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind("127.0.0.1", taken.getsockname()[1])


@refused(ValueError, where="--host", got="got ''", rule="must name an address of this machine", remedy="127.0.0.1")
def a_host_without_a_name():
    bind("", 0)


@refused(ValueError, where="--length", got="got 4096", rule="must be at most 2048, as many positions as 'base' has")
def rows_longer_than_the_base_has_positions():
    row_length(4096, make_llama().config, "base")


@refused(
    ValueError,
    where="base",
    got="got a MambaForCausalLM with LinearAttentionLayer",
    rule="must remember keys and values alone",
    remedy="mft merge makes each task an ordinary model, for any other server",
)
def serving_a_model_with_a_state():
    RunningBatch(MaskBank(MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1))))


# ---------------------------------------------------------------------------------------------- requests


@refused(Refused, where="temprature", got="no key that is known here", rule="must be left out", remedy="temperature?")
def a_request_with_a_misspelt_key():
    ask(temprature=0)


@refused(Refused, where="temperature", got="got 3 (int)", rule="must be less than or equal to 2")
def a_request_with_too_high_a_temperature():
    ask(temperature=3)


@refused(Refused, where="n must", got="got 2 (int)", rule="must be less than or equal to 1")
def a_request_for_two_answers():
    ask(n=2)


@refused(
    Refused,
    where="prompt",
    got="got ['def', 'class'] (list)",
    rule="must be one text or one list of token ids",
    remedy="send a request for each prompt",
)
def a_request_with_two_prompts():
    ask(prompt=["def", "class"])


@refused(Refused, where="stop", got="got ['a', 'b', 'c', 'd', 'e'] (list)", rule="must have at most 4 items")
def a_request_with_five_stop_strings():
    ask(stop=["a", "b", "c", "d", "e"])


@refused(Refused, where="messages[0].role", got="got 'tool' (str)", rule="must be 'system', 'user' or 'assistant'")
def a_message_of_a_tool():
    read_body(ChatBody, b'{"model": "code", "messages": [{"role": "tool", "content": "3"}]}')


@refused(Refused, where="the body", got="Invalid JSON", rule="must be JSON")
def a_request_that_is_no_json():
    read_body(CompletionBody, b"model=code")


# ---------------------------------------------------------------------------------------------- accepted


@accepted("as if it were left out")
def a_key_of_a_request_that_is_null():
    assert ask(max_tokens=None, n=None, stop=None) == ask()


@accepted("they change no answer, and nothing is kept of them")
def keys_of_a_request_that_ask_for_nothing():
    assert ask(user="me", metadata={"a": "b"}, n=1, logit_bias={}, presence_penalty=0) == ask()


@accepted("the likeliest token, as with 0")
def a_temperature_that_is_next_to_nothing():
    assert Sampling(1e-30, 1.0, seed=0).choose(torch.tensor([0.0, 1.0, 0.9])) == 1
