"""The tricks do what their names say."""

import pytest
import torch
import torch.nn.functional as F

from evaat_fast.eval import tricks


def test_flip_mirrors_left_and_right():
    video = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).view(1, 2, 3, 4, 3)
    assert torch.equal(tricks.flip(video)[..., 0, :], video[..., 3, :])
    assert torch.equal(tricks.flip(tricks.flip(video)), video)


@pytest.mark.parametrize("height, width", [(4, 10), (10, 4), (5, 5)])
def test_crops_cover_the_longer_side(height, width):
    video = torch.rand(2, height, width, 3)
    views, side = tricks.crops(video), min(height, width)
    assert [tuple(view.shape) for view in views] == [(2, side, side, 3)] * 3
    assert torch.equal(views[0][:, 0, 0], video[:, 0, 0]) and torch.equal(views[-1][:, -1, -1], video[:, -1, -1])
    assert torch.equal(views[1], tricks.crops(video, 1)[0])
    with pytest.raises(ValueError, match="count: expected an integer from 1, got 0"):
        tricks.crops(video, 0)


def test_mean_view():
    views, scale = [torch.randn(4, 8), torch.randn(4, 8)], 3.0
    got = tricks.mean_view(lambda view: scale * view, views)
    torch.testing.assert_close(got, F.normalize(F.normalize(views[0], dim=1) + F.normalize(views[1], dim=1), dim=1))
    with pytest.raises(ValueError, match="at least one"):
        tricks.mean_view(lambda view: view, [])


def test_dual_softmax():
    sim = torch.rand(4, 6, dtype=torch.float64)
    prior = torch.exp(sim / 0.1) / torch.exp(sim / 0.1).sum(0)
    weighted = torch.exp(prior * sim)
    torch.testing.assert_close(tricks.dual_softmax(sim, 0.1), weighted / weighted.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        tricks.dual_softmax(sim, 0)


def test_ensemble():
    a, b = torch.rand(3, 2), torch.rand(3, 2)
    torch.testing.assert_close(tricks.ensemble([a, b]), (a + b) / 2)
    torch.testing.assert_close(tricks.ensemble([a, b], [3, 1]), 0.75 * a + 0.25 * b)
    for sims, weights in (([], None), ([a, b[:2]], None), ([a, b], [1]), ([a, b], [0, 0]), ([a, b], [-1, 2])):
        with pytest.raises(ValueError, match="sims|weights"):
            tricks.ensemble(sims, weights)
