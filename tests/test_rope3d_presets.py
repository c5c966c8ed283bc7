"""rope3d as the rotary embedding of published video models: each against that model's own formula in plain torch."""

import pytest
import torch

from evaat_fast import ops

GRID = (3, 4, 5)
CELLS = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"), -1).flatten(0, 2)  # [60, 3]: t, h, w


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.param


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=3e-6)


def ladder(channels, theta):
    return 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def interleaved(x, angles):
    """Each angle turns the pair of channels (2c, 2c + 1), as a complex number does."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_qwen2_vl(backend):
    """M-RoPE: one ladder over the head, cut into sections of 16, 24 and 24 pairs for t, h and w; half-split pairs. Text tokens
    count on all three axes at once, so every token has a position."""
    D, theta, sections = 128, 1e6, (16, 24, 24)
    text = torch.arange(4)[:, None].expand(4, 3)
    positions = torch.cat((text, CELLS + 4, text + 9))
    x = torch.randn(2, 4, len(positions), D)
    per_axis = positions.T.double()[:, :, None] * ladder(D, theta)  # [3, N, D/2]
    angles = torch.cat([per_axis[i].split(sections, -1)[i] for i in range(3)], -1)
    angles = torch.cat((angles, angles), -1)
    turned = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
    expected = x.double() * angles.cos() + turned.double() * angles.sin()
    freqs = ops.split_freqs(D, [2 * s for s in sections], theta=theta, restart=False)
    options = dict(freqs=freqs, prefix_tokens=0, interleaved=False, backend=backend)
    close(ops.rope3d(x, positions=positions, **options), expected)


def test_qwen2_5_vl(backend):
    """As Qwen2-VL, but time goes by absolute seconds: position t is seconds per frame times tokens per second."""
    D, theta, sections, pace = 128, 1e6, (16, 24, 24), 0.5 * 25
    positions = CELLS * torch.tensor([pace, 1.0, 1.0])
    x = torch.randn(1, 2, len(positions), D)
    angles = [positions[:, i, None].double() * ladder(D, theta).split(sections)[i] for i in range(3)]
    angles = torch.cat(angles, -1)
    a, b = x.double().chunk(2, -1)
    expected = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
    freqs = ops.split_freqs(D, [2 * s for s in sections], theta=theta, scale=(pace, 1, 1), restart=False)
    close(ops.rope3d(x, None, GRID, freqs=freqs, prefix_tokens=0, interleaved=False, backend=backend), expected)


def axial(dims, positions, theta):
    """The angles of t, h and w, each with a ladder of its own."""
    return torch.cat([positions[:, i, None].double() * ladder(d, theta) for i, d in enumerate(dims)], -1)


def test_cogvideox(backend):
    """A quarter of the channels for time, three eighths each for height and width; text first, not rotated; positions are cut
    out of the training resolution's grid and may be fractions."""
    D, dims, text = 64, (16, 24, 24), 7
    crop = CELLS.double() * torch.tensor([1.0, 30 / 4, 45 / 5]) + torch.tensor([0.0, 2.5, 0.0])
    x = torch.randn(2, 3, text + 60, D)
    expected = torch.cat((x[:, :, :text].double(), interleaved(x[:, :, text:], axial(dims, crop, 10000.0))), 2)
    positions = torch.cat((torch.zeros(text, 3), crop.float()))
    options = dict(freqs=ops.split_freqs(D, dims), prefix_tokens=text, backend=backend)
    close(ops.rope3d(x, positions=positions, **options), expected)


@pytest.mark.parametrize(
    "D,dims,theta",
    [
        pytest.param(128, (44, 42, 42), 10000.0, id="Wan 2.1"),  # D - 4 (D // 6), 2 (D // 6), 2 (D // 6)
        pytest.param(128, (16, 56, 56), 256.0, id="HunyuanVideo"),
    ],
)
def test_axial_video_diffusion(D, dims, theta, backend):
    x = torch.randn(1, 2, 60, D)
    freqs = ops.split_freqs(D, dims, theta=theta)
    ours = ops.rope3d(x, None, GRID, freqs=freqs, prefix_tokens=0, backend=backend)
    close(ours, interleaved(x, axial(dims, CELLS, theta)))


@pytest.mark.parametrize("D", [64, 80, 88])
def test_v_jepa_2_1(D, backend):
    """An equal, even share of the channels for each axis, the rest not rotated. Height and width may be scaled to the grid of
    pretraining."""
    share, scale = 2 * (D // 3 // 2), (1.0, 16 / 4, 16 / 5)
    x = torch.randn(1, 2, 60, D)
    turned = interleaved(x[..., : 3 * share], axial([share] * 3, CELLS * torch.tensor(scale), 10000.0))
    freqs = ops.split_freqs(D, [share] * 3, scale=scale)
    ours = ops.rope3d(x, None, GRID, freqs=freqs, prefix_tokens=0, backend=backend)
    close(ours, torch.cat((turned, x[..., 3 * share :].double()), -1))


def test_v_jepa_2_0_is_no_rotation():
    """Its frequencies are tiled where they should be repeated, so the two channels of a pair turn by different angles: lengths
    change, which nothing made of rotations can do. The released weights need that formula; rope3d does not pretend to it."""
    x = torch.randn(60, 20, dtype=torch.float64)
    angles = (CELLS[:, :1].double() * ladder(20, 10000.0)).repeat(1, 2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    published = x * angles.cos() + torch.stack((-b, a), -1).flatten(-2) * angles.sin()
    assert (published.norm(dim=-1) - x.norm(dim=-1)).abs().max() > 0.1
