"""The backward pass of `sm90.py`: one pass of five products, in which tiles of keys add their shares of dQ up in memory.

A persistent grid: each program goes from tile to tile, 128 keys of a clip's head, past all queries in blocks of 64. One warp
copies (TMA); two warpgroups make the weights of 64 keys each and from them dV and dK, whose left sides stay in registers; a
third makes dQ of what both have left in shared memory, and TMA adds it to a float32 sum. No warpgroup waits for its own last
product: the exponentials of a block lie under the product of dK of the block before and that of dP of its own, the slopes
under that of dV and that of the scores which come next, be they the next tile's.
"""

from collections import namedtuple

import torch
from evaat_fast.kernels.attn.forward import shape_of
from evaat_fast.kernels.attn.sm90 import (
    LAYOUT,
    LOG2E,
    ROWS,
    angles,
    clip_of,
    copy_add,
    copy_in,
    corner,
    place_of,
    stores_done,
)
from evaat_fast.kernels.attn.sm90_ends import attn_finish_sm90_kernel, attn_prepare_sm90_kernel
from evaat_fast.kernels.launch import FUSED, Rows, cdiv, launch, multiprocessors, next_power_of_2, table_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GROUPS = gl.constexpr(2)  # warpgroups that make weights
# What the kernel is compiled for. STAGES: blocks of queries and of dO in flight, at least three: scores are made ahead of dK.
# SPREAD: see `first_of`. KEYS: registers of the warpgroups that make weights, which need 192; QUERIES: of the third.
SHAPE = {"D": 64, "STAGES": 3, "SPREAD": True, "KEYS": 208, "QUERIES": 72}
# The passes before and behind it. most: keys at the end of a head that fill no tile and are taken apart; blocks: of queries
# that a program of the first then takes. launch, behind: options of the two.
ENDS = {"most": 64, "blocks": 8, "launch": {"num_warps": 4, "num_stages": 3}, "behind": {"num_warps": 4}}
# Log-sum-exps are divided by the scale, and have to stay finite.
LEAST_SCALE = 1e-20

# heads: of the keys. groups: query heads to a key head. N: tokens. tiles: of all heads, of which `full` are whole, per_head of
# a head. blocks: of queries. scale2: of the scores, with log2(e). prefix: tokens that are not turned. clips: as in sm90.py; N,
# per_head and blocks are then those of the clip that a tile is in, and full is its first block if there were one head.
Call = namedtuple("Call", "heads groups N tiles full per_head blocks scale scale2 prefix clips", defaults=(None,))
# What is in shared memory: two tiles' keys and values, blocks in flight, two blocks' dS and dQ, and barriers by the name of
# what they guard.
Shared = namedtuple("Shared", "k v q do lse delta ds dq kv_there kv_free q_there q_free do_there do_free ds_there ds_free")
# Descriptors of tensors, and how many tiles have added to a block of dQ, or None.
Memory = namedtuple("Memory", "q k v do stats sums turns")


@gluon.jit
def _tile(t, call):
    """(clip, its tokens, its first tile among packed clips of one head, key head, first key) of a tile."""
    if call.clips is None:
        b, h, key = place_of(t, call, GROUPS * ROWS)
        return b, call.N, 0, h, key
    else:
        return clip_of(t, call, GROUPS * ROWS)


@gluon.jit
def _of_clip(call, N, tile):
    """The call of packed clips, of one of them."""
    sizes = N, call.tiles, GROUPS * tile, N // (GROUPS * ROWS), (N + ROWS - 1) // ROWS
    return Call(call.heads, call.groups, *sizes, call.scale, call.scale2, call.prefix, call.clips)


@gluon.jit
def _first_block(call, b, head):
    """The first block of a head's queries, among all blocks."""
    heads = call.heads * call.groups
    if call.clips is None:
        return (b * heads + head) * call.blocks
    else:
        return call.full * heads + head * call.blocks


