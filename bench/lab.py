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
import store
import torch
from timing import quantiles, time_gpu

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
    """cases: (device, small) -> Case after Case; small for a CPU, which emulates the same launches."""

    question: str
    expected: str
    decides: str
    cases: Callable[[str, bool], Iterator[Case]]


def wide_cases(device, small):
    """Attention of turned heads of 128 of a projection: forward alone and, on a GPU, the gradient of the projection alone."""
    import attn
    from evaat_fast.kernels.attn import sm90

    from evaat_fast.ops.rope3d.rotation import Rotation
    from evaat_fast.ops.rope3d.table import table_of

    def by_gluon(**changed):
        def make(inputs):
            q, k, v = attn.split(inputs["qkv"].detach(), inputs["heads"])
            rotation = Rotation(None, None, inputs["grid"], 1, True, False, "triton")
            table, shape = table_of(rotation, 128, q.device), sm90.shape_of(q.shape[2], 128) | changed
            (B, H, N, D), lse = q.shape, q.new_empty(q.shape[:3], dtype=torch.float32)

            def step():
                out, turned = q.new_empty(B, N, H, D).transpose(1, 2), ops.rope3d(k, grid=inputs["grid"])
                sm90.forward(q, turned, v, out, lse, None, table, 1, D**-0.5, shape)
                return (out,)

            return step

        return make

    def alone(inputs):
        q, k, v = (x.detach() for x in attn.split(inputs["qkv"], inputs["heads"]))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)

    for T, B, patches in ((4, 1, 8),) if small else ((4, 32, 14), (8, 32, 14), (16, 32, 14)):
        shape = attn.shape(T, B, 1 if small else 12, 128, patches)
        inputs = attn.inputs(shape, torch.float16 if small else torch.bfloat16, device)
        (truth,) = attn.truth(harness.doubled(inputs), "fwd")()
        (low,) = attn.step(attn.torch_itself)(inputs, "fwd")()
        check = lambda found, low=low, truth=truth: harness.of_tests("check").close(found[0], low, truth)  # noqa: E731
        by_torch = lambda i: attn.step(attn.unpacked("sdpa"))(i, "fwd")  # noqa: E731
        variants = {"rotation, SDPA": by_torch, "Gluon": by_gluon()}
        if (shape["N"] - 1) % 128 < 64:  # else these are what is shipped
            variants["Gluon, 3 x 64 queries, 64 keys"] = by_gluon(**sm90.HALF_BLOCKS)
        yield Case(f"D 128, T {T}", inputs, variants, check, alone, attn.BENCH.work(shape, "fwd", 2))
        if small:
            continue
        (truth,), (low,) = (
            f(x, "bwd")() for f, x in ((attn.truth, harness.doubled(inputs)), (attn.step(attn.torch_itself), inputs))
        )
        check = lambda found, low=low, truth=truth: harness.of_tests("check").close(found[0], low, truth, "dqkv")  # noqa: E731
        by = lambda name: lambda i: attn.step(attn.unpacked(name))({**i, "qkv": i["qkv"].requires_grad_()}, "bwd")  # noqa: E731
        work = attn.BENCH.work(shape, "bwd", 2)
        yield Case(f"D 128, T {T}, bwd", inputs, {"rotation, SDPA": by("sdpa"), "Gluon": by("gluon")}, check, by("sdpa"), work)


