"""The data set: relevancy, items, seeds, workers, controls, the cache, and what becomes of broken files."""

import logging
import shutil

import pytest
import torch
from corpus import corpus
from torch.utils.data import DataLoader

from evaat_fast.data import EK100, eval_transform, train_transform, video

pytest.importorskip("av")
pytest.importorskip("decord")


def make(split="test", where=None, **options):
    where = where or corpus()
    return EK100(where.annotations, where.videos, split, **{"num_frames": 4, **options})


def by_definition(one, other):
    union = set(one.nouns) | set(other.nouns)
    iou = len(set(one.nouns) & set(other.nouns)) / len(union) if union else 1.0
    return 0.5 * (one.verbs == other.verbs) + 0.5 * iou


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(corpus().root, tmp_path / "copy")
    return type(corpus())(tmp_path / "copy", tmp_path / "copy" / "annotations", tmp_path / "copy" / "videos")


@pytest.mark.parametrize("split", ["train", "test"])
def test_relevancy_is_its_definition(split):
    data = make(split)
    first = {}
    for clip in data.clips:
        first.setdefault(clip.texts[0], clip)
    expected = torch.tensor([[by_definition(c, first[t]) for t in data.captions] for c in data.clips])
    assert data.relevancy.dtype == torch.float32
    torch.testing.assert_close(data.relevancy, expected, rtol=1e-6, atol=0)
    same = torch.tensor([[c.texts[0] == t for t in data.captions] for c in data.clips])
    assert ((data.relevancy == 1) == same).all()  # a caption here names its classes, so 1 means the same words
    assert set((6 * data.relevancy).round().int().unique().tolist()) <= {0, 1, 3, 4, 6}


def test_empty_noun_sets_agree(copy):
    path = copy.annotations / "EPIC_100_retrieval_test.csv"
    lines = path.read_text().splitlines()
    emptied = [line[: line.index(',"[')] + ",[],[]" if i in (1, 2) else line for i, line in enumerate(lines)]
    path.write_text("\n".join(emptied) + "\n")
    data = make(where=copy)
    assert data.clips[0].nouns == ()
    kinds = data.clip_kind[:3]
    table = data.relevancy_table[kinds][:, kinds]
    assert table[0, 1] == (1.0 if data.clips[0].verbs == data.clips[1].verbs else 0.5)
    assert table[0, 2] == 0.5 * (data.clips[0].verbs == data.clips[2].verbs)


def test_items():
    data = make(transform=eval_transform(32))
    item = data[3]
    assert item["video"].shape == (4, 32, 32, 3) and item["video"].dtype == torch.uint8
    assert item["text"] == data.clips[3].texts[0] and item["index"] == 3 and item["replaced"] is False
    assert data.relevancy_table[item["kind"], item["text_kind"]] == 1
    assert torch.equal(data[-1]["video"], data[len(data) - 1]["video"])
    assert len(data) == 16 and data.clip_verbs.tolist() == [c.verbs[0] for c in data.clips]
    assert torch.equal(data.caption_verbs, data.clip_verbs[data.relevancy.argmax(0)])
    with pytest.raises(IndexError, match="index: expected one of 16 clips, got 16"):
        data[16]


def test_a_batch_labels_a_loss():
    from evaat_fast import ops

    data = make("train", transform=train_transform(16), positive="relevant", seed=1)
    data.set_epoch(0)
    batch = next(iter(DataLoader(data, batch_size=6)))
    labels = ops.IndexedRelevancy(data.relevancy_table, batch["kind"], batch["text_kind"])
    dense = data.relevancy_table[batch["kind"]][:, batch["text_kind"]]
    features = torch.randn(2, 6, 8)
    torch.testing.assert_close(ops.sms_loss(*features, labels), ops.sms_loss(*features, dense))


def test_evaluation_is_the_same_each_time():
    one, other = make(transform=eval_transform(32)), make(transform=eval_transform(32))
    assert all(torch.equal(one[i]["video"], other[i]["video"]) for i in (0, 7, 15))


def test_seed_and_epoch_decide_a_training_item():
    def draw(seed, epoch, index=5):
        data = make("train", transform=train_transform(32), positive="relevant", seed=seed)
        data.set_epoch(epoch)
        return data[index]

    first, again = draw(1, 2), draw(1, 2)
    assert torch.equal(first["video"], again["video"]) and first["text"] == again["text"]
    assert not torch.equal(first["video"], draw(1, 3)["video"])
    assert not torch.equal(first["video"], draw(2, 2)["video"])


def test_without_an_epoch_torchs_seed_decides():
    data = make("train", transform=train_transform(32))
    torch.manual_seed(7)
    first, second = data[0]["video"], data[0]["video"]
    torch.manual_seed(7)
    assert torch.equal(first, data[0]["video"]) and not torch.equal(first, second)


