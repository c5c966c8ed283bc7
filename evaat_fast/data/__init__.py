"""Video clips with their narrations: decoding, sampling, crops, EPIC-Kitchens-100, and a corpus made on the spot.

corpus = kitchen.generate("toy-kitchen")
train = EK100(corpus.annotations, corpus.videos, "train", num_frames=8, transform=train_transform(64))
"""

from typing import TYPE_CHECKING

from evaat_fast import _lazy

_LAZY = {
    "EK100": "ek100",
    "ClipDataset": "dataset",
    "ClipTable": "table",
    "train_transform": "transforms",
    "eval_transform": "transforms",
    "read_clip": "video",
}
_SUBMODULES = (
    "below",
    "cache",
    "check",
    "choices",
    "chunks",
    "corpora",
    "dataset",
    "decode",
    "ek100",
    "folder",
    "kinds",
    "kitchen",
    "kitchen_formats",
    "kitchen_layouts",
    "kitchen_render",
    "labels",
    "layout",
    "plain",
    "prepare",
    "prepare_videos",
    "readers",
    "table",
    "transforms",
    "video",
)

__all__ = [*_LAZY, *_SUBMODULES]


if TYPE_CHECKING:
    from evaat_fast.data import below as below
    from evaat_fast.data import cache as cache
    from evaat_fast.data import check as check
    from evaat_fast.data import choices as choices
    from evaat_fast.data import chunks as chunks
    from evaat_fast.data import corpora as corpora
    from evaat_fast.data import dataset as dataset
    from evaat_fast.data import decode as decode
    from evaat_fast.data import ek100 as ek100
    from evaat_fast.data import folder as folder
    from evaat_fast.data import kinds as kinds
    from evaat_fast.data import kitchen as kitchen
    from evaat_fast.data import kitchen_formats as kitchen_formats
    from evaat_fast.data import kitchen_layouts as kitchen_layouts
    from evaat_fast.data import kitchen_render as kitchen_render
    from evaat_fast.data import labels as labels
    from evaat_fast.data import layout as layout
    from evaat_fast.data import plain as plain
    from evaat_fast.data import prepare as prepare
    from evaat_fast.data import prepare_videos as prepare_videos
    from evaat_fast.data import readers as readers
    from evaat_fast.data import table as table
    from evaat_fast.data import transforms as transforms
    from evaat_fast.data import video as video
    from evaat_fast.data.dataset import ClipDataset as ClipDataset
    from evaat_fast.data.ek100 import EK100 as EK100
    from evaat_fast.data.table import ClipTable as ClipTable
    from evaat_fast.data.transforms import eval_transform as eval_transform
    from evaat_fast.data.transforms import train_transform as train_transform
    from evaat_fast.data.video import read_clip as read_clip
else:
    __getattr__, __dir__ = _lazy.attach(__name__, _LAZY, _SUBMODULES)
