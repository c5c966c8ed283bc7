"""The backward pass of `attn.py` in Triton: in two passes that add nothing up in memory, or in one that adds up dQ.

In two passes (a block of keys against all queries, a block of queries against all keys) the scores are computed twice, and two
runs agree to the last bit. In one pass the program of a block of keys adds its share of dQ to float32 sums in memory, in no
fixed order: on Hopper with the copy engine's reduction, elsewhere with atomics. Gradients are turned back while still float32.
"""

import triton
import triton.language as tl
from evaat_fast.kernels.attn.forward import (
    LOG2E,
    channel,
    count_clips,
    launch_options,
    load_rows,
    padded,
    place,
    programs,
    table_strides,
    turn,
)
from evaat_fast.kernels.launch import generation, on
from triton.tools.tensor_descriptor import TensorDescriptor

NOTHING, ATOMIC, COPY = (tl.constexpr(i) for i in range(3))


@triton.jit
def _probability(s, scale, level):
    """exp(s * scale - level), with both factors folded: an instruction less for each score."""
    return tl.exp2(s * (scale * LOG2E) - level * LOG2E)


@triton.jit
def attn_delta_kernel(
    out, grad, grad_lse, delta, out_b, out_h, out_n, grad_b, grad_h, grad_n, lse_b, lse_h, heads, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OF_LSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta: float32 as lse, sum over D of out * grad, less the gradient of lse."""
    block, of = tl.program_id(0) % tl.cdiv(N, BLOCK_M), tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    h, b = of % heads, (of // heads).to(tl.int64)
    head, c = h.to(tl.int64), tl.arange(0, BLOCK_D)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_rows(out + b * out_b + head * out_h, out_n, m, N, c, c < D, True, D).to(tl.float32)
    y = load_rows(grad + b * grad_b + head * grad_h, grad_n, m, N, c, c < D, True, D).to(tl.float32)
    total, at = tl.sum(x * y, 1), b * lse_b + head * lse_h + m
    if OF_LSE:
        total -= tl.load(grad_lse + at, mask=m < N, other=0.0)
    tl.store(delta + at, total, mask=m < N)


@triton.jit
def attn_keys_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, sums, table, cu,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, gk_b, gk_h, gk_n, gv_b, gv_h, gv_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, clips, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, CLIPS: tl.constexpr,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: the gradients of a block of keys and values; heads: of the keys. q: turned. With ROPE the keys' gradient is
    turned back. Queries beyond the end have lse = inf, a probability of 0; keys beyond need no mask, as each key's gradients
    are its own. ADD: what the block contributes to the queries' gradient is added to sums, float32 [B * H, N, BLOCK_D], ATOMIC
    to memory or by COPY through a descriptor of blocks [1, BLOCK_M, BLOCK_D].
    """
    block, h, b, start, length, scale = place(cu, clips, heads, M, scale, BLOCK_N, CLIPS)
    total = N
    if CLIPS:
        N = length
        M = length
    head, c = h.to(tl.int64), tl.arange(0, BLOCK_D)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d, has_d = channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    keys = load_rows(k + b * k_b + head * k_h + start * k_n, k_n, n, M, d, has_d, True, D)
    values = load_rows(v + b * v_b + head * v_h + start * v_n, v_n, n, M, c, c < D, True, D)
    of_keys, of_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(groups):
        mine = head * groups + g
        from_q, from_grad = q + b * q_b + mine * q_h, grad + b * grad_b + mine * grad_h
        of_row = b * lse_b + mine * lse_h + start
        at = start + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
        at_q, at_grad = from_q + at * q_n + d[None, :], from_grad + at * grad_n + c[None, :]
        for begin in range(0, N, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            there = (m < N)[:, None]
            queries = tl.load(at_q, mask=there & has_d[None, :], other=0.0)
            upper = tl.load(at_grad, mask=there & (c < D)[None, :], other=0.0)
            at_q += BLOCK_M * q_n
            at_grad += BLOCK_M * grad_n
            level = tl.load(lse + of_row + m, mask=m < N, other=float("inf"))
            minus = tl.load(delta + of_row + m, mask=m < N, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            p = _probability(s, scale, level[None, :])
            of_values = tl.dot(p.to(upper.dtype), upper, of_values, input_precision=PRECISION)
            ds = p * (tl.dot(values, tl.trans(upper), input_precision=PRECISION) - minus[None, :])
            of_keys = tl.dot(ds.to(queries.dtype), queries, of_keys, input_precision=PRECISION)
            if ADD != NOTHING:
                row = (b * heads * groups + mine).to(tl.int32)
                if ADD == COPY and CLIPS:  # what is not finite in a clip must not reach the next one's rows
                    ds = tl.where((m < N)[None, :], ds, 0.0)
                share = tl.dot(tl.trans(ds.to(keys.dtype)), keys, input_precision=PRECISION)
                if ADD == COPY:
                    sums.atomic_add([row, (start + begin).to(tl.int32), 0], tl.reshape(share, (1, BLOCK_M, BLOCK_D)))
                else:
                    to = (row.to(tl.int64) * total + start + m)[:, None] * BLOCK_D + c[None, :]
                    tl.atomic_add(sums + to, share, mask=there & (c < BLOCK_D)[None, :], sem="relaxed")
    of_keys *= scale
    if ROPE:
        here = table + b * table_b + head * table_h + start * (D // 2)
        of_keys = turn(of_keys, here, table_half, n, M, prefix, True, INTERLEAVED, D)
    at = grad_k + b * gk_b + head * gk_h + (start + n.to(tl.int64))[:, None] * gk_n + d[None, :]
    tl.store(at, of_keys.to(grad_k.dtype.element_ty), mask=(n < M)[:, None] & has_d[None, :])
    at = grad_v + b * gv_b + head * gv_h + (start + n.to(tl.int64))[:, None] * gv_n + c[None, :]
    tl.store(at, of_values.to(grad_v.dtype.element_ty), mask=(n < M)[:, None] & (c < D)[None, :])


@triton.jit
def _query_block(
    q, upper, level, delta, k, v, k_n, v_n, n, M, d, has_d, e, of_q, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    keys = load_rows(k, k_n, n, M, d, has_d, MASKED, D)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    p = _probability(s, scale, level[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    dp = tl.dot(upper, tl.trans(load_rows(v, v_n, n, M, e, e < D, MASKED, D)), input_precision=PRECISION)
    return tl.dot((p * (dp - delta[:, None])).to(keys.dtype), keys, of_q, input_precision=PRECISION)


@triton.jit
def attn_queries_kernel(
    q, k, v, grad, lse, delta, grad_q, table, cu,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, gq_b, gq_h, gq_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, clips, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, CLIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: the gradient of a block of queries. Otherwise as `attn_keys_kernel`."""
    block, h, b, start, length, scale = place(cu, clips, heads, N, scale, BLOCK_M, CLIPS)
    if CLIPS:
        N = length
        M = length
    head, of_keys = h.to(tl.int64), (h // groups).to(tl.int64)
    m, c = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    d, has_d = channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    queries = load_rows(q + b * q_b + head * q_h + start * q_n, q_n, m, N, d, has_d, True, D)
    upper = load_rows(grad + b * grad_b + head * grad_h + start * grad_n, grad_n, m, N, c, c < D, True, D)
    row = b * lse_b + head * lse_h + start + m
    level = tl.load(lse + row, mask=m < N, other=float("inf"))
    minus = tl.load(delta + row, mask=m < N, other=0.0)
    k += b * k_b + of_keys * k_h + start * k_n
    v += b * v_b + of_keys * v_h + start * v_n
    of_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, n = (M - 1) // BLOCK_N * BLOCK_N, tl.arange(0, BLOCK_N)
    of_q = _query_block(
        queries, upper, level, minus, k, v, k_n, v_n, whole + n, M, d, has_d, c, of_q, scale, True, PRECISION, D
    )  # fmt: skip
    for begin in range(0, whole, BLOCK_N):
        of_q = _query_block(
            queries, upper, level, minus, k, v, k_n, v_n, begin + n, M, d, has_d, c, of_q, scale, False, PRECISION, D
        )  # fmt: skip
    of_q *= scale
    if ROPE:
        here = table + b * table_b + head * table_h + start * (D // 2)
        of_q = turn(of_q, here, table_half, m, N, prefix, True, INTERLEAVED, D)
    at = grad_q + b * gq_b + head * gq_h + (start + m.to(tl.int64))[:, None] * gq_n + d[None, :]
    tl.store(at, of_q.to(grad_q.dtype.element_ty), mask=(m < N)[:, None] & has_d[None, :])


@triton.jit
def attn_sums_kernel(
    sums, grad_q, table, gq_b, gq_h, gq_n, table_half, table_b, table_h, heads, N, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of the queries' gradient from its sums [B * H, N, BLOCK_D]: scaled, turned back, rounded."""
    blocks = tl.cdiv(N, BLOCK_M)
    block, of = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, head = of // heads, of % heads
    m, c = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    d, has_d = channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    x = load_rows(sums + of * N * BLOCK_D, BLOCK_D, m, N, c, c < BLOCK_D, True, BLOCK_D) * scale
    if ROPE:
        x = turn(x, table + b * table_b + head * table_h, table_half, m, N, prefix, True, INTERLEAVED, D)
    at = grad_q + b * gq_b + head * gq_h + m.to(tl.int64)[:, None] * gq_n + d[None, :]
    tl.store(at, x.to(grad_q.dtype.element_ty), mask=(m < N)[:, None] & has_d[None, :])


def backward(q, k, v, out, grad, lse, grad_lse, delta, sums, grads, tables, prefix, interleaved, scale, cu):
    """q, k: turned. delta: as lse, scratch. grad_lse: as lse, or None. sums: float32 zeros [B * H, N, padded(D)] for one pass,
    which needs all of grads, or None for two. grads: of q, or None; of k and v, or None twice. tables: of the queries and of
    the keys, or None twice. Others: as `attn.forward`.
    """
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    grad_q, grad_k, grad_v = grads
    rows = 64
    of = lambda *xs: [n for x in xs for n in x.stride()[:3]]  # noqa: E731
    turns = [(lse, (0, 0, 0)) if table is None else (table, table_strides(table)) for table in tables]
    shared, strides = (q, k, v, grad, lse, delta), of(q, k, v, grad)
    limits = lse if cu is None else cu
    with on(q):
        attn_delta_kernel[(triton.cdiv(N, rows) * B * H,)](
            out, grad, lse if grad_lse is None else grad_lse, delta, *of(out, grad), *lse.stride()[:2], H, N,
            D=D, BLOCK_D=padded(D), OF_LSE=grad_lse is not None, BLOCK_M=rows,
        )  # fmt: skip
        if grad_k is not None:
            options = launch_options("keys" if sums is None else "both", q, tables[1], interleaved, cu)
            add, into = _adding(sums, options, q)
            attn_keys_kernel[programs(M, options["BLOCK_N"], Hk, B, cu)](
                *shared, grad_k, grad_v, into, turns[1][0], limits, *strides, *of(grad_k, grad_v), *lse.stride()[:2],
                *turns[1][1], H // Hk, Hk, N, M, prefix, count_clips(cu), scale, ADD=add, **options,
            )  # fmt: skip
        if sums is not None:
            attn_sums_kernel[(triton.cdiv(N, rows) * B * H,)](
                sums, grad_q, turns[0][0], *of(grad_q), *turns[0][1], H, N, prefix, scale,
                D=D, BLOCK_D=padded(D), ROPE=tables[0] is not None, INTERLEAVED=interleaved, BLOCK_M=rows,
            )  # fmt: skip
        elif grad_q is not None:
            options = launch_options("queries", q, tables[0], interleaved, cu)
            attn_queries_kernel[programs(N, options["BLOCK_M"], H, B, cu)](
                *shared, grad_q, turns[0][0], limits, *strides, *of(grad_q), *lse.stride()[:2], *turns[0][1],
                H // Hk, H, N, M, prefix, count_clips(cu), scale, **options,
            )  # fmt: skip


def _adding(sums, options, q):
    """How a block of keys adds to the sums, and to what. The interpreter has no reduction by descriptor."""
    if sums is None:
        return NOTHING.value, q
    if not q.is_cuda or generation(q) < 9:
        return ATOMIC.value, sums
    return COPY.value, TensorDescriptor.from_tensor(sums, [1, options["BLOCK_M"], options["BLOCK_D"]])
