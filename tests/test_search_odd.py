"""An index under odd conditions: threads, damaged files, dates that no calendar has, too many moments, weights by name."""

import json
import os
import random
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search import built, index, place, rows, videos  # noqa: F401, fixtures

import evaat_fast
from evaat_fast.search import Index, moments, scan
from evaat_fast.search import index as search_index
from evaat_fast.search.store import BadIndex
from evaat_fast.search.vectors import Vectors


def test_threads_are_left_as_they_are(tmp_path):
    """Threads that begin after a search compute with as many of torch's as before, and many may search at once."""
    some, before = torch.randn(140_000, 64).half(), torch.get_num_threads()
    (tmp_path / "v").write_bytes(some.numpy().tobytes())
    mapped, queries = Vectors(tmp_path / "v", len(some), 64), torch.randn(16, 64)
    torch.set_num_threads(2)
    try:
        expected = [mapped.scores(query) for query in queries]
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {2} and torch.get_num_threads() == 2
            found = list(pool.map(mapped.scores, queries))
        assert all((a == b).all() for a, b in zip(expected, found, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_searches_leave_no_memory_behind(tmp_path):
    """However many there were before."""
    (tmp_path / "v").write_bytes(torch.randn(140_000, 64).half().numpy().tobytes())
    mapped, query, before = Vectors(tmp_path / "v", 140_000, 64), torch.randn(64), torch.get_num_threads()
    anonymous = lambda: int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024  # noqa: E731
    torch.set_num_threads(2)
    try:
        taken = []
        for _ in range(40):
            mapped.scores(query)
            taken.append(anonymous())
    finally:
        torch.set_num_threads(before)
    assert max(taken) - taken[3] < 8


def test_eight_threads_find_what_one_does(index, videos):  # noqa: F811
    """While another one takes up what was committed."""
    texts = [f"push {x} - a hand" for x in ("left", "right", "open", "close")] * 8
    expected, done = [index.search(text, k=9).to_dicts() for text in texts], threading.Event()
    fresh = Index.open(videos, device="cpu")  # whose model is loaded by whoever comes first

    def reloads():
        while not done.is_set():
            fresh._take(fresh._store)

    with ThreadPoolExecutor(9) as pool:
        other = pool.submit(reloads)
        try:
            found = list(pool.map(lambda text: fresh.search(text, k=9).to_dicts(), texts))
        finally:
            done.set()
        other.result()
    assert found == expected


def test_many_moments_are_the_best_ones():
    """Where they are sorted as where each is looked for, with equal scores, and without what a damaged vector gives."""
    places, draw = rows(*[30] * 40), np.random.default_rng(0)
    scores = draw.integers(0, 50, 1200).astype(np.float32)
    scores[[7, 900]] = np.nan, np.inf
    for merge in (True, False):
        many = moments.events(scores, places, 10**9, merge=merge)
        assert many[:256] == moments.events(scores, places, 256, merge=merge)[: len(many)]
        assert len(many) > 256 or merge and not {7, 900} & {event.best for event in many}
    assert moments.events(np.full(5, np.nan, np.float32), rows(5), 3) == []


def test_dates_beyond_64_bits(index, videos, monkeypatch):  # noqa: F811
    """Of a camera whose clock was wrong; not every file system keeps them, so the look at the file is told."""
    late = (1 << 63) + 10**18
    kept = scan.stamp
    assert scan.stamp(types.SimpleNamespace(st_size=1, st_mtime_ns=late)) == (1, (1 << 63) - 1)
    monkeypatch.setattr(scan, "stamp", lambda s: kept(types.SimpleNamespace(st_size=s.st_size, st_mtime_ns=late)))
    assert index.add(videos).changed == 3 and index.add(videos).unchanged == 3
    assert index.search("push left")[0].date.year == 2262
    assert len(index.search("push left", after="2200-01-01")) and not len(index.search("push left", before="2200-01-01"))
    for ns in (0, -(10**18)):
        monkeypatch.setattr(scan, "stamp", lambda s, ns=ns: (s.st_size, ns))
        assert index.add(videos).changed == 3 and index.search("push left")[0].date.year in (1938, 1969, 1970)


def test_damaged_files_are_said_to_be(index, videos):  # noqa: F811
    """Cut anywhere, or with bytes changed: BadIndex, or it is searched; nothing else is raised."""
    draw = random.Random(0)
    manifest = json.loads((index.folder / "index.json").read_text())
    for name, step in (("index.json", 7), (manifest["places"][0], 29), (manifest["vectors"], 97)):
        data = (index.folder / name).read_bytes()
        cut = [data[:n] for n in range(0, len(data) - 1, step)]
        for number, changed in enumerate([*cut, *(mangled(data, draw) for _ in range(60))]):
            (index.folder / name).write_bytes(changed)
            try:
                opened = Index.open(videos, device="cpu")
            except BadIndex:
                continue
            assert number >= len(cut), f"{name}: {len(changed)} of {len(data)} bytes are an index"
            moments.events(np.ones(len(opened.places.codes), np.float32), opened.places, 9)
        (index.folder / name).write_bytes(data)
    assert len(Index.open(videos)) == 11
    (index.folder / manifest["vectors"]).write_bytes(data[::-1])  # of the same shape, as another index's
    with pytest.raises(BadIndex, match="has other vectors than were written"):
        Index.open(videos)
    (index.folder / "index.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "ends"}))
    assert len(Index.open(videos)) == 11  # a former version's does not say


def mangled(data, draw):
    changed = bytearray(data)
    for _ in range(3):
        changed[draw.randrange(len(data))] = draw.choice(b'0123456789-[]{}",: \0\xff')
    return bytes(changed)


def test_a_folder_that_cannot_be_read_is_not_gone(index, videos, monkeypatch):  # noqa: F811
    """A disk that fails for a moment costs no hours of indexing; one that is empty does."""
    lists = os.scandir

    def fails(folder):
        if os.path.basename(folder) == "below":
            raise OSError(5, "Input/output error")
        return lists(folder)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", fails)
        report = index.add(videos)
    assert report.removed == 0 and len(index.files) == 3 and "cannot be read" in report.unreadable["below"]
    again = index.add(videos)
    assert (again.unchanged, again.unreadable) == (3, {}) and not index.unreadable
    (videos / "below/three.mp4").unlink()
    assert index.add(videos).removed == 1


def test_two_that_make_an_index_at_once(place, videos, monkeypatch):  # noqa: F811
    """The second one, whose model took longer, does not begin anew over the first one's."""
    there, folder = place / "weights.safetensors", videos / ".evaat-index"
    loads = search_index.Embedder

    def slow(*given, **options):
        monkeypatch.setattr(search_index, "Embedder", loads)
        Index.create(folder, there, device="cpu").add(videos)
        return loads(*given, **options)

    monkeypatch.setattr(search_index, "Embedder", slow)
    with pytest.raises(BadIndex, match="there is an index in .* already"):
        Index.create(folder, there, device="cpu")
    assert len(Index.open(folder)) == 11


def test_weights_of_pictures_and_by_name(place, videos, monkeypatch):  # noqa: F811
    made = Index.create(videos / ".evaat-index", place / "pictures.safetensors", device="cpu")
    assert made.embedder.config.num_frames == 4 and made.settings.model["num_frames"] == 4
    made.add(videos)
    assert len(Index.open(videos).search("push left")) > 0
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repo, name, local_files_only):
        asked.append((repo, name))
        return str(place / "weights.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    assert evaat_fast.load("eva02_clip_b16").model.config.num_frames == 4
    assert asked == [("timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k", "open_clip_model.safetensors")]

    def offline(repo, name, local_files_only):
        raise OSError("no network\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(
        RuntimeError, match=r"\(no network\).*https://huggingface.co/timm/eva02_base.*/resolve/main/open_clip_model"
    ):
        evaat_fast.load("eva02_clip_b16")


def test_a_scan_opens_nothing(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.mp4").chmod(0)
    found = scan.scan([tmp_path, tmp_path / "a.mp4"], str(tmp_path))
    assert list(found) == ["a.mp4"] and found["a.mp4"].why is None
    with pytest.raises(FileNotFoundError, match="videos: there is no file or folder"):
        scan.scan([tmp_path / "b"], str(tmp_path))
