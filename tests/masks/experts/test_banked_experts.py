"""A bank on a mixture: each task's experts compute what its masks alone would, also row by row in one batch."""

import copy

import pytest
import torch
from banks import assert_generates_what_each_row_alone_does
from tiny_mixtures import WORDS, logits, mixture

from mft.config import MaskConfig
from mft.masks.bank import load_mask_bank
from mft.masks.banked_experts import BankedExperts, BankedGroupedLinear
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import load_masks, save_masks
from mft_kernels import MaskedGroupedLinear

TASKS = {
    "code": {"keep_ratio": 0.5, "seed": 1},
    "math": {"keep_ratio": 0.5, "seed": 2, "layers_to_transform": [1]},
    "chat": {"keep_ratio": 0.4, "seed": 3},  # some projections only: see exports_of
}
MIXED = ["math", None, "code", "chat", "math", "code"]
TOKENS = torch.randint(3, WORDS, (6, 7), generator=torch.Generator().manual_seed(5))
NOISE = {"rtol": 1e-5, "atol": 2e-5}


def exports_of(base, root):
    """Return exports of TASKS. The last task masks only the last layer's down_proj, or what replaces it."""
    found = {}
    for task, mask in TASKS.items():
        if task == "chat":
            layers = masked_modules(mask_model(copy.deepcopy(base), MaskConfig()))
            names = [name for name, layer in layers.items() if isinstance(layer, MaskedGroupedLinear)]
            mask = mask | {"target_parameters": names[-1:]}
        found[task] = save_masks(mask_model(copy.deepcopy(base), MaskConfig.paper(**mask)), root / task)
    return found


def outputs(model, ids=TOKENS):
    return logits(model, ids)


class Case:
    def __init__(self, kind, root):
        self.base = mixture(kind, initializer_range=0.3)
        self.exports = exports_of(self.base, root)

    def bank(self, *tasks):
        return load_mask_bank(copy.deepcopy(self.base), {task: self.exports[task] for task in tasks or self.exports})

    def alone(self, task):
        model = copy.deepcopy(self.base)
        return model if task is None else load_masks(model, self.exports[task])


