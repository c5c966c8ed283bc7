"""Attention over all tokens of a clip in Triton: forward, and a backward in two passes that adds nothing up in memory.

The forward pass turns its block of queries once, before it meets the keys, which `rope3d` has turned already: turned in the
loop they would cost 41 % more instructions, and the copies their way past the registers. It leaves the turned queries for the
backward pass, whose epilogues turn the gradients back while they are float32. The last keys, which may fill a block only in
part, come first, so that the loop has no mask; peeled off after the loop, they make ptxas wait for every product. Exponentials
are powers of two, with the scale folded in. No atomics: two runs agree to the last bit.
"""

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import generation, on

LOG2E = tl.constexpr(1.4426950408889634)
MOST_HEAD_DIM = 128


def plan(kind, dtype, D, generation=9):
    """Blocks and launch of a kernel, "forward", "keys" or "queries": the largest that leave all registers unspilled. float32 is
    multiplied in three TF32 products, whose operands take registers too."""
    if dtype == torch.float32:
        rows, columns, warps = 64, 32, 4
    elif kind == "forward":
        rows, columns, warps = 128, 128 if D <= 64 else 64, 8
    elif kind == "queries":
        rows, columns, warps = 128, 64 if D <= 64 or generation >= 9 else 32, 8
    elif D > 64:
        rows, columns, warps = 32, 64, 8
    else:
        rows, columns, warps = {8: (32, 128, 8), 9: (64, 128, 8)}.get(generation, (64, 64, 8))
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": 2}


def padded(D):
    """Columns of a block: a power of two that the products take."""
    return max(16, triton.next_power_of_2(D))


