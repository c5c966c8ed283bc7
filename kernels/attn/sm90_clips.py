"""Attention of packed clips of different lengths on Hopper: how the kernels of `sm90.py` and `sm90_backward.py` find them.

Nobody waits for the clips' limits: one small launch makes a table of tiles, the longest clips' first, in which a program looks
up the clip of each of its tiles, as many as the table says. What TMA copies ends where a clip ends (see `corner`): beyond are
zeros, no neighbour is read or written, and within a tile all is as with clips of one length. The last keys of a clip, which may
fill a block only in part, are masked in a whole block, not taken apart in a narrow one, as how many they are differs.
"""

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.attn.sm90 import END, LAYOUT, LOG2E, ROWS, SHAPES, Call, attn_forward_sm90_kernel
from evaat_fast.kernels.launch import FUSED, cdiv, launch, multiprocessors, table_of
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CLIPS = {"CLIPS": 32, "num_warps": 4}  # of a program that makes the table


@triton.jit
def attn_tiles_kernel(cu, tiles, clips, total, SIZE: tl.constexpr, CLIPS: tl.constexpr):
    """Program: the tiles of SIZE tokens of some clips. tiles: int32 [1 + at least as many as there are, 4], first how many there
    are and whether cu, int32 [clips + 1], are limits, then of each tile the first token of its clip, the clip's tokens and its
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
    launch(attn_tiles_kernel, (max(cdiv(clips, CLIPS["CLIPS"]), 1),), (cu, tiles, clips, total), {"SIZE": SIZE, **CLIPS, **FUSED})
    return tiles, most


def serves(*tensors):
    """Whether the copies take [1, H, tokens, D]: a token's heads beside each other, at multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.stride(1) == x.shape[3] and x.stride(2) % 8 == 0 for x in tensors)


def _copied(x, rows, descriptor):
    """A descriptor of [1, H, tokens, D], as `corner` wants it."""
    _, H, _, D = x.shape
    far, token = 2**31 - 2**16, x.stride(2)
    return descriptor(x, [far, far, END.value, H * D], [2**34 - token, token, token, 1], [1, 1, rows, D], LAYOUT)


def _of_clips(x):
    """Strides as between packed clips, which are told apart by their first token."""
    return x if x is None else x._replace(b=x.n)


def forward(q, k, v, out, lse, turned_q, table, scale, cu):
    """As `forward.forward` of packed clips, of heads of 64 in half precision and neighbouring pairs; all as `serves` wants it."""
    (_, H, total, D), Hk, shape = q.shape, k.shape[1], SHAPES[q.shape[3]]
    BN, rows = shape["BN"], ROWS.value
    tiles, most = _tiles(cu, total, shape["GROUPS"] * rows)
    of = lambda x, rows: _copied(x, rows, TensorDescriptor)  # noqa: E731
    call = Call(H, H // Hk, total, 0, 0, 0, 0, scale * LOG2E.value, 0, tiles)
    keep = turned_q is not None and table is not None
    table = table_of(table)
    table = table if table is None else table._replace(b=D // 2)
    places = of(q, rows), of(k, BN), of(v, BN), None, None, of(out, rows), of(turned_q if keep else q, rows)
    places += lse, table, call, 0, D, keep
    launch(attn_forward_sm90_kernel, (min(multiprocessors(q.device), most * H),), places, {**shape, "num_warps": 4, **FUSED})
