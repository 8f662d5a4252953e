"""Arguments of `mft serve`, and requests to it: a refused request gets OpenAI's error object."""

import asyncio
import json
import socket

import torch
from tiny import make_llama, make_words, masked_llama
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from mft.cli import serve
from mft.masks.bank import MaskBank
from mft.masks.export import save_masks
from mft.serving import launch
from mft.serving.api.adapter_routes import directory_below
from mft.serving.api.api_keys import ApiKeys
from mft.serving.api.body import ChatBody, CompletionBody, read_body
from mft.serving.batch.json_grammar import JsonGrammars
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.sampling import Sampling, SamplingOptions
from mft.serving.batch.scheduler import Scheduler
from mft.serving.key import Key
from mft.serving.launch import row_length
from mft.serving.log import new_log
from mft.serving.options import Options
from mft.serving.port import bind
from mft.serving.refusal import Refused
from mft.serving.task_list import parse_masks, read_masks_file
from mft.serving.tasks import Tasks


def tasks(tmp, **changes):
    """Return tasks of a bank with the task code, whose masks are in tmp; ``changes``: of the base, made since."""
    save_masks(masked_llama(), tmp / "masks")
    bank = MaskBank(make_llama(**changes))
    bank.put("code", {})
    return Tasks(bank, Scheduler(RunningBatch(bank, 1 << 20), rows=1, waiting=0), "base")


def ask(**keys):
    return read_body(CompletionBody, json.dumps({"model": "code", "prompt": "def"} | keys).encode())


