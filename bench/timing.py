"""How long a step takes. CPU: the steps take turns, and medians count. GPU: a CUDA graph walks over copies of the inputs that
together exceed the L2 cache, and beside it stand the same steps called eagerly, on the device and on the CPU's clock.

A provider's step runs before its graph is captured, so that what it keeps from call to call (a table, a compiled kernel) is
there. What it does only under capture shows as a graph that is slower than the eager calls: `queued`.
"""

import math
import random
import statistics
import time
from dataclasses import dataclass

import torch

L2_BYTES = 256e6  # five times an H200's L2 cache
SHORT = 0.2e-3  # seconds; below, a graph has at least LEAST_STEPS, or its own launch (5 us) is part of the result
LEAST_STEPS = 10
LONG = 5e-3  # seconds; above, what L2 holds at the start (20 us of traffic) is no part of the result, and few repeats will do


@dataclass(frozen=True)
class GpuTime:
    """Of one provider. seconds: of a step in each replay. queued: median seconds of a step that is called eagerly while the
    device is busy, so that no launch is waited for. eager_us: median wall time in which an eager call returns. not_captured:
    why there is no graph, in which case seconds are of eager calls with their launches."""

    seconds: list
    queued: float
    eager_us: float
    not_captured: str | None


def cloned(inputs):
    """The inputs, a dict, with tensors of their own."""
    return {
        n: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()
    }


def copy_kernel(source, target):
    """target = source by a kernel. In a CUDA graph copy_ and clone become nodes of a copy engine, which on an H200 reaches
    2.7 TB/s where a kernel reaches 4.1 to 4.3, so a copy that kernels are compared with must be one. A product with 1 has
    the bits of its factor, and torch's kernel for it moves 16 bytes a thread."""
    return torch.mul(source, 1, out=target)


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
    """GpuTime of make_step(inputs)(); seconds: to spend on the replays."""
    size = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, torch.Tensor))
    steps = [make_step(inputs)]
    steps[0]()
    long = _on_device(steps[0]) > LONG
    if not long:
        steps += [make_step(cloned(inputs)) for _ in range(min(15, int(L2_BYTES // max(size, 1))))]
        _all(steps)
    eager = _eager(steps)
    queued = _queued(steps, eager, 2 if long else 5)
    if queued < SHORT:
        steps *= math.ceil(LEAST_STEPS / len(steps))
    graph, why = _capture(steps)
    run = graph.replay if graph else lambda: _all(steps)
    run()
    torch.cuda.synchronize()
    times, until = [], time.perf_counter() + seconds
    while len(times) < (3 if long else 10) or time.perf_counter() < until:
        times.append(_on_device(run) / len(steps))
    return GpuTime(times, queued, eager * 1e6, why)


def _all(steps):
    for step in steps:
        step()


def _on_device(run):
    """Seconds between two events around run()."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _eager(steps, calls=50, most_seconds=0.2):
    """Median seconds in which a warm call returns; each finds an empty queue, which would hold up the call once it is full."""
    times, until = [], time.perf_counter() + most_seconds
    while len(times) < calls and (len(times) < 5 or time.perf_counter() < until):
        torch.cuda.synchronize()
        began = time.perf_counter()
        steps[len(times) % len(steps)]()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(times)


def _queued(steps, eager, repeats):
    """Median seconds of a step on the device, of eager calls that are issued while it still writes a large buffer."""
    filler = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")  # at least 0.1 ms to fill
    fills = min(400, math.ceil(1.5 * eager * len(steps) / 1e-4))  # a stream takes about a thousand launches ahead
    times = []
    for _ in range(repeats):
        for _ in range(fills):
            filler.fill_(0)
        times.append(_on_device(lambda: _all(steps)) / len(steps))
    return statistics.median(times)


def _capture(steps):
    """(a CUDA graph of the steps, None), or (None, why they cannot be captured)."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            _all(steps)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _all(steps)
        return graph, None
    except Exception as error:  # whatever a peer raises there
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {error}"


def peaks(device):
    """Copy bandwidth (bytes/s, read + write) and matmul rate (FLOP/s) of this run, which shares of peak refer to."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.rand(1 << 28 if device == "cuda" else 1 << 24, device=device)
    y, c = torch.empty_like(x), torch.empty_like(a)
    steps = {"copy": lambda: y.copy_(x), "matmul": lambda: torch.mm(a, b, out=c)}
    if device == "cuda":
        steps["copy"] = lambda: copy_kernel(x, y)
        best = {name: min(time_gpu(lambda _, f=f: f, {"x": x}, 0.5).seconds) for name, f in steps.items()}
    else:
        best = {name: min(t) for name, t in time_cpu(steps, 0.5).items()}
    return {
        "copy_bytes_per_s": 2 * 4 * x.numel() / best["copy"],
        "matmul_flop_per_s": 2 * n**3 / best["matmul"],
        "copy": "kernel" if device == "cuda" else "copy_",
    }


def quantiles(times):
    """Milliseconds."""
    cut = statistics.quantiles(times, n=10)
    return {"p20": cut[1] * 1e3, "p50": statistics.median(times) * 1e3, "p80": cut[7] * 1e3}
