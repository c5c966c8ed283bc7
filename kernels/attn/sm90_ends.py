"""What comes before the kernel of `sm90_backward.py`, and behind it: sums over the rows of dO, the keys that fill no tile, and
dQ in its own dtype, turned back."""

import triton
import triton.language as tl
from evaat_fast.kernels.attn.forward import LOG2E, load_rows, turn


@triton.jit
def attn_prepare_sm90_kernel(q, k, v, out, do, lse, dlse, stats, sums, dk, dv, table, call, S, TAIL: tl.constexpr):
    """Program: queries of the heads of a key head, with TAIL all of them. stats [blocks, 2, BLOCK_M] float32: log-sum-exps by
    log2(e), infinite beyond the end, and the sums over D of out * do, less dlse, the gradient of lse, as lse or None. sums:
    zeros, or with TAIL the share of dQ of the keys, so many at most, that fill no tile and whose own gradients are made here.
    """
    D: tl.constexpr = S.D
    parts = tl.num_programs(1)
    kv, b = (tl.program_id(0) % call.heads).to(tl.int64), (tl.program_id(0) // call.heads).to(tl.int64)
    c, i = tl.arange(0, D), tl.arange(0, S.BLOCK_M)
    if TAIL:
        n = call.per_head * S.BLOCK_N + tl.arange(0, TAIL)
        keys = load_rows(k.at + b * k.b + kv * k.h, k.n, n, call.N, c, c < D, True, D)
        values = load_rows(v.at + b * v.b + kv * v.h, v.n, n, call.N, c, c < D, True, D)
        dK, dV = tl.zeros((TAIL, D), tl.float32), tl.zeros((TAIL, D), tl.float32)
    for at in range(tl.program_id(1), call.groups * call.blocks, parts):
        h, block = kv * call.groups + at // call.blocks, at % call.blocks
        m, of = block * S.BLOCK_M + i, (b * call.heads * call.groups + h) * call.blocks + block
        x = load_rows(out.at + b * out.b + h * out.h, out.n, m, call.N, c, c < D, True, D).to(tl.float32)
        dO = load_rows(do.at + b * do.b + h * do.h, do.n, m, call.N, c, c < D, True, D)
        delta, row = tl.sum(x * dO.to(tl.float32), 1), b * lse.b + h * lse.h + m
        if dlse is not None:
            delta -= tl.load(dlse + row, mask=m < call.N, other=0.0)
        level = tl.load(lse.at + row, mask=m < call.N, other=float("inf")) * LOG2E
        tl.store(stats + of * (2 * S.BLOCK_M) + i, level)
        tl.store(stats + of * (2 * S.BLOCK_M) + S.BLOCK_M + i, delta)
        dQ = tl.zeros((S.BLOCK_M, D), tl.float32)
        if TAIL:
            queries = load_rows(q.at + b * q.b + h * q.h, q.n, m, call.N, c, c < D, True, D)
            p = tl.exp2(tl.dot(queries, tl.trans(keys)) * call.scale2 - level[:, None])
            p = tl.where((n < call.N)[None, :], p, 0.0)
            ds = (p * (tl.dot(dO, tl.trans(values)) - delta[:, None])).to(keys.dtype)
            dQ = tl.dot(ds, keys, dQ)
            dK = tl.dot(tl.trans(ds), queries, dK)
            dV = tl.dot(tl.trans(p.to(dO.dtype)), dO, dV)
        flat = tl.reshape(tl.permute(tl.reshape(dQ, (4, 2, 8, 8, 4, 2)), (3, 0, 2, 4, 1, 5)), (S.BLOCK_M * D,))
        tl.store(sums + of * (S.BLOCK_M * D) + tl.arange(0, S.BLOCK_M * D), flat)
    if TAIL:
        dK *= call.scale
        if table is not None:
            dK = turn(dK, table, b, kv, 0, n, call.N, call.prefix, True, S)
        there = (n < call.N)[:, None]
        tl.store(
            dk.at + b * dk.b + kv * dk.h + n.to(tl.int64)[:, None] * dk.n + c[None, :],
            dK.to(dk.at.dtype.element_ty),
            mask=there,
        )
        tl.store(
            dv.at + b * dv.b + kv * dv.h + n.to(tl.int64)[:, None] * dv.n + c[None, :],
            dV.to(dv.at.dtype.element_ty),
            mask=there,
        )


def ends_config(tail):
    """Of `attn_prepare_sm90_kernel`: 64 keys in four warps take all registers."""
    return {"num_warps": 8 if tail > 32 else 4, "num_stages": 2}


@triton.jit
def attn_finish_sm90_kernel(sums, dq, table, heads, N, prefix, scale, S):
    """Program: the gradient of a block of queries from its sum, which is in the order of registers; turned back."""
    pid, blocks = tl.program_id(0), tl.cdiv(N, S.BLOCK_M)
    block, h, b = pid % blocks, (pid // blocks % heads).to(tl.int64), (pid // blocks // heads).to(tl.int64)
    i = tl.arange(0, S.BLOCK_M * S.BLOCK_D)
    x = tl.load(sums + pid.to(tl.int64) * (S.BLOCK_M * S.BLOCK_D) + i) * scale
    x = tl.permute(tl.reshape(x, (8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    x, m, c = tl.reshape(x, (S.BLOCK_M, S.BLOCK_D)), block * S.BLOCK_M + tl.arange(0, S.BLOCK_M), tl.arange(0, S.BLOCK_D)
    if table is not None:
        x = turn(x, table, b, h, 0, m, N, prefix, True, S)
    at = dq.at + b * dq.b + h * dq.h + m.to(tl.int64)[:, None] * dq.n + c[None, :]
    tl.store(at, x.to(dq.at.dtype.element_ty), mask=(m < N)[:, None])
