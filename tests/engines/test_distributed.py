"""Two gloo processes give the single-process result: DDP, FSDP2, and mft train under torchrun."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes, refusal
from safetensors.torch import load_file
from tiny import equal, make_llama, make_rows, masked_llama
from tiny_run import LEARN, assert_same_masks, steps, wait_for_checkpoint
from tiny_ways import rows_with_few_labels as rows

import mft
from mft.config import MaskConfig, TrainConfig
from mft.engines.distributed import Processes
from mft.masks.convert import mask_model, masked_modules
from mft.training.loop import train_masks
from mft_kernels import MaskAdamW, MaskedLinear, kept_threshold

COUNT, STEPS = 2, 4
HEAVY = "model.layers.1.mlp.down_proj"

# ---------------------------------------------------------------------------------------------- what is computed


def whole(tensor):
    """Return the whole tensor in this process, without a graph."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def scores_of(model):
    return {name: whole(module.scores) for name, module in masked_modules(model).items()}


def masked(**mask):
    return masked_llama(layers=range(4), **mask)


def halves():
    ids = torch.tensor(make_rows(4)["input_ids"])
    return [ids[:2], ids[2:]]


def learn(model, optimizer, parts):
    """Return the losses of some steps, each the mean over parts of the rows."""
    losses = []
    for _ in range(STEPS):
        losses.append(0.0)
        for ids in parts:
            loss = model(input_ids=ids, labels=ids).loss / len(parts)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


OPTIMIZERS = {
    "AdamW": ({}, lambda scores: torch.optim.AdamW(scores, lr=1e-2)),
    "MaskAdamW": ({}, lambda scores: MaskAdamW(scores, lr=1e-2, moments="fp32")),
    "MaskAdamW, 16 and 8 bits": ({"scores_dtype": "bfloat16"}, lambda scores: MaskAdamW(scores, lr=1e-2)),
}