@gluon.jit
def first_of(key, call, SPREAD: gl.constexpr):
    """The block of queries that a tile begins with. With SPREAD the tiles of a head, which go side by side, keep apart: no two
    of them add to the same rows of dQ at once."""
    if SPREAD:
        first = (key // (GROUPS * ROWS)) * call.blocks // (call.per_head + 1)
        return first if call.clips is None else gl.where(_side_by_side(call), first, 0)
    else:
        return 0


@gluon.jit
def _side_by_side(call):
    """Whether all tiles of a packed clip's head are under way at once, and may wait for each other."""
    return call.per_head < gl.num_programs(0)


@gluon.jit
def _copies(at, sh, call, D: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr):
    """The producer: copies what the others wait for, as soon as its place in shared memory is free."""
    it, n = 0, 0
    row: gl.constexpr = 4 * ROWS
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, N, index, h, key = _tile(t, call)
        clip = call if call.clips is None else _of_clip(call, N, index)
        mbarrier.wait(sh.kv_free.index(it % 2), ((it // 2) & 1) ^ 1)
        mbarrier.expect(sh.kv_there.index(it % 2), 2 * GROUPS * at.k.block_type.nbytes)
        for c in gl.static_range(GROUPS):
            part = corner(clip, b, h, key + c * ROWS, D)
            copy_in(at.k, part, sh.kv_there.index(it % 2), sh.k.index((it % 2) * GROUPS + c))
            copy_in(at.v, part, sh.kv_there.index(it % 2), sh.v.index((it % 2) * GROUPS + c))
        first = first_of(key, clip, SPREAD)
        for mine in range(h * call.groups, (h + 1) * call.groups):
            of = _first_block(clip, b, mine)
            for i in range(first, first + clip.blocks):
                block = gl.where(i < clip.blocks, i, i - clip.blocks)
                s, free = n % STAGES, ((n // STAGES) & 1) ^ 1
                mbarrier.wait(sh.q_free.index(s), free)
                mbarrier.expect(sh.q_there.index(s), at.q.block_type.nbytes + row)
                copy_in(at.q, corner(clip, b, mine, block * ROWS, D), sh.q_there.index(s), sh.q.index(s))
                copy_in(at.stats, [2 * (of + block), 0], sh.q_there.index(s), sh.lse.index(s))
                mbarrier.wait(sh.do_free.index(s), free)
                mbarrier.expect(sh.do_there.index(s), at.do.block_type.nbytes + row)
                copy_in(at.do, corner(clip, b, mine, block * ROWS, D), sh.do_there.index(s), sh.do.index(s))
                copy_in(at.stats, [2 * (of + block) + 1, 0], sh.do_there.index(s), sh.delta.index(s))
                n += 1
        it += 1


@gluon.jit
def leave(x, rows, table, columns, which: gl.constexpr, b, h, key, call, D: gl.constexpr, FIRST: gl.constexpr = 0):
    """float32 [64, 64] of the keys from `key` and the columns from FIRST on to memory, turned back unless `table` is None; with
    `columns`, float32 [clips, blocks, 3, heads, D], also their column sums."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = gl.convert_layout(x, L)
    if table is not None:
        y, z = x.reshape((ROWS, ROWS // 2, 2)).split()
        cos, sin = angles(y, table, b, h, key, call, D, FIRST // 2)
        x = gl.convert_layout(gl.join(y * cos + z * sin, z * cos - y * sin).reshape((ROWS, ROWS)), L)
    n = key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    c = FIRST + gl.arange(0, ROWS, layout=gl.SliceLayout(0, L))
    at = rows.at + b.to(gl.int64) * rows.b + h.to(gl.int64) * rows.h + n.to(gl.int64)[:, None] * rows.n + c[None, :]
    gl.store(at, x.to(rows.at.dtype.element_ty), mask=(n < call.N)[:, None])
    if columns is not None:
        part = (b * call.blocks + key // ROWS).to(gl.int64) * 3 + which
        gl.store(columns + (part * call.heads + h) * D + c, gl.sum(x, 0), mask=key + c * 0 < call.N)


@gluon.jit
def columns_of(x, L: gl.constexpr):
    """What a product adds up from: a number for each column. Read while products are under way; read when it is needed, it
    waits for 230 cycles behind what these read."""
    return x.reshape((ROWS,)).load(gl.SliceLayout(0, L))[None, :].broadcast_to((ROWS, ROWS))


@gluon.jit
def _keys(at, sh, dk, dv, columns, table, call, c: gl.constexpr, WHOLE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Warpgroup c: the gradients of 64 keys and values of each tile, and its share of dS."""
    dtype: gl.constexpr = sh.q.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    zeros = gl.zeros((ROWS, ROWS), gl.float32, L)
    n, it = 0, 0
    begun = True if call.clips is None else gl.program_id(0) < call.tiles  # else there is nothing to wait for
    # Packed clips in order leave no register for each of the numbers that tell whether blocks follow: with Triton 3.6 there are
    # 9 accesses of the stack a block. In any order one number for all of them makes ptxas begin exponentials too early.
    SCARCE: gl.constexpr = call.clips is not None and at.turns is not None
    # The first tile's first scores; those of any other are made at the end of the tile before.
    mbarrier.wait(sh.kv_there.index(0), 0, pred=begun)
    mbarrier.wait(sh.q_there.index(0), 0, pred=begun)
    s = columns_of(sh.lse.index(0), L)
    first = sh.k.index(c).reshape((ROWS, D))
    s = warpgroup_mma(first, sh.q.index(0).reshape((ROWS, D)).permute((1, 0)), s, is_async=True)
    mbarrier.wait(sh.do_there.index(0), 0, pred=begun)
    dp = columns_of(sh.delta.index(0), L)
    s = warpgroup_mma_wait(0, deps=(s,))
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, N, index, h, key = _tile(t, call)
        clip = call if call.clips is None else _of_clip(call, N, index)
        count = call.groups * clip.blocks
        ahead = 2 * count + gl.where(t + gl.num_programs(0) < call.tiles, 1, 0) if SCARCE else 0
        key += c * ROWS
        v = sh.v.index((it % 2) * GROUPS + c).reshape((ROWS, D))
        there = (key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)) < clip.N)[:, None]
        dK, dV = zeros, zeros
        slopes = gl.zeros((ROWS, ROWS), dtype, A)
        for i in range(count):
            j = n + i
            here, then = j % STAGES, (j + 1) % STAGES
            before = gl.where(i > 0, (j + STAGES - 1) % STAGES, here)
            dO = sh.do.index(here).reshape((ROWS, D))
            dp = warpgroup_mma(v, dO.permute((1, 0)), dp, is_async=True)
            dK = warpgroup_mma(slopes, sh.q.index(before).reshape((ROWS, D)), dK, is_async=True)
            last, more = i + 1 == count, t + gl.num_programs(0) < call.tiles
            tile, phase = gl.where(last, it + 1, it), ((j + 1) // STAGES) & 1
            to_come = 2 * i + 3 == ahead if SCARCE else last & more
            mbarrier.wait(sh.kv_there.index(tile % 2), (tile // 2) & 1, pred=to_come)
            another = 2 * i + 3 <= ahead if SCARCE else more | (i + 1 < count)
            mbarrier.wait(sh.q_there.index(then), phase, pred=another)
            p = gl.exp2(s * call.scale2)
            p = p if WHOLE else gl.where(there, p, 0.0)
            s = columns_of(sh.lse.index(then), L)
            dV = warpgroup_mma(gl.convert_layout(p.to(dtype), A), dO, dV, is_async=True)
            k = sh.k.index((tile % 2) * GROUPS + c).reshape((ROWS, D))
            s = warpgroup_mma(k, sh.q.index(then).reshape((ROWS, D)).permute((1, 0)), s, is_async=True)
            dp, dK = warpgroup_mma_wait(2, deps=(dp, dK))  # under way: dV, the next scores
            mbarrier.arrive(sh.q_free.index(before), count=1, pred=i > 0)
            ds = (p * dp).to(dtype)
            mbarrier.wait(sh.ds_free.index((j % 2) * GROUPS + c), ((j // 2) & 1) ^ 1)
            sh.ds.index((j % 2) * GROUPS + c).store(ds)
            fence_async_shared()
            mbarrier.arrive(sh.ds_there.index((j % 2) * GROUPS + c), count=1)
            slopes = gl.convert_layout(ds, A)
            mbarrier.wait(sh.do_there.index(then), phase, pred=another)
            dp = columns_of(sh.delta.index(then), L)
            dV, s = warpgroup_mma_wait(0, deps=(dV, s))
            mbarrier.arrive(sh.do_free.index(here), count=1)
        end = (n + count - 1) % STAGES
        dK = warpgroup_mma(slopes, sh.q.index(end).reshape((ROWS, D)), dK, is_async=True)
        dK = warpgroup_mma_wait(0, deps=(dK,))
        mbarrier.arrive(sh.q_free.index(end), count=1)
        mbarrier.arrive(sh.kv_free.index(it % 2), count=1)
        leave(dV, dv, None, columns, 2, b, h, key, clip, D)
        leave(dK * call.scale, dk, table, columns, 1, b, h, key, clip, D)
        n += count
        it += 1


@gluon.jit
def _turn(key, block, call, SPREAD: gl.constexpr):
    """How many tiles of a head add to a block of queries before the tile that begins with `key`: with SPREAD those that come to
    it before. A tile which is not whole comes last, as it does in time."""
    tile, n = key // (GROUPS * ROWS), call.per_head
    if SPREAD:
        begun = ((block + 1) * (n + 1) + call.blocks - 1) // call.blocks  # tiles that begin with it or before it
        begun = gl.where(begun < n, begun, n)
        turn = begun - 1 - tile
        turn = gl.where(tile < n, gl.where(turn < 0, turn + n, turn), n)
        return turn if call.clips is None else gl.where(_side_by_side(call), turn, tile)
    else:
        return tile


@gluon.jit
def _queries(at, sh, call, D: gl.constexpr, SPREAD: gl.constexpr):
    """The third warpgroup: a tile's share of dQ, block by block."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    zeros = gl.zeros((ROWS, D), gl.float32, L)
    j, it, last = 0, 0, 0
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, N, index, h, key = _tile(t, call)
        clip = call if call.clips is None else _of_clip(call, N, index)
        mbarrier.wait(sh.kv_there.index(it % 2), (it // 2) & 1)
        k, first = (it % 2) * GROUPS, first_of(key, clip, SPREAD)
        for mine in range(h * call.groups, (h + 1) * call.groups):
            of = _first_block(clip, b, mine)
            for i in range(first, first + clip.blocks):
                two, phase = (j % 2) * GROUPS, (j // 2) & 1
                block = gl.where(i < clip.blocks, i, i - clip.blocks)
                if at.turns is not None:
                    turn = _turn(key, block, clip, SPREAD)
                    while gl.atomic_add(at.turns + of + block, 0, sem="acquire") < turn:
                        pass
                mbarrier.wait(sh.ds_there.index(two), phase)
                keys = sh.k.index(k).reshape((ROWS, D))
                dQ = warpgroup_mma(sh.ds.index(two).permute((1, 0)), keys, zeros, use_acc=False, is_async=True)
                dQ = warpgroup_mma_wait(0, deps=(dQ,))
                mbarrier.arrive(sh.ds_free.index(two), count=1)
                mbarrier.wait(sh.ds_there.index(two + 1), phase)
                keys = sh.k.index(k + 1).reshape((ROWS, D))
                dQ = warpgroup_mma(sh.ds.index(two + 1).permute((1, 0)), keys, dQ, is_async=True)
                dQ = warpgroup_mma_wait(0, deps=(dQ,))
                mbarrier.arrive(sh.ds_free.index(two + 1), count=1)
                if at.turns is not None:
                    stores_done()
                else:
                    tma.store_wait(pendings=1)  # of the two blocks before, one is added to memory still
                # In the order of registers: 16 bytes of each thread, one after the other.
                flat = dQ.reshape((4, 2, 8, 8, 4, 2)).permute((3, 0, 2, 4, 1, 5)).reshape((ROWS, D))
                sh.dq.index(j % 2).store(flat)
                fence_async_shared()
                copy_add(at.sums, [(of + block) * ROWS, 0], sh.dq.index(j % 2))
                if at.turns is not None:  # of the block before; a copy is launched when all threads have come to it
                    gl.atomic_add(at.turns + last, 1, mask=(mine > h * call.groups) | (i > first), sem="release")
                last = of + block
                j += 1
        if at.turns is not None:
            stores_done()
        mbarrier.arrive(sh.kv_free.index(it % 2), count=1)  # when all threads have come to it
        if at.turns is not None:
            gl.atomic_add(at.turns + last, 1, sem="release")
        it += 1
    tma.store_wait(pendings=0)


@gluon.jit
def attn_backward_sm90_kernel(q, k, v, do, stats, sums, turns, dk, dv, columns, table, call, WHOLE: gl.constexpr,
                              D: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr,
                              KEYS: gl.constexpr, QUERIES: gl.constexpr):  # fmt: skip
    """Descriptors of q, k, v and do [1, 1, 64, D], of stats [1, 64] and of sums [64, D]. turns: zeros, int32 [blocks of all
    heads], or None for tiles that add to dQ in any order. columns: as for `leave`. WHOLE: all tiles are."""
    B: gl.constexpr = mbarrier.MBarrierLayout()
    at = Memory(q, k, v, do, stats, sums, turns)
    S: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    of_kv: gl.constexpr = 2 * GROUPS
    if call.clips is not None:
        sizes = call.N, gl.load(call.clips) * call.heads, call.full, call.per_head, call.blocks
        call = Call(call.heads, call.groups, *sizes, call.scale, call.scale2, call.prefix, call.clips)
    sh = Shared(
        gl.allocate_shared_memory(k.dtype, [of_kv, 1, 1, ROWS, D], k.layout),
        gl.allocate_shared_memory(k.dtype, [of_kv, 1, 1, ROWS, D], k.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, ROWS, D], k.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, ROWS, D], k.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], stats.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], stats.layout),
        gl.allocate_shared_memory(k.dtype, [of_kv, ROWS, ROWS], S),
        gl.allocate_shared_memory(gl.float32, [2, ROWS, D], sums.layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], B),
        gl.allocate_shared_memory(gl.int64, [2, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [of_kv, 1], B),
        gl.allocate_shared_memory(gl.int64, [of_kv, 1], B),
    )
    for i in gl.static_range(2):
        mbarrier.init(sh.kv_there.index(i), count=1)
        mbarrier.init(sh.kv_free.index(i), count=GROUPS + 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(sh.q_there.index(i), count=1)
        mbarrier.init(sh.q_free.index(i), count=GROUPS)
        mbarrier.init(sh.do_there.index(i), count=1)
        mbarrier.init(sh.do_free.index(i), count=GROUPS)
    for i in gl.static_range(of_kv):
        mbarrier.init(sh.ds_there.index(i), count=1)
        mbarrier.init(sh.ds_free.index(i), count=1)
    gl.warp_specialize(
        [
            (_keys, (at, sh, dk, dv, columns, table, call, 0, WHOLE, D, STAGES)),
            (_keys, (at, sh, dk, dv, columns, table, call, 1, WHOLE, D, STAGES)),
            (_queries, (at, sh, call, D, SPREAD)),
            (_copies, (at, sh, call, D, STAGES, SPREAD)),
        ],
        [4, 4, 1],
        [KEYS, QUERIES, 24],
    )


PLAIN = gl.NVMMASharedLayout(0, 32, rank=2)  # of sums and statistics


def backward(q, k, v, out, do, lse, dlse, grads, columns, tables, prefix, scale, ordered, shape=SHAPE, ends=ENDS, kernel=None):
    """As `backward.backward`, of what `sm90.forward` takes; all three gradients are wanted. do: as `sm90.serves` wants it.
    scale: above LEAST_SCALE. columns: room for the column sums of the gradients, float32 [B, cdiv(N, 64), 3, H, D] where Hk is
    H, or None. ordered: dQ is the same to the bit every time. kernel: of other heads than 64, with their shape and ends; not
    ordered."""
    (B, H, N, D), Hk, rows = q.shape, k.shape[1], ROWS.value
    blocks, (per_head, rest) = cdiv(N, rows), divmod(N, GROUPS.value * rows)
    # So a tile that is not whole has keys for both warpgroups.
    tail = max(16, next_power_of_2(rest)) if 0 < rest <= ends["most"] else 0
    full = B * Hk * per_head
    tiles = full + (B * Hk if rest and not tail else 0)
    call = Call(Hk, H // Hk, N, tiles, full, per_head, blocks, scale, scale * LOG2E.value, prefix)
    parts = min(cdiv(call.groups * blocks, ends["blocks"] if tail else 1), 65535)  # a grid has no more beside its first
    stats, sums = (lse.new_empty((B * H * blocks * x, rows)) for x in (2, D))
    shares = lse.new_empty((B * Hk, parts, 2, D, tail)) if tail else None
    programs, turns = min(multiprocessors(q.device), tiles), None
    if ordered:
        turns = torch.empty(B * H * blocks, dtype=torch.int32, device=q.device)
        # A tile may wait for another of its head, which no program may be to take after it; all programs run at once.
        shape = shape | {"SPREAD": shape["SPREAD"] and per_head <= programs}
    of = lambda x, block, layout: TensorDescriptor.from_tensor(x, block, layout)  # noqa: E731
    places = [Rows(x, *x.stride()[:3]) for x in (q, k, v, out, do, lse)]
    dq, dk, dv = (Rows(x, *x.stride()[:3]) for x in grads)
    (table, k_table), S = map(table_of, tables), shape_of(q, True, None, rows, GROUPS.value * rows)
    given = *places, dlse, stats, sums, shares, turns, call, S
    launch(attn_prepare_sm90_kernel, (B * Hk, parts), given, {"TAIL": tail, **ends["launch"], **FUSED})
    given = (
        *(of(x, [1, 1, rows, rows], LAYOUT) for x in (q, k, v, do)),
        of(stats, [1, rows], PLAIN),
        of(sums, [rows, rows], PLAIN),
    )
    given += turns, dk, dv, columns, k_table, call
    options = {"WHOLE": tiles == full, **shape, "num_warps": 4, "launch_cooperative_grid": ordered, **FUSED}
    launch(kernel or attn_backward_sm90_kernel, (programs,), given, options)
    given = sums, shares, dq, dk, dv, columns, table, k_table, call, parts, S
    programs = B * H * blocks + (B * Hk if tail else 0)
    launch(attn_finish_sm90_kernel, (programs,), given, {"TAIL": tail, **ends["behind"], **FUSED})
