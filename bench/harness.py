"""What every benchmark shares: check, then time, then one table and one JSON.

A benchmark names its shapes, a function that makes inputs, and providers. A provider is a function
`(inputs, mode) -> step`; `step()` does the work once and returns the tensors to check (`step.results()`, if it has that, does
both, for a library that orders channels in its own way). One that cannot run raises Unavailable with the reason, which the
table shows. A provider of ours (its name begins with "evaat") is held to the tolerance rule of tests/check.py, a peer to eight
times torch's own largest error, since some round more often by design; one that fails gets FAIL and no speed.

CPU: providers take turns within one run, medians are printed, and the ratio is the median of the ratios turn by turn: on a
machine with neighbours only those hold. Freed memory stays with the process, as it does in a training loop of steady shapes.
GPU: see timing.py. The JSON is written after every case, so a run that is stopped keeps what it has; --append goes on with it.
"""

import argparse
import ctypes
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import store
import torch
import where
from timing import cloned, peaks, quantiles, time_cpu, time_gpu

import evaat_fast
from evaat_fast.ops._core.dispatch import BackendError

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
    gpu_baseline: str = None  # where it is another one there
    yardsticks: dict = field(default_factory=dict)  # name -> the same, timed but not checked: a copy, a bare product
    peak: callable = None  # (shape, dtype, mode, provider) -> MiB of a CPU step in a fresh process
    check: callable = None  # (ours, low, truth, name) -> None or AssertionError, where tests/check.py's rule does not fit
    low: callable = None  # the provider whose error in the same dtype is torch's own; None: the truth's
    to_double: callable = None  # inputs -> the same in float64
    modes: tuple = MODES
    dtypes: tuple = ("fp32", "bf16")
    notes: list = field(default_factory=list)
    ran: callable = None  # {kernel: (milliseconds, calls)} -> what a record on a GPU says of the kernels that ran

    def base(self, device):
        """The baseline on that device."""
        return self.gpu_baseline or self.baseline if device == "cuda" else self.baseline


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


