"""The exit decision on the GPU: one kernel per tile of the vocabulary, one that merges the tiles.

Shape letters: B rows, D width, V rows of the head.
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lego_kernels.exit_tiles import TILE
from lego_kernels.triton.rows import row_stride

STAGES = 4  # 3 of 16 KiB in flight, 57 KiB with h: 3 programs fit on an H100, 1 on an sm_86


class _Form(NamedTuple):
    """How a program makes its logits: by tensor cores, or by products and a sum."""

    use_dot: bool
    rows: int  # of h, per program


# The dtype decides, never B: the forms add in different orders, so a row would change its bits
# with its company. Tensor cores pad to 16 rows, which hides behind the bytes of the head. Float32
# has none (tf32 is not float32): 16 padded rows would cost GPT-2's head on an H100 21 us of
# multiply-adds at peak beside 51 us of bytes, 4 rows cost 5 us.
FORMS = {"dot": _Form(True, 16), "gemv": _Form(False, 4)}

# columns of the head per step, by form and bytes of the dtype: at most a cache line, and no more
# than 168 registers hold (65,536 are for 3 programs of 128 threads)
BLOCK_D = {("dot", 2): 64, ("dot", 4): 16, ("gemv", 2): 32, ("gemv", 4): 32}


@triton.jit
def _norm_scale(h_row_ptr, row_kept, D, eps, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    # blocks as wide as the main loop's, so that its h keeps their layout (with that of blocks of
    # 512 it was held eight times over); eight loads in flight, since each waits for L2
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, D, 8 * BLOCK_D):
        for i in tl.static_range(8):
            column = start + i * BLOCK_D + tl.arange(0, BLOCK_D)
            kept = row_kept[:, None] & (column < D)[None, :]
            h = tl.load(h_row_ptr[:, None] + column[None, :], mask=kept, other=0.0)
            squares += h.to(tl.float32) * h.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(squares, axis=1) / D + eps)  # [ROWS]


@triton.jit
def _first_max(x, index, kept):
    """Per row the maximum and its lowest index; with a NaN, NaN and the first NaN's index."""
    # tl.max and tl.argmax treat NaN differently from version to version: they never see one
    bad = kept & (x != x)
    clean = tl.where(kept & (x == x), x, -float("inf"))
    best = tl.max(clean, axis=1)
    has_bad = tl.max(bad.to(tl.int32), axis=1) > 0
    wanted = tl.where(has_bad[:, None], bad, kept & (clean == best[:, None]))
    first = tl.min(tl.where(wanted, index, 2147483647), axis=1)
    return tl.where(has_bad, float("nan"), best), first


@triton.jit
def _softmax_sums(x, best, total, weighted):
    """Sums of e^y and e^y y relative to x, lowered to the maximum `best` and added per row."""
    gap = tl.where(x == best[:, None], 0.0, x - best[:, None])  # infinity less itself is 0
    scale = tl.exp(gap)
    moved = tl.where(scale == 0, 0.0, scale * (weighted + total * gap))  # not 0 * -inf
    return tl.sum(scale * total, axis=1), tl.sum(moved, axis=1)


