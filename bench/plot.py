"""Draws figures from the committed JSON, and the tables of the README: python bench/plot.py [--check]

bench/results/DEVICE/OP.json -> OP.svg and OP.md beside it (a page with every number), and the text between the markers of
README.md. --check changes nothing and fails if the README or a page differs from what the JSON says.
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
    """One panel a mode, a row a provider, a point a case. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evaat"  # the same numbers draw the same file
    import matplotlib.pyplot as plt

    ran = [r for r in data["records"] if "ms" in r and r.get("ratio")]
    modes, providers = (list(dict.fromkeys(r[x] for r in ran)) for x in ("mode", "provider"))
    cases = list(dict.fromkeys((label(r["shape"]), r["dtype"]) for r in ran))
    size = (2 + 3.2 * max(1, len(modes)), 1.2 + 0.24 * len(providers) + 0.14 * len(cases))
    fig, axes = plt.subplots(1, max(1, len(modes)), figsize=size, sharey=True, squeeze=False)
    for ax, mode in zip(axes[0], modes, strict=False):
        for i, case in enumerate(cases):
            rows = [r for r in ran if r["mode"] == mode and (label(r["shape"]), r["dtype"]) == case]
            y = [providers.index(r["provider"]) + 0.5 * (i / max(1, len(cases) - 1) - 0.5) for r in rows]
            ax.plot([r["ratio"] for r in rows], y, "osD^v"[i % 5], ms=3.5, color=f"C{i % 10}", label=" ".join(case))
        ax.axvline(1, color="grey", linewidth=0.8)
        ax.set(xscale="log", title=mode)
        for axis in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
            axis("{x:g}")
        ax.tick_params("x", which="both", labelsize=6)
        ax.grid(alpha=0.3, which="both")
    axes[0][0].set_yticks(range(len(providers)), providers, fontsize=7)
    axes[0][0].invert_yaxis()
    fig.suptitle(
        f"{data['op']}, {data['environment']['device']}: time relative to {data['baseline']} (left is faster)", fontsize=9
    )
    fig.legend(*axes[0][0].get_legend_handles_labels(), fontsize=6, ncols=3, loc="lower center")
    fig.tight_layout(rect=(0, 0.02 + 0.1 * len(cases) / 3 / size[1], 1, 1))
    fig.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(fig)
    return True


def page_text(data, has_figure):
    """Markdown: a table for each shape and dtype, a row a provider."""
    of_tests = {(label(r["shape"]), r["dtype"]): [] for r in data["records"]}
    for r in data["records"]:
        of_tests[label(r["shape"]), r["dtype"]].append(r)
    modes = list(dict.fromkeys(r["mode"] for r in data["records"]))
    peak, absent = data["peak"], {}
    lines = [
        f"# {data['op']}: {data['environment']['device']}",
        "",
        f"`python bench/{data['op']}.py` on {conditions(data)}.",
        "",
    ]
    lines += [
        f"Copy {peak['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul {peak['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s in this run."
    ]
    lines += [f"x: time relative to *{data['baseline']}*. Error: the largest against float64, in brackets torch's own."]
    lines += ["", f"![{data['op']}]({data['op']}.svg)"] if has_figure else []
    for (shape, dtype), records in of_tests.items():
        lines += ["", f"## {shape} {dtype}", "", "| provider | " + " | ".join(modes) + " |", "|---" * (1 + len(modes)) + "|"]
        rows = {}
        for r in records:
            if "absent" in r:
                absent.setdefault(r["absent"], dict.fromkeys([r["provider"]]))[r["provider"]] = None
            else:
                rows.setdefault(r["provider"], {})[r["mode"]] = numbers(r, peak)
        lines += [f"| {p} | " + " | ".join(row.get(m, "–") for m in modes) + " |" for p, row in rows.items()]
    absent.pop("not asked for", None)
    lines += ["", "Absent:", "", *(f"- {'; '.join(names)}: {why}" for why, names in absent.items())] if absent else []
    return "\n".join(lines) + "\n"


def numbers(r, peak):
    """One cell of a page."""
    if "fail" in r:
        return f"FAIL: {r['fail']}".replace("|", "/")
    seconds, (unit, amount) = r["ms"]["p50"] / 1e3, next(iter(r["work"].items()))
    scale, name = (1e12, "TFLOP/s") if unit == "flop" else (1e9, "GB/s")
    top = peak["matmul_flop_per_s" if unit == "flop" else "copy_bytes_per_s"]
    parts = [f"{r['ms']['p50']:.3f} ms", f"{amount / seconds / scale:.3g} {name} ({100 * amount / seconds / top:.0f} %)"]
    parts += [f"{r['ratio']:.2f} x"] if r.get("ratio") else []
    parts += [f"{r['peak_mib']:.0f} MiB"] if "peak_mib" in r else []
    parts += [f"error {r['error']:.1e} ({r['torch_error']:.1e})"] if "error" in r else []
    return ", ".join(parts)


def page(path, data):
    """Writes the page of one JSON beside it, and its figure; returns the page's path."""
    text = page_text(data, figure(path, data))
    path.with_suffix(".md").write_text(text)
    return path.with_suffix(".md")


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
        pages = ((path.with_suffix(".md"), page_text(data, path.with_suffix(".svg").exists())) for path, data in results())
        stale = [path.name for path, text in pages if not path.exists() or path.read_text() != text]
        if old != new or stale:
            sys.exit(f"{', '.join(['README.md'] * (old != new) + stale)}: not what the results say; run python bench/plot.py")
        return
    README.write_text(new)
    for path, data in results():
        print(f"wrote {page(path, data)}")


if __name__ == "__main__":
    main()
