"""The pairwise losses on a GPU, as `auto` serves them: against float64 on the CPU, twice the same bits, no waiting, memory."""

import pytest
import torch
from check import launched
from pairwise_oracle import gradients

from evaat_fast import ops

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOSSES = {
    "sms": lambda v, t, c, **k: ops.sms_loss(v, t, c, **k),
    "sms, paper": lambda v, t, c, **k: ops.sms_loss(v, t, c, rule="paper", **k),
    "sms, each": lambda v, t, c, **k: ops.sms_loss(v, t, c, reduction="none", **k).square().sum(),
    "mi_mm": lambda v, t, c, **k: ops.mi_mm_loss(v, t, **k),
    "adaptive": lambda v, t, c, **k: ops.adaptive_mi_mm_loss(v, t, c.diagonal(), **k),
    "clip": lambda v, t, c, **k: ops.clip_loss(v, t, 4 / v.shape[1], **k),
    "clip, each": lambda v, t, c, **k: ops.clip_loss(v, t, 4 / v.shape[1], reduction="none", **k).square().sum(),
    "ego_nce": lambda v, t, c, **k: ops.ego_nce_loss(v, t, c > 0.9, **k),
}


def batch(N, E, dtype=F32, device="cuda"):
    video = torch.randn(N, E)
    text = 0.7 * video + torch.randn(N, E)
    return video.to(device, dtype), text.to(device, dtype), (torch.randint(0, 11, (N, N)) / 10).to(device)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("N,E", [(2, 1), (33, 200), (129, 64), (1000, 256), (2500, 512)])
def test_equals_float64(N, E, dtype, name, backend=None):
    video, text, c = batch(N, E, dtype)
    ours = gradients(lambda v, t: LOSSES[name](v, t, c, backend=backend), video, text)
    again = gradients(lambda v, t: LOSSES[name](v, t, c, backend=backend), video, text)
    assert all(map(torch.equal, ours, again)), "two runs differ"
    low = gradients(lambda v, t: LOSSES[name](v, t, c.cpu(), backend="reference"), video.cpu(), text.cpu())
    # A label is the float32 that the kernels see.
    truth = gradients(lambda v, t: LOSSES[name](v, t, c.cpu(), backend="reference"), video.cpu().double(), text.cpu().double())
    assert (ours[0].cpu().double() - truth[0]).abs() <= 1e-5 * (1 + truth[0].abs())
    for a, b, t in zip(ours[1:], low[1:], truth[1:], strict=True):
        rounding = {F32: 2e-6, BF16: 4e-3, F16: 5e-4}[dtype]
        assert (a.cpu().double() - t).norm() <= 2 * (b.double() - t).norm() + rounding * t.norm()


@pytest.mark.parametrize("name", list(LOSSES)[:5])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("N,E", [(2, 1), (33, 200), (129, 64), (1000, 256), (2500, 512)])
def test_cuda_equals_float64(N, E, dtype, name):
    pytest.importorskip("evaat_fast._cuda")
    test_equals_float64(N, E, dtype, name, "cuda")


@pytest.mark.parametrize("dtype,backend", [(F32, "triton"), (BF16, "triton"), (F16, "triton"), (BF16, "cuda"), (F16, "cuda")])
def test_duplicate_pairs_are_ties(dtype, backend):
    """One pair twice, in tiles far apart: cosines equal to the last bit, so that no slope is made of noise."""
    video, _, _ = batch(1000, 200, dtype)
    video[900] = video[3]
    c = torch.eye(1000, device="cuda")
    c[900, 3] = c[3, 900] = 1
    loss = lambda v, t: ops.sms_loss(v, t, c, margin=0.0, relaxation=0.0, backend=backend)  # noqa: E731
    for out in gradients(loss, video, video.clone()):
        assert not out.any()


def test_every_source_of_labels_gives_the_same_bits():
    N = 300
    iou, verb, noun = torch.randint(0, 5, (9, 9)) / 4, torch.randint(0, 3, (N,)), torch.randint(0, 9, (N,))
    matrix = 0.5 * (verb[:, None] == verb) + 0.5 * iou[noun[:, None], noun]
    identity = torch.arange(N).cuda()
    sources = [
        matrix.cuda(),
        matrix.cuda().T.contiguous().T,
        ops.DenseRelevancy((matrix * 8).to(torch.uint8).cuda(), 1 / 8),
        ops.IndexedRelevancy(matrix.double().cuda(), identity, identity),
        ops.VerbNounRelevancy(verb.cuda(), noun.cuda(), iou.cuda()),
    ]
    video, text, _ = batch(N, 96, BF16)
    results = [gradients(lambda v, t, s=s: ops.sms_loss(v, t, s), video, text) for s in sources]
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("name", ["sms", "mi_mm", "clip", "ego_nce"])
def test_neither_waits_for_the_gpu_nor_breaks_a_graph(name):
    video, text, c = batch(500, 64, BF16)
    video.requires_grad_(), text.requires_grad_()

    def step():
        loss = LOSSES[name](video, text, c)
        return loss.detach(), *torch.autograd.grad(loss, (video, text))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outs = step()
    with torch.no_grad():
        video.normal_()
    graph.replay()
    assert all(map(torch.equal, outs, step()))


@pytest.mark.counts
@pytest.mark.parametrize("name,most", [("sms", 7), ("clip", 8), ("ego_nce", 10)])
def test_a_small_batch_is_few_launches(name, most):
    """Products that are split over E or N have a sum of their own, which is not counted. CLIP's scale and EgoNCE's temperature
    and positives, made in LOSSES, are."""
    (video, text, c), ones = batch(1024, 256, BF16), torch.ones((), device="cuda")
    video.requires_grad_(), text.requires_grad_()
    step = lambda: torch.autograd.grad(LOSSES[name](video, text, c), (video, text), ones)  # noqa: E731
    step()  # compiles
    kernels = [name for name in launched(step) if "splitK" not in name]
    assert len(kernels) <= most, kernels


def test_an_index_out_of_range_makes_the_loss_nan_and_is_named_on_request():
    video, text, c = batch(5, 8)
    index = torch.arange(5, device="cuda")
    labels = ops.IndexedRelevancy(c, index, index + 1)
    assert ops.sms_loss(video, text, labels).isnan()
    with pytest.raises(IndexError, match="caption_index: expected 0 <= index < 5"):
        ops.sms_loss(video, text, labels, validate=True)


def test_memory_at_32k():
    N = 32768
    video, text = (torch.randn(N, 256, device="cuda", dtype=BF16).requires_grad_() for _ in range(2))
    labels = ops.IndexedRelevancy(torch.rand(100, 100, device="cuda"), *torch.randint(0, 100, (2, N), device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss = ops.sms_loss(video, text, labels)
    assert loss.isfinite() and torch.cuda.max_memory_allocated() - held <= 256 * 2**20


@pytest.mark.timeout(600)
def test_a_step_of_a_million_pairs():
    N = 1 << 20
    video, text = (torch.randn(N, 256, device="cuda", dtype=BF16).requires_grad_() for _ in range(2))
    ids = torch.randint(0, 90, (2, N), device="cuda")
    labels = ops.VerbNounRelevancy(*ids, torch.rand(90, 90, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for loss in (lambda: ops.sms_loss(video, text, labels), lambda: ops.clip_loss(video, text, 0.05)):
        value = loss()
        # A panel, unit rows in bfloat16 and gradients in float32: 1, 1 and 2 GiB.
        assert torch.cuda.max_memory_allocated() - held <= 5 * 2**30
        assert value.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(value, (video, text)))
        del value
        torch.cuda.reset_peak_memory_stats()
