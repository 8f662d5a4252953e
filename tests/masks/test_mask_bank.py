"""Many masks on one base: each task computes what its masks alone would, also row by row in one batch."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from banks import assert_generates_what_each_row_alone_does
from tiny import WORDS, make_gpt2, make_llama

import mft
from mft.config import MaskConfig
from mft.masks import banked_linear
from mft.masks.bank import MaskBank, load_mask_bank
from mft.masks.banked_linear import BankedLinear
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, save_masks

# Logits of size 7, summed in any order, are up to 1.2e-5 from those in fp64. Tasks differ by more than 1e-2.
FP32_NOISE = {"rtol": 1e-5, "atol": 2e-5}
# Different layers, and masks that drop half, so that a task's results are far from the others'.
TASKS = {
    "code": {"layers_to_transform": [2, 3], "keep_ratio": 0.5, "seed": 1},
    "math": {"layers_to_transform": [1, 2], "keep_ratio": 0.5, "seed": 2, "target_modules": ["up_proj", "down_proj"]},
    "chat": {"layers_to_transform": [0], "keep_ratio": 0.4, "seed": 3, "target_modules": ["q_proj"]},
}
TOKENS = torch.randint(0, WORDS, (6, 9), generator=torch.Generator().manual_seed(5))
MIXED = ["math", None, "code", "chat", "math", "code"]


def base(dtype=torch.float32):
    """Return a model with weights so large that masks decide which token is the likeliest."""
    return make_llama(dtype, initializer_range=0.3)


def masked(mask, dtype=torch.float32):
    return mask_model(base(dtype), MaskConfig.paper(**mask))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    coded = {"math": "rice"}  # one in another coding, which a bank need not know
    return {t: save_masks(masked(m), root / t, coding=coded.get(t, "packed")) for t, m in TASKS.items()}


@pytest.fixture
def bank(exports):
    return load_mask_bank(base(), exports)


def with_masks_of(exports, task, dtype=torch.float32):
    """Return the model that load_masks makes for one task."""
    return base(dtype) if task is None else load_masks(base(dtype), exports[task])


@torch.no_grad()
def logits(model, tokens=TOKENS, **options):
    return model(tokens, **options).logits


# ---------------------------------------------------------------------------------------------- one task


@pytest.mark.parametrize("task", [*TASKS, None])
def test_a_task_computes_what_its_masks_alone_do_bit_for_bit(exports, bank, task, tmp_path):
    with bank.use(task):
        assert torch.equal(logits(bank.model), logits(with_masks_of(exports, task)))
    if task is not None:
        path = save_masks(masked(TASKS[task], torch.bfloat16), tmp_path / task)
        bank = load_mask_bank(base(torch.bfloat16), {task: path})
        with bank.use(task):
            assert torch.equal(logits(bank.model), logits(with_masks_of({task: path}, task, torch.bfloat16)))


def test_masks_by_weight_are_read_with_the_weights_that_a_bank_holds_already(exports, bank, tmp_path):
    base_again = mft.recode_masks(exports["math"], tmp_path / "masks", coding="by_weight", model=base())
    bank.add("again", base_again)
    for task in ("math", "again"):
        with bank.use(task):
            assert torch.equal(logits(bank.model), logits(with_masks_of(exports, "math")))


def test_uses_nest_and_the_outer_one_comes_back(exports, bank):
    with bank.use("code"):
        with bank.use("math"):
            assert torch.equal(logits(bank.model), logits(with_masks_of(exports, "math")))
        assert torch.equal(logits(bank.model), logits(with_masks_of(exports, "code")))


# ---------------------------------------------------------------------------------------------- a task a row


@pytest.mark.parametrize("most", [banked_linear.MOST_MASKS, 0], ids=["one call", "a product for each"])
def test_each_row_of_a_mixed_batch_takes_its_own_masks(exports, bank, monkeypatch, most):
    monkeypatch.setattr(banked_linear, "MOST_MASKS", most)
    with bank.use(MIXED):
        found = logits(bank.model)
    for row, task in enumerate(MIXED):
        alone = logits(with_masks_of(exports, task), TOKENS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], alone, **FP32_NOISE)


def test_a_mixed_batch_generates_what_each_row_alone_does(exports, bank):
    assert_generates_what_each_row_alone_does(bank, lambda task: with_masks_of(exports, task), MIXED, TOKENS, 4)


def test_beams_are_rows_of_their_own(bank):
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    attended = torch.ones_like(TOKENS[:2])
    with bank.use(["code", "code", "math", "math"]):
        found = bank.model.generate(TOKENS[:2], attention_mask=attended, **options)
    for row, task in enumerate(("code", "math")):
        with bank.use(task):
            alone = bank.model.generate(TOKENS[row : row + 1], attention_mask=attended[:1], **options)
        assert found[row].tolist() == alone[0].tolist()


def test_autocast_and_gradients_of_the_input_pass_through_a_mixed_layer(bank):
    layer = bank.model.model.layers[2].mlp.up_proj
    x = torch.randn(6, 5, 32, requires_grad=True)
    with bank.use(MIXED), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.abs().sum((1, 2)).gt(0).all()
    assert not any(parameter.requires_grad for parameter in layer.parameters())


# ---------------------------------------------------------------------------------------------- what is refused


def call(bank, tasks, x=None):
    with bank.use(tasks):
        return logits(bank.model) if x is None else bank.model.model.layers[2].mlp.up_proj(x)


UNKNOWN = r"one of the bank's \(code, math, chat\), got 'cod'; did you mean code\?"
NO_TASK = r"tasks must be a task's name, a list with one name per row of the batch, or None, got "
ROWS = r"tasks must have one entry per row .*, got {} of them and an input of \(6, 9, 32"
# What is called, and the error.
REFUSED = {
    "an unknown task": (lambda bank: call(bank, "cod"), UNKNOWN),
    "an unknown one of several": (lambda bank: call(bank, ["math", "cod"]), UNKNOWN),
    "a number": (lambda bank: call(bank, 3), NO_TASK),
    "an object": (lambda bank: call(bank, object()), NO_TASK),
    "a list of lists": (lambda bank: call(bank, [["code"]]), r"task must be one of the bank's .*, got \['code'\]"),
    "no rows": (lambda bank: call(bank, []), ROWS.format(0)),
    "a row too few": (lambda bank: call(bank, ["code"] * 5), ROWS.format(5)),
    "twice the rows": (lambda bank: call(bank, ["code"] * 12), ROWS.format(12)),
    "flattened rows": (
        lambda bank: call(bank, MIXED, torch.randn(6, 32)),
        r"input of \(6, 32\): .* if the model flattens rows, use one task per batch",
    ),
    "no task": (
        lambda bank: logits(bank.model),
        r"must be called under bank.use\(task\), .*bank.use\(None\) is the bare base",
    ),
    "a name that is taken": (
        lambda bank: bank.add("code", "nowhere"),
        "task must be new to the bank, got 'code': remove it first",
    ),
    "no name": (lambda bank: bank.add("", "nowhere"), "task must be a name, got ''"),
    "a second bank": (
        lambda bank: MaskBank(bank.model),
        r"model must not hold a bank of masks already, got \d+ layers with one",
    ),
    "a union of one": (lambda bank: bank.union("code"), r"tasks must be two or more of the bank's, got \('code',\)"),
    "an unknown one joined": (lambda bank: bank.intersection("math", "cod"), UNKNOWN),
    "a union by a name that is taken": (
        lambda bank: bank.union("code", "math", name="chat"),
        "task must be new to the bank, got 'chat': remove it first",
    ),
    "a union without a name": (lambda bank: bank.union("code", "math", name=""), "task must be a name, got ''"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_no_task_in_use(bank, case):
    use, message = REFUSED[case]
    error = TypeError if message is NO_TASK else RuntimeError if case == "no task" else ValueError
    with pytest.raises(error, match=message):
        use(bank)
    assert bank.tasks == ("code", "math", "chat")
    bank.remove("code")


def test_one_task_takes_rows_of_any_shape_and_masks_of_other_shapes_are_refused(bank, tmp_path):
    assert call(bank, "code", torch.randn(6, 32)).shape == (6, 64)
    other = mask_model(make_llama(head_dim=16), MaskConfig.paper(layers_to_transform=[2]))
    with pytest.raises(ValueError, match=r"q_proj: the mask is for a weight of \(64, 32\), the model's is \(32, 32\)"):
        bank.add("wide", save_masks(other, tmp_path / "wide"), force=True)
    assert bank.tasks == ("code", "math", "chat")


def test_a_copy_of_the_model_takes_the_banks_choices_and_refuses_what_came_later(exports):
    bank = load_mask_bank(base(), {"code": exports["code"]})
    copied = copy.deepcopy(bank.model)
    bank.add("chat", exports["chat"])
    with bank.use("code"):
        assert torch.equal(logits(copied), logits(bank.model))
    for tasks in ("chat", ["code", "chat"] * 3):
        with pytest.raises(ValueError, match=r"that this copy .*holds \(code\), got 'chat'.* copy"), bank.use(tasks):
            logits(copied)


def test_another_base_is_refused_as_by_load_masks_unless_forced(exports):
    model = base()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the masks were learned on other weights of the same shapes"):
        load_mask_bank(model, exports)  # the third task's masks; those of the first two fit
    assert not any(isinstance(module, BankedLinear) for module in model.modules())
    assert load_mask_bank(model, exports, force=True).tasks == ("code", "math", "chat")


# ---------------------------------------------------------------------------------------------- adding and removing


def test_a_task_can_be_added_later_and_removed_again(exports):
    bank = load_mask_bank(base(), {"code": exports["code"]})
    with bank.use("code"):
        bank.add("math", exports["math"])  # also while another task is in use
        assert torch.equal(logits(bank.model), logits(with_masks_of(exports, "code")))
    with bank.use("math"):
        assert torch.equal(logits(bank.model), logits(with_masks_of(exports, "math")))
        with pytest.raises(RuntimeError, match="task must not be in use when it is removed, got 'math'"):
            bank.remove("math")
    before = bank.nbytes()
    bank.remove("math")
    assert bank.nbytes() == {"code": before["code"]}
    with pytest.raises(ValueError, match=r"task must be one of the bank's \(code\), got 'math'"):
        bank.remove("math")
    bank.add("math", exports["math"])
    with bank.use("math"):
        assert torch.equal(logits(bank.model), logits(with_masks_of(exports, "math")))


@pytest.mark.parametrize(("make", "symbol"), [("union", "|"), ("intersection", "&")])
def test_a_union_keeps_what_any_keeps_and_an_intersection_what_all_keep(exports, bank, make, symbol):
    assert getattr(bank, make)("code", "math") == f"code {symbol} math"
    assert getattr(bank, make)("code", "math", "chat", name="all") == "all"
    assert bank.tasks == ("code", "math", "chat", f"code {symbol} math", "all")
    kept = {task: merge_model(with_masks_of(exports, task)) for task in ("code", "math")}
    model = base()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):  # a weight is 0 only if it was dropped
            code, math = (kept[task].get_submodule(name).weight != 0 for task in ("code", "math"))
            keep = (code.int() + math.int()) > (0 if make == "union" else 1)
            module.weight.data = torch.where(keep, module.weight, 0)
    with bank.use(f"code {symbol} math"):
        torch.testing.assert_close(logits(bank.model), logits(model), **FP32_NOISE)
    if make == "union":  # no layer is masked by all three tasks
        assert bank.nbytes()["all"] == 0
    for task in ("code", "math", f"code {symbol} math"):
        bank.remove(task)
    with bank.use("all"):  # the combined mask is unchanged
        logits(bank.model)


def test_all_of_several_tasks_are_joined(bank):
    """By the law of absorption, the third of them decides."""
    both, either = bank.intersection("code", "math"), bank.union("code", "math")
    three = bank.intersection("code", either, "math"), bank.union("code", both, "math")
    compared = 0
    for layer in bank.model.modules():
        if isinstance(layer, BankedLinear) and {"code", "math"} <= layer.masks.keys():
            assert torch.equal(layer.masks[three[0]], layer.masks[both])
            assert torch.equal(layer.masks[three[1]], layer.masks[either])
            assert not torch.equal(layer.masks[both], layer.masks[either])
            compared += 1
    assert compared


# ---------------------------------------------------------------------------------------------- memory


def test_a_task_takes_one_bit_a_weight_and_the_base_is_shared(exports, capsys):
    model = base()
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    bank = load_mask_bank(model, exports)
    for name, weight in weights.items():
        assert model.get_submodule(name).weight.data_ptr() == weight.data_ptr()
    layers = {task: masked_modules(masked(mask)).values() for task, mask in TASKS.items()}
    bits = {task: sum(layer.weight.numel() for layer in layers[task]) for task in TASKS}
    assert bank.nbytes() == {task: bits[task] // 8 for task in TASKS}  # every K here is a multiple of 32
    bank.print_memory()
    assert f"together: {whole + sum(bits.values()) // 8:,d} ||" in capsys.readouterr().out


def test_a_cast_or_a_move_takes_the_masks_along_as_bits(bank):
    bank.model.to(torch.bfloat16)
    layer = bank.model.model.layers[2].mlp.up_proj
    assert {packed.dtype for packed in layer.masks.values()} == {torch.int32}
    with bank.use(MIXED):
        assert logits(bank.model).dtype == torch.bfloat16
    bank.model.to("meta")
    assert {packed.device.type for packed in layer.masks.values()} == {"meta"}


# ---------------------------------------------------------------------------------------------- threads, Conv1D


def test_threads_use_different_tasks_at_once(exports, bank):
    all_in_use = threading.Barrier(len(TASKS))

    def serve(task):
        with bank.use(task):
            all_in_use.wait(20)
            found = logits(bank.model)
            all_in_use.wait(20)
            return found

    with ThreadPoolExecutor(len(TASKS)) as pool:
        for task, found in zip(TASKS, pool.map(serve, TASKS), strict=True):
            assert torch.equal(found, logits(with_masks_of(exports, task)))


def test_a_thread_does_not_take_over_a_task_unasked(bank):
    with bank.use("code"), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(logits, bank.model)
        with pytest.raises(RuntimeError, match="in the thread that calls it"):
            asked.result()


def test_conv1d_layers_of_gpt2_hold_masks_too(tmp_path):
    masks = {"a": {"seed": 1}, "b": {"seed": 2, "layers_to_transform": [1]}}
    for task, mask in masks.items():
        save_masks(mask_model(make_gpt2(), MaskConfig.paper(keep_ratio=0.5, **mask)), tmp_path / task)
    bank = load_mask_bank(make_gpt2(), {task: tmp_path / task for task in masks})
    with bank.use("a"):
        assert torch.equal(logits(bank.model), logits(load_masks(make_gpt2(), tmp_path / "a")))
    with bank.use("b"):  # load_masks leaves the first layer a Conv1D, whose weight is transposed: another order of sums
        torch.testing.assert_close(logits(bank.model), logits(load_masks(make_gpt2(), tmp_path / "b")), **FP32_NOISE)
    with bank.use(["b", "a", "b", None, "a", "a"]):
        found = logits(bank.model)
    torch.testing.assert_close(found[3], logits(make_gpt2())[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], logits(load_masks(make_gpt2(), tmp_path / "b"))[0], rtol=1e-5, atol=1e-5)
