"""What every benchmark shares: check, then time, then one table and one JSON.

A benchmark names its shapes, a function that makes inputs, and providers. A provider is a function
`(inputs, mode) -> step`; `step()` does the work once and returns the tensors to check (`step.results()`, if it has that, does
both, for a library that orders channels in its own way). One that cannot run raises Unavailable with the reason, which the
table shows. A provider of ours (its name begins with "evaat") is held to the tolerance rule of tests/check.py, a peer to eight
times torch's own largest error, since some round more often by design; one that fails gets FAIL and no speed.

CPU: providers take turns within one run, medians are printed, and the ratio is the median of the ratios turn by turn: on a
machine with neighbours only those hold. Freed memory stays with the process, as it does in a training loop of steady shapes.
GPU: a CUDA graph walks over copies of the inputs that together exceed the L2 cache.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import evaat_fast

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("fwd", "fwdbwd")


class Unavailable(Exception):
    """Why a provider cannot run here."""


def need(module):
    """The imported module, or Unavailable with the reason."""
    try:
        return of_tests("peers").load(module)
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from None


@dataclass
class Benchmark:
    """One benchmark script. `truth` is the provider that defines the result; `baseline` the one that speed-ups refer to."""

    op: str
    cpu_shapes: list
    gpu_shapes: list
    inputs: callable  # (shape, dtype, device) -> inputs
    providers: dict  # name -> (inputs, mode) -> step
    truth: callable  # (inputs, mode) -> step, in the dtype of its inputs
    work: callable  # (shape, mode, element size) -> {"flop": n} or {"byte": n}
    baseline: str
    yardsticks: dict = field(default_factory=dict)  # name -> the same, timed but not checked: a copy, a bare product
    peak: callable = None  # (shape, dtype, mode, provider) -> MiB of a CPU step in a fresh process
    check: callable = None  # (ours, low, truth, name) -> None or AssertionError, where tests/check.py's rule does not fit
    low: callable = None  # the provider whose error in the same dtype is torch's own; None: the truth's
    to_double: callable = None  # inputs -> the same in float64
    modes: tuple = MODES
    dtypes: tuple = ("fp32", "bf16")
    notes: list = field(default_factory=list)


@functools.cache
def of_tests(name):
    """A helper module of the tests."""
    spec = importlib.util.spec_from_file_location(name, HERE.parent / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def near(theirs, low, truth, dtype, name):
    """A peer's check: the same numbers, if not with the same care. A scalar is a sum that may hide terms of about 1."""
    error, own = ((x.double() - truth).abs().max() for x in (theirs, low))
    size = truth.abs().max() if truth.ndim else truth.abs().clamp(min=1.0)
    allowed = 8 * (own + torch.finfo(dtype).eps * size)
    assert error <= allowed, f"{name}: error {error:.2e} > {allowed:.2e}"


def doubled(inputs):
    """Inputs (a dict) with every floating-point tensor in float64."""
    floating = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return {n: x.detach().double().requires_grad_(x.requires_grad) if floating(x) else x for n, x in inputs.items()}


def cloned(inputs):
    return {
        n: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()
    }


def environment(device):
    """Machine and versions, for the header line and the JSON."""
    git = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    info = {
        "evaat_fast": evaat_fast.__version__,
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    triton = importlib.util.find_spec("triton")
    info["triton"] = importlib.import_module("triton").__version__ if triton else "absent"
    if device == "cuda":
        query = "clocks.sm,clocks.max.sm,driver_version"
        smi = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        info |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "clocks": smi.stdout.strip().split("\n")[0],
        }
        info["cudnn"] = torch.backends.cudnn.version()
    else:
        from evaat_fast import _cpu

        info |= {"device": _cpu_name(), "threads": torch.get_num_threads(), "isa": ("plain", "avx2", "avx512")[_cpu.isa()]}
    return info


def _cpu_name():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def slug(info):
    name = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
    return name if "cuda" in info else f"cpu-{name}"


