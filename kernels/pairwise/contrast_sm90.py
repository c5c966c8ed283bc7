"""InfoNCE on Hopper, in Gluon: the sweeps of `contrast.py` with an exponential a pair, under the products of other tiles.

A persistent grid: each program keeps 256 captions in shared memory, 128 for each of two warpgroups, and goes past videos, 64
at a time, which one warp copies (TMA). A warpgroup has two tiles of 64 x 128 products: of one it makes exponentials and sums
while the tensor cores multiply the other (wgmma), so that neither waits for the other.

Both sweeps raise 2 to the logits less one number for all, `_shift`: so rows and columns add the same exponentials up, of the
columns in registers until a program has passed its videos. That is exact while the sums of every row and column are numbers
that float32 has, which logits of unit features are but for scales of hundreds. `contrast_totals.py` finds out; where they are
not, it sums up once more, each row and column about its own largest, and the slopes are made of two exponentials.

A wait for videos stands before each wait for products, which ptxas else moves above the exponentials: see `sm90.py`. Counted
for features of 256 numbers, a tile takes the tensor cores 1,024 cycles, its exponentials 512 of their unit's, and of a
scheduler's issue slots its first sweep takes 370, its second 520.
"""

from collections import namedtuple
from functools import lru_cache

import torch
from evaat_fast.kernels.attn.sm90 import LOG2E, copy_in, copy_out, only_here
from evaat_fast.kernels.launch import FUSED, cdiv, launch, multiprocessors
from evaat_fast.kernels.pairwise import contrast_totals
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

GROUPS = gl.constexpr(2)  # warpgroups
ROWS, COLUMNS = gl.constexpr(64), gl.constexpr(128)  # of a tile

# Pairs of videos first .. last - 1 and all N captions. span: videos of a unit of work, a multiple of 128; across: units of the
# same videos; units: of all.
Call = namedtuple("Call", "N first last span across units")
# What is in shared memory, and barriers by the name of what they guard.
Shared = namedtuple("Shared", "text video slopes factors text_there text_free video_there video_free")


@gluon.jit
def _shift(scale2):
    """What is subtracted from logits in units of ln 2, so that the largest that unit features have is 110 or less."""
    return gl.maximum(gl.maximum(scale2, -scale2) - 110.0, 0.0)


@gluon.jit
def _scale2(scale):
    """What logits in units of ln 2 are products times; not 0, of which that of an infinity is none."""
    scale2 = gl.load(scale) * LOG2E
    return gl.where((scale2 < 1e-30) & (scale2 > -1e-30), 1e-30, scale2)


@gluon.jit
def _unit(u, call):
    """(first caption, first video, twice 64 videos) of a unit of work."""
    first = call.first + u // call.across * call.span
    end = gl.where(first + call.span < call.last, first + call.span, call.last)
    return u % call.across * (GROUPS * COLUMNS), first, (end - first + 2 * ROWS - 1) // (2 * ROWS)