def trained_scores(model):
    return [p for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------------------- in both processes


def work(rank, folder):
    """Return what one process finds, for the tests to judge."""
    processes = Processes(rank, COUNT)
    found = {f"DDP, {name}": in_ddp(rank, name, folder) for name in OPTIMIZERS}
    found["FSDP2"] = in_fsdp2(rank, folder)
    found["FSDP2, MaskAdamW"] = by_mask_adamw_in_fsdp2(rank)
    found["uneven shards"] = in_uneven_shards()
    found["collectives"] = after_collectives(rank)
    found["other settings"] = refusal(lambda: processes.agree({"train.lr": 0.1 + rank, "train.seed": 3}))
    other = mask_model(make_llama(), MaskConfig.paper(seed=rank))
    train = TrainConfig(steps=1, accumulation=COUNT)
    found["other scores"] = refusal(lambda: train_masks(other, rows(), train, processes=processes))
    return found


def after_collectives(rank):
    """Return, for each kind of collective, whether the layer then computes with the received scores.

    The scores arrive through .detach(), through .data, and in the parameter itself.
    """
    torch.manual_seed(rank)
    layer, x, current = MaskedLinear(64, 64, keep_ratio=0.5, init="normal"), torch.randn(2, 64), []
    collectives = (
        lambda scores: dist.broadcast(scores.detach(), 1),
        lambda scores: dist.all_reduce(scores.data),
        lambda scores: dist.all_reduce(scores.mul_(1 + rank), dist.ReduceOp.MAX),
    )
    with torch.no_grad():
        for collective in collectives:
            layer(x)
            collective(layer.scores)
            current.append(torch.allclose(layer(x), layer.merge()(x), atol=1e-5))
            layer.reset_scores("normal")
    return current


def in_ddp(rank, name, folder):
    mask, make_optimizer = OPTIMIZERS[name]
    model = masked(**mask)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    losses = learn(wrapped, make_optimizer(trained_scores(model)), halves()[rank : rank + 1])
    scores = scores_of(model)
    if rank == 0:
        mft.save_masks(wrapped, folder / name)
    return {"losses": losses, "scores": scores, "merged": whole(mft.merge_model(wrapped).get_submodule(HEAVY).weight)}


def sharded():
    from torch.distributed.fsdp import fully_shard

    model = masked()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def in_fsdp2(rank, folder):
    model = sharded()
    scores, part = trained_scores(model), halves()[rank]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = learn(model, torch.optim.AdamW(scores, lr=1e-2), [part])
    module = model.get_submodule(HEAVY)
    found = {"losses": losses, "scores": scores_of(model), "local rows": module.scores.to_local().shape[0]}
    found["refusals"] = [
        refusal(module.mask),
        refusal(lambda: kept_threshold(module.scores, 0.9)),
        refusal(lambda: mft.save_masks(model, folder / "nothing")),
        refusal(lambda: mft.merge_model(model)),
        refusal(lambda: mft.load_masks(model, folder / "nothing")),
    ]
    with mft.gathered(model):
        found["mask"] = module.mask()
        if rank == 0:
            mft.save_masks(model, folder / "FSDP2")
    with torch.no_grad():
        found["after"] = model(input_ids=part, labels=part).loss.item()
        model.load_state_dict(before)
        found["loaded"] = model(input_ids=part, labels=part).loss.item()
    return found


def by_mask_adamw_in_fsdp2(rank):
    model = sharded()
    losses = learn(model, OPTIMIZERS["MaskAdamW"][1](trained_scores(model)), [halves()[rank]])
    return {"losses": losses, "scores": scores_of(model)}


def five_by_eight():
    torch.manual_seed(0)
    return MaskedLinear(8, 5, keep_ratio=0.5)


def squares(layer):
    """Make one step down the squares of the outputs, on small integers; return the outputs and the new scores."""
    optimizer = torch.optim.AdamW([layer.scores], lr=1e-2)
    y = layer(torch.arange(24.0).reshape(3, 8))
    y.square().sum().backward()
    optimizer.step()
    return {"y": y.detach(), "scores": whole(layer.scores)}


def in_uneven_shards():
    from torch.distributed.fsdp import fully_shard

    return squares(fully_shard(five_by_eight()))


# ---------------------------------------------------------------------------------------------- DDP and FSDP2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(folder):
    """Return what each process found. They are forks of this one; those under torchrun, below, are fresh."""
    return in_processes(work, COUNT, folder, folder)


def alone(name):
    """Return (losses, masked model) of one process that takes the halves one after the other."""
    mask, make_optimizer = OPTIMIZERS[name]
    model = masked(**mask)
    return learn(model, make_optimizer(trained_scores(model)), halves()), model


def exported(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ddp_is_bit_equal_to_one_process(found, folder, tmp_path, name):
    losses, model = alone(name)
    assert [sum(pair) / 2 for pair in zip(*(each[f"DDP, {name}"]["losses"] for each in found))] == losses
    for each in found:
        assert equal(each[f"DDP, {name}"]["scores"], scores_of(model))
    mft.save_masks(model, tmp_path / "masks")
    assert equal(exported(folder / name), exported(tmp_path / "masks"))
    merged = mft.merge_model(model).get_submodule(HEAVY).weight
    assert torch.equal(found[0][f"DDP, {name}"]["merged"], merged)
    assert (merged == 0).any()


@pytest.mark.parametrize(("name", "key"), [("AdamW", "FSDP2"), ("MaskAdamW", "FSDP2, MaskAdamW")])
def test_fsdp2_is_bit_equal_to_one_process(found, folder, tmp_path, name, key):
    losses, model = alone(name)
    assert [sum(pair) / 2 for pair in zip(*(each[key]["losses"] for each in found))] == losses
    for each in found:
        assert equal(each[key]["scores"], scores_of(model))
    if name == "AdamW":
        for each in found:
            assert torch.equal(each[key]["mask"], model.get_submodule(HEAVY).mask())
            assert each[key]["local rows"] == model.get_submodule(HEAVY).out_features / COUNT
        mft.save_masks(model, tmp_path / "masks")
        assert equal(exported(folder / key), exported(tmp_path / "masks"))


def test_what_would_read_a_part_of_a_matrix_is_refused(found, folder):
    mask, threshold, save, merge, load = found[1]["FSDP2"]["refusals"]
    for message in (mask, threshold, save):
        assert "scores must be a plain tensor, got a DTensor of shape (32, " in message
        assert "spread over processes: unshard() its module on every process first" in message
    for message in (merge, load):
        assert "must not be sharded yet, got a FSDPLlamaForCausalLM that fully_shard has spread" in message
    assert not (folder / "nothing").exists()


def test_scores_loaded_into_shards_are_what_the_next_forward_selects(found):
    """FSDP2 gathers them into the same memory, and keeps its version."""
    for each in found:
        assert each["FSDP2"]["loaded"] == each["FSDP2"]["losses"][0] != each["FSDP2"]["after"]


def test_collectives_on_scores_are_seen(found):
    assert [processes["collectives"] for processes in found] == [[True] * 3] * COUNT


def test_the_threshold_is_the_matrix_s_although_shards_are_uneven(found):
    expected = squares(five_by_eight())
    for each in found:
        assert equal(each["uneven shards"], expected)


def test_processes_that_disagree_are_told_in_what(found):
    for each in found:
        assert (
            "but train.lr is 1.1 in process 1, 0.1 in process 0: start all with one command" in each["other settings"]
        )
        assert "train.seed" not in each["other settings"]
        assert "the hash of model.layers.0.self_attn.q_proj.scores is" in each["other scores"]
        assert each["other scores"].count(" in process 1, ") == 3  # 3 of 28


# ---------------------------------------------------------------------------------------------- torchrun


def torchrun(*arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={COUNT}"]
    command += [f"--max-restarts={restarts}", "-m", "mft", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def kill_the_writer(run, process):
    wait_for_checkpoint(run, process)
    os.kill(json.loads((run / ".lock").read_text())["process"], signal.SIGKILL)


@pytest.mark.slow
def test_a_command_that_torchrun_starts_again_goes_on_to_the_single_process_result(cli, tmp_path):
    learn = [*LEARN, "train.steps=16", f"train.accumulation={COUNT}", "mask.keep_ratio=0.8", "checkpoint_minutes=0"]
    cli.done("train", *learn, "output_dir=straight")
    process = torchrun("--config", "config.yaml", *learn, restarts=1)
    kill_the_writer(tmp_path / "run", process)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    for line in ("process 0 of 2 ended without an error message", "goes on after step", "result: run/masks"):
        assert output.count(line) == 1, output
    assert [step for step, _ in steps(tmp_path / "run")] == list(range(1, 17))
    assert_same_masks(tmp_path / "run", tmp_path / "straight")