@pytest.mark.parametrize("cache", [None, "memory"])
def test_workers_change_nothing_and_hear_of_epochs(cache):
    data = make("train", transform=train_transform(24), cache=cache)
    loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in (0, 1):
        data.set_epoch(epoch)
        seen = torch.cat([batch["video"] for batch in loader])
        assert torch.equal(seen, torch.stack([data[i]["video"] for i in range(len(data))]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_cache_shows_what_was_decoded(split, monkeypatch):
    data = make(split, cache="memory")
    first = data[2]["video"]
    monkeypatch.setattr(video, "read_clip", lambda *a, **k: pytest.fail("decoded twice"))
    again = data[2]["video"]
    assert torch.equal(first, again) or split == "train"
    again.fill_(0)  # an item is the caller's to write to
    assert data[2]["video"].any()


def test_training_draws_from_the_cached_frames():
    data = make("train", cache="memory")
    shown = torch.stack([data[0]["video"] for _ in range(40)])
    kept = data._cache.get(0)
    assert len(kept) == 8
    for segment in range(4):
        pair = kept[2 * segment : 2 * segment + 2]
        assert all((pair == frame).flatten(1).all(1).any() for frame in shown[:, segment])


def test_clips_of_another_size_are_not_cached():
    from evaat_fast.data.cache import ClipCache

    cache = ClipCache(2, 1)
    cache.put(0, torch.full((1, 4, 4, 3), 7, dtype=torch.uint8))
    cache.put(1, torch.full((1, 5, 4, 3), 7, dtype=torch.uint8))
    assert (cache.get(0) == 7).all() and cache.get(1) is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_positives(split):
    own, relevant = make(split), make(split, positive="relevant", threshold=0.4)
    texts = set()
    for epoch in range(12):
        relevant.set_epoch(epoch)
        item = relevant[1]
        assert relevant.relevancy_table[item["kind"], item["text_kind"]] > 0.4
        assert relevant.captions[relevant.caption_kind.tolist().index(item["text_kind"])] == item["text"]
        texts.add(item["text"])
    assert own[1]["text"] == own.clips[1].texts[0] and len(texts) > 1
    none = make(split, positive="relevant", threshold=1.0)
    assert none[1]["text"] == none.clips[1].texts[0]


def test_controls():
    shown = {name: [make(frames=name)[i]["video"] for i in range(6)] for name in ("ordered", "shuffled", "reversed", "frozen")}
    again = make(frames="shuffled")
    again.set_epoch(3)
    for i, clip in enumerate(shown["ordered"]):
        assert torch.equal(shown["reversed"][i], clip.flip(0))
        assert (shown["frozen"][i] == shown["frozen"][i][:1]).all()
        assert (shown["frozen"][i][0] == clip).flatten(1).all(1).any()
        assert sorted(f.sum().item() for f in shown["shuffled"][i]) == sorted(f.sum().item() for f in clip)
        assert not torch.equal(shown["shuffled"][i], clip)
        assert torch.equal(shown["shuffled"][i], again[i]["video"])
    assert make(frames="shuffled", num_frames=1)[0]["video"].shape[0] == 1


def test_a_clip_across_two_chunks_gets_one_crop():
    data = make("train", num_frames=8)
    across = next(i for i, c in enumerate(data.clips) if c.start // 15 != c.stop // 15)
    sizes = []

    def spy(clip, generator):
        sizes.append(len(clip))
        return clip

    data.transform = spy
    assert data[across]["video"].shape[0] == 8 and sizes == [8]


def break_first_chunk(where, split):
    """Truncates the first chunk of the split's first video; returns how many clips touch it."""
    clips = make(split, where).clips
    path = where.videos / f"{clips[0].video}.MP4" / "0.MP4"
    path.write_bytes(path.read_bytes()[:1000])
    return sum(c.video == clips[0].video and c.start < 15 for c in clips)


def test_broken_files_are_replaced_in_training(copy, caplog, monkeypatch):
    break_first_chunk(copy, "train")
    data = make("train", copy, retries=1)
    tries = []
    read = video.read_clip
    monkeypatch.setattr(video, "read_clip", lambda path, start, *a, **k: (tries.append(start), read(path, start, *a, **k))[1])
    last = max(i for i, c in enumerate(data.clips) if c.start < 14)
    data.set_epoch(0)
    with caplog.at_level(logging.WARNING, "evaat_fast"):
        item = data[last]
    assert item["replaced"] and item["index"] > last and item["text"] == data.clips[item["index"]].texts[0]
    assert data.replaced == 1
    assert tries.count(data.clips[last].start) == 2  # the first try and one retry
    assert f"may be: clip {data.clips[last].id}: " in caplog.text and "0.MP4" in caplog.text and "tried 2 times" in caplog.text
    again = data[last]
    assert data.replaced == 2 and again["index"] == item["index"] and torch.equal(again["video"], item["video"])
    assert tries.count(data.clips[last].start) == 2  # known to be broken: not tried, nor logged, again
    other = make("train", copy, retries=0)  # which has tried no clip yet
    other.set_epoch(0)
    assert other[last]["index"] == item["index"] and torch.equal(other[last]["video"], item["video"])
    drawn = set()
    for epoch in range(1, 8):
        other.set_epoch(epoch)
        drawn.add(other[last]["index"])
    assert len(drawn) > 1


@pytest.mark.parametrize("failures", [1, 9])
def test_a_failure_draws_nothing(failures, monkeypatch):
    """A clip that was read at the second try is cropped as at the first, and what takes the place of a broken one is the same
    whether the process that reads it knows of the damage yet or not."""
    read, left = video.read_clip, 0

    def flaky(path, start, *args, **options):
        nonlocal left
        frames = read(path, start, *args, **options)  # draws
        if start == data.clips[3].start and left:
            left -= 1
            raise video.VideoError("a picture is damaged")
        return frames

    monkeypatch.setattr(video, "read_clip", flaky)
    data = make("train", corpus(), transform=train_transform(16), retries=1, max_broken=1.0)
    data.set_epoch(2)
    whole = data[3]
    left = failures
    first, second = data[3], data[3]
    assert first["replaced"] == (failures > 1) and first["index"] == second["index"]
    assert torch.equal(first["video"], (whole if failures == 1 else second)["video"])


def test_too_many_replacements_stop_training(copy):
    broken = break_first_chunk(copy, "train")
    data = make("train", copy, retries=0)
    with pytest.raises(video.VideoError, match=r"16 of \d+ clips could not be read, more than max_broken = 0.01 .*0.MP4"):
        for _ in range(3):
            [data[i] for i in range(len(data))]
    patient = make("train", copy, retries=0, max_broken=1.0)
    for _ in range(3):
        [patient[i] for i in range(len(patient))]
    assert patient.replaced == 3 * broken > 16


def test_replacements_in_workers_are_counted(copy):
    break_first_chunk(copy, "train")
    data = make("train", copy, transform=train_transform(16), retries=0)
    last = max(i for i, c in enumerate(data.clips) if c.start < 14)
    subset = torch.utils.data.Subset(data, range(last - 3, last + 10))
    flags = [b["replaced"] for b in DataLoader(subset, batch_size=4, num_workers=2, multiprocessing_context="fork")]
    assert data.replaced == torch.cat(flags).sum() >= 4


def test_broken_files_stop_an_evaluation_unless_told_otherwise(copy):
    break_first_chunk(copy, "test")
    data = make("test", copy)
    with pytest.raises(video.VideoError, match=rf"clip {data.clips[0].id}: .*0.MP4.*tried 3 times"):
        data[0]
    data = make("test", copy, on_error="replace")
    last = max(i for i, c in enumerate(data.clips) if c.start < 14)
    item = data[last]
    assert item["replaced"] and item["index"] != last and item["text"] == data.clips[item["index"]].texts[0]


@pytest.mark.parametrize("name", ["split", "sampler", "positive", "frames", "cache", "decoder", "on_error"])
def test_unknown_options(name):
    options = {"where": corpus(), name: "nonsense"}
    with pytest.raises(ValueError, match=f"{name}: expected one of .*, got 'nonsense'"):
        make(**options)


def test_bad_num_frames():
    with pytest.raises(ValueError, match="num_frames: expected a positive int, got 0"):
        make(num_frames=0)


def test_missing_folders_and_files(copy):
    with pytest.raises(FileNotFoundError, match="annotations: there is no folder '/nowhere'"):
        EK100("/nowhere", copy.videos, "test", num_frames=4)
    with pytest.raises(FileNotFoundError, match="videos: there is no folder '/nowhere'"):
        EK100(copy.annotations, "/nowhere", "test", num_frames=4)
    shutil.rmtree(copy.videos / "P02")
    with pytest.raises(FileNotFoundError, match="videos: 1 of 1 videos are not in .*: P02/P02_00"):
        make(where=copy)
    (copy.annotations / "EPIC_100_retrieval_train_sentence.csv").unlink()
    with pytest.raises(FileNotFoundError, match="annotations: there is no file .*train_sentence.csv"):
        make("train", copy)


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("", "start_timestamp", "begin", r"test.csv: expected the columns .*; missing: start_timestamp"),
        ("", "00:00:00.07", "soon", r"test.csv: line 2 cannot be read"),
        (
            "",
            "00:00:00.07",
            "00:01:00.07",
            r"line 2 cannot be read: stop_timestamp .* lies before start_timestamp 00:01:00.07",
        ),
        (
            "_sentence",
            "P02_00_0,",
            "P99_00_0,",
            r"test_sentence.csv: 1 narration ids are not in the clips' file, first 'P99_00_0'",
        ),
        ("_sentence", "narration_id", "id", r"test_sentence.csv: expected the columns narration_id"),
    ],
    ids=["column", "time", "order", "sentence", "sentence-column"],
)
def test_bad_annotations(copy, name, old, new, message):
    path = copy.annotations / f"EPIC_100_retrieval_test{name}.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        make(where=copy)


@pytest.mark.parametrize("name", ["", "_sentence"])
def test_empty_splits(copy, name):
    path = copy.annotations / f"EPIC_100_retrieval_test{name}.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=f"test{name}.csv: no rows"):
        make(where=copy)
