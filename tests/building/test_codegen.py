"""The code of the usual launches, for GPUs that this machine lacks: no spills, what fits, what multiplies, no hazards.

`make kernels-report` checks all launches, with every dtype and mode, for Triton 3.6 too.
"""

import functools
import itertools
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from by_name import ByName

from benchmarks.kernel_code import launches, report
from benchmarks.kernel_code.__main__ import summary
from benchmarks.kernel_code.specialise import identity
from building import ahead
from building.machine_code import sass
from mft_kernels.backends.triton import launch, ops, target

flat = ByName(ops)

KERNELS = {
    "_masked_product_kernel",
    "_sum_splits_kernel",
    "_score_grad_kernel",
    "_backward_kernel",
    "_histogram_kernel",
    "_threshold_kernel",
    "_pack_kernel",
    "_score_step_kernel",
    "_window_kernel",
}
#: In the report only: rarer calls.
OTHERS = {"_masked_weight_kernel", "_many_masks_kernel", "_grouped_product_kernel", "_grouped_score_grad_kernel"}
OTHERS |= {"_quantized_product_kernel", "_count_kernel", "_put_aside_kernel", "_put_back_kernel", "_drop_kernel"}
every_entry = functools.cache(launches.entries)


@pytest.mark.slow
@pytest.mark.parametrize("card", launches.targets(), ids=str)
def test_every_binary_of_the_usual_launches_is_as_it_should_be(card):
    """Check two binaries of each kernel, for few and for many tokens.

    For cards with sm_80's instructions and another shared memory, check only those for many tokens, which take most of
    it. On gfx942, check all.
    """
    entries = launches.entries(card, few=True)
    of_few, of_many = ({e.launch.kernel: e for e in some} for some in (reversed(entries), entries))
    if card.arch in (80, 90, 100):
        entries = [e for e in entries if e in (of_few[e.launch.kernel], of_many[e.launch.kernel])]
    elif card.arch in (89, 120):
        entries = list(of_many.values())
    rows = list(map(report.row, entries))
    print("\n" + summary(rows))
    assert {row.kernel for row in rows} == KERNELS
    assert {(row.kernel, row.tiles): row.faults for row in rows if row.faults} == {}


@pytest.mark.parametrize("card", launches.targets(), ids=str)
def test_the_report_reads_every_kernel(card):
    assert {entry.launch.kernel.__name__ for entry in every_entry(card)} == KERNELS | OTHERS


LAYERS = ((4096, 4096), (14336, 4096), (576, 1536), (1000, 1000))


# Every card once and every layer once: a plan reads the layer's size and the card's numbers apart.
@pytest.mark.parametrize(
    ("card", "layer"),
    [
        *zip([*launches.targets(), target.H100_OLD_TRITON], itertools.cycle(LAYERS)),
        *((target.A100, layer) for layer in LAYERS[1:]),
    ],
    ids=str,
)
def test_any_number_of_tokens_takes_at_most_four_binaries_of_the_product_by_scores_and_by_bits(card, layer):
    n, k = layer
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    weight, scores, threshold, bias = empty(n, k), empty(n, k), empty(()), empty(n)
    with target.assume(card), launch.record() as launched:
        for m in [*range(1, 130), *range(130, 4097, 13), 4096]:  # every remainder modulo 16, everywhere
            flat.masked_linear(empty(m, k), weight, scores, threshold, bias, "magnitude")
    keys = {(identity(one.kernel, one.args, one.options), one.options.get("MODE")) for one in launched}
    binaries = Counter((key.split("(")[0], mode) for key, mode in keys)
    assert binaries.pop(("_sum_splits_kernel", None), 0) <= 1
    assert binaries.pop(("_pack_kernel", "magnitude"), 0) <= 1
    assert 0 < binaries.pop(("_masked_product_kernel", "magnitude")) <= 4
    assert binaries.pop(("_masked_product_kernel", "packed"), 0) <= 4
    assert not binaries


def tiles_of(launched):
    """Return the parts of a launch that the plan decides."""
    sizes = {name: value for name, value in launched.options.items() if "BLOCK" in name or name == "STAGES"}
    return launched.kernel.__name__, *sizes.items(), launched.options["num_warps"], launched.options.get("maxnreg")


