"""joint_attention of packed clips of different lengths: each as if it were alone."""

import random

import pytest
import torch
from check import close
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops.attn.clips import nested_sdpa
from evaat_fast.ops.attn.fused import attend
from evaat_fast.ops.attn.plan import AttentionPlan
from evaat_fast.ops.rope3d.rotation import Rotation

backends = pytest.mark.parametrize("backend", ["sdpa", "reference", pytest.param("triton", marks=pytest.mark.interpret)])
GRID = (5, 3, 4)
ROPES = [{}, dict(grid=GRID), dict(grid=GRID, prefix_tokens=2, interleaved=False), "positions", "k_positions"]
LENGTHS = [
    pytest.param([61, 1, 25, 0, 37], id="some"),
    pytest.param([61], id="one"),
    pytest.param([], id="none"),
    pytest.param([0, 0], id="empty"),
    pytest.param([1] * 12 + [3, 61], id="many"),
]


def packed(lengths, H=4, Hk=2, D=32, dtype=torch.float32, device="cpu"):
    total = sum(lengths)
    make = lambda heads: torch.randn(total, heads, D, dtype=torch.float64).to(dtype).to(device).requires_grad_()  # noqa: E731
    limits = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    return [make(H), make(Hk), make(Hk)], limits


def places(rope, total, device="cpu"):
    if not isinstance(rope, str):
        return rope
    other = {"k_positions": torch.randn(total, 3, device=device) * 5} if rope == "k_positions" else {}
    return {"positions": torch.randn(total, 3, device=device) * 5, "prefix_tokens": 2, **other}


def one_by_one(attention, inputs, limits, rope):
    """Each clip by itself, [1, H, n, D], joined."""
    outs = []
    for a, b in zip(limits.tolist(), limits.tolist()[1:], strict=False):
        if a == b:
            continue
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in inputs)
        mine = {name: x[a:b] if isinstance(x, torch.Tensor) else x for name, x in rope.items()}
        if "grid" in mine:
            cells, prefix = torch.cartesian_prod(*(torch.arange(n) for n in GRID)), mine.get("prefix_tokens", 1)
            rows = torch.cat((torch.zeros(prefix, 3, dtype=torch.int64), cells))[: b - a].to(q.device)
            mine = {name: x for name, x in mine.items() if name != "grid"} | {"positions": rows}
        if mine:
            mine["prefix_tokens"] = min(mine.get("prefix_tokens", 1), b - a)
            other = mine | {"positions": mine.pop("k_positions")} if "k_positions" in mine else mine
            q, k = ops.rope3d(q, backend="reference", **mine), ops.rope3d(k, backend="reference", **other)
        outs.append(attention(q, k, v, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs) if outs else inputs[0] * 1


def results(function, inputs):
    out = function(*inputs)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return out, *torch.autograd.grad(out, inputs, grad, allow_unused=not out.numel())


def check(backend, lengths, rope, dtype, device="cpu", **shape):
    inputs, limits = packed(lengths, dtype=dtype, device=device, **shape)
    rope = places(rope, sum(lengths), device)
    ours = results(lambda *x: ops.joint_attention(*x, cu_seqlens=limits, backend=backend, **rope), inputs)
    assert ours[0].is_contiguous()
    if not sum(lengths):
        return
    plain = lambda *x: one_by_one(scaled_dot_product_attention, x, limits, rope)  # noqa: E731
    truth = results(plain, [x.detach().double().requires_grad_() for x in inputs])
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, results(plain, inputs), truth, strict=True):
        if t.abs().max() < 1e-12:  # clips of one token: a score that is alone has no gradient, but for the order of two sums
            assert a.abs().max() <= 1e-6, name
        elif dtype == torch.float32 and backend != "sdpa":
            assert (a.double() - t).norm() <= 2 * (b.double() - t).norm() + 2.4e-7 * max(t.norm(), truth[0].norm())
        else:
            close(a, b, t, name)


@pytest.mark.sample(4, "interpret")
@backends
@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_clip_as_if_alone(backend, rope, dtype):
    check(backend, [61, 1, 25, 0, 37], rope, dtype)


@pytest.mark.sample(3, "interpret")
@backends
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(backend, lengths):
    check(backend, lengths, dict(grid=GRID), torch.float32)


@pytest.mark.interpret
def test_clips_longer_than_a_block():
    check("triton", [129, 64, 200, 2], "positions", torch.float32, H=1, Hk=1, D=16)
    check("triton", [257, 3, 128], {}, torch.float16, H=1, Hk=1, D=16)


