"""memory: sharded gives the same result on one, two and four processes: that of masks in place on one."""

import math

import pytest
import torch
from ranks import in_processes, refusal
from tiny import make_llama, make_rows
from tiny_run import stop_after
from tiny_ways import masked_mixture, masks_of, scores_of
from tiny_ways import rows_with_few_labels as rows

from mft.config import MaskConfig, TrainConfig
from mft.engines.distributed import Processes
from mft.engines.mode import place
from mft.engines.sharded.model import spread
from mft.engines.step import NonFiniteLoss
from mft.masks.convert import mask_model, masked_modules
from mft.training.best import Best
from mft.training.checkpoint import newest_checkpoint
from mft.training.loop import train_masks
from mft.training.saver import Saver, Stopped
from mft.training.validation import Validation
from mft_kernels import unpack_mask

pytestmark = pytest.mark.slow  # test_sharded_quick.py has the first part
STEPS = 3
BITS, LAST_BITS, SIXTEEN_BITS = 0.0, 1e-5, 0.05  # how far losses may differ


def llama(dtype=torch.float32, changes=None, **mask):
    return mask_model(make_llama(dtype, **changes or {}), MaskConfig.paper(**mask))


# name: (model, settings, how exactly two processes give the result of one). A sum of two terms has the same bits in
# either order.
CASES = {
    "fp32": (llama, {}, BITS),
    "some layers": (lambda: llama(layers_to_transform=[2, 3]), {}, BITS),
    "a row at a time": (llama, {"batch_size": 1}, BITS),
    "int16 scores, 8-bit moments": (lambda: llama(scores_dtype="int16"), {"moments": "8bit"}, BITS),
    "bf16": (
        lambda: llama(torch.bfloat16, scores_dtype="bfloat16"),
        {"moments": "8bit", "grad_dtype": "float32"},
        BITS,
    ),
    "clipped": (llama, {"max_grad_norm": 0.1}, BITS),
    "a budget": (lambda: mask_model(make_llama(), MaskConfig(budget=0.03)), {}, BITS),
    "a fixed threshold": (lambda: llama(mode="value", threshold=0.0), {}, BITS),
    "checkpointed": (llama, {"gradient_checkpointing": True}, BITS),
    "one weight for embedding and head": (lambda: llama(changes={"tie_word_embeddings": True}), {}, BITS),
    "a mixture": (masked_mixture, {}, BITS),
    "accumulated": (llama, {"accumulation": 4}, LAST_BITS),
    "summed every micro-batch": (llama, {"accumulation": 4, "reduce_every": "micro_batch"}, LAST_BITS),
    "bf16, summed every micro-batch": (
        lambda: llama(torch.bfloat16, scores_dtype="bfloat16"),
        {"accumulation": 4, "moments": "8bit", "reduce_every": "micro_batch"},
        SIXTEEN_BITS,
    ),
}
IN_PLACE = (
    "fp32",
    "some layers",
    "clipped",
    "a budget",
    "a fixed threshold",
    "checkpointed",
    "a mixture",
    "accumulated",
)
OF_FOUR = ("fp32", "int16 scores, 8-bit moments", "clipped", "a mixture")


def settings(**changes):
    return TrainConfig(**{"lr": 1e-2, "steps": STEPS, "batch_size": 2, "accumulation": 2, "seed": 3} | changes)


def trained(name, way="sharded", count=1, rank=0, changes=None, **options):
    """Return (losses, scores, masks) of a run."""
    make, own, _ = CASES[name]
    model, processes = make(), Processes(rank, count)
    train = settings(**own | (changes or {}))
    reports = train_masks(model, rows(), train, way=way, processes=processes, **options)
    return [report.loss for report in reports], scores_of(model), masks_of(model)


# ---------------------------------------------------------------------------------------------- in each process


def one(rank):
    return {name: trained(name) for name in CASES} | {f"{name}, of four": four_of(name, 1, 0) for name in OF_FOUR}


def two(rank, folder):
    found = {name: trained(name, count=2, rank=rank) for name in CASES}
    found["resumed"] = trained("fp32", count=2, rank=rank, changes={"accumulation": 4}, saver=saver_of(folder, rank, 2))
    found["resumed, int16"] = trained(
        *("int16 scores, 8-bit moments", "sharded", 2, rank, {"accumulation": 4}),
        saver=saver_of(folder / "int16", rank, 2),
    )
    found["validated"] = validated(rank, 2, folder / "best of two")
    found["at rest"] = at_rest(rank)
    found["other scores"] = other_scores(rank)
    found["not finite"] = refusal(lambda: not_finite(rank), (NonFiniteLoss, RuntimeError))
    return found


def four(rank, folder):
    found = {f"{name}, of four": four_of(name, 4, rank) for name in OF_FOUR}
    stopped_at(2, folder, rank, "fp32")
    stopped_at(2, folder / "int16", rank, "int16 scores, 8-bit moments")
    return found


def four_of(name, count, rank):
    return trained(name, count=count, rank=rank, changes={"accumulation": 4})


def saver_of(folder, rank, count):
    checkpoint, _ = newest_checkpoint(folder / "checkpoints")
    return Saver(folder / "checkpoints", math.inf, checkpoint, processes=Processes(rank, count))


def stopped_at(step, folder, rank, name):
    """Run until a signal, which comes to the last process only."""
    options = {"on_step": stop_after(step) if rank == 3 else None, "saver": saver_of(folder, rank, 4)}
    with pytest.raises(Stopped):
        trained(name, count=4, rank=rank, changes={"accumulation": 4}, **options)


