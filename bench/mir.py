"""EK-100's four retrieval metrics against the challenge's formulas: python bench/mir.py

The formulas are written in NumPy as the challenge's code has them: whole matrices, a sort for each metric, each direction and
each ideal order. Similarities and labels are drawn, labels about as frequent as the test set's: a ninth are above 0. The first
shape is that set's: clips, captions. Both are held to the formulas with a stable sort in float64, to 1e-9 per cent. Bytes:
similarities and labels, read once for each direction. MiB: what a call adds to the peak of a fresh process.
"""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from harness import DTYPES, Benchmark, run

from evaat_fast.data.kinds import kinds_relevancy
from evaat_fast.eval import mir

NAMES = ("mAP_v2t", "mAP_t2v", "nDCG_v2t", "nDCG_t2v")


def inputs(shape, dtype, device):
    clips, captions = shape["clips"], shape["captions"]
    rng = np.random.default_rng(0)
    verbs, nouns = _frequent(rng, 97, 0.5, 1.0, clips), _frequent(rng, 150, 3, 1.2, (clips, 2))
    pairs = [(int(v), frozenset(map(int, n[: 1 + (i % 8 == 0)]))) for i, (v, n) in enumerate(zip(verbs, nouns, strict=True))]
    kinds = dict.fromkeys(pairs)  # in order of appearance
    kinds = {pair: row for row, pair in enumerate(kinds)}
    kind = torch.tensor([kinds[pair] for pair in pairs])
    first = np.unique(kind, return_index=True)[1]  # every clip has a caption of its kind
    rest = np.setdiff1d(np.arange(clips), first)
    chosen = torch.from_numpy(np.concatenate((first, rest))[:captions])
    relevancy = kinds_relevancy(list(kinds))[kind][:, kind[chosen]]
    noise = torch.from_numpy(rng.standard_normal(relevancy.shape, dtype=np.float32))
    return {"sim": (relevancy + 0.3 * noise).to(dtype).to(device), "relevancy": relevancy.double().to(device)}


def _frequent(rng, classes, flat, power, size):
    """Class numbers, low ones more frequent than high ones."""
    share = (np.arange(classes) + flat) ** -power
    return rng.choice(classes, size, p=share / share.sum())


def arrays(given):
    sim = given["sim"]
    return (sim.float() if sim.dtype == torch.bfloat16 else sim).cpu().numpy(), given["relevancy"].cpu().numpy()


def precision(sim, relevancy, kind):
    order = np.argsort(-sim, axis=1, kind=kind)
    ranked = np.take_along_axis(relevancy, order, 1)
    total = np.cumsum(ranked, axis=1)
    total[ranked != 1] = 0
    return np.mean(np.sum(total / np.arange(1, sim.shape[1] + 1), axis=1) / np.sum(ranked == 1, axis=1))


def gain(sim, relevancy, counted, kind):
    order = np.argsort(sim, axis=1, kind=kind)[:, ::-1]
    return np.sum(np.take_along_axis(relevancy, order, 1) * counted / np.log2(np.arange(sim.shape[1]) + 2), axis=1)


def formulas(kind=None):
    def make(given, mode):
        sim, relevancy = arrays(given)

        def step():
            ways = ((sim, relevancy), (sim.T, relevancy.T))
            found = [precision(*way, kind) for way in ways]
            for scores, labels in ways:
                counted = (np.sort(labels, axis=1)[:, ::-1] > 0).astype(int)
                found.append(np.mean(gain(scores, labels, counted, kind) / gain(labels, labels, counted, kind)))
            return [torch.tensor(100 * x) for x in found]

        return step

    return make


def ours(given, mode):
    def step():
        metrics = mir.evaluate(given["sim"], given["relevancy"])
        return [torch.tensor(metrics[name], dtype=torch.float64) for name in NAMES]

    return step


def exact(got, low, truth, name):
    assert abs(got - low).item() <= 1e-9, f"{name}: {got.item()!r}, the formulas give {low.item()!r}"


def peak(shape, dtype, mode, provider):
    command = [sys.executable, __file__, "--peak", str(shape["clips"]), str(shape["captions"]), dtype, provider]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(clips, captions, dtype, provider):
    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    step = PROVIDERS[provider](inputs({"clips": int(clips), "captions": int(captions)}, DTYPES[dtype], "cpu"), "fwd")
    PROVIDERS[provider](inputs({"clips": 64, "captions": 32}, DTYPES[dtype], "cpu"), "fwd")()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    print((status("VmHWM") - before) / 1024)


def work(shape, mode, size):
    return {"byte": 2 * shape["clips"] * shape["captions"] * (size + 8)}


PROVIDERS = {"formulas, NumPy": formulas(), "evaat": ours}
BENCH = Benchmark(
    op="mir",
    cpu_shapes=[{"clips": 9668, "captions": 3842}, {"clips": 1000, "captions": 1000}],
    gpu_shapes=[{"clips": 9668, "captions": 3842}],
    inputs=inputs,
    providers=PROVIDERS,
    truth=formulas("stable"),
    check=exact,
    to_double=lambda given: given,
    work=work,
    baseline="formulas, NumPy",
    modes=("fwd",),
    peak=peak,
    notes=["ties: the formulas' own sort keeps no order among equals, so that in bf16 its numbers differ by 0.02"],
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        run(BENCH)
