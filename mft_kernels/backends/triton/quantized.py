"""The masked product over codes: out = a @ Wm.T (forward) or a @ Wm (d_x), Wm = where(keep, decoded, 0), not in memory.

    table  decoded[i] = levels[code[i]] * absmax[i // BLOCK]   i over the whole (N, K); two codes per byte, the first in
                                                               the high bits; absmax may be codes (double quantisation)
    int8   decoded[n, k] = code[n, k] * (absmax[n] / 127)

Weights are decoded in fp32 and rounded once to a's dtype, as in codes.py, so Wm has the same bits. P is the axis of the
result that comes from the weight, Q the one that is summed (product.py). One program makes a BLOCK_M x BLOCK_P tile of
out, or of a part of its sum:

             Q ->                          codes, absmax and words of the mask, BLOCK_Q at a time:
        +---+---+---+                      look up, scale, round, select, then multiply
      M | a | a | a |   x   [Wm][Wm][Wm]   = one tile of out
        +---+---+---+

If rows are whole blocks, a thread loads many codes at once, and one absmax per block. Codes of other rows are loaded
one by one, by their place in the whole matrix: correct, but not fast. No GPU has run this.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ...codes import NESTED_BLOCK, Codes, Table
from ...operands import Keep
from .arguments import arithmetic, is_exact
from .launch import launch
from .plan import Operands, Problem, quantized_tiles
from .product import Split, store_product
from .target import target_of
from .tiles import load_bits, load_tile


def product_of_codes(a: Tensor, weight: Codes, keep: Keep | None, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute a @ where(keep, decoded, 0).T + bias; if transposed, without the ``.T``."""
    (n, k), axes = weight.shape, a.shape[:-1]
    m, (p, q) = axes.numel(), (k, n) if transposed else (n, k)
    a = a.reshape(m, q)
    out = a.new_empty((m, p))
    bias = None if bias is None else bias.contiguous()
    packed = None if keep is None else keep.source.contiguous()
    levels = weight.levels_on(a.device) if isinstance(weight, Table) else None
    block = weight.block if isinstance(weight, Table) else 0
    whole = k % (block or 16) == 0
    asked = Operands(a.element_size(), 0, is_exact(a), whole)
    tiles = quantized_tiles(Problem(target_of(a.device), max(1, m), max(1, p), max(1, q), asked))
    split = Split.of(tiles, out, q)
    launch(
        _quantized_product_kernel,
        (math.ceil(m / tiles.rows) * math.ceil(p / tiles.columns) * split.splits,),
        a,
        weight.codes.contiguous(),
        tuple(scale.contiguous() for scale in weight.scales),
        levels,
        packed,
        bias,
        out,
        split.parts,
        m,
        n,
        k,
        split.splits,
        split.part,
        *a.stride(),
        *out.stride(),
        TRANSPOSED=transposed,
        WHOLE=whole,
        BLOCK=block,
        NESTED=NESTED_BLOCK if len(weight.scales) > 1 else 0,
        **tiles.options("MPQ"),
        enable_fp_fusion=False,  # the reference rounds the product of double quantisation before it adds
        **arithmetic(a),
    )
    split.add_up(bias, out)
    return out.view(*axes, p)


