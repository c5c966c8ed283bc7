"""Where the time of a training step goes, by torch's profiler: kernels on a GPU, operators by their own time on a CPU.

Names are grouped by GROUPS, the first pattern that is found counts. What is called by a general name cannot be told apart: the
rotation that the authors run eagerly is element-wise passes and copies, and the loss's products are matrix products.
"""

import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from store import short

REST = "everything else"
# cuBLAS calls its products nvjet, cutlass or xmma, cuDNN its attention fort_native_sdpa and fusion::compute_dot_do_o, Inductor
# its kernels triton_ or cpp_fused_ and what they fuse; torch's element-wise kernels tell by their functor what they do. Classes
# of autograd that are ours hold the time of C++ on a CPU that is no operator.
GROUPS = {
    "attention": (
        *(r"\battn_", "sdpa", "flash", "fmha", "scaled_dot_product", "flex_attention", "dot_do_o", "convert_dq"),
        r"\b_(Attend|LikeOut|OfClips)",
    ),
    "rotation": (r"\brope3d", r"\b_(Rotate|Turned|Consume)"),
    "optimiser": ("multi_tensor_apply", "_fused_adam", "_foreach", r"Optimizer\."),
    "norms, SwiGLU, GELU": (
        *("(add|swiglu)_?norm", r"\bsums_kernel", "layer_?norm", "GammaBeta", "cuComputeGradInput", "RowwiseMoments"),
        *("silu", "gelu"),
    ),
    "loss": (
        *(r"\b(contrast|sms)_", r"\b(prepare|diagonal|finish|scale|anchors)_kernel", "softmax", "nll_loss"),
        *("NormTwoOps", "vector_norm"),  # of the features
        r"\b(Mean|Each)(Backward)?$",
    ),
    "matrix products": (
        *("nvjet", "gemm", "gemv", "cutlass", "xmma", "splitK", "triton_tem_", "cublas"),
        r"^(aten|mkldnn)::(mm|addmm|bmm|baddbmm|convolution|_?mkl_linear|_linear_pointwise)$",
    ),
    "bias gradients (sums)": (r"reduce_kernel<.*sum_functor", r"^triton_(red|per)_fused_\w*sum", "^aten::sum$"),
    "casts and copies": (
        *("copy_kernel", "CatArray", "Memcpy", "Memset", "FillFunctor", "patchify"),
        r"^(triton_poi|cpp)_fused_(_to_copy|clone|cat|copy|transpose|view|permute|zeros|t|_)+\d*$",
        r"^aten::(copy_|cat|fill_|clone|contiguous|_to_copy|zero_)$",
    ),
    "element-wise passes": (
        *("elementwise_kernel", "^triton_(poi|red|per)_", "^cpp_fused_"),
        r"^aten::(add|sub|mul|div|neg|exp|pow|rsqrt|sigmoid)_?$",
    ),
}
_PATTERNS = {group: re.compile("|".join(patterns), re.IGNORECASE) for group, patterns in GROUPS.items()}
STEPS = {"cuda": 3, "cpu": 2}


def group_of(name):
    """The group of a kernel or an operator."""
    return next((group for group, pattern in _PATTERNS.items() if pattern.search(name)), REST)


def short_name(name):
    """A kernel's name as far as it tells what is done."""
    name = re.sub(r"\bvoid |at::native::|\(anonymous namespace\)::|<unnamed>::|c10::", "", name)
    return (name if len(name) <= 72 else name[:71] + "…").replace("|", "/")


def grouped(found, busy_ms, steps, wall_ms):
    """What a record keeps, of {name: (milliseconds, calls)} in so many steps: of one step the milliseconds and calls of each
    group, the sum of the milliseconds, the rest's largest three by name, and the share of the time that something ran."""
    ms, calls, rest = Counter(), Counter(), []
    for name, (spent, n) in found.items():
        group = group_of(name)
        ms[group] += spent / steps
        calls[group] += n / steps
        if group == REST:
            rest.append((spent / steps, short_name(name)))
    names = [group for group in (*GROUPS, REST) if group in ms]
    return {
        "ms": {group: ms[group] for group in names},
        "calls": {group: calls[group] for group in names},
        "total_ms": sum(ms.values()),
        "busy": busy_ms / steps / wall_ms,
        "rest": [f"{name} {short(spent)} ms" for spent, name in sorted(rest, reverse=True)[:3]],
    }


