"""EPIC-Kitchens-100 multi-instance retrieval: clips, captions and their graded relevancy, from the official CSV files.

    train = EK100("annotations", "videos", "train", num_frames=4, transform=train_transform(224))
    train[0]       # dict(video, text, kind, text_kind, index, replaced)

Relevancy is 0.5 [same verb class] + 0.5 IoU(noun classes) (Damen et al., IJCV 2022), so it is computed from the classes
and no relevancy file is needed. Clips with one verb class and one set of noun classes are of one *kind*;
`relevancy_table` is over kinds.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from evaat_fast.data import video as videos
from evaat_fast.data.cache import ClipCache
from evaat_fast.data.ek100_files import Split, find_videos, read_captions, read_clips

_log = logging.getLogger("evaat_fast")

Positive = Literal["own", "relevant"]
Frames = Literal["ordered", "shuffled", "reversed", "frozen"]
SPLITS: tuple[Split, ...] = get_args(Split)
POSITIVES: tuple[Positive, ...] = get_args(Positive)
FRAMES: tuple[Frames, ...] = get_args(Frames)
_SLOTS = 256  # counters of replaced clips: one for the main process, one for each worker


def kinds_relevancy(kinds: Sequence[tuple[int, frozenset[int]]]) -> Tensor:
    """float32 [K, K]: relevancy between K kinds, pairs (verb class, set of noun classes); exactly 1 where equal."""
    if any(n < 0 for _, nouns in kinds for n in nouns):
        raise ValueError("kinds: expected noun classes from 0")
    verbs = torch.tensor([verb for verb, _ in kinds])
    width = 1 + max((n for _, nouns in kinds for n in nouns), default=0)
    hot = torch.zeros(len(kinds), width)
    for row, (_, nouns) in zip(hot, kinds, strict=True):
        row[list(nouns)] = 1
    common, size = hot @ hot.T, hot.sum(1)
    union = size[:, None] + size - common
    # Two clips without nouns name the same (empty) set.
    iou = torch.where(union == 0, 1.0, common / union.clamp(min=1))
    return iou.add_(verbs[:, None] == verbs).mul_(0.5)


class EK100(Dataset):
    """A split of EPIC-Kitchens-100, or of any corpus in its layout.

    Args:
        annotations: folder with EPIC_100_retrieval_{split}.csv and EPIC_100_retrieval_{split}_sentence.csv.
        video_root: folder with P01/P01_01.MP4, whole files, or folders of chunks {0,15,30,...}.MP4.
        split: "train" or "test".
        num_frames: T.
        transform: of a uint8 clip [T, H, W, 3], called as transform(clip, generator=...), as those of
            `evaat_fast.data.transforms`. None for the decoded size.
        training: draw frames at random within their segments; None: for the train split.
        sampler: "avion" or "lavila", see `evaat_fast.data.video.frame_ids`.
        positive: the text of a clip: "own", its narration, or "relevant", a caption drawn from those with a relevancy
            above `threshold` to the clip, each as likely, as the SMS loss's authors do.
        frames: "ordered", or a control: "shuffled" (an order for each clip that is not the true one), "reversed", or
            "frozen" (one frame, drawn for each clip, repeated). Controls are the same in every epoch.
        cache: "memory" keeps decoded frames of every clip after its first use: T frames for evaluation, 2 T in
            training, from which each segment draws one. T * H * W * 3 bytes (twice that) a clip; for small corpora.
        decoder: "decord" or "av".
        retries: how often a file that fails is read again.
        on_error: what then: "replace" takes the next clip that can be read, "raise" raises. None: replace in training,
            raise otherwise, for a metric would silently be of other clips.
        seed: with the epoch and the clip's number it decides crops, jitter and texts, whatever the number of workers.

    Attributes:
        clips: list of dict(id, participant, video, start, stop, text, verb, nouns). captions: list of str, what is
        retrieved. clip_kind, caption_kind: int64 [clips], [captions], rows of `relevancy_table`. kinds: list of
        (verb class, frozenset of noun classes).

    Raises:
        FileNotFoundError: a folder, an annotation file or a video is not there (the message counts and names).
        ValueError: a split, option or column that is not known, a row that cannot be read, an empty split.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        video_root: str | os.PathLike[str],
        split: Split,
        *,
        num_frames: int,
        transform: Callable[..., Tensor] | None = None,
        training: bool | None = None,
        sampler: videos.Sampler = "avion",
        positive: Positive = "own",
        threshold: float = 0.1,
        frames: Frames = "ordered",
        cache: Literal["memory"] | None = None,
        decoder: videos.Decoder = "decord",
        retries: int = 2,
        on_error: Literal["replace", "raise"] | None = None,
        seed: int = 0,
    ):
        self.training = split == "train" if training is None else training
        on_error = on_error or ("replace" if self.training else "raise")
        _choice("split", split, SPLITS)
        _choice("sampler", sampler, videos.SAMPLERS)
        _choice("positive", positive, POSITIVES)
        _choice("frames", frames, FRAMES)
        _choice("cache", cache, (None, "memory"))
        _choice("decoder", decoder, videos.DECODERS)
        _choice("on_error", on_error, ("replace", "raise"))
        videos.frame_ids(0, 1, num_frames)  # num_frames must be a positive int
        for name, value in (("retries", retries), ("seed", seed)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise ValueError(f"{name}: expected an int from 0, got {value!r}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: expected a function of a clip, got {transform!r}")
        self.split, self.num_frames, self.transform = split, num_frames, transform
        self.sampler, self.positive, self.threshold, self.frames = sampler, positive, threshold, frames
        self.decoder, self.retries, self.on_error, self.seed = decoder, retries, on_error, seed
        self.annotations, self.video_root = Path(annotations), Path(video_root)
        self.clips = read_clips(self.annotations, split)
        self._paths = find_videos(self.video_root, self.clips, split)
        kinds: dict[tuple[int, frozenset[int]], int] = {}
        self.clip_kind = torch.tensor([kinds.setdefault((c["verb"], c["nouns"]), len(kinds)) for c in self.clips])
        self.kinds = list(kinds)
        rows = read_captions(self.annotations, split, self.clips)
        self.captions = [self.clips[i]["text"] for i in rows]
        self.caption_kind = self.clip_kind[rows]
        self._kept = num_frames * (2 if self.training else 1)  # frames that the cache keeps of a clip
        self._cache = ClipCache(len(self), self._kept) if cache else None
        # Shared with workers: they hear of a new epoch, and their counts arrive here, one slot each, without a race.
        self._epoch = torch.full((), -1).share_memory_()
        self._replaced = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        self._unreadable: set[int] = set()

    @cached_property
    def relevancy_table(self) -> Tensor:
        """float32 [K, K]: the relevancy between kinds; exactly 1 where verb class and noun classes agree.

        A batch's labels are ops.IndexedRelevancy(data.relevancy_table, batch["kind"], batch["text_kind"]).
        """
        return kinds_relevancy(self.kinds)

    @property
    def frames(self) -> Frames:
        """What is shown of each clip; can be set."""
        return self._shown

    @frames.setter
    def frames(self, name: Frames) -> None:
        _choice("frames", name, FRAMES)
        self._shown = name

    @property
    def relevancy(self) -> Tensor:
        """float32 [clips, captions]: what the official metrics take."""
        return self.relevancy_table[self.clip_kind][:, self.caption_kind]

    @property
    def clip_verbs(self) -> Tensor:
        """int64 [clips]: verb class of each clip."""
        return torch.tensor([verb for verb, _ in self.kinds])[self.clip_kind]

    @property
    def caption_verbs(self) -> Tensor:
        """int64 [captions]: verb class of each caption."""
        return torch.tensor([verb for verb, _ in self.kinds])[self.caption_kind]

    @property
    def replaced(self) -> int:
        """How many items so far stood in for a clip that could not be read, here and in workers; each says so too."""
        return int(self._replaced.sum())

    def set_epoch(self, epoch: int) -> None:
        """From now on crops, jitter and texts are those of this epoch, in running workers too.

        Without it they come from torch's own generator.
        """
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """dict(video uint8 [T, H, W, 3], text, kind and text_kind (rows of relevancy_table), index, replaced).

        A replacement is the next readable clip, wholly so in training; otherwise all but its video stay as asked for.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected one of {len(self)} clips, got {index}")
        wanted = int(index) % len(self)
        generator = self._generator(wanted)
        shown, clip = self._readable(wanted, generator)
        if self.transform is not None:
            clip = self.transform(clip, generator=generator)
        index = shown if self.training else wanted
        text, text_kind = self._text(index, generator)
        return {
            "video": self._arrange(clip, wanted),
            "text": text,
            "kind": int(self.clip_kind[index]),
            "text_kind": text_kind,
            "index": index,
            "replaced": shown != wanted,
        }

    def _generator(self, index):
        epoch = int(self._epoch)
        if epoch < 0 and self.training:
            return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        state = np.random.SeedSequence((self.seed, max(epoch, 0), index)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def _readable(self, wanted, generator):
        """(number of the clip shown, its frames)."""
        error = None
        # A bounded walk: with ten unreadable clips in a row the corpus is broken, and that must stop the run.
        for step in range(min(10, len(self)) if self.on_error == "replace" else 1):
            index = (wanted + step) % len(self)
            if index in self._unreadable:
                continue
            try:
                clip = self._frames(index, generator)
            except videos.VideoError as failure:
                error = failure
                if self.on_error == "replace":
                    self._unreadable.add(index)
                    _log.warning("clip %s is replaced by the next one: %s", self.clips[index]["id"], error)
                continue
            if step:
                worker = get_worker_info()
                self._replaced[0 if worker is None else 1 + worker.id % (_SLOTS - 1)] += 1
            return index, clip
        name = f"clip {self.clips[wanted]['id']}"
        if self.on_error == "raise":
            raise videos.VideoError(f"{name}: {error} (tried {1 + self.retries} times)") from error
        raise videos.VideoError(f"{name} and the next {step} cannot be read" + (f": {error}" if error else "")) from error

    def _frames(self, index, generator):
        if self._cache is None:
            return self._decode(index, self.num_frames, self.training, generator)
        clip = self._cache.get(index)
        if clip is None:
            clip = self._decode(index, self._kept, False, None)
            self._cache.put(index, clip)
        elif not self.training:
            clip = clip.clone()  # an item is its receiver's to write to
        if self.training:  # one of the two frames of each segment
            draw = torch.randint(2, (self.num_frames,), generator=generator).numpy()
            # NumPy copies on this thread; torch would start all of its own for a few kilobytes.
            clip = torch.from_numpy(clip.numpy()[2 * np.arange(self.num_frames) + draw])
        return clip

    def _decode(self, index, count, jitter, generator):
        clip = self.clips[index]
        for attempt in range(1 + self.retries):
            try:
                return videos.read_clip(
                    self._paths[clip["video"]],
                    clip["start"],
                    clip["stop"],
                    count,
                    sampler=self.sampler,
                    jitter=jitter,
                    generator=generator,
                    decoder=self.decoder,
                )
            except videos.VideoError:
                if attempt == self.retries:
                    raise

    def _text(self, index, generator):
        kind = int(self.clip_kind[index])
        if self.positive == "own":
            return self.clips[index]["text"], kind
        relevant = (self.relevancy_table[kind][self.caption_kind] > self.threshold).nonzero()[:, 0]
        if len(relevant) == 0:
            return self.clips[index]["text"], kind
        chosen = int(relevant[torch.randint(len(relevant), (), generator=generator)])
        return self.captions[chosen], int(self.caption_kind[chosen])

    def _arrange(self, clip, index):
        T = len(clip)
        if self.frames == "ordered" or T < 2:
            return clip
        if self.frames == "reversed":
            return clip.flip(0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        if self.frames == "frozen":
            return clip[torch.randint(T, (1,), generator=generator).expand(T)]
        order = torch.randperm(T, generator=generator)
        return clip[order.roll(1) if torch.equal(order, torch.arange(T)) else order]


def _choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")
