"""Who serves attention: python bench/decide.py [--check] [JSON ...]

From what is committed under bench/results it writes evaat_fast/ops/_core/measured.py, which dispatch reads and nobody edits.
Of a compute capability, a head dim and a pass, forward or the gradients alone, Gluon serves where it was at least FASTER times
as fast as our rotation before cuDNN's attention at every length that was measured, the newest of each; it serves a call that
wants gradients where both passes are. --check fails if the file is not what the results say. With JSON of a run it says what
these alone would decide, and writes nothing.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from store import short

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "evaat_fast" / "ops" / "_core" / "measured.py"
FASTER = 1.05
PASSES = {"fwd": "forward", "bwd": "gradients"}

# Of attn.py: the first that a case has is ours. By its own name it is Gluon; without one it is what `auto` served then.
OURS, THEIRS = ("evaat joint_attention, Gluon", "evaat joint_attention"), "our rope3d + sdpa cudnn"
# Of the lab's entry "wide": its cases, of frames of 196 patches and a class token, and what is shipped by its names.
CASE = re.compile(r"D (\d+), T (\d+)(, bwd)?")
OURS_WIDE, THEIRS_WIDE = ("Gluon", "Gluon, 2 x 64 queries, 128 keys"), "rotation, SDPA"
# Of results that do not say it.
CAPABILITIES = {"NVIDIA H200": (9, 0), "NVIDIA H100 80GB HBM3": (9, 0)}


@dataclass(frozen=True)
class Evidence:
    """One case of one file. key: what of it newer evidence replaces. faster: theirs' time over ours; 0 of a wrong result."""

    capability: tuple[int, int]
    head_dim: int
    mode: str
    N: int
    key: tuple
    faster: float
    utc: str
    source: str


def evidence(source, data):
    """Of one JSON, by attn.py or the lab."""
    cases = {}
    for r in data["records"]:
        if data.get("op") == "attn" and r["mode"] in PASSES and r["dtype"] == "bf16":
            s = r["shape"]
            key, name = (s["D"], s["N"], r["mode"], s["B"], s["H"]), r["provider"]
        elif r.get("entry") == "wide" and (m := CASE.fullmatch(r["case"])):
            key, name = (int(m[1]), 1 + 196 * int(m[2]), "bwd" if m[3] else "fwd", "wide"), r["variant"]
        else:
            continue
        cases.setdefault(key, {})[name] = r
    e = data["environment"]
    for key, found in cases.items():
        ours = next((found[name] for name in (*OURS, *OURS_WIDE) if name in found), None)
        theirs = next((found[name] for name in (THEIRS, THEIRS_WIDE) if "ms" in found.get(name, ())), None)
        if ours is None or theirs is None or not ("ms" in ours or "fail" in ours):
            continue
        if e["device"] not in CAPABILITIES and "capability" not in e:
            raise ValueError(f"{source}: of what compute capability is {e['device']}?")
        capability = tuple(e.get("capability") or CAPABILITIES[e["device"]])
        faster = theirs["ms"]["p50"] / ours["ms"]["p50"] if "ms" in ours else 0.0
        D, N, mode, *_ = key
        yield Evidence(capability, D, mode, N, (capability, *key), faster, e["utc"], f"{source} of {e['commit']}")


def newest(found):
    """One for each case, in a steady order."""
    last = {}
    for e in sorted(found, key=lambda e: e.utc):
        last[e.key] = e
    return [last[key] for key in sorted(last, key=str)]


def decided(found):
    """{(capability, head dim): the passes in which Gluon serves}."""
    table = {}
    for e in found:
        table.setdefault((e.capability, e.head_dim), {}).setdefault(PASSES[e.mode], []).append(e.faster >= FASTER)
    passes = {key: tuple(p for p in PASSES.values() if all(of.get(p, [False]))) for key, of in table.items()}
    return {key: p for key, p in sorted(passes.items()) if p}


def lines_of(found):
    """What was measured, a line a capability, head dim and pass."""
    rows = {}
    for e in found:
        rows.setdefault((e.capability, e.head_dim, PASSES[e.mode]), []).append(e)
    for (capability, head_dim, name), of in sorted(rows.items()):
        of = sorted(of, key=lambda e: (e.N, str(e.key)))
        at = ", ".join(f"{short(e.faster) if e.faster else 'wrong'} x at N {e.N}" for e in of)
        sources = ", ".join(sorted({e.source for e in of}))
        yield f"{'.'.join(map(str, capability))}, heads of {head_dim}, {name}: {at} ({sources})"


def module(found):
    """The text of measured.py."""
    head = '"""Where attention in Gluon is faster: made by bench/decide.py from bench/results, not edited."""'
    comments = [f"# {part}" for line in lines_of(found) for part in wrapped(line)]
    which = f"# (compute capability, head dim): the passes that are at least {FASTER} x as fast at all of these lengths. A call"
    table = [f"    ({on}, {head_dim}): {json.dumps(passes)}," for (on, head_dim), passes in decided(found).items()]
    return "\n".join([head, "", *comments, "", which, "# that wants gradients asks for both.", "GLUON = {", *table, "}", ""])


def wrapped(line, width=124):
    """The line in parts of at most so many characters."""
    parts = [""]
    for word in line.split():
        if len(parts[-1]) + len(word) >= width:
            parts.append("  ")
        parts[-1] += (" " if parts[-1].strip() else "") + word
    return parts


def committed():
    """Of all results."""
    for path in sorted(HERE.glob("results/*/attn.json")) + sorted(HERE.glob("results/*/lab/*.json")):
        yield from evidence(path.relative_to(HERE / "results").as_posix(), json.loads(path.read_text()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if measured.py is not what the results say")
    parser.add_argument("json", nargs="*", type=Path, metavar="JSON", help="of a run: say what it alone would decide")
    args = parser.parse_args(argv)
    found = (
        newest(e for path in args.json for e in evidence(path.name, json.loads(path.read_text())))
        if args.json
        else newest(committed())
    )
    print(*lines_of(found), sep="\n")
    print(f"Gluon serves: {decided(found)}")
    if args.json:
        return
    if not args.check:
        TARGET.write_text(module(found))
    elif TARGET.read_text() != module(found):
        sys.exit(f"{TARGET.name}: not what the results say; run python bench/decide.py")


if __name__ == "__main__":
    main()