@pytest.fixture(scope="module", params=["Olmoe", "GptOss", "Llama4Text", "JetMoe"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return Case("Olmoe", tmp_path_factory.mktemp("olmoe"))


def block(model, layer=1):
    return model.model.layers[layer].mlp


# ---------------------------------------------------------------------------------------------- what is computed


def test_a_task_computes_what_its_masks_alone_do(case):
    bank, found = case.bank(), []
    assert any(isinstance(module, BankedGroupedLinear) for module in bank.model.modules())
    for task in (*TASKS, None):
        with bank.use(task):
            found.append(outputs(bank.model))
        if task is not None:  # only "code" masks all experts; the others' whole ones are multiplied in another order
            exact = {"rtol": 0, "atol": 0} if task == "code" else NOISE
            torch.testing.assert_close(found[-1], outputs(case.alone(task)), **exact)
    torch.testing.assert_close(found[-1], outputs(case.base), **NOISE)
    assert all((found[i] - found[j]).abs().max() > 1e-2 for i in range(4) for j in range(i))


def test_each_row_of_a_mixed_batch_takes_its_own_masks_or_the_model_is_named(case):
    bank = case.bank()
    if type(case.base).__name__ == "JetMoeForCausalLM":
        with (
            pytest.raises(ValueError, match=r"tasks must have one entry per row .* the model flattens rows"),
            bank.use(MIXED),
        ):
            outputs(bank.model)
        return
    with bank.use(MIXED):
        found = outputs(bank.model)
    for row, task in enumerate(MIXED):
        torch.testing.assert_close(found[row : row + 1], outputs(case.alone(task), TOKENS[row : row + 1]), **NOISE)
    with bank.use(["code"] * 6):
        torch.testing.assert_close(outputs(bank.model), outputs(case.alone("code")), **NOISE)


def test_a_mixed_batch_generates_what_each_row_alone_does(olmoe):
    assert_generates_what_each_row_alone_does(olmoe.bank(), olmoe.alone, MIXED, TOKENS, 2)


# ---------------------------------------------------------------------------------------------- the bank


def test_tasks_are_added_removed_and_joined_and_weights_shared(olmoe):
    model = copy.deepcopy(olmoe.base)
    address = block(model).experts.down_proj.data_ptr()
    bank = load_mask_bank(model, {"chat": olmoe.exports["chat"]})
    experts = block(model).experts
    assert list(experts.layers()) == ["down_proj"]
    with bank.use("chat"):
        bank.add("code", olmoe.exports["code"])  # it masks gate_up_proj too, which gets a module of its own
        torch.testing.assert_close(outputs(model), outputs(olmoe.alone("chat")), **NOISE)
    assert list(experts.layers()) == ["down_proj"]
    layers = block(model).experts.layers()
    assert sorted(layers) == ["down_proj", "gate_up_proj"]
    assert layers["down_proj"].weight.data_ptr() == address
    assert bank.nbytes()["chat"] == 5 * 32 * 2 * 4  # 48 columns take two words
    both = bank.intersection("chat", "code")
    down = layers["down_proj"].masks
    assert torch.equal(down[both], down["chat"] & down["code"])
    bank.remove("chat")
    assert set(layers["down_proj"].masks) == {"code", both}
    with bank.use("code"):
        assert torch.equal(outputs(model), outputs(olmoe.alone("code")))


def test_a_copy_takes_the_banks_choices_and_refuses_what_came_later(olmoe):
    bank = olmoe.bank("code")
    copied = copy.deepcopy(bank.model)
    bank.add("math", olmoe.exports["math"])
    for tasks in ("code", ["code", None] * 3):
        with bank.use(tasks):
            assert torch.equal(outputs(copied), outputs(bank.model))
    for tasks in ("math", ["code", "math"] * 3):
        with pytest.raises(ValueError, match=r"that this copy .*holds \(code\), got 'math'"), bank.use(tasks):
            block(copied)(torch.randn(6, 7, 32))


# ---------------------------------------------------------------------------------------------- what is refused


def test_tokens_that_are_not_all_of_the_rows_are_not_guessed(olmoe):
    bank = olmoe.bank()
    experts = block(bank.model).experts
    assert isinstance(experts, BankedExperts)
    with pytest.raises(RuntimeError, match=r"must be called under bank.use\(task\)"):
        outputs(bank.model)
    with pytest.raises(ValueError, match=r"got 5 of them and an input of \(6, 7, 32\)"), bank.use(["code"] * 5):
        block(bank.model)(torch.randn(6, 7, 32))
    chosen, weights = torch.zeros(12, 2, dtype=torch.long), torch.ones(12, 2)
    with bank.use(MIXED):
        with pytest.raises(ValueError, match=r"got 6 of them and an input of \(12, 32\)"):
            experts(torch.randn(12, 32), chosen, weights)  # no caller's input has been seen
        block(bank.model)(torch.randn(6, 2, 32))
        with pytest.raises(ValueError, match=r"got 6 of them and an input of \(12, 32\)"):
            experts(torch.randn(12, 32), chosen, weights)  # the input seen before no longer counts
        block(bank.model).forward = lambda x: experts(x.flatten(0, 1)[:12], chosen, weights)
        with pytest.raises(ValueError, match=r"got 6 of them and an input of \(12, 32\)"):
            block(bank.model)(torch.randn(6, 7, 32))  # 12 of 42 tokens


def test_experts_whose_rows_come_sorted_are_refused_though_there_is_one_for_each_token(tmp_path):
    masks = MaskConfig(target_parameters=["mlp.output_linear.weight"])
    made = mixture("JetMoe", num_experts_per_tok=1)
    bank = load_mask_bank(copy.deepcopy(made), {"code": save_masks(mask_model(made, masks), tmp_path / "code")})
    with pytest.raises(ValueError, match=r"got 6 of them and an input of \(42, 48\)"), bank.use([None, "code"] * 3):
        outputs(bank.model)
