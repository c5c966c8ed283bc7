"""The results as files: four significant digits, a record a line, and what is said of what is absent."""

import json
import math
import os
from pathlib import Path


def rounded(value):
    """The value with every float in it at four significant digits; more is noise, and a new diff in each run."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def dumps(results):
    """JSON of one benchmark's results, a record a line."""
    head = [f" {json.dumps(k)}: {json.dumps(rounded(v))},\n" for k, v in results.items() if k != "records"]
    records = ",\n".join(f"  {json.dumps(rounded(r))}" for r in results["records"])
    return "{\n" + "".join(head) + ' "records": [\n' + records + "\n ]\n}\n"


def write(path, results):
    """Whole or not at all: whoever stops the run keeps what was written before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(dumps(results))
    os.replace(part, path)


def label(shape):
    """A shape in words: "B32 H12 T4 D64 N785", "sms N4096 E256"."""
    return " ".join(v if isinstance(v, str) else f"{k}{v}" for k, v in shape.items() if k not in ("Hp", "Wp"))


def case(record):
    """(shape, dtype, mode) of a record."""
    return label(record["shape"]), record["dtype"], record["mode"]


def short(number, digits=3):
    """So many significant digits, and never an exponent: 1003, 62.2, 0.0421."""
    return f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}" if number else "0"


def without(records, key):
    """[(reason, [provider, ...])] of the records that have `key`, "absent" or "fail", in their order. A provider that was
    tried in other cases too is followed by those it is about: "Liger [ego]"."""
    asked, found = {}, {}
    for r in records:
        asked.setdefault(r["provider"], []).append(case(r))
        if key in r:
            found.setdefault(r[key], {}).setdefault(r["provider"], []).append(case(r))
    return [(why, [name + _only(cases, asked[name]) for name, cases in names.items()]) for why, names in found.items()]


def _only(cases, asked):
    """Which of the cases asked for: nothing to add if all; a word that only they have, as "ego", "N64" or "fwdbwd"; several
    shapes, dtypes or modes; or every one."""
    if len(cases) == len(asked):
        return ""
    words = lambda c: " ".join(c).split()  # noqa: E731
    for word in words(cases[0]):
        if [c for c in asked if word in words(c)] == cases:
            return f" [{word}]"
    for axis in range(3):
        values = dict.fromkeys(c[axis] for c in cases)
        if [c for c in asked if c[axis] in values] == cases:
            return f" [{', '.join(values)}]"
    return f" [{', '.join(' '.join(c) for c in cases)}]"