def clip_cases(device, small):
    """Attention of packed clips, parts of one tensor, turned by their positions: forward, and that tensor's gradient alone."""
    import attn

    from evaat_fast.ops._core import dispatch
    from evaat_fast.ops.attn.clips import clip_positions, each_clip, sdpa_of_clips
    from evaat_fast.ops.attn.fused import attend
    from evaat_fast.ops.attn.plan import AttentionPlan
    from evaat_fast.ops.attn.reference import attention_reference
    from evaat_fast.ops.rope3d.reference import rope3d_reference
    from evaat_fast.ops.rope3d.rotate import rotate
    from evaat_fast.ops.rope3d.rotation import Rotation

    def separate(qkv, limits, rotation):
        """By the specifications, clip by clip."""
        q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)
        q, k = rope3d_reference(q, k, positions=rotation.positions, prefix_tokens=0)
        return each_clip(lambda *x: attention_reference(*x, 0.125), q, k, v, limits)

    def by(backend, ordered=False):
        def forward(qkv, inputs):
            (q, k, v), limits, rotation = qkv.permute(1, 2, 0, 3).unsqueeze(1), inputs["limits"], inputs["rotation"]
            if backend != "sdpa":
                call = AttentionPlan(rotation, None, True, limits, inputs["longest"], 0.125, backend, ordered)
                return attend(q, k, v, call)[0]
            q, k = rotate(q, k, rotation, owned=True) if inputs["turned"] else (q, k)
            return sdpa_of_clips(q, k, v, limits, inputs["longest"], 0.125)

        return attn.step(forward)

    half = torch.float16 if small else torch.bfloat16
    turns = dispatch.pick("rope3d", torch.device(device), half)
    frames = {"32 x 4 frames": [4] * 32, "8 x 1 to 16 frames": [1, 2, 4, 8, 16] * 8}
    for label, T in {"of 65 and 17 tokens": [4, 1]}.items() if small else frames.items():
        H, patches, side = (1, 16, 4) if small else (12, 196, 14)
        lengths = torch.tensor([1 + patches * t for t in T])
        limits, total = torch.cat((torch.zeros(1), lengths.cumsum(0))).int().to(device), int(lengths.sum())
        rotation = Rotation(None, clip_positions(limits, total, (16, side, side), None, 1), (), 0, True, False, turns)
        qkv, grad = torch.randn(total, 3, H, 64, device=device).to(half), torch.randn(total, H, 64, device=device).to(half)
        inputs = dict(qkv=qkv.requires_grad_(), grad=grad.transpose(0, 1)[None], limits=limits, rotation=rotation)
        inputs |= dict(longest=int(lengths.max()), turned=True)
        flop = 4 * H * 64 * int(lengths.square().sum())
        for mode in ("fwd", "bwd"):
            plain = attn.step(lambda x, i: separate(x, i["limits"], i["rotation"]))
            (truth,), (low,) = plain(harness.doubled(inputs), mode)(), plain(inputs, mode)()
            check = lambda found, low=low, truth=truth: harness.of_tests("check").close(found[0], low, truth)  # noqa: E731
            made = lambda name, mode=mode, **o: lambda i: by(name, **o)(i, mode)  # noqa: E731
            variants = {"rotation, SDPA": made("sdpa"), "Triton": made("triton"), "Gluon": made("gluon")}
            variants |= {"Gluon, in order": made("gluon", ordered=True)} if mode == "bwd" else {}
            yardstick = lambda i, mode=mode: by("sdpa")({**i, "turned": False}, mode)  # noqa: E731
            work = {"flop": flop * (1 if mode == "fwd" else 2.5)}
            yield Case(f"{label}, {mode}", inputs, variants, check, yardstick, work)


def info_nce_cases(device, small):
    """A step of InfoNCE, as the losses run it: the loss, both gradients and that of the scale."""
    import pairwise

    from evaat_fast.ops.pairwise import hopper, step, triton
    from evaat_fast.ops.pairwise.positives import Positives

    def by(module, rows=None):
        def make(inputs):
            settings = step.ContrastSettings(Positives(), False, step.Work(False, True, True, True, "triton", rows))
            video, text = (inputs[name].detach() for name in ("video", "text"))
            scale = torch.full((), pairwise.SCALE, device=video.device)
            return lambda: step.run(module.Contrast(video, text, scale, None, settings))

        return make

    for N, E in ((200, 64),) if small else ((4096, 256), (16384, 256), (32768, 256), (65536, 256)):
        inputs = pairwise.inputs({"loss": "clip", "N": N, "E": E}, torch.float16 if small else torch.bfloat16, device)
        found = [x() for x in (pairwise.low(inputs, "fwdbwd"), pairwise.CHUNKED(pairwise.to_double(inputs), "fwdbwd"))]
        low, truth = ([x.detach() for x in every] for every in found)

        def check(found, low=low, truth=truth):
            for name, *of in zip(("loss", "video", "text"), found, low, truth, strict=False):
                pairwise.check(*of, name)

        variants = {"Triton": by(triton), "Gluon": by(hopper)}
        if N == 32768:
            variants |= {f"Gluon, panels of {rows}": by(hopper, rows) for rows in (1024, 4096)}
        work = pairwise.BENCH.work({"N": N, "E": E}, "fwdbwd", 2)
        yardstick = (lambda i: pairwise.bare_products(i, "fwdbwd")) if N <= 32768 else by(triton)
        yield Case(f"N {N}, E {E}", inputs, variants, check, yardstick, work)


