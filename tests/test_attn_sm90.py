"""The Gluon kernels of joint_attention: emulated, whatever the order in which a GPU does what it may, and on a GPU.

Emulated they run in a process of the interpreter's, which takes the Triton kernels before and behind them.
"""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from check import close, on_hopper
from test_attn import assert_bias_learns, results, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.model.vision import Attention
from evaat_fast.ops._core import dispatch
from evaat_fast.ops.attn.reference import attention_reference
from evaat_fast.ops.rope3d.rotation import Rotation
from evaat_fast.ops.rope3d.table import table_of

interpret = pytest.mark.interpret
sm90 = pytest.importorskip("evaat_fast.kernels.attn.sm90", reason="needs Triton 3.6", exc_type=ImportError)
from evaat_fast.kernels.attn import sm90_backward, sm90_wide  # noqa: E402
from gluon_emulated import Gluon, Launcher, emulate, rebuilt  # noqa: E402

F16 = torch.float16


class Call:
    """Inputs of a call: packed [B, N, 3, H, D] in memory where Hk is H, else tokens first; turned where there is a grid."""

    def __init__(self, B=1, H=1, Hk=None, N=192, D=64, grid=None, prefix=0, dtype=F16, device="cpu"):
        Hk, self.prefix, self.grid, self.scale = Hk or H, prefix, grid, D**-0.5
        if Hk == H:
            self.q, self.k, self.v = torch.randn(B, N, 3, H, D, device=device).to(dtype).permute(2, 0, 3, 1, 4)
        else:
            self.q, self.k, self.v = (torch.randn(B, N, h, D, device=device).to(dtype).transpose(1, 2) for h in (H, Hk, Hk))
        self.do = torch.randn(B, N, H, D, device=device).to(dtype).transpose(1, 2)
        # Room for column sums, of what has as many key heads as heads.
        columns = torch.full((B, -(-N // 64), 3, H, D), float("nan"), device=device) if Hk == H else None
        self.dlse, self.columns, rotation = None, columns, Rotation(None, None, grid or (), prefix, True, False, "triton")
        self.table = table_of(rotation, D, self.q.device) if grid else None

    def turn(self, x):
        return ops.rope3d(x, grid=self.grid, prefix_tokens=self.prefix, backend="reference") if self.grid else x

    def plain(self, dtype):
        """(out, lse, dq, dk, dv) by the specifications."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        turned_q, turned_k = self.turn(q), self.turn(k)
        if dtype == torch.float64:
            out = attention_reference(turned_q, turned_k, v, self.scale)
        else:  # cuDNN's dQ in float16 is NaN where all scores lie far below zero
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
                out = scaled_dot_product_attention(turned_q, turned_k, v, scale=self.scale, enable_gqa=True)
        wide, many = torch.promote_types(dtype, torch.float32), turned_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        lse = (turned_q.to(wide) @ many.mT.to(wide) * self.scale).logsumexp(-1)
        grads = [self.do.to(dtype)] + ([] if self.dlse is None else [self.dlse.to(lse.dtype)])
        found = torch.autograd.grad([out, lse][: len(grads)], (q, k, v), grads)
        return out.detach(), lse.detach(), *found

    def forward(self, seed, keep=True, shape=None):
        """(out, lse, the queries that it leaves), by the kernel."""
        k = self.turn(self.k) if self.grid else self.k
        B, H, N, D = self.q.shape
        out = torch.full((B, N, H, D), float("nan"), dtype=self.q.dtype).transpose(1, 2)
        lse, turned = torch.full((B, H, N), float("nan")), self.q.clone() if keep else None
        emulate(sm90, seed).forward(
            self.q, k.contiguous(), self.v, out, lse, turned, self.table, self.prefix, self.scale, shape
        )
        return out, lse, turned

    def backward(self, seed, module=sm90_backward):
        """Gradients by the kernels, emulated, of exact outputs and log-sum-exps."""
        run, wide = emulate(module, seed).backward, []
        if self.q.shape[3] == 128:
            wide = [sm90_wide.SHAPE, sm90_wide.ENDS, Launcher(sm90_wide.attn_backward_wide_kernel, seed)]
        return self.gradients(lambda *call: run(*call, *wide))

    def gradients(self, backward, ordered=False):
        out, lse, *_ = self.plain(torch.float64)
        q, k = (self.turn(x.float()).to(x.dtype) for x in (self.q, self.k))
        out = out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        grads = [torch.full_like(x, float("nan")) for x in (self.q, self.k, self.v)]
        tables = self.table, self.table
        backward(
            q, k, self.v, out, self.do, lse.float(), self.dlse, grads, self.columns, tables, self.prefix, self.scale, ordered
        )
        return grads

    def check(self, names, found):
        low, truth = (
            dict(zip(("out", "lse", "dq", "dk", "dv"), self.plain(x), strict=True)) for x in (self.q.dtype, torch.float64)
        )
        for name, x in zip(names, found, strict=True):
            if name == "lse":
                error, of_torch = ((y - truth[name]).abs().max() for y in (x, low[name]))
                assert error <= 2 * of_torch + 1e-5, f"lse: {error:.1e} > 2 x torch's {of_torch:.1e}"
            else:
                close(x, low[name], truth[name], name)
        if self.columns is not None and "dk" in names:
            for x, y in zip(self.columns.sum((0, 1)), names[-3:], strict=True):
                exact, low_sum = truth[y].sum((0, 2)), low[y].sum((0, 2), dtype=torch.float32)
                error, of_torch = ((z - exact).norm() for z in (x, low_sum))
                rounding = torch.finfo(self.q.dtype).eps / 16 * exact.norm()
                assert error <= 2 * of_torch + rounding, f"column sums of {y}: {error:.1e} for torch's {of_torch:.1e}"


# Of whole tiles and of ends of all kinds, 1, 42 and 64 keys that the backward pass takes apart too; of two programs that may
# have several tiles.
CALLS = [
    dict(N=192, B=2, H=2, Hk=1),
    dict(N=193, H=2),
    dict(N=256, B=2),
    dict(N=298, H=2, Hk=1),
    dict(N=330, H=4, Hk=2),
    dict(N=257, grid=(2, 8, 16), prefix=1),
    dict(N=193, B=2, H=2, grid=(4, 6, 8), prefix=1),
]
# Of 1, 8 and 64 keys behind the last block of 64; of 64, 1 and 72 behind the last tile of 128.
WIDE = [
    dict(N=192, H=2, Hk=1, D=128),
    dict(N=193, H=2, D=128, grid=(4, 6, 8), prefix=1),
    dict(N=328, H=4, Hk=2, D=128),
]


@interpret
@pytest.mark.parametrize("call", CALLS + WIDE, ids=str)
def test_forward(call):
    call, seed = Call(**call), random.randrange(10**6)
    out, lse, turned = call.forward(seed)
    call.check(("out", "lse"), (out, lse))
    torch.testing.assert_close(turned.double(), call.turn(call.q.double()), rtol=1e-3, atol=1e-3)
    assert torch.equal(call.forward(seed + 1, keep=False)[0], out)


@interpret
def test_forward_of_two_warpgroups():
    """What may be compiled for heads of 128, too."""
    for call in (Call(N=321, H=2, D=128), Call(N=257, D=128, grid=(2, 8, 16), prefix=1)):
        call.check(("out", "lse"), call.forward(0, shape=sm90.HALF_BLOCKS)[:2])


@interpret
@pytest.mark.parametrize("call", CALLS + WIDE, ids=str)
def test_backward(call):
    call, seed = Call(**call), random.randrange(10**6)
    first, second = call.backward(seed), call.backward(seed + 1)
    call.check(("dq", "dk", "dv"), first)
    # Tiles add up dQ in any order; all else is one warpgroup's own.
    assert all(map(torch.equal, first[1:], second[1:]))
    call.check(("dq",), second[:1])


@interpret
@pytest.mark.parametrize("programs,call", [(2, dict(N=640)), (5, dict(N=459, H=2)), (3, dict(N=330, H=2, Hk=1))], ids=str)
def test_backward_in_order(programs, call):
    """Tiles add up dQ in one order, as many programs wait for each other as there are."""
    call, seed = Call(**call), random.randrange(10**6)
    first, second = (call.gradients(emulate(sm90_backward, seed + i, programs).backward, True) for i in range(2))
    call.check(("dq", "dk", "dv"), first)
    assert all(map(torch.equal, first, second))


@interpret
@pytest.mark.parametrize("spread", [False, True])
def test_turns(spread):
    """Each tile of a head has one of its own, and comes to a block of queries after those whose turns are before."""
    turn = rebuilt(sm90_backward._turn.fn, Gluon(None, 0, 1))
    for blocks, n, whole in ((13, 6, True), (25, 12, False), (40, 19, True), (9, 4, False), (4, 2, True)):
        call = sm90_backward.Call(1, 1, 64 * blocks, n, n, n, blocks, 1.0, 1.0, 0)
        first = [tile * blocks // (n + 1) if spread else 0 for tile in range(n)]
        for block in range(blocks):
            turns = [int(turn(128 * tile, block, call, spread)) for tile in range(n + (not whole))]
            assert sorted(turns) == list(range(len(turns))) and turns[n:] == [n][: not whole]
            steps = [(block - first[tile]) % blocks for tile in range(n)]
            assert sorted(steps) == [steps[turns.index(i)] for i in range(n)]


@interpret
def test_gradients_of_log_sum_exps():
    call = Call(N=200, H=2)
    call.dlse = torch.randn(1, 2, 200)
    call.check(("dq", "dk", "dv"), call.backward(1))


@interpret
def test_keys_beyond_the_end_have_no_weight():
    """Where all scores lie far below zero, the weights of keys that are not there would be infinite."""
    call = far_below_zero(Call(N=200))
    call.check(("dq", "dk", "dv"), call.backward(0))


# What a kernel may not do, as (text, another in its place); a GPU may forgive each for long.
FAULTS = {
    "reads before a wait": ("warpgroup_mma_wait(2, deps=(dp, dK))", "warpgroup_mma_wait(3, deps=(dp, dK))"),
    "no fence": ("fence_async_shared()\n            mbarrier.arrive(sh.ds_there", "mbarrier.arrive(sh.ds_there"),
    "dQ's place is taken early": ("tma.store_wait(pendings=1)", "tma.store_wait(pendings=2)"),
    "dS' place is taken early": ("mbarrier.wait(sh.ds_free.index((j % 2) * GROUPS + c), ((j // 2) & 1) ^ 1)", "pass"),
    "queries are given away early": ("index(before), count=1, pred=i > 0", "index(here), count=1, pred=i + 1 < count"),
    "keys are given away early": ("sh.kv_free.index(i), count=GROUPS + 1", "sh.kv_free.index(i), count=GROUPS"),
    "keys are never given away": (
        "sh.kv_free.index(it % 2), count=1)\n        leave",
        "sh.kv_free.index(it % 2), count=0)\n        leave",
    ),
    "weights beyond the end": ("p = p if WHOLE else gl.where(there, p, 0.0)", "pass"),
}


def far_below_zero(call):
    """All its scores."""
    call.q.fill_(3.0)
    call.k.copy_(-call.q[:, : call.k.shape[1]] + torch.randn_like(call.k) / 8)
    return call


def faulty(other, folder):
    """The module with another text."""
    text = Path(sm90_backward.__file__).read_text()
    assert text.count(other[0]) == 1
    (folder / "faulty.py").write_text(text.replace(*other))
    spec = importlib.util.spec_from_file_location("faulty", folder / "faulty.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@interpret
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path):
    module = faulty(FAULTS[fault], tmp_path)
    call = far_below_zero(Call(N=200)) if fault == "weights beyond the end" else Call(H=4 if "keys" in fault else 2, N=450)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(30):
            call.check(("dq", "dk", "dv"), call.backward(seed, module))


@interpret
@pytest.mark.parametrize(
    "other",
    [
        (") < turn:", ") < 0:"),
        ("if at.turns is not None:\n                    stores_done()", "if False:\n                    pass"),
    ],
    ids=["no turn is waited for", "a turn is given away early"],
)
def test_faults_of_order_are_found(other, tmp_path):
    module, call = faulty(other, tmp_path), Call(N=459)
    first = call.gradients(emulate(module, 0, 3).backward, True)[0]
    assert not all(torch.equal(first, call.gradients(emulate(module, 1 + i, 3).backward, True)[0]) for i in range(40))


hopper = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")


def tokens_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_()


def held_to_sdpa(function, inputs):
    """function(backend)(*inputs) in Gluon, with the errors that rope3d and torch's attention have."""
    ours, low = results(function("gluon"), inputs), results(function("sdpa"), inputs)
    exact = results(function("reference"), [x.detach().double().requires_grad_() for x in inputs])
    for name, o, w, t in zip(("out", "dq", "dk", "dv"), ours, low, exact, strict=False):
        close(o, w, t, name)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "D,n,grid",
    [(64, 192, None), (64, 193, (2, 8, 12)), (64, 298, (3, 9, 11)), (64, 785, (4, 14, 14)), (64, 1025, (4, 16, 16))]
    + [(128, 192, None), (128, 785, (4, 14, 14)), (128, 1025, (4, 16, 16))],
)
def test_gluon_against_float64(D, n, grid, dtype):
    rope = dict(grid=grid) if grid else {}
    attend = lambda backend: lambda *x: ops.joint_attention(*x, backend=backend, **rope)  # noqa: E731
    for inputs in (tensors(H=4, Hk=2, n=n, D=D, dtype=dtype, device="cuda"), tensors(n=n, D=D, dtype=dtype, device="cuda")):
        held_to_sdpa(attend, inputs)
        held_to_sdpa(attend, list(map(tokens_first, inputs)))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", [dict(N=192), dict(N=193, H=2), dict(N=330, B=2, H=4, Hk=2), dict(B=3, H=12, N=785)], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_gluon_gradients_against_float64(D, call, dtype):
    """Those of keys and values to the bit."""
    grid = {"grid": (4, 14, 14), "prefix": 1} if call["N"] == 785 else {}
    call, wide = Call(**call, **grid, D=D, dtype=dtype, device="cuda"), [sm90_wide.SHAPE, sm90_wide.ENDS]
    wide = [*wide, sm90_wide.attn_backward_wide_kernel] if D == 128 else []
    backward = lambda *x: sm90_backward.backward(*x, *wide)  # noqa: E731
    first = call.gradients(backward)
    call.check(("dq", "dk", "dv"), first)
    for _ in range(100):
        assert all(map(torch.equal, call.gradients(backward)[1:], first[1:]))
    if not grid:
        far_below_zero(call).check(("dq", "dk", "dv"), call.gradients(backward))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("n,grid", [(256, None), (459, None), (785, (4, 14, 14)), (3137, (16, 14, 14))])
def test_gluon_gradients_in_order(n, grid):
    """Of more tiles than there are multiprocessors, some of them not whole."""
    inputs = tensors(B=4, H=12, n=n, D=64, dtype=torch.bfloat16, device="cuda")
    options = dict(grid=grid) if grid else {}
    run = lambda backend: lambda *x: ops.joint_attention(*x, backend=backend, deterministic=backend == "gluon", **options)  # noqa: E731
    held_to_sdpa(run, [x[:1, :2].detach().requires_grad_() for x in inputs])
    first = results(run("gluon"), inputs)
    for _ in range(100):
        assert all(map(torch.equal, first, results(run("gluon"), inputs)))
    for found, expected in zip(first, results(run("sdpa"), inputs), strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("heads", [12, 6])
def test_gluon_of_a_projection(heads):
    """Of more tiles than there are multiprocessors: each program takes several, the last of them not whole."""
    qkv = (torch.randn(20, 785, 3 * 12 * 64, device="cuda") / 2).bfloat16().requires_grad_()
    run = lambda backend: lambda x: ops.joint_attention_qkv_(x * 1, heads, (4, 14, 14), backend=backend)  # noqa: E731
    held_to_sdpa(run, [qkv])
    first = results(run("gluon"), [qkv])[0]
    for _ in range(300):
        assert torch.equal(first, run("gluon")(qkv))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("n,grid", [(193, (2, 8, 12)), (785, (4, 14, 14)), (1025, (4, 16, 16))])
def test_gluon_of_a_bias_that_qkv_has_in_it(n, grid, frozen):
    assert_bias_learns(4, 64, n, frozen, 1e-2, "cuda", torch.bfloat16, grid=grid)


@pytest.mark.gpu
@hopper
def test_a_model_sums_no_gradient_of_qkv(monkeypatch):
    """Its biases learn within the backward pass of attention, where the kernel serves."""
    attention, freqs = Attention(128, 2).cuda(), ops.joint_freqs(64).cuda()
    x = torch.randn(2, 197, 128, device="cuda")
    torch.nn.init.normal_(attention.q_bias)
    runs, count = [], 2 * 197 * 3 * 128
    for backend in ("gluon", "sdpa"):
        monkeypatch.setitem(dispatch.DEFAULT, "joint_attention", backend)
        with torch.autocast("cuda", torch.bfloat16):
            loss = attention(x, (1, 14, 14), freqs).float().square().sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as run:
            grads = torch.autograd.grad(loss, [attention.q_bias, attention.v_bias, attention.qkv.weight])
        sums = [e.input_shapes[0] for e in run.events() if e.name == "aten::sum"]
        runs.append((*grads, any(torch.Size(shape).numel() == count for shape in sums)))
    assert (runs[0][-1], runs[1][-1]) == (False, True)
    for found, expected in zip(runs[0][:-1], runs[1][:-1], strict=True):
        assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.gpu
@hopper
def test_gluon_of_positions_and_learned_frequencies():
    q, k, v = map(tokens_first, tensors(H=4, n=300, D=64, dtype=torch.bfloat16, device="cuda"))
    here, there = torch.rand(2, 2, 300, 3, device="cuda").mul(9).unbind()
    both = dict(positions=here, k_positions=there)
    held_to_sdpa(lambda backend: lambda *x: ops.joint_attention(*x, backend=backend, **both), [q, k, v])
    freqs = (torch.randn(3, 32, device="cuda") / 4).requires_grad_()

    def learned(backend):
        return lambda *x: ops.joint_attention(*x[:3], positions=here, freqs=x[3].float(), backend=backend)

    held_to_sdpa(learned, [q, k, v, freqs])


@pytest.mark.gpu
@hopper
def test_gluon_log_sum_exps():
    q, k, v = map(tokens_first, tensors(H=4, n=785, D=64, dtype=torch.bfloat16, device="cuda"))
    run = lambda **o: ops.joint_attention(q, k, v, grid=(4, 14, 14), return_lse=True, **o)  # noqa: E731
    (out, lse), (want, want_lse) = run(), run(backend="triton")
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k), retain_graph=True) for x in (lse, want_lse))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
    plain = [torch.autograd.grad(x.float().square().sum(), (q, k, v), retain_graph=True) for x in (out, want)]
    for a, b in zip(*plain, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.gpu
@hopper
def test_gluon_beside_torchs_own():
    """torch keeps cuDNN's graphs by the strides of q, k and v alone: neither may be given the other's."""
    for order in (tokens_first, lambda x: x.detach().clone().requires_grad_()):
        inputs = [order(x) for x in tensors(n=321, D=64, dtype=torch.bfloat16, device="cuda")]
        exact = results(lambda *x: attention_reference(*x, 64**-0.5), [x.detach().double().requires_grad_() for x in inputs])
        for run in (ops.joint_attention, scaled_dot_product_attention, ops.joint_attention, scaled_dot_product_attention):
            for a, b in zip(results(run, inputs), exact, strict=True):
                assert (a - b).norm() <= 1e-2 * b.norm()