TABLE = r"""
# the command
serving without masks
    parse_masks([])
    -> ValueError: --masks | must be given for each task, as name=DIRECTORY | got none
masks to serve without a name
    parse_masks(["runs/code"])
    -> ValueError: --masks | must be name=DIRECTORY | 'runs/code'
two masks of one name
    parse_masks([f"code={tmp}", f"code={tmp}"])
    -> ValueError: --masks | must name each task once | 'code' twice
masks to serve in a misspelt directory
    (tmp / "code").mkdir()
    parse_masks([f"code={tmp / 'cod'}"])
    -> ValueError: --masks | must name a directory | 'code' is | did you mean
serving without its packages
    patch.setattr(serve, "find_spec", lambda name: None)
    serve.run_serve([f"code={tmp}"], None, None, masks_file=None, load_from=None)
    -> RuntimeError: mft serve | needs prometheus_client | pydantic, starlette, uvicorn, not installed here
        | pip install --no-build-isolation -e '.[serve]' in the clone
a task with a space in its name
    parse_masks([f"my task={tmp}"])
    -> ValueError: --masks | must name a task by 1 to 128 letters, digits and . _ : / - | got 'my task'
a list of masks that is empty
    (tmp / "masks").write_text("# code=runs/code")
    read_masks_file(tmp / "masks")
    -> ValueError: --masks-file | must hold name=DIRECTORY in a line for each task | none in
a list of masks and an option with the same task
    (tmp / "code").mkdir()
    (tmp / "masks").write_text(f"code={tmp / 'code'}")
    launch.serve({"code": tmp / "code"}, options=Options(masks_file=tmp / "masks"))
    -> ValueError: --masks-file | must name no task of --masks | got 'code'
a server without masks and without a base
    launch.serve({}, options=Options(load_from=tmp))
    -> ValueError: --model | must name the base if no masks are given | got none
masks to load from a directory that is not there
    launch.serve({}, options=Options(load_from=tmp / "masks"))
    -> ValueError: --load-from | must name a directory | got .../masks
a file of keys that is not there
    (tmp / "api-keys").touch()
    ApiKeys(tmp / "api-keyz", warn=print)
    -> FileNotFoundError: --api-keys-file | must be a file with a key in each line | got /tmp/dir/api-keyz, which
        | did you mean /tmp/dir/api-keys?
a file of masks that is not there
    read_masks_file(tmp / "masks")
    -> FileNotFoundError: --masks-file | must be a file with name=DIRECTORY in each line
        | got /tmp/dir/masks, which cannot be read | name another one, or write it
a file of keys that is a directory
    ApiKeys(tmp, warn=print)
    -> IsADirectoryError: --api-keys-file | must be a file with a key in each line | (Is a directory)
        | name another one, or write it
a file of keys that is empty
    (tmp / "keys").write_text("# sk-123")
    ApiKeys(tmp / "keys", warn=print)
    -> ValueError: --api-keys-file | must hold at least one key, in a line of its own | got none in
a file of keys with two in a line
    (tmp / "keys").write_text("sk-123 sk-456")
    ApiKeys(tmp / "keys", warn=print)
    -> ValueError: --api-keys-file | must name a key by 1 to 32 letters, digits and . _ -, | got another name in
        | write the name, the key and its tasks in this order
a file of keys with a space between tasks
    (tmp / "keys").write_text("alice sk-12345 code, math")
    ApiKeys(tmp / "keys", warn=print)
    -> ValueError: --api-keys-file | must hold a name, a key and tasks such as a,b per line | got 4 words in line 1 of
        | put no space between tasks
a key of admins with tasks
    (tmp / "keys").write_text("root sk-12345 code")
    ApiKeys(None, warn=print, admins=tmp / "keys")
    -> ValueError: --admin-keys-file | must hold only names and keys | got 3 words in line 1 of | remove the tasks
a request with a key of other tasks
    Key("alice", frozenset(["code"])).check_model("math")
    -> Refused: model | must be one of the tasks of the key 'alice' | got 'math'
        | ask for one of these, or let the operator add it to the key's line in --api-keys-file
a file of keys that is too long
    (tmp / "keys").write_text("sk-12345\n" * 120_000)
    ApiKeys(tmp / "keys", warn=print)
    -> ValueError: --api-keys-file | must be at most 1048576 bytes | got more in /tmp/dir/keys | remove lines
a time zone of the log that there is not
    new_log("text", "info", "Europe/Berlim")
    -> ValueError: --log-zone | must be local, UTC or a name of the time zone database | got 'Europe/Berlim'
        | pip install tzdata
a level of the log that there is not
    new_log("text", "warn", "UTC")
    -> ValueError: --log-level | must be one of debug, info, warning, error | got 'warn' | warning?
a form of the log that there is not
    new_log("xml", "info", "UTC")
    -> ValueError: --log-format | must be one of text, json | got 'xml'
a port that is taken
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind("127.0.0.1", taken.getsockname()[1])
    -> OSError: --host and --port | must be free here | got 127.0.0.1 and ...: Address already in use
a host without a name
    bind("", 0)
    -> ValueError: --host | must name an address of this machine | got '' | 127.0.0.1
rows longer than the base has positions
    row_length(4096, make_llama().config, "base", 9999)
    -> ValueError: --length | must be at most 2048, as many positions as 'base' has | got 4096
rows longer than the cache
    row_length(128, make_llama().config, "base", 100)
    -> ValueError: --length | must be at most 100, as many tokens as --cache holds | got 128
a cache for no token
    RunningBatch(MaskBank(make_llama()), 9)
    -> ValueError: --cache | must hold a token of ... bytes | got 9 | give more
serving a model without position_ids
    RunningBatch(MaskBank(BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2))), 9)
    -> ValueError: base | must take position_ids and compute attention by transformers' sdpa or eager
        | mft merge makes each task an ordinary model
serving a model with a state
    RunningBatch(MaskBank(MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1))), 9)
    -> ValueError: base | must cache only keys and values | got a MambaForCausalLM with LinearAttentionLayer
        | mft merge makes each task an ordinary model, for any other server

# requests
a request with a misspelt key
    ask(temprature=0)
    -> Refused: temprature | must be left out | it is not a known key here | temperature?
a request with too high a temperature
    ask(temperature=3)
    -> Refused: temperature | must be less than or equal to 2 | got 3 (int)
a request for many answers
    ask(n=17)
    -> Refused: n must | must be less than or equal to 16 | got 17 (int)
a request with a prompt of texts and tokens
    ask(prompt=["def", 3])
    -> Refused: prompt | must be a text, a list of token ids, or a list of one of these | got ['def', 3] (list)
a request without tokens to generate
    ask(max_tokens=0)
    -> Refused: max_tokens | must be at least 1 without echo | got 0
a request with seventeen stop strings
    ask(stop=["a"] * 17)
    -> Refused: stop | must have at most 16 items | got ['a', 'a',
a schema with a tokenizer that spells no bytes
    JsonGrammars(make_words(), [0]).read({"type": "object"})
    -> Refused: response_format | must be text with this base | got a schema, but llguidance says
a message of a tool
    read_body(ChatBody, b'{"model": "code", "messages": [{"role": "tool", "content": "3"}]}')
    -> Refused: messages[0].role | must be 'system', 'developer', 'user' or 'assistant' | got 'tool' (str)
loading a mask whose name is taken
    asyncio.run(tasks(tmp).load("code", tmp / "masks"))
    -> ValueError: lora_name | must be new | got 'code', which has already been loaded | unload it first
loading a mask under the base's name
    asyncio.run(tasks(tmp).load("base", tmp / "masks"))
    -> ValueError: lora_name | must be another name than the base's | got 'base'
loading a mask of another base
    asyncio.run(tasks(tmp, initializer_range=0.3).load("math", tmp / "masks"))
    -> ValueError: the masks were learned on | expected base | the model's is | --force
loading a mask from elsewhere
    directory_below(tmp, "../masks")
    -> Refused: lora_path | must be a directory below ... (--load-from) | got '../masks'
loading a mask whose files lie elsewhere
    (tmp / "runs" / "code").mkdir(parents=True)
    (tmp / "runs" / "code" / "adapter_config.json").symlink_to(tmp / "adapter_config.json")
    directory_below(tmp / "runs", "code")
    -> Refused: lora_path | must be a directory below ... (--load-from), as must its files | got 'code'
loading more masks than a server holds
    asyncio.run(tasks(tmp).load("math", tmp / "masks", most=1))
    -> ValueError: lora_name | must be one of at most 1 tasks | got one more | unload another first
unloading a mask that there is not
    asyncio.run(tasks(tmp).unload("cod"))
    -> Refused: lora_name | must be one of base, code | got 'cod' | code?
a request that is no json
    read_body(CompletionBody, b"model=code")
    -> Refused: the body | must be JSON | Invalid JSON

# accepted
a key of a request that is null
    assert ask(max_tokens=None, n=None, stop=None) == ask()
    -> accepted: as if it were left out
keys of a request that ask for nothing
    assert ask(user="me", metadata={"a": "b"}, n=1, logit_bias={}, presence_penalty=0) == ask()
    -> accepted: they change no answer, and nothing is kept of them
a temperature that is next to nothing
    assert Sampling([], SamplingOptions(temperature=1e-30)).choose(torch.tensor([0.0, 1.0, 0.9]), []) == 1
    -> accepted: the likeliest token, as with 0
"""
