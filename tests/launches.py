"""Launches with a driver that stands in for a GPU's: `launch` must launch what Triton would. A script, since a process has one
driver; of so many random calls it prints how many launches it compared.
"""

import random
import sys
from pathlib import Path

import torch
from triton import knobs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import host
from evaat_fast.kernels.norm import add, rows, swiglu
from evaat_fast.kernels.pairwise import panel
from evaat_fast.kernels.rope3d import rotate

FLOATS = torch.float32, torch.bfloat16, torch.float16


def a_norm(draw):
    return norm(draw.choice((16, 48, 64)), draw.choice((1, 3, 16, 32)), draw.choice(FLOATS), draw)


def norm(C, M, low, draw, first=0):
    """first: 0 where rows begin at multiples of 16 bytes, else 1."""
    x = torch.zeros(M * C + 8, dtype=low)[first:][: M * C].view(M, C)
    stream, bias = (torch.zeros(M, C) if draw.random() < 0.7 else None), (torch.zeros(C) if draw.random() < 0.7 else None)
    weight = torch.nn.Parameter(torch.zeros(C, dtype=draw.choice((torch.float32, low))))
    out, total, statistics = torch.zeros(M, C, dtype=low), None if stream is None else torch.zeros(M, C), torch.zeros(2, M)
    eps = draw.choice((1e-6, 1e-5))
    return add.add_norm_kernel, lambda: add.forward(x, stream, weight, bias, out, total, statistics, eps)


def a_gradient(draw):
    C, M = draw.choice((16, 64)), draw.choice((1, 16))
    dY, x = torch.zeros(M, C), torch.zeros(M, 2 * C, dtype=draw.choice(FLOATS))
    sums, of_x = torch.zeros(2, draw.choice((2, 4)), C), None
    of_x = torch.zeros(2 * C) if sums.shape[1] == 4 else None
    places = torch.zeros(C), torch.zeros(2, M), torch.empty_like(x), sums, torch.zeros(C), torch.zeros(C), of_x
    return draw.choice((rows.sums_kernel, swiglu.swiglu_norm_backward_kernel)), lambda: swiglu.backward(dY, x, *places)


def a_rotation(draw):
    B, H, N, D = draw.choice((1, 2)), draw.choice((1, 5)), draw.choice((3, 17)), draw.choice((16, 64))
    xs = [torch.zeros(B, N, H, D, dtype=draw.choice(FLOATS)).transpose(1, 2) for _ in range(draw.choice((1, 2)))]
    xs = [x.to(xs[0].dtype) for x in xs]
    outs = xs if draw.random() < 0.5 else [torch.empty_like(x) for x in xs]
    table, ways = torch.zeros(2, draw.choice((1, B)), 1, N - 1, D // 2), (draw.random() < 0.5, draw.random() < 0.5)
    return rotate.rope3d_kernel, lambda: rotate.rotate(xs, outs, table, 1, *ways)


def a_scale(draw):
    given = [torch.zeros(3, 16) for _ in range(draw.choice((1, 2)))] + [torch.zeros(())] * draw.choice((0, 1))
    factor, outs = torch.ones(()), [x.to(draw.choice(FLOATS)) for x in given]
    return panel.scale_kernel, lambda: panel.scale(factor, given, outs)


def an_attention(N, **options):
    """Of TMA's descriptors."""
    from evaat_fast.kernels.attn import sm90

    q, k, v = torch.zeros(1, N, 3, 1, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    out, lse = torch.zeros(1, N, 1, 64, dtype=torch.bfloat16).transpose(1, 2), torch.zeros(1, 1, N)
    return sm90.attn_forward_sm90_kernel, lambda: sm90.forward(
        q, k, v, out, lse, None, None, 0, 0.125, sm90.SHAPES[64] | options
    )


def told(launch):
    source, grid, arguments, early = launch
    constants = {name: str(value) for name, value in source.constants.items()}
    return source.fn, source.signature, constants, source.attrs, grid, len(arguments), early


def same(a, b):
    """Whether two arguments are one."""
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "block_shape"):
        return same(a.base, b.base) and (a.shape, a.strides, a.block_shape) == (b.shape, b.strides, b.block_shape)
    if isinstance(a, torch.Tensor):
        return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return getattr(a, "value", a) == getattr(b, "value", b)


def main(count):
    draw, launches, compared, called = random.Random(count), [], 0, []
    host.stand_in(host.Driver(launches))
    # What differs in one thing alone, then anything.
    calls = [norm(16, M, low, random.Random(2), first) for low in FLOATS[:2] for M in (16, 3, 1) for first in (0, 1)]
    calls += [an_attention(N) for N in (200, 208, 200)]
    early = {"PDL": True, "launch_pdl": True}
    calls += [an_attention(200, **early), an_attention(200, PDL=True), an_attention(200)]
    for kernel, call in calls + [draw.choice((a_norm, a_gradient, a_rotation, a_scale))(draw) for _ in range(count)]:
        for _ in range(2):
            call()
        ours, launches[:] = launches[len(launches) // 2 :], []
        kernel.add_pre_run_hook(lambda *arguments, **options: called.append(1))  # which Triton alone calls
        call()
        kernel.pre_run_hooks.clear()
        assert called, "a kernel's own hooks were not called"
        assert len(ours) == len(launches)
        for a, b in zip(ours, launches, strict=True):
            assert told(a) == told(b) and all(map(same, a[2], b[2])), (told(a), told(b))
            assert a[3] == (call is calls[-3][1]), "one may begin early, which all others are not to take for theirs"
            compared += 1
        launches.clear(), called.clear()
    seen = []
    knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    call = a_norm(random.Random(1))[1]
    call(), call()
    assert seen == ["add_norm_kernel"] * 2, seen
    print(compared)


if __name__ == "__main__":
    main(int(sys.argv[1]))
