"""rope3d in Triton: q and k in one launch, out of place or in place, on any strides with a contiguous last dimension.

A program takes BLOCK_N tokens of one clip and up to HEADS heads of q or of k. It loads its rows of the table of cosines
and sines once and turns every head with them, so that the table, which stays in L2, is read once for HEADS heads.

The table has a row per token, not per axis. At D = 64 a program reads 256 bytes of it per token from L2, beside 1,024 bytes
of four bfloat16 heads from and to DRAM. Three axis tables would fit into L1, but two more complex products per pair (8 FMA,
each of the three angles composed in float32) are as many instructions as the rotation of two heads, and cost exact angles.
"""

import triton
import triton.language as tl
from evaat_fast.kernels.launch import on, table_strides
from evaat_fast.kernels.rope3d.pair import load_pair, store_pair, turn_pair

HEADS = 4
NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of one head in a program: 16 a thread, two loads of 16 bytes in bfloat16


def block_n(head_dim):
    """Tokens of a program."""
    return max(1, BLOCK_ELEMENTS // triton.next_power_of_2(head_dim))


@triton.jit
def _turn_heads(
    x, out, x_h, x_n, out_h, out_n, table, table_half, table_h, first_head, heads, n, N, prefix,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TABLE_PER_HEAD: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Turns heads first_head .. first_head + HEADS - 1 of the tokens n of one clip."""
    BLOCK_N: tl.constexpr = n.shape[0]
    c = tl.arange(0, BLOCK_C)
    turned = (n >= prefix)[:, None]
    in_table = turned & (n < N)[:, None] & (c < D // 2)[None, :]
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
        a, b = load_pair(source, c, present, D, INTERLEAVED, BLOCK_N, BLOCK_C, False)
        a, b = turn_pair(a, b, cos, s, turned)
        store_pair(target, a, b, c, present, D, INTERLEAVED, BLOCK_N, BLOCK_C)


@triton.jit
def rope3d_kernel(
    q, k, out_q, out_k, table, table_half, table_b, table_h,
    q_b, q_h, q_n, k_b, k_h, k_n, out_q_b, out_q_h, out_q_n, out_k_b, out_k_h, out_k_n, q_heads, k_heads, N, prefix, first,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TABLE_PER_HEAD: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q [B, q_heads, N, D] -> out_q, and k likewise; tokens below first are not visited, those below prefix copied."""
    blocks = tl.cdiv(N - first, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = first + tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    table += b * table_b
    if group < q_groups:
        _turn_heads(
            q + b * q_b, out_q + b * out_q_b, q_h, q_n, out_q_h, out_q_n, table, table_half, table_h, group * HEADS, q_heads,
            n, N, prefix, D, INTERLEAVED, INVERSE, TABLE_PER_HEAD, HEADS, BLOCK_C,
        )  # fmt: skip
    else:
        _turn_heads(
            k + b * k_b, out_k + b * out_k_b, k_h, k_n, out_k_h, out_k_n, table, table_half, table_h,
            (group - q_groups) * HEADS, k_heads, n, N, prefix, D, INTERLEAVED, INVERSE, TABLE_PER_HEAD, HEADS, BLOCK_C,
        )  # fmt: skip


def rotate(xs, outs, table, prefix_tokens, interleaved, inverse):
    """xs, outs: one or two tensors [B, H, N, D] each, outs may be xs; table: float32 [2, 1 or B, 1 or H, N - prefix, D/2]."""
    (q, k), (out_q, out_k) = (xs[0], xs[-1]), (outs[0], outs[-1])
    B, q_heads, N, D = q.shape
    k_heads = k.shape[1] if len(xs) == 2 else 0
    first = prefix_tokens if out_q is q else 0
    BLOCK_N = block_n(D)
    grid = (B * triton.cdiv(N - first, BLOCK_N), triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS))
    if grid[0] * grid[1] == 0:
        return
    table_half, table_b, _ = table_strides(table)
    strides = [n for x in (q, k, out_q, out_k) for n in x.stride()[:3]]
    with on(q.device):
        rope3d_kernel[grid](
            q, k, out_q, out_k, table, table_half, table_b, table.stride(2), *strides,
            q_heads, k_heads, N, prefix_tokens, first, D=D, INTERLEAVED=interleaved, INVERSE=inverse,
            TABLE_PER_HEAD=table.shape[2] > 1, HEADS=HEADS, BLOCK_N=BLOCK_N, BLOCK_C=triton.next_power_of_2(D // 2),
            num_warps=NUM_WARPS,
        )  # fmt: skip
