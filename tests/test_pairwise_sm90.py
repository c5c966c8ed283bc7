"""InfoNCE's Gluon kernels: emulated, whatever the order in which a GPU does what it may, and on a GPU.

Emulated they run in a process of the interpreter's, which takes the Triton kernels beside them.
"""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from check import on_hopper

from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.reference import clip_loss_reference

interpret = pytest.mark.interpret
kernels = pytest.importorskip("evaat_fast.kernels.pairwise.contrast_sm90", reason="needs Triton 3.6", exc_type=ImportError)
from gluon_emulated import emulate  # noqa: E402

from evaat_fast.ops.pairwise import hopper, triton  # noqa: E402

F16, BF16 = torch.float16, torch.bfloat16
LAUNCHERS = ("stats", "slopes", "shares", "ranges")


def batch(N, E, dtype=F16, device="cpu", noise=3.0):
    unit = torch.nn.functional.normalize
    video = unit(torch.randn(N, E), dim=1)
    text = unit(video + noise * unit(torch.randn(N, E), dim=1), dim=1)
    return video.to(device, dtype), text.to(device, dtype)


def by_kernels(video, text, scale, rows=None, weight=None, each=False, needs=(True, True, True), of=hopper):
    """(loss, gradients of the features and of the scale)."""
    settings = step.ContrastSettings(Positives(), False, step.Work(each, *needs, "triton", rows))
    scale = torch.tensor(float(scale), device=video.device)
    return step.run(of.Contrast(video, text, scale, weight, settings))


@pytest.fixture
def emulated(monkeypatch):
    """by_kernels of a seed, on a GPU of so many multiprocessors."""

    def run(*call, seed=0, programs=2, module=kernels, **options):
        fake = emulate(module, seed, programs)
        for name in LAUNCHERS:
            monkeypatch.setattr(kernels, name, getattr(fake, name))
        return by_kernels(*call, **options)

    return run


def exactly(video, text, scale, weight=None):
    inputs = [x.double().requires_grad_() for x in (video, text, torch.tensor(float(scale)).to(video.device))]
    loss = clip_loss_reference(*inputs, reduction="mean" if weight is None else "none")
    return loss.detach(), *torch.autograd.grad(loss if weight is None else (loss * weight).sum(), inputs)


def held(ours, truth, dtype=F16, loss=3e-6):
    """Slopes are rounded to 16 bits, once each, before they are added up."""
    assert (ours[0].double() - truth[0]).abs().max() <= loss * (1 + truth[0].abs().max())
    for a, b in zip(ours[1:3], truth[1:3], strict=True):
        assert (a.double() - b).norm() <= {F16: 6e-4, BF16: 5e-3}[dtype] * b.norm() + 1e-7
    assert (ours[3] - truth[3]).abs() <= loss * (1 + truth[3].abs())


# Of no whole tile, of whole ones, of captions beyond the end in one warpgroup's 128 and in both's; of one program that takes
# several units, and of more programs than there are units.
@interpret
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("N,E,scale", [(2, 64, 14.0), (5, 64, 14.0), (129, 64, 30.0), (256, 128, 14.0), (300, 64, 14.0)])
def test_equals_the_reference(N, E, scale, programs, emulated):
    video, text = batch(N, E)
    first = emulated(video, text, scale, seed=random.randrange(10**6), programs=programs)
    held(first, exactly(video, text, scale))
    second = emulated(video, text, scale, seed=random.randrange(10**6), programs=programs)
    assert all(map(torch.equal, first, second))


@interpret
def test_rows_of_256_numbers(emulated):
    video, text = batch(200, 256)
    held(emulated(video, text, 20.0), exactly(video, text, 20.0))


@interpret
@pytest.mark.parametrize("rows", [128, 200])
def test_panels(rows, emulated):
    """Of 300 videos, also when the sums of rows are added up 128 at a time."""
    video, text = batch(300, 64)
    whole, truth = emulated(video, text, 14.0), exactly(video, text, 14.0)
    held(emulated(video, text, 14.0, rows=rows), truth)
    assert torch.equal(emulated(video, text, 14.0, rows=rows)[0], whole[0])


@interpret
def test_sums_of_rows_in_parts(emulated, monkeypatch):
    video, text = batch(300, 64)
    monkeypatch.setattr(hopper, "SUMS_BYTES", 4 * 3 * 128)
    held(emulated(video, text, 14.0), exactly(video, text, 14.0))


@interpret
@pytest.mark.parametrize("scale", [1000.0, -1000.0, 150.0, 1e-3, 0.0])
def test_any_scale(scale, emulated):
    """Of logits of a thousand float32 does not hold the sums: they are made once more."""
    video, text = batch(140, 64)
    held(emulated(video, text, scale), exactly(video, text, scale), loss=1e-4 if abs(scale) > 100 else 3e-6)


