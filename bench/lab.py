"""Variants of kernels that await a GPU's verdict: python bench/lab.py [--list] [NAME ...]

An entry asks one question and says what is expected and what decides it. Its first variant is what is shipped, launched as the
others are. A variant is held to the rule of tests/check.py or of its own benchmark, then timed as a provider is; one that fails
has no time. When the verdict is in, the shipped configuration changes and the entry goes.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import norm
import pairwise
import store
import torch
from timing import copy_kernel, quantiles, time_gpu

from evaat_fast import ops
from evaat_fast.ops.rope3d.rotation import Rotation
from evaat_fast.ops.rope3d.table import torch_table


@dataclass(frozen=True)
class Case:
    """One shape of an entry. variants: name -> inputs -> step, as harness' providers; the first is the shipped one. check: gets
    what a step returns. yardstick: likewise a maker of steps, timed and not checked. work: {"flop": n} or {"byte": n}."""

    label: str
    inputs: dict
    variants: dict[str, Callable]
    check: Callable
    yardstick: Callable
    work: dict


@dataclass(frozen=True)
class Entry:
    """cases: (device, small) -> Case after Case; small for the interpreter, which runs the same launches on a CPU."""

    question: str
    expected: str
    decides: str
    cases: Callable[[str, bool], Iterator[Case]]


def close(results, low, truth):
    for ours, theirs, exact in zip(results, low, truth, strict=True):
        harness.of_tests("check").close(ours, theirs, exact)


def norm_launch(direction, channels, warps=None, stages=1):
    """channels: of a warp; warps: of a multiprocessor, stages: rows at a time on their way, backward."""

    def make(inputs):
        from evaat_fast.kernels.norm import add, rows, swiglu

        x, weight, bias = (inputs[n].detach() for n in ("x", "weight", "bias"))
        residual = inputs["residual"].detach() if "residual" in inputs else None
        (M, C), device, gated = inputs["dY"].shape, x.device, inputs["op"] == "swiglu_norm"
        normed, statistics = torch.empty_like(inputs["dY"]), torch.empty((2, M), device=device)
        total = x if residual is None else torch.empty_like(residual)
        settings = {"EXACT": x.dtype == torch.float32} if gated else {}
        settings |= rows.block(C, channels, **({"STAGES": stages} if direction == "backward" else {}))
        if gated:
            forward = lambda: swiglu.swiglu_norm_kernel[M,](x, weight, bias, normed, statistics, M, 1e-6, **settings)  # noqa: E731
        else:
            given = (x, residual, weight, bias, normed, None if residual is None else total, statistics, M, 1e-6)
            forward = lambda: add.add_norm_kernel[M,](*given, **settings)  # noqa: E731
        if direction == "forward":
            return lambda: (forward(), [normed] if total is x else [normed, total])[1]
        forward()
        P = rows.programs(M, device, warps, settings["num_warps"])
        sums, dweight, dbias = torch.empty((P, 2, C), device=device), torch.empty_like(weight), torch.empty_like(bias)
        dx, dr = torch.empty_like(x), None if residual is None else torch.empty_like(residual)
        if gated:
            kernel, places = swiglu.swiglu_norm_backward_kernel, (inputs["dY"], x, weight, statistics, dx, sums, M)
        else:
            dtotal = inputs.get("dtotal")
            kernel, places = add.add_norm_backward_kernel, (inputs["dY"], dtotal, total, weight, statistics, dx, dr, sums, M)

        def backward():
            kernel[P,](*places, **settings)
            rows.add_up(sums, dweight, dbias)
            return [x for x in (dx, dr, dweight, dbias) if x is not None]

        return backward

    return make


def norm_cases(device, small):
    """The backward passes; what their sums of weights are is compared by tests/test_norm.py."""
    M, dtype = (19, torch.float16) if small else (64 * 785, torch.bfloat16)
    tried = {
        ("swiglu_norm", 2048): [(512, 8, 1), (256, 16, 1), (256, 16, 2), (256, 16, 3), (512, 8, 2), (512, 8, 3)],
        ("swiglu_norm", 2730): [(1024, 8, 1), (256, 16, 1), (256, 16, 2), (256, 16, 3), (512, 8, 2), (512, 8, 3)],
        ("layer_norm", 768): [(512, 16, 1), (512, 20, 1), (512, 18, 2), (512, 18, 3), (256, 28, 1), (256, 24, 2), (256, 28, 3)],
        ("add_norm", 768): [(512, 16, 1), (512, 16, 2), (512, 16, 3), (256, 28, 1), (256, 20, 2), (256, 20, 3)],
    }
    for (op, C), variants in tried.items():
        shape = {"op": op, "M": M, "C": C}
        inputs = norm.make_inputs(shape, dtype, device)
        head = {n: x[:512] if isinstance(x, torch.Tensor) and x.ndim == 2 else x for n, x in inputs.items()}
        part = slice(2, 4) if op == "add_norm" else slice(1, 2)
        low, truth = ([x.detach() for x in norm.EAGER_STEP(i, "fwdbwd")()[part]] for i in (head, harness.doubled(head)))
        check = lambda results, low=low, truth=truth: close([x[:512] for x in results[: len(low)]], low, truth)  # noqa: E731
        moved = norm.work(shape, "fwdbwd", dtype.itemsize)["byte"] - norm.work(shape, "fwd", dtype.itemsize)["byte"]

        def yardstick(inputs, moved=moved):
            source = torch.zeros(moved // 8, device=inputs["x"].device)
            target = torch.empty_like(source)
            return lambda: copy_kernel(source, target)

        launches = {"{} channels a warp, {} warps, {} stages".format(*x): norm_launch("backward", *x) for x in variants}
        yield Case(f"{op} {C} backward", inputs, launches, check, yardstick, {"byte": moved})


def rotation_launch(heads, elements, warps):
    """Triton's rotation, that of heads and elements a program; heads None: CUDA C++, or what serves a CPU."""

    def make(inputs):
        from evaat_fast.kernels.launch import Rows
        from evaat_fast.kernels.launch import table_of as table_rows
        from evaat_fast.kernels.rope3d import rotate as kernels

        from evaat_fast.ops.rope3d.rotate import turn

        rotation, call, (q, k, v) = inputs["rotation"], inputs["call"], (inputs[x] for x in "qkv")
        B, H, N, D = q.shape
        packed = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
        xs = {"apart": [q, k], "packed": list(packed[:2]), "packed gradient": [q, k, v]}[call]
        outs = {"apart": [torch.empty_like(x) for x in xs], "packed": xs, "packed gradient": list(packed)}[call]
        if heads is None:
            backend = "cuda" if xs[0].is_cuda else "cpu"
            rotation = dataclasses.replace(rotation, backend=backend)
            return lambda: (turn(xs, outs, rotation), outs)[1]
        S, first = kernels.shape_of(D, True, rotation.inverse, False, heads, elements), 1 if outs is xs else 0
        places = [Rows(x, *x.stride()[:3]) for x in xs] + [None] * (3 - len(xs))
        places += [None] * 3 if outs is xs else [Rows(x, *x.stride()[:3]) for x in outs] + [None] * (3 - len(outs))
        grid = (-(-(N - first) // S.BLOCK_N.value), len(xs) * -(-H // heads), B)
        counts = (H, H, N, 1, first, 0)
        launch = lambda: kernels.rope3d_kernel[grid](*places, table_rows(rotation.table), *counts, S, num_warps=warps)  # noqa: E731
        return lambda: (launch(), outs)[1]

    return make


def rotation_cases(device, small):
    """The three calls of a model: q and k apart, the packed projection in place, and its gradient, written anew with dV."""
    dtype = torch.float16 if small else torch.bfloat16
    B, H, D, grids = (2, 5, 16, [(2, 3, 7)]) if small else (32, 12, 64, [(4, 14, 14), (16, 14, 14)])
    variants = {f"{h} heads, {e} elements, {w} warps": rotation_launch(h, e, w) for h, e, w in ROTATIONS}
    variants["CUDA C++"] = rotation_launch(None, 0, 0)
    for cells in grids:
        N = 1 + math.prod(cells)
        plain = Rotation(None, None, cells, 1, True, False, "triton")
        table = torch_table(plain, D, torch.float32, torch.device(device))
        for call in ("apart", "packed", "packed gradient"):
            back = call == "packed gradient"
            rotation = dataclasses.replace(plain, inverse=back, table=table)
            # In the memory order in which attention leaves its gradients.
            q, k, v = (torch.randn(B, N, H, D, device=device).to(dtype).transpose(1, 2) for _ in range(3))
            xs = [q, k, v] if back else [q, k]
            options = dict(grid=cells, inverse=back)
            head = [x[:1] for x in xs[:2]]
            low = [*ops.rope3d(*head, **options, backend="reference"), *(x[:1] for x in xs[2:])]
            truth = [*ops.rope3d(*(x.double() for x in head), **options, backend="reference"), *(x[:1] for x in xs[2:])]
            check = lambda results, low=low, truth=truth: close([x[:1] for x in results], low, truth)  # noqa: E731
            inputs = {"q": q, "k": k, "v": v, "call": call, "rotation": rotation}
            moved = 2 * len(xs) * xs[0].numel() * dtype.itemsize

            def yardstick(inputs, moved=moved, device=device):
                source = torch.zeros(moved // 8, device=device)
                target = torch.empty_like(source)
                return lambda: copy_kernel(source, target)

            yield Case(f"{call}, N {N}", inputs, variants, check, yardstick, {"byte": moved})


# (heads, elements of one head, warps) of a program; the first is what is shipped.
ROTATIONS = [(4, 2048, 4), (4, 1024, 4), (4, 2048, 8), (2, 2048, 4), (6, 1024, 4), (6, 2048, 8)]


def sms_cases(device, small):
    """A step of sms_loss. Up to 4,096 pairs it is held to float64, beyond to the shipped backend."""
    for N in (64,) if small else (32768, 4096, 16384, 65536):
        shape = {"loss": "sms", "N": N, "E": 256}
        inputs = pairwise.inputs(shape, torch.float16 if small else torch.bfloat16, device)
        steps = {"Triton": pairwise.sms_by("triton"), "CUDA C++": pairwise.sms_by("cuda")}
        variants = {name: lambda i, make=make: make(i, "fwdbwd") for name, make in steps.items()}
        exact = N <= 4096
        truth = (pairwise.CHUNKED if exact else steps["Triton"])(pairwise.to_double(inputs) if exact else inputs, "fwdbwd")()
        low = pairwise.low(inputs, "fwdbwd")() if exact else truth

        def check(results, low=low, truth=truth):
            for name, *these in zip(("loss", "video", "text"), results, low, truth, strict=True):
                pairwise.check(*(x.detach() for x in these), name)

        yardstick = lambda i: pairwise.bare_products(i, "fwdbwd")  # noqa: E731
        yield Case(f"sms N {N}", inputs, variants, check, yardstick, pairwise.BENCH.work(shape, "fwdbwd", 2))


ENTRIES = {
    "rope3d": Entry(
        "How many heads and elements should a program of Triton's rotation take, now that all loads come first?",
        "4 heads and 2,048 elements have 128 bytes a thread in flight, twice what CUDA C++ has, in 28 warps a multiprocessor "
        "for 32: 0.041 and 0.156 ms apart, 0.0425 and 0.163 packed, as CUDA C++ (0.0408, 0.1559, 0.0424, 0.1624 on an H200); "
        "the packed gradient with dV 0.062 and 0.235",
        "the fastest of each, if by more than 3 %; and CUDA C++ leaves `auto` if Triton is faster in every row",
        rotation_cases,
    ),
    "norm": Entry(
        "How many warps of the norms' backward passes should a multiprocessor have?",
        "those that registers leave room for at a time: 12 for swiglu_norm at 2,048 channels, where 8 and 16 took 0.367 and "
        "0.373 ms on an H200 and a copy 0.248; about 0.30",
        "the fastest of each, if by more than 3 %",
        norm_cases,
    ),
    "sms": Entry(
        "Is sms_loss in CUDA C++ right on a GPU, and faster than Triton?",
        "46 instructions a pair for labels by index, where Triton's took 106: 0.08, 1.1, 4.1 and 16.5 ms a step at N 4k, 16k, "
        "32k and 64k, where Triton took 0.35 and 15.6 ms at 4k and 32k",
        "if right and at least as fast at 4k and 32k, `auto` takes it for 16-bit features",
        sms_cases,
    ),
}


def run(name, seconds, stop):
    """Records of an entry's variants, one by one as they are timed; none is begun after `stop`, by time.monotonic()."""
    for case in ENTRIES[name].cases("cuda", False):
        base = None
        for variant, make in {"yardstick": case.yardstick, **case.variants}.items():
            if time.monotonic() > stop:
                return
            record = {"entry": name, "case": case.label, "variant": variant}
            try:
                if variant != "yardstick":
                    case.check(make(case.inputs)())
                found = time_gpu(make, case.inputs, seconds)
                record |= {"ms": quantiles(found.seconds), "queued_ms": found.queued * 1e3, "work": case.work}
            except Exception as error:  # too much shared memory for this GPU is a verdict, too
                record["fail"] = f"{type(error).__name__}: {error}"
            else:
                base = base or record["ms"]["p50"]
                record["ratio"] = record["ms"]["p50"] / base
            yield record


def show(record):
    if "fail" in record:
        return f"  {record['case']:<20} {record['variant']:<34} FAIL: {record['fail'].strip().splitlines()[0][:160]}"
    unit, amount = next(iter(record["work"].items()))
    rate, ms = amount / record["ms"]["p50"] / 1e9, record["ms"]["p50"]
    rate = f"{rate:8.1f} TFLOP/s" if unit == "flop" else f"{rate:8.3f} TB/s"
    return f"  {record['case']:<20} {record['variant']:<34} {ms:9.4f} ms {rate}  {record['ratio']:.3f} x yardstick"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENTRIES)}; all by default")
    parser.add_argument("--list", action="store_true", help="what each entry asks")
    parser.add_argument("--seconds", type=float, default=0.12, help="time spent per variant")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no variant after so many")
    parser.add_argument("--json", type=Path, default=harness.HERE.parent / "build" / "bench" / "lab.json")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in ENTRIES]
    if unknown:
        parser.error(f"unknown entries {', '.join(unknown)}; there are {', '.join(ENTRIES)}")
    stop, results = time.monotonic() + args.budget, {"environment": None, "records": []}
    for name in args.names or ENTRIES:
        entry = ENTRIES[name]
        print(f"{name}: {entry.question}\n  expected: {entry.expected}\n  decides: {entry.decides}")
        if args.list:
            continue
        if not torch.cuda.is_available():
            sys.exit("lab.py: needs a GPU; --list does not")
        results["environment"] = results["environment"] or harness.environment("cuda")
        for record in run(name, args.seconds, stop):
            print(show(record))
            results["records"].append(record)
            store.write(args.json, results)


if __name__ == "__main__":
    main()