@gluon.jit
def _copies(video, text, sh, call, STAGES: gl.constexpr):
    """The producer: copies what the consumers wait for, as soon as its place in shared memory is free."""
    n, it = 0, 0
    for u in range(gl.program_id(0), call.units, gl.num_programs(0)):
        column, first, steps = _unit(u, call)
        for c in gl.static_range(GROUPS):
            mbarrier.wait(sh.text_free.index(c), (it & 1) ^ 1)
            mbarrier.expect(sh.text_there.index(c), text.block_type.nbytes)
            copy_in(text, [column + c * COLUMNS, 0], sh.text_there.index(c), sh.text.index(c))
        for i in range(2 * steps):
            s = n % STAGES
            mbarrier.wait(sh.video_free.index(s), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(sh.video_there.index(s), video.block_type.nbytes)
            copy_in(video, [first + i * ROWS, 0], sh.video_there.index(s), sh.video.index(s))
            n += 1
        it += 1


@gluon.jit
def _products(sh, c: gl.constexpr, j, STAGES: gl.constexpr, L: gl.constexpr, there):
    """Of the j-th 64 videos that a program meets and of warpgroup c's captions, under way. The videos are `there`, if
    any are; to wait for them ends a block, which keeps exponentials from the places of these instructions."""
    zeros, s = gl.zeros((ROWS, COLUMNS), gl.float32, L), j % STAGES
    x = warpgroup_mma(sh.video.index(s), sh.text.index(c).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(sh.video_there.index(s), (j // STAGES) & 1, pred=there)
    return x


@gluon.jit
def _at_edge(row, column, call):
    """Whether a tile has pairs of a video with its own caption, or is not whole."""
    return (row + ROWS > call.last) | (column + COLUMNS > call.N) | ((row < column + COLUMNS) & (column < row + ROWS))


@gluon.jit
def _others(m, n, call):
    """Whether a pair is another than each of its sides' own."""
    return (m < call.last)[:, None] & (n < call.N)[None, :] & (m[:, None] != n[None, :])


@gluon.jit
def _beyond(scale2):
    """A product whose exponential is 0; no infinity, which times that would be none."""
    return gl.where(scale2 < 0.0, 1e38, -1e38)


@gluon.jit
def _add(x, columns, out, row, column, scale2, shift, call, L: gl.constexpr):
    """Stores the sums of exponentials of a tile's rows; returns those of its columns, of a thread, with these added."""
    m, n = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    if _at_edge(row, column, call):
        found = gl.sum(gl.where(m[:, None] == n[None, :], x, 0.0), 1)
        gl.store(out.own + m, found, mask=(m < call.last) & (m >= column) & (m < column + COLUMNS))
        x = gl.where(_others(m, n, call), x, _beyond(scale2))
    e = gl.exp2(x * scale2 - shift)
    block = (m * 0 + column // COLUMNS).to(gl.int64)
    gl.store(
        out.rows + block * (call.last - call.first) + (m - call.first), gl.sum(e, 1), mask=(m < call.last) & (column < call.N)
    )
    upper, lower = e.reshape((4, 2, 8, COLUMNS)).permute((0, 2, 3, 1)).split()
    return columns + gl.convert_layout(upper + lower, columns.type.layout)


@gluon.jit
def _sum_up(sh, out, scale, call, c: gl.constexpr, STAGES: gl.constexpr):
    """A consumer of the first sweep: warpgroup c."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    C: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 8, 4], [4, 1, 1], [2, 1, 0])
    scale2 = _scale2(scale)
    shift = _shift(scale2)
    if c == 0:
        gl.store(out.again, 0, mask=(gl.program_id(0) == 0) & (call.first == 0))
    j, it = 0, 0
    for u in range(gl.program_id(0), call.units, gl.num_programs(0)):
        column, row, steps = _unit(u, call)
        column += c * COLUMNS
        mbarrier.wait(sh.text_there.index(c), it & 1)
        mbarrier.wait(sh.video_there.index(j % STAGES), (j // STAGES) & 1)
        x = warpgroup_mma_wait(0, deps=(_products(sh, c, j, STAGES, L, True),))
        mbarrier.arrive(sh.video_free.index(j % STAGES), count=1)
        mbarrier.wait(sh.video_there.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1)
        columns = gl.zeros((4, 8, COLUMNS), gl.float32, C)
        for i in range(steps):
            then, last = j + 1, j + 2
            y = _products(sh, c, then, STAGES, L, True)
            columns = _add(x, columns, out, row, column, scale2, shift, call, L)
            mbarrier.wait(sh.video_there.index(last % STAGES), (last // STAGES) & 1, pred=i + 1 < steps)
            y = warpgroup_mma_wait(0, deps=(y,))
            mbarrier.arrive(sh.video_free.index(then % STAGES), count=1)
            x = _products(sh, c, last, STAGES, L, i + 1 < steps)  # behind the last videos of what lies there, for nothing
            columns = _add(y, columns, out, row + ROWS, column, scale2, shift, call, L)
            mbarrier.wait(sh.video_there.index((last + 1) % STAGES), ((last + 1) // STAGES) & 1, pred=i + 1 < steps)
            x = warpgroup_mma_wait(0, deps=(x,))
            mbarrier.arrive(sh.video_free.index(last % STAGES), count=1, pred=i + 1 < steps)
            row += 2 * ROWS
            j += 2
        mbarrier.arrive(sh.text_free.index(c), count=1)
        sums = gl.sum(columns, 1)
        w = gl.arange(0, 4, layout=gl.SliceLayout(1, sums.type.layout))[:, None]
        n = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, sums.type.layout))[None, :]
        part = u // call.across * 4 + w
        gl.store(out.columns + part.to(gl.int64) * call.N + n, sums, mask=n + w * 0 < call.N)
        it += 1


@gluon.jit
def _slopes(x, factor, at, sh, totals, again, row, column, scale2, shift, call, c: gl.constexpr, L: gl.constexpr):
    """Stores the slopes of a tile's logits; returns, by rows, their sums with the products."""
    place, factors = sh.slopes.index(c), sh.factors.index(c).load(gl.SliceLayout(0, L))
    tma.store_wait(pendings=0)
    slope = gl.exp2(x * scale2 - shift) * (factor[:, None] + factors[None, :])
    dots = gl.sum(slope * x, 1)
    place.store(slope.to(place.dtype))
    if _at_edge(row, column, call) | (again != 0):
        dots = _rare_slopes(x, place, totals, row, column, scale2, call, L)
    fence_async_shared()
    copy_out(at, [row - call.first, column], place)
    return dots


@gluon.jit
def _rare_slopes(x, place, totals, row, column, scale2, call, L: gl.constexpr):
    """Those of any tile, and of sums of any size."""
    row, column = only_here(row), only_here(column)
    m, n = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    in_m, in_n, of_columns = m < call.last, n < call.N, totals.logs + 2 * call.N
    slope = _probability(x * scale2, totals.logs, totals.weight, m, in_m, call, 1)
    slope += _probability(x * scale2, of_columns, totals.weight, n, in_n, call, 0)
    of_row, of_column = _of(totals.rest, totals.weight, m, in_m), _of(totals.rest + call.N, totals.weight, n, in_n)
    slope = gl.where(m[:, None] == n[None, :], -(of_row[:, None] + of_column[None, :]), slope)
    slope = gl.where(in_m[:, None] & in_n[None, :], slope, 0.0)
    place.store(slope.to(place.dtype))
    return gl.sum(slope * x, 1)


@gluon.jit
def _of(x, weight, i, mask):
    """x at i, times the weight there, if there is one; 0 where there is no i."""
    found = gl.load(x + i, mask=mask, other=0.0)
    if weight is not None:
        found = found * gl.load(weight + i, mask=mask, other=0.0)
    return found


@gluon.jit
def _probability(s, logs, weight, i, mask, call, axis: gl.constexpr):
    """2 ** (s - total), a total being the sum of two floats."""
    high, low = gl.load(logs + i, mask=mask, other=0.0), gl.load(logs + call.N + i, mask=mask, other=0.0)
    p = gl.exp2((s - gl.expand_dims(high, axis)) - gl.expand_dims(low, axis))
    if weight is not None:
        p = p * gl.expand_dims(gl.load(weight + i, mask=mask, other=0.0), axis)
    return p


@gluon.jit
def _make_slopes(at, sh, scale, totals, out, again, call, c: gl.constexpr, STAGES: gl.constexpr):
    """A consumer of the second sweep: warpgroup c."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    scale2, redo = _scale2(scale), gl.load(again)
    shift = _shift(scale2)
    m, n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), gl.arange(0, COLUMNS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    j, it = 0, 0
    for u in range(gl.program_id(0), call.units, gl.num_programs(0)):
        column, row, steps = _unit(u, call)
        column += c * COLUMNS
        sh.factors.index(c).store(_of(totals.inverse + call.N, totals.weight, column + n, column + n < call.N))
        of_x = _of(totals.inverse, totals.weight, row + m, row + m < call.last)
        mbarrier.wait(sh.text_there.index(c), it & 1)
        mbarrier.wait(sh.video_there.index(j % STAGES), (j // STAGES) & 1)
        x = warpgroup_mma_wait(0, deps=(_products(sh, c, j, STAGES, L, True),))
        mbarrier.arrive(sh.video_free.index(j % STAGES), count=1)
        mbarrier.wait(sh.video_there.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1)
        dots = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, L))
        for i in range(steps):
            then, last = j + 1, j + 2
            y = _products(sh, c, then, STAGES, L, True)
            of_y = _of(totals.inverse, totals.weight, row + ROWS + m, row + ROWS + m < call.last)
            dots += _slopes(x, of_x, at, sh, totals, redo, row, column, scale2, shift, call, c, L)
            mbarrier.wait(sh.video_there.index(last % STAGES), (last // STAGES) & 1, pred=i + 1 < steps)
            y = warpgroup_mma_wait(0, deps=(y,))
            mbarrier.arrive(sh.video_free.index(then % STAGES), count=1)
            x = _products(sh, c, last, STAGES, L, i + 1 < steps)  # behind the last videos of what lies there, for nothing
            of_x = _of(totals.inverse, totals.weight, row + 2 * ROWS + m, row + 2 * ROWS + m < call.last)
            dots += _slopes(y, of_y, at, sh, totals, redo, row + ROWS, column, scale2, shift, call, c, L)
            mbarrier.wait(sh.video_there.index((last + 1) % STAGES), ((last + 1) // STAGES) & 1, pred=i + 1 < steps)
            x = warpgroup_mma_wait(0, deps=(x,))
            mbarrier.arrive(sh.video_free.index(last % STAGES), count=1, pred=i + 1 < steps)
            row += 2 * ROWS
            j += 2
        mbarrier.arrive(sh.text_free.index(c), count=1)
        gl.store(out + (u * GROUPS + c), gl.sum(dots, 0))
        it += 1
    tma.store_wait(pendings=0)


@gluon.jit
def _barriers(sh, STAGES: gl.constexpr):
    for i in gl.static_range(GROUPS):
        mbarrier.init(sh.text_there.index(i), count=1)
        mbarrier.init(sh.text_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(sh.video_there.index(i), count=1)
        mbarrier.init(sh.video_free.index(i), count=GROUPS)


@gluon.jit
def contrast_stats_sm90_kernel(video, text, scale, out, call, E: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr):
    """Descriptors of the features, in blocks of 64 videos and of 128 captions."""
    B: gl.constexpr = mbarrier.MBarrierLayout()
    sh = Shared(
        gl.allocate_shared_memory(text.dtype, [GROUPS, COLUMNS, E], text.layout),
        gl.allocate_shared_memory(video.dtype, [STAGES, ROWS, E], video.layout),
        None,
        None,
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], B),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
    )
    _barriers(sh, STAGES)
    gl.warp_specialize(
        [
            (_sum_up, (sh, out, scale, call, 0, STAGES)),
            (_sum_up, (sh, out, scale, call, 1, STAGES)),
            (_copies, (video, text, sh, call, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def contrast_slopes_sm90_kernel(video, text, panel, scale, totals, of_scale, again, call, E: gl.constexpr, STAGES: gl.constexpr,
                                REGISTERS: gl.constexpr):  # fmt: skip
    """As the first sweep's; panel: a descriptor of the slopes [last - first, N] in blocks of 64 x 128. of_scale: float32
    [2 units], sums of the slopes with the products."""
    B: gl.constexpr = mbarrier.MBarrierLayout()
    sh = Shared(
        gl.allocate_shared_memory(text.dtype, [GROUPS, COLUMNS, E], text.layout),
        gl.allocate_shared_memory(video.dtype, [STAGES, ROWS, E], video.layout),
        gl.allocate_shared_memory(panel.dtype, [GROUPS, ROWS, COLUMNS], panel.layout),
        gl.allocate_shared_memory(gl.float32, [GROUPS, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], B),
        gl.allocate_shared_memory(gl.int64, [GROUPS, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], B),
    )
    _barriers(sh, STAGES)
    gl.warp_specialize(
        [
            (_make_slopes, (panel, sh, scale, totals, of_scale, again, call, 0, STAGES)),
            (_make_slopes, (panel, sh, scale, totals, of_scale, again, call, 1, STAGES)),
            (_copies, (video, text, sh, call, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


# What the kernels are compiled for. STAGES: 64 videos each, in flight; with rows of 256 numbers there is room for no more.
SHAPES = {"stats": {"STAGES": 3, "REGISTERS": 240}, "slopes": {"STAGES": 2, "REGISTERS": 240}}
MOST_E = 256
LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)


def serves(video, text):
    """Whether the copies take the features: TMA wants addresses and strides that are multiples of 16 bytes."""
    E = video.shape[1]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1 for x in (video, text))
    return video.dtype in (torch.bfloat16, torch.float16) and E % 64 == 0 and E <= MOST_E and aligned


@lru_cache(maxsize=64)
def plan(rows, N, programs):
    """(span, ranges, units) of so many videos and N captions, which take the programs the least time: 128 videos a step, and
    near three such steps before and behind a unit."""
    across, steps = cdiv(N, GROUPS.value * COLUMNS.value), cdiv(rows, 2 * ROWS.value)

    def of(ranges):
        span = cdiv(steps, ranges)
        units = across * cdiv(steps, span)
        return cdiv(units, programs) * (span + 3), span, units

    _, span, units = min(of(ranges) for ranges in range(1, min(steps, 64) + 1))
    return span * 2 * ROWS.value, units // across, units


def strips(N):
    """How many sums a row has, of 128 captions each."""
    return cdiv(N, COLUMNS.value)


def _call(N, first, last, device):
    span, ranges, units = plan(last - first, N, multiprocessors(device))
    return Call(N, first, last, span, units // ranges, units)


def _launch(kernel, shape, device, arguments, call, E):
    options = {"E": E, **shape, "num_warps": 4, **FUSED}
    launch(kernel, (min(multiprocessors(device), call.units),), (*arguments, call), options)


def _features(video, text):
    E = video.shape[1]
    of = lambda x, rows: TensorDescriptor.from_tensor(x, [rows.value, E], LAYOUT)  # noqa: E731
    return of(video, ROWS), of(text, COLUMNS)


def stats(video, text, scale, sums, totals, costs, first, last):
    """The first sweep, of videos first .. last - 1, and what it adds to the totals. scale: float32 [1]."""
    N, E = text.shape
    call = _call(N, first, last, video.device)
    _launch(contrast_stats_sm90_kernel, SHAPES["stats"], video.device, (*_features(video, text), scale, sums), call, E)
    contrast_totals.add(sums, totals, costs, scale, N, first, last, strips(N), 4 * call.units // call.across)


def slopes(video, text, scale, totals, of_scale, again, panel, first, last):
    """The second sweep, into panel [last - first, N], whose rows are multiples of 8 numbers apart. of_scale: see `shares`."""
    N, E = text.shape
    call = _call(N, first, last, video.device)
    at = TensorDescriptor.from_tensor(panel, [ROWS.value, COLUMNS.value], LAYOUT)
    arguments = *_features(video, text), at, scale, totals, of_scale, again
    _launch(contrast_slopes_sm90_kernel, SHAPES["slopes"], video.device, arguments, call, E)


def shares(rows, N, device):
    """How many numbers add up to the gradient of the scale, of so many videos."""
    return GROUPS.value * plan(rows, N, multiprocessors(device))[2]


def ranges(rows, N, device):
    """How many sums a column has, of so many videos."""
    return 4 * plan(rows, N, multiprocessors(device))[1]
