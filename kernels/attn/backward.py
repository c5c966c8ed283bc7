"""The backward pass of `forward.py` in Triton, in two passes that add nothing up in memory: a block of keys against all
queries, a block of queries against all keys.

The scores are computed twice, and two runs agree to the last bit. One pass, in which blocks of keys added their shares of dQ up
in memory, took as long on an H200. Gradients are turned back while still float32.
"""

import triton
import triton.language as tl
from evaat_fast.kernels.attn.forward import LOG2E, TF32X3, Call, blocks_of, channel, load_rows, place, programs, shape_of, turn
from evaat_fast.kernels.launch import FUSED, Rows, cdiv, generation, launch, table_of


@triton.jit
def _probability(s, scale, level):
    """exp(s * scale - level), with both factors folded: an instruction less for each score."""
    return tl.exp2(s * (scale * LOG2E) - level * LOG2E)


@triton.jit
def attn_delta_kernel(out, do, lse, dlse, delta, heads, N, S):
    """delta: float32 as lse, sum over D of out * do, less the gradient of lse, as lse or None."""
    block, of = tl.program_id(0) % tl.cdiv(N, S.BLOCK_M), tl.program_id(0) // tl.cdiv(N, S.BLOCK_M)
    h, b = of % heads, (of // heads).to(tl.int64)
    head, c = h.to(tl.int64), tl.arange(0, S.BLOCK_D)
    m = block * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    x = load_rows(out.at + b * out.b + head * out.h, out.n, m, N, c, c < S.D, True, S.D).to(tl.float32)
    y = load_rows(do.at + b * do.b + head * do.h, do.n, m, N, c, c < S.D, True, S.D).to(tl.float32)
    total, at = tl.sum(x * y, 1), b * lse.b + head * lse.h + m
    if dlse is not None:
        total -= tl.load(dlse + at, mask=m < N, other=0.0)
    tl.store(delta + at, total, mask=m < N)


@triton.jit
def attn_keys_kernel(q, k, v, do, lse, delta, dk, dv, table, call, S):
    """Program: the gradients of a block of keys and values; call.heads: of the keys. q: turned. With a table the keys' gradient
    is turned back. Queries beyond the end have lse = inf, a probability of 0; keys beyond need no mask, as each key's gradients
    are its own."""
    block, h, b, start, M, scale = place(call, call.M, S.BLOCK_N, S.CLIPS)
    N = M if S.CLIPS else call.N
    head, c = h.to(tl.int64), tl.arange(0, S.BLOCK_D)
    n = block * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
    d, has_d = channel(c, S, table is not None and not S.INTERLEAVED)
    keys = load_rows(k.at + b * k.b + head * k.h + start * k.n, k.n, n, M, d, has_d, True, S.D)
    values = load_rows(v.at + b * v.b + head * v.h + start * v.n, v.n, n, M, c, c < S.D, True, S.D)
    dK, dV = tl.zeros((S.BLOCK_N, S.BLOCK_D), tl.float32), tl.zeros((S.BLOCK_N, S.BLOCK_D), tl.float32)
    for g in range(call.groups):
        mine = head * call.groups + g
        from_q, from_do = q.at + b * q.b + mine * q.h, do.at + b * do.b + mine * do.h
        of_row = b * lse.b + mine * lse.h + start
        at = start + tl.arange(0, S.BLOCK_M).to(tl.int64)[:, None]
        at_q, at_do = from_q + at * q.n + d[None, :], from_do + at * do.n + c[None, :]
        for begin in range(0, N, S.BLOCK_M):
            m = begin + tl.arange(0, S.BLOCK_M)
            there = (m < N)[:, None]
            queries = tl.load(at_q, mask=there & has_d[None, :], other=0.0)
            dO = tl.load(at_do, mask=there & (c < S.D)[None, :], other=0.0)
            at_q += S.BLOCK_M * q.n
            at_do += S.BLOCK_M * do.n
            level = tl.load(lse.at + of_row + m, mask=m < N, other=float("inf"))
            minus = tl.load(delta + of_row + m, mask=m < N, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=TF32X3)
            p = _probability(s, scale, level[None, :])
            dV = tl.dot(p.to(dO.dtype), dO, dV, input_precision=TF32X3)
            ds = p * (tl.dot(values, tl.trans(dO), input_precision=TF32X3) - minus[None, :])
            dK = tl.dot(ds.to(queries.dtype), queries, dK, input_precision=TF32X3)
    dK *= scale
    if table is not None:
        dK = turn(dK, table, b, head, start, n, M, call.prefix, True, S)
    at = dk.at + b * dk.b + head * dk.h + (start + n.to(tl.int64))[:, None] * dk.n + d[None, :]
    tl.store(at, dK.to(dk.at.dtype.element_ty), mask=(n < M)[:, None] & has_d[None, :])
    at = dv.at + b * dv.b + head * dv.h + (start + n.to(tl.int64))[:, None] * dv.n + c[None, :]
    tl.store(at, dV.to(dv.at.dtype.element_ty), mask=(n < M)[:, None] & (c < S.D)[None, :])


@triton.jit
def _query_block(q, dO, level, delta, k, v, k_n, v_n, n, M, d, has_d, e, dQ, scale, MASKED: tl.constexpr, D: tl.constexpr):
    keys = load_rows(k, k_n, n, M, d, has_d, MASKED, D)
    s = tl.dot(q, tl.trans(keys), input_precision=TF32X3)
    p = _probability(s, scale, level[:, None])
    if MASKED:
        p = tl.where((n < M)[None, :], p, 0.0)
    dp = tl.dot(dO, tl.trans(load_rows(v, v_n, n, M, e, e < D, MASKED, D)), input_precision=TF32X3)
    return tl.dot((p * (dp - delta[:, None])).to(keys.dtype), keys, dQ, input_precision=TF32X3)


@triton.jit
def attn_queries_kernel(q, k, v, do, lse, delta, dq, table, call, S):
    """Program: the gradient of a block of queries. Otherwise as `attn_keys_kernel`."""
    block, h, b, start, N, scale = place(call, call.N, S.BLOCK_M, S.CLIPS)
    M = N if S.CLIPS else call.M
    head, kv_head = h.to(tl.int64), (h // call.groups).to(tl.int64)
    m, c = block * S.BLOCK_M + tl.arange(0, S.BLOCK_M), tl.arange(0, S.BLOCK_D)
    d, has_d = channel(c, S, table is not None and not S.INTERLEAVED)
    queries = load_rows(q.at + b * q.b + head * q.h + start * q.n, q.n, m, N, d, has_d, True, S.D)
    dO = load_rows(do.at + b * do.b + head * do.h + start * do.n, do.n, m, N, c, c < S.D, True, S.D)
    row = b * lse.b + head * lse.h + start + m
    level = tl.load(lse.at + row, mask=m < N, other=float("inf"))
    minus = tl.load(delta + row, mask=m < N, other=0.0)
    keys = k.at + b * k.b + kv_head * k.h + start * k.n
    values = v.at + b * v.b + kv_head * v.h + start * v.n
    dQ = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    whole, n = (M - 1) // S.BLOCK_N * S.BLOCK_N, tl.arange(0, S.BLOCK_N)
    dQ = _query_block(queries, dO, level, minus, keys, values, k.n, v.n, whole + n, M, d, has_d, c, dQ, scale, True, S.D)
    for begin in range(0, whole, S.BLOCK_N):
        dQ = _query_block(queries, dO, level, minus, keys, values, k.n, v.n, begin + n, M, d, has_d, c, dQ, scale, False, S.D)
    dQ *= scale
    if table is not None:
        dQ = turn(dQ, table, b, head, start, m, N, call.prefix, True, S)
    at = dq.at + b * dq.b + head * dq.h + (start + m.to(tl.int64))[:, None] * dq.n + d[None, :]
    tl.store(at, dQ.to(dq.at.dtype.element_ty), mask=(m < N)[:, None] & has_d[None, :])


def backward(q, k, v, out, do, lse, dlse, delta, grads, tables, prefix, interleaved, scale, cu):
    """q, k: turned. delta: as lse, scratch. dlse: as lse, or None. grads: of q, or None; of k and v, or None twice. tables: of
    the queries and of the keys, or None twice. Others: as `forward.forward`.
    """
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    call = Call(H // Hk, H, N, M, prefix, cu, 0 if cu is None else len(cu) - 1, scale)
    blocks = lambda kind: blocks_of(kind, q.dtype, D, generation(q.device))  # noqa: E731
    places = [Rows(x, *x.stride()[:3]) for x in (q, k, v, do, lse)]
    of_out, dq, dk, dv = (None if x is None else Rows(x, *x.stride()[:3]) for x in (out, *grads))
    table, k_table = map(table_of, tables)
    S = shape_of(q, interleaved, None, 64, 64)
    launch(attn_delta_kernel, (cdiv(N, 64) * B * H,), (of_out, *places[3:], dlse, delta, H, N, S), FUSED)
    if dk is not None:
        (rows, columns, options), of_keys = blocks("keys"), call._replace(heads=Hk)
        S = shape_of(q, interleaved, cu, rows, columns)
        targets = delta, dk, dv, k_table, of_keys, S
        launch(attn_keys_kernel, programs(of_keys, M, columns, B), (*places, *targets), options | FUSED)
    if dq is not None:
        rows, columns, options = blocks("queries")
        S = shape_of(q, interleaved, cu, rows, columns)
        launch(attn_queries_kernel, programs(call, N, rows, B), (*places, delta, dq, table, call, S), options | FUSED)
