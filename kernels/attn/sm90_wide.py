"""The backward pass of `sm90.py` for heads of 128, whose gradients of keys and values take all registers of two warpgroups.

As in `sm90_backward.py` a program goes from tile to tile, 128 keys of a clip's head, past all queries in blocks of 64, and TMA
adds dQ up in memory; but the two warpgroups that make the weights of 64 keys each also make dQ, half of its columns each, of
what both have left in shared memory. The exponentials of a block lie under its product of dP, the slopes under that of dV, and
what leaves for dQ under that of the next scores. Everything is in halves of 64 columns, as TMA and products want them.
"""

from collections import namedtuple

from evaat_fast.kernels.attn import sm90_backward
from evaat_fast.kernels.attn.sm90 import ROWS, copy_add, copy_in, place_of, zero_here
from evaat_fast.kernels.attn.sm90_backward import GROUPS, Memory, columns_of, first_of, leave
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# What the kernel is compiled for, and the passes before and behind it, as in sm90_backward.py. STAGES: two have room.
SHAPE = {"D": 128, "STAGES": 2, "SPREAD": True, "KEYS": 240}
ENDS = {"most": 32, "blocks": 4, "launch": {"num_warps": 8, "num_stages": 2}, "behind": {"num_warps": 8}}
HALVES = gl.constexpr(2)  # of 64 columns
# What is in shared memory: a tile's keys and values, blocks in flight, two blocks' dS, one's dQ, and barriers by the name of
# what they guard.
Shared = namedtuple("Shared", "k v q do lse delta ds dq k_there k_free v_there v_free q_there q_free do_there do_free ds_there")


@gluon.jit
def _block(first, i, count):
    """The i-th block of queries that a tile meets, of all of its key head's, in a circle from `first` on."""
    return gl.where(first + i < count, first + i, first + i - count)


