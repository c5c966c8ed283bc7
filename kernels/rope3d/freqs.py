"""rope3d's backward pass with learnable frequencies in Triton.

The backward pass is the rotation of `rotate.py` that reads, beside each gradient, what the forward pass turned. For a pair
(a, b) and its gradient (ga, gb) a program sums a ga + b gb and a gb - b ga over its heads in float32, then the slopes of the
angles, times the tokens' positions, over its tokens in float64: one sum a program, so that the order never changes.
"""

import triton
import triton.language as tl
from evaat_fast.kernels.launch import Rows, cdiv, launch, table_of
from evaat_fast.kernels.rope3d.rotate import BLOCK_ELEMENTS, HEADS, OPTIONS, shape_of, turn_pair


def shape_with_freqs(D, interleaved, inverse, per_head):
    """Half as many tokens a program as the rotation alone takes, at which registers would spill or halve occupancy."""
    return shape_of(D, interleaved, inverse, per_head, 1 if per_head else HEADS, BLOCK_ELEMENTS // 2)


@triton.jit
def load_pair(row, c, present, S):
    """float32 [BLOCK_N, BLOCK_C] twice: channels c of rows, pointers [BLOCK_N, 1] to D channels each, and 0 where they are not
    present. Both channels of a pair lie in one thread: interleaved rows are loaded whole, 16 bytes a thread, and split in
    registers."""
    if S.INTERLEAVED:
        d = tl.arange(0, 2 * S.BLOCK_C)[None, :]
        x = tl.load(row + d, mask=present & (d < S.D), other=0.0)
        return tl.split(tl.reshape(x.to(tl.float32), (S.BLOCK_N, S.BLOCK_C, 2)))
    at, mask = row + c[None, :], present & (c < S.D // 2)[None, :]
    a, b = tl.load(at, mask=mask, other=0.0), tl.load(at + S.D // 2, mask=mask, other=0.0)
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
def _slopes(grad, out, x, cos, sin, turned, b, first_head, heads, n, N, S):
    """Rotates the gradients of heads first_head .. first_head + HEADS - 1; returns the slopes of the angles, float64."""
    c = tl.arange(0, S.BLOCK_C)
    dot = tl.zeros((S.BLOCK_N, S.BLOCK_C), tl.float32)
    cross = tl.zeros((S.BLOCK_N, S.BLOCK_C), tl.float32)
    row = n.to(tl.int64)[:, None]
    for i in tl.static_range(S.HEADS):
        h = (first_head + i).to(tl.int64)
        present = (n < tl.where(h < heads, N, 0))[:, None]
        ga, gb = load_pair(grad.at + b * grad.b + h * grad.h + row * grad.n, c, present, S)
        x_a, x_b = load_pair(x.at + b * x.b + h * x.h + row * x.n, c, present, S)
        new_a, new_b = turn_pair(ga, gb, cos.to(tl.float32), sin.to(tl.float32), turned)
        store_pair(out.at + b * out.b + h * out.h + row * out.n, new_a, new_b, c, present, S)
        # Fused by hand, as in `turn_pair`: the packed gradient agrees with the other to the last bit.
        dot = tl.fma(x_a, ga, tl.fma(x_b, gb, dot))
        cross = tl.fma(x_a, gb, tl.fma(-x_b, ga, cross))
    # Prefix tokens may not be finite, which a zero would not hide.
    return tl.where(turned, cos * cross.to(tl.float64) + sin * dot.to(tl.float64), 0.0)


@triton.jit
def rope3d_freqs_kernel(grads, outs, xs, table, positions, positions_b, partial, q_heads, k_heads, N, prefix, S):
    """grads, outs, xs: of q and of k. Others as `rotate_with_freqs` has them."""
    blocks = tl.cdiv(N, S.BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, S.HEADS)
    is_q = group < q_groups
    first_head = tl.where(is_q, group, group - q_groups) * S.HEADS
    c = tl.arange(0, S.BLOCK_C)
    turned = (n >= prefix)[:, None]
    in_table = turned & (n < N)[:, None] & (c < S.D // 2)[None, :]
    at = (n - prefix).to(tl.int64)
    # The stride of heads is zero where all share a table, else HEADS is one.
    row = table.at + b * table.b + first_head.to(tl.int64) * table.h + at[:, None] * (S.D // 2) + c[None, :]
    cos = tl.load(row, mask=in_table, other=0.0)
    sin = tl.load(row + table.half, mask=in_table, other=0.0)
    if S.INVERSE:
        sin = -sin
    if is_q:
        slopes = _slopes(grads[0], outs[0], xs[0], cos, sin, turned, b, first_head, q_heads, n, N, S)
    else:
        slopes = _slopes(grads[1], outs[1], xs[1], cos, sin, turned, b, first_head, k_heads, n, N, S)
    sums = partial + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * 3 * (S.D // 2)
    for axis in tl.static_range(3):
        where = positions + b * positions_b + at * 3 + axis
        position = tl.load(where, mask=(n >= prefix) & (n < N), other=0.0).to(tl.float64)
        tl.store(sums + axis * (S.D // 2) + c, tl.sum(position[:, None] * slopes, 0), mask=c < S.D // 2)


def programs(grads, per_head):
    """(blocks of tokens, blocks of heads): each has a partial sum of the slopes."""
    B, _, N, D = grads[0].shape
    S = shape_with_freqs(D, True, True, per_head)
    return B * cdiv(N, S.BLOCK_N.value), sum(cdiv(x.shape[1], S.HEADS.value) for x in grads)


def rotate_with_freqs(grads, outs, xs, partial, table, positions, prefix_tokens, interleaved, inverse):
    """Writes the turned grads to outs, and to partial, float64 [*programs, 3, D/2], the sums of the slopes.

    grads, outs, xs: one or two tensors [B, H, N, D] each. table: float64 [2, 1 or B, 1 or H, N - prefix, D/2]. positions:
    float32 [1 or B, N - prefix, 3].
    """
    _, q_heads, N, D = grads[0].shape
    k_heads, per_head = grads[1].shape[1] if len(grads) == 2 else 0, table.shape[2] > 1
    pairs = [tuple(Rows(x, *x.stride()[:3]) for x in (both[0], both[-1])) for both in (grads, outs, xs)]
    places = (table_of(table), positions, positions.stride(0) if positions.shape[0] > 1 else 0, partial)
    S = shape_with_freqs(D, interleaved, inverse, per_head)
    counts = (q_heads, k_heads, N, prefix_tokens)
    launch(rope3d_freqs_kernel, programs(grads, per_head), (*pairs, *places, *counts, S), OPTIONS)
