"""With memory: sharded processes read only their rows of a model; what they compute is what a whole model gives."""

import pytest
import torch
from ranks import in_processes
from tiny import make_rows, save_llama
from tiny_architectures import SIZES, gpt2, llama, mixtral
from transformers import Gemma2Config, Gemma2ForCausalLM

from mft.config import MaskConfig, ModelConfig
from mft.engines.distributed import Processes
from mft.engines.mode import place
from mft.engines.sharded.score_rows import ScoreRows
from mft.importance.initial_scores import drawn, init_from_data
from mft.masks.convert import keep_all_weights, mask_model, masked_modules
from mft.masks.export import base_hash
from mft.models.causal_lm import split_at_head
from mft.models.pretrained import load_model, load_unread
from mft.training.best import _put_rows, put_result
from mft_kernels import pack_mask, unpack_mask

COUNT = 3  # so that rows are not shared evenly
# name: (model, the settings of its masks). Gemma 2 caps its logits; GPT-2's weights are transposed.
CASES = {
    "by magnitude": (lambda: llama(tie_word_embeddings=True), {}),
    "a budget": (llama, {"budget": 0.05, "budget_ramp": 0.0}),
    "by value": (gpt2, {"mode": "value", "init": "normal", "scores_dtype": "int16"}),
    "fused experts": (mixtral, {"init": "normal"}),
    "by data": (mixtral, {"init": "wanda", "calibration_rows": 4, "scores_dtype": "bfloat16"}),
    "capped logits": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), {"threshold": 0.001}),
}


def saved(directory, make):
    save_llama(directory)  # the tokenizer
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    make().save_pretrained(directory, max_shard_size="20KB")


@torch.no_grad()
def compared(rank, folder, case):
    """Return how far logits, scores and masks of rows are from those of the whole model, by what is compared."""
    config, mask = ModelConfig(str(folder / case), dtype="float32"), MaskConfig(**CASES[case][1])
    whole, unread = load_model(config)[0], load_unread(config)[0]
    rows = ScoreRows(unread, Processes(rank, COUNT), torch.device("cpu"))
    data, ids, found = make_rows(4), torch.arange(1, 25).view(2, 12), {}
    run, head = split_at_head(whole, ids)

    def logits(of):
        spread = place(of, way="sharded").read(ids[:1, :8])
        spread.check_apart(data, ids[:1, :8], 1)
        with spread._spread.whole_head():
            result = spread.head(spread.run(spread.model, ids))
        spread.close()
        return result

    found["logits"] = (logits(unread) - head(run(whole, ids))).abs().max().item()
    for model in (whole, unread):
        mask_model(model, drawn(mask))
    rows.begin(drawn(mask))
    if mask.init == "wanda":
        init_from_data(whole, mask, data)
        init_from_data(unread, mask, data, way="sharded", processes=rows.processes)
    modules, masks = masked_modules(whole), rows.masks()
    gathered = rows.gathered(masks)
    alike = one_rounding_apart if mask.init == "wanda" else torch.equal  # norms come from products of two kinds
    found["scores"] = [name for name, m in modules.items() if not alike(rows.rows[name], own(m.scores, rank))]
    for name, module in modules.items():  # the masks of the same scores
        module.scores.data.copy_(rows.processes.all_rows(rows.rows[name], len(module.scores)))
    found["masks"] = [name for name, m in modules.items() if not torch.equal(masks[name], own(m.packed_mask(), rank))]
    found["gathered"] = [
        name for name, packed in gathered.items() if not torch.equal(packed, modules[name].packed_mask())
    ]
    found["number gathered"] = len(gathered)
    found["hashes"] = len({base_hash(whole), base_hash(unread)})
    found["masked logits"] = (logits(unread) - head(run(whole, ids))).abs().max().item()
    with keep_all_weights(unread):
        found["dropped"] = sum(
            int((~unpack_mask(kept, rows.rows[name].shape)).sum()) for name, kept in rows.masks().items()
        )
    best = {f"{name}.mask": random_mask(name, module) for name, module in modules.items()}
    put_result(whole, best)
    _put_rows(unread, rows, best if rank == 0 else {})
    put = rows.masks()
    found["best"] = [name for name, m in modules.items() if not torch.equal(put[name], own(m.packed_mask(), rank))]
    found["flipped"] = rows.flipped_share(masks, put)
    return found


def own(tensor, rank):
    most = -(-len(tensor) // COUNT)
    return tensor.detach()[most * rank : most * (rank + 1)]


def one_rounding_apart(one, other):
    """Return whether no element is farther from its counterpart than the next number of their dtype."""
    infinity = torch.full_like(other, torch.inf)
    return bool(((other.nextafter(-infinity) <= one) & (one <= other.nextafter(infinity))).all())


def random_mask(name, module):
    """Return a mask that keeps 99 % in each matrix."""
    drawn = torch.rand(module.scores.shape, generator=torch.Generator().manual_seed(len(name)))
    cut = (
        drawn.flatten(-2)
        .kthvalue(max(1, int(0.01 * drawn[0].numel() if drawn.dim() == 3 else 0.01 * drawn.numel())))
        .values
    )
    return pack_mask(drawn, cut)


def all_cases(rank, folder):
    return {case: compared(rank, folder, case) for case in CASES}


@pytest.fixture(scope="module")
def of_each(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for case, (make, _) in CASES.items():
        (folder / case).mkdir()
        saved(folder / case, make)
    return in_processes(all_cases, COUNT, folder / "processes", folder)


@pytest.mark.parametrize("case", CASES)
def test_rows_from_files_give_what_the_whole_model_gives(of_each, case):
    for rank, each in enumerate(of_each):
        found = each[case]
        # The whole model computes with weights where they lie in the file, whose address may change the order of sums.
        assert max(found["logits"], found["masked logits"]) < 1e-5
        assert [found[what] for what in ("scores", "masks", "gathered", "best")] == [[], [], [], []]
        assert (found["number gathered"] > 0) == (rank == 0)
        assert (found["hashes"], found["dropped"]) == (1, 0)
        assert found["flipped"] == of_each[0][case]["flipped"] > 0
