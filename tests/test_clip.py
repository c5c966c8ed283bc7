"""clip_loss: against cross-entropy in float64; and what both losses owe to autograd, torch.compile, autocast and memory."""

import functools
import subprocess
import sys

import pairwise_cases as cases
import pairwise_oracle as oracle
import pytest
import torch
from check import close
from pairwise_oracle import gradients

from evaat_fast import ops
from evaat_fast.ops._core.register import flat
from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.reference import clip_loss_reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(2, 1), (3, 200), (31, 63), (32, 64), (33, 256), (127, 8), (129, 200), (300, 64)]


@pytest.fixture(params=[13, 1 << 20], ids=["panels of 13 rows", "one panel"])
def panels(request):
    """The losses."""
    return cases.losses(request.param)


def batch(N, E, dtype=F32):
    video = torch.nn.functional.normalize(torch.randn(N, E), dim=1)
    text = torch.nn.functional.normalize(0.7 * video + torch.randn(N, E) / E**0.5, dim=1)
    return video.to(dtype), text.to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("N,E", SIZES)
def test_equals_cross_entropy(N, E, dtype, panels):
    video, text = batch(N, E, dtype)
    scale = torch.tensor(14.0)
    ours = gradients(lambda v, t, s: panels.clip_loss(v, t, s, backend="cpu"), video, text, scale)
    low = gradients(clip_loss_reference, video, text, scale)
    truth = gradients(oracle.clip, video.double(), text.double(), scale.double())
    for name, *three in zip(("video", "text"), ours[1:3], low[1:3], truth[1:3], strict=True):
        close(*three, what=name)
    # Single numbers are held to the size of what they sum up (logits of 14), not to torch's luck.
    for a, b in ((ours[0], truth[0]), (ours[3], truth[3])):
        assert a.dtype == F32 and (a - b).abs() <= 14 * 2e-7


@pytest.mark.parametrize("N,E", SIZES)
def test_float64_to_1e12(N, E, panels, isa):
    video, text = batch(N, E, F64)
    ours = gradients(panels.clip_loss, video, text, torch.tensor(14.0, dtype=F64))
    truth = gradients(oracle.clip, video, text, torch.tensor(14.0, dtype=F64))
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == F64 and (a - b).abs().max() <= 1e-12 * max(b.abs().max(), 1e-2)


def test_instruction_sets(isa):
    video, text = batch(130, 40)
    ours = gradients(lambda v, t: ops.clip_loss(v, t, 30.0), video, text)
    truth = gradients(lambda v, t: oracle.clip(v, t, 30.0), video.double(), text.double())
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= 3e-6 * b.norm()