@interpret
@pytest.mark.parametrize("least,most", [(False, True), (True, False)])
def test_logits_that_have_nothing_in_common(least, most, emulated):
    """Rows and columns whose logits lie hundreds above or below all others', at a scale for which none is known to."""
    video, text = batch(140, 64)
    for x in (video, text):
        x[3] *= 40 if most else 1
    if least:
        text[:] = -video[:1] + torch.randn_like(video) / 50
        video[:] = video[:1] + torch.randn_like(video) / 50
    scale = 14.0 if most else 200.0
    held(emulated(video, text, scale), exactly(video, text, scale), loss=1e-4)


@interpret
def test_what_a_trained_batch_still_costs_is_kept(emulated):
    video, text = batch(256, 64, noise=0.1)
    video, text = (torch.nn.functional.normalize(torch.eye(256, 256) + 0.01 * x.float() @ x.float().T) for x in (video, text))
    ours, truth = emulated(video.half(), text.half(), 20.0), exactly(video.half(), text.half(), 20.0)
    assert 0 < truth[0] < 2e-6 and (ours[0] - truth[0]).abs() <= 4e-6 * truth[0]


@interpret
def test_each_pair(emulated):
    video, text = batch(140, 64)
    weight, truth = torch.randn(140), None
    truth = exactly(video, text, 9.0, weight)
    entries = emulated(video, text, 9.0, each=True, needs=(False,) * 3)[0]
    torch.testing.assert_close(entries.double(), truth[0], rtol=1e-5, atol=1e-6)
    ours = emulated(video, text, 9.0, weight=weight)
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert (a.double() - b).norm() <= 6e-4 * b.norm()


@interpret
def test_one_sided_gradients_and_none(emulated):
    video, text = batch(130, 64)
    both = emulated(video, text, 9.0)
    assert torch.equal(emulated(video, text, 9.0, needs=(True, False, False))[1], both[1])
    assert torch.equal(emulated(video, text, 9.0, needs=(False, True, False))[2], both[2])
    assert torch.equal(emulated(video, text, 9.0, needs=(False,) * 3)[0], both[0])


@interpret
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_loss(bad, emulated):
    for side in (0, 1):
        features = batch(140, 64)
        features[side][7, 3] = bad
        assert not emulated(*features, 5.0)[0].isfinite()


# What a kernel may not do, as (text, another in its place); a GPU may forgive each for long.
FAULTS = {
    "no fence": ("    fence_async_shared()\n    copy_out", "    copy_out"),
    "slopes' place is taken early": ("    tma.store_wait(pendings=0)\n    slope", "    slope"),
    "videos are overwritten": ("mbarrier.wait(sh.video_free.index(s), ((n // STAGES) & 1) ^ 1)", "pass"),
    "captions are given away early": ("mbarrier.wait(sh.text_free.index(c), (it & 1) ^ 1)", "pass"),
    "captions beyond the end count": ("(m < call.last)[:, None] & (n < call.N)[None, :] &", "(m < call.last)[:, None] &"),
}


@interpret
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path, emulated):
    text = Path(kernels.__file__).read_text()
    assert text.count(FAULTS[fault][0]) == 1
    (tmp_path / "faulty.py").write_text(text.replace(*FAULTS[fault]))
    spec = importlib.util.spec_from_file_location("faulty", tmp_path / "faulty.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = batch(600, 64)
    truth = exactly(*inputs, 14.0)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(20):
            held(emulated(*inputs, 14.0, seed=seed, programs=1, module=module), truth)


@interpret
def test_plan():
    """Units are whole, none is empty, and 128 of 132 multiprocessors have work where N is a power of two."""
    for N, rows in ((4096, 4096), (16384, 16384), (32768, 32768), (32768, 2048), (300, 300), (2, 2), (65536, 1024), (990, 130)):
        span, ranges, units = kernels.plan(rows, N, 132)
        assert span % 128 == 0 and units == ranges * -(-N // 256) and (ranges - 1) * span < rows <= ranges * span
        if N >= 4096:
            assert units % 132 in (0, 128, 124)


hopper_gpu = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")


@pytest.mark.gpu
@hopper_gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("N,E,scale", [(2, 64, 14), (129, 256, 30), (1000, 128, 100), (4096, 256, 20), (2500, 192, 1000)])
def test_gluon_against_float64(N, E, scale, dtype):
    video, text = batch(N, E, dtype, "cuda")
    ours, truth = by_kernels(video, text, scale), exactly(video, text, scale)
    held(ours, truth, dtype, 1e-4 if scale > 100 else 1e-5)
    for _ in range(20):
        assert all(map(torch.equal, ours, by_kernels(video, text, scale)))


@pytest.mark.gpu
@hopper_gpu
def test_gluon_beside_triton_at_32k():
    """In panels, with less than 256 MiB beside the inputs."""
    video, text = batch(32768, 256, BF16, "cuda")
    want = by_kernels(video, text, 50, of=triton)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = by_kernels(video, text, 50)
    assert torch.cuda.max_memory_allocated() - before <= 256 * 2**20
    for a, b, allowed in zip(ours, want, (1e-6, 1e-3, 1e-3, 1e-5), strict=True):
        assert (a - b).norm() <= allowed * b.norm()
