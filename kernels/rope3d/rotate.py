"""rope3d in Triton: q and k in one launch, out of place or in place, on any strides with a contiguous last dimension.

A program takes BLOCK_N tokens of one clip and up to HEADS heads of q or of k. It loads its rows of the table of cosines
and sines once and turns every head with them, so that the table, which stays in L2, is read once for HEADS heads.

The table has a row per token, not per axis. At D = 64 a program reads 256 bytes of it per token from L2, beside 1,024 bytes
of four bfloat16 heads from and to DRAM. Three axis tables would fit into L1, but two more complex products per pair (8 FMA,
each of the three angles composed in float32) are as many instructions as the rotation of two heads, and cost exact angles.
"""

from collections import namedtuple

import triton
import triton.language as tl
from evaat_fast.kernels.launch import Rows, constants, on, table_of

HEADS = 4
NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of one head in a program: 16 a thread, two loads of 16 bytes in bfloat16

# What a kernel is compiled for. BLOCK_C: of a block's pairs, a power of two.
Shape = namedtuple("Shape", "D INTERLEAVED INVERSE TABLE_PER_HEAD HEADS BLOCK_N BLOCK_C")


def shape_of(D, interleaved, inverse, per_head, heads=HEADS, elements=BLOCK_ELEMENTS):
    """elements: of one head in a program."""
    rows = max(1, elements // triton.next_power_of_2(D))
    return constants(Shape, D, interleaved, inverse, per_head, heads, rows, triton.next_power_of_2(D // 2))


@triton.jit
def turn_pair(a, b, cos, sin, turned):
    """(a, b) by the angles of cos and sin where turned; elsewhere it passes unchanged, even if it is not finite.

    Products are fused by hand: left to the compiler, which one it fuses depends on how a kernel is specialised, and a rotation
    in place differed from one out of place in the last bit.
    """
    new_a, new_b = tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)
    return tl.where(turned, new_a, a), tl.where(turned, new_b, b)


@triton.jit
def load_pair(row, c, present, S, OTHER: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_C] twice: channels c of rows, pointers [BLOCK_N, 1] to D channels each, and OTHER, or None for
    anything, where they are not present. Both channels of a pair lie in one thread: interleaved rows are loaded whole, 16 bytes
    a thread, and split in registers."""
    if S.INTERLEAVED:
        d = tl.arange(0, 2 * S.BLOCK_C)[None, :]
        x = tl.load(row + d, mask=present & (d < S.D), other=OTHER)
        return tl.split(tl.reshape(x.to(tl.float32), (S.BLOCK_N, S.BLOCK_C, 2)))
    at, mask = row + c[None, :], present & (c < S.D // 2)[None, :]
    a, b = tl.load(at, mask=mask, other=OTHER), tl.load(at + S.D // 2, mask=mask, other=OTHER)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pair(row, a, b, c, present, S):
    """What `load_pair` loads, back to memory."""
    kind = row.dtype.element_ty
    if S.INTERLEAVED:
        d = tl.arange(0, 2 * S.BLOCK_C)[None, :]
        tl.store(row + d, tl.reshape(tl.join(a, b), (S.BLOCK_N, 2 * S.BLOCK_C)).to(kind), mask=present & (d < S.D))
    else:
        at, mask = row + c[None, :], present & (c < S.D // 2)[None, :]
        tl.store(at, a.to(kind), mask=mask)
        tl.store(at + S.D // 2, b.to(kind), mask=mask)


@triton.jit
def _turn_heads(x, out, of_clip, table, b, first_head, heads, n, N, prefix, S):
    """Turns heads first_head .. first_head + HEADS - 1 of the tokens n of clip b. of_clip: its part of the table."""
    rows, to = x.at + b * x.b, out.at + b * out.b
    c = tl.arange(0, S.BLOCK_C)
    turned = (n >= prefix)[:, None]
    in_table = turned & (n < N)[:, None] & (c < S.D // 2)[None, :]
    # cos, sin float32 [BLOCK_N, BLOCK_C]: rows n - prefix of the table, shared by the heads unless each has its own.
    row = of_clip + (n - prefix).to(tl.int64)[:, None] * (S.D // 2) + c[None, :]
    if not S.TABLE_PER_HEAD:
        cos = tl.load(row, mask=in_table, other=0.0)
        sin = tl.load(row + table.half, mask=in_table, other=0.0)
    for i in tl.static_range(S.HEADS):
        h = first_head + i
        # One comparison masks both tokens and heads; the interpreter cannot combine a scalar mask with a block's.
        present = (n < tl.where(h < heads, N, 0))[:, None]
        if S.TABLE_PER_HEAD:
            mine = in_table & present
            cos = tl.load(row + h.to(tl.int64) * table.h, mask=mine, other=0.0)
            sin = tl.load(row + h.to(tl.int64) * table.h + table.half, mask=mine, other=0.0)
        s = -sin if S.INVERSE else sin
        source = rows + h.to(tl.int64) * x.h + n.to(tl.int64)[:, None] * x.n
        target = to + h.to(tl.int64) * out.h + n.to(tl.int64)[:, None] * out.n
        x_a, x_b = load_pair(source, c, present, S, None)
        x_a, x_b = turn_pair(x_a, x_b, cos, s, turned)
        store_pair(target, x_a, x_b, c, present, S)


@triton.jit
def rope3d_kernel(q, k, out_q, out_k, table, q_heads, k_heads, N, prefix, first, S):
    """q [B, q_heads, N, D] -> out_q, and k likewise; tokens below first are not visited, those below prefix copied."""
    blocks = tl.cdiv(N - first, S.BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = first + tl.program_id(0) % blocks * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, S.HEADS)
    of_clip = table.at + b * table.b
    if group < q_groups:
        _turn_heads(q, out_q, of_clip, table, b, group * S.HEADS, q_heads, n, N, prefix, S)
    else:
        _turn_heads(k, out_k, of_clip, table, b, (group - q_groups) * S.HEADS, k_heads, n, N, prefix, S)


def rotate(xs, outs, table, prefix_tokens, interleaved, inverse):
    """xs, outs: one or two tensors [B, H, N, D] each, outs may be xs; table: float32 [2, 1 or B, 1 or H, N - prefix, D/2]."""
    (q, k), (out_q, out_k) = (xs[0], xs[-1]), (outs[0], outs[-1])
    B, q_heads, N, D = q.shape
    k_heads = k.shape[1] if len(xs) == 2 else 0
    first = prefix_tokens if out_q is q else 0
    S = shape_of(D, interleaved, inverse, table.shape[2] > 1)
    grid = (B * triton.cdiv(N - first, S.BLOCK_N.value), triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS))
    if grid[0] * grid[1] == 0:
        return
    places = [Rows(x, *x.stride()[:3]) for x in (q, k, out_q, out_k)]
    with on(q.device):
        counts = (q_heads, k_heads, N, prefix_tokens, first)
        rope3d_kernel[grid](*places, table_of(table), *counts, S, num_warps=NUM_WARPS)
