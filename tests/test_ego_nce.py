"""ego_nce_loss on every backend that runs eagerly: against its formula in float64, its positives, its edges and bad input."""

import functools

import pairwise_oracle as oracle
import pytest
import torch
from check import close
from pairwise_cases import losses
from pairwise_oracle import gradients

from evaat_fast import ops
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.reference import ego_nce_loss_reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def batch(N, E, dtype=F32):
    """Features, and multi-hot verbs and nouns of which a pair has one to three."""
    video = torch.randn(N, E)
    text = 0.7 * video + torch.randn(N, E)
    verbs, nouns = torch.rand(N, 70) < 0.03, torch.rand(N, 40) < 0.1
    return video.to(dtype), text.to(dtype), verbs, nouns


def matrix(verbs, nouns):
    return (verbs.double() @ verbs.double().T) * (nouns.double() @ nouns.double().T) > 0


def published(video, text, verbs, nouns, temperature=0.05):
    """EgoVLP's class: softmax, the sum over the mask, the logarithm, in both directions."""
    x = oracle.unit(text) @ oracle.unit(video).T / temperature
    mask = ((verbs.double() @ verbs.double().T) * (nouns.double() @ nouns.double().T) + torch.eye(len(x))) > 0
    terms = [torch.log((torch.softmax(s, 1) * mask).sum(1)).sum() / len(x) for s in (x, x.T)]
    return -terms[0] - terms[1]


@pytest.fixture(params=[None, 13], ids=["one panel", "panels"])
def panels(request):
    """The losses."""
    return losses(request.param)


@pytest.mark.parametrize("source", ["matrix", "bits"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("N,E", [(2, 1), (3, 200), (33, 63), (128, 64), (129, 8)])
def test_equals_the_published_formula(N, E, dtype, backend, source, panels, isa):
    video, text, verbs, nouns = batch(N, E, dtype)
    positives = matrix(verbs, nouns) if source == "matrix" else ops.VerbNounPositives(verbs, nouns)
    ours = gradients(lambda v, t: panels.ego_nce_loss(v, t, positives, backend=backend), video, text)
    truth = gradients(lambda v, t: published(v, t, verbs, nouns), video.double(), text.double())
    low = gradients(lambda v, t: ego_nce_loss_reference(v, t, matrix(verbs, nouns), 0.05), video, text)
    assert ours[0].dtype == torch.promote_types(dtype, F32)
    if dtype == F64:
        for a, b in zip(ours, truth, strict=True):
            assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))
        return
    assert abs(ours[0] - truth[0]) <= 20 * 4e-7  # logits of 20
    for name, a, b, c in zip(("video", "text"), ours[1:], low[1:], truth[1:], strict=True):
        if N > 33 and E > 8:
            close(a, b, c, name)
        else:  # the error is that of a few pairs of middling probability: luck
            assert (a.double() - c).norm() <= 1.6 * (b.double() - c).norm() + 1e-6 * c.norm(), name


