"""MaskAdamW on parameters whose rows processes share: the result is the same for any number of processes."""

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes, refusal
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mft_kernels import MaskAdamW, fixed_from_float, float_from_fixed

STEPS = 3
SHAPES = {"matrix": (64, 40), "experts": (4, 12, 20), "odd rows": (27, 10)}
FORMATS = {
    "fp32": (torch.float32, "fp32"),
    "fp32, 8 bits": (torch.float32, "8bit"),
    "bf16": (torch.bfloat16, "fp32"),
    "bf16, 8 bits": (torch.bfloat16, "8bit"),
    "int16, 8 bits": (torch.int16, "8bit"),
}
#: Each format on one shape, fp32 and the narrowest on every shape: formats and shapes do not meet in the code.
CASES = [("matrix", kind) for kind in FORMATS]
CASES += [("experts", "fp32"), ("experts", "int16, 8 bits"), ("odd rows", "fp32")]


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores_of(shape, dtype):
    values = 0.02 * drawn(*shape, seed=0)
    return fixed_from_float(values) if dtype == torch.int16 else values.to(dtype)


def stepped(rank, shape, kind, mesh):
    """Return whole scores and moments after some steps, for a sharded parameter, or (mesh None) for a plain one."""
    dtype, moments = FORMATS[kind]

    def spread(tensor):
        if mesh is None:
            return tensor
        rows = tensor.chunk(mesh.size())[rank].contiguous()  # gloo cannot send int16
        return DTensor.from_local(rows, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())

    p = torch.nn.Parameter(spread(scores_of(shape, dtype)), requires_grad=dtype != torch.int16)
    optimizer = MaskAdamW([p], lr=1e-2, moments=moments, seed=5)
    for step in range(STEPS):
        grad, weight = spread(drawn(*shape, seed=10 + step)), spread(0.1 * drawn(*shape, seed=1))
        if dtype == torch.int16:
            optimizer.step_one(p, here(grad), here(weight))
        else:
            p.grad = (grad * weight).to(dtype)
            optimizer.step()
        if step == 1:  # continues from the saved state
            saved = optimizer.state_dict()
            optimizer = MaskAdamW([p], lr=1e-2, moments=moments, seed=5)
            optimizer.load_state_dict(saved)
    kept = {name: value for name, value in optimizer.state[p].items() if name != "step"}
    return {name: whole(value) for name, value in {"scores": p, **kept}.items()}


def here(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.detach().to_local())
    return torch.cat(parts)


def work(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {case: stepped(rank, SHAPES[case[0]], case[1], mesh) for case in CASES}
    columns = torch.nn.Parameter(distribute_tensor(torch.ones(64, 40), mesh, [Shard(1)]))
    copies = torch.nn.Parameter(distribute_tensor(torch.ones(64, 40), mesh, [Replicate()]))
    odd = torch.nn.Parameter(distribute_tensor(torch.ones(27, 40), mesh, [Shard(0)]))
    spread = torch.nn.Parameter(distribute_tensor(torch.ones(64, 40), mesh, [Shard(0)]))
    rows = torch.ones_like(spread.to_local())
    found["refusals"] = [
        refusal(lambda: MaskAdamW([columns])),
        refusal(lambda: MaskAdamW([copies])),
        refusal(lambda: MaskAdamW([odd])) if mesh.size() > 1 else "",
        refusal(lambda: MaskAdamW([spread]).step_one(spread, rows, keep_ratio=0.9)),
    ]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return {number of processes: what each found}."""
    return {count: in_processes(work, count, tmp_path_factory.mktemp(f"of {count}")) for count in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_the_result_does_not_depend_on_the_number_of_processes(found, case):
    expected = found[1][0][case]
    for count in (2, 4):
        for each in found[count]:
            assert each[case].keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(each[case][name], tensor), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_what_is_rounded_nowhere_is_as_of_a_plain_parameter(found, case):
    plain, spread = stepped(0, SHAPES[case[0]], case[1], None)["scores"], found[2][0][case]["scores"]
    if case[1] == "fp32":
        assert torch.equal(spread, plain)
        return
    one, other = (float_from_fixed(s) if s.dtype == torch.int16 else s.float() for s in (spread, plain))
    # Random words differ, and so roundings; for a score at this rate, 8-bit moments have as large an error.
    assert (one - other).norm() < 0.15 * other.norm()


def test_what_cannot_be_stepped_in_parts_is_refused(found):
    columns, copies, odd, ratio = found[2][0]["refusals"]
    for message in (columns, copies):
        assert "params must be spread by rows, got a DTensor of shape (64, 40)" in message
        assert "call fully_shard without a shard_placement_fn" in message
    assert "rows that the processes share in whole bands, got shape (27, 40), which has 1, on 2 processes" in odd
    assert "or fp32 scores with moments='fp32'" in odd
    assert "keep_ratio must be None for scores that are spread over processes, got 0.9" in ratio
