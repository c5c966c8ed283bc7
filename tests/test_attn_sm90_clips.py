"""joint_attention of packed clips in Gluon: emulated, whatever the order in which a GPU does what it may, and on a GPU."""

import importlib.util
import random
import types
from pathlib import Path

import pytest
import torch
from check import close, on_hopper
from test_attn_clips import check as check_clips
from test_attn_clips import one_by_one, packed, places, results
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops._core import dispatch
from evaat_fast.ops.attn.clips import clip_positions
from evaat_fast.ops.attn.fused import attend
from evaat_fast.ops.attn.plan import AttentionPlan, plan
from evaat_fast.ops.rope3d.rotation import Rotation
from evaat_fast.ops.rope3d.table import table_of

interpret = pytest.mark.interpret
pytest.importorskip("evaat_fast.kernels.attn.sm90", reason="needs Triton 3.6", exc_type=ImportError)
from evaat_fast.kernels.attn import sm90, sm90_backward, sm90_clips  # noqa: E402
from gluon_emulated import emulate  # noqa: E402

F16, D = torch.float16, 64
LENGTHS = (0, 1, 15, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257)


class Clips:
    """Inputs of a call: [1, H, tokens, 64], turned by positions where `turned`."""

    def __init__(self, lengths, H=2, Hk=1, turned=False, dtype=F16, device="cpu"):
        self.inputs, self.limits = packed(lengths, H, Hk, D, dtype, device)
        self.rope = places("positions", sum(lengths), device) if turned else {}
        self.do, self.dlse = torch.randn(sum(lengths), H, D, device=device).to(dtype), None
        self.table = None
        if turned:
            rows = clip_positions(self.limits, sum(lengths), None, self.rope["positions"], self.rope["prefix_tokens"])
            self.table = table_of(Rotation(None, rows, (), 0, True, False, "triton"), D, rows.device)

    def fill(self, clip, number):
        a, b = self.limits[clip : clip + 2].tolist()
        with torch.no_grad():
            for x in (*self.inputs, self.do):
                x[a:b] = number

    def turn(self, x, graph=False):
        """[1, H, tokens, 64]."""
        x = (x if graph else x.detach()).transpose(0, 1)[None]
        if self.table is None:
            return x
        cos, sin = (t[0].to(torch.float64 if x.dtype == torch.float64 else torch.float32) for t in self.table)
        wide = x.to(cos.dtype).unflatten(-1, (D // 2, 2))
        a, b = wide.unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
        return turned.transpose(1, 2).contiguous().transpose(1, 2)

    def plain(self, dtype):
        """(out, lse, dq, dk, dv) by the specifications, clip by clip."""
        inputs = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        out = one_by_one(scaled_dot_product_attention, inputs, self.limits, self.rope)
        q, k = (self.turn(x, True)[0] for x in inputs[:2])
        wide = torch.promote_types(dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).repeat_interleave(q.shape[0] // k.shape[0], 0).mT * D**-0.5
        clip = torch.searchsorted(self.limits, torch.arange(q.shape[1], dtype=torch.int32), right=True)
        lse = scores.masked_fill(clip[:, None] != clip[None, :], float("-inf")).logsumexp(-1)
        grads = [self.do.to(dtype)] + ([] if self.dlse is None else [self.dlse[0].to(lse.dtype)])
        grads = torch.autograd.grad([out, lse][: len(grads)], inputs, grads)
        return out.detach(), lse.detach(), *grads

    def forward(self, module, keep=True):
        q, k, v = (x.detach().transpose(0, 1)[None] for x in self.inputs)
        out = torch.full_like(q, float("nan"))
        lse, turned = q.new_full(q.shape[:3], float("nan"), dtype=torch.float32), torch.full_like(q, float("nan"))
        k = self.turn(self.inputs[1])
        module.forward(q, k, v, out, lse, turned if keep else None, self.table, D**-0.5, self.limits)
        return out, lse, turned

    def backward(self, module, ordered=False):
        """Of exact outputs and log-sum-exps."""
        out, lse, *_ = self.plain(torch.float64)
        q, k = (self.turn(x) for x in self.inputs[:2])
        v, out, do = (x.detach().to(q.dtype).transpose(0, 1)[None] for x in (self.inputs[2], out, self.do))
        grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
        tables, lse = (self.table, self.table), lse.float()[None].contiguous()
        module.backward(q, k, v, out, do, lse, self.dlse, grads, tables, D**-0.5, self.limits, ordered)
        return grads

    def check(self, names, found):
        low, truth = (dict(zip(("out", "lse", "dq", "dk", "dv"), self.plain(x), strict=True)) for x in (F16, torch.float64))
        for name, x in zip(names, found, strict=True):
            if name == "lse":
                error, of_torch = ((y - truth[name]).abs().max() for y in (x[0], low[name]))
                assert error <= 2 * of_torch + 1e-5, f"lse: {error:.1e} > 2 x torch's {of_torch:.1e}"
            elif truth[name].abs().max() < 1e-12:  # clips of one token, whose score is alone: the difference of two sums
                assert x.abs().max() <= 1e-5, name
            else:
                close(x[0].transpose(0, 1), low[name], truth[name], name)


def drawn(seed):
    rng = random.Random(seed)
    return [rng.choice(LENGTHS) for _ in range(rng.randint(2, 5))]


# Of clips that are shorter than a warpgroup's rows, of one and two tiles and of seven, of more programs than tiles.
CALLS = [
    dict(lengths=[1]),
    dict(lengths=[0, 15, 63, 1, 0], H=1),
    dict(lengths=[64, 65, 0, 193], turned=True),
    dict(lengths=[191, 129, 192], H=2, Hk=2, turned=True),
    dict(lengths=[785], H=1),
    *(dict(lengths=drawn(seed), turned=seed % 2 == 0, Hk=1 + seed % 2) for seed in range(3)),
]


@interpret
@pytest.mark.sample(4)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_forward(call):
    call, seed = Clips(**call), random.randrange(10**6)
    out, lse, turned = call.forward(emulate(sm90_clips, seed, 3))
    call.check(("out", "lse"), (out, lse))
    if call.table is not None:
        torch.testing.assert_close(turned, call.turn(call.inputs[0]), rtol=1e-3, atol=1e-3)
    assert torch.equal(call.forward(emulate(sm90_clips, seed + 1, 2), keep=False)[0], out)


@interpret
@pytest.mark.sample(3)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward(call):
    call, seed = Clips(**call), random.randrange(10**6)
    first, second = (call.backward(emulate(sm90_clips, seed + i, 2)) for i in range(2))
    call.check(("dq", "dk", "dv"), first)
    # Tiles add up dQ in any order; all else is one warpgroup's own.
    assert all(map(torch.equal, first[1:], second[1:]))
    call.check(("dq",), second[:1])


@interpret
@pytest.mark.sample(1)
@pytest.mark.parametrize("programs,lengths", [(2, [385, 0, 64]), (5, [130, 459]), (3, [257, 300, 1])], ids=str)
def test_backward_in_order(programs, lengths):
    """Of clips of more tiles than there are programs, too, which keep no distance from each other."""
    call, seed = Clips(lengths), random.randrange(10**6)
    first, second = (call.backward(emulate(sm90_clips, seed + i, programs), True) for i in range(2))
    call.check(("dq", "dk", "dv"), first)
    assert all(map(torch.equal, first, second))


@interpret
def test_gradients_of_log_sum_exps():
    call = Clips([70, 0, 193], H=1)
    call.dlse = torch.randn(1, 1, 263)
    call.check(("dq", "dk", "dv"), call.backward(emulate(sm90_clips, 1)))


@interpret
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [[65, 100, 130], [193, 1, 63]], ids=str)
def test_no_clip_touches_its_neighbours(lengths, number):
    """Nor do other clips' numbers touch it: the same bits, beside a clip of NaN."""
    call = Clips(lengths, H=1)
    a, b = call.limits[1:3].tolist()
    apart = torch.cat((torch.arange(a), torch.arange(b, sum(lengths))))
    found = []
    for fill in (0.5, number):
        call.fill(1, fill)
        out, lse, _ = call.forward(emulate(sm90_clips, 0))
        found.append([x[:, :, apart] for x in (out, lse, *call.backward(emulate(sm90_clips, 0, 1), True))])
        assert fill == 0.5 or out[:, :, a:b].isnan().any()
    assert all(map(torch.equal, *found)) and not any(x.isnan().any() for x in found[1])


@interpret
@pytest.mark.parametrize("limits", [[0, 30, 20, 40], [1, 20, 40], [0, 20, 39], [0, 90, 40], [-5, 20, 40], [0], [40]], ids=str)
def test_limits_that_are_none_show(limits):
    call = Clips([40])
    call.limits = torch.tensor(limits, dtype=torch.int32)
    out, lse, _ = call.forward(emulate(sm90_clips, 0))
    assert out.isnan().all() and lse.isnan().all()


@interpret
@pytest.mark.parametrize("clips", [1, 31, 150])
@pytest.mark.parametrize("size", [128, 192])
def test_tiles(clips, size):
    """Each once, the longest clips' first, as many as there is room for."""
    lengths = torch.randint(0, 4 * size, (clips,)) * (torch.rand(clips) > 0.2)
    limits = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    table = torch.full((1 + int(limits[-1]) // size + clips, 4), -1, dtype=torch.int32)
    grid = (-(-clips // sm90_clips.CLIPS["CLIPS"]),)
    sm90_clips.attn_tiles_kernel[grid](limits, table, clips, int(limits[-1]), SIZE=size, **sm90_clips.CLIPS)
    want = []
    for first, n in sorted(zip(limits.tolist(), lengths.tolist(), strict=False), key=lambda x: -x[1]):
        want += [[first, n, len(want)]] * -(-n // size)
    assert table[0, :2].tolist() == [len(want), 1] and table[1 : 1 + len(want), :3].tolist() == want
    assert (table[1 + len(want) :] == -1).all()


# What a kernel may not do, as (programs, module, text, another in its place).
FAULTS = {
    "copies end where the tokens do": (2, sm90, "END, b + call.N, END - call.N + row", "END, END, b + row - END"),
    "keys beyond the end": (2, sm90, 'gl.where((n < clip.N)[None, :], s * call.scale2, -float("inf"))', "s * call.scale2"),
    "blocks of clips of one length": (2, sm90, "it * call.blocks if call.clips is None else seen\n", "it * clip.blocks\n"),
    "nothing to wait for": (30, sm90_backward, "gl.program_id(0) < call.tiles  #", "True  #"),
    "one clip's blocks for all": (2, sm90_backward, "call.full * heads + head", "head"),
}


def faulty(module, text, other, folder):
    """sm90_clips with a module's kernel of another text."""
    source = Path(module.__file__).read_text()
    assert source.count(text) == 1
    (folder / "faulty.py").write_text(source.replace(text, other))
    spec = importlib.util.spec_from_file_location("faulty", folder / "faulty.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    clips, name = types.ModuleType(sm90_clips.__name__), "attn_forward_sm90_kernel"
    name = name if module is sm90 else "attn_backward_sm90_kernel"
    clips.__dict__.update(vars(sm90_clips) | {name: getattr(changed, name)})
    return clips


@interpret
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path):
    (programs, changed, *text), call = FAULTS[fault], Clips([70, 140, 0, 5], H=1)
    module = faulty(changed, *text, tmp_path)
    run, names = (call.forward, ("out", "lse")) if changed is sm90 else (call.backward, ("dq", "dk", "dv"))
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(30):
            call.check(names, run(emulate(module, seed, programs))[: len(names)])


@interpret
@pytest.mark.parametrize("order", ["tokens", "heads", "one for all"])
def test_autograd(monkeypatch, order):
    """What is between the public function and the kernels, of any memory."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(sm90_clips, name, getattr(emulate(sm90_clips, 0), name))
    call = Clips([66, 0, 130], Hk=2, turned=True)
    rotation = Rotation(None, None, (), 0, True, False, "reference")
    rows = clip_positions(call.limits, 196, None, call.rope["positions"], call.rope["prefix_tokens"])
    bare = AttentionPlan(rotation, None, True, None, None, D**-0.5, "gluon", True)
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    if order == "one for all":
        leaves[1] = leaves[1][:1].detach().requires_grad_()
    call.inputs = [x.expand(196, -1, -1) for x in leaves]
    given = [x.transpose(0, 1)[None] for x in call.inputs]
    given = [x.contiguous() for x in given] if order == "heads" else given
    out, lse = attend(*given, bare.of(None, rows, None, call.limits))
    grads = torch.autograd.grad(out[0].transpose(0, 1), given, call.do)
    call.check(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads))


def test_who_serves(monkeypatch):
    """By name Gluon, of heads of 64; else who served before a GPU has timed it."""
    monkeypatch.setattr(dispatch, "lacks_for_hopper", lambda device: ())
    with FakeTensorMode():
        limits, still = torch.zeros(3, dtype=torch.int32, device="cuda"), (None, None, 1, None, True)

        def serves(backend, D=64, return_lse=False, dtype=F16):
            shape = torch.Size((300, 4, D))
            rest = (None, None, limits, None, False, return_lse, False, False, backend)
            return plan(shape, shape, dtype, limits.device, still, *rest).backend

        assert (serves(None), serves(None, return_lse=True), serves("gluon")) == ("sdpa", "triton", "gluon")
        assert serves("gluon", return_lse=True) == "gluon"
        with pytest.raises(RuntimeError, match="packed clips it takes by name alone, of heads of 64"):
            serves("gluon", 128)


hopper = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
# Totals that are no multiples of 16, for which Triton would compile again.
LENGTHS_ON_A_GPU = ([61, 1, 25, 0, 37], [785, 1, 191, 0, 192, 193, 64, 65, 63, 15, 1569], [300] * 39 + [297])
of_clips = pytest.mark.parametrize("lengths", LENGTHS_ON_A_GPU, ids=lambda x: f"{len(x)} clips")


def on_a_gpu(lengths):
    """(inputs, what else a call of them takes), whose kernels the tests below share."""
    inputs, limits = packed(lengths, 4, 2, D, torch.bfloat16, "cuda")
    return inputs, dict(cu_seqlens=limits, backend="gluon", **places("positions", sum(lengths), "cuda"))


@pytest.mark.gpu
@hopper
@of_clips
@pytest.mark.parametrize(
    "rope,dtype,heads",
    [("positions", torch.bfloat16, (4, 2)), ("k_positions", F16, (4, 2)), ({}, torch.bfloat16, (3, 3))],
    ids=str,
)
def test_on_a_gpu(lengths, rope, dtype, heads):
    check_clips("gluon", lengths, rope, dtype, "cuda", D=D, H=heads[0], Hk=heads[1])


@pytest.mark.gpu
@hopper
@of_clips
@pytest.mark.parametrize("deterministic", [False, True])
def test_same_bits_on_a_gpu(lengths, deterministic):
    """A hundred times: the output, dK and dV, and dQ where it is asked for."""
    inputs, call = on_a_gpu(lengths)
    run = lambda: results(lambda *x: ops.joint_attention(*x, deterministic=deterministic, **call), inputs)  # noqa: E731
    first = run()
    for _ in range(100):
        same = [torch.equal(a, b) for a, b in zip(run(), first, strict=True)]
        assert same[0] and all(same[2:]) and (same[1] or not deterministic)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_clip_touches_its_neighbours_on_a_gpu(number):
    inputs, call = on_a_gpu([193, 100, 785, 65, 300])
    apart = torch.cat((torch.arange(193), torch.arange(293, 1078), torch.arange(1143, 1443)))
    found = []
    for fill in (0.5, number):
        with torch.no_grad():
            for x in inputs:
                x[193:293], x[1078:1143] = fill, fill
        run = results(lambda *x: ops.joint_attention(*x, deterministic=True, **call), inputs)
        found.append([x[apart] for x in run])
    assert all(map(torch.equal, *found)) and not any(x.isnan().any() for x in found[1])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("limits", [[0, 300, 200, 399], [0, 100], [0, 200, 3000], [-1, 399]], ids=str)
def test_limits_that_are_none_show_on_a_gpu(limits):
    inputs, call = on_a_gpu([399])
    call["cu_seqlens"] = torch.tensor(limits, dtype=torch.int32, device="cuda")
    assert all(x.isnan().all() for x in results(lambda *x: ops.joint_attention(*x, **call), inputs))


@pytest.mark.gpu
@hopper
def test_compiles_whole_and_is_captured_on_a_gpu():
    inputs, call = on_a_gpu([193, 0, 785, 65])
    run = lambda *x: ops.joint_attention(*x, **call)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = results(run, inputs)
    for a, b in zip(results(compiled, inputs), want, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run(*inputs)
    graph.replay()
    assert torch.equal(out, want[0])
