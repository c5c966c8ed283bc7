"""Clips of a table with their captions: decoded, cropped, drawn anew each epoch, the same for any number of workers.

    data = ClipDataset(ClipTable.open("clips.arrow"), "videos", num_frames=4, transform=train_transform(224))
    data.set_epoch(0)
    data[0]       # dict(video, text, index, replaced)

Clips with labels are a subclass: `evaat_fast.data.labels.LabelledClips`, `EK100`.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from evaat_fast.data import decode, layout
from evaat_fast.data import video as videos
from evaat_fast.data.cache import ClipCache
from evaat_fast.data.choices import DECODERS, FRAMES, SAMPLERS, Decoder, Frames, Sampler, check_choice
from evaat_fast.data.table import ClipTable

_log = logging.getLogger("evaat_fast")

_SLOTS = 256  # counters: one for the main process, one for each worker
_TRIES = 20  # other clips that may take the place of one that cannot be read
_FEW = 16  # replacements say nothing of their share before there are so many


class ClipDataset(Dataset):
    """The clips of a table.

    Args:
        table: a ClipTable. video_root: the folder of its videos, in any layout that `evaat_fast.data.layout` knows.
        num_frames: T.
        transform: of a uint8 clip [T, H, W, 3], called as transform(clip, generator=...), as those of
            `evaat_fast.data.transforms`. None for the decoded size.
        training: draw one of several captions, and by default frames at random within their segments; else the first, and
            the middle. jitter: whether frames are drawn so; None: in training.
        sampler: "avion" or "lavila", see `evaat_fast.data.video.frame_ids`.
        frames: "ordered", or a control: "shuffled" (an order for each clip that is not the true one), "reversed", or
            "frozen" (one frame, drawn for each clip, repeated). Controls are the same in every epoch.
        cache: "memory" keeps decoded frames of every clip after its first use: T frames for evaluation, 2 T in
            training, from which each segment draws one. T * H * W * 3 bytes (twice that) a clip; for small corpora.
        decoder: one of DECODERS; "auto" is the first that can be used here.
        sums: a folder of the videos' checksums, see `evaat_fast.data.decode.sums`: a file that is another is one that cannot be
            read. None: nothing is held to them.
        retries: how often a file that fails is read again.
        on_error: what then: "replace" takes a clip of another video, drawn from the seed, the epoch and the clip's number,
            "raise" raises. None: replace in training, raise otherwise, for a metric would silently be of other clips.
        max_broken: a larger share of replaced items than this stops the run, once there are 16.
        missing: videos that are not there "raise" at once, or are "broken" like those that cannot be read.
        seed: with the epoch and the clip's number it decides crops, jitter and texts, whatever the number of workers.

    Attributes:
        table: the ClipTable. sources: {video: where its files lie}, without those that are missing. cut: whether each clip
        is a file of its own; sources are then by the clips' ids.
        clip_kind: int64 [clips], clips of one kind are equal in their labels, or None where there are no labels.

    Raises:
        FileNotFoundError: a folder or a video is not there (the message counts and names), or no checksums.
        ValueError: an option that is not known or out of range, an empty table.
    """

    clip_kind: Tensor | None = None

    def __init__(
        self,
        table: ClipTable,
        video_root: str | os.PathLike[str],
        *,
        num_frames: int,
        transform: Callable[..., Tensor] | None = None,
        training: bool = True,
        jitter: bool | None = None,
        sampler: Sampler = "avion",
        frames: Frames = "ordered",
        cache: Literal["memory"] | None = None,
        decoder: Decoder = "auto",
        sums: str | os.PathLike[str] | None = None,
        retries: int = 2,
        on_error: Literal["replace", "raise"] | None = None,
        max_broken: float = 0.01,
        missing: Literal["raise", "broken"] = "raise",
        seed: int = 0,
    ):
        on_error = on_error or ("replace" if training else "raise")
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("cache", cache, (None, "memory"))
        check_choice("decoder", decoder, DECODERS)
        check_choice("on_error", on_error, ("replace", "raise"))
        check_choice("missing", missing, ("raise", "broken"))
        videos.frame_ids(0, 1, num_frames)  # num_frames must be a positive int
        for name, value in (("retries", retries), ("seed", seed)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise ValueError(f"{name}: expected an int from 0, got {value!r}")
        if not 0 <= max_broken <= 1:
            raise ValueError(f"max_broken: expected a share from 0 to 1, got {max_broken!r}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: expected a function of a clip, got {transform!r}")
        if len(table) == 0:
            raise ValueError(f"table: no clips in {table!r}")
        self.table, self.video_root, self.training = table, Path(video_root), training
        self.num_frames, self.transform, self.sampler, self.frames = num_frames, transform, sampler, frames
        self.decoder, self.retries, self.on_error, self.seed = decoder, retries, on_error, seed
        self.max_broken, self.jitter = max_broken, training if jitter is None else jitter
        self.sums = None if sums is None else decode.Sums(sums, self.video_root)
        decode.reader_of(decoder)  # an ImportError now, not in a worker
        self.cut, self.sources = self._found("raise" if missing == "raise" else "skip")
        self._kept = num_frames * (2 if self.jitter else 1)  # frames that the cache keeps of a clip
        self._cache = ClipCache(len(self), self._kept) if cache else None
        # Shared with workers: they hear of a new epoch, and their counts arrive here, one slot each, without a race.
        self._epoch = torch.full((), -1).share_memory_()
        self._counts = torch.zeros(2, _SLOTS, dtype=torch.int64).share_memory_()  # items, and replaced ones
        self._unreadable: dict[int, videos.VideoError] = {}
        self._last: tuple[int, tuple[str, ...]] = (-1, ())
        self._said: set[str] = set()  # videos of which a damaged clip was reported: one file may have hundreds

    def source(self, index: int) -> layout.Source | None:
        """Where the files of a clip lie; None where they are missing."""
        return self.sources.get(self.table.id(index) if self.cut else self.table.video(index))

    @property
    def relevancy_table(self) -> Tensor | None:
        """float32 [K, K]: the relevancy between kinds, or None where there are no labels."""
        return None

    @property
    def frames(self) -> Frames:
        """What is shown of each clip; can be set."""
        return self._shown

    @frames.setter
    def frames(self, name: Frames) -> None:
        check_choice("frames", name, FRAMES)
        self._shown = name

    @property
    def replaced(self) -> int:
        """How many items so far stood in for a clip that could not be read, here and in workers; each says so too."""
        return int(self._counts[1].sum())

    def set_epoch(self, epoch: int) -> None:
        """From now on crops, jitter and texts are those of this epoch, in running workers too.

        Without it they come from torch's own generator.
        """
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """dict(video uint8 [T, H, W, 3], text, index, replaced), and what a subclass's `caption` adds.

        What is replaced is another clip in all of them, `index` included.
        """
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index: expected one of {count} clips, got {index}")
        wanted = int(index) % count
        generator = self._generator(wanted)
        index, clip = self._readable(wanted, generator)
        if self.transform is not None:
            clip = self.transform(clip, generator=generator)
        labels = self.caption(index, generator)
        return {"video": self._arrange(clip, index), **labels, "index": index, "replaced": index != wanted}

    def caption(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """dict(text): the clip's caption, in training one of them drawn by `generator`. Subclasses add labels."""
        texts = self._captions(index)
        if len(texts) < 2 or not self.training:
            return {"text": texts[0] if texts else ""}  # without one only in evaluation, of classes say
        return {"text": texts[int(torch.randint(len(texts), (), generator=generator))]}

    def caption_kinds(self) -> Tensor:
        """int64 [clips]: the number of each clip's first caption, equal for equal ones. For corpora without labels. Of clips
        without one it is any."""
        import pyarrow.compute as pc

        texts = self.table.arrow.column("texts").combine_chunks()
        if not len(texts.values):
            return torch.zeros(len(texts), dtype=torch.int64)
        ends = texts.offsets.to_numpy()
        first = pc.take(texts.values, np.minimum(ends[:-1], len(texts.values) - 1))
        return torch.from_numpy(first.dictionary_encode().indices.to_numpy().astype(np.int64))

    def _found(self, missing: Literal["raise", "skip"]) -> tuple[bool, dict[str, layout.Source]]:
        names = self.table.videos()
        found = layout.find(self.video_root, names, "skip")
        if not found:
            ids, of_row, starts = (self.table.column(name).tolist() for name in ("id", "video", "start"))
            if cut := layout.find_clips(self.video_root, ids, of_row, starts, missing):
                return True, cut
        if missing == "raise" and len(found) < len(names):
            found = layout.find(self.video_root, names)  # which says what is missing
        return False, found

    def _generator(self, index):
        epoch = int(self._epoch)
        if epoch < 0 and self.training:
            return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return torch.Generator().manual_seed(self._draw(epoch, index) >> 1)

    def _draw(self, epoch, *numbers):
        """64 bits that (seed, epoch, numbers) decide."""
        words = np.array((self.seed, max(epoch, 0), *numbers), np.uint32)  # of a tuple the same, in twice the time
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])

    def _readable(self, wanted, generator):
        """(number of the clip shown, its frames)."""
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % (_SLOTS - 1)
        counts = self._counts.numpy()  # adds in a tenth of the time that torch takes
        counts[0, slot] += 1
        clip, first = self._tried(wanted, generator)
        if clip is not None:
            return wanted, clip
        if self.on_error == "raise":
            raise first
        broken = {self.table.video(wanted)}
        rng = np.random.default_rng(self._draw(int(self._epoch), wanted, 1))
        for index in rng.integers(len(self), size=_TRIES).tolist():
            # One damaged file has hundreds of clips, neighbours in the table.
            if self.table.video(index) in broken and len(self.sources) > len(broken):
                continue
            clip, _ = self._tried(index, generator)
            if clip is None:
                broken.add(self.table.video(index))
                continue
            counts[1, slot] += 1
            self._stop_if_many(first)
            return index, clip
        raise videos.VideoError(f"{first}; nor could {_TRIES} others, drawn from {len(self)} clips, take its place")

    def _stop_if_many(self, error):
        items, replaced = self._counts.sum(1).tolist()
        if replaced >= _FEW and replaced > self.max_broken * items:
            raise videos.VideoError(
                f"{replaced} of {items} clips could not be read, more than max_broken = {self.max_broken:g} allows; "
                f"the last: {error}"
            )

    def _tried(self, index, generator):
        """(frames, None), or (None, a VideoError)."""
        if index in self._unreadable:
            return None, self._unreadable[index]
        try:
            if self.training and not self._captions(index):
                raise videos.VideoError("it has no caption")
            return self._frames(index, generator), None
        except videos.VideoError as failure:
            error = type(failure)(f"clip {self.table.id(index)}: {failure}")
        if self.on_error == "replace":
            self._unreadable[index] = error
            if self.table.video(index) not in self._said:
                self._said.add(self.table.video(index))
                _log.warning("replaced, as other clips of this video may be: %s", error)
        return None, error

    def _captions(self, index):
        """`captions` of a clip, which an item asks for twice."""
        last = self._last
        if last[0] != index:
            last = self._last = index, captions(self.table, index)  # at once: threads share it
        return last[1]

    def _frames(self, index, generator):
        if self._cache is None:
            return self._decode(index, self.num_frames, self.jitter, generator)
        clip = self._cache.get(index)
        if clip is None:
            clip = self._decode(index, self._kept, False, None)
            self._cache.put(index, clip)
        elif not self.jitter:
            clip = clip.clone()  # an item is its receiver's to write to
        if self.jitter:  # one of the two frames of each segment
            draw = torch.randint(2, (self.num_frames,), generator=generator).numpy()
            # NumPy copies on this thread; torch would start all of its own for a few kilobytes.
            clip = torch.from_numpy(clip.numpy()[2 * np.arange(self.num_frames) + draw])
        return clip

    def _decode(self, index, count, jitter, generator):
        source = self.source(index)
        if source is None:
            raise videos.VideoError(f"the video {self.table.video(index)!r} is missing in {self.video_root}")
        start, stop = self.table.start(index), self.table.stop(index)
        if impossible(start, stop):
            raise videos.OutsideError(f"its times, {start:g} to {stop:g} s, are of no part of a video")
        drawn = None if generator is None else generator.get_state()
        for attempt in range(1 + self.retries):
            try:
                return videos.read_clip(
                    source,
                    start,
                    stop,
                    count,
                    sampler=self.sampler,
                    jitter=jitter,
                    generator=generator,
                    decoder=self.decoder,
                    sums=self.sums,
                )
            except videos.VideoError as error:
                if drawn is not None:  # what comes next draws what it would have drawn, had nothing failed
                    generator.set_state(drawn)
                if isinstance(error, videos.OutsideError):
                    raise  # reading again would not move the clip
                if attempt == self.retries:
                    raise videos.VideoError(f"{error} (tried {1 + self.retries} times)") from error

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


def captions(table: ClipTable, row: int) -> tuple[str, ...]:
    """The captions of a clip that say something."""
    texts = table.texts(row)
    return texts if all(map(str.strip, texts)) else tuple(filter(str.strip, texts))


def impossible(start: Any, stop: Any) -> Any:
    """Whether times are neither a span of seconds from 0 on nor both NaN, all of a video: of numbers or of arrays."""
    span = (start >= 0) & (stop >= start) & np.isfinite(stop)
    return ~np.asarray(span | (np.isnan(start) & np.isnan(stop)))