@pytest.mark.parametrize("card", launches.targets(), ids=str)
def test_all_tiles_that_can_be_chosen_are_among_those_that_the_report_reads(card):
    read = {tiles_of(entry.launch) for entry in every_entry(card)}
    bf16, fp32 = torch.bfloat16, torch.float32
    unread = {}
    for multiprocessors, m, features in itertools.product(
        (card.multiprocessors, card.multiprocessors * 5 // 8), (1, 64, 100, 200, 512, 1024, 4096), (576, 4096, 14336)
    ):
        for dtype, scores_dtype in ((bf16, bf16), (bf16, fp32), (fp32, fp32), (fp32, bf16)):
            calls = list(launches._usual(m, dtype, scores_dtype, features=features))
            if dtype == fp32:
                calls += [(f"{name}, TF32", launches._run_in_tf32(call)) for name, call in calls]
            for name, call in calls:
                for launched in ahead.recorded(call, replace(card, multiprocessors=multiprocessors)):
                    if (tiles := tiles_of(launched)) not in read:
                        unread.setdefault(tiles, f"{name}, {features} features, {multiprocessors} multiprocessors")
    assert unread == {}


@pytest.mark.parametrize(
    ("card", "rows", "calls"),
    [(target.A100, 1, ("forward, packed", "sums in bfloat16")), (None, 128, ("d_x, packed", "d_scores by bits"))],
    ids=["sm_80", "sm_90"],
)
def test_kernels_over_experts_are_as_they_should_be(card, rows, calls):
    card = card or launches.targets()[2]
    for name, call in launches.expert_calls(rows, torch.bfloat16, torch.bfloat16):
        if name.startswith(calls):
            entry = launches.Entry(card, name, ahead.recorded(call, card)[0])
            assert report.row(entry).faults == (), name
            launched = entry.launch
            compiled = ahead.compile_ahead(launched.kernel, ahead.gpu_target(card), launched.args, launched.options)
            (loop,) = sass.parse(sass.disassemble(compiled.asm["cubin"])).innermost_loops(sass.is_mma)
            copies = {one.opcode for one in loop if one.name in ("LDG", "LDGSTS", "UTMALDG")}
            wide = {opcode for opcode in copies if opcode == "UTMALDG.2D" or opcode.endswith(".128")}
            assert wide, name
            assert copies - wide <= {"LDGSTS.E"}, name  # mask words, one per thread


@pytest.mark.parametrize("card", launches.targets()[:4], ids=str)
def test_a_decoded_token_s_weight_comes_16_bytes_at_a_time_and_each_word_of_its_mask_once(card):
    weight, words = (torch.empty(4096, size, dtype=dtype, device="meta") for size, dtype in WEIGHT_AND_WORDS)
    x = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    product = ahead.recorded(lambda: flat.masked_linear_packed(x, weight, words, None), card)[0]
    compiled = ahead.compile_ahead(product.kernel, ahead.gpu_target(card), product.args, product.options)
    (loop,) = sass.parse(sass.disassemble(compiled.asm["cubin"])).innermost_loops(sass.is_mma)
    copies = Counter(one.opcode for one in loop if one.name in ("LDG", "LDGSTS", "UTMALDG"))
    rows, columns = product.options["BLOCK_P"], product.options["BLOCK_Q"]
    threads = 32 * product.options["num_warps"]
    by_threads = threads * copies.pop("LDGSTS.E")  # mask words, one per thread
    assert by_threads == rows * columns // 32
    if card.descriptors:
        assert copies == {"UTMALDG.2D": 2}  # the tiles of weight and activations
    else:
        assert copies == {"LDGSTS.E.BYPASS.128": (rows + 16) * columns * 2 // (16 * threads)}


def test_rows_of_many_masks_wait_for_no_load():
    """A load inside the branch of one mask would be waited for at once, in each step."""
    ((_, call),) = launches._many_masks_calls(8, 3, torch.bfloat16)
    product = ahead.recorded(call, target.A100)[0]
    compiled = ahead.compile_ahead(product.kernel, ahead.gpu_target(target.A100), product.args, product.options)
    loops = sass.parse(sass.disassemble(compiled.asm["cubin"])).innermost_loops(sass.is_mma)
    copies = Counter(one.name for loop in loops for one in loop)
    assert copies["LDG"] == 0 < copies["LDGSTS"]


WEIGHT_AND_WORDS = ((4096, torch.bfloat16), (128, torch.int32))


def product_on(card, **options):
    """Return the entry of the forward with 2048 tokens, with changed launch options."""
    entry = next(e for e in launches.entries(card, few=True) if "forward, M = 2048" in e.call)
    return replace(entry, launch=replace(entry.launch, options=entry.launch.options | options))


def of_two_blocks():
    """Return the entry of 64 tokens, whose blocks shall share a multiprocessor however few the grid has."""
    entry = next(e for e in launches.entries(target.H100, few=True) if "forward, M = 64" in e.call)
    assert entry.launch.grid[0] <= target.H100.multiprocessors
    return replace(entry, target=replace(target.H100, shared_memory=128 * 1024))


FAULTS = {
    "spills": lambda: product_on(target.H100_OLD_TRITON, num_warps=2),
    "bytes of shared memory, the target has 40000": lambda: replace(
        product_on(target.A100), target=replace(target.A100, shared_memory=40000)
    ),
    "do not let 2 blocks share a multiprocessor": of_two_blocks,
    "the masked weight does not come from registers": lambda: product_on(target.H100, MASK_ON_A=False),
    "a loop without asynchronous copies": lambda: product_on(target.A100, STAGES=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    if "from registers" in fault and not next(card for card in launches.targets() if card.arch == 90).swapped:
        pytest.skip("this Triton or ptxas does not compile the swapped form safely")
    assert any(fault in found for found in report.row(FAULTS[fault]()).faults)
