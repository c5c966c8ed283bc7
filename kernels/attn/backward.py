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
    turn,
)
from evaat_fast.kernels.launch import generation, on, table_strides
from triton.tools.tensor_descriptor import TensorDescriptor

NOTHING, ATOMIC, COPY = (tl.constexpr(i) for i in range(3))


@triton.jit
def _probability(s, scale, level):
    """exp(s * scale - level), with both factors folded: an instruction less for each score."""
    return tl.exp2(s * (scale * LOG2E) - level * LOG2E)


@triton.jit
def attn_delta_kernel(
    out, do, dlse, delta, out_b, out_h, out_n, do_b, do_h, do_n, lse_b, lse_h, heads, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DLSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta: float32 as lse, sum over D of out * do, less the gradient of lse."""
    block, of = tl.program_id(0) % tl.cdiv(N, BLOCK_M), tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    h, b = of % heads, (of // heads).to(tl.int64)
    head, c = h.to(tl.int64), tl.arange(0, BLOCK_D)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_rows(out + b * out_b + head * out_h, out_n, m, N, c, c < D, True, D).to(tl.float32)
    y = load_rows(do + b * do_b + head * do_h, do_n, m, N, c, c < D, True, D).to(tl.float32)
    total, at = tl.sum(x * y, 1), b * lse_b + head * lse_h + m
    if DLSE:
        total -= tl.load(dlse + at, mask=m < N, other=0.0)
    tl.store(delta + at, total, mask=m < N)


@triton.jit
def attn_keys_kernel(
    q, k, v, do, lse, delta, dk, dv, sums, table, cu,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, lse_b, lse_h,
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
    dK, dV = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(groups):
        mine = head * groups + g
        from_q, from_do = q + b * q_b + mine * q_h, do + b * do_b + mine * do_h
        of_row = b * lse_b + mine * lse_h + start
        at = start + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
        at_q, at_do = from_q + at * q_n + d[None, :], from_do + at * do_n + c[None, :]
        for begin in range(0, N, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            there = (m < N)[:, None]
            queries = tl.load(at_q, mask=there & has_d[None, :], other=0.0)
            dO = tl.load(at_do, mask=there & (c < D)[None, :], other=0.0)
            at_q += BLOCK_M * q_n
            at_do += BLOCK_M * do_n
            level = tl.load(lse + of_row + m, mask=m < N, other=float("inf"))
            minus = tl.load(delta + of_row + m, mask=m < N, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            p = _probability(s, scale, level[None, :])
            dV = tl.dot(p.to(dO.dtype), dO, dV, input_precision=PRECISION)
            ds = p * (tl.dot(values, tl.trans(dO), input_precision=PRECISION) - minus[None, :])
            dK = tl.dot(ds.to(queries.dtype), queries, dK, input_precision=PRECISION)
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
    dK *= scale
    if ROPE:
        here = table + b * table_b + head * table_h + start * (D // 2)
        dK = turn(dK, here, table_half, n, M, prefix, True, INTERLEAVED, D)
    at = dk + b * dk_b + head * dk_h + (start + n.to(tl.int64))[:, None] * dk_n + d[None, :]
    tl.store(at, dK.to(dk.dtype.element_ty), mask=(n < M)[:, None] & has_d[None, :])
    at = dv + b * dv_b + head * dv_h + (start + n.to(tl.int64))[:, None] * dv_n + c[None, :]
    tl.store(at, dV.to(dv.dtype.element_ty), mask=(n < M)[:, None] & (c < D)[None, :])


@triton.jit
def _query_block(
    q, dO, level, delta, k, v, k_n, v_n, n, M, d, has_d, e, dQ, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    keys = load_rows(k, k_n, n, M, d, has_d, MASKED, D)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    p = _probability(s, scale, level[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    dp = tl.dot(dO, tl.trans(load_rows(v, v_n, n, M, e, e < D, MASKED, D)), input_precision=PRECISION)
    return tl.dot((p * (dp - delta[:, None])).to(keys.dtype), keys, dQ, input_precision=PRECISION)


@triton.jit
def attn_queries_kernel(
    q, k, v, do, lse, delta, dq, table, cu,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dq_b, dq_h, dq_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, clips, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, CLIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: the gradient of a block of queries. Otherwise as `attn_keys_kernel`."""
    block, h, b, start, length, scale = place(cu, clips, heads, N, scale, BLOCK_M, CLIPS)
    if CLIPS:
        N = length
        M = length
    head, kv_head = h.to(tl.int64), (h // groups).to(tl.int64)
    m, c = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    d, has_d = channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    queries = load_rows(q + b * q_b + head * q_h + start * q_n, q_n, m, N, d, has_d, True, D)
    dO = load_rows(do + b * do_b + head * do_h + start * do_n, do_n, m, N, c, c < D, True, D)
    row = b * lse_b + head * lse_h + start + m
    level = tl.load(lse + row, mask=m < N, other=float("inf"))
    minus = tl.load(delta + row, mask=m < N, other=0.0)
    k += b * k_b + kv_head * k_h + start * k_n
    v += b * v_b + kv_head * v_h + start * v_n
    dQ = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, n = (M - 1) // BLOCK_N * BLOCK_N, tl.arange(0, BLOCK_N)
    dQ = _query_block(
        queries, dO, level, minus, k, v, k_n, v_n, whole + n, M, d, has_d, c, dQ, scale, True, PRECISION, D
    )  # fmt: skip
    for begin in range(0, whole, BLOCK_N):
        dQ = _query_block(
            queries, dO, level, minus, k, v, k_n, v_n, begin + n, M, d, has_d, c, dQ, scale, False, PRECISION, D
        )  # fmt: skip
    dQ *= scale
    if ROPE:
        here = table + b * table_b + head * table_h + start * (D // 2)
        dQ = turn(dQ, here, table_half, m, N, prefix, True, INTERLEAVED, D)
    at = dq + b * dq_b + head * dq_h + (start + m.to(tl.int64))[:, None] * dq_n + d[None, :]
    tl.store(at, dQ.to(dq.dtype.element_ty), mask=(m < N)[:, None] & has_d[None, :])


@triton.jit
def attn_sums_kernel(
    sums, dq, table, dq_b, dq_h, dq_n, table_half, table_b, table_h, heads, N, prefix, scale,
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
    at = dq + b * dq_b + head * dq_h + m.to(tl.int64)[:, None] * dq_n + d[None, :]
    tl.store(at, x.to(dq.dtype.element_ty), mask=(m < N)[:, None] & has_d[None, :])


def backward(q, k, v, out, do, lse, dlse, delta, sums, grads, tables, prefix, interleaved, scale, cu):
    """q, k: turned. delta: as lse, scratch. dlse: as lse, or None. sums: float32 zeros [B * H, N, padded(D)] for one pass,
    which needs all of grads, or None for two. grads: of q, or None; of k and v, or None twice. tables: of the queries and of
    the keys, or None twice. Others: as `attn.forward`.
    """
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    dq, dk, dv = grads
    rows = 64
    of = lambda *xs: [n for x in xs for n in x.stride()[:3]]  # noqa: E731
    turns = [(lse, (0, 0, 0)) if table is None else (table, table_strides(table)) for table in tables]
    shared, strides = (q, k, v, do, lse, delta), of(q, k, v, do)
    limits = lse if cu is None else cu
    with on(q.device):
        attn_delta_kernel[(triton.cdiv(N, rows) * B * H,)](
            out, do, lse if dlse is None else dlse, delta, *of(out, do), *lse.stride()[:2], H, N,
            D=D, BLOCK_D=padded(D), DLSE=dlse is not None, BLOCK_M=rows,
        )  # fmt: skip
        if dk is not None:
            options = launch_options("keys" if sums is None else "both", q, tables[1], interleaved, cu)
            add, into = _adding(sums, options, q)
            attn_keys_kernel[programs(M, options["BLOCK_N"], Hk, B, cu)](
                *shared, dk, dv, into, turns[1][0], limits, *strides, *of(dk, dv), *lse.stride()[:2],
                *turns[1][1], H // Hk, Hk, N, M, prefix, count_clips(cu), scale, ADD=add, **options,
            )  # fmt: skip
        if sums is not None:
            attn_sums_kernel[(triton.cdiv(N, rows) * B * H,)](
                sums, dq, turns[0][0], *of(dq), *turns[0][1], H, N, prefix, scale,
                D=D, BLOCK_D=padded(D), ROPE=tables[0] is not None, INTERLEAVED=interleaved, BLOCK_M=rows,
            )  # fmt: skip
        elif dq is not None:
            options = launch_options("queries", q, tables[0], interleaved, cu)
            attn_queries_kernel[programs(N, options["BLOCK_M"], H, B, cu)](
                *shared, dq, turns[0][0], limits, *strides, *of(dq), *lse.stride()[:2], *turns[0][1],
                H // Hk, H, N, M, prefix, count_clips(cu), scale, **options,
            )  # fmt: skip


def _adding(sums, options, q):
    """How a block of keys adds to the sums, and to what. The interpreter has no reduction by descriptor."""
    if sums is None:
        return NOTHING.value, q
    if not q.is_cuda or generation(q.device) < 9:
        return ATOMIC.value, sums
    return COPY.value, TensorDescriptor.from_tensor(sums, [1, options["BLOCK_M"], options["BLOCK_D"]])
