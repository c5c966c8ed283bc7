"""Variants of kernels that await a GPU's verdict: python bench/lab.py [--list] [NAME ...]

An entry asks one question and says what is expected and what decides it. Its first variant is what is shipped, launched as the
others are. A variant is held to the rule of tests/check.py or of its own benchmark, then timed as a provider is; one that fails
has no time. When the verdict is in, the shipped configuration changes and the entry goes.
"""

import argparse
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
from rope3d import angles
from timing import cloned, copy_kernel, quantiles, time_gpu
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops


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


def clips(shapes, device, count, small):
    """(B, H, N, D, grid, tensors q, k, ... [B, H, N, D] in the memory order of the model, their table) for each shape."""
    generator, D = torch.Generator(device).manual_seed(0), 64
    dtype = torch.float16 if small else torch.bfloat16  # which the interpreter has not
    for B, H, grid in shapes:
        N = 1 + grid[0] * grid[1] * grid[2]
        make = lambda *size: torch.randn(size, generator=generator, device=device).to(dtype).transpose(1, 2)  # noqa: E731
        turns = angles(grid, ops.joint_freqs(D), device)[1:]
        table = torch.stack((turns.cos(), turns.sin())).float()[:, None, None]  # [2, 1, 1, N - 1, D/2]
        yield B, H, N, D, grid, [make(B, N, H, D) for _ in range(count)], table


MODEL = [(32, 12, (4, 14, 14)), (32, 12, (16, 14, 14))]


def close(results, low, truth):
    for ours, theirs, exact in zip(results, low, truth, strict=True):
        harness.of_tests("check").close(ours, theirs, exact)


def parts(inputs):
    """q and k [B, H, N, D]: two tensors, or views of the one [B, N, 3, H, D] that the qkv projection leaves."""
    return (inputs["q"], inputs["k"]) if "q" in inputs else inputs["qkv"].permute(2, 0, 3, 1, 4)[:2].unbind()


def rope3d_launch(heads, warps, elements):
    """elements: of one head in a program. The packed tensor is turned in place, the others are not."""

    def make(inputs):
        import triton
        from evaat_fast.kernels.launch import Rows, table_of
        from evaat_fast.kernels.rope3d.rotate import rope3d_kernel, shape_of

        table, first = inputs["table"], 0 if "q" in inputs else 1
        q, k = parts(cloned(inputs) if first else inputs)
        B, H, N, D = q.shape
        outs = (q, k) if first else (torch.empty_like(q), torch.empty_like(k))
        S = shape_of(D, True, False, False, heads, elements)
        places = [Rows(x, *x.stride()[:3]) for x in (q, k, *outs)]
        programs = (B * triton.cdiv(N - first, S.BLOCK_N.value), 2 * triton.cdiv(H, heads))

        def step():
            rope3d_kernel[programs](*places, table_of(table), H, H, N, 1, first, S, num_warps=warps)
            return outs

        return step

    return make


def rope3d_cases(device, small):
    names = ((4, 4, 2048), (6, 4, 1024), (12, 4, 1024), (4, 4, 1024), (6, 2, 1024), (6, 2, 512))
    variants = {f"{h} heads, {w} warps, {n} elements": rope3d_launch(h, w, n) for h, w, n in names}

    def yardstick(inputs):
        outs = [torch.empty_like(x) for x in parts(inputs)]
        return lambda: [copy_kernel(x, out) for x, out in zip(parts(inputs), outs, strict=True)]

    for B, H, N, _, grid, (q, k), table in clips([(1, 6, (2, 3, 4))] if small else MODEL, device, 2, small):
        low = ops.rope3d(q[:1], k[:1], grid, backend="reference")
        truth = ops.rope3d(q[:1].double(), k[:1].double(), grid, backend="reference")
        check = lambda outs, low=low, truth=truth: close([x[:1] for x in outs], low, truth)  # noqa: E731
        work, packed = {"byte": 4 * q.numel() * q.element_size()}, torch.stack([x.transpose(1, 2) for x in (q, k, q)], 2)
        for what, inputs in (("", {"q": q, "k": k}), (" packed", {"qkv": packed})):
            yield Case(f"B {B} H {H} N {N}{what}", inputs | {"table": table}, variants, check, yardstick, work)