def environment(device):
    """Machine and versions, for the header line and the JSON."""
    git = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    info = {
        "evaat_fast": evaat_fast.__version__,
        "commit": git.stdout.strip() or os.environ.get("EVAAT_FAST_COMMIT", "unknown"),  # a copy of the tree has no history
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
            "capability": torch.cuda.get_device_capability(),
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


def measure(bench, shape, dtype, mode, args):
    """Records of all providers for one case: checked against float64, then timed."""
    inputs = bench.inputs(shape, DTYPES[dtype], args.device)
    found = check(bench, inputs, mode, DTYPES[dtype], args)
    of_case = {"shape": shape, "dtype": dtype, "mode": mode}
    records = [{**of_case, "provider": name, **known} for name, (_, known) in found.items()]
    steps = {name: step for name, (step, _) in found.items() if step is not None}
    baseline = bench.base(args.device)
    if args.device == "cpu":
        times = time_cpu({n: p(cloned(inputs), mode) for n, p in steps.items()}, args.seconds) if steps else {}
        for record in records:
            if record["provider"] in times:
                mine, base = times[record["provider"]], times.get(baseline)
                record["ms"] = quantiles(mine)
                record["ratio"] = statistics.median(a / b for a, b in zip(mine, base, strict=True)) if base else None
                if bench.peak and not record.get("yardstick"):
                    record["peak_mib"] = bench.peak(shape, dtype, mode, record["provider"])
    else:
        for record in records:
            if record["provider"] in steps:
                record |= _timed_on_gpu(record["provider"], steps[record["provider"]], inputs, mode, args.seconds)
        base = next((r["ms"]["p50"] for r in records if r["provider"] == baseline and "ms" in r), None)
        for record in records:
            if "ms" in record and base:
                record["ratio"] = record["ms"]["p50"] / base
    for record in records:
        record["work"] = bench.work(shape, mode, DTYPES[dtype].itemsize)
    return records


def check(bench, inputs, mode, dtype, args):
    """{name: (its provider if it may be timed, what is known of it)} for the providers and yardsticks that are asked for."""
    to_double, found = bench.to_double or doubled, {}
    truth = [t.detach().clone() for t in bench.truth(to_double(cloned(inputs)), mode)()]
    low = [t.detach().clone() for t in (bench.low or bench.truth)(cloned(inputs), mode)()]
    close = bench.check or of_tests("check").close
    distance = lambda xs: max(((x.double() - t).abs().max().item() for x, t in zip(xs, truth, strict=True)), default=0.0)  # noqa: E731
    for name, provider in {**bench.providers, **bench.yardsticks}.items():
        if (args.providers and name not in args.providers) or any(word in name for word in args.skip):
            continue
        if name in bench.yardsticks:
            found[name] = (provider, {"yardstick": True})
            continue
        record = {}
        try:
            step = provider(cloned(inputs), mode)
            ours = [t.detach().clone() for t in getattr(step, "results", step)()]
            record |= {"error": distance(ours), "torch_error": distance(low)}
            for o, w, t in zip(ours, low, truth, strict=True):
                close(o, w, t, name) if name.startswith("evaat") else near(o, w, t, dtype, name)
        except Exception as error:
            found[name] = (None, {**record, **_reason(name, error)})
        else:
            found[name] = (provider, record)
    return found


def _reason(name, error):
    """What a record says of an exception. A wrong result is a failure, and so is whatever stops a provider of ours, but that it
    is not for this machine; the others are then shown all the same."""
    if isinstance(error, (Unavailable, BackendError)):
        return {"absent": str(error)}
    if isinstance(error, AssertionError):
        return {"fail": str(error)}
    return {"fail" if name.startswith("evaat") else "absent": f"{type(error).__name__}: {error}"}


def _timed_on_gpu(name, provider, inputs, mode, seconds):
    try:
        mine = cloned(inputs)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        provider(mine, mode)()
        record = {"peak_mib": (torch.cuda.max_memory_allocated() - held) / 2**20}
        found = time_gpu(lambda i: provider(i, mode), inputs, seconds)
    except Exception as error:  # out of memory with a second copy of the inputs, for one
        return _reason(name, error)
    record |= {"eager_us": found.eager_us, "queued_ms": found.queued * 1e3, "ms": quantiles(found.seconds)}
    return record | ({"not_captured": found.not_captured} if found.not_captured else {})


def add_kernels(bench, results, path, device, stop):
    """Adds to the records what ran, once all is timed, as a profiler leaves its hooks behind. None is begun after `stop`."""
    wanted = [r for r in results["records"] if "ms" in r and "ran" not in r and r["provider"] in bench.providers]
    for (_, dtype, _), records in itertools.groupby(wanted, store.case):
        inputs = None
        for r in records:
            if time.monotonic() > stop:
                return
            inputs = inputs or bench.inputs(r["shape"], DTYPES[dtype], device)
            try:
                r["ran"] = bench.ran(where.on_gpu(bench.providers[r["provider"]](inputs, r["mode"]), 1)[0])
            except Exception as error:  # a provider that was timed; what a profiler lacks must not end the run
                r["ran"] = [f"not profiled: {type(error).__name__}: {error}"]
        store.write(path, results)


def print_case(records, peak):
    first = records[0]
    print(f"\n{json.dumps(first['shape'])}  {first['dtype']}  {first['mode']}")
    heads = f"{'rate':>15} {'% peak':>7} {'x base':>7} {'MiB':>7} {'max error':>10} {'torch':>9}"
    width = 2 + max(len(r["provider"]) for r in records)
    print(f"  {'provider':<{width}}{'ms p50':>9} {'p20-p80':>17} {heads}")
    for r in records:
        if "fail" in r:
            print(f"  {r['provider']:<{width}}FAIL: {r['fail']}")
        elif "ms" in r:
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
            if r.get("queued_ms", r["ms"]["p50"]) < 0.9 * r["ms"]["p50"]:
                print(f"  {'':<{width}}{r['queued_ms']:>9.3f} as eager calls: the capture adds work of its own")
    for why, names in store.without(records, "absent"):
        print(f"  absent, {why}: {'; '.join(names)}")


def main(bench, argv=None):
    """Runs a benchmark from its command line. Exit status 1 if a provider of ours gave a wrong result."""
    parser = argparse.ArgumentParser(description=f"bench {bench.op}: check, then time, every provider that is here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=bench.dtypes, action="append")
    parser.add_argument("--mode", choices=bench.modes, action="append")
    parser.add_argument("--providers", nargs="+", choices=[*bench.providers, *bench.yardsticks], metavar="NAME")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="leave out providers whose name has a word in it")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--first", type=int, metavar="N", help="the first N shapes only")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after so many seconds")
    parser.add_argument("--append", action="store_true", help="keep the cases of this commit and device that the JSON has")
    parser.add_argument("--threads", type=int, help="CPU threads (all processors by default)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent per provider and case")
    parser.add_argument(
        "--json", type=Path, help="where to write (build/bench/DEVICE/OP.json by default), without page and plot"
    )
    parser.add_argument("--record", action="store_true", help="write to bench/results/DEVICE/OP.json, which is committed")
    args = parser.parse_args(argv)
    began = time.monotonic()
    torch.manual_seed(0)
    if args.device == "cpu":
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    info = environment(args.device)
    folder = HERE / "results" if args.record else HERE.parent / "build" / "bench"
    path = args.json or folder / slug(info) / f"{bench.op}.json"
    results = begun(path, info) if args.append else None
    if results is None:
        results = {"op": bench.op, "baseline": bench.base(args.device), "environment": info, "peak": peaks(args.device)}
        results["records"] = []
    peak, records = results["peak"], results["records"]
    print("  ".join(f"{k} {v}" for k, v in info.items()))
    print(f"copy {peak['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {peak['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s, this run")
    if args.device == "cpu":
        print("CPU run: small shapes, for wiring and for the C++ kernels; it says nothing about a GPU")
    for note in bench.notes:
        print(note)
    shapes = bench.cpu_shapes if args.device == "cpu" else bench.gpu_shapes
    dtypes = args.dtype or (bench.dtypes if args.device == "cpu" else [d for d in bench.dtypes if d != "fp32"])
    cases = list(itertools.product(shapes[: 1 if args.quick else args.first], dtypes, args.mode or bench.modes))
    there = {store.case(r) for r in records}
    cases = [c for c in cases if (store.label(c[0]), *c[1:]) not in there]
    for done, (shape, dtype, mode) in enumerate(cases):
        if args.budget is not None and time.monotonic() - began > args.budget:
            print(f"\n{len(cases) - done} of {len(cases)} cases not begun: the {args.budget:.0f} s are over")
            break
        new = measure(bench, shape, dtype, mode, args)
        print_case(new, peak)
        records += new
        store.write(path, results)
    if bench.ran and args.device == "cuda":
        add_kernels(bench, results, path, args.device, math.inf if args.budget is None else began + args.budget + 20)
    print(f"\n{len(records)} records in {path}")
    if not args.json and records:
        print(f"and {importlib.import_module('plot').page(path, json.loads(path.read_text())).name}, to read")
    return 1 if any("fail" in r and r["provider"].startswith("evaat") for r in records) else 0


def begun(path, info):
    """The results that are there, if the same code made them on the same device."""
    try:
        results = json.loads(path.read_text())
    except OSError:
        return None
    same = all(results["environment"].get(k) == info[k] for k in ("commit", "device", "torch", "triton"))
    return results if same else None


def run(bench):
    sys.exit(main(bench))