def keep_freed_memory():
    """glibc hands large blocks back to the kernel. Fresh pages cost four times the copy that fills them, now and then."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def time_cpu(steps, seconds, least=7):
    """{name: [seconds per call, turn by turn]}: every step once a turn, in turns of changing order."""
    names, times, generator = list(steps), {n: [] for n in steps}, random.Random(0)
    for name in names:
        steps[name]()
    until = time.perf_counter() + seconds * len(names)
    while time.perf_counter() < until or len(times[names[0]]) < least:
        for name in names:
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
        generator.shuffle(names)  # who runs before decides what the caches and the heap hold: 20 % for a pass over memory
    return times


def time_gpu(make_step, inputs, seconds):
    """Seconds per call of one provider on the device, and the wall microseconds of an eager call."""
    size = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, torch.Tensor))
    copies = [inputs] + [cloned(inputs) for _ in range(min(15, int(256e6 // max(size, 1))))]  # 256 MB: five times an H200's L2
    steps = [make_step(c) for c in copies]
    for step in steps:
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for step in steps:
        step()
    wall = (time.perf_counter() - began) / len(steps)
    torch.cuda.synchronize()
    try:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for step in steps:
                step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        run = graph.replay
    except Exception:  # a provider that cannot be captured is timed with its launches
        torch.cuda.synchronize()
        run = lambda: [step() for step in steps]  # noqa: E731
    run()
    torch.cuda.synchronize()
    times, until = [], time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(steps))
    return times, wall * 1e6


def peaks(device):
    """Copy bandwidth (bytes/s, read + write) and matmul rate (FLOP/s) of this run, which shares of peak refer to."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(1 << 28 if device == "cuda" else 1 << 24, device=device)
    y, c = torch.empty_like(x), torch.empty_like(a)
    steps = {"copy": lambda: y.copy_(x), "matmul": lambda: torch.mm(a, b, out=c)}
    if device == "cuda":
        best = {name: min(time_gpu(lambda _, f=f: f, {"x": x}, 0.5)[0]) for name, f in steps.items()}
    else:
        best = {name: min(t) for name, t in time_cpu(steps, 0.5).items()}
    return {"copy_bytes_per_s": 2 * 4 * x.numel() / best["copy"], "matmul_flop_per_s": 2 * n**3 / best["matmul"]}


def quantiles(times):
    cut = statistics.quantiles(times, n=10)
    return {"p20": cut[1] * 1e3, "p50": statistics.median(times) * 1e3, "p80": cut[7] * 1e3}