def validated(rank, count, folder):
    """Return what an evaluation within the run finds, and the best step's masks."""
    model, found = llama(), []
    validation = Validation(
        rows(), best=Best(folder), on_result=lambda step, result, *_: found.append((step, result.loss))
    )
    train = settings(eval_every=2, keep_best=True)
    train_masks(model, rows(), train, way="sharded", processes=Processes(rank, count), validation=validation)
    if rank == 0:
        validation._best.put(model, validation.standing.best)
    return found, masks_of(model) if rank == 0 else {}


def at_rest(rank):
    """Return (elements in this process, in all) between two steps: weights, scores, moments and masks."""
    model = llama(scores_dtype="bfloat16")
    whole = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    masked = sum(module.scores.numel() for module in masked_modules(model).values())
    few = torch.ones(1, 4, dtype=torch.int64)
    placed = place(model, way="sharded", device="cpu", processes=Processes(rank, 2))
    runner = placed.start(few, settings(moments="8bit"))
    own, states = sum(p.to_local().numel() for p in runner.model.parameters()), runner.states
    here = [states.optimizer.tensors(scores) for scores in states.learned().values()]
    found = {"weights": (own, whole), "masks": (sum(m.packed.numel() for m in states._rows), 0)}
    found |= {name: (sum(t[name].numel() for t in here), masked) for name in ("scores", "exp_avg", "exp_avg_sq")}
    bytes_of_model = sum(m.scores.untyped_storage().nbytes() for m in masked_modules(model).values())
    runner.close()
    return found | {"the model's scores": (bytes_of_model, 2 * len(here))}


def other_scores(rank):
    other = mask_model(make_llama(), MaskConfig.paper(seed=rank))
    return refusal(lambda: train_masks(other, rows(), settings(), way="sharded", processes=Processes(rank, 2)))


def not_finite(rank):
    """The bad weight is in a frozen layer, and only one process's rows reach it; the other's rows score nothing."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    data = make_rows(4)
    ids = [[7 if i in (0, 2) else 8 for _ in range(12)] for i in range(4)]
    data = data.remove_columns(["input_ids", "labels"]).add_column("input_ids", ids).add_column("labels", ids)
    train_masks(model, data, settings(batch_size=1), way="sharded", processes=Processes(rank, 2))


# ---------------------------------------------------------------------------------------------- what they found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def of_one(folder):
    (found,) = in_processes(one, 1, folder / "one")
    return found


@pytest.fixture(scope="module")
def of_four(folder):
    return in_processes(four, 4, folder / "four", folder)


@pytest.fixture(scope="module")
def of_two(folder, of_four):
    """Continue, in two processes, from what four have saved."""
    return in_processes(two, 2, folder / "two", folder)


def assert_same(found, expected, tolerance):
    losses, scores, masks = found
    wanted, wanted_scores, wanted_masks = expected
    if tolerance == BITS:
        assert losses == wanted
        for name, tensor in wanted_scores.items():
            assert torch.equal(scores[name], tensor), name
        assert all(torch.equal(masks[name], words) for name, words in wanted_masks.items())
        return
    assert losses == pytest.approx(wanted, rel=tolerance)
    for name, tensor in wanted_scores.items():
        assert (scores[name].float() - tensor.float()).norm() <= 10 * tolerance * tensor.float().norm(), name


@pytest.mark.parametrize("name", IN_PLACE)
def test_one_process_gives_the_masks_in_place(of_one, name):
    assert_same(of_one[name], trained(name, way="in_place", remember=False), BITS)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_one_s_result(of_one, of_two, name):
    for each in of_two:
        assert_same(each[name], of_one[name], CASES[name][-1])


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_give_one_s_result(of_one, of_four, name):
    for each in of_four:
        assert_same(each[f"{name}, of four"], of_one[f"{name}, of four"], LAST_BITS if name != OF_FOUR[1] else 1e-3)


def test_two_processes_go_on_from_what_four_have_saved(of_one, of_two):
    for each in of_two:
        assert_same(each["resumed"], of_one["fp32, of four"], LAST_BITS)
        assert_same(each["resumed, int16"], of_one["int16 scores, 8-bit moments, of four"], 1e-3)
        scores, masks = each["resumed"][1:]
        for name, words in of_one["fp32, of four"][-1].items():  # equal, but for scores at the threshold
            one, other = (unpack_mask(packed, scores[name].shape) for packed in (masks[name], words))
            assert (one != other).float().mean() <= 1e-3, name


def test_evaluation_and_the_best_step_are_one_process_s(of_two, folder):
    (expected, masks), *_ = in_processes(validated, 1, folder / "validated", 1, folder / "best of one")
    for each in of_two:
        assert each["validated"][0] == expected
    assert all(torch.equal(of_two[0]["validated"][1][name], words) for name, words in masks.items())


def test_nothing_is_whole_on_a_process_between_two_steps(of_two):
    for each in of_two:
        at_rest = each["at rest"]
        for name in ("weights", "scores", "exp_avg", "exp_avg_sq"):
            own, whole = at_rest[name]
            assert own <= 0.51 * whole, name
        assert at_rest["the model's scores"][0] == at_rest["the model's scores"][1]  # one number per layer


def test_other_scores_are_refused_on_all(of_two):
    for each in of_two:
        assert "must have the same versions, configuration, data and scores" in each["other scores"]


def test_more_processes_than_a_layer_has_rows_are_refused():
    few = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="as each masked layer has experts, got 5 processes and 4 experts in model"):
        spread(masked_mixture(), few, torch.device("cpu"), Processes(0, 5))


def test_a_loss_that_is_not_finite_ends_all_processes(of_two):
    assert "the loss must stay finite, got nan at step 1" in "".join(each["not finite"] for each in of_two)
