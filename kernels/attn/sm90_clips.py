"""Attention of packed clips of different lengths on Hopper: how the kernels of `sm90.py` and `sm90_backward.py` find them.

Nobody waits for the clips' limits: one small launch makes a table of tiles, the longest clips' first, in which a program looks
up the clip of each of its tiles, as many as the table says. What TMA copies ends where a clip ends (see `corner`): beyond are
zeros, no neighbour is read or written, and within a tile all is as with clips of one length. The last keys of a clip, which may
fill a block only in part, are masked in a whole block, not taken apart in a narrow one, as how many they are differs.
"""

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.attn import sm90, sm90_backward
from evaat_fast.kernels.attn.forward import load_rows, shape_of
from evaat_fast.kernels.attn.sm90 import END, LAYOUT, LOG2E, ROWS, SHAPES, attn_forward_sm90_kernel
from evaat_fast.kernels.attn.sm90_backward import ENDS, GROUPS, PLAIN, SHAPE, attn_backward_sm90_kernel
from evaat_fast.kernels.attn.sm90_ends import queries_of
from evaat_fast.kernels.launch import FUSED, Rows, cdiv, launch, multiprocessors, table_of
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CLIPS = {"CLIPS": 32, "num_warps": 4}  # of a program that makes the table


@triton.jit
def attn_tiles_kernel(cu, tiles, clips, total, SIZE: tl.constexpr, CLIPS: tl.constexpr):
    """Program: the tiles of SIZE tokens of some clips. tiles: int32 [1 + at least as many as there are, 4], first their number
    and whether cu, int32 [clips + 1], are limits, then of each tile the first token of its clip, the clip's tokens and its
    first tile. Limits that are none make one clip of all tokens."""
    mine = tl.program_id(0) * CLIPS + tl.arange(0, CLIPS)
    first = tl.load(cu + mine, mask=mine < clips, other=total)
    N = tl.load(cu + mine + 1, mask=mine < clips, other=total) - first
    begin, count, falls = tl.zeros((CLIPS,), tl.int32), 0, 0
    for i in range(0, clips, 4 * CLIPS):
        other = i + tl.arange(0, 4 * CLIPS)
        a, b = tl.load(cu + other, mask=other < clips, other=total), tl.load(cu + other + 1, mask=other < clips, other=total)
        n, many = (b - a)[None, :], tl.cdiv(b - a, SIZE)
        before = (n > N[:, None]) | ((n == N[:, None]) & (other[None, :] < mine[:, None]))
        begin += tl.sum(tl.where(before, many[None, :], 0), 1)
        count += tl.sum(many, 0)
        falls += tl.sum((b < a).to(tl.int32), 0)
    ordered = (falls == 0) & (tl.load(cu) == 0) & (tl.load(cu + clips) == total)
    if not ordered:
        first, N, begin = first * 0, tl.where(mine == 0, total, 0), begin * 0
        count = tl.cdiv(total, SIZE)
    if tl.program_id(0) == 0:
        tl.store(tiles, count)
        tl.store(tiles + 1, ordered.to(tl.int32))
    many = tl.cdiv(N, SIZE)
    for i in range(0, tl.max(many, 0), 32):
        tile = i + tl.arange(0, 32)
        at, there = tiles + 4 * (1 + begin[:, None] + tile[None, :]), tile[None, :] < many[:, None]
        tl.store(at, first[:, None], mask=there)
        tl.store(at + 1, N[:, None], mask=there)
        tl.store(at + 2, begin[:, None], mask=there)


def _tiles(cu, total, SIZE):
    """(the table, at least as many tiles as it has)."""
    clips = len(cu) - 1
    most = total // SIZE + max(clips, 1)  # each clip may fill its last tile only in part
    tiles = torch.empty((1 + most, 4), dtype=torch.int32, device=cu.device)
    launch(
        attn_tiles_kernel, (max(cdiv(clips, CLIPS["CLIPS"]), 1),), (cu, tiles, clips, total), {"SIZE": SIZE, **CLIPS, **FUSED}
    )
    return tiles, most