def measure(bench, shape, dtype, mode, args):
    """Records of all providers for one case: checked against float64, then timed."""
    inputs = bench.inputs(shape, DTYPES[dtype], args.device)
    to_double, everyone = bench.to_double or doubled, {**bench.providers, **bench.yardsticks}
    truth = [t.detach().clone() for t in bench.truth(to_double(cloned(inputs)), mode)()]
    low = [t.detach().clone() for t in (bench.low or bench.truth)(cloned(inputs), mode)()]
    close, records, steps = bench.check or of_tests("check").close, [], {}
    for name, provider in everyone.items():
        record = {"shape": shape, "dtype": dtype, "mode": mode, "provider": name}
        records.append(record)
        if (args.providers and name not in args.providers) or any(word in name for word in args.skip):
            record["absent"] = "not asked for"
            continue
        if name in bench.yardsticks:
            record["yardstick"], steps[name] = True, provider
            continue
        try:
            step = provider(cloned(inputs), mode)
            ours = [t.detach().clone() for t in getattr(step, "results", step)()]
            record["error"] = max(((o.double() - t).abs().max().item() for o, t in zip(ours, truth, strict=True)), default=0.0)
            record["torch_error"] = max(
                ((o.double() - t).abs().max().item() for o, t in zip(low, truth, strict=True)), default=0.0
            )
            for o, w, t in zip(ours, low, truth, strict=True):
                close(o, w, t, name) if name.startswith("evaat") else near(o, w, t, DTYPES[dtype], name)
            steps[name] = provider
        except Unavailable as why:
            record["absent"] = str(why)
        except AssertionError as wrong:
            record["fail"] = str(wrong)
        except Exception as error:
            if name.startswith("evaat"):
                raise
            record["absent"] = f"{type(error).__name__}: {error}"
    if args.device == "cpu":
        times = time_cpu({n: p(cloned(inputs), mode) for n, p in steps.items()}, args.seconds) if steps else {}
        for record in records:
            if record["provider"] in times:
                mine, base = times[record["provider"]], times.get(bench.baseline)
                record["ms"] = quantiles(mine)
                record["ratio"] = statistics.median(a / b for a, b in zip(mine, base, strict=True)) if base else None
                if bench.peak and not record.get("yardstick"):
                    record["peak_mib"] = bench.peak(shape, dtype, mode, record["provider"])
    else:
        for record in records:
            if record["provider"] in steps:
                make = lambda c, p=steps[record["provider"]]: p(c, mode)  # noqa: E731
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                make(cloned(inputs))()
                record["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
                times, record["eager_us"] = time_gpu(make, inputs, args.seconds)
                record["ms"] = quantiles(times)
        base = next((r["ms"]["p50"] for r in records if r["provider"] == bench.baseline and "ms" in r), None)
        for record in records:
            if "ms" in record and base:
                record["ratio"] = record["ms"]["p50"] / base
    for record in records:
        record["work"] = bench.work(shape, mode, DTYPES[dtype].itemsize)
    return records


def print_case(records, peak):
    first = records[0]
    print(f"\n{json.dumps(first['shape'])}  {first['dtype']}  {first['mode']}")
    heads = f"{'rate':>15} {'% peak':>7} {'x base':>7} {'MiB':>7} {'max error':>10} {'torch':>9}"
    width, absent = 2 + max(len(r["provider"]) for r in records), {}
    print(f"  {'provider':<{width}}{'ms p50':>9} {'p20-p80':>17} {heads}")
    for r in records:
        if "absent" in r:
            absent.setdefault(r["absent"], []).append(r["provider"])
        elif "fail" in r:
            print(f"  {r['provider']:<{width}}FAIL: {r['fail'][:120]}")
        else:
            seconds, (unit, amount) = r["ms"]["p50"] / 1e3, next(iter(r["work"].items()))
            scale, name = (1e12, "TFLOP/s") if unit == "flop" else (1e9, "GB/s")
            top = peak["matmul_flop_per_s" if unit == "flop" else "copy_bytes_per_s"]
            span, ratio = f"{r['ms']['p20']:.3f}-{r['ms']['p80']:.3f}", f"{r['ratio']:.2f}" if r.get("ratio") else "-"
            memory = f"{r['peak_mib']:.0f}" if "peak_mib" in r else "-"
            errors = f"{r['error']:>10.1e} {r['torch_error']:>9.1e}" if "error" in r else f"{'yardstick':>20}"
            print(
                f"  {r['provider']:<{width}}{r['ms']['p50']:>9.3f} {span:>17} {amount / seconds / scale:>7.3f} {name:<7}"
                f"{100 * amount / seconds / top:>7.0f} {ratio:>7} {memory:>7} {errors}"
            )
    absent.pop("not asked for", None)
    for why, names in absent.items():
        print(f"  absent, {why[:100]}: {'; '.join(names)}")


def main(bench, argv=None):
    """Runs a benchmark from its command line. Exit status 1 if a provider of ours gave a wrong result."""
    parser = argparse.ArgumentParser(description=f"bench {bench.op}: check, then time, every provider that is here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=bench.dtypes, action="append")
    parser.add_argument("--mode", choices=bench.modes, action="append")
    parser.add_argument("--providers", nargs="+", choices=[*bench.providers, *bench.yardsticks], metavar="NAME")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="leave out providers whose name has a word in it")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--threads", type=int, help="CPU threads (all processors by default)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent per provider and case")
    parser.add_argument("--json", type=Path, help="where to write (build/bench/DEVICE/OP.json by default)")
    parser.add_argument("--record", action="store_true", help="write to bench/results/DEVICE/OP.json, which is committed")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.device == "cpu":
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    info, peak = environment(args.device), peaks(args.device)
    print("  ".join(f"{k} {v}" for k, v in info.items()))
    print(f"copy {peak['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {peak['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s, this run")
    if args.device == "cpu":
        print("CPU run: small shapes, for wiring and for the C++ kernels; it says nothing about a GPU")
    for note in bench.notes:
        print(note)
    shapes = bench.cpu_shapes if args.device == "cpu" else bench.gpu_shapes
    records = []
    for shape in shapes[:1] if args.quick else shapes:
        for dtype in args.dtype or (bench.dtypes if args.device == "cpu" else [d for d in bench.dtypes if d != "fp32"]):
            for mode in args.mode or bench.modes:
                records += measure(bench, shape, dtype, mode, args)
                print_case(records[-len(bench.providers) - len(bench.yardsticks) :], peak)
    folder = HERE / "results" if args.record else HERE.parent / "build" / "bench"
    path = args.json or folder / slug(info) / f"{bench.op}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {"op": bench.op, "baseline": bench.baseline, "environment": info, "peak": peak, "records": records}
    path.with_suffix(".part").write_text(json.dumps(payload, indent=1) + "\n")
    os.replace(path.with_suffix(".part"), path)
    of_plot = importlib.import_module("plot")
    print(f"\nwrote {path} and {of_plot.page(path, payload).name}, to read")
    wrong = [r for r in records if "fail" in r and r["provider"].startswith("evaat")]
    return 1 if wrong else 0


def run(bench):
    sys.exit(main(bench))