def test_a_single_positive_is_twice_infonce():
    video, text, _, _ = batch(50, 16, F64)
    nothing = torch.zeros(50, 50, dtype=torch.bool)
    ours = gradients(lambda v, t: ops.ego_nce_loss(v, t, nothing, temperature=0.1), video, text)
    want = gradients(lambda v, t: 2 * oracle.clip(oracle.unit(v), oracle.unit(t), 10.0), video, text)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_far_positives_do_not_underflow():
    """softmax-then-log gives log 0 where the positives are 120 below the largest logit; the loss is 120."""
    video = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = ops.ego_nce_loss(video, video.flip(0), torch.zeros(2, 2, dtype=torch.bool), temperature=1 / 120)
    torch.testing.assert_close(loss, torch.tensor(240.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_class_ids_are_one_hot_rows(dtype):
    verbs, nouns = torch.randint(-1, 4, (40,)), torch.randint(-1, 50, (40,)) * 1000
    video, text, _, _ = batch(40, 8)
    share = lambda x: (x[:, None] == x) & (x[:, None] >= 0)  # noqa: E731
    ours = ops.ego_nce_loss(video, text, ops.VerbNounPositives(verbs.to(dtype), nouns.to(dtype)))
    assert torch.equal(ours, ops.ego_nce_loss(video, text, share(verbs) & share(nouns)))


def test_all_32_bits_of_a_word_count():
    for K in (1, 31, 32, 33, 64):
        hot = torch.eye(K).repeat(2, 1)
        positives = ops.VerbNounPositives(hot, torch.ones(2 * K, 1))
        assert torch.equal(Positives(None, positives.verbs, positives.nouns).matrix(), hot @ hot.T > 0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_asymmetric_matrix_means_the_same_pairs_in_both_directions(backend, panels):
    video, text, _, _ = batch(45, 12, F64)
    positives = torch.rand(45, 45) < 0.1
    ours = gradients(lambda v, t: panels.ego_nce_loss(v, t, positives, backend=backend), video, text)
    swapped = gradients(lambda t, v: panels.ego_nce_loss(t, v, positives.T, backend=backend), text, video)
    for a, b in zip(ours, (swapped[0], swapped[2], swapped[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_reduction_none(panels):
    video, text, verbs, nouns = batch(60, 12, F64)
    weight = torch.randn(60, dtype=F64)
    run = functools.partial(panels.ego_nce_loss, positives=ops.VerbNounPositives(verbs, nouns), reduction="none")
    ours, want = (gradients(lambda v, t, b=b: (run(v, t, backend=b) * weight).sum(), video, text) for b in ("cpu", "reference"))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    entries = run(video, text)
    torch.testing.assert_close(entries.mean(), published(video, text, verbs, nouns), rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_edges(backend):
    for N in (0, 1):
        features, every = torch.full((N, 4), torch.nan), torch.ones(N, N).bool()
        out = gradients(functools.partial(ops.ego_nce_loss, positives=every, backend=backend), features, features)
        assert out[0] == 0 and not out[1].any() and not out[2].any()
    video, text, verbs, nouns = batch(20, 8)
    video[3] = 0
    _, grad, _ = gradients(lambda v, t: ops.ego_nce_loss(v, t, matrix(verbs, nouns), backend=backend), video, text)
    assert grad.isfinite().all() and not grad[3].any()
    video[5, 2] = torch.nan
    assert ops.ego_nce_loss(video, text, matrix(verbs, nouns), backend=backend).isnan()


def test_compiles():
    video, text, verbs, nouns = batch(24, 8)
    positives = matrix(verbs, nouns)
    for reduction in ("mean", "none"):
        loss = lambda v, t, r=reduction: ops.ego_nce_loss(v, t, positives, reduction=r).square().sum()  # noqa: E731
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, b in zip(gradients(compiled, video, text), gradients(loss, video, text), strict=True):
            torch.testing.assert_close(a, b)


V, HOT = torch.randn(3, 8), torch.ones(3, 4)
BAD = [
    (lambda: ops.ego_nce_loss(V, V, torch.ones(3, 3)), TypeError, r"positives: expected a bool tensor \[3, 3\] or a VerbNoun"),
    (lambda: ops.ego_nce_loss(V, V, torch.ones(3, 4).bool()), ValueError, r"positives: expected the shape \[3, 3\], got"),
    (
        lambda: ops.ego_nce_loss(V, V, ops.VerbNounPositives(HOT[:2], HOT[:2])),
        ValueError,
        "positives.verbs: expected 3",
    ),
    (lambda: ops.ego_nce_loss(V, V, torch.ones(3, 3).bool(), temperature=0), ValueError, "temperature: expected a positive"),
    (
        lambda: ops.ego_nce_loss(V, V, torch.ones(3, 3, device="meta").bool()),
        ValueError,
        "positives: expected the feat",
    ),
    (lambda: ops.VerbNounPositives(HOT, HOT[:2]), ValueError, "nouns: expected 3 entries as verbs, got 2"),
    (lambda: ops.VerbNounPositives(HOT[0], HOT), TypeError, r"verbs: expected class ids \[N\] as int64 or int32, got"),
    (lambda: ops.VerbNounPositives(HOT, HOT[None]), ValueError, r"nouns: expected the shape \[N\] or \[N, K\], got"),
    (lambda: ops.VerbNounPositives([1], HOT), TypeError, "verbs: expected a tensor of class ids"),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
