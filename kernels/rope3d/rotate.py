"""rope3d in Triton: q and k in one launch, out of place or in place, on any strides with a contiguous last dimension.

A program takes BLOCK_N tokens of one clip and up to HEADS heads of q or of k. It loads its rows of the table of cosines
and sines once and turns every head with them, so that the table, which stays in L2, is read once for HEADS heads. Both
channels of a pair lie in one thread: interleaved rows are loaded whole, 16 bytes a thread, and split in registers.

The table has a row per token, not per axis. At D = 64 a program reads 256 bytes of it per token from L2, beside 1,024 bytes
of four bfloat16 heads from and to DRAM. Three axis tables would fit into L1, but two more complex products per pair (8 FMA,
each of the three angles composed in float32) are as many instructions as the rotation of two heads, and cost exact angles.
"""

import contextlib

import torch
import triton
import triton.language as tl

HEADS = 4
NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of one head in a program: 16 a thread, two loads of 16 bytes in bfloat16


def block_n(head_dim):
    """Tokens of a program."""
    return max(1, BLOCK_ELEMENTS // triton.next_power_of_2(head_dim))


@triton.jit
def _turn(a, b, cos, sin, rotated):
    # A prefix token passes unchanged, even if it is not finite.
    return tl.where(rotated, a * cos - b * sin, a), tl.where(rotated, b * cos + a * sin, b)


@triton.jit
def _heads(
    x,
    out,
    x_h,
    x_n,
    out_h,
    out_n,
    table,
    table_half,
    table_h,
    first_head,
    heads,
    n,
    N,
    prefix,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    TABLE_PER_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turns heads first_head .. first_head + HEADS - 1 of the tokens n of one clip."""
    c = tl.arange(0, BLOCK_C)
    rotated = (n >= prefix)[:, None]
    in_table = rotated & (n < N)[:, None] & (c < D // 2)[None, :]
    # cos, sin float32 [BLOCK_N, BLOCK_C]: rows n - prefix of the table, shared by the heads unless each has its own.
    row = table + (n - prefix).to(tl.int64)[:, None] * (D // 2) + c[None, :]
    if not TABLE_PER_HEAD:
        cos = tl.load(row, mask=in_table, other=0.0)
        sin = tl.load(row + table_half, mask=in_table, other=0.0)
    for i in tl.static_range(HEADS):
        h = first_head + i
        # One comparison masks both tokens and heads; the interpreter cannot combine a scalar mask with a block's.
        present = (n < tl.where(h < heads, N, 0))[:, None]
        if TABLE_PER_HEAD:
            mine = in_table & present
            cos = tl.load(row + h.to(tl.int64) * table_h, mask=mine, other=0.0)
            sin = tl.load(row + h.to(tl.int64) * table_h + table_half, mask=mine, other=0.0)
        s = -sin if INVERSE else sin
        source = x + h.to(tl.int64) * x_h + n.to(tl.int64)[:, None] * x_n
        target = out + h.to(tl.int64) * out_h + n.to(tl.int64)[:, None] * out_n
        if INTERLEAVED:
            d = tl.arange(0, 2 * BLOCK_C)[None, :]
            mask = present & (d < D)
            pairs = tl.load(source + d, mask=mask).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, (n.shape[0], BLOCK_C, 2)))
            a, b = _turn(a, b, cos, s, rotated)
            pairs = tl.reshape(tl.join(a, b), (n.shape[0], 2 * BLOCK_C))
            tl.store(target + d, pairs.to(out.dtype.element_ty), mask=mask)
        else:
            mask = present & (c < D // 2)[None, :]
            a = tl.load(source + c[None, :], mask=mask).to(tl.float32)
            b = tl.load(source + c[None, :] + D // 2, mask=mask).to(tl.float32)
            a, b = _turn(a, b, cos, s, rotated)
            tl.store(target + c[None, :], a.to(out.dtype.element_ty), mask=mask)
            tl.store(target + c[None, :] + D // 2, b.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rope3d_kernel(
    q,
    k,
    out_q,
    out_k,
    table,
    table_half,
    table_b,
    table_h,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    out_q_b,
    out_q_h,
    out_q_n,
    out_k_b,
    out_k_h,
    out_k_n,
    q_heads,
    k_heads,
    N,
    prefix,
    first,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    TABLE_PER_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """q [B, q_heads, N, D] -> out_q, and k likewise; tokens below first are not visited, those below prefix copied."""
    blocks = tl.cdiv(N - first, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = first + tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    table += b * table_b
    if group < q_groups:
        _heads(
            q + b * q_b,
            out_q + b * out_q_b,
            q_h,
            q_n,
            out_q_h,
            out_q_n,
            table,
            table_half,
            table_h,
            group * HEADS,
            q_heads,
            n,
            N,
            prefix,
            D,
            INTERLEAVED,
            INVERSE,
            TABLE_PER_HEAD,
            HEADS,
            BLOCK_C,
        )
    else:
        _heads(
            k + b * k_b,
            out_k + b * out_k_b,
            k_h,
            k_n,
            out_k_h,
            out_k_n,
            table,
            table_half,
            table_h,
            (group - q_groups) * HEADS,
            k_heads,
            n,
            N,
            prefix,
            D,
            INTERLEAVED,
            INVERSE,
            TABLE_PER_HEAD,
            HEADS,
            BLOCK_C,
        )


def rotate(xs, outs, table, prefix_tokens, interleaved, inverse):
    """xs, outs: one or two tensors [B, H, N, D] each, outs may be xs; table: as `ops.freqs.table_of` makes it."""
    q, out_q = xs[0], outs[0]
    k, out_k = xs[-1], outs[-1]
    B, q_heads, N, D = q.shape
    k_heads = k.shape[1] if len(xs) == 2 else 0
    first = prefix_tokens if out_q is q else 0
    BLOCK_N = block_n(D)
    grid = (B * triton.cdiv(N - first, BLOCK_N), triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS))
    if grid[0] * grid[1] == 0:
        return
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        rope3d_kernel[grid](
            q,
            k,
            out_q,
            out_k,
            table,
            table.stride(0),
            table.stride(1) if table.shape[1] > 1 else 0,
            table.stride(2),
            *q.stride()[:3],
            *k.stride()[:3],
            *out_q.stride()[:3],
            *out_k.stride()[:3],
            q_heads,
            k_heads,
            N,
            prefix_tokens,
            first,
            D=D,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            TABLE_PER_HEAD=table.shape[2] > 1,
            HEADS=HEADS,
            BLOCK_N=BLOCK_N,
            BLOCK_C=triton.next_power_of_2(D // 2),
            num_warps=NUM_WARPS,
        )
