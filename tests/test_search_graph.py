"""Search by a graph of neighbours, against the product of all."""

import os
import sys

import numpy as np
import pytest
from test_search import built, place  # noqa: F401, fixtures

from evaat_fast.cli import main
from evaat_fast.search import Index, graph
from evaat_fast.search.store import BadIndex, Store

pytest.importorskip("usearch")
WIDTH, CLIPS = 32, 40  # of a vector, of a video


def drawn(videos, seed=0):
    """float16 [videos * CLIPS, WIDTH]: neighbours are alike, as clips of a video are."""
    rng = np.random.default_rng(seed)
    rows = np.cumsum(rng.standard_normal((videos, CLIPS, WIDTH)), axis=1) + 3 * rng.standard_normal((videos, 1, WIDTH))
    rows = rows.reshape(-1, WIDTH)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def append(index, first, videos, seed=0):
    names = [f"{'a' if n % 38 else 'b'}/{n:04}.mp4" for n in range(first, first + videos)]
    start = np.tile(np.arange(CLIPS, dtype=float), videos).tolist()
    places = {
        "file": [name for name in names for _ in range(CLIPS)],
        "start": start,
        "stop": [x + 2 for x in start],
        "size": [1] * len(start),
        "mtime": [0] * len(start),
    }
    Store(index.folder).append(drawn(videos, seed), places, {})
    index.reload()


@pytest.fixture
def index(built, tmp_path):  # noqa: F811
    Store.create(tmp_path / ".evaat-index", Store(built.folder).manifest.settings, WIDTH)
    made = Index.open(tmp_path, device="cpu")
    append(made, 0, 75)
    return made


def likes(index, count, seed=1):
    rng = np.random.default_rng(seed)
    return [f"{index.files[n].name}@{rng.uniform(0, CLIPS):.1f}" for n in rng.integers(0, len(index.files), count)]


def same(index, asked, **how):
    """The share of the exact ten moments that are found."""
    exact, near = (index.search(like=asked, k=10, approximate=x, **how) for x in (False, True))
    assert len(near) == len(exact) and (np.diff(near.score) <= 0).all()
    spots = {(m.file, m.start, m.stop): m.score for m in exact}
    found = [(spots[key], m.score) for m in near if (key := (m.file, m.start, m.stop)) in spots]
    assert all(abs(a - b) < 1e-5 for a, b in found)
    return len(found) / len(exact)


def test_nearly_all_are_found(index):
    """And those that were added after the graph was made, which is then brought up to date."""
    assert index.build_graph(workers=1) == 75 * CLIPS and index.build_graph() == 0
    for merge in (True, False):
        assert np.mean([same(index, like, merge=merge) for like in likes(index, 10)]) > 0.95
    append(index, 75, 25, seed=2)
    assert np.mean([same(index, like) for like in likes(index, 10)]) > 0.95
    index.folder.joinpath(".graph-0000.usearch.1.tmp").touch()  # of a process that was killed
    assert index.build_graph() == 25 * CLIPS
    assert np.mean([same(index, like) for like in likes(index, 10)]) > 0.95


def test_what_does_not_count_is_not_found(index):
    """Videos that are gone, the moment that was asked with, and those that a filter leaves out; where little is left, all of it
    is."""
    index.build_graph()
    best = index.search(like=(asked := "a/0007.mp4@20"), k=5, approximate=True)
    gone = {f.name: (f.first, f.last) for f in index.files if index.path(f.name) in best.file and f.name != "a/0007.mp4"}
    Store(index.folder).change(dead=tuple(gone.values()))
    index.reload()
    after = index.search(like=asked, k=50, approximate=True)
    assert len(after) == 50 and not {index.path(name) for name in gone} & set(after.file)
    assert not any(m.file == index.path("a/0007.mp4") and m.start <= 20 <= m.stop for m in after)
    assert same(index, asked, folder=index.base + "/b") == 1
    assert len(index.search(like=asked, after="1971-01-01", approximate=True)) == 0


def test_a_graph_of_other_vectors_is_refused(index, monkeypatch, capsys):
    """Vectors that were copied to another file, a graph that is damaged, and one of others that lies there."""
    with pytest.raises(BadIndex, match="there is no graph .*--approximate makes one"):
        index.search(like=likes(index, 1), approximate=True)
    assert main(["serve", "--index", str(index.folder), "--port", "0", "--approximate"]) == 2
    assert "there is no graph" in capsys.readouterr().err
    index.build_graph()
    old = index.folder / "graph-0000.usearch"
    whole = old.read_bytes()
    old.write_bytes(whole[:1000])
    with pytest.raises(BadIndex, match="is damaged"):
        index.search(like=likes(index, 1), approximate=True)
    assert main(["search", "--index", str(index.folder), "--like", likes(index, 1)[0], "--approximate"]) == 2
    assert "is damaged" in capsys.readouterr().err
    old.write_bytes(whole)
    store = Store(index.folder)
    store.change(dead=((0, 2000),))
    store.finish()
    assert not old.exists()
    index.reload()
    with pytest.raises(BadIndex, match="there is no graph"):
        index.search(like=likes(index, 1), approximate=True)
    (index.folder / "graph-0001.usearch").write_bytes(whole)  # of more rows than there are
    with pytest.raises(BadIndex, match="not of the vectors"):
        index.search(like=likes(index, 1), approximate=True)
    assert index.build_graph() == 75 * CLIPS - 2000 == len(index)
    assert same(index, likes(index, 1)) > 0.5


def test_a_graph_that_an_index_left_behind_goes_with_it(index):
    index.build_graph()
    settings = Store(index.folder).manifest.settings
    (index.folder / "index.json").unlink()
    Store.create(index.folder, settings, WIDTH)
    index = Index.open(index.folder.parent, device="cpu")
    append(index, 0, 75, seed=5)
    with pytest.raises(BadIndex, match="there is no graph"):
        index.search(like=likes(index, 1), approximate=True)


def test_a_missing_package_is_named(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ImportError, match=r"pip install 'evaat-fast\[usearch\]'"):
        index.build_graph()


def test_too_little_memory_is_said_before(index, monkeypatch, capsys):
    """And the index is what it was."""
    monkeypatch.setattr(graph, "_free", lambda: 75 * CLIPS * (2 * WIDTH + 256) - 1)
    with pytest.raises(RuntimeError, match=r"a graph of 3,000 clips takes 0.0 GB of memory .* searched exactly without it"):
        index.build_graph()
    (index.folder.parent / "videos").mkdir()
    command = ["index", str(index.folder.parent / "videos"), "--out", str(index.folder), "--approximate"]
    assert main(command) == 2 and "of memory while it is made" in capsys.readouterr().err
    assert len(index.search(like=likes(index, 1))) == 10 and not (index.folder / "graph-0000.usearch").exists()
    monkeypatch.setattr(graph, "_free", lambda: 75 * CLIPS * (2 * WIDTH + 256))
    assert index.build_graph() == 75 * CLIPS


def test_free_memory_is_what_the_system_says():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert graph._free() is None or 0 < graph._free() <= total
