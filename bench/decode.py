"""Clips a second on one core, by decoder, encoding and what is done with the frames: python bench/decode.py

A clip is 16 frames, or 4, of a log-normal length (median 2 s, as those of EPIC-Kitchens-100) from a 15-s chunk of 568 x 320.
"full" decodes whole frames, "crop" then cuts one seeded box out of all of them and scales it to 224 x 224, as training does.
Every decoder must give PyAV's frames to a mean difference of 1/255 before it is timed. "decord alone" is decord by number of
frame, as it is used elsewhere, without our reading of time stamps. --rate says how many cores a GPU needs.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np
import plot
import store
import torch
from timing import peaks, quantiles, time_cpu

from evaat_fast.data import decode, train_transform
from evaat_fast.data.decode import speed

SHAPES = [{"encoding": e, "T": T} for e in speed.ENCODINGS for T in (16, 4)]
MODES = ("full", "crop")
LENGTH, CLIPS = 15.0, 12
ALONE = "decord alone"


def clips():
    """[(begin, length)] in seconds."""
    rng = np.random.default_rng(1)
    lengths = np.clip(np.exp(rng.normal(math.log(2), 1, CLIPS)), 0.3, LENGTH - 1)
    return list(zip(rng.uniform(0, LENGTH - lengths), lengths, strict=True))


def alone(path, begin, length, frames, _):
    """What `speed.read` does, by number of frame."""
    import decord

    numbers = (begin + length * (np.arange(frames) + 0.5) / frames) * speed.RATE
    return decord.VideoReader(str(path), num_threads=1).get_batch(numbers.astype(int).tolist()).asnumpy()


def step(path, frames, mode, decoder):
    """Reads all clips once; returns their frames."""
    crop, of_clip = train_transform(224), alone if decoder == ALONE else speed.read

    def read():
        found = [torch.from_numpy(of_clip(path, *clip, frames, decoder)) for clip in clips()]
        return [crop(f, generator=torch.Generator().manual_seed(0)) for f in found] if mode == "crop" else found

    return read


def case(path, shape, mode, args):
    """Records of all decoders for one case."""
    of_case = {"shape": shape, "dtype": "uint8", "mode": mode}
    truth, steps, records = step(path, shape["T"], mode, "av")(), {}, []
    for name in (*decode.ORDER, ALONE):
        record = {**of_case, "provider": name}
        records.append(record)
        problem = decode.why_not(name.split()[0])
        if problem:
            record["absent"] = problem
            continue
        found = step(path, shape["T"], mode, name)
        error = max((a.float() - b.float()).abs().mean().item() for a, b in zip(found(), truth, strict=True))
        if error > 1:
            record["fail"] = f"mean difference {error:.1f} from PyAV's frames"
            continue
        steps[name] = found
    times = time_cpu(steps, args.seconds)
    for record in records:
        mine, base = times.get(record["provider"]), times.get(ALONE)
        if mine:
            record["ms"] = quantiles([t / CLIPS for t in mine])
            record["ratio"] = statistics.median(a / b for a, b in zip(mine, base, strict=True)) if base else None
            record["clips_per_s"] = 1e3 / record["ms"]["p50"]
            record["work"] = {"byte": sum(t.numel() for t in truth) // CLIPS}
    return records


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent per decoder and case")
    parser.add_argument("--first", type=int, metavar="N", help="the first N shapes only")
    parser.add_argument("--rate", type=float, nargs="+", default=[100, 200, 500], help="clips/s of GPUs, to count cores for")
    parser.add_argument("--json", type=Path, help="where to write, without page and plot")
    parser.add_argument("--record", action="store_true", help="write to bench/results/DEVICE/decode.json, which is committed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    harness.keep_freed_memory()
    info = harness.environment("cpu")
    folder = harness.HERE / "results" if args.record else harness.HERE.parent / "build" / "bench"
    path = args.json or folder / harness.slug(info) / "decode.json"
    results = {"op": "decode", "baseline": ALONE, "environment": info, "peak": peaks("cpu"), "records": []}
    with tempfile.TemporaryDirectory() as place:
        for shape in SHAPES[: args.first]:
            film = Path(place) / f"{shape['encoding']}.mp4"
            if not film.exists():
                speed.make(film, LENGTH, shape["encoding"])
            for mode in MODES:
                new = case(film, shape, mode, args)
                results["records"] += new
                store.write(path, results)
                print(f"\n{store.label(shape)}, {mode}: {film.stat().st_size * 8 / LENGTH / 1e6:.2f} Mb/s")
                for r in new:
                    if "ms" not in r:
                        print(f"  {r['provider']:<14}{r.get('absent') or 'FAIL: ' + r['fail']}")
                        continue
                    cores = ", ".join(f"{math.ceil(rate / r['clips_per_s'])} for {rate:g}" for rate in args.rate)
                    print(f"  {r['provider']:<14}{r['clips_per_s']:7.1f} clips/s on a core; cores: {cores} clips/s")
    print(f"\n{len(results['records'])} records in {path}")
    if not args.json:
        print(f"and {plot.page(path, results).name}, to read")
    return 1 if any("fail" in r for r in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
