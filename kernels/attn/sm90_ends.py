"""What comes before the kernel of `sm90_backward.py`, and behind it: sums over the rows of dO, the keys that fill no tile, and
dQ in its own dtype, turned back."""

import triton
import triton.language as tl
from evaat_fast.kernels.attn.forward import LOG2E, load_rows, turn


@triton.jit
def attn_prepare_sm90_kernel(q, k, v, out, do, lse, dlse, stats, sums, shares, turns, call, S, TAIL: tl.constexpr):
    """Program: some queries of the heads of a key head. stats [blocks, 2, BLOCK_M] float32, which products are added to:
    log-sum-exps by -1 / scale, -inf beyond the end, and dlse, the gradient of lse, as lse or None, less the sums over D of
    out * do. sums: zeros, or with TAIL the share of dQ of the keys, so many at most, that fill no tile; shares [key heads,
    programs, 2, D, TAIL]: of their dK, neither scaled nor turned back, and of their dV. turns: zeros [blocks], or None.
    """
    D: tl.constexpr = S.D
    of_head, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    kv, b = of_head % call.heads, of_head // call.heads
    c, i, per_score = tl.arange(0, D), tl.arange(0, S.BLOCK_M), -1.0 / call.scale2
    if TAIL:
        n = call.per_head * S.BLOCK_N + tl.arange(0, TAIL)
        keys = load_rows(k.at + b * k.b + kv * k.h, k.n, n, call.N, c, c < D, True, D)
        values = load_rows(v.at + b * v.b + kv * v.h, v.n, n, call.N, c, c < D, True, D)
        dK, dV = tl.zeros((D, TAIL), tl.float32), tl.zeros((D, TAIL), tl.float32)
    for at in range(part, call.groups * call.blocks, parts):
        h, block = kv * call.groups + at // call.blocks, at % call.blocks
        m, of = block * S.BLOCK_M + i, (b * call.heads * call.groups + h) * call.blocks + block
        x = load_rows(out.at + b * out.b + h * out.h, out.n, m, call.N, c, c < D, True, D).to(tl.float32)
        dO = load_rows(do.at + b * do.b + h * do.h, do.n, m, call.N, c, c < D, True, D)
        delta, row = tl.sum(x * dO.to(tl.float32), 1), b * lse.b + h * lse.h + m
        if dlse is not None:
            delta -= tl.load(dlse + row, mask=m < call.N, other=0.0)
        level = tl.load(lse.at + row, mask=m < call.N, other=float("inf")) * LOG2E
        tl.store(stats + of * (2 * S.BLOCK_M) + i, level * per_score)
        tl.store(stats + of * (2 * S.BLOCK_M) + S.BLOCK_M + i, -delta)
        if turns is not None:
            tl.store(turns + of, 0)
        dQ = tl.zeros((S.BLOCK_M, D), tl.float32)
        if TAIL:
            queries = load_rows(q.at + b * q.b + h * q.h, q.n, m, call.N, c, c < D, True, D)
            p = tl.exp2(tl.dot(queries, tl.trans(keys)) * call.scale2 - level[:, None])
            p = tl.where((n < call.N)[None, :], p, 0.0)
            ds = (p * (tl.dot(dO, tl.trans(values)) - delta[:, None])).to(keys.dtype)
            dQ = tl.dot(ds, keys, dQ)
            # With D for rows: warpgroups multiply 64 at least, and the keys may be fewer.
            dK = tl.dot(tl.trans(queries), ds, dK)
            dV = tl.dot(tl.trans(dO), p.to(dO.dtype), dV)
        flat = tl.reshape(tl.permute(tl.reshape(dQ, (4, 2, 8, D // 64, 8, 4, 2)), (3, 4, 0, 2, 5, 1, 6)), (S.BLOCK_M * D,))
        tl.store(sums + of * (S.BLOCK_M * D) + tl.arange(0, S.BLOCK_M * D), flat)
    if TAIL:
        at = shares + (of_head * parts + part) * (2 * D * TAIL) + c[:, None] * TAIL + tl.arange(0, TAIL)[None, :]
        tl.store(at, dK)
        tl.store(at + D * TAIL, dV)


@triton.jit
def _leave(x, rows, columns, b, h, heads, n, part, which: tl.constexpr, N, blocks, c):
    """float32 rows n of a gradient to memory, and their column sums, unless `columns` is None, to its part [blocks, 3, heads]
    of D columns each."""
    at = rows.at + b * rows.b + h * rows.h + n.to(tl.int64)[:, None] * rows.n + c[None, :]
    tl.store(at, x.to(rows.at.dtype.element_ty), mask=(n < N)[:, None])
    if columns is not None:
        tl.store(columns + (((b * blocks + part) * 3 + which) * heads + h) * c.shape[0] + c, tl.sum(x, 0))


@triton.jit
def queries_of(sums, dq, columns, table, b, h, block, of, N, call, S):
    """The gradient of a block of queries from its sum, which is in the order of registers; of: the block, among all."""
    D: tl.constexpr = S.D
    x = tl.load(sums + of * (S.BLOCK_M * D) + tl.arange(0, S.BLOCK_M * D)) * call.scale
    x = tl.reshape(tl.permute(tl.reshape(x, (D // 64, 8, 4, 8, 4, 2, 2)), (2, 5, 3, 0, 1, 4, 6)), (S.BLOCK_M, D))
    m = block * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    if table is not None:
        x = turn(x, table, b, h, 0, m, N, call.prefix, True, S)
    _leave(x, dq, columns, b, h, call.heads * call.groups, m, block, 0, N, call.blocks, tl.arange(0, D))


@triton.jit
def attn_finish_sm90_kernel(sums, shares, dq, dk, dv, columns, table, k_table, call, parts, S, TAIL: tl.constexpr):
    """Program: the gradient of a block of queries from its sum, or with TAIL those of the keys and values of a head that fill
    no tile, from their shares; turned back. columns: as for `_leave`, float32."""
    D: tl.constexpr = S.D
    heads, c, pid = call.heads * call.groups, tl.arange(0, D), tl.program_id(0)
    ends = tl.num_programs(0) // (call.groups * call.blocks + 1) if TAIL else 0  # first, as they take longest
    if pid >= ends:
        of = (pid - ends).to(tl.int64)
        block, h, b = of % call.blocks, of // call.blocks % heads, of // call.blocks // heads
        queries_of(sums, dq, columns, table, b, h, block, of, call.N, call, S)
    if TAIL:
        if pid < ends:
            h, b = (pid % call.heads).to(tl.int64), (pid // call.heads).to(tl.int64)
            at = shares + pid.to(tl.int64) * parts * (2 * D * TAIL) + c[:, None] * TAIL + tl.arange(0, TAIL)[None, :]
            dK, dV = tl.zeros((D, TAIL), tl.float32), tl.zeros((D, TAIL), tl.float32)
            for i in range(parts):
                dK += tl.load(at + i * (2 * D * TAIL))
                dV += tl.load(at + i * (2 * D * TAIL) + D * TAIL)
            n, dK = call.per_head * S.BLOCK_N + tl.arange(0, TAIL), tl.trans(dK) * call.scale
            if k_table is not None:
                dK = turn(dK, k_table, b, h, 0, n, call.N, call.prefix, True, S)
            _leave(dK, dk, columns, b, h, heads, n, call.blocks - 1, 1, call.N, call.blocks, c)
            _leave(tl.trans(dV), dv, columns, b, h, heads, n, call.blocks - 1, 2, call.N, call.blocks, c)