def random_call(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [rng.choice((0, 1, 2, rng.randint(3, 61), 61)) for _ in range(rng.randint(1, 9))]
    shape = dict(D=rng.choice((8, 16, 48)), H=(Hk := rng.choice((1, 2))) * rng.choice((1, 2)), Hk=Hk)
    check("triton", lengths, rng.choice(ROPES), rng.choice((torch.float32, torch.float16)), **shape)


@pytest.mark.interpret
def test_fuzz():
    for seed in range(6):
        random_call(seed)


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fuzz_long():
    for seed in range(100, 250):
        random_call(seed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_on_a_gpu(backend, rope):
    check(backend, [61, 1, 25, 0, 37], rope, torch.float16, "cuda", D=64)
    if backend == "triton":
        wrong = torch.tensor([0, 30, 20, 40], dtype=torch.int32, device="cuda")
        x = torch.randn(40, 2, 64, device="cuda", dtype=torch.float16)
        assert ops.joint_attention(x, x, x, cu_seqlens=wrong, backend="triton").isnan().any()


def test_torchs_nested_attention():
    """What serves packed clips on CUDA, on the CPU, where torch has a slow form of it."""
    (q, k, v), limits = packed([9, 1, 25])
    as_one = lambda x: x.transpose(0, 1)[None]  # noqa: E731
    ours = results(lambda *x: nested_sdpa(*map(as_one, x), limits, 25, 0.2)[0].transpose(0, 1), (q, k, v))
    want = results(lambda *x: ops.joint_attention(*x, cu_seqlens=limits, scale=0.2), (q, k, v))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_log_sum_exps(backend):
    if backend == "sdpa":
        pytest.skip("not returned by torch's")
    inputs, limits = packed([9, 0, 25, 1], Hk=4)
    out, lse = ops.joint_attention(*inputs, cu_seqlens=limits, return_lse=True, backend=backend)
    assert lse.shape == (4, 35)
    q, k = (x.detach().double().transpose(0, 1) for x in inputs[:2])
    for a, b in ((0, 9), (9, 34), (34, 35)):
        scores = q[:, a:b] @ k[:, a:b].transpose(1, 2) / 32**0.5
        torch.testing.assert_close(lse[:, a:b].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@backends
def test_learned_frequencies(backend):
    inputs, limits = packed([9, 0, 25, 1])
    freqs = ops.joint_freqs(32).requires_grad_()
    run = lambda b: ops.joint_attention(*inputs, grid=GRID, freqs=freqs, cu_seqlens=limits, backend=b).square().sum()  # noqa: E731
    ours, want = (torch.autograd.grad(run(b), freqs)[0] for b in (backend, "reference"))
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
@pytest.mark.parametrize("limits", [[0, 30, 20, 40], [1, 20, 40], [0, 20, 39], [0, 90, 40], [-5, 20, 40]])
def test_limits_that_are_none_show(limits):
    """On a GPU they are not looked at before the kernel does, as here, where the check of a call is passed over."""
    x, limits = torch.randn(1, 2, 40, 32), torch.tensor(limits, dtype=torch.int32)
    still = Rotation(None, None, (), 0, True, False, "triton")
    call = AttentionPlan(still, None, False, limits, None, 32**-0.5, "triton")
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    assert all(part.isnan().any() for part in results(lambda *x: attend(*x, call)[0], leaves))


def test_opcheck():
    (q, k, v), limits = packed([9, 0, 25, 1], Hk=4)
    q, k, v = (x.detach().transpose(0, 1)[None] for x in (q, k, v))
    raw = torch.ops.evaat_fast
    torch.library.opcheck(raw.attn_clips_forward.default, (q, k, v, limits, 0.2))
    out, lse = raw.attn_clips_forward(q, k, v, limits, 0.2)
    torch.library.opcheck(raw.attn_clips_backward.default, (torch.randn_like(out), q, k, v, out, lse, limits, 0.2))


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=pytest.mark.interpret)])
def test_compiles_whole(backend):
    inputs, limits = packed([9, 0, 25, 1])
    run = lambda *x: ops.joint_attention(*x, grid=GRID, cu_seqlens=limits, max_seqlen=25, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, inputs), results(run, inputs), strict=True):
        torch.testing.assert_close(a, b)


X = torch.zeros(40, 4, 32)
LIMITS = torch.tensor([0, 25, 40], dtype=torch.int32)
BAD = [
    (dict(cu_seqlens=[0, 40]), TypeError, "cu_seqlens: expected an int32 tensor, got list"),
    (dict(cu_seqlens=LIMITS.long()), TypeError, "cu_seqlens: expected an int32 tensor, got torch.int64"),
    (dict(cu_seqlens=LIMITS[None]), ValueError, r"cu_seqlens: expected the shape \[clips \+ 1\], got \[1, 3\]"),
    (dict(cu_seqlens=LIMITS + 1), ValueError, "cu_seqlens: expected to rise from 0 to q's 40 tokens, got .1, 26, 41."),
    (dict(cu_seqlens=LIMITS[[0, 2, 1, 2]]), ValueError, "cu_seqlens: expected to rise"),
    (dict(max_seqlen=24), ValueError, "max_seqlen: expected at least the longest clip, 25, got 24"),
    (dict(max_seqlen=25.0), TypeError, "max_seqlen: expected an int"),
    (dict(cu_seqlens=None, max_seqlen=3, q=X[None], k=X[None], v=X[None]), ValueError, "max_seqlen: given without cu_seqlens"),
    (dict(cu_seqlens=None), ValueError, r"q: expected the shape \[B, H, N, D\], got \[40, 4, 32\]"),
    (dict(q=X[None]), ValueError, r"q: expected the shape \[total, H, D\], got \[1, 40, 4, 32\]"),
    (dict(k=X[:30], v=X[:30]), ValueError, r"k: expected \[40, a divisor of 4, 32\]"),
    (dict(grid=(1, 4, 5)), ValueError, "grid: 1 x 4 x 5 cells and prefix_tokens=1 make 21 tokens, but the longest clip has 25"),
    (dict(grid=(1, 4)), ValueError, r"grid: expected three positive ints"),
    (dict(grid=(2, 3, 4), positions=torch.zeros(40, 3)), ValueError, "grid, positions: expected exactly one of the two"),
    (dict(positions=torch.zeros(25, 3)), ValueError, r"positions: expected the shape \[40, 3\]"),
    (dict(positions=torch.zeros(40, 3), k_positions=torch.zeros(9, 3)), ValueError, "k_positions: expected the shape"),
    (dict(grid=(2, 3, 4), prefix_tokens=-1), ValueError, "prefix_tokens: expected an int >= 0, got -1"),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.joint_attention(**{**dict(q=X, k=X, v=X, cu_seqlens=LIMITS), **change})
