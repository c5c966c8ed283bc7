"""Everything that `auto` serves on a GPU, once each at a shape of the model, in a minute: what `bench/gpu_check.sh` runs first.

The same bodies run small on the CPU, so that they are sound before a GPU is there. Few shapes and dtypes, as each new
combination compiles for seconds; the tests of each op have the rest.
"""

import contextlib
import importlib.util

import pytest
import rope3d_cases
import torch
from check import close
from cuda_emulated import emulated
from pairwise_oracle import gradients
from torch.nn.functional import normalize, scaled_dot_product_attention

import evaat_fast
from evaat_fast import ops
from evaat_fast.ops._core import dispatch

BF16, F16 = torch.bfloat16, torch.float16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def grid(device):
    return (4, 14, 14) if device == "cuda" else (2, 3, 4)


def tokens(device):
    T, Hp, Wp = grid(device)
    return 1 + T * Hp * Wp


def heads(device, dtype=BF16, H=4, D=64):
    """q, k, v of two clips, in the memory order of the model."""
    return [rope3d_cases.make("tokens first", 2, H, tokens(device), D, dtype, device) for _ in range(3)]


def test_what_serves(device):
    """Our kernels, where they should be: a fallback would pass every other test here."""
    pick = lambda op: dispatch.pick(op, torch.device(device), BF16)  # noqa: E731
    ours = "triton" if device == "cuda" else "cpu"
    losses = ("sms_loss", "mi_mm_loss", "adaptive_mi_mm_loss", "clip_loss", "ego_nce_loss")
    built = importlib.util.find_spec("evaat_fast._cuda") is not None
    many = "cuda" if device == "cuda" and built else ours
    assert {op: pick(op) for op in losses} == dict.fromkeys(losses[:3], many) | dict.fromkeys(losses[3:], ours)
    for op in losses[:3]:
        assert dispatch.pick(op, torch.device(device), BF16, None, (dispatch.FEW_PAIRS,)) == ours
        assert dispatch.pick(op, torch.device(device), torch.float32) == ours
    assert pick("rope3d") == many
    learned = dispatch.pick("rope3d", torch.device(device), BF16, None, (dispatch.LEARNED,))
    assert learned == ours
    needs = dispatch.lacks_for_hopper(torch.device(device)) if device == "cuda" else ()
    of_hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    chosen = dispatch.pick("joint_attention", torch.device(device), BF16, None, needs)
    assert chosen == ("gluon" if of_hopper else "sdpa")
    assert pick("add_norm") == pick("swiglu_norm") == ours


# The rotation


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
def test_rope3d_in_and_out_of_place(device, interleaved):
    q, k, _ = heads(device)
    rope3d_cases.check(None, q, k, grid(device), interleaved=interleaved)


def test_rope3d_gradients(device):
    q, k, _ = heads(device)
    rope3d_cases.check_gradients(None, q, k, grid(device))


def test_rope3d_packed(device):
    rope3d_cases.check_packed(None, 2, tokens(device), 4, 64, BF16, device, grid(device))


def test_rope3d_learnable(device):
    q, k, _ = heads(device)
    rope3d_cases.check_learnable(None, q, k, grid(device), freqs=torch.randn(3, 32, device=device) / 4)


def test_rope3d_positions(device):
    q, k, _ = heads(device, torch.float32)
    rope3d_cases.check(None, q, k, positions=torch.rand(2, tokens(device), 3, device=device) * 9)


# Attention


def rotated(core, q, k, v, cells):
    """The specification: the rotation's reference, then `core`."""
    return core(*ops.rope3d(q, k, cells, backend="reference"), v)


def softmax_attention(q, k, v):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def values_and_gradients(function, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def held_to_sdpa(function, inputs, cells, low=None):
    """function(q, k, v) against float64, with the error that torch's own attention has."""
    low = low or (lambda *x: rotated(scaled_dot_product_attention, *x, cells))
    truth = values_and_gradients(lambda *x: rotated(softmax_attention, *x, cells), *(x.double() for x in inputs))
    results = (values_and_gradients(f, *inputs) for f in (function, low))
    for name, ours, theirs, exact in zip(("out", "dq", "dk", "dv"), *results, truth, strict=True):
        close(ours, theirs, exact, name)


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["auto", "deterministic"])
def test_joint_attention(device, options):
    cells = grid(device)
    held_to_sdpa(lambda q, k, v: ops.joint_attention(q, k, v, grid=cells, **options), heads(device), cells)


