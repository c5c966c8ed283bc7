"""Attention over all tokens of a clip on Hopper, in Gluon: the forward pass.

A persistent grid: each program goes from tile to tile, 192 queries of a clip's head. One warp copies (TMA), three warpgroups
turn and multiply 64 queries each (wgmma), so that the copies of a tile lie under the products of the one before. The keys that
do not fill a block of 128 come first, in a block of 16, 32 or 64 of their own; tiles of fewer than three warpgroups come last.

`warpgroup_mma_wait(0)` stands behind a wait for the next keys: without a block's end between them ptxas moves it above the
exponentials, and the product of the values no longer runs beneath them.
"""

import inspect
from collections import namedtuple

import triton
from evaat_fast.kernels.launch import FUSED, cdiv, launch, multiprocessors, next_power_of_2, table_of
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

if "functions_and_args" not in inspect.signature(gl.warp_specialize).parameters:
    raise ImportError(f"attention in Gluon needs Triton 3.6 or later, got {triton.__version__}")
# Names of later versions, and of Triton 3.6.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
if hasattr(tma, "async_atomic_add"):
    copy_add = tma.async_atomic_add
else:

    @gl._core.builtin
    def copy_add(descriptor, coord, src, _semantic=None):
        kind, coord = gl._core.ir.DESCRIPTOR_REDUCE_KIND.ADD, _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coord, src.handle)


