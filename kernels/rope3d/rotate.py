"""rope3d in Triton: q and k in one launch, out of place or in place, on any strides with a contiguous last dimension.

A program takes BLOCK_N tokens of one clip and up to HEADS heads of q or of k. It loads its rows of the table of cosines
and sines once and turns every head with them, so that the table, which stays in L2, is read once for HEADS heads. All loads
come before the first store, which none may pass: the compiler cannot know whether the two are of one memory, and in place
they are. Programs of one clip follow one another, so that a packed projection is read and written a few clips at a time.

The table has a row per token, not per axis. At D = 64 a program reads 256 bytes of it per token from L2, beside 1,024 bytes
of four bfloat16 heads from and to DRAM. Three axis tables would fit into L1, but two more complex products per pair (8 FMA,
each of the three angles composed in float32) are as many instructions as the rotation of two heads, and cost exact angles.
"""

from collections import namedtuple
from functools import cache

import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, Rows, cdiv, constants, launch, next_power_of_2, table_of

HEADS = 4
OPTIONS = {"num_warps": 4, **FUSED}
BLOCK_ELEMENTS = 2048  # of one head in a program, of 16 bits: 16 a thread, two loads of 16 bytes; of float32 half as many
MOST_CLIPS = 65535  # of a grid's third dimension

# What a kernel is compiled for. HEADS: of a program, one where each has a table of its own. BLOCK_C: of a block's pairs, a
# power of two. EARLY: a kernel that is launched behind it with launch_pdl, and waits within, may begin once all programs have.
Shape = namedtuple("Shape", "D INTERLEAVED INVERSE HEADS BLOCK_N BLOCK_C EARLY")