@triton.jit
def _gumbel(word):
    """The noise of lego.ops.gumbel, in float32 to a few units in the last place, from its words."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    u = tl.minimum(u, 0.99999994)  # 1 - 2^-24: the largest words round to 1
    # -log1p(-u): dividing by 1 - rest instead of u undoes the rounding of rest (Goldberg 1991)
    rest = 1.0 - u
    lost = rest == 1.0
    exponential = tl.where(lost, u, -tl.log(rest) * (u / tl.where(lost, 1.0, 1.0 - rest)))
    return -tl.log(exponential)


@triton.jit
def _words(seed, offset, first_index, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The words of lego.ops.gumbel, uint32 [ROWS, TILE]; first_index is a multiple of 4."""
    quad = (first_index // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    zero = tl.zeros([ROWS, TILE // 4], tl.uint32)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    a, b, c, d = tl.philox(seed[:, None], quad[None, :] + zero, low, high, zero)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a b c d, a b c d, ...


# What changes between calls may not mean another compilation, in the middle of a capture, nor
# another order of addition: neither the value of B, nor whether a slice of a [B] tensor is aligned.
@triton.jit(
    do_not_specialize=[
        "temperature_ptr",
        "seed_ptr",
        "offset_ptr",
        "workspace_ptr",
        "B",
        "temperature_stride",
        "seed_stride",
        "offset_stride",
    ]
)
def _exit_decision_tile_kernel(
    h_ptr,
    head_ptr,
    norm_weight_ptr,
    temperature_ptr,
    seed_ptr,
    offset_ptr,
    workspace_ptr,
    B,
    D,
    vocab_size,
    num_tiles,
    eps,
    h_stride,
    head_stride,
    temperature_stride,
    seed_stride,
    offset_stride,
    USE_DOT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    # the row groups of one tile are neighbours, so that all but the first find it in L2
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_kept = row < B
    index = tile * TILE + tl.arange(0, TILE)
    index_kept = index < vocab_size
    h_row_ptr = h_ptr + row * h_stride
    head_row_ptr = head_ptr + index.to(tl.int64) * head_stride
    if norm_weight_ptr is not None:
        scale = _norm_scale(h_row_ptr, row_kept, D, eps, ROWS, BLOCK_D)
    logits = tl.zeros([ROWS, TILE], tl.float32)
    # loops without a dot are pipelined only if the loop itself says so
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        column_kept = column < D
        h_kept = row_kept[:, None] & column_kept[None, :]
        h = tl.load(h_row_ptr[:, None] + column[None, :], mask=h_kept, other=0.0)
        if norm_weight_ptr is not None:
            weight = tl.load(norm_weight_ptr + column, mask=column_kept, other=0.0).to(tl.float32)
            # rounded to the dtype, as the norm on its own does
            h = (h.to(tl.float32) * scale[:, None] * weight[None, :]).to(h.dtype)
        head_kept = index_kept[:, None] & column_kept[None, :]
        head = tl.load(
            head_row_ptr[:, None] + column[None, :],
            mask=head_kept,
            other=0.0,
            eviction_policy="evict_first",
        )  # [TILE, BLOCK_D]
        if USE_DOT:
            logits = tl.dot(h, tl.trans(head), logits, input_precision="ieee")
        else:
            # reshaped, the load's layout carries over; expand_dims lets lanes hold single columns
            head = tl.reshape(head, [1, TILE, BLOCK_D]).to(tl.float32)
            product = h[:, None, :].to(tl.float32) * head
            logits += tl.sum(product, axis=2)
    index, kept = index[None, :], index_kept[None, :]
    best, first = _first_max(logits, index, kept)
    logits = tl.where(kept, logits, -float("inf"))
    others = tl.where(index == first[:, None], -float("inf"), logits)
    total, weighted = _softmax_sums(logits, best, 1.0, 0.0)
    place = workspace_ptr + row * num_tiles + tile
    plane = B.to(tl.int64) * num_tiles
    tl.store(place, best, mask=row_kept)
    tl.store(place + plane, tl.max(others, axis=1), mask=row_kept)
    tl.store(place + 2 * plane, total, mask=row_kept)
    tl.store(place + 3 * plane, weighted, mask=row_kept)
    tl.store(place + 4 * plane, first.to(tl.float32, bitcast=True), mask=row_kept)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row * temperature_stride, mask=row_kept, other=0.0)
        seed = tl.load(seed_ptr + row * seed_stride, mask=row_kept, other=0)
        offset = tl.load(offset_ptr + row * offset_stride, mask=row_kept, other=0)
        noise = _gumbel(_words(seed, offset, tile * TILE, ROWS, TILE))
        score, drawn = _first_max(logits + temperature[:, None] * noise, index, kept)
        tl.store(place + 5 * plane, score, mask=row_kept)
        tl.store(place + 6 * plane, drawn.to(tl.float32, bitcast=True), mask=row_kept)


@triton.jit(
    do_not_specialize=[
        "workspace_ptr",
        "threshold_ptr",
        "token_ptr",
        "confidence_ptr",
        "lse_ptr",
        "exit_ptr",
        "B",
        "threshold_stride",
    ]
)
def _exit_decision_merge_kernel(
    workspace_ptr,
    threshold_ptr,
    token_ptr,
    confidence_ptr,
    lse_ptr,
    exit_ptr,
    B,
    num_tiles,
    threshold_stride,
    log_vocab_size,
    CRITERION: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tile = tl.arange(0, BLOCK_T)[None, :]
    kept = tile < num_tiles
    place = workspace_ptr + row[:, None] * num_tiles + tile
    plane = B.to(tl.int64) * num_tiles
    tile_best = tl.load(place, mask=kept, other=-float("inf"))  # [1, BLOCK_T], as all below
    tile_second = tl.load(place + plane, mask=kept, other=-float("inf"))
    tile_total = tl.load(place + 2 * plane, mask=kept, other=0.0)
    tile_weighted = tl.load(place + 3 * plane, mask=kept, other=0.0)
    tile_first = tl.load(place + 4 * plane, mask=kept, other=0.0).to(tl.int32, bitcast=True)
    best, token = _first_max(tile_best, tile_first, kept)  # [1], as all below
    others = tl.where(tile_first == token[:, None], tile_second, tile_best)
    total, weighted = _softmax_sums(tile_best, best, tile_total, tile_weighted)
    if CRITERION == "entropy":
        confidence = 1.0 - (tl.log(total) - weighted / total) / log_vocab_size
        confidence = tl.minimum(tl.maximum(confidence, 0.0), 1.0)
    elif CRITERION == "margin":
        confidence = (1.0 - tl.exp(tl.max(others, axis=1) - best)) / total
    else:
        confidence = 1.0 / total
    confidence = tl.where(best == -float("inf"), 0.0, confidence)
    broken = (best != best) | (best == float("inf"))
    confidence = tl.where(broken, float("nan"), confidence)
    if SAMPLED:
        tile_score = tl.load(place + 5 * plane, mask=kept, other=-float("inf"))
        tile_drawn = tl.load(place + 6 * plane, mask=kept, other=0.0).to(tl.int32, bitcast=True)
        _, token = _first_max(tile_score, tile_drawn, kept)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(confidence_ptr + row, confidence)
    tl.store(lse_ptr + row, best + tl.log(total))
    threshold = tl.load(threshold_ptr + row * threshold_stride)
    tl.store(exit_ptr + row, confidence >= threshold)


def launch_exit_decision(
    h: Tensor,
    head: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    threshold: Tensor,
    criterion: str,
    vocab_size: int,
    temperature: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    token: Tensor,
    confidence: Tensor,
    lse: Tensor,
    exit: Tensor,
    workspace: Tensor,
    *,
    form: Literal["dot", "gemv"] | None = None,
) -> None:
    """The op's arguments; the form is for measuring, by default it follows the dtype."""
    (B, D), num_tiles = h.shape, triton.cdiv(vocab_size, TILE)
    if B == 0:
        return
    form = form or ("gemv" if h.dtype == torch.float32 else "dot")
    use_dot, rows = FORMS[form]
    noise = (temperature, seed, offset)
    noise_strides = [row_stride(x) for x in noise]
    sizes = (B, D, vocab_size, num_tiles, eps, h.stride(0), head.stride(0))
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device_of(h):
        _exit_decision_tile_kernel[(triton.cdiv(B, rows), num_tiles)](
            *(h, head, norm_weight, *noise, workspace, *sizes, *noise_strides),
            USE_DOT=use_dot,
            ROWS=rows,
            TILE=TILE,
            BLOCK_D=BLOCK_D[form, h.element_size()],
            STAGES=STAGES,
            num_warps=4,
            enable_fp_fusion=True,  # not the default from Triton 3.10 on: twice the arithmetic
        )
        _exit_decision_merge_kernel[(B,)](
            *(workspace, threshold, token, confidence, lse, exit),
            *(B, num_tiles, row_stride(threshold), math.log(max(vocab_size, 2))),
            CRITERION=criterion,
            SAMPLED=temperature is not None,
            BLOCK_T=triton.next_power_of_2(num_tiles),
            num_warps=4,
        )
