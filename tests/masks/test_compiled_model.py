"""A whole masked Llama under torch.compile, autocast and torch.export."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tiny import WORDS, make_llama
from tiny_mixtures import mixture
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mft.config import MaskConfig
from mft.masks.budget import grow_budget
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.peft import MaskPeftConfig
from mft.masks.quantize import quantize_model

# PEFT calls it.
STILL_CALLED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
#: Relative to the norm of a gradient: what decompositions and fused loops may round differently.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def tiny(layers=2, dtype=torch.float32):
    return mask_model(make_llama(dtype, num_hidden_layers=layers), MaskConfig.paper(keep_ratio=0.7))


def tokens(rows=2, length=9):
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(forward, model, autocast=False, ids=None):
    model.zero_grad()
    ids = tokens() if ids is None else ids
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *[module.scores.grad.clone() for module in masked_modules(model).values()]]


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()
        assert b.any()


def take_a_large_step(model, changes_every_mask=True):
    """Change every mask by an optimiser's step; the first steps under a budget drop little."""
    before = [module.mask() for module in masked_modules(model).values()]
    torch.optim.AdamW([module.scores for module in masked_modules(model).values()], lr=0.01).step()
    for module, mask in zip(masked_modules(model).values(), before):
        assert not (changes_every_mask and torch.equal(module.mask(), mask))


# ---------------------------------------------------------------------------------------------- compile


def under_a_budget(quantised=False):
    """Thresholds change at every step."""
    model = mask_model(make_llama(num_hidden_layers=1), MaskConfig(target_modules=["up_proj"], budget=0.05))
    return quantize_model(model, "int8", masked=True) if quantised else model


def experts_under_a_budget():
    return mask_model(mixture("Qwen3Moe"), MaskConfig(target_modules=["down_proj"], budget=0.05))