def test_joint_attention_with_log_sum_exps(device):
    q, k, v = heads(device)
    out, lse = ops.joint_attention(q, k, v, grid=grid(device), return_lse=True)
    turned = ops.rope3d(q.double(), k.double(), grid(device), backend="reference")
    scores = turned[0] @ turned[1].transpose(-1, -2) / 8
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-2)  # of bfloat16 products near 10
    exact = scores.softmax(-1) @ v.double()
    assert (out.double() - exact).norm() <= 1e-2 * exact.norm()


def test_joint_attention_packed(device):
    """The model's call: the projection's own output, consumed, equals the unpacked call."""
    inputs = heads(device)

    def consumed(q, k, v):
        qkv = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).flatten(2)  # [B, N, 3 * H * D]
        return ops.joint_attention_qkv_(qkv * 1, 4, grid(device))

    low = lambda *x: rotated(scaled_dot_product_attention, *x, grid(device))  # noqa: E731
    held_to_sdpa(consumed, inputs, grid(device), low)


# The norms


def block(device, width, *sizes):
    """Rows of two clips, bfloat16 and float32 as sizes say, and the weights of a norm of that width."""
    rows = [torch.randn(2, tokens(device), n, device=device).to(t).requires_grad_() for n, t in sizes]
    return [*rows, *(torch.randn(width, device=device).requires_grad_() for _ in range(2))]


@pytest.mark.parametrize("op", ["add_norm", "swiglu_norm"])
def test_norms(device, op):
    """Values and gradients, of the weights too, against float64 and what the plain op makes of bfloat16."""
    width = 768 if device == "cuda" else 48
    sizes = [(width, BF16), (width, torch.float32)] if op == "add_norm" else [(2 * width, BF16)]
    leaves = block(device, width, *sizes)

    def results(leaves, **options):
        outs = getattr(ops, op)(*leaves, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        upstream = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=device).reshape(o.shape) for o in outs]
        grads = torch.autograd.grad(outs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)])
        return [*outs, *grads]

    exact = results([x.detach().double().requires_grad_() for x in leaves], backend="reference")
    for ours, low, truth in zip(results(leaves), results(leaves, backend="reference"), exact, strict=True):
        close(ours, low, truth)


# The losses


def pairs(device, N, dtype=BF16, E=256):
    video = torch.randn(N, E)
    return [x.to(dtype).to(device) for x in (video, 0.7 * video + torch.randn(N, E))]


def count(device):
    return 1024 if device == "cuda" else 40


def held_to_float64(name, features, labels=(), reference_labels=None, backend=None):
    """The loss of that name and both gradients against its specification on the CPU in float64, with the error that this has
    in the features' dtype and one rounding: 16-bit slopes and unit rows are rounded once each before they are added up."""
    reference_labels = labels if reference_labels is None else reference_labels

    def reference(dtype):
        loss = lambda v, t: getattr(ops, name)(v, t, *reference_labels, backend="reference")  # noqa: E731
        return gradients(loss, *(x.cpu().to(dtype) for x in features))

    ours = gradients(lambda v, t: getattr(ops, name)(v, t, *labels, backend=backend), *features)
    low, truth = reference(features[0].dtype), reference(torch.float64)
    assert (ours[0].cpu().double() - truth[0]).abs() <= 1e-5 * (1 + truth[0].abs())
    for side, a, b, t in zip(("video", "text"), ours[1:], low[1:], truth[1:], strict=True):
        assert a.dtype == b.dtype and a.isfinite().all(), side
        error, allowed = (a.cpu().double() - t).norm(), 2 * (b.double() - t).norm() + 4e-3 * t.norm()
        assert error <= allowed, f"{name}, gradient of {side}: {error:.2e} > {allowed:.2e}"


def labels(kind, N, device):
    """(the labels as the op takes them, the matrix in float64); eighths, which every source holds exactly."""
    iou, verb, noun = torch.randint(0, 5, (9, 9)) / 4, torch.randint(0, 3, (N,)), torch.randint(0, 9, (N,))
    matrix = 0.5 * (verb[:, None] == verb) + 0.5 * iou[noun[:, None], noun]
    if kind == "verbs and nouns":
        source = ops.VerbNounRelevancy(verb.to(device), noun.to(device), iou.to(device))
    elif kind == "indexed":
        rows, columns = torch.randint(0, N, (2, N))
        source = ops.IndexedRelevancy(matrix.to(device), rows.to(device), columns.to(device))
        matrix = matrix[rows[:, None], columns]
    else:
        source = matrix.to(device)
    return source, matrix.double()


