"""Crops for clips: uint8 [T, H, W, 3] in, uint8 [T, S, S, 3] or of another shape out. One crop for all frames of a clip.

There is no flip: left and right are verbs. Normalisation is the model's business.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CentreCrop", "RandomResizedCrop", "eval_transform", "train_transform"]

Size = int | tuple[int, int]


class RandomResizedCrop:
    """A crop of random place, size and shape, resized: `crop(clip, generator=None)`.

    Args:
        image_size: S for squares or (height, width), pixels. scale: least and greatest share of the area. ratio: least and
            greatest width / height, times that of the image size.

    Randomness comes from the call's torch.Generator, or from torch's own without one.
    """

    def __init__(self, image_size: Size, scale: Sequence[float] = (0.5, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)):
        self.height, self.width = _sides(image_size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected a rising pair above 0 and at most 1, got {scale!r}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio: expected a rising pair above 0, got {ratio!r}")
        self.image_size, self.scale, self.ratio = image_size, tuple(scale), tuple(ratio)

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(clip)
        top, left, height, width = self.box(clip.shape[1], clip.shape[2], generator)
        return _resized(clip[:, top : top + height, left : left + width], self.height, self.width)

    def box(self, height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop: the first of ten tries that fits the frame, else the largest of
        the image's shape."""
        tries = torch.rand(10, 4, generator=generator, dtype=torch.float64, device="cpu").tolist()
        for share, shape, down, right in tries:
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = self.ratio[0] * math.exp(shape * math.log(self.ratio[1] / self.ratio[0]))
            ratio *= self.width / self.height
            h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        h = max(1, min(height, width * self.height // self.width))
        w = max(1, min(width, height * self.width // self.height))
        return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w

    def __repr__(self) -> str:
        return f"RandomResizedCrop({self.image_size}, scale={self.scale}, ratio={self.ratio})"


class CentreCrop:
    """The frame resized until it just covers the image, of S x S or (height, width), then its centre: `crop(clip)`."""

    def __init__(self, image_size: Size):
        self.height, self.width = _sides(image_size)
        self.image_size = image_size

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(clip)
        h, w, (_, H, W, _) = self.height, self.width, clip.shape
        own, side = (w, W) if w * H >= h * W else (h, H)  # what the frame is scaled by
        clip = _resized(clip, max(h, round(H * own / side)), max(w, round(W * own / side)))
        top, left = (clip.shape[1] - h) // 2, (clip.shape[2] - w) // 2
        return clip[:, top : top + h, left : left + w].contiguous()

    def __repr__(self) -> str:
        return f"CentreCrop({self.image_size})"


def train_transform(
    image_size: Size, scale: Sequence[float] = (0.5, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> RandomResizedCrop:
    """The training crop of AVION and its relatives: a `RandomResizedCrop`."""
    return RandomResizedCrop(image_size, scale, ratio)


def eval_transform(image_size: Size) -> CentreCrop:
    """The evaluation crop: a `CentreCrop`."""
    return CentreCrop(image_size)


def _resized(clip, height, width):
    """Bilinear, antialiased, uint8 throughout: [T, H, W, 3] is channels-last, for which torch has a fast kernel."""
    if tuple(clip.shape[1:3]) == (height, width):
        return clip.contiguous()
    frames = F.interpolate(clip.permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True)
    return frames.permute(0, 2, 3, 1).contiguous()


def _sides(image_size):
    """(height, width)."""
    sides = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"image_size: expected a positive int or (height, width), got {image_size!r}")
    return sides


def _check(clip):
    if not isinstance(clip, torch.Tensor) or clip.dtype != torch.uint8:
        got = clip.dtype if isinstance(clip, torch.Tensor) else type(clip).__name__
        raise TypeError(f"clip: expected a uint8 tensor, got {got}")
    if clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise ValueError(f"clip: expected the shape [T, H, W, 3] without a 0, got {list(clip.shape)}")
