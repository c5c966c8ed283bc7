"""Draws figures from the committed JSON, and the tables of the README: python bench/plot.py [--check]

bench/results/DEVICE/OP.json -> bench/results/DEVICE/OP.svg, and the text between the markers of README.md. --check changes
nothing and fails if the README differs from what the JSON says.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def results():
    for path in sorted(HERE.glob("results/*/*.json")):
        yield path, json.loads(path.read_text())


def label(shape):
    return " ".join(v if isinstance(v, str) else f"{k}{v}" for k, v in shape.items() if k not in ("Hp", "Wp"))


def cell(r):
    peak = f", {r['peak_mib']:.0f} MiB" if "peak_mib" in r else ""
    return f"{r['ms']['p50']:.2f} ms ({r['ratio']:.2f} x{peak})"


def conditions(data):
    e = data["environment"]
    where = f"{e['threads']} threads, {e['isa']}" if "threads" in e else f"CUDA {e['cuda']}, clocks {e['clocks']}"
    return f"{e['device']}, {where}; torch {e['torch']}, Triton {e['triton']}, commit {e['commit']}"


def table(data, only=None):
    """Markdown: one row per case, one column per provider that ran; times relative to the baseline's. only: a word of the
    shapes to show, as "N4096"."""
    ran = [r for r in data["records"] if "ms" in r and (only is None or only in label(r["shape"]).split())]
    columns = list(dict.fromkeys(r["provider"] for r in ran))
    cases = {}
    for r in ran:
        cases.setdefault((label(r["shape"]), r["dtype"], r["mode"]), {})[r["provider"]] = r
    lines = ["| shape | dtype | mode | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for (shape, dtype, mode), row in cases.items():
        cells = [cell(row[c]) if c in row else "–" for c in columns]
        lines.append(f"| {shape} | {dtype} | {mode} | " + " | ".join(cells) + " |")
    absent = {r["provider"]: r["absent"] for r in data["records"] if "absent" in r and r["absent"] != "not asked for"}
    failed = sorted({r["provider"] for r in data["records"] if "fail" in r})
    command = f"python bench/{data['op']}.py"
    peak = ", extra memory at its peak" if any("peak_mib" in r for r in ran) else ""
    note = f"`{command}` on {conditions(data)}. In brackets: time relative to *{data['baseline']}*{peak}."
    if absent:
        note += " Absent there: " + "; ".join(f"{p} ({why[:60]})" for p, why in absent.items()) + "."
    if failed:
        note += f" Failed the check, so not timed: {', '.join(failed)}."
    return "\n".join([*lines, "", note])


def figure(path, data):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    ran = [r for r in data["records"] if "ms" in r and r.get("ratio")]
    cases = list(dict.fromkeys((label(r["shape"]), r["dtype"], r["mode"]) for r in ran))
    providers = list(dict.fromkeys(r["provider"] for r in ran))
    fig, ax = plt.subplots(figsize=(9, 0.9 + 0.32 * len(cases) * max(1, len(providers) / 3)))
    height = 0.85 / len(providers)
    for i, provider in enumerate(providers):
        rows = {(label(r["shape"]), r["dtype"], r["mode"]): r for r in ran if r["provider"] == provider}
        y = [c + i * height for c, case in enumerate(cases) if case in rows]
        ax.barh(y, [rows[case]["ratio"] for case in cases if case in rows], height, label=provider)
    ax.set_yticks([c + 0.4 for c in range(len(cases))], [" ".join(c) for c in cases], fontsize=7)
    ax.invert_yaxis()
    ax.axvline(1, color="grey", linewidth=0.8)
    ax.set_xlabel(f"time relative to {data['baseline']} (lower is better)")
    ax.set_title(f"{data['op']}: {data['environment']['device']}", fontsize=10)
    ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(fig)


def matrix():
    from evaat_fast import doctor

    return doctor.matrix()


def readme(text):
    """The README with everything between `<!-- NAME -->`, or `<!-- NAME: ONLY -->`, and `<!-- end NAME -->` generated anew."""
    parts = {"support matrix": lambda only: matrix()}
    for path, data in results():
        parts[f"results {path.parent.name}/{path.stem}"] = functools.partial(table, data)
    for name, body in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)}(?:: (\S+))? -->\n).*?(<!-- end {re.escape(name)} -->)", re.S)
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body(m[2])}\n{m[3]}", text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = README.read_text()
    new = readme(old)
    if args.check:
        if old != new:
            sys.exit("README.md differs from the results: run python bench/plot.py")
        return
    README.write_text(new)
    for path, data in results():
        figure(path, data)
        print(f"drew {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