@pytest.mark.parametrize("kind", ["dense", "indexed", "verbs and nouns"])
def test_sms(device, kind):
    source, matrix = labels(kind, count(device), device)
    features = pairs(device, count(device))
    held_to_float64("sms_loss", features, (source,), (matrix,))
    once, again = (gradients(lambda v, t: ops.sms_loss(v, t, source), *features) for _ in range(2))
    assert all(map(torch.equal, once, again)), "two runs differ"


def test_mi_mm_and_adaptive(device):
    own = torch.rand(count(device))
    held_to_float64("mi_mm_loss", pairs(device, count(device)))
    held_to_float64("adaptive_mi_mm_loss", pairs(device, count(device)), (own.to(device),), (own,))


@pytest.mark.together("emulated")
@pytest.mark.parametrize("kind", ["dense", "indexed", "verbs and nouns", "one"])
def test_max_margin_in_cuda(device, kind, monkeypatch):
    """Whatever `auto` takes for so few pairs."""
    N, dtype = (1024 if device == "cuda" else 260), F16 if kind == "dense" else BF16
    if device == "cuda" and dispatch.why_not("cuda"):
        pytest.skip(dispatch.why_not("cuda"))
    with emulated(monkeypatch) if device == "cpu" else contextlib.nullcontext():
        features = pairs(device, N, dtype)
        if kind == "one":
            return held_to_float64("mi_mm_loss", features, backend="cuda")
        source, matrix = labels(kind, N, device)
        held_to_float64("sms_loss", features, (source,), (matrix,), "cuda")
        once, again = (gradients(lambda v, t: ops.sms_loss(v, t, source, backend="cuda"), *features) for _ in range(2))
        assert all(map(torch.equal, once, again)), "two runs differ"
        own = ops.sms_loss(*features, source, backend="cuda", rule="paper", reduction="none").mean()
        torch.testing.assert_close(own, ops.sms_loss(*features, source, backend="cuda", rule="paper"), rtol=1e-5, atol=0)


def test_clip(device):
    held_to_float64("clip_loss", [normalize(x.float(), dim=1).to(BF16) for x in pairs(device, count(device))], (20.0,))


@pytest.mark.parametrize("kind", ["matrix", "verbs and nouns"])
def test_ego_nce(device, kind):
    N = count(device)
    verbs, nouns = torch.rand(N, 118) < 0.05, torch.rand(N, 300) < 0.05
    matrix = (verbs.float() @ verbs.float().T) * (nouns.float() @ nouns.float().T) > 0
    positives = matrix.to(device) if kind == "matrix" else ops.VerbNounPositives(verbs.to(device), nouns.to(device))
    held_to_float64("ego_nce_loss", pairs(device, N), (positives,), (matrix,))


# The rest


def test_patchify(device):
    mean, std = (122.77, 116.75, 104.09), (68.5, 66.63, 70.32)
    video = torch.randint(0, 256, (2, 4, 32, 48, 3), dtype=torch.uint8)
    ours = ops.patchify(video.to(device), 16, mean, std, F16)
    torch.testing.assert_close(ours.cpu(), ops.patchify(video, 16, mean, std, F16, backend="reference"), rtol=1e-3, atol=1e-3)


def test_a_training_step(device):
    """The tiny model under bfloat16 autocast: loss and gradients near float32's on the CPU."""
    model = evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=4)
    batch = 8 if device == "cuda" else 2
    video = torch.randint(0, 256, (batch, 4, 64, 64, 3), dtype=torch.uint8)
    text = torch.randint(1, 49000, (batch, 77))
    text[:, 9], text[:, 10:] = 49407, 0

    def step(device, low):
        model.to(device).zero_grad()
        with torch.autocast(device, BF16, enabled=low):
            out = model(video.to(device), text.to(device))
        features = (normalize(out[x].float(), dim=-1) for x in ("image_embed", "text_embed"))
        loss = ops.clip_loss(*features, out["logit_scale"].float())
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])

    (ours, grads), (loss, exact) = step(device, True), step("cpu", False)
    assert abs(ours - loss) <= 0.05 * abs(loss)
    assert grads.isfinite().all() and (grads - exact).norm() <= 0.1 * exact.norm()