@pytest.mark.parametrize(
    ("make", "autocast", "rounding", "calls"),
    [
        (tiny, False, 1e-5, 2 * 7),
        (lambda: tiny(layers=1, dtype=torch.bfloat16), False, 3e-2, 7),
        (lambda: tiny(layers=1), True, 3e-2, 7),
        (under_a_budget, False, 1e-4, None),
        pytest.param(lambda: under_a_budget(quantised=True), False, 1e-4, None, marks=pytest.mark.slow),
        pytest.param(experts_under_a_budget, False, 1e-4, None, marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16", "autocast", "budget", "budget, quantised", "budget, experts"],
)
def test_a_whole_model_is_one_graph_that_changed_scores_do_not_compile_again(make, autocast, rounding, calls):
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(3):
        grow_budget(model, step, 3)
        expected = loss_and_gradients(model, model, autocast)
        assert_close(loss_and_gradients(compiled, model, autocast), expected, rounding)
        take_a_large_step(model, changes_every_mask=calls is not None)
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert calls is None or sum("masked_linear_by_ratio" in target for target in called) == calls


@pytest.mark.slow
@STILL_CALLED
@pytest.mark.parametrize(
    ("make", "target_modules"), [(lambda: make_llama(num_hidden_layers=1), "up_proj"), (mixture, "down_proj")]
)
def test_an_adapter_takes_several_graphs_and_later_steps_under_a_budget_make_no_more(make, target_modules):
    base = make("Qwen3Moe") if make is mixture else make()
    model = get_peft_model(base, MaskPeftConfig(target_modules=[target_modules], budget=0.05, task_type="CAUSAL_LM"))
    scores = [p for p in model.parameters() if p.requires_grad]
    optimizer, graphs = torch.optim.AdamW(scores, lr=1e-3), []
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for step in range(3):
        grow_budget(model, step, 3)
        found = []
        for forward in (compiled, model):
            loss_and_gradients(forward, model)
            found.append([p.grad.clone() for p in scores])
        assert_close(*found, 1e-4)
        graphs.append(counter.frame_count)
        optimizer.step()
    assert graphs == graphs[:1] * 3


def checkpointed(model, use_reentrant):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fullgraph"),
    [
        (lambda model: quantize_model(model, "int8", masked=True), True),
        (lambda model: quantize_model(model, "nf4", masked=True), True),
        (lambda model: checkpointed(model, use_reentrant=True), False),
        (lambda model: checkpointed(model, use_reentrant=False), False),
    ],
    ids=["int8", "nf4", "reentrant", "not reentrant"],
)
def test_quantised_bases_are_one_graph_and_checkpointing_takes_several(change, fullgraph):
    expected = change(tiny(layers=1))
    model = change(tiny(layers=1))  # its first forward is compiled
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for _ in range(2):
        got = loss_and_gradients(compiled, model)
        assert_close(got, loss_and_gradients(expected, expected), ROUNDING[torch.float32])


@pytest.mark.slow
def test_inductor_changes_nothing_but_rounding():
    model = tiny(layers=1)
    expected = loss_and_gradients(model, model)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(loss_and_gradients(compiled, model), expected, ROUNDING[torch.float32])
    take_a_large_step(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = loss_and_gradients(compiled, model)
    assert_close(got, loss_and_gradients(model, model), ROUNDING[torch.float32])


@pytest.mark.slow
def test_a_mixture_is_one_graph_whatever_tokens_its_router_sends_to_which_expert():
    model = mask_model(mixture("Qwen3Moe"), MaskConfig.paper(keep_ratio=0.7))
    batches = [torch.randint(3, WORDS, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    routed = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: routed.append(args[1].flatten().bincount(minlength=5).tolist())
    )
    for ids in batches:
        model(ids, use_cache=False)
    hook.remove()
    assert routed[0] != routed[1] != routed[2]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for ids in batches:
        expected, got = (loss_and_gradients(run, model, ids=ids) for run in (model, compiled))
        assert_close(got, expected, ROUNDING[torch.float32])
        take_a_large_step(model)
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("masked_linear_grouped_by_ratio" in target for target in called) == 2 * 2


# ---------------------------------------------------------------------------------------------- autocast


def test_autocast_computes_what_the_merged_model_does_and_leaves_scores_in_fp32():
    model = tiny()
    loss_and_gradients(model, model, autocast=True)
    assert {module.scores.grad.dtype for module in masked_modules(model).values()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens()).logits
        merged = merge_model(model)(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert_close([logits], [merged], ROUNDING[torch.bfloat16])
    full = model(tokens()).logits
    assert not torch.equal(full, merged.float())  # so it ran under autocast


# ---------------------------------------------------------------------------------------------- export


def ops_of(program):
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("mft.")]


class Logits(nn.Module):
    """Map tokens to logits: torch.export needs tensors in and tensors out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def exported(model):
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    return torch.export.export(Logits(model), (tokens(),), dynamic_shapes=(any_size,), strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["masked", "merged"])
def test_an_exported_model_computes_the_same_on_any_batch(merged, tmp_path):
    model = tiny().eval().requires_grad_(False)
    if merged:
        merge_model(model)
    program = exported(model)
    assert ops_of(program) == ([] if merged else ["mft.masked_linear_by_ratio.default"] * 2 * 7)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    with torch.no_grad():
        for ids in (tokens(), tokens(3, 14)):
            expected = model(ids, use_cache=False).logits
            for again in (program, loaded):
                torch.testing.assert_close(again.module()(ids), expected)


@pytest.mark.slow
def test_loading_a_masked_program_needs_mft_kernels_imported_and_nothing_more(tmp_path):
    model = tiny(layers=1).eval()
    torch.export.save(exported(model), tmp_path / "model.pt2")
    torch.save((tokens(), model(tokens(), use_cache=False).logits.detach()), tmp_path / "expected.pt")
    script = f"""
import sys, torch
try:
    torch.export.load({str(tmp_path / "model.pt2")!r})
    sys.exit("loaded without mft_kernels")
except RuntimeError:
    pass
import mft_kernels
program = torch.export.load({str(tmp_path / "model.pt2")!r})
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(program.module()(tokens).detach(), expected)
assert "transformers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "masked_linear_by_ratio" in result.stderr  # the op that torch could not find
