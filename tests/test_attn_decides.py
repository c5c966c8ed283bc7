"""Who serves attention by itself: the table that bench/decide.py makes of committed results, what a call asks of it, and on a
GPU that what is decided on is right, run after run."""

import importlib
import json

import pytest
import torch
from check import close, on_hopper
from test_attn import results, tensors

from evaat_fast import ops
from evaat_fast.ops._core import dispatch, measured
from evaat_fast.ops.attn import attn as public
from evaat_fast.ops.attn.plan import plan

F16, BF16 = torch.float16, torch.bfloat16
hopper = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")


@pytest.fixture
def decide(bench_on_path):
    return importlib.import_module("decide")


def test_the_table_is_what_the_results_say(decide):
    assert decide.TARGET.read_text() == decide.module(decide.newest(decide.committed()))
    assert decide.decided(decide.newest(decide.committed())) == {k: tuple(v) for k, v in measured.GLUON.items()}


def run_of(ours, theirs=1.0, D=64, T=4, mode="fwd", utc="2026-01-01", name="evaat joint_attention, Gluon", **known):
    """The results of one case by attn.py. ours, theirs: milliseconds, None of what failed."""
    known = {"device": "NVIDIA H200", "commit": "abc", "utc": utc} | known
    shape = {"B": 32, "H": 12, "T": T, "Hp": 14, "Wp": 14, "D": D, "N": 1 + 196 * T}
    time = lambda ms: {"fail": "wrong"} if ms is None else {"ms": {"p50": ms}}  # noqa: E731
    of = lambda name, ms: {"shape": shape, "dtype": "bf16", "mode": mode, "provider": name} | time(ms)  # noqa: E731
    return {"op": "attn", "environment": known, "records": [of(name, ours), of("our rope3d + sdpa cudnn", theirs)]}


@pytest.mark.parametrize(
    "runs,expected",
    [
        ([run_of(0.95)], {((9, 0), 64): ("forward",)}),
        ([run_of(0.96)], {}),  # 1.04 x
        ([run_of(0.5), run_of(0.99, T=8)], {}),  # at every length
        ([run_of(0.99), run_of(0.9, utc="2026-01-02")], {((9, 0), 64): ("forward",)}),  # the newest
        ([run_of(0.9), run_of(0.99, utc="2026-01-02")], {}),
        ([run_of(0.9, utc="2026-01-02"), run_of(0.99)], {((9, 0), 64): ("forward",)}),
        ([run_of(0.9), run_of(None, T=8)], {}),  # a wrong result is not fast
        ([run_of(0.9), run_of(0.1, theirs=None, T=8)], {((9, 0), 64): ("forward",)}),  # nothing to compare with
        ([run_of(0.9), run_of(0.9, mode="bwd")], {((9, 0), 64): ("forward", "gradients")}),
        ([run_of(0.9, mode="fwdbwd")], {}),
        ([run_of(0.9, name="evaat joint_attention")], {((9, 0), 64): ("forward",)}),
        ([run_of(0.9, name="evaat joint_attention, Triton")], {}),
        ([run_of(0.9, D=128), run_of(0.99)], {((9, 0), 128): ("forward",)}),
        ([run_of(0.9, device="NVIDIA B200", capability=[10, 0])], {((10, 0), 64): ("forward",)}),
    ],
)
def test_the_rule(decide, runs, expected, tmp_path, capsys):
    assert decide.decided(decide.newest(e for i, run in enumerate(runs) for e in decide.evidence(f"{i}.json", run))) == expected
    before = decide.TARGET.read_text()
    (tmp_path / "run.json").write_text(json.dumps(runs[0]))
    decide.main([str(tmp_path / "run.json")])
    assert "Gluon serves: {" in capsys.readouterr().out and decide.TARGET.read_text() == before


def test_results_of_a_gpu_that_nobody_knows_decide_nothing(decide):
    with pytest.raises(ValueError, match="x.json: of what compute capability is NVIDIA X1"):
        list(decide.evidence("x.json", run_of(0.9, device="NVIDIA X1")))


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device that nothing has asked for before, as a Hopper's."""
    pytest.importorskip("evaat_fast.kernels.attn.sm90_backward", reason="needs Triton 3.6", exc_type=ImportError)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 97)


def served(device, head_dim, trains, backend=None, n=785):
    shape = torch.Size((2, 3, n, head_dim))
    rope = (None, None, 1, None, True)
    return plan(shape, shape, BF16, device, rope, None, None, None, None, False, False, False, trains, backend).backend


