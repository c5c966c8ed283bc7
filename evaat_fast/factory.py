"""A model together with what belongs to it: imported after model and data, so that neither needs the other."""

import os
from typing import Any

from evaat_fast.data.transforms import CentreCrop, RandomResizedCrop, eval_transform, train_transform
from evaat_fast.model import EVA02AT, create_model

__all__ = ["create_model_and_transforms"]


def create_model_and_transforms(
    name: str, num_frames: int | None = None, pretrained: str | os.PathLike[str] | None = None, **overrides: Any
) -> tuple[EVA02AT, RandomResizedCrop, CentreCrop]:
    """`create_model`, and how to crop clips for it.

    Args:
        name, num_frames, pretrained, overrides: as `evaat_fast.create_model`.

    Returns:
        (model, train_transform, eval_transform); the transforms take uint8 [T, H, W, 3] to uint8 [T, image_size,
        image_size, 3]. The model normalises inside.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `evaat_fast.create_model`.
    """
    model = create_model(name, num_frames, pretrained, **overrides)
    size = model.config.image_size
    return model, train_transform(size), eval_transform(size)