@triton.jit
def _channel(c, D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """(the channel in column c of a block, whether there is one). HALVES: the pairs (i, D/2 + i) are BLOCK_D / 2 apart."""
    if HALVES and BLOCK_D != D:
        inside = c % (BLOCK_D // 2) < D // 2
        return tl.where(c < BLOCK_D // 2, c, c - BLOCK_D // 2 + D // 2), inside
    return c, c < D


@triton.jit
def _rows(x, x_n, n, N, d, has_d, MASKED: tl.constexpr, D: tl.constexpr):
    """Rows n of [N, D], columns d, zeros beyond; without MASKED all rows are there."""
    at = x + n.to(tl.int64)[:, None] * x_n + d[None, :]
    if MASKED:
        return tl.load(at, mask=(n < N)[:, None] & has_d[None, :], other=0.0)
    if d.shape[0] != D:
        return tl.load(at, mask=has_d[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _turn(x, table, table_half, n, N, prefix, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr):
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
    # A prefix token passes unchanged, even if it is not finite.
    a, b = tl.where(turned, a * cos - b * sin, a), tl.where(turned, b * cos + a * sin, b)
    if INTERLEAVED:
        return tl.reshape(tl.join(a, b), (BLOCK, 2 * HALF))
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BLOCK, 2 * HALF))


@triton.jit
def _probability(s, scale, level):
    """exp(s * scale - level), with both factors folded: an instruction less for each score."""
    return tl.exp2(s * (scale * LOG2E) - level * LOG2E)


@triton.jit
def _block(
    q, k, v, k_n, v_n, n, M, d, has_d, e, most, total, acc, scale2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of keys n: (largest score so far, sum, weighted values)."""
    s = tl.dot(q, tl.trans(_rows(k, k_n, n, M, d, has_d, MASKED, D)), input_precision=PRECISION)
    largest = tl.max(tl.where((n < M)[None, :], s * scale2, float("-inf")), 1) if MASKED else tl.max(s, 1) * scale2
    new = tl.maximum(most, largest, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(s * scale2 - new[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    fade = tl.exp2(most - new)
    values = _rows(v, v_n, n, M, e, e < D, MASKED, D)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return new, total * fade + tl.sum(p, 1), acc


@triton.jit
def attn_forward_kernel(
    q, k, v, out, lse, turned_q, table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, turned_b, turned_h, turned_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: a block of queries of a clip's head. scale >= 0. lse: float32, natural logarithms. With ROPE the queries are
    turned, the keys are taken as they are; with KEEP the turned queries, as the products see them, go to turned_q. groups:
    query heads of a key head.
    """
    block, of = tl.program_id(0) % tl.cdiv(N, BLOCK_M), tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    h, b = of % heads, (of // heads).to(tl.int64)
    head, of_keys = h.to(tl.int64), (h // groups).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)
    d, has_d = _channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    rows = _rows(q + b * q_b + head * q_h, q_n, m, N, d, has_d, True, D)
    if ROPE:
        here = table + b * table_b + head * table_h
        rows = _turn(rows.to(tl.float32), here, table_half, m, N, prefix, False, INTERLEAVED, D).to(rows.dtype)
        if KEEP:
            at = turned_q + b * turned_b + head * turned_h + m.to(tl.int64)[:, None] * turned_n + d[None, :]
            tl.store(at, rows, mask=(m < N)[:, None] & has_d[None, :])
    k += b * k_b + of_keys * k_h
    v += b * v_b + of_keys * v_h
    scale2 = scale * LOG2E
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = (M - 1) // BLOCK_N * BLOCK_N  # 1 to BLOCK_N keys are left, which come first
    n = tl.arange(0, BLOCK_N)
    most, total, acc = _block(
        rows, k, v, k_n, v_n, whole + n, M, d, has_d, c, most, total, acc, scale2, True, PRECISION, D
    )  # fmt: skip
    for begin in range(0, whole, BLOCK_N):
        most, total, acc = _block(
            rows, k, v, k_n, v_n, begin + n, M, d, has_d, c, most, total, acc, scale2, False, PRECISION, D
        )  # fmt: skip
    at = out + b * out_b + head * out_h + m.to(tl.int64)[:, None] * out_n + c[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(m < N)[:, None] & (c < D)[None, :])
    tl.store(lse + b * lse_b + head * lse_h + m, (most + tl.log2(total)) / LOG2E, mask=m < N)


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
    x = _rows(out + b * out_b + head * out_h, out_n, m, N, c, c < D, True, D).to(tl.float32)
    y = _rows(grad + b * grad_b + head * grad_h, grad_n, m, N, c, c < D, True, D).to(tl.float32)
    total, at = tl.sum(x * y, 1), b * lse_b + head * lse_h + m
    if OF_LSE:
        total -= tl.load(grad_lse + at, mask=m < N, other=0.0)
    tl.store(delta + at, total, mask=m < N)


@triton.jit
def attn_keys_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, gk_b, gk_h, gk_n, gv_b, gv_h, gv_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: the gradients of a block of keys and values; heads: of the keys. q: turned. With ROPE
    the keys' gradient is turned back. Queries beyond the end have lse = inf, a probability of 0; keys beyond need no mask, as
    each key's gradients are its own.
    """
    block, of = tl.program_id(0) % tl.cdiv(M, BLOCK_N), tl.program_id(0) // tl.cdiv(M, BLOCK_N)
    h, b = of % heads, (of // heads).to(tl.int64)
    head, c = h.to(tl.int64), tl.arange(0, BLOCK_D)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d, has_d = _channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    keys = _rows(k + b * k_b + head * k_h, k_n, n, M, d, has_d, True, D)
    values = _rows(v + b * v_b + head * v_h, v_n, n, M, c, c < D, True, D)
    of_keys, of_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(groups):
        mine = head * groups + g
        from_q, from_grad = q + b * q_b + mine * q_h, grad + b * grad_b + mine * grad_h
        row = b * lse_b + mine * lse_h
        at = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
        at_q, at_grad = from_q + at * q_n + d[None, :], from_grad + at * grad_n + c[None, :]
        for begin in range(0, N, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            there = (m < N)[:, None]
            queries = tl.load(at_q, mask=there & has_d[None, :], other=0.0)
            upper = tl.load(at_grad, mask=there & (c < D)[None, :], other=0.0)
            at_q += BLOCK_M * q_n
            at_grad += BLOCK_M * grad_n
            level = tl.load(lse + row + m, mask=m < N, other=float("inf"))
            minus = tl.load(delta + row + m, mask=m < N, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            p = _probability(s, scale, level[None, :])
            of_values = tl.dot(p.to(upper.dtype), upper, of_values, input_precision=PRECISION)
            ds = p * (tl.dot(values, tl.trans(upper), input_precision=PRECISION) - minus[None, :])
            of_keys = tl.dot(ds.to(queries.dtype), queries, of_keys, input_precision=PRECISION)
    of_keys *= scale
    if ROPE:
        here = table + b * table_b + head * table_h
        of_keys = _turn(of_keys, here, table_half, n, M, prefix, True, INTERLEAVED, D)
    at = grad_k + b * gk_b + head * gk_h + n.to(tl.int64)[:, None] * gk_n + d[None, :]
    tl.store(at, of_keys.to(grad_k.dtype.element_ty), mask=(n < M)[:, None] & has_d[None, :])
    at = grad_v + b * gv_b + head * gv_h + n.to(tl.int64)[:, None] * gv_n + c[None, :]
    tl.store(at, of_values.to(grad_v.dtype.element_ty), mask=(n < M)[:, None] & (c < D)[None, :])


@triton.jit
def _query_block(
    q, upper, level, delta, k, v, k_n, v_n, n, M, d, has_d, e, of_q, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    keys = _rows(k, k_n, n, M, d, has_d, MASKED, D)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    p = _probability(s, scale, level[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    dp = tl.dot(upper, tl.trans(_rows(v, v_n, n, M, e, e < D, MASKED, D)), input_precision=PRECISION)
    return tl.dot((p * (dp - delta[:, None])).to(keys.dtype), keys, of_q, input_precision=PRECISION)


@triton.jit
def attn_queries_kernel(
    q, k, v, grad, lse, delta, grad_q, table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, gq_b, gq_h, gq_n, lse_b, lse_h,
    table_half, table_b, table_h, groups, heads, N, M, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program: the gradient of a block of queries. Otherwise as `attn_keys_kernel`."""
    block, of = tl.program_id(0) % tl.cdiv(N, BLOCK_M), tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    h, b = of % heads, (of // heads).to(tl.int64)
    head, of_keys = h.to(tl.int64), (h // groups).to(tl.int64)
    m, c = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    d, has_d = _channel(c, D, BLOCK_D, ROPE and not INTERLEAVED)
    queries = _rows(q + b * q_b + head * q_h, q_n, m, N, d, has_d, True, D)
    upper = _rows(grad + b * grad_b + head * grad_h, grad_n, m, N, c, c < D, True, D)
    row = b * lse_b + head * lse_h + m
    level = tl.load(lse + row, mask=m < N, other=float("inf"))
    minus = tl.load(delta + row, mask=m < N, other=0.0)
    k += b * k_b + of_keys * k_h
    v += b * v_b + of_keys * v_h
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
        here = table + b * table_b + head * table_h
        of_q = _turn(of_q, here, table_half, m, N, prefix, True, INTERLEAVED, D)
    at = grad_q + b * gq_b + head * gq_h + m.to(tl.int64)[:, None] * gq_n + d[None, :]
    tl.store(at, of_q.to(grad_q.dtype.element_ty), mask=(m < N)[:, None] & has_d[None, :])


def _of_table(table):
    """The way to the sines, and the strides of clips and heads, 0 where there is one for all."""
    return table.stride(0), *(table.stride(i) if table.shape[i] > 1 else 0 for i in (1, 2))


def _options(kind, q, table, interleaved):
    D = q.shape[-1]
    shape = dict(D=D, BLOCK_D=padded(D), ROPE=table is not None, INTERLEAVED=interleaved, PRECISION="tf32x3")
    return shape | plan(kind, q.dtype, D, generation(q))


def forward(q, k, v, out, lse, turned_q, table, prefix, interleaved, scale):
    """q [B, H, N, D]; k, v [B, Hk, M, D]; out as q; lse float32 [B, H, N]; table [2, 1 or B, 1 or H, N - prefix, D/2] float32,
    or None for queries as they are; turned_q as q, which it may be, or None. The last dimension of all is contiguous.
    """
    (B, H, N, _), (_, Hk, M, _) = q.shape, k.shape
    options = _options("forward", q, table, interleaved)
    kept, turns = q if turned_q is None else turned_q, (0, 0, 0) if table is None else _of_table(table)
    strides = [n for x in (q, k, v, out, kept) for n in x.stride()[:3]]
    with on(q):
        attn_forward_kernel[(triton.cdiv(N, options["BLOCK_M"]) * B * H,)](
            q, k, v, out, lse, kept, lse if table is None else table, *strides, *lse.stride()[:2], *turns,
            H // Hk, H, N, M, prefix, scale, KEEP=turned_q is not None, **options,
        )  # fmt: skip


def backward(q, k, v, out, grad, lse, grad_lse, delta, grads, tables, prefix, interleaved, scale):
    """q, k: turned. delta: as lse, scratch. grad_lse: as lse, or None. grads: of q, or None; of k and v, or None twice. tables:
    of the queries and of the keys, or None twice. Others: as `forward`.
    """
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    grad_q, grad_k, grad_v = grads
    rows = 64
    of = lambda *xs: [n for x in xs for n in x.stride()[:3]]  # noqa: E731
    turns = [(lse, (0, 0, 0)) if table is None else (table, _of_table(table)) for table in tables]
    shared, strides = (q, k, v, grad, lse, delta), of(q, k, v, grad)
    with on(q):
        attn_delta_kernel[(triton.cdiv(N, rows) * B * H,)](
            out, grad, lse if grad_lse is None else grad_lse, delta, *of(out, grad), *lse.stride()[:2], H, N,
            D=D, BLOCK_D=padded(D), OF_LSE=grad_lse is not None, BLOCK_M=rows,
        )  # fmt: skip
        if grad_k is not None:
            options = _options("keys", q, tables[1], interleaved)
            attn_keys_kernel[(triton.cdiv(M, options["BLOCK_N"]) * B * Hk,)](
                *shared, grad_k, grad_v, turns[1][0], *strides, *of(grad_k, grad_v), *lse.stride()[:2], *turns[1][1],
                H // Hk, Hk, N, M, prefix, scale, **options,
            )  # fmt: skip
        if grad_q is not None:
            options = _options("queries", q, tables[0], interleaved)
            attn_queries_kernel[(triton.cdiv(N, options["BLOCK_M"]) * B * H,)](
                *shared, grad_q, turns[0][0], *strides, *of(grad_q), *lse.stride()[:2], *turns[0][1],
                H // Hk, H, N, M, prefix, scale, **options,
            )  # fmt: skip
