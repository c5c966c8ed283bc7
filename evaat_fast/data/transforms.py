"""Crops for clips: uint8 [T, H, W, 3] in, uint8 [T, S, S, 3] out. One crop for all frames of a clip.

There is no flip: left and right are verbs. Normalisation is the model's business.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CentreCrop", "RandomResizedCrop", "eval_transform", "train_transform"]


class RandomResizedCrop:
    """A crop of random place, size and shape, resized to a square: `crop(clip, generator=None)`.

    Args:
        image_size: S, pixels. scale: least and greatest share of the area. ratio: least and greatest width / height.

    Randomness comes from the call's torch.Generator, or from torch's own without one.
    """

    def __init__(self, image_size: int, scale: Sequence[float] = (0.5, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)):
        _check_size(image_size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected a rising pair above 0 and at most 1, got {scale!r}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio: expected a rising pair above 0, got {ratio!r}")
        self.image_size, self.scale, self.ratio = image_size, tuple(scale), tuple(ratio)

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(clip)
        top, left, height, width = self.box(clip.shape[1], clip.shape[2], generator)
        return _resized(clip[:, top : top + height, left : left + width], self.image_size, self.image_size)

    def box(self, height: int, width: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop: the first of ten tries that fits the frame, else its largest square."""
        tries = torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist()
        for share, shape, down, right in tries:
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = self.ratio[0] * math.exp(shape * math.log(self.ratio[1] / self.ratio[0]))
            h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
        side = min(height, width)
        return int(down * (height - side + 1)), int(right * (width - side + 1)), side, side

    def __repr__(self) -> str:
        return f"RandomResizedCrop({self.image_size}, scale={self.scale}, ratio={self.ratio})"


class CentreCrop:
    """The shorter side resized to S, then the central square: `crop(clip)`."""

    def __init__(self, image_size: int):
        _check_size(image_size)
        self.image_size = image_size

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(clip)
        S, (_, H, W, _) = self.image_size, clip.shape
        clip = _resized(clip, max(S, round(H * S / min(H, W))), max(S, round(W * S / min(H, W))))
        top, left = (clip.shape[1] - S) // 2, (clip.shape[2] - S) // 2
        return clip[:, top : top + S, left : left + S].contiguous()

    def __repr__(self) -> str:
        return f"CentreCrop({self.image_size})"


def train_transform(
    image_size: int, scale: Sequence[float] = (0.5, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> RandomResizedCrop:
    """The training crop of AVION and its relatives: a `RandomResizedCrop`."""
    return RandomResizedCrop(image_size, scale, ratio)


def eval_transform(image_size: int) -> CentreCrop:
    """The evaluation crop: a `CentreCrop`."""
    return CentreCrop(image_size)


def _resized(clip, height, width):
    """Bilinear, antialiased, uint8 throughout: [T, H, W, 3] is channels-last, for which torch has a fast kernel."""
    if tuple(clip.shape[1:3]) == (height, width):
        return clip.contiguous()
    frames = F.interpolate(clip.permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True)
    return frames.permute(0, 2, 3, 1).contiguous()


def _check_size(image_size):
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise ValueError(f"image_size: expected a positive int, got {image_size!r}")


def _check(clip):
    if not isinstance(clip, torch.Tensor) or clip.dtype != torch.uint8:
        got = clip.dtype if isinstance(clip, torch.Tensor) else type(clip).__name__
        raise TypeError(f"clip: expected a uint8 tensor, got {got}")
    if clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise ValueError(f"clip: expected the shape [T, H, W, 3] without a 0, got {list(clip.shape)}")