@triton.jit(do_not_specialize=["M", "SPLITS"])
def _quantized_product_kernel(
    a, codes, absmax, levels, keep, bias, out, parts, M, N, K, SPLITS, Q_SPLIT,
    stride_am, stride_aq, stride_om, stride_op,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one tile per program: of out (M, P) if SPLITS is 1, otherwise of one of the parts.

    See _masked_product_kernel. BLOCK: how many weights share an absmax, if a table of levels decodes them; 0 for int8.
    """
    P = K if TRANSPOSED else N
    Q = N if TRANSPOSED else K
    ROWS: tl.constexpr = BLOCK_Q if TRANSPOSED else BLOCK_P
    COLUMNS: tl.constexpr = BLOCK_P if TRANSPOSED else BLOCK_Q
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(P, BLOCK_P)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tile % tiles_m * BLOCK_M
    column = tile // tiles_m * BLOCK_P
    start = split * Q_SPLIT
    if BLOCK:
        table = tl.load(levels + tl.arange(0, 16))
    else:
        scale = _int8_scale(absmax, 0 if TRANSPOSED else column, N, ROWS)
    sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for q in tl.range(start, min(start + Q_SPLIT, Q), BLOCK_Q, num_stages=STAGES):
        tokens = load_tile(a, row, q, M, Q, stride_am, stride_aq, BLOCK_M, BLOCK_Q, False)
        n = q if TRANSPOSED else column
        k = column if TRANSPOSED else q
        if BLOCK:
            w = _table_tile(codes, absmax, table, n, k, N, K, WHOLE, BLOCK, NESTED, ROWS, COLUMNS)
        else:
            if TRANSPOSED:
                scale = _int8_scale(absmax, n, N, ROWS)
            code = load_tile(codes, n, k, N, K, K, 1, ROWS, COLUMNS, False)
            # 0 beyond the edges, also where absmax is not finite.
            w = tl.where((k + tl.arange(0, COLUMNS) < K)[None, :], code.to(tl.float32) * scale, 0.0)
        if keep is not None:
            w = tl.where(load_bits(keep, n, k, N, K, tl.cdiv(K, 32), ROWS, COLUMNS), w, 0.0)
        if UPCAST:  # see product_tile
            tokens = tokens.to(tl.float32)
            w = _rounded_to_bf16(w)
        else:
            w = w.to(tokens.dtype)
        if not TRANSPOSED:
            w = w.T
        sums = tl.dot(tokens, w, sums, input_precision=PRECISION)
    store_product(out, parts, split, SPLITS, sums, bias, row, column, M, P, stride_om, stride_op, BLOCK_M, BLOCK_P)


@triton.jit
def _table_tile(
    codes, absmax, table, row, column, rows, columns,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return weights (ROWS, COLUMNS) in fp32 from (row, column) on. Beyond the edges absmax is 0, so they are 0.

    Levels are looked up in shared memory. Compared with that, a whole step (sm_80, 16 x 32 x 128) takes twice as many
    instructions with a tree of 15 selections, and about 1.5 times as many with loads from memory, whose addresses fill
    the registers.
    """
    r = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    if WHOLE:  # rows are whole blocks: two codes per byte, one absmax for up to BLOCK columns
        GROUPS: tl.constexpr = COLUMNS // BLOCK if COLUMNS > BLOCK else 1
        byte = column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        both = tl.load(codes + r * (columns // 2) + byte, mask=(r < rows) & (byte < columns // 2), other=0)
        code = tl.join(both >> 4, both & 15).reshape(ROWS * COLUMNS)
        block = column // BLOCK + tl.arange(0, GROUPS)[None, :]
        inside = (r < rows) & (block < columns // BLOCK)
        scale = _load_absmax(absmax, r * (columns // BLOCK) + block, inside, NESTED)
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, COLUMNS // GROUPS)).reshape(ROWS, COLUMNS)
    else:
        c = column + tl.arange(0, COLUMNS)[None, :]
        inside = (r < rows) & (c < columns)
        place = r * columns + c
        both = tl.load(codes + place // 2, mask=inside, other=0)
        code = tl.where(place % 2 == 0, both >> 4, both & 15).reshape(ROWS * COLUMNS)
        scale = _load_absmax(absmax, place // BLOCK, inside, NESTED)
    return tl.gather(table, code.to(tl.int32), 0).reshape(ROWS, COLUMNS) * scale


@triton.jit
def _load_absmax(absmax, block, inside, NESTED: tl.constexpr):
    """Return absmax of these blocks in fp32; 0 where not inside.

    If NESTED is not 0, absmax is stored as codes, and NESTED blocks share the factor of their codes.
    """
    if NESTED:
        code = tl.load(absmax[0] + block, mask=inside, other=0)
        nested = tl.load(absmax[1] + block // NESTED, mask=inside, other=0)
        scale = tl.load(absmax[2] + code.to(tl.int32)) * nested + tl.load(absmax[3])
        scale = tl.where(inside, scale, 0.0)
    else:
        scale = tl.load(absmax[0] + block, mask=inside, other=0)
    return scale


@triton.jit
def _int8_scale(absmax, row, rows, ROWS: tl.constexpr):
    """Return absmax / 127 of each row, (ROWS, 1)."""
    r = row + tl.arange(0, ROWS)
    return tl.div_rn(tl.load(absmax[0] + r, mask=r < rows, other=0), 127.0)[:, None]


@triton.jit
def _rounded_to_bf16(w):
    """Round fp32 to values that bf16 holds: to nearest, ties to even. For the interpreter, whose own cast truncates."""
    bits = w.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(w == w, nearest.to(tl.float32, bitcast=True), w)
