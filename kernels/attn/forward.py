"""Attention over all tokens of a clip in Triton: the forward pass. The backward pass is in attn_backward.py.

It turns its block of queries once, before it meets the keys, which `rope3d` has turned already: turned in the loop they would
cost 41 % more instructions, and the copies their way past the registers. It leaves the turned queries for the backward pass.
The last keys, which may fill a block only in part, come first, so that the loop has no mask; peeled off after the loop, they
make ptxas wait for every product. Exponentials are powers of two, with the scale folded in.
"""

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import generation, on, table_strides
from evaat_fast.kernels.rope3d.pair import turn_pair

LOG2E = tl.constexpr(1.4426950408889634)


def blocks_of(kind, dtype, D, generation=9):
    """Blocks and launch of a kernel, "forward", "keys", "queries" or "both" (keys, and sums for queries): the largest that
    leave all registers unspilled. float32 is multiplied in three TF32 products, whose operands take registers too.

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
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": stages}


def padded(D):
    """Columns of a block: a power of two that the products take."""
    return max(16, triton.next_power_of_2(D))


@triton.jit
def place(cu, clips, heads, N, scale, BLOCK: tl.constexpr, CLIPS: tl.constexpr):
    """What is this program's: (block of tokens, head, clip, first token, number of tokens, scale). With CLIPS, at least
    `clips`, the N tokens are packed clips, one after the other, with the limits cu; limits that are none make the scale NaN."""
    blocks = tl.cdiv(N, BLOCK)
    if CLIPS:
        blocks += clips  # at most: each clip may fill its last block only in part
    block, of = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if CLIPS:
        i = tl.arange(0, CLIPS)
        first, last = tl.load(cu + i, mask=i < clips, other=N), tl.load(cu + i + 1, mask=i < clips, other=N)
        ordered = tl.min(((first >= 0) & (last >= first) & (last <= N)).to(tl.int32), 0)
        whole = (ordered == 1) & (tl.load(cu) == 0) & (tl.load(cu + clips) == N)
        first = tl.minimum(tl.maximum(first, 0), N)
        last = tl.minimum(tl.maximum(last, first), N)
        count = tl.cdiv(last - first, BLOCK)
        upto = tl.cumsum(count, 0)
        mine = (upto > block) & (upto - count <= block)  # one clip, or none for the programs left over
        block -= tl.sum(tl.where(mine, upto - count, 0), 0)
        start, length = tl.sum(tl.where(mine, first, 0), 0).to(tl.int64), tl.sum(tl.where(mine, last - first, 0), 0)
        return block, of, of.to(tl.int64) * 0, start, length, tl.where(whole, scale, float("nan"))
    else:
        return block, of % heads, (of // heads).to(tl.int64), 0, N, scale


@triton.jit
def channel(c, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """(the channel in column c of a block, whether there is one). HALVES: the pairs (i, D/2 + i) are BLOCK_D / 2 apart."""
    if HALVES and BLOCK_D != D:
        inside = c % (BLOCK_D // 2) < D // 2
        return tl.where(c < BLOCK_D // 2, c, c - BLOCK_D // 2 + D // 2), inside
    return c, c < D


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
def turn(x, table, table_half, n, N, prefix, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr):
    """float32 rows x of the tokens n, turned by their rows of the table; prefix tokens pass."""
    BLOCK: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    c = tl.arange(0, HALF)
    turned = ((n >= prefix) & (n < N))[:, None] & (c < D // 2)[None, :]
    row = table + (n - prefix).to(tl.int64)[:, None] * (D // 2) + c[None, :]
    cos, sin = tl.load(row, mask=turned, other=1.0), tl.load(row + table_half, mask=turned, other=0.0)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(x, (BLOCK, HALF, 2)))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, HALF)), (0, 2, 1)))
    a, b = turn_pair(a, b, cos, sin, turned)
    if INTERLEAVED:
        return tl.reshape(tl.join(a, b), (BLOCK, 2 * HALF))
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BLOCK, 2 * HALF))


@triton.jit
def _block(
    q, k, v, k_n, v_n, n, M, d, has_d, e, m_i, l_i, acc, scale2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of keys n: (largest score so far, sum, weighted values)."""
    s = tl.dot(q, tl.trans(load_rows(k, k_n, n, M, d, has_d, MASKED, D)), input_precision=PRECISION)
    largest = tl.max(tl.where((n < M)[None, :], s * scale2, float("-inf")), 1) if MASKED else tl.max(s, 1) * scale2
    new = tl.maximum(m_i, largest, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(s * scale2 - new[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    alpha = tl.exp2(m_i - new)
    values = load_rows(v, v_n, n, M, e, e < D, MASKED, D)
    acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
    return new, l_i * alpha + tl.sum(p, 1), acc


@triton.jit
def attn_forward_kernel(
    q, k, v, out, lse, turned_q, table, cu,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, turned_b, turned_h, turned_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, clips, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, CLIPS: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: a block of queries of a clip's head. scale >= 0. lse: float32, natural logarithms. With ROPE the queries are
    turned, the keys are taken as they are; with KEEP the turned queries, as the products see them, go to turned_q. groups:
    query heads of a key head. CLIPS, cu: see `place`; the tokens of packed clips are one clip's to all else.
    """
    block, h, b, start, length, scale = place(cu, clips, heads, N, scale, BLOCK_M, CLIPS)
    if CLIPS:
        N = length
        M = length
    head, kv_head = h.to(tl.int64), (h // groups).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)
    d, has_d = channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    rows = load_rows(q + b * q_b + head * q_h + start * q_n, q_n, m, N, d, has_d, True, D)
    if ROPE:
        here = table + b * table_b + head * table_h + start * (D // 2)
        rows = turn(rows.to(tl.float32), here, table_half, m, N, prefix, False, INTERLEAVED, D).to(rows.dtype)
        if KEEP:
            at = turned_q + b * turned_b + head * turned_h + (start + m.to(tl.int64))[:, None] * turned_n + d[None, :]
            tl.store(at, rows, mask=(m < N)[:, None] & has_d[None, :])
    k += b * k_b + kv_head * k_h + start * k_n
    v += b * v_b + kv_head * v_h + start * v_n
    scale2 = scale * LOG2E
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i, acc = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = (M - 1) // BLOCK_N * BLOCK_N  # 1 to BLOCK_N keys are left, which come first
    n = tl.arange(0, BLOCK_N)
    m_i, l_i, acc = _block(
        rows, k, v, k_n, v_n, whole + n, M, d, has_d, c, m_i, l_i, acc, scale2, True, PRECISION, D
    )  # fmt: skip
    for begin in range(0, whole, BLOCK_N):
        m_i, l_i, acc = _block(
            rows, k, v, k_n, v_n, begin + n, M, d, has_d, c, m_i, l_i, acc, scale2, False, PRECISION, D
        )  # fmt: skip
    at = out + b * out_b + head * out_h + (start + m.to(tl.int64))[:, None] * out_n + c[None, :]
    tl.store(at, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=(m < N)[:, None] & (c < D)[None, :])
    tl.store(lse + b * lse_b + head * lse_h + start + m, (m_i + tl.log2(l_i)) / LOG2E, mask=m < N)


def launch_options(kind, q, table, interleaved, cu):
    D = q.shape[-1]
    shape = dict(D=D, BLOCK_D=padded(D), ROPE=table is not None, INTERLEAVED=interleaved, PRECISION="tf32x3")
    most = 0 if cu is None else max(2, triton.next_power_of_2(count_clips(cu)))
    return shape | blocks_of(kind, q.dtype, D, generation(q.device)) | {"CLIPS": most}


def count_clips(cu):
    return 0 if cu is None else cu.shape[0] - 1


def programs(tokens, block, heads, B, cu):
    return ((triton.cdiv(tokens, block) + count_clips(cu)) * B * heads,)


def forward(q, k, v, out, lse, turned_q, table, prefix, interleaved, scale, cu):
    """q [B, H, N, D]; k, v [B, Hk, M, D]; out as q; lse float32 [B, H, N]; table [2, 1 or B, 1 or H, N - prefix, D/2] float32,
    or None for queries as they are; turned_q as q, which it may be, or None. The last dimension of all is contiguous. cu: int32
    [clips + 1], the first token of each clip and their total, N = M, where B = 1 and prefix = 0; or None.
    """
    (B, H, N, _), (_, Hk, M, _) = q.shape, k.shape
    options = launch_options("forward", q, table, interleaved, cu)
    kept, turns = q if turned_q is None else turned_q, (0, 0, 0) if table is None else table_strides(table)
    strides = [n for x in (q, k, v, out, kept) for n in x.stride()[:3]]
    with on(q.device):
        attn_forward_kernel[programs(N, options["BLOCK_M"], H, B, cu)](
            q, k, v, out, lse, kept, lse if table is None else table, lse if cu is None else cu, *strides, *lse.stride()[:2],
            *turns, H // Hk, H, N, M, prefix, count_clips(cu), scale, KEEP=turned_q is not None, **options,
        )  # fmt: skip
