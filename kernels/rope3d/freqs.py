"""rope3d's backward pass with learnable frequencies in Triton.

The backward pass is the rotation of `rope3d.py` that reads, beside each gradient, what the forward pass turned. For a pair
(a, b) and its gradient (ga, gb) a program sums a ga + b gb and a gb - b ga over its heads in float32, then the slopes of the
angles, times the tokens' positions, over its tokens in float64: one sum a program, so that the order never changes.
"""

import triton
import triton.language as tl
from evaat_fast.kernels.launch import on, table_strides
from evaat_fast.kernels.rope3d.pair import load_pair, store_pair, turn_pair
from evaat_fast.kernels.rope3d.rotate import HEADS, NUM_WARPS, block_n


def tokens(head_dim):
    """Tokens of a program: half as many as the rotation alone takes, at which registers would spill or halve occupancy."""
    return max(1, block_n(head_dim) // 2)


@triton.jit
def _slopes(
    grad, out, x, grad_h, grad_n, out_h, out_n, x_h, x_n, cos, sin, turned, first_head, heads, n, N,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rotates the gradients of heads first_head .. first_head + HEADS - 1; returns the slopes of the angles, float64."""
    c = tl.arange(0, BLOCK_C)
    dot = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    cross = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    row = n.to(tl.int64)[:, None]
    for i in tl.static_range(HEADS):
        h = (first_head + i).to(tl.int64)
        present = (n < tl.where(h < heads, N, 0))[:, None]
        ga, gb = load_pair(grad + h * grad_h + row * grad_n, c, present, D, INTERLEAVED, BLOCK_N, BLOCK_C, True)
        a, b = load_pair(x + h * x_h + row * x_n, c, present, D, INTERLEAVED, BLOCK_N, BLOCK_C, True)
        new_a, new_b = turn_pair(ga, gb, cos.to(tl.float32), sin.to(tl.float32), turned)
        store_pair(out + h * out_h + row * out_n, new_a, new_b, c, present, D, INTERLEAVED, BLOCK_N, BLOCK_C)
        # Fused by hand, as in `turn_pair`: the packed gradient agrees with the other to the last bit.
        dot = tl.fma(a, ga, tl.fma(b, gb, dot))
        cross = tl.fma(a, gb, tl.fma(-b, ga, cross))
    # Prefix tokens may not be finite, which a zero would not hide.
    return tl.where(turned, cos * cross.to(tl.float64) + sin * dot.to(tl.float64), 0.0)


@triton.jit
def rope3d_freqs_kernel(
    grad_q, grad_k, out_q, out_k, x_q, x_k, table, positions, partial, table_half, table_b, table_h, positions_b,
    grad_q_b, grad_q_h, grad_q_n, grad_k_b, grad_k_h, grad_k_n, out_q_b, out_q_h, out_q_n, out_k_b, out_k_h, out_k_n,
    x_q_b, x_q_h, x_q_n, x_k_b, x_k_h, x_k_n, q_heads, k_heads, N, prefix,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """table: float64; positions: float32 [.., N - prefix, 3]; partial: float64 [programs, groups of heads, 3, D/2]."""
    blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    is_q = group < q_groups
    first_head = tl.where(is_q, group, group - q_groups) * HEADS
    c = tl.arange(0, BLOCK_C)
    turned = (n >= prefix)[:, None]
    in_table = turned & (n < N)[:, None] & (c < D // 2)[None, :]
    at = (n - prefix).to(tl.int64)
    # table_h is zero where all heads share a table, else HEADS is one.
    row = table + b * table_b + first_head.to(tl.int64) * table_h + at[:, None] * (D // 2) + c[None, :]
    cos = tl.load(row, mask=in_table, other=0.0)
    sin = tl.load(row + table_half, mask=in_table, other=0.0)
    if INVERSE:
        sin = -sin
    if is_q:
        slopes = _slopes(
            grad_q + b * grad_q_b, out_q + b * out_q_b, x_q + b * x_q_b, grad_q_h, grad_q_n, out_q_h, out_q_n, x_q_h, x_q_n,
            cos, sin, turned, first_head, q_heads, n, N, D, INTERLEAVED, HEADS, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    else:
        slopes = _slopes(
            grad_k + b * grad_k_b, out_k + b * out_k_b, x_k + b * x_k_b, grad_k_h, grad_k_n, out_k_h, out_k_n, x_k_h, x_k_n,
            cos, sin, turned, first_head, k_heads, n, N, D, INTERLEAVED, HEADS, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    sums = partial + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * 3 * (D // 2)
    for axis in tl.static_range(3):
        where = positions + b * positions_b + at * 3 + axis
        position = tl.load(where, mask=(n >= prefix) & (n < N), other=0.0).to(tl.float64)
        tl.store(sums + axis * (D // 2) + c, tl.sum(position[:, None] * slopes, 0), mask=c < D // 2)


def programs(grads, per_head):
    """(blocks of tokens, blocks of heads): each has a partial sum of the slopes."""
    B, _, N, D = grads[0].shape
    heads = 1 if per_head else HEADS
    return B * triton.cdiv(N, tokens(D)), sum(triton.cdiv(x.shape[1], heads) for x in grads)


def rotate_with_freqs(grads, outs, xs, partial, table, positions, prefix_tokens, interleaved, inverse):
    """Writes the turned grads to outs, and to partial, float64 [*programs, 3, D/2], the sums of the slopes.

    grads, outs, xs: one or two tensors [B, H, N, D] each. table: float64 [2, 1 or B, 1 or H, N - prefix, D/2]. positions:
    float32 [1 or B, N - prefix, 3].
    """
    _, q_heads, N, D = grads[0].shape
    k_heads = grads[1].shape[1] if len(grads) == 2 else 0
    per_head = table.shape[2] > 1
    heads = 1 if per_head else HEADS
    pairs = [x for both in (grads, outs, xs) for x in (both[0], both[-1])]
    strides = [s for x in pairs for s in x.stride()[:3]]
    positions_b = positions.stride(0) if positions.shape[0] > 1 else 0
    with on(table.device):
        rope3d_freqs_kernel[programs(grads, per_head)](
            *pairs, table, positions, partial, *table_strides(table), positions_b, *strides, q_heads, k_heads, N, prefix_tokens,
            D=D, INTERLEAVED=interleaved, INVERSE=inverse, HEADS=heads, BLOCK_N=tokens(D),
            BLOCK_C=triton.next_power_of_2(D // 2), num_warps=NUM_WARPS,
        )  # fmt: skip