@cache
def shape_of(D, interleaved, inverse, per_head, heads=HEADS, elements=BLOCK_ELEMENTS, early=False):
    """elements: of one head in a program."""
    rows = max(1, elements // next_power_of_2(D))
    return constants(Shape, D, interleaved, inverse, 1 if per_head else heads, rows, next_power_of_2(D // 2), early)


@triton.jit
def turn_pair(a, b, cos, sin, turned):
    """(a, b) by the angles of cos and sin where turned, None: everywhere; else it passes unchanged, even if it is not finite.

    Products are fused by hand: left to the compiler, which one it fuses depends on how a kernel is specialised, and a rotation
    in place differed from one out of place in the last bit.
    """
    new_a, new_b = tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)
    if turned is not None:
        new_a, new_b = tl.where(turned, new_a, a), tl.where(turned, new_b, b)
    return new_a, new_b


@triton.jit
def _load(at, USED: tl.constexpr, S):
    """What lies at pointers [BLOCK_N, channels], of whose channels the first USED are there."""
    if S.D == 2 * S.BLOCK_C:
        return tl.load(at)
    return tl.load(at, mask=tl.arange(0, at.shape[1])[None, :] < USED)


@triton.jit
def _store(at, low, high, present, USED: tl.constexpr, S):
    """low, and where pairs are not interleaved high, D/2 further on, where tokens are present."""
    mask = present[:, None]
    if S.D != 2 * S.BLOCK_C:
        mask = mask & (tl.arange(0, at.shape[1])[None, :] < USED)
    tl.store(at, low, mask=mask)
    if not S.INTERLEAVED:
        tl.store(at + S.D // 2, high, mask=mask)


@triton.jit
def _turn_heads(x, out, table, b, first_head, heads, first, N, prefix, S, TURNS: tl.constexpr):
    """Turns heads first_head .. first_head + HEADS - 1 of the BLOCK_N tokens of clip b from `first` on, or copies them."""
    # Both channels of a pair lie in one thread: interleaved rows are loaded whole, 16 bytes a thread, and split in registers.
    USED: tl.constexpr = S.D if S.INTERLEAVED else S.D // 2
    d = tl.arange(0, 2 * S.BLOCK_C if S.INTERLEAVED else S.BLOCK_C)[None, :]
    n = first + tl.arange(0, S.BLOCK_N)
    # What lies past the last head or token is loaded as the last one and not stored: a mask would cost each load its zeros.
    token = tl.minimum(n, N - 1)
    row = token.to(tl.int64)[:, None]
    rows, to = x.at + b * x.b, row * x.n + d
    # Each head is a tensor of its own: in one of three dimensions Triton 3.6 spreads lanes over heads, and every one would hold
    # the cosines of four times as many tokens.
    lows, highs = (), ()
    for i in tl.static_range(S.HEADS):
        at = rows + tl.minimum(first_head + i, heads - 1).to(tl.int64) * x.h + to
        lows = lows + (_load(at, USED, S),)
        if not S.INTERLEAVED:
            highs = highs + (_load(at + S.D // 2, USED, S),)
    if TURNS:
        # cos, sin float32 [BLOCK_N, BLOCK_C]: rows n - prefix of the table, of all heads or of the one here.
        c = tl.arange(0, S.BLOCK_C)[None, :]
        angles = table.at + b * table.b + first_head.to(tl.int64) * table.h
        angles += tl.maximum(token - prefix, 0).to(tl.int64)[:, None] * (S.D // 2) + c
        cos, sin = _load(angles, S.D // 2, S), _load(angles + table.half, S.D // 2, S)
        sin = -sin if S.INVERSE else sin
    stride = x.h if out is None else out.h
    if out is not None:
        rows, to = out.at + b * out.b, row * out.n + d
        if TURNS:
            # The prefix goes as it came, even if it is not finite; few programs have any of it, and in place none.
            if first < prefix:
                for i in tl.static_range(S.HEADS):
                    at = rows + (first_head + i).to(tl.int64) * stride + to
                    present = n < tl.where(first_head + i < heads, tl.minimum(N, prefix), 0)
                    _store(at, lows[i], lows[i] if S.INTERLEAVED else highs[i], present, USED, S)
            n = tl.where(n < prefix, N, n)
    for i in tl.static_range(S.HEADS):
        low, high = lows[i], lows[i] if S.INTERLEAVED else highs[i]
        # In place as for the load, whose address then serves again.
        h = tl.minimum(first_head + i, heads - 1) if out is None else first_head + i
        at = rows + h.to(tl.int64) * stride + to
        present = n < tl.where(first_head + i < heads, N, 0)
        if TURNS:
            if S.INTERLEAVED:
                x_a, x_b = tl.split(tl.reshape(low.to(tl.float32), (S.BLOCK_N, S.BLOCK_C, 2)))
                x_a, x_b = turn_pair(x_a, x_b, cos, sin, None)
                low = tl.reshape(tl.join(x_a, x_b), (S.BLOCK_N, 2 * S.BLOCK_C)).to(x.at.dtype.element_ty)
            else:
                x_a, x_b = turn_pair(low.to(tl.float32), high.to(tl.float32), cos, sin, None)
                low, high = x_a.to(x.at.dtype.element_ty), x_b.to(x.at.dtype.element_ty)
        _store(at, low, high, present, USED, S)


@triton.jit
def rope3d_kernel(q, k, v, out_q, out_k, out_v, table, q_heads, k_heads, N, prefix, first, clip, S):
    """q [B, q_heads, N, D] -> out_q, and k likewise; None: in place, from the token `first` on, which is the prefix. Out of
    place tokens below prefix are copied, and so is v, if not None, of as many heads as k, to out_v. clip: that of the first
    programs along the grid's third dimension."""
    if S.EARLY:
        start: tl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(start, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    n, b = first + tl.program_id(0) * S.BLOCK_N, (clip + tl.program_id(2)).to(tl.int64)
    group, q_groups, k_groups = tl.program_id(1), tl.cdiv(q_heads, S.HEADS), tl.cdiv(k_heads, S.HEADS)
    if group < q_groups:
        _turn_heads(q, out_q, table, b, group * S.HEADS, q_heads, n, N, prefix, S, True)
    elif group < q_groups + k_groups:
        _turn_heads(k, out_k, table, b, (group - q_groups) * S.HEADS, k_heads, n, N, prefix, S, True)
    else:
        if v is not None:
            _turn_heads(v, out_v, table, b, (group - q_groups - k_groups) * S.HEADS, k_heads, n, N, prefix, S, False)


def rotate(xs, outs, table, prefix_tokens, interleaved, inverse, early=False):
    """xs, outs: one to three tensors [B, H, N, D] each, outs may be xs; the third, of as many heads as the second, is copied.
    table: float32 [2, 1 or B, 1 or H, N - prefix, D/2], N > prefix. early: EARLY of `Shape`."""
    B, q_heads, N, D = xs[0].shape
    k_heads = xs[1].shape[1] if len(xs) > 1 else 0
    in_place = outs[0] is xs[0]
    first = prefix_tokens if in_place else 0
    S = shape_of(D, interleaved, inverse, table.shape[2] > 1, elements=2 * BLOCK_ELEMENTS // xs[0].element_size(), early=early)
    q_groups, k_groups = cdiv(q_heads, S.HEADS.value), cdiv(k_heads, S.HEADS.value)
    blocks, groups = cdiv(N - first, S.BLOCK_N.value), q_groups + k_groups * max(1, len(xs) - 1)
    if N == prefix_tokens and not in_place:  # the table has no rows, and the kernel reads one
        for x, out in zip(xs, outs, strict=True):
            out.copy_(x)
        return
    if B * blocks * groups == 0:
        return
    places = []
    for tensors in (xs, [None] if in_place else outs):
        rows = [x if x is None else Rows(x, *x.stride()[:3]) for x in tensors]
        places += [rows[0], rows[min(1, len(rows) - 1)], rows[2] if len(rows) > 2 else None]
    counts = (q_heads, k_heads, N, prefix_tokens, first)
    table = table_of(table)
    for clip in range(0, B, MOST_CLIPS):
        grid = (blocks, groups, min(B - clip, MOST_CLIPS))
        launch(rope3d_kernel, grid, (*places, table, *counts, clip, S), OPTIONS)
