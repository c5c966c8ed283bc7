"""What the pairwise losses must satisfy whatever computes them: reductions to each other, invariances, sums over pairs."""

import itertools

import pairwise_oracle as oracle
import pytest
import torch
from pairwise_oracle import gradients

from evaat_fast import ops

F64 = torch.float64
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
RULES = ["code", "paper", "charades"]


def batch(N=23, E=12):
    video = torch.randn(N, E, dtype=F64)
    return video, 0.7 * video + torch.randn(N, E, dtype=F64), torch.randint(0, 11, (N, N), dtype=F64) / 10


def same(ours, theirs, rtol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


@backends
@pytest.mark.parametrize("rule", RULES)
def test_sms_of_unrelated_pairs_is_mi_mm(backend, rule):
    """Relevancy 1 of each pair itself and 0 of all others: only the first branch is left, in every rule."""
    video, text, _ = batch()
    labels = torch.eye(len(video), dtype=F64)
    ours = gradients(lambda v, t: ops.sms_loss(v, t, labels, margin=0.2, rule=rule, backend=backend), video, text)
    same(ours, gradients(lambda v, t: ops.mi_mm_loss(v, t, margin=0.2, backend=backend), video, text))


@backends
def test_sms_of_unrelated_pairs_that_agree_somewhat_is_adaptive_mi_mm(backend):
    video, text, _ = batch()
    w = 0.1 + 0.9 * torch.rand(len(video), dtype=F64)
    ours = gradients(lambda v, t: ops.sms_loss(v, t, torch.diag(w), margin=0.4, backend=backend), video, text)
    same(ours, gradients(lambda v, t: ops.adaptive_mi_mm_loss(v, t, w, margin=0.4, backend=backend), video, text))


@backends
@pytest.mark.parametrize("rule", RULES)
def test_a_max_margin_loss_is_a_sum_over_batches_of_two(backend, rule):
    """A pair of pairs knows nothing of the others, so shards of the matrix add up."""
    video, text, c = batch(9)
    N = len(video)

    def loss(v, t):
        return ops.sms_loss(v, t, c, rule=rule, backend=backend) * (2 * N * (N - 1))

    def by_twos(v, t):
        return sum(
            4 * ops.sms_loss(v[two], t[two], c[two][:, two], rule=rule, backend=backend)
            for two in map(list, itertools.combinations(range(N), 2))
        )

    same(gradients(loss, video, text), gradients(by_twos, video, text))


@backends
@pytest.mark.parametrize("name", ["sms", "mi_mm", "ego_nce"])
def test_the_length_of_a_row_does_not_matter(backend, name):
    """The loss is that of unit rows; the gradient is orthogonal to its row and shrinks as the row grows."""
    video, text, c = batch()
    arguments = {"sms": (c,), "mi_mm": (), "ego_nce": (c > 0.9,)}[name]
    loss = lambda v, t: getattr(ops, f"{name}_loss")(v, t, *arguments, backend=backend)  # noqa: E731
    value, grad_video, grad_text = gradients(loss, video, text)
    length = torch.rand(len(video), 1, dtype=F64) * 10 + 0.1
    scaled = gradients(loss, video * length, text)
    same((scaled[0], scaled[1] * length, scaled[2]), (value, grad_video, grad_text))
    assert (grad_video * video).sum(1).abs().max() < 1e-14 and (grad_text * text).sum(1).abs().max() < 1e-14


@backends
def test_the_gradient_of_the_scale_is_euler_s(backend):
    """The logits are linear in the scale, in the videos and in the texts."""
    video, text, _ = batch()
    scale = torch.tensor(3.0, dtype=F64)
    _, grad_video, grad_text, grad_scale = gradients(lambda *x: ops.clip_loss(*x, backend=backend), video, text, scale)
    same([(grad_video * video).sum()] * 2, [(grad_text * text).sum(), scale * grad_scale], rtol=1e-11)


@backends
def test_shifting_all_logits_of_a_row_leaves_its_direction_alone(backend):
    """Whatever is added to all texts moves a video's logits alike: that direction's loss stays, its gradients sum to zero."""
    video, text, _ = batch()
    each = lambda v, t: ops.clip_loss(v, t, 1.0, backend=backend)  # noqa: E731
    x = video @ text.T
    of_videos = (x.logsumexp(1) - x.diag()).mean()
    moved = text + torch.randn(text.shape[1], dtype=F64)
    y = video @ moved.T
    torch.testing.assert_close(2 * each(video, moved) - (y.logsumexp(0) - y.diag()).mean(), of_videos, rtol=1e-12, atol=0)


@backends
@pytest.mark.parametrize("rule", ["paper", "charades"])
def test_the_rules_agree_where_they_say_the_same(backend, rule):
    """No equal labels and no difference of exactly eps; for Charades' no higher label either, which it leaves out."""
    video, text, _ = batch()
    N = len(video)
    c = torch.rand(N, N, dtype=F64) * (0.4 if rule == "charades" else 1.0)
    own = torch.full((N,), 0.5 if rule == "charades" else 0.45, dtype=F64)
    c += torch.where((own - c).abs() < 0.05, 0.1, 0.0)
    c -= torch.where((own - c).abs() < 0.05, 0.2, 0.0)
    run = lambda r: gradients(  # noqa: E731
        lambda v, t: ops.sms_loss(v, t, c, self_relevancy=own, rule=r, eps=0.04, backend=backend), video, text
    )
    same(run(rule), run("code"))


@backends
def test_charades_leaves_out_higher_labels_and_nothing_else(backend):
    video, text, c = batch()
    x = oracle.unit(text) @ oracle.unit(video).T
    N, w, above = len(x), c.diag(), 0
    for i, j in itertools.permutations(range(N), 2):
        for anchor in (i, j):
            d = float(w[anchor] - c[j, i])
            above += max(0.0, -(0.6 * d + float(x[i, j] - x[anchor, anchor]))) if d <= -0.1 else 0.0
    paper, charades = (ops.sms_loss(video, text, c, rule=r, backend=backend) for r in ("paper", "charades"))
    torch.testing.assert_close(paper - charades, torch.tensor(above / (2 * N * (N - 1)), dtype=F64), rtol=1e-11, atol=1e-14)