def attention_launch(rows, columns, warps, stages):
    def make(inputs):
        from evaat_fast.kernels.attn import forward as kernels

        q, k, v, table = (inputs[x] for x in ("q", "k", "v", "table"))
        B, H, N, D = q.shape
        out, lse = torch.empty_like(q), torch.empty((B, H, N), dtype=torch.float32, device=q.device)
        call, S = kernels.Call(1, H, N, N, 1, None, 0, D**-0.5), kernels.shape_of(q, True, None, rows, columns)
        places = (*(kernels.Rows(x, *x.stride()[:3]) for x in (q, k, v, out, lse)), None, kernels.table_of(table))

        def step():
            launch = kernels.attn_forward_kernel[kernels.programs(call, N, rows, B)]
            launch(*places, call, S, num_warps=warps, num_stages=stages)
            return (out,)

        return step

    return make


def attention(q, k, v, grid):
    return scaled_dot_product_attention(*ops.rope3d(q, k, grid, backend="reference"), v)


def turned_keys(k, grid):
    """As the kernels take them; those turn their queries alone."""
    return torch.empty_like(k).copy_(ops.rope3d(k, None, grid, backend="reference"))


def attention_cases(device, small):
    names = ((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4))
    variants = {f"{m} x {n}, {w} warps, {s} stages": attention_launch(m, n, w, s) for m, n, w, s in names}
    yardstick = lambda i: lambda: scaled_dot_product_attention(i["q"], i["k"], i["v"])  # noqa: E731
    for B, H, N, D, grid, (q, k, v), table in clips([(1, 2, (2, 8, 9))] if small else MODEL, device, 3, small):
        first = [x[:1] for x in (q, k, v)]  # whose scores in float64 fit
        low, truth = attention(*first, grid), attention(*(x.double() for x in first), grid)
        check = lambda outs, low=low, truth=truth: close([outs[0][:1]], [low], [truth])  # noqa: E731
        inputs = {"q": q, "k": turned_keys(k, grid), "v": v, "table": table}
        yield Case(f"B {B} H {H} N {N}", inputs, variants, check, yardstick, {"flop": 4 * B * H * N**2 * D})


def backward_launch(**changed):
    """The two passes. changed: (queries, keys, warps, stages) of the kernel named "keys" or "queries"; else as shipped."""

    def make(inputs):
        from evaat_fast.kernels.attn import backward as kernels

        q, k, v, do, lse, delta, table = (inputs[x] for x in ("q", "k", "v", "do", "lse", "delta", "table"))
        B, H, N, D = q.shape
        outs = [torch.empty_like(q) for _ in range(3)]
        call = kernels.Call(1, H, N, N, 1, None, 0, D**-0.5)
        places = [kernels.Rows(x, *x.stride()[:3]) for x in (q, k, v, do, lse)]
        dq, dk, dv = (kernels.Rows(x, *x.stride()[:3]) for x in outs)
        table = kernels.table_of(table)

        def blocks(kind):
            if kind not in changed:
                rows, columns, launch = kernels.blocks_of(kind, q.dtype, D, kernels.generation(q.device))
            else:
                rows, columns, *launch = changed[kind]
                launch = dict(zip(("num_warps", "num_stages"), launch, strict=True))
            return (rows, columns), kernels.shape_of(q, True, None, rows, columns), launch

        ((_, columns), keys, of_keys), ((rows, _), queries, of_queries) = blocks("keys"), blocks("queries")

        def step():
            into = (None, kernels.NOTHING.value)
            kernels.attn_keys_kernel[kernels.programs(call, N, columns, B)](
                *places, delta, dk, dv, *into, table, call, keys, **of_keys
            )
            kernels.attn_queries_kernel[kernels.programs(call, N, rows, B)](
                *places, delta, dq, table, call, queries, **of_queries
            )
            return outs

        return step

    return make


