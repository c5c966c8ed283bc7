"""Attention over all tokens of a clip in Triton: the forward pass. The backward pass is in backward.py.

It turns its block of queries once, before it meets the keys, which `rope3d` has turned already: turned in the loop they would
cost 41 % more instructions, and the copies their way past the registers. It leaves the turned queries for the backward pass.
The last keys, which may fill a block only in part, come first, so that the loop has no mask; peeled off after the loop, they
make ptxas wait for every product. Exponentials are powers of two, with the scale folded in.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, Rows, cdiv, constants, generation, launch, next_power_of_2, table_of
from evaat_fast.kernels.rope3d.rotate import turn_pair

LOG2E = tl.constexpr(1.4426950408889634)
TF32X3 = tl.constexpr("tf32x3")  # of the products of float32

# N queries and M keys, `groups` query heads to a key head, of which `heads` are the kernel's own; the first `prefix` tokens are
# not turned. cu: int32 [clips + 1], the limits of packed clips, which are one clip to all else, or None.
Call = namedtuple("Call", "groups heads N M prefix cu clips scale")

# What a kernel is compiled for. BLOCK_D: padded(D). CLIPS: 0, or at least as many as there are packed clips.
Shape = namedtuple("Shape", "D BLOCK_D INTERLEAVED CLIPS BLOCK_M BLOCK_N")


def blocks_of(kind, dtype, D, generation=9):
    """(queries, keys) of a block and the launch of a kernel, "forward", "keys" or "queries": the largest that leave all
    registers unspilled. float32 is multiplied in three TF32 products, whose operands take registers too.

    Forward on Hopper with heads of 64: on an H200 64 keys in three stages take 0.212 ms at N 785 and 2.44 ms at N 3137, as
    cuDNN's without a rotation does; 128 keys in two stages 0.356 and 3.46 ms.
    """
    stages = 2
    if dtype == torch.float32:
        rows, columns, warps = 64, 32, 4
    elif kind == "forward" and D <= 64 and generation == 9:
        rows, columns, warps, stages = 128, 64, 8, 3
    elif kind == "forward":
        rows, columns, warps = 128, 128 if D <= 64 else 64, 8
    elif kind == "queries":
        rows, columns, warps = 128, 64 if D <= 64 or generation >= 9 else 16, 8
    elif D > 64:
        rows, columns, warps = 32, 64, 8
    else:
        rows, columns, warps = {8: (32, 128, 8), 9: (64, 128, 8)}.get(generation, (64, 64, 8))
    return rows, columns, {"num_warps": warps, "num_stages": stages}


def padded(D):
    """Columns of a block: a power of two that the products take."""
    return max(16, next_power_of_2(D))


@triton.jit
def place(call, tokens, BLOCK: tl.constexpr, CLIPS: tl.constexpr):
    """What is this program's: (block of tokens, head, clip, first token, number of tokens, scale). With CLIPS, at least
    call.clips, the tokens are packed clips, one after the other; limits that are none make the scale NaN."""
    blocks = tl.cdiv(tokens, BLOCK)
    if CLIPS:
        blocks += call.clips  # at most: each clip may fill its last block only in part
    block, of = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if CLIPS:
        i, cu, clips = tl.arange(0, CLIPS), call.cu, call.clips
        first, last = tl.load(cu + i, mask=i < clips, other=tokens), tl.load(cu + i + 1, mask=i < clips, other=tokens)
        ordered = tl.min(((first >= 0) & (last >= first) & (last <= tokens)).to(tl.int32), 0)
        whole = (ordered == 1) & (tl.load(cu) == 0) & (tl.load(cu + clips) == tokens)
        first = tl.minimum(tl.maximum(first, 0), tokens)
        last = tl.minimum(tl.maximum(last, first), tokens)
        count = tl.cdiv(last - first, BLOCK)
        upto = tl.cumsum(count, 0)
        mine = (upto > block) & (upto - count <= block)  # one clip, or none for the programs left over
        block -= tl.sum(tl.where(mine, upto - count, 0), 0)
        start, length = tl.sum(tl.where(mine, first, 0), 0).to(tl.int64), tl.sum(tl.where(mine, last - first, 0), 0)
        return block, of, of.to(tl.int64) * 0, start, length, tl.where(whole, call.scale, float("nan"))
    else:
        return block, of % call.heads, (of // call.heads).to(tl.int64), 0, tokens, call.scale


@triton.jit
def channel(c, S, HALVES: tl.constexpr):
    """(the channel in column c of a block, whether there is one). HALVES: the pairs (i, D/2 + i) are BLOCK_D / 2 apart."""
    if HALVES and S.BLOCK_D != S.D:
        inside = c % (S.BLOCK_D // 2) < S.D // 2
        return tl.where(c < S.BLOCK_D // 2, c, c - S.BLOCK_D // 2 + S.D // 2), inside
    return c, c < S.D


@triton.jit
def load_rows(x, x_n, n, N, d, has_d, MASKED: tl.constexpr, D: tl.constexpr):
    """Rows n of [N, D], columns d, zeros beyond; without MASKED all rows are there."""
    at = x + n.to(tl.int64)[:, None] * x_n + d[None, :]
    if MASKED:
        return tl.load(at, mask=(n < N)[:, None] & has_d[None, :], other=0.0)
    if d.shape[0] != D:
        return tl.load(at, mask=has_d[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def turn(x, table, b, head, start, n, N, prefix, INVERSE: tl.constexpr, S):
    """float32 rows x of the tokens n of a clip's head, whose first is `start`, turned by their rows of the table; prefix tokens
    pass."""
    BLOCK: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    c = tl.arange(0, HALF)
    turned = ((n >= prefix) & (n < N))[:, None] & (c < S.D // 2)[None, :]
    here = table.at + b * table.b + head * table.h + start * (S.D // 2)
    row = here + (n - prefix).to(tl.int64)[:, None] * (S.D // 2) + c[None, :]
    cos, sin = tl.load(row, mask=turned, other=1.0), tl.load(row + table.half, mask=turned, other=0.0)
    if INVERSE:
        sin = -sin
    if S.INTERLEAVED:
        a, b = tl.split(tl.reshape(x, (BLOCK, HALF, 2)))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, HALF)), (0, 2, 1)))
    a, b = turn_pair(a, b, cos, sin, turned)
    if S.INTERLEAVED:
        return tl.reshape(tl.join(a, b), (BLOCK, 2 * HALF))
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BLOCK, 2 * HALF))


@triton.jit
def _block(q, k, v, k_n, v_n, n, M, d, has_d, e, m_i, l_i, acc, scale2, MASKED: tl.constexpr, D: tl.constexpr):
    """One block of keys n: (largest score so far, sum, weighted values)."""
    s = tl.dot(q, tl.trans(load_rows(k, k_n, n, M, d, has_d, MASKED, D)), input_precision=TF32X3)
    largest = tl.max(tl.where((n < M)[None, :], s * scale2, float("-inf")), 1) if MASKED else tl.max(s, 1) * scale2
    new = tl.maximum(m_i, largest, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(s * scale2 - new[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    alpha = tl.exp2(m_i - new)
    values = load_rows(v, v_n, n, M, e, e < D, MASKED, D)
    acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=TF32X3)
    return new, l_i * alpha + tl.sum(p, 1), acc


@triton.jit
def attn_forward_kernel(q, k, v, out, lse, turned_q, table, call, S):
    """Program: a block of queries of a clip's head. scale >= 0. lse: float32, natural logarithms. With a table the queries are
    turned, the keys are taken as they are; the turned queries, as the products see them, go to turned_q unless it is None.
    """
    block, h, b, start, N, scale = place(call, call.N, S.BLOCK_M, S.CLIPS)
    M = N if S.CLIPS else call.M
    head, kv_head = h.to(tl.int64), (h // call.groups).to(tl.int64)
    m = block * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    c = tl.arange(0, S.BLOCK_D)
    d, has_d = channel(c, S, table is not None and not S.INTERLEAVED)
    rows = load_rows(q.at + b * q.b + head * q.h + start * q.n, q.n, m, N, d, has_d, True, S.D)
    if table is not None:
        rows = turn(rows.to(tl.float32), table, b, head, start, m, N, call.prefix, False, S).to(rows.dtype)
        if turned_q is not None:
            at = turned_q.at + b * turned_q.b + head * turned_q.h + (start + m.to(tl.int64))[:, None] * turned_q.n + d[None, :]
            tl.store(at, rows, mask=(m < N)[:, None] & has_d[None, :])
    keys = k.at + b * k.b + kv_head * k.h + start * k.n
    values = v.at + b * v.b + kv_head * v.h + start * v.n
    scale2 = scale * LOG2E
    m_i = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    l_i, acc = tl.zeros((S.BLOCK_M,), tl.float32), tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    whole = (M - 1) // S.BLOCK_N * S.BLOCK_N  # 1 to BLOCK_N keys are left, which come first
    n = tl.arange(0, S.BLOCK_N)
    m_i, l_i, acc = _block(rows, keys, values, k.n, v.n, whole + n, M, d, has_d, c, m_i, l_i, acc, scale2, True, S.D)
    for begin in range(0, whole, S.BLOCK_N):
        m_i, l_i, acc = _block(rows, keys, values, k.n, v.n, begin + n, M, d, has_d, c, m_i, l_i, acc, scale2, False, S.D)
    at = out.at + b * out.b + head * out.h + (start + m.to(tl.int64))[:, None] * out.n + c[None, :]
    tl.store(at, (acc / l_i[:, None]).to(out.at.dtype.element_ty), mask=(m < N)[:, None] & (c < S.D)[None, :])
    tl.store(lse.at + b * lse.b + head * lse.h + start + m, (m_i + tl.log2(l_i)) / LOG2E, mask=m < N)


def shape_of(q, interleaved, cu, rows, columns):
    D, most = q.shape[-1], 0 if cu is None else max(2, next_power_of_2(len(cu) - 1))
    return constants(Shape, D, padded(D), interleaved, most, rows, columns)


def programs(call, tokens, block, B):
    return ((cdiv(tokens, block) + call.clips) * B * call.heads,)


def forward(q, k, v, out, lse, turned_q, table, prefix, interleaved, scale, cu):
    """q [B, H, N, D]; k, v [B, Hk, M, D]; out as q; lse float32 [B, H, N]; table [2, 1 or B, 1 or H, N - prefix, D/2] float32,
    or None for queries as they are; turned_q as q, which it may be, or None. The last dimension of all is contiguous. cu: int32
    [clips + 1], the first token of each clip and their total, N = M, where B = 1 and prefix = 0; or None.
    """
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    call = Call(H // Hk, H, N, M, prefix, cu, 0 if cu is None else len(cu) - 1, scale)
    rows, columns, options = blocks_of("forward", q.dtype, D, generation(q.device))
    places = [None if x is None else Rows(x, *x.stride()[:3]) for x in (q, k, v, out, lse, turned_q)]
    S = shape_of(q, interleaved, cu, rows, columns)
    launch(attn_forward_kernel, programs(call, N, rows, B), (*places, table_of(table), call, S), options | FUSED)