def serves(*tensors):
    """Whether the copies take [1, H, tokens, D]: a token's heads beside each other, at multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.stride(1) == x.shape[3] and x.stride(2) % 8 == 0 < x.stride(2) for x in tensors)


def _copied(x, rows):
    """Shape, strides and block of a descriptor of [1, H, tokens, D], as `corner` wants it."""
    _, H, _, D = x.shape
    far, token = 2**31 - 2**16, x.stride(2)
    return [far, far, END.value, H * D], [2**34 - token, token, token, 1], [1, 1, rows, D]


def _between(x, apart):
    """With the stride from clip to clip, of what tells them apart by their first token."""
    return x if x is None else x._replace(b=apart)


def forward(q, k, v, out, lse, turned_q, table, scale, cu):
    """As `forward.forward` of packed clips, of heads of 64 in half precision and neighbouring pairs, as `serves` wants them."""
    (_, H, total, D), Hk, shape = q.shape, k.shape[1], SHAPES[q.shape[3]]
    BN, rows = shape["BN"], ROWS.value
    tiles, most = _tiles(cu, total, shape["GROUPS"] * rows)
    of = lambda x, rows: TensorDescriptor(x, *_copied(x, rows), LAYOUT)  # noqa: E731
    call = sm90.Call(H, H // Hk, total, 0, 0, 0, 0, scale * LOG2E.value, 0, tiles)
    keep = turned_q is not None and table is not None
    places = of(q, rows), of(k, BN), of(v, BN), None, None, of(out, rows), of(turned_q if keep else q, rows)
    places += lse, _between(table_of(table), D // 2), call, 0, D, keep
    launch(attn_forward_sm90_kernel, (min(multiprocessors(q.device), most * H),), places, {**shape, "num_warps": 4, **FUSED})


@triton.jit
def _block(call, S):
    """What is this program's: (first token of a clip, its tokens, head, block of queries, that among all); no tokens where the
    program is left over."""
    heads, t = call.heads * call.groups, tl.program_id(0) // 2
    there = t < tl.load(call.clips) * heads
    entry = call.clips + 4 * (t // heads + 1)
    first, N = tl.load(entry, mask=there, other=0), tl.load(entry + 1, mask=there, other=0)
    tile = tl.load(entry + 2, mask=there, other=0)
    tiles, of = tl.cdiv(N, 2 * S.BLOCK_M), t - tile * heads
    h, block = of // tl.maximum(tiles, 1), of % tl.maximum(tiles, 1) * 2 + tl.program_id(0) % 2
    among = (tile * 2 * heads + h * tl.cdiv(N, S.BLOCK_M) + block).to(tl.int64)
    return first.to(tl.int64), N, h.to(tl.int64), block, among


@triton.jit
def attn_prepare_clips_kernel(out, do, lse, dlse, stats, sums, turns, call, S):
    """Program: of a block of queries what `attn_prepare_sm90_kernel` makes of it, without TAIL."""
    D: tl.constexpr = S.D
    b, N, h, block, of = _block(call, S)
    i, c = tl.arange(0, S.BLOCK_M), tl.arange(0, D)
    m = block * S.BLOCK_M + i
    if block * S.BLOCK_M < N:
        x = load_rows(out.at + b * out.b + h * out.h, out.n, m, N, c, c < D, True, D).to(tl.float32)
        dO = load_rows(do.at + b * do.b + h * do.h, do.n, m, N, c, c < D, True, D)
        delta, row = tl.sum(x * dO.to(tl.float32), 1), b * lse.b + h * lse.h + m
        if dlse is not None:
            delta -= tl.load(dlse + row, mask=m < N, other=0.0)
        level = tl.load(lse.at + row, mask=m < N, other=float("inf")) * LOG2E
        tl.store(stats + of * (2 * S.BLOCK_M) + i, level * (-1.0 / call.scale2))
        tl.store(stats + of * (2 * S.BLOCK_M) + S.BLOCK_M + i, -delta)
        if turns is not None:
            tl.store(turns + of, 0)
        at = sums + of * (S.BLOCK_M * D) + tl.arange(0, S.BLOCK_M * D)
        tl.store(at, tl.zeros((S.BLOCK_M * D,), tl.float32))


@triton.jit
def attn_finish_clips_kernel(sums, dq, table, call, S):
    """Program: the gradient of a block of queries from its sum, turned back."""
    b, N, h, block, of = _block(call, S)
    if block * S.BLOCK_M < N:
        queries_of(sums, dq, None, table, b, h, block, of, N, call, S)


def backward(q, k, v, out, do, lse, dlse, grads, tables, scale, cu, ordered):
    """As `sm90_backward.backward`, of packed clips, as `serves` wants them."""
    (_, H, total, D), Hk, rows = q.shape, k.shape[1], ROWS.value
    tiles, most = _tiles(cu, total, GROUPS.value * rows)
    blocks = most * GROUPS.value * H
    call = sm90_backward.Call(Hk, H // Hk, total, 0, 0, 0, 0, scale, scale * LOG2E.value, 0, tiles)
    stats, sums = (lse.new_empty((blocks * x, rows)) for x in (2, D))
    turns = torch.empty(blocks, dtype=torch.int32, device=q.device) if ordered else None
    out, do_rows, lse, dq, dk, dv = (_between(Rows(x, *x.stride()[:3]), x.stride(2)) for x in (out, do, lse, *grads))
    (table, k_table), S = (_between(table_of(x), D // 2) for x in tables), shape_of(q, True, None, rows, GROUPS.value * rows)
    given = out, do_rows, lse, dlse, stats, sums, turns, call, S
    launch(attn_prepare_clips_kernel, (blocks,), given, {**ENDS["launch"], **FUSED})
    of = lambda x: TensorDescriptor(x, *_copied(x, rows), LAYOUT)  # noqa: E731
    plain = lambda x, block: TensorDescriptor.from_tensor(x, block, PLAIN)  # noqa: E731
    given = of(q), of(k), of(v), of(do), plain(stats, [1, rows]), plain(sums, [rows, rows])
    given += turns, dk, dv, None, k_table, call
    options = {"WHOLE": False, **SHAPE, "num_warps": 4, "launch_cooperative_grid": ordered, **FUSED}
    launch(attn_backward_sm90_kernel, (min(multiprocessors(q.device), most * Hk),), given, options)
    launch(attn_finish_clips_kernel, (blocks,), (sums, dq, table, call, S), {**ENDS["behind"], **FUSED})