def early_cases(device, small):
    """The keys of a projection turned in one launch, and the forward pass of heads of 64 in the next."""
    import attn
    from evaat_fast.kernels.attn import sm90
    from evaat_fast.kernels.rope3d.rotate import rotate

    from evaat_fast.ops.rope3d.rotation import Rotation
    from evaat_fast.ops.rope3d.table import table_of

    def after(by_triton, early, **changed):
        def make(inputs):
            q, k, v = attn.split(inputs["qkv"].detach(), inputs["heads"])
            table = table_of(Rotation(None, None, inputs["grid"], 1, True, False, "triton"), 64, q.device)
            (B, H, N, D), lse = q.shape, q.new_empty(q.shape[:3], dtype=torch.float32)

            def step():
                out = q.new_empty(B, N, H, D).transpose(1, 2)
                if by_triton:
                    turned = q.new_empty(B, N, H, D).transpose(1, 2)
                    rotate([k], [turned], table, 1, True, False, early)
                else:
                    turned = ops.rope3d(k, grid=inputs["grid"])
                sm90.forward(q, turned, v, out, lse, None, table, 1, D**-0.5, sm90.shape_of(N, D) | changed)
                return (out,)

            return step

        return make

    for T, B, H, patches in ((4, 1, 1, 8),) if small else ((4, 32, 12, 14), (8, 32, 12, 14), (4, 16, 16, 16)):
        shape = attn.shape(T, B, H, 64, patches)
        inputs = attn.inputs(shape, torch.float16 if small else torch.bfloat16, device)
        (truth,) = attn.truth(harness.doubled(inputs), "fwd")()
        (low,) = attn.step(attn.torch_itself)(inputs, "fwd")()
        check = lambda found, low=low, truth=truth: harness.of_tests("check").close(found[0], low, truth)  # noqa: E731
        variants = {"as shipped": after(False, False), "turned by Triton": after(True, False)}
        if not small:  # what emulates has no launch that begins early
            variants["the same, early"] = after(True, True, **sm90.EARLY)
            variants["as shipped, early as keys end"] = after(False, False, **sm90.EARLY)
        by_torch = lambda i: attn.step(attn.unpacked("sdpa"))(i, "fwd")  # noqa: E731
        yield Case(f"N {shape['N']}", inputs, variants, check, by_torch, attn.BENCH.work(shape, "fwd", 2))


ENTRIES = {
    "clip": Entry(
        "Does InfoNCE in Gluon, whose exponentials lie under products, beat Triton's kernels?",
        "by count 0.1, 1.0, 3.3 to 4.0 and 13 to 16 ms at N 4k, 16k, 32k and 64k on an H200, where Triton's step takes 12.5 to "
        "15.7 at 32k; see the ledger",
        "whether `auto` takes ops/pairwise/hopper.py on Hopper, of 16-bit features whose rows are multiples of 64 up to 256, "
        "and from how many pairs on: where it is 1.05 x as fast; rows of a panel",
        info_nce_cases,
    ),
    "clips": Entry(
        "Does attention in Gluon of packed clips beat SDPA over a nested tensor behind our rotation, and Triton's?",
        "Gluon on an H200, by 1.7 us a block of 192 queries and 128 keys, 1.38 us one of 128 keys and 64 queries, and 0.3 us "
        "a tile that is looked up: forward 0.21 to 0.23 ms of 32 clips of 785 tokens (of one length 0.197) and 0.78 to 0.85 of "
        "40 of 197 to 3,137; gradients 0.44 to 0.48 and 1.85 to 2.1, in order 1.2 to 1.3 x that",
        "who serves packed clips in ops/attn/plan.py: Gluon where it is 1.05 x as fast as SDPA",
        clip_cases,
    ),
    "pdl": Entry(
        "Does the forward pass in Gluon, whose barriers are there by then, gain by a launch that overlaps with the one before, "
        "which turns the keys (programmatic dependent launch)?",
        "1.5 to 3 us of each case on an H200: 0.184, 0.582 and 0.188 ms where 0.187, 0.585 and 0.190 are shipped; half of it "
        "where the kernel before, in CUDA C++, lets it begin only as its own programs end",
        "PDL of SHAPES in kernels/attn/sm90.py, and a trigger in csrc/rope3d/rope3d.cu: from 2 us on",
        early_cases,
    ),
    "wide": Entry(
        "Does attention in Gluon of heads of 128 beat our rotation before cuDNN, and in which blocks?",
        "forward 3.4 to 4.3 ms at T 16 on an H200, the rotation of the keys included, for 3.87 (at T 4 and 8 it took 0.304 and "
        "0.961 for 0.359 and 1.08); gradients 0.71 to 0.88, 2.4 to 3.0 and 8.9 to 11.2 at T 4, 8 and 16, for 1.3, 3.4 and "
        "11.2, and a copy of them into the projection's",
        "SHAPES of kernels/attn/sm90.py; who serves heads of 128, by bench/decide.py",
        wide_cases,
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