@gluon.jit
def zero_here(n):
    """0.0, of an n that is not negative, which no compiler knows above the wait before it."""
    vote: gl.constexpr = "{ .reg .pred p; setp.lt.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, -1; }"
    return gl.inline_asm_elementwise(vote, "=f,r", [n], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def only_here(n):
    """n, of which no compiler makes addresses before a loop, which would be kept there for what is rare."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def stores_done():
    """Waits until what this partition has copied out is in memory; tma.store_wait, until it is read."""
    gl.inline_asm_elementwise("cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # queries of a warpgroup
# What the kernel is compiled for, by head dim. GROUPS: warpgroups of 64 queries. BN: keys of a block. STAGES: blocks in flight.
# REGISTERS: of the warpgroups. At 128 the sums take twice the registers, so that there are two warpgroups, or blocks of half
# the keys where the last keys, in a block of their own, leave no room beside two whole ones.
SHAPES = {
    64: {"GROUPS": 3, "BN": 128, "STAGES": 3, "REGISTERS": 160, "PDL": False},
    128: {"GROUPS": 2, "BN": 128, "STAGES": 2, "REGISTERS": 240, "PDL": False},
}
HALF_BLOCKS = {"GROUPS": 3, "BN": 64, "STAGES": 3, "REGISTERS": 160, "PDL": False}
# PDL, with the option launch_pdl: a program begins before the kernel ahead is done, and waits for that before it reads
# anything: as a rule that kernel turns the keys, but nobody says so here.
EARLY = {"PDL": True, "launch_pdl": True}

# heads, groups: of the queries, and of those to a key head. N: tokens. tiles: of all heads, of which `full` are whole, per_head
# of a head. blocks: of BN keys, without the tail. scale2: of the scores, with log2(e). prefix: tokens that are not turned.
# clips: of packed clips, what `sm90_clips.attn_tiles_kernel` makes.
Call = namedtuple("Call", "heads groups N tiles full per_head blocks scale2 prefix clips", defaults=(None,))
# Of packed clips, N and blocks are those of the clip that a tile is in, and the clip's number is its first token: from clip to
# clip is as far as from token to token. See `corner`.
END = gl.constexpr(2**30)
# What is in shared memory: two tiles' queries, and barriers by the name of what they guard.
Shared = namedtuple("Shared", "q k v k_tail v_tail q_there q_free k_there k_free v_there v_free tail_there tail_free")
Descriptors = namedtuple("Descriptors", "q k v k_tail v_tail out turned")


@gluon.jit
def place_of(t, call, SIZE: gl.constexpr):
    """(clip, head, first token) of a tile of SIZE; those of a head's end that are not whole come after all others."""
    whole = t < call.full
    of = gl.where(whole, t // call.per_head, t - call.full)
    return of // call.heads, of % call.heads, gl.where(whole, t % call.per_head, call.per_head) * SIZE


@gluon.jit
def clip_of(t, call, SIZE: gl.constexpr):
    """Of packed clips: (first token of the clip, its tokens, its first tile if there were one head, head, first token of the
    tile in the clip)."""
    entry = call.clips + 4 * (t // call.heads + 1)
    first, N, tile = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
    tiles, of = (N + SIZE - 1) // SIZE, t - tile * call.heads
    return first, N, tile, of // tiles, of % tiles * SIZE


@gluon.jit
def _tile(t, call, SIZE: gl.constexpr):
    """(clip, its tokens, head, first token) of a tile."""
    if call.clips is None:
        b, h, row = place_of(t, call, SIZE)
        return b, call.N, h, row
    else:
        b, N, _, h, row = clip_of(t, call, SIZE)
        return b, N, h, row


@gluon.jit
def _of_clip(call, N, BN: gl.constexpr):
    """The call of packed clips, of one of them."""
    sizes = N, call.tiles, call.full, call.per_head, (N + BN - 1) // BN
    return Call(call.heads, call.groups, *sizes, call.scale2, call.prefix, call.clips)


@gluon.jit
def corner(call, b, h, row, D: gl.constexpr):
    """Where a copy of a head's rows from `row` on begins, in a tensor [B, H, N, D]. Packed clips are [tokens, H * D] behind two
    dimensions that end the rows where the clip ends: 2**30 rows of the last but one are there, and the first moves back by as
    many, as addresses have 64 bits (what triton.tools.ragged_tma does). Beyond are zeros, and nothing is written."""
    if call.clips is None:
        return b, h, row, 0
    else:
        return END, b + call.N, END - call.N + row, h * D


@gluon.jit
def _copies(at, sh, call, GROUPS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr):
    """The producer: copies what the consumers wait for, as soon as its place in shared memory is free."""
    it, seen = 0, 0
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, N, h, row = _tile(t, call, GROUPS * ROWS)
        clip = call if call.clips is None else _of_clip(call, N, BN)  # Triton 3.6 returns no tuple that holds a None
        kv = h // call.groups
        for c in gl.static_range(GROUPS):
            place = (it % 2) * GROUPS + c
            mbarrier.wait(sh.q_free.index(place), ((it // 2) & 1) ^ 1)
            mbarrier.expect(sh.q_there.index(place), at.q.block_type.nbytes)
            copy_in(at.q, corner(clip, b, h, row + c * ROWS, D), sh.q_there.index(place), sh.q.index(place))
        if call.clips is None:
            tail = call.blocks * BN
            mbarrier.wait(sh.tail_free.index(0), (it & 1) ^ 1)
            mbarrier.expect(sh.tail_there.index(0), at.k_tail.block_type.nbytes)
            copy_in(at.k_tail, [b, kv, tail, 0], sh.tail_there.index(0), sh.k_tail)
            mbarrier.wait(sh.tail_free.index(1), (it & 1) ^ 1)
            mbarrier.expect(sh.tail_there.index(1), at.v_tail.block_type.nbytes)
            copy_in(at.v_tail, [b, kv, tail, 0], sh.tail_there.index(1), sh.v_tail)
        for i in range(clip.blocks):
            n = it * call.blocks + i if call.clips is None else seen + i
            key = i * BN if call.clips is None else gl.where(i > 0, i - 1, clip.blocks - 1) * BN  # the last, which is masked
            s, free = n % STAGES, ((n // STAGES) & 1) ^ 1
            mbarrier.wait(sh.k_free.index(s), free)
            mbarrier.expect(sh.k_there.index(s), at.k.block_type.nbytes)
            copy_in(at.k, corner(clip, b, kv, key, D), sh.k_there.index(s), sh.k.index(s))
            mbarrier.wait(sh.v_free.index(s), free)
            mbarrier.expect(sh.v_there.index(s), at.v.block_type.nbytes)
            copy_in(at.v, corner(clip, b, kv, key, D), sh.v_there.index(s), sh.v.index(s))
        it += 1
        if call.clips is not None:
            seen += clip.blocks


@gluon.jit
def angles(x, table, b, h, row, call, D: gl.constexpr, FIRST: gl.constexpr = 0):
    """Cosines and sines [64, pairs] of a head's tokens from `row` on and of pairs from FIRST on, as many as x has, in its
    layout; 1 and 0 where nothing is turned."""
    P: gl.constexpr = x.type.layout
    n = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, P))
    c = FIRST + gl.arange(0, x.type.shape[1], layout=gl.SliceLayout(0, P))
    turned = ((n >= call.prefix) & (n < call.N))[:, None]
    head = table.at + b.to(gl.int64) * table.b + h.to(gl.int64) * table.h
    at = head + (n - call.prefix)[:, None] * (D // 2) + c[None, :]
    return gl.load(at, mask=turned, other=1.0), gl.load(at + table.half, mask=turned, other=0.0)


@gluon.jit
def _turn(q, table, b, h, row, call, D: gl.constexpr):
    """The queries [64, D] in shared memory, turned where they lie."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    pairs = q.load(L).reshape((ROWS, D // 2, 2))
    x, y = pairs.split()
    cos, sin = angles(x, table, b, h, row, call, D)
    x, y = x.to(gl.float32), y.to(gl.float32)
    q.store(gl.join(x * cos - y * sin, y * cos + x * sin).reshape((ROWS, D)).to(q.dtype))
    fence_async_shared()


@gluon.jit
def _weights(s, m, total, scale2, dtype: gl.constexpr, A: gl.constexpr):
    """(largest score so far, the sum, what both were multiplied with, the weights as a product's left side)."""
    new = gl.maximum(m, gl.max(s, 1) * scale2)
    p = gl.exp2(s * scale2 - new[:, None])
    alpha = gl.exp2(m - new)
    return new, total * alpha + gl.sum(p, 1), alpha, gl.convert_layout(p.to(dtype), A)


@gluon.jit
def _attend(at, sh, out_lse, table, call, c: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, TAIL: gl.constexpr,
            D: gl.constexpr, STAGES: gl.constexpr, KEEP: gl.constexpr):  # fmt: skip
    """A consumer: warpgroup c."""
    dtype: gl.constexpr = sh.q.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    TL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TAIL, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, SL)
    it, seen = 0, 0
    for t in range(gl.program_id(0), call.tiles, gl.num_programs(0)):
        b, N, h, row = _tile(t, call, GROUPS * ROWS)
        clip = call if call.clips is None else _of_clip(call, N, BN)  # Triton 3.6 returns no tuple that holds a None
        row += c * ROWS
        place = (it % 2) * GROUPS + c
        before = ((it + 1) % 2) * GROUPS + c
        first = it * call.blocks if call.clips is None else seen
        mbarrier.wait(sh.q_there.index(place), (it // 2) & 1)
        if row < clip.N:
            kept = sh.q.index(place)
            q = kept.reshape((ROWS, D))
            if table is not None:
                _turn(q, table, b, h, row, clip, D)
                if KEEP:
                    copy_out(at.turned, corner(clip, b, h, row, D), kept)
            if TAIL:
                mbarrier.wait(sh.tail_there.index(0), it & 1)
                s_t = gl.zeros((ROWS, TAIL), gl.float32, TL)
                product = warpgroup_mma(q, sh.k_tail.reshape((TAIL, D)).permute((1, 0)), s_t, use_acc=False, is_async=True)
                # The result of the tile before has left its place by now.
                tma.store_wait(pendings=1 if KEEP else 0)
                mbarrier.arrive(sh.q_free.index(before), count=1, pred=it > 0)
                s_t = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(sh.tail_free.index(0), count=1)
                n = call.blocks * BN + gl.arange(0, TAIL, layout=gl.SliceLayout(0, TL))
                s_t = gl.where((n < call.N)[None, :], s_t * call.scale2, -float("inf"))
                m_t = gl.max(s_t, 1)
                p_t = gl.exp2(s_t - m_t[:, None])
                m, total = gl.convert_layout(m_t, R), gl.convert_layout(gl.sum(p_t, 1), R)
                p = gl.convert_layout(p_t.to(dtype), A)
                mbarrier.wait(sh.tail_there.index(1), it & 1)
                acc = gl.zeros((ROWS, D), gl.float32, OL)
                values = warpgroup_mma(p, sh.v_tail.reshape((TAIL, D)), acc, use_acc=False, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(values,))
                mbarrier.arrive(sh.tail_free.index(1), count=1)
                s = gl.zeros((ROWS, BN), gl.float32, SL)
                mbarrier.wait(sh.k_there.index(first % STAGES), (first // STAGES) & 1)
                product = warpgroup_mma(
                    q, sh.k.index(first % STAGES).reshape((BN, D)).permute((1, 0)), s, use_acc=False, is_async=True
                )
                s = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(sh.k_free.index(first % STAGES), count=1)
                m, total, alpha, p = _weights(s, m, total, call.scale2, dtype, A)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OL))[:, None]
            else:
                s = gl.zeros((ROWS, BN), gl.float32, SL)
                mbarrier.wait(sh.k_there.index(first % STAGES), (first // STAGES) & 1)
                product = warpgroup_mma(
                    q, sh.k.index(first % STAGES).reshape((BN, D)).permute((1, 0)), s, use_acc=False, is_async=True
                )
                # The result of the tile before has left its place by now.
                tma.store_wait(pendings=1 if KEEP else 0)
                mbarrier.arrive(sh.q_free.index(before), count=1, pred=it > 0)
                s = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(sh.k_free.index(first % STAGES), count=1)
                n = (clip.blocks - 1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, SL))
                w = gl.where((n < clip.N)[None, :], s * call.scale2, -float("inf"))
                m = gl.max(w, 1)
                w = gl.exp2(w - m[:, None])
                total = gl.sum(w, 1)
                p = gl.convert_layout(w.to(dtype), A)
                acc = gl.zeros((ROWS, D), gl.float32, OL)
            following = first + 1
            mbarrier.wait(sh.k_there.index(following % STAGES), (following // STAGES) & 1, pred=clip.blocks > 1)
            for i in range(1, clip.blocks):
                j = first + i
                k_at, v_at = j % STAGES, (j - 1) % STAGES
                product = warpgroup_mma(q, sh.k.index(k_at).reshape((BN, D)).permute((1, 0)), s, use_acc=False, is_async=True)
                mbarrier.wait(sh.v_there.index(v_at), ((j - 1) // STAGES) & 1)
                values = warpgroup_mma(p, sh.v.index(v_at).reshape((BN, D)), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(product,))
                mbarrier.arrive(sh.k_free.index(k_at), count=1)
                m, total, alpha, p = _weights(s, m, total, call.scale2, dtype, A)
                following = j + 1
                mbarrier.wait(sh.k_there.index(following % STAGES), (following // STAGES) & 1, pred=i + 1 < clip.blocks)
                acc = warpgroup_mma_wait(0, deps=(values,))
                mbarrier.arrive(sh.v_free.index(v_at), count=1)
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OL))[:, None]
            last = first + clip.blocks - 1
            mbarrier.wait(sh.v_there.index(last % STAGES), (last // STAGES) & 1)
            values = warpgroup_mma(p, sh.v.index(last % STAGES).reshape((BN, D)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(values,))
            mbarrier.arrive(sh.v_free.index(last % STAGES), count=1)
            acc = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, OL))[:, None]
            rows = row + gl.arange(0, ROWS, layout=R)
            of = (b * call.heads + h).to(gl.int64) * call.N if call.clips is None else h.to(gl.int64) * call.N + b
            gl.store(out_lse + of + rows, (m + gl.log2(total)) / LOG2E, mask=rows < clip.N)
            if KEEP:
                tma.store_wait(pendings=0)
            q.store(acc.to(dtype))
            fence_async_shared()
            copy_out(at.out, corner(clip, b, h, row, D), kept)
        else:  # no query of the tile is this warpgroup's: all that is left is to say so
            tma.store_wait(pendings=0)
            mbarrier.arrive(sh.q_free.index(before), count=1, pred=it > 0)
            if TAIL:
                for i in gl.static_range(2):
                    mbarrier.wait(sh.tail_there.index(i), it & 1)
                    mbarrier.arrive(sh.tail_free.index(i), count=1)
            for j in range(first, first + clip.blocks):
                mbarrier.wait(sh.k_there.index(j % STAGES), (j // STAGES) & 1)
                mbarrier.arrive(sh.k_free.index(j % STAGES), count=1)
                mbarrier.wait(sh.v_there.index(j % STAGES), (j // STAGES) & 1)
                mbarrier.arrive(sh.v_free.index(j % STAGES), count=1)
        it += 1
        if call.clips is not None:
            seen += clip.blocks
    tma.store_wait(pendings=0)


@gluon.jit
def attn_forward_sm90_kernel(q, k, v, k_tail, v_tail, out, turned, lse, table, call, TAIL: gl.constexpr, D: gl.constexpr,
                             KEEP: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
                             REGISTERS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Descriptors of q, out and turned [1, 1, 64, D], of k, v [1, 1, BN, D] and of their tails [1, 1, TAIL, D]. lse: float32
    [B, H, N]. KEEP: the turned queries, as the products see them, go to `turned`. Packed clips, which call.clips tells of, have
    no tails, TAIL is 0: the keys that do not fill a block come first in one that is masked."""
    B: gl.constexpr = mbarrier.MBarrierLayout()
    at = Descriptors(q, k, v, k_tail, v_tail, out, turned)
    of_q: gl.constexpr = 2 * GROUPS
    if call.clips is not None:
        scale2 = gl.where(gl.load(call.clips + 1) > 0, call.scale2, float("nan"))
        tiles = gl.load(call.clips) * call.heads
        sizes = call.N, tiles, call.full, call.per_head, call.blocks
        call = Call(call.heads, call.groups, *sizes, scale2, call.prefix, call.clips)
    sh = Shared(
        gl.allocate_shared_memory(q.dtype, [of_q, 1, 1, ROWS, D], q.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BN, D], q.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BN, D], q.layout),
        gl.allocate_shared_memory(q.dtype, [1, 1, TAIL, D], q.layout) if TAIL else None,
        gl.allocate_shared_memory(q.dtype, [1, 1, TAIL, D], q.layout) if TAIL else None,
        gl.allocate_shared_memory(gl.int64, [of_q, 1], B),
        gl.allocate_shared_memory(gl.int64, [of_q, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [2, 1], B),
        gl.allocate_shared_memory(gl.int64, [2, 1], B),
    )
    for i in gl.static_range(of_q):
        mbarrier.init(sh.q_there.index(i), count=1)
        mbarrier.init(sh.q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(sh.k_there.index(i), count=1)
        mbarrier.init(sh.k_free.index(i), count=GROUPS)
        mbarrier.init(sh.v_there.index(i), count=1)
        mbarrier.init(sh.v_free.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(sh.tail_there.index(i), count=1)
        mbarrier.init(sh.tail_free.index(i), count=GROUPS)
    if PDL:
        done: gl.constexpr = "griddepcontrol.wait; mov.b32 $0, 0;"
        gl.inline_asm_elementwise(done, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_attend, (at, sh, lse, table, call, 0, GROUPS, BN, TAIL, D, STAGES, KEEP)),
                (_attend, (at, sh, lse, table, call, 1, GROUPS, BN, TAIL, D, STAGES, KEEP)),
                (_attend, (at, sh, lse, table, call, 2, GROUPS, BN, TAIL, D, STAGES, KEEP)),
                (_copies, (at, sh, call, GROUPS, BN, STAGES, D)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (at, sh, lse, table, call, 0, GROUPS, BN, TAIL, D, STAGES, KEEP)),
                (_attend, (at, sh, lse, table, call, 1, GROUPS, BN, TAIL, D, STAGES, KEEP)),
                (_copies, (at, sh, call, GROUPS, BN, STAGES, D)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


def serves(*tensors):
    """Whether the copies take q, k and v: TMA wants addresses and strides that are multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and all(stride % 8 == 0 and stride for stride in x.stride()[:3]) for x in tensors)


def shape_of(N, D):
    """What the kernel is compiled for. Of heads of 64 three blocks in flight are 2 to 3 % faster than two on an H200 of 785,
    1,025 and 1,569 tokens, 1 % slower of 6,273. Of heads of 128 whole blocks take 0.304 and 0.961 ms at 785 and 1,569 tokens,
    half of them 0.316 and 1.06."""
    if D == 128 and (N - 1) % 128 >= 64:
        return HALF_BLOCKS
    return SHAPES[D] | ({"STAGES": 2} if D == 64 and N >= 3000 else {})


LAYOUT = gl.NVMMASharedLayout(128, 16, rank=4)


def forward(q, k, v, out, lse, turned_q, table, prefix, scale, shape=None):
    """As `forward.forward`, of heads of 64 or 128 in half precision and neighbouring pairs, of at least 192 queries and as many
    keys, of clips that are not packed. shape: another one of `SHAPES`."""
    (B, H, N, D), Hk = q.shape, k.shape[1]
    shape = shape or shape_of(N, D)
    BN, groups = shape["BN"], shape["GROUPS"]
    blocks = (N - 1) // BN
    tail = max(16, next_power_of_2(N - blocks * BN))
    per_head, rest = divmod(cdiv(N, ROWS.value), groups)
    full = B * H * per_head
    tiles = full + (B * H if rest else 0)
    of = lambda x, rows: TensorDescriptor.from_tensor(x, [1, 1, rows, D], LAYOUT)  # noqa: E731
    call = Call(H, H // Hk, N, tiles, full, per_head, blocks, scale * LOG2E.value, prefix)
    keep = turned_q is not None and table is not None
    places = of(q, 64), of(k, BN), of(v, BN), of(k, tail), of(v, tail), of(out, 64), of(turned_q if keep else q, 64)
    places += lse, table_of(table), call, tail, D, keep
    launch(attn_forward_sm90_kernel, (min(multiprocessors(q.device), tiles),), places, {**shape, "num_warps": 4, **FUSED})