def backward_cases(device, small):
    blocks = {
        "keys": ((64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3)),
        "queries": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    }
    variants = {"as shipped": backward_launch()}
    for kind, (m, n, w, s) in ((kind, block) for kind, of in blocks.items() for block in of):
        variants[f"{kind} {m} x {n}, {w} warps, {s} stages"] = backward_launch(**{kind: (m, n, w, s)})

    def gradients(xs, do, grid):
        xs = [x.detach().requires_grad_() for x in xs]
        return torch.autograd.grad(attention(*xs, grid), xs, do)

    def yardstick(inputs):
        xs = [inputs[x].detach().requires_grad_() for x in "qkv"]
        out = scaled_dot_product_attention(*xs)
        return lambda: torch.autograd.grad(out, xs, inputs["do"], retain_graph=True)

    for B, H, N, D, grid, (q, k, v, do), table in clips([(1, 2, (2, 8, 9))] if small else MODEL, device, 4, small):
        from evaat_fast.kernels.attn.forward import forward

        first = [x[:1] for x in (q, k, v, do)]
        exact = [x.double() for x in first]
        low, truth = gradients(first[:3], first[3], grid), gradients(exact[:3], exact[3], grid)
        check = lambda outs, low=low, truth=truth: close([x[:1] for x in outs], low, truth)  # noqa: E731
        turned, out, k, lse = torch.empty_like(q), torch.empty_like(q), turned_keys(k, grid), q.new_empty((B, H, N)).float()
        forward(q, k, v, out, lse, turned, table, 1, True, D**-0.5, None)
        inputs = {"q": turned, "k": k, "v": v, "do": do, "lse": lse, "table": table}
        inputs["delta"] = (out.float() * do.float()).sum(-1)
        yield Case(f"B {B} H {H} N {N}", inputs, variants, check, yardstick, {"flop": 10 * B * H * N**2 * D})


def panels_of(rows):
    """A step in panels of so many rows; None: as shipped."""

    def make(inputs):
        from evaat_fast.ops.pairwise.check import Options
        from evaat_fast.ops.pairwise.contrast import contrast
        from evaat_fast.ops.pairwise.sms import Penalty, max_margin

        video, text, how = inputs["video"], inputs["text"], Options(panel_rows=rows)
        costs = Penalty(pairwise.MARGIN, pairwise.RELAXATION, pairwise.EPS, "code")

        def step():
            if inputs["loss"] == "sms":
                loss = max_margin("sms_loss", video, text, pairwise.our_labels(inputs), None, costs, how)
            else:
                loss = contrast("clip_loss", video, text, pairwise.SCALE, None, how)
            return loss.detach(), *torch.autograd.grad(loss, (video, text))

        return step

    return make


def panels_cases(device, small):
    N, E = (100, 32) if small else (32768, 256)
    variants = {"as shipped": panels_of(None)}
    variants |= {f"{rows} rows": panels_of(rows) for rows in ((32, 64) if small else (128, 512, 1024, 2048, 4096))}
    for loss in ("sms", "clip"):
        shape = {"loss": loss, "N": N, "E": E}
        inputs = pairwise.inputs(shape, torch.float32 if small else torch.bfloat16, device)
        truth = [x.detach() for x in pairwise.CHUNKED(pairwise.to_double(inputs), "fwdbwd")()]
        low = [x.detach() for x in pairwise.low(inputs, "fwdbwd")()]

        def check(results, low=low, truth=truth):
            for ours, theirs, exact in zip(results, low, truth, strict=True):
                pairwise.check(ours, theirs, exact, "a result")

        yardstick = lambda i: pairwise.bare_products(i, "fwdbwd")  # noqa: E731
        yield Case(store.label(shape), inputs, variants, check, yardstick, pairwise.BENCH.work(shape, "fwdbwd", 2))


