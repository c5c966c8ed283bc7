"""An index of one's own videos, against its bars: python bench/search.py

build      videos to rows of an index, beside decoding alone: the same frames, cropped alike, by as many threads. Films of a
           moving texture, 12 of them, one file under 12 names; clips of 2 s that overlap by half. And with --shots, for which
           every frame is decoded: decoding alone leaves out those that nothing is made of.
search     a text among so many clips of 256 numbers, warm: tokens, text tower, product and events; and a bare product with
           float16 vectors, whose scores are rounded to float16. Memory: the peak of a fresh process, packages included.
open       that index.
unchanged  `evaat-fast index` of so many videos that it knows, from the shell's prompt on.
graph      with --graph CLIPS: how long making it takes, and the most memory meanwhile that is no file's; and ten events by it
           and by the product of all: time, and the share of the events that it finds, too; led: the share of queries for which
           it was enough, and not all were read after it. Queries are clips and as much noise; vectors of scenes of 20 clips of
           200 topics, and without structure, which are hardest.

Model: eva02_at_tiny_patch16_64 with 256 numbers, drawn, not trained. `first` is before anything is in a cache of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import harness
import numpy as np
import plot
import store
import torch
from timing import peaks, quantiles, time_cpu

import evaat_fast
from evaat_fast.model import save_checkpoint
from evaat_fast.search import Index, scan, windows
from evaat_fast.search.build import threads
from evaat_fast.search.embedder import Embedder, Settings, weights_of
from evaat_fast.search.graph import Graph
from evaat_fast.search.store import Store, graph_of

FILMS = [{"film": "1920x1080", "s": 20}, {"film": "568x320", "s": 120}]
COPIES = 12
CLIPS, WIDTH, VIDEOS = 1_000_000, 256, 10_000
OURS, SHOTS, ALONE = "evaat index", "evaat index --shots", "decoding alone"


def film(path, width, height, seconds):
    """H.264 as phones write it: 30 frames per second, a key frame a second."""
    import av

    rng = np.random.default_rng(0)
    wall = rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", "g": "30"}
        for n in range(30 * seconds):
            view = np.ascontiguousarray(wall[n % height : n % height + height, 2 * n % width : 2 * n % width + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode(None))


def weights(folder):
    torch.manual_seed(0)
    path = folder / "tiny.safetensors"
    save_checkpoint(evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=4, embed_dim=WIDTH), path)
    return path


def settings(path):
    name, hashed = weights_of(path)
    embedder = Embedder(name, "cpu")
    return Settings(name, hashed, embedder.described()), embedder


def decoded(folder, crop, frames=4, size=256):
    """What `build` reads, and nothing more."""

    def one(path):
        torch.set_num_threads(1)
        some = windows.windows(path, 2.0, 1.0, frames)
        for at in range(0, len(some), size):
            windows.decode(path, some.times[at : at + size], crop)
        return len(some)

    def step():
        with ThreadPoolExecutor(threads(None)) as pool:
            return sum(pool.map(one, [scan.path_of(name, str(folder)) for name in scan.scan([folder], str(folder))]))

    return step


def building(place, shape, args):
    width, height = map(int, shape["film"].split("x"))
    folder = place / shape["film"]
    folder.mkdir()
    film(folder / "00.mp4", width, height, shape["s"])
    for n in range(1, COPIES):
        os.link(folder / "00.mp4", folder / f"{n:02}.mp4")
    checkpoint = weights(place)
    _, embedder = settings(checkpoint)
    alone, count = decoded(folder, embedder.crop), 0

    def ours(shots=False):
        with tempfile.TemporaryDirectory(dir=place) as out:
            index = Index.create(Path(out) / "index", checkpoint, shots=shots, device="cpu")
            index.embedder  # noqa: B018, loaded before the clock runs
            began = time.perf_counter()
            index.add(folder)
            return time.perf_counter() - began

    alone()
    ours()
    times = {OURS: [], ALONE: [], SHOTS: []}
    for _ in range(args.turns):
        times[SHOTS].append(ours(shots=True))
        times[OURS].append(ours())
        began = time.perf_counter()
        count = alone()
        times[ALONE].append(time.perf_counter() - began)
    records = []
    for name, mine in times.items():
        ratio = statistics.median(a / b for a, b in zip(mine, times[ALONE], strict=True))
        rate = count / statistics.median(mine)
        of_case = {"shape": {**shape, "videos": COPIES}, "dtype": "fp32", "mode": "build", "provider": name}
        size = (folder / "00.mp4").stat().st_size * COPIES
        records.append({**of_case, "ms": quantiles(mine), "ratio": ratio, "clips_per_s": rate, "work": {"byte": size}})
        print(f"  {shape['film']:<10}{name:<18}{statistics.median(mine):6.2f} s {rate:7.1f} clips/s {ratio:5.2f} x", flush=True)
    return records


def made_up(folder, checkpoint, clips, videos, scenes=False):
    """An index of drawn vectors; those of scenes are alike."""
    some, _ = settings(checkpoint)
    made, per, rng = Store.create(folder, asdict(some), WIDTH), clips // videos, np.random.default_rng(0)
    base, topics = folder.parent, rng.standard_normal((200, WIDTH), np.float32) if scenes else None
    at_once = max(1, videos // 16)
    for first in range(0, videos, at_once):
        names = [f"{n:05}.mp4" for n in range(first, min(first + at_once, videos))]
        found = [os.stat(base / name) if (base / name).exists() else None for name in names]
        rows = rng.standard_normal((len(names) * per, WIDTH), np.float32)
        if topics is not None:
            of_scene = topics[rng.integers(0, len(topics), len(rows) // 20 + 1)]
            of_scene += rng.standard_normal(of_scene.shape, np.float32)
            rows = 0.6 * rows + of_scene.repeat(20, axis=0)[: len(rows)]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        start = np.tile(np.arange(per, dtype=float), len(names)).tolist()
        places = {
            "file": [name for name in names for _ in range(per)],
            "start": start,
            "stop": [x + 2 for x in start],
            "size": [s.st_size if s else 1 for s in found for _ in range(per)],
            "mtime": [s.st_mtime_ns if s else 0 for s in found for _ in range(per)],
        }
        made.append(rows.astype(np.float16), places, {})
    made.finish()


PROBE = """
import json, sys, time
from pathlib import Path
import evaat_fast.search
import torch, pyarrow.parquet
began = time.perf_counter()
index = evaat_fast.search.Index.open(sys.argv[1], device="cpu")
opened = time.perf_counter() - began
times = []
for n in range(int(sys.argv[2])):
    began = time.perf_counter()
    found = index.search("push the red block left", k=10)
    times.append(time.perf_counter() - began)
