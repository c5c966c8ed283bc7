"""The crops: sizes, one crop per clip, seeds, and that no pixel is moved where none should be."""

import pytest
import torch

from evaat_fast.data.transforms import eval_transform, train_transform


def ramp(frames=3, height=48, width=64):
    """A clip whose red is the column and whose green is the row, the same in every frame."""
    clip = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    clip[..., 0] = torch.arange(width)
    clip[..., 1] = torch.arange(height)[:, None]
    return clip


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (40, 40), (32, 97), (7, 5), (200, 3)])
def test_shape_and_dtype(make, height, width):
    clip = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
    out = make(32)(clip)
    assert out.shape == (2, 32, 32, 3) and out.dtype == torch.uint8 and out.is_contiguous()


def test_a_clip_gets_one_crop():
    out = train_transform(32)(ramp(frames=5))
    assert (out == out[:1]).all()


def test_the_seed_decides():
    crop, clip = train_transform(32), torch.randint(256, (2, 50, 60, 3), dtype=torch.uint8)
    first, again, other = (crop(clip, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("height, width", [(100, 100), (320, 568), (60, 100)])
def test_boxes_keep_to_scale_and_ratio(height, width):
    crop = train_transform(8, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    for seed in range(300):
        top, left, h, w = crop.box(height, width, torch.Generator().manual_seed(seed))
        assert 0 <= top <= height - h and 0 <= left <= width - w
        assert 0.19 <= h * w / (height * width) <= 0.51 and 0.48 <= w / h <= 2.1


def test_boxes_reach_every_border():
    crop = train_transform(8)
    boxes = [crop.box(40, 40, torch.Generator().manual_seed(s)) for s in range(300)]
    assert min(b[0] for b in boxes) == min(b[1] for b in boxes) == 0
    assert max(b[0] + b[2] for b in boxes) == max(b[1] + b[3] for b in boxes) == 40


def test_a_shape_that_no_box_fits_gets_a_square():
    top, left, h, w = train_transform(8, scale=(1.0, 1.0), ratio=(1.0, 1.0)).box(20, 90)
    assert (h, w, top) == (20, 20, 0) and 0 <= left <= 70


def test_the_crop_shows_the_box_and_is_not_mirrored():
    crop, clip = train_transform(32, scale=(0.3, 0.6)), ramp()
    top, left, h, w = crop.box(48, 64, torch.Generator().manual_seed(5))
    out = crop(clip, torch.Generator().manual_seed(5)).int()
    assert (out[0, :, 1:, 0] >= out[0, :, :-1, 0]).all() and (out[0, 1:, :, 1] >= out[0, :-1, :, 1]).all()
    assert abs(out[0, 0, 0, 0] - left) <= 1 and abs(out[0, 0, -1, 0] - (left + w - 1)) <= 1
    assert abs(out[0, 0, 0, 1] - top) <= 1 and abs(out[0, -1, 0, 1] - (top + h - 1)) <= 1


def test_the_centre_is_kept():
    out = eval_transform(48)(ramp())  # the height fits as it is; 8 columns go on either side
    assert torch.equal(out, ramp()[:, :, 8:56])


def test_resizing_is_that_of_float_within_a_level():
    clip = torch.randint(256, (2, 96, 96, 3), dtype=torch.uint8)
    frames = clip.permute(0, 3, 1, 2).double()
    exact = torch.nn.functional.interpolate(frames, (64, 64), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    assert (eval_transform(64)(clip).double() - exact).abs().max() <= 1


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize(
    "clip, error, message",
    [
        (torch.zeros(2, 8, 8, 3), TypeError, "clip: expected a uint8 tensor, got torch.float32"),
        ([1], TypeError, "clip: expected a uint8 tensor, got list"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"clip: expected the shape \[T, H, W, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, r"got \[2, 3, 8, 8\]"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), ValueError, r"got \[0, 8, 8, 3\]"),
    ],
)
def test_bad_clips(make, clip, error, message):
    with pytest.raises(error, match=message):
        make(8)(clip)


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (32, 97), (7, 5), (200, 3)])
def test_images_of_another_shape(make, height, width):
    clip = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
    assert make((32, 48))(clip).shape == (2, 32, 48, 3) and make([48, 32])(clip).shape == (2, 48, 32, 3)
    assert torch.equal(eval_transform((40, 40))(clip), eval_transform(40)(clip))


def test_the_centre_of_another_shape():
    """The frame just covers the image: nothing is lost along one side, and as much at both ends of the other."""
    assert torch.equal(eval_transform((24, 64))(ramp())[0], ramp()[0, 12:36])
    assert torch.equal(eval_transform((48, 32))(ramp())[0], ramp()[0, :, 16:48])
    half = eval_transform((24, 16))(ramp()).float()[0]
    assert half[:, 0, 0].mean() == pytest.approx(16, abs=1) and half[-1, :, 1].mean() == pytest.approx(47, abs=1)


def test_boxes_have_the_images_shape():
    for size, ratio in (((30, 60), 2.0), ((60, 30), 0.5)):
        crop = train_transform(size, scale=(0.2, 0.4))
        for seed in range(100):
            _, _, h, w = crop.box(240, 320, torch.Generator().manual_seed(seed))
            assert 0.74 * ratio <= w / h <= 1.36 * ratio
        assert train_transform(size, scale=(1.0, 1.0), ratio=(1.0, 1.0)).box(300, 300)[2:] == (
            (150, 300) if ratio > 1 else (300, 150)
        )


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "64", (64,), (64, 0), (64, 48, 3), (64.0, 48)])
@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_bad_sizes(make, size):
    with pytest.raises(ValueError, match="image_size: expected a positive int"):
        make(size)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"scale": (0.6, 0.5)}, "scale"),
        ({"scale": (0, 1)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"ratio": (2, 1)}, "ratio"),
    ],
)
def test_bad_ranges(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected a rising pair"):
        train_transform(8, **options)