@pytest.mark.parametrize("scale", [1000.0, -1000.0, 0.0, 1e-3])
def test_stable_with_logits_of_a_thousand(scale, panels, isa):
    video, text = batch(40, 16)
    ours = gradients(lambda v, t: panels.clip_loss(v, t, scale), video, text)
    truth = gradients(lambda v, t: oracle.clip(v, t, scale), video.double(), text.double())
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all() and (a.double() - b).norm() <= 3e-4 * b.norm().clamp_min(1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_logit_scale_may_be_any_tensor_of_one_element(dtype, shape):
    video, text = batch(20, 8)
    scale = torch.full(shape, 8.0, dtype=dtype).requires_grad_()
    ops.clip_loss(video, text, scale).backward()
    truth = gradients(lambda s: oracle.clip(video.double(), text.double(), s), torch.tensor(8.0, dtype=F64))
    assert scale.grad.shape == shape and scale.grad.dtype == dtype
    assert (scale.grad.double().reshape(()) - truth[1]).abs() <= torch.finfo(dtype).eps * truth[1].abs() + 1e-7
    assert ops.clip_loss(video, text, 8.0) == ops.clip_loss(video, text, scale) == ops.clip_loss(video, text, 8)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("N", [0, 1])
def test_no_pairs(N, backend, dtype):
    video, text = torch.randn(N, 8).to(dtype), torch.randn(N, 8).to(dtype)
    out, gv, gt, gs = gradients(lambda v, t, s: ops.clip_loss(v, t, s, backend=backend), video, text, torch.tensor(5.0))
    assert out == 0 and out.dtype == torch.promote_types(dtype, F32)
    assert gv.shape == gt.shape == (N, 8) and not gv.any() and not gt.any() and gs == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_loss(bad, backend, panels):
    video, text = batch(40, 16)
    video[17, 3] = bad
    assert panels.clip_loss(video, text, 5.0, backend=backend).isnan()


def test_views_and_one_sided_gradients():
    video, text = batch(45, 24)
    _, gv, gt = gradients(lambda v, t: ops.clip_loss(v, t, 9.0), video, text)
    assert torch.equal(gradients(lambda v: ops.clip_loss(v.T.contiguous().T, text, 9.0), video)[1], gv)
    assert torch.equal(gradients(lambda t: ops.clip_loss(video, torch.cat((t, t), 1)[:, 24:], 9.0), text)[1], gt)
    with torch.no_grad():
        assert not ops.clip_loss(video.requires_grad_(), text, 9.0).requires_grad


def test_reduction_none():
    video, text = batch(30, 8, F64)
    entries = ops.clip_loss(video, text, 6.0, reduction="none")
    x = 6.0 * text @ video.T
    want = (x.logsumexp(0) + x.logsumexp(1)) / 2 - x.diag()
    torch.testing.assert_close(entries, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entries.mean(), ops.clip_loss(video, text, 6.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("N,E", SIZES)
def test_reduction_none_has_the_reference_s_gradients(N, E, panels):
    video, text = batch(N, E, F64)
    weight, scale = torch.randn(N, dtype=F64), torch.tensor(6.0, dtype=F64)
    ours, want = (
        gradients(lambda *x, b=b: (panels.clip_loss(*x, reduction="none", backend=b) * weight).sum(), video, text, scale)
        for b in ("cpu", "reference")
    )
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def losses(backend=None):
    N = 24
    sms, adaptive, mi_mm, clip = (
        functools.partial(loss, backend=backend)
        for loss in (ops.sms_loss, ops.adaptive_mi_mm_loss, ops.mi_mm_loss, ops.clip_loss)
    )
    c, index = torch.rand(N, N), torch.randint(0, N, (N,))
    codes = ops.DenseRelevancy((c * 240).to(torch.uint8), 1 / 240)
    return {
        "sms": lambda v, t: sms(v, t, c),
        "sms indexed": lambda v, t: sms(v, t, ops.IndexedRelevancy(c, index, index)),
        "sms codes": lambda v, t: sms(v, t, codes, self_relevancy=c.diag()),
        "adaptive": lambda v, t: adaptive(v, t, c.diag()),
        "mi_mm": lambda v, t: mi_mm(v, t),
        "sms each": lambda v, t: sms(v, t, c, reduction="none").square().sum(),
        "verbs and nouns": lambda v, t: sms(v, t, ops.VerbNounRelevancy(index, index, c)),
        "clip each": lambda v, t: clip(v, t, 12.0, reduction="none").square().sum(),
        "clip": lambda v, t: clip(v, t, 12.0),
    }


@pytest.mark.parametrize("name", losses())
def test_compiles_whole(name):
    torch._dynamo.reset()
    loss, (video, text) = losses()[name], batch(24, 8)
    compiled = torch.compile(lambda v, t: 3 * loss(v, t), fullgraph=True, backend="aot_eager")
    ours, want = gradients(compiled, video, text), gradients(lambda v, t: 3 * loss(v, t), video, text)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(video, text), want[0])


@pytest.mark.parametrize("name", losses())
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_fake_tensors(name, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    loss, (video, text) = losses()[name], batch(24, 8, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x).requires_grad_() for x in (video, text)]
        out = loss(*fakes)
        out.backward()
        assert out.shape == () and out.dtype == torch.promote_types(dtype, F32)
        assert all(x.grad.shape == x.shape and x.grad.dtype == dtype for x in fakes)


def test_opcheck():
    video, text = batch(24, 8)
    c, index = torch.rand(24, 24), torch.randint(0, 24, (24,))
    weight = torch.rand(24)
    check = torch.library.opcheck
    sms, contrast = torch.ops.evaat_fast.sms_step.default, torch.ops.evaat_fast.contrast_step.default
    given = cases.settings
    check(sms, (video, text, None, *flat(given(c))))
    check(sms, (video.bfloat16(), text.bfloat16(), None, *flat(given(c, indices=(index, index), needs=(True, False)))))
    check(sms, (video, text, None, *flat(given(c, 13, each=True, needs=(False, False)))))
    check(sms, (video, text, weight, *flat(given(c, own=c[0]))))
    scale, hot = torch.tensor(9.0), torch.ones(24, 1, dtype=torch.int32)

    def infonce(positives, normalise, each, *needs):
        return flat(step.ContrastSettings(positives, normalise, step.Work(each, *needs, "cpu", None)))

    check(contrast, (video, text, scale, None, *infonce(Positives(), False, False, True, True, True)))
    check(contrast, (video[:1], text[:1], scale, None, *infonce(Positives(), False, False, False, True, False)))
    check(contrast, (video, text, scale, weight, *infonce(Positives(), False, False, True, True, True)))
    check(contrast, (video, text, scale, None, *infonce(Positives(c > 0.5), True, False, True, True, False)))
    check(contrast, (video, text, scale, None, *infonce(Positives(None, hot, hot), True, True, False, False, False)))


@pytest.mark.parametrize("name", losses())
def test_compiles_whole_under_autocast(name):
    torch._dynamo.reset()
    loss, (video, text) = losses()[name], batch(24, 8)

    def under_autocast(v, t):
        with torch.autocast("cpu", dtype=BF16):
            return loss(v, t)

    ours = gradients(torch.compile(under_autocast, fullgraph=True, backend="aot_eager"), video, text)
    assert all(map(torch.equal, ours, gradients(loss, video, text)))


@pytest.mark.parametrize("name", losses())
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_leaves_the_losses_in_their_dtype(name, backend):
    loss, (video, text) = losses(backend)[name], batch(24, 8)
    want = gradients(loss, video, text)
    leaves = [x.clone().requires_grad_() for x in (video, text)]
    with torch.autocast("cpu", dtype=BF16):
        out = loss(*leaves)
    ours = (out.detach(), *torch.autograd.grad(out, leaves))  # outside, as torch recommends
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


@pytest.mark.parametrize("name", ["sms", "adaptive", "clip"])
def test_gradcheck(name):
    """Random points lie on no kink to 1e-6."""
    N = 7
    c = torch.randint(0, 4, (N, N), dtype=F64) / 4
    loss = {
        "sms": lambda v, t: ops.sms_loss(v, t, c),
        "adaptive": lambda v, t: ops.adaptive_mi_mm_loss(v, t, c.diag()),
        "clip": lambda v, t: ops.clip_loss(v, t, 3.0),
    }[name]
    assert torch.autograd.gradcheck(loss, [torch.randn(N, 5, dtype=F64, requires_grad=True) for _ in range(2)])


@pytest.mark.parametrize("op", ["clip_loss", "ego_nce_loss"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("N,noise", [(8, 0.1), (256, 0.1)])
def test_what_a_trained_batch_still_costs_is_kept(N, noise, backend, op, panels, isa):
    """Losses of 3e-8 to 1e-6, less than the rounding of logits near 20: value and gradient as float64 has them."""
    cases.check_trained_batch(N, noise, op, backend, panels)


MEMORY = """
import gc, torch
from pathlib import Path
from evaat_fast import ops
from evaat_fast.ops._core.register import flat
def status(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
torch.set_num_threads(2)
dtype = getattr(torch, "{dtype}")
def step(N, video, text, labels):
    {loss}.backward()
def inputs(N):
    video, text = (torch.randn(N, 256).to(dtype).requires_grad_() for _ in range(2))
    return N, video, text, torch.rand(N, N)
big = inputs(4096)
step(*inputs(64))
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(*big)
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.sample(2)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["ops.sms_loss(video, text, labels)", "ops.clip_loss(video, text, 20.0)"])
def test_memory_is_linear(loss, dtype):
    """A step at N = 4096 adds less than 50 MB to the peak of a fresh process; the gradients are 4 or 8 of them."""
    code = MEMORY.format(dtype=dtype, loss=loss)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 50, f"{run.stdout.strip()} MB"