assert len(found) == 10
peak = next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
print(json.dumps({"open": opened, "search": times, "mib": peak / 1024}))
"""


def searching(place, args):
    folder = place / "million" / "index"
    folder.parent.mkdir()
    made_up(folder, weights(place), args.clips, 1000)
    shape, of_case = {"clips": args.clips, "E": WIDTH}, {"dtype": "fp16"}
    size = 2 * args.clips * WIDTH
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), "30"], capture_output=True, text=True, check=True, cwd=place
    )
    found = json.loads(probe.stdout)
    vectors = torch.from_file(str(folder / "vectors-0000.f16"), size=args.clips * WIDTH, dtype=torch.float16)
    vectors, query = vectors.view(args.clips, WIDTH), torch.randn(WIDTH).half()
    bare = time_cpu({"bare": lambda: torch.mv(vectors, query)}, 2.0)["bare"]
    warm = found["search"][3:]
    common = {**of_case, "shape": shape, "work": {"byte": size}}
    print(f"  search {1e3 * statistics.median(warm):.1f} ms, the first {1e3 * found['search'][0]:.0f} ms; bare product in half")
    print(f"  precision {1e3 * statistics.median(bare):.1f} ms; open {1e3 * found['open']:.0f} ms; peak {found['mib']:.0f} MiB")
    return [
        {**common, "mode": "search", "provider": OURS, "ms": quantiles(warm), "peak_mib": found["mib"]},
        {**common, "mode": "search", "provider": "bare product in float16", "ms": quantiles(bare), "yardstick": True},
        {**common, "mode": "search, first", "provider": OURS, "ms": quantiles(found["search"][:1] * 2)},
        {**common, "mode": "open", "provider": OURS, "ms": quantiles([found["open"]] * 2)},
    ]


def anonymous():
    """MiB of this process that are no file's."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def led(place, args):
    """By the graph, beside all."""
    records = []
    for kind in args.of:
        folder = place / f"graph-{kind}" / "index"
        folder.parent.mkdir()
        made_up(folder, weights(place), args.graph, max(1, args.graph // 1000), kind == "scenes")
        index = Index.open(folder, device="cpu")
        before, most, began = anonymous(), 0.0, time.perf_counter()

        def made(rows, of, before=before):
            nonlocal most
            most = max(most, anonymous() - before)

        index.build_graph(progress=made)
        built, rng, times, shares, enough = time.perf_counter() - began, np.random.default_rng(1), {True: [], False: []}, [], 0
        graph, every = Graph(folder / "vectors-0000.f16", index.vectors, index.places), np.ones(len(index.files), bool)
        for row in rng.integers(0, args.graph, 43).tolist():
            noisy = index.vectors.row(row) + torch.from_numpy(rng.standard_normal(WIDTH).astype(np.float32)) / WIDTH**0.5
            query, found = torch.nn.functional.normalize(noisy, dim=0), {}
            for approximate in times:
                began = time.perf_counter()
                some, scores = index.best(query, 10, approximate=approximate)
                times[approximate].append(time.perf_counter() - began)
                found[approximate] = {event.best for event in some}
            shares.append(len(found[True] & found[False]) / 10)
            enough += graph.events(query, every, (), 10) is not None
        size = graph_of(folder / "vectors-0000.f16").stat().st_size
        print(
            f"  graph of {args.graph:,} clips, {kind}: made in {built:.0f} s and {most:.0f} MiB, on the disk "
            f"{size / args.graph:.0f} bytes a clip; ten events"
        )
        near, all_of_them = (1e3 * statistics.median(times[x][3:]) for x in (True, False))
        print(
            f"  {near:.1f} ms, of all {all_of_them:.1f} ms; {statistics.mean(shares):.1%} of the same; {enough} of 43 led",
            flush=True,
        )
        of_case = {"shape": {"clips": args.graph, "E": WIDTH, "of": kind}, "dtype": "fp16", "work": {"byte": size}}
        records += [
            {
                **of_case,
                "mode": "graph, search",
                "provider": OURS,
                "ms": quantiles(times[True][3:]),
                "same": statistics.mean(shares),
                "led": enough / 43,
            },
            {
                **of_case,
                "mode": "graph, search",
                "provider": "product of all",
                "ms": quantiles(times[False][3:]),
                "yardstick": True,
            },
            {**of_case, "mode": "graph, made", "provider": OURS, "ms": quantiles([built] * 2), "peak_mib": most},
        ]
    return records


def unchanged(place, args):
    folder = place / "videos"
    folder.mkdir()
    for n in range(args.videos):
        (folder / f"{n:05}.mp4").write_bytes(b"x" * (n % 7 + 1))
    checkpoint = weights(place)
    made_up(folder / ".evaat-index", checkpoint, 10 * args.videos, args.videos)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run = subprocess.run([sys.executable, "-m", "evaat_fast", "index", str(folder)], capture_output=True, text=True)
        times.append(time.perf_counter() - began)
        assert run.returncode == 0 and f"{args.videos:,} unchanged" in run.stdout, run.stdout + run.stderr
    print(f"  {args.videos:,} unchanged videos: {statistics.median(times):.2f} s")
    shape = {"videos": args.videos, "clips": 10 * args.videos}
    of_case = {"shape": shape, "dtype": "fp16", "mode": "unchanged", "provider": OURS}
    return [{**of_case, "ms": quantiles(times), "work": {"byte": 2 * WIDTH * 10 * args.videos}}]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5, help="of building, by turns with decoding")
    parser.add_argument("--first", type=int, metavar="N", help="the first N films only")
    parser.add_argument("--clips", type=int, default=CLIPS, help="to search among")
    parser.add_argument("--videos", type=int, default=VIDEOS, help="that are unchanged")
    parser.add_argument("--graph", type=int, metavar="CLIPS", help="also of so many clips")
    parser.add_argument(
        "--of", nargs="+", choices=("scenes", "random"), default=("scenes", "random"), help="clips of the graph"
    )
    parser.add_argument("--only", choices=("build", "search", "unchanged", "graph"), help="nothing else")
    parser.add_argument("--json", type=Path, help="where to write, without page and plot")
    parser.add_argument("--record", action="store_true", help="write to bench/results/DEVICE/search.json, which is committed")
    args = parser.parse_args(argv)
    info = harness.environment("cpu")
    folder = harness.HERE / "results" if args.record else harness.HERE.parent / "build" / "bench"
    path = args.json or folder / harness.slug(info) / "search.json"
    results = {"op": "search", "baseline": ALONE, "environment": info, "peak": peaks("cpu"), "records": []}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        jobs = [("build", lambda shape=shape: building(place, shape, args)) for shape in FILMS[: args.first]]
        jobs += [("search", lambda: searching(place, args)), ("unchanged", lambda: unchanged(place, args))]
        jobs += [("graph", lambda: led(place, args))] if args.graph else []
        for _, job in (pair for pair in jobs if args.only in (None, pair[0])):
            results["records"] += job()
            store.write(path, results)
    print(f"{len(results['records'])} records in {path}")
    if not args.json:
        print(f"and {plot.page(path, results).name}, to read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