def test_auto_serves_what_is_measured_to_be_faster(cuda):
    """Heads of 64 in both passes, of 128 where no gradient is wanted; by name both, and below 192 tokens nothing."""
    for trains in (False, True):
        assert served(cuda, 64, trains) == served(cuda, 64, trains, n=192) == "gluon"
        assert served(cuda, 64, trains, n=191) == served(cuda, 128, False, n=191) == "sdpa"
        assert served(cuda, 96, trains) == "sdpa"
        assert served(cuda, 128, trains) == ("sdpa" if trains else "gluon")
        assert served(cuda, 128, trains, "gluon") == "gluon"
    with pytest.raises(RuntimeError, match="its kernels take heads of 64 and 128"):
        served(cuda, 96, False, "gluon")


def test_another_capability_is_another_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert dispatch.faster_heads(torch.device("cuda", 98), False) == ()


def calls():
    """(what is called, whether a gradient is recorded)."""
    q, qkv = torch.randn(2, 2, 25, 16), torch.randn(2, 25, 96)
    freqs, bias = ops.joint_freqs(16), torch.randn(96)
    learn = lambda x: x.clone().requires_grad_()  # noqa: E731
    apart = lambda *x, **o: lambda: ops.joint_attention(*x, grid=(2, 3, 4), **o)  # noqa: E731
    packed = lambda x, **o: lambda: ops.joint_attention_qkv_(x * 1, 2, (2, 3, 4), **o)  # noqa: E731
    yield apart(q, q, q), False
    for i in range(3):
        yield apart(*(learn(q) if i == j else q for j in range(3))), True
    yield apart(q, q, q, freqs=learn(freqs)), True
    yield packed(qkv), False
    yield packed(learn(qkv)), True
    yield packed(qkv, freqs=learn(freqs)), True
    yield packed(qkv, qkv_bias=learn(bias)), True


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_asks_for_gradients_where_they_are_recorded(monkeypatch, compiled):
    """Not where autograd is off, whatever requires one; and again where it is on again, by the same compiled function."""

    def shown(*call):
        return plan(*call[:6], 0.0 if call[12] else None, *call[7:])  # a scale of 0: what trains has the mean of all values

    monkeypatch.setattr(public, "plan", shown)
    for call, trains in calls():
        torch._dynamo.reset()
        run = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
        is_mean = lambda: torch.allclose(x := run().detach(), x.mean(2, keepdim=True), atol=1e-5)  # noqa: E731, B023
        assert is_mean() == trains
        with torch.no_grad():
            assert not is_mean()
        with torch.inference_mode():
            assert not is_mean()
        assert is_mean() == trains


# Shapes by head dim: of whole tiles, of ends of all kinds, and of both of the forward pass's blocks of heads of 128.
SHAPES = [(192, None), (193, (2, 8, 12)), (785, (4, 14, 14)), (1025, (4, 16, 16)), (3137, (16, 14, 14))]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("n,grid", SHAPES)
@pytest.mark.parametrize("D,options", [(64, {}), (64, {"deterministic": True}), (128, {})], ids=str)
def test_against_float64(D, options, n, grid):
    """What is decided on, forward and backward, in float16; other tests have bfloat16 and other layouts."""
    inputs = tensors(B=1, H=2, n=n, D=D, dtype=F16, device="cuda")
    rope = {"grid": grid} if grid else {}
    run = lambda backend, **o: lambda *x: ops.joint_attention(*x, backend=backend, **rope, **o)  # noqa: E731
    ours, low = results(run("gluon", **options), inputs), results(run("sdpa"), inputs)
    exact = results(run("reference"), [x.detach().double().requires_grad_() for x in inputs])
    for name, o, w, t in zip(("out", "dq", "dk", "dv"), ours, low, exact, strict=True):
        close(o, w, t, name)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("D,options", [(64, {}), (64, {"deterministic": True}), (128, {})], ids=str)
def test_a_thousand_times(D, options):
    """Of more tiles than there are multiprocessors: all but dQ, to which tiles add in any order, is the same to the bit."""
    inputs = tensors(B=8, H=12 * 64 // D, n=785, D=D, dtype=BF16, device="cuda")
    run = lambda: results(lambda *x: ops.joint_attention(*x, grid=(4, 14, 14), backend="gluon", **options), inputs)  # noqa: E731
    out, dq, *rest = run()
    for _ in range(1000):
        again, dq_again, *others = run()
        assert torch.equal(out, again) and all(map(torch.equal, rest, others))
        assert torch.equal(dq, dq_again) if options else (dq - dq_again).norm() <= 1e-2 * dq.norm()


@pytest.mark.gpu
@hopper
def test_auto_takes_wide_heads_without_gradients_alone():
    q, k, v = tensors(n=785, D=128, dtype=BF16, device="cuda")
    run = lambda backend=None: ops.joint_attention(q, k, v, grid=(4, 14, 14), backend=backend).detach()  # noqa: E731
    with torch.no_grad():
        assert torch.equal(run(), run("gluon")) and not torch.equal(run(), run("sdpa"))
    assert torch.equal(run(), run("sdpa"))