@gluon.jit
def _copies(at, sh, call, STAGES: gl.constexpr, SPREAD: gl.constexpr):
    """The producer: copies what the others wait for, as soon as its place in shared memory is free."""
    it, n = 0, 0
    row: gl.constexpr = 4 * ROWS
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, h, key = place_of(t, call, GROUPS * ROWS)
        mbarrier.wait(sh.k_free.index(0), (it & 1) ^ 1)
        mbarrier.expect(sh.k_there.index(0), GROUPS * HALVES * at.k.block_type.nbytes)
        for c in gl.static_range(GROUPS * HALVES):
            copy_in(at.k, [b, h, key + (c // HALVES) * ROWS, (c % HALVES) * ROWS], sh.k_there.index(0), sh.k.index(c))
        first, count = first_of(key, call, SPREAD), call.groups * call.blocks
        for i in range(count):
            of = _block(first, i, count)
            head, block = h * call.groups + of // call.blocks, of % call.blocks
            of += (b * call.heads + h) * count
            s, free = n % STAGES, ((n // STAGES) & 1) ^ 1
            mbarrier.wait(sh.q_free.index(s), free)
            mbarrier.expect(sh.q_there.index(s), HALVES * at.q.block_type.nbytes + row)
            for half in gl.static_range(HALVES):
                place = sh.q.index(s * HALVES + half)
                copy_in(at.q, [b, head, block * ROWS, half * ROWS], sh.q_there.index(s), place)
            copy_in(at.stats, [2 * of, 0], sh.q_there.index(s), sh.lse.index(s))
            if i == 0:  # behind the first queries, which are wanted earlier
                mbarrier.wait(sh.v_free.index(0), (it & 1) ^ 1)
                mbarrier.expect(sh.v_there.index(0), GROUPS * HALVES * at.v.block_type.nbytes)
                for c in gl.static_range(GROUPS * HALVES):
                    part = [b, h, key + (c // HALVES) * ROWS, (c % HALVES) * ROWS]
                    copy_in(at.v, part, sh.v_there.index(0), sh.v.index(c))
            mbarrier.wait(sh.do_free.index(s), free)
            mbarrier.expect(sh.do_there.index(s), HALVES * at.do.block_type.nbytes + row)
            for half in gl.static_range(HALVES):
                place = sh.do.index(s * HALVES + half)
                copy_in(at.do, [b, head, block * ROWS, half * ROWS], sh.do_there.index(s), place)
            copy_in(at.stats, [2 * of + 1, 0], sh.do_there.index(s), sh.delta.index(s))
            n += 1
        it += 1


@gluon.jit
def _half(places, i):
    """The i-th [64, 64] of shared memory."""
    return places.index(i).reshape((ROWS, ROWS))


@gluon.jit
def _scores(rows, c: gl.constexpr, columns, s, x):
    """Warpgroup c's 64 rows [64, 128] times the transposed columns [64, 128] of stage s, and x: two products, under way."""
    x = warpgroup_mma(_half(rows, c * HALVES), _half(columns, s * HALVES).permute((1, 0)), x, is_async=True)
    return warpgroup_mma(_half(rows, c * HALVES + 1), _half(columns, s * HALVES + 1).permute((1, 0)), x, is_async=True)


@gluon.jit
def _keys(at, sh, dk, dv, columns, table, call, c: gl.constexpr, WHOLE: gl.constexpr, D: gl.constexpr,
          STAGES: gl.constexpr, SPREAD: gl.constexpr):  # fmt: skip
    """Warpgroup c: the gradients of 64 keys and values of each tile, and half of the columns of its share of dQ."""
    dtype: gl.constexpr = sh.q.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    zeros = gl.zeros((ROWS, ROWS), gl.float32, L)
    n, it = 0, 0
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, h, key = place_of(t, call, GROUPS * ROWS)
        first, count = first_of(key, call, SPREAD), call.groups * call.blocks
        of = (b * call.heads + h) * count
        key += c * ROWS
        there = (key + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)) < call.N)[:, None]
        dK0, dK1, dV0, dV1 = zeros, zeros, zeros, zeros
        mbarrier.wait(sh.k_there.index(0), it & 1)
        mbarrier.wait(sh.q_there.index(n % STAGES), (n // STAGES) & 1)
        s = _scores(sh.k, c, sh.q, n % STAGES, columns_of(sh.lse.index(n % STAGES), L))
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.wait(sh.v_there.index(0), it & 1)
        for i in range(count):
            j = n + i
            here, then, two = j % STAGES, (j + 1) % STAGES, (j % 2) * GROUPS
            mbarrier.wait(sh.do_there.index(here), (j // STAGES) & 1)
            dp = _scores(sh.v, c, sh.do, here, columns_of(sh.delta.index(here), L))
            p = gl.exp2(s * call.scale2 + zero_here(call.N))
            p = p if WHOLE else gl.where(there, p, 0.0)
            weights = gl.convert_layout(p.to(dtype), A)
            dV0 = warpgroup_mma(weights, _half(sh.do, here * HALVES), dV0, is_async=True)
            dV1 = warpgroup_mma(weights, _half(sh.do, here * HALVES + 1), dV1, is_async=True)
            dp = warpgroup_mma_wait(2, deps=(dp,))  # under way: dV
            ds = (p * dp).to(dtype)
            slopes = gl.convert_layout(ds, A)
            dK0 = warpgroup_mma(slopes, _half(sh.q, here * HALVES), dK0, is_async=True)
            dK1 = warpgroup_mma(slopes, _half(sh.q, here * HALVES + 1), dK1, is_async=True)
            sh.ds.index(two + c).store(ds)
            fence_async_shared()
            mbarrier.arrive(sh.ds_there.index(two + c), count=1)
            mbarrier.wait(sh.ds_there.index(two), (j // 2) & 1)
            mbarrier.wait(sh.ds_there.index(two + 1), (j // 2) & 1)
            dQ = warpgroup_mma(sh.ds.index(two).permute((1, 0)), _half(sh.k, c), zeros, use_acc=False, is_async=True)
            dQ = warpgroup_mma(sh.ds.index(two + 1).permute((1, 0)), _half(sh.k, HALVES + c), dQ, is_async=True)
            mbarrier.wait(sh.q_there.index(then), ((j + 1) // STAGES) & 1, pred=i + 1 < count)
            dV0, dV1, dK0, dK1 = warpgroup_mma_wait(2, deps=(dV0, dV1, dK0, dK1))  # under way: the next scores
            # Behind a tile's last block, of what lies there, for nothing.
            s = _scores(sh.k, c, sh.q, then, columns_of(sh.lse.index(then), L))
            dQ = warpgroup_mma_wait(2, deps=(dQ,))
            mbarrier.arrive(sh.do_free.index(here), count=1)
            mbarrier.arrive(sh.q_free.index(here), count=1)
            tma.store_wait(pendings=0)  # of the block before
            # In the order of registers: 16 bytes of each thread, one after the other.
            flat = dQ.reshape((4, 2, 8, 8, 4, 2)).permute((3, 0, 2, 4, 1, 5)).reshape((ROWS, ROWS))
            sh.dq.index(c).store(flat)
            fence_async_shared()
            copy_add(at.sums, [((of + _block(first, i, count)) * HALVES + c) * ROWS, 0], sh.dq.index(c))
            s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(sh.k_free.index(0), count=1)
        mbarrier.arrive(sh.v_free.index(0), count=1)
        leave(dV0, dv, None, columns, 2, b, h, key, call, D)
        leave(dV1, dv, None, columns, 2, b, h, key, call, D, ROWS)
        leave(dK0 * call.scale, dk, table, columns, 1, b, h, key, call, D)
        leave(dK1 * call.scale, dk, table, columns, 1, b, h, key, call, D, ROWS)
        n += count
        it += 1
    tma.store_wait(pendings=0)


@gluon.jit
def attn_backward_wide_kernel(q, k, v, do, stats, sums, turns, dk, dv, columns, table, call, WHOLE: gl.constexpr,
                              D: gl.constexpr, STAGES: gl.constexpr, SPREAD: gl.constexpr, KEYS: gl.constexpr):  # fmt: skip
    """As `attn_backward_sm90_kernel`, of 128 columns in two halves. Descriptors of q, k, v and do [1, 1, 64, 64], of stats
    [1, 64] and of sums [64, 64]. turns: None."""
    B: gl.constexpr = mbarrier.MBarrierLayout()
    at = Memory(q, k, v, do, stats, sums, turns)
    S: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    sh = Shared(
        gl.allocate_shared_memory(k.dtype, [GROUPS * HALVES, 1, 1, ROWS, ROWS], k.layout),
        gl.allocate_shared_memory(k.dtype, [GROUPS * HALVES, 1, 1, ROWS, ROWS], k.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES * HALVES, 1, 1, ROWS, ROWS], k.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES * HALVES, 1, 1, ROWS, ROWS], k.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], stats.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], stats.layout),
        gl.allocate_shared_memory(k.dtype, [2 * GROUPS, ROWS, ROWS], S),
        gl.allocate_shared_memory(gl.float32, [GROUPS, ROWS, ROWS], sums.layout),
        gl.allocate_shared_memory(gl.int64, [1, 1], B),
        gl.allocate_shared_memory(gl.int64, [1, 1], B),
        gl.allocate_shared_memory(gl.int64, [1, 1], B),
        gl.allocate_shared_memory(gl.int64, [1, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], B),
    )
    mbarrier.init(sh.k_there.index(0), count=1)
    mbarrier.init(sh.k_free.index(0), count=GROUPS)
    mbarrier.init(sh.v_there.index(0), count=1)
    mbarrier.init(sh.v_free.index(0), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(sh.q_there.index(i), count=1)
        mbarrier.init(sh.q_free.index(i), count=GROUPS)
        mbarrier.init(sh.do_there.index(i), count=1)
        mbarrier.init(sh.do_free.index(i), count=GROUPS)
    for i in gl.static_range(2 * GROUPS):
        mbarrier.init(sh.ds_there.index(i), count=1)
    gl.warp_specialize(
        [
            (_keys, (at, sh, dk, dv, columns, table, call, 0, WHOLE, D, STAGES, SPREAD)),
            (_keys, (at, sh, dk, dv, columns, table, call, 1, WHOLE, D, STAGES, SPREAD)),
            (_copies, (at, sh, call, STAGES, SPREAD)),
        ],
        [4, 1],
        [KEYS, 24],
    )


def backward(*call):
    """As `sm90_backward.backward`, of heads of 128, not ordered."""
    sm90_backward.backward(*call, False, SHAPE, ENDS, attn_backward_wide_kernel)