def norm_launch(direction, channels, warps=None):
    """channels: of a warp; warps: of a multiprocessor, backward."""

    def make(inputs):
        from evaat_fast.kernels.norm import add, rows, swiglu

        x, weight, bias = (inputs[n].detach() for n in ("x", "weight", "bias"))
        residual = inputs["residual"].detach() if "residual" in inputs else None
        (M, C), device, gated = inputs["dY"].shape, x.device, inputs["op"] == "swiglu_norm"
        normed, statistics = torch.empty_like(inputs["dY"]), torch.empty((2, M), device=device)
        total = x if residual is None else torch.empty_like(residual)
        settings = {"EXACT": x.dtype == torch.float32} if gated else {}
        settings |= rows.block(C, channels)
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
        ("swiglu_norm", 2048): [(512, 12), (512, 8), (256, 16), (256, 12)],
        ("swiglu_norm", 2730): [(1024, 8), (1024, 4), (512, 8)],
        ("layer_norm", 768): [(512, 16), (512, 20), (512, 24)],
        ("add_norm", 768): [(512, 16), (512, 18), (512, 20)],
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

        launches = {f"{c} channels a warp, {w} warps": norm_launch("backward", c, w) for c, w in variants}
        yield Case(f"{op} {C} backward", inputs, launches, check, yardstick, {"byte": moved})


ENTRIES = {
    "norm": Entry(
        "How many warps of the norms' backward passes should a multiprocessor have?",
        "those that registers leave room for at a time: 12 for swiglu_norm at 2,048 channels, where 8 and 16 took 0.367 and "
        "0.373 ms on an H200 and a copy 0.248; about 0.30",
        "the fastest of each, if by more than 3 %",
        norm_cases,
    ),
    "rope3d": Entry(
        "Do smaller blocks bring rope3d nearer to a copy, of two tensors and of a packed one in place?",
        "90 and 84 % of a copy as shipped, on an H200 at N 785 and 3137; of 9 blocks only 6 heads, 4 warps and 1,024 elements "
        "was faster at both, by 1 and 4 %. Packed: 83 and 78 % of a copy in bench/rope3d.py, CUDA C++ 95 and 92 %",
        "the fastest at both N of both kinds, if by more than 3 %",
        rope3d_cases,
    ),
    "attention": Entry(
        "Which block of the portable Triton forward pass is fastest, beside the one shipped for Hopper?",
        "on an H200 as shipped 0.2125 and 2.444 ms at N 785 and 3137, cuDNN 0.2122 and 2.433; 64 x 64 with 4 warps and 3 "
        "stages 0.2099 and 2.743. A fourth stage hides more of the loads where shared memory allows it",
        "the fastest at both N, if by more than 3 %; whether `auto` serves it, bench/attn.py decides, with its backward pass",
        attention_cases,
    ),
    "panels": Entry(
        "How many rows should a panel of SMS and CLIP have?",
        "SMS on an H200 at N 32k: 18.45 ms with the 512 rows shipped, 16.59, 15.50 and 15.14 with 1,024, 2,048 and 4,096, at "
        "2, 4 and 8 times a panel's memory. CLIP failed its check there, which took a truncated sum for an error, and is open",
        "the fastest of both losses, as the panel's bytes in ops/pairwise",
        panels_cases,
    ),
    "backward": Entry(
        "Which blocks of the two Triton backward kernels are fastest?",
        "with delta and the keys' rotation 0.935 and 9.80 ms on an H200 at N 785 and 3137, rope3d and cuDNN 0.673 and 6.85; "
        "forward, a third stage and 64 keys of 128 took 40 and 29 % off",
        "each kernel's fastest at both N, if the sum falls by more than 3 %; then both changes together",
        backward_cases,
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
