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
import pairwise
import store
import torch
from timing import quantiles, time_gpu


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


def ordered(kind, least):
    """Its step, which takes pairs in the order of their captions' places from so many on."""
    return type("Ordered", (kind,), {"ORDERED_FROM": least})


def sms_cases(device, small):
    """A step of sms_loss by random places of a table, as training draws them, held to that of the order that is given."""
    from evaat_fast.ops.pairwise import cuda, step
    from evaat_fast.ops.pairwise.reference import Penalty
    from evaat_fast.ops.pairwise.relevancy import Labels

    def make(kind):
        def made(inputs):
            video, text, labels = (inputs[name] for name in ("video", "text", "labels"))
            work = step.Work(False, True, True, False, "cuda", None)
            costs = Penalty(pairwise.MARGIN, pairwise.RELAXATION, 1.1 / 240, "code")
            settings = step.SmsSettings(labels, inputs["own"], costs, True, work)
            return lambda: step.run(kind(video, text, None, None, settings))

        return made

    for N in (140,) if small else (2048, 4096):
        video, text = (torch.randn(N, 256, device=device).to(torch.float16 if small else torch.bfloat16) for _ in range(2))
        labels = Labels(torch.rand(2000, 2000, device=device), *torch.randint(0, 2000, (2, N), device=device))
        inputs = {"video": video, "text": text, "labels": labels, "own": labels.diagonal(torch.float32)}
        given = [x.float() for x in make(ordered(cuda.Sms, N + 1))(inputs)()]

        def check(results, given=given):
            assert all((x - y).norm() <= 4e-3 * y.norm() for x, y in zip(results, given, strict=True))

        variants = {"as given": make(ordered(cuda.Sms, N + 1)), "in order": make(ordered(cuda.Sms, 2))}
        yardstick = lambda i: pairwise.bare_products(i, "fwdbwd")  # noqa: E731
        work = pairwise.BENCH.work({"loss": "sms", "N": N, "E": 256}, "fwdbwd", 2)
        yield Case(f"sms N {N}", inputs, variants, check, yardstick, work)


ENTRIES = {
    "sms": Entry(
        "Does it pay at 2,048 pairs, too, to take them in the order of their captions' places in the table?",
        "in order 0.209 ms for 0.250 at 4,096 on an H200; at 2,048 labels at random places add 10 us, by their square, a sort "
        "and four gathers of rows as much",
        "cuda.Sms.ORDERED_FROM, 4,096: 2,048 if the order wins there by more than 2 %",
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