def of_trace(events):
    """({name: (milliseconds, calls)}, milliseconds in which something ran) of a Chrome trace's events on a GPU."""
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not ran:
        raise RuntimeError("the profiler saw no kernel")
    found, busy, end = {}, 0.0, 0.0
    for e in sorted(ran, key=lambda e: e["ts"]):
        spent, calls = found.get(e["name"], (0.0, 0))
        found[e["name"]] = spent + e["dur"] / 1e3, calls + 1
        busy += max(0.0, e["ts"] + e["dur"] - max(end, e["ts"])) / 1e3  # kernels may begin before the last one has ended
        end = max(end, e["ts"] + e["dur"])
    return found, busy


def on_gpu(step, steps):
    """{name: (milliseconds, calls)} of so many warm steps, and milliseconds in which something ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=steps, repeat=1)) as run:
        for _ in range(1 + steps):  # the first, as a session may lose its first kernels
            step()
            torch.cuda.synchronize()
            run.step()
    with tempfile.TemporaryDirectory() as folder:
        run.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return of_trace(events)


def of_attention(found):
    """Which attention ran, of {name: (milliseconds, calls)}: its kernels' names, the longest first; if none has such a name, as
    the products and the softmax of torch's "math" have none, the three that took longest."""
    names = sorted(found, key=lambda name: -found[name][0])
    return [short_name(n) for n in names if group_of(n) == "attention"] or [short_name(n) for n in names[:3]]


def measure(step, device, wall_ms):
    """What a record keeps of a warm step. wall_ms: the time of a step on a GPU without the profiler, which slows the launches
    down; on a CPU it does not, and the machine's mood changes more, so the share is of the profiled steps."""
    from torch.profiler import ProfilerActivity, profile

    from evaat_fast.ops._core.register import Operator

    steps = STEPS[device]
    if device == "cuda":
        return grouped(*on_gpu(step, steps), steps, wall_ms)
    # An eager call of ours runs the operator's body past the dispatcher, where the profiler would not see it.
    with (
        mock.patch.object(Operator, "at", lambda self, traced: self.dispatched),
        profile(activities=[ProfilerActivity.CPU]) as run,
    ):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wall_ms = (time.perf_counter() - began) / steps * 1e3
    found = {e.key: (e.self_cpu_time_total / 1e3, e.count) for e in run.key_averages()}
    return grouped(found, sum(ms for ms, _ in found.values()), steps, wall_ms)


def table(records, gpu):
    """Markdown of one shape's records, as lines: a row a group, a column a provider. No lines if none was profiled."""
    found = {r["provider"]: r["where"] for r in records if "where" in r}
    lines = [f"Not profiled: {name} ({w['fail']})." for name, w in found.items() if "fail" in w]
    shown = {name: w for name, w in found.items() if "ms" in w}
    if not shown:
        return lines
    of, calls = ("kernels, copies and fills", "launches") if gpu else ("operators by their own time", "calls")
    lines += [f"Where the time of a step goes, {of}: milliseconds, share of the sum, {calls}.", ""]
    lines += ["| | " + " | ".join(shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for group in (*GROUPS, REST):
        if any(group in w["ms"] for w in shown.values()):
            lines.append(f"| {group} | " + " | ".join(_cell(w, group) for w in shown.values()) + " |")
    lines.append(
        "| sum | " + " | ".join(f"{short(w['total_ms'])}, {sum(w['calls'].values()):.0f}" for w in shown.values()) + " |"
    )
    busy = "the device is busy" if gpu else "in operators, not in Python"
    lines.append(f"| {busy} | " + " | ".join(f"{100 * w['busy']:.0f} % of the step" for w in shown.values()) + " |")
    rest = [f"- {name}: {'; '.join(w['rest'])}" for name, w in shown.items() if w["rest"]]
    return [*lines, *(["", f"The largest of {REST}:", "", *rest] if rest else [])]


def _cell(found, group):
    ms = found["ms"].get(group)
    return f"{short(ms)}, {100 * ms / found['total_ms']:.1f} %, {found['calls'][group]:.0f}" if ms is not None else "–"
