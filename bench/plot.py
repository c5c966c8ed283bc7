"""Draws figures from the committed JSON, and the tables of the README: python bench/plot.py [--check]

bench/results/DEVICE/OP.json -> OP.svg and OP.md beside it (a page with every number), and the text between the markers of
README.md and docs/*.md. --check changes nothing and fails if one of these differs from what the JSON says.

A marker is <!-- results DEVICE/OP --> ... <!-- end results DEVICE/OP -->. After the name it may choose: ": N4096 fwd" the cases
with those words in their shape, dtype or mode, ": fwd | NAME; NAME" these providers of them. <!-- headline --> is the table of
HEADLINE, <!-- support matrix --> and <!-- order of choice --> are those of ops and backends.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import where
from store import case, label, short, without

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# The README's table: (what, DEVICE/OP, words of the case, the provider of ours, the one that it replaces).
ATTENTION = ("nvidia-h200/attn", "evaat joint_attention", "eager rope + sdpa")
HEADLINE = [
    (
        "training step, EVA02-AT-B, 64 clips of 4 frames, ours in a CUDA graph, theirs eager",
        "nvidia-h200/train",
        "eva02_at_base_patch16_224 B64 T4",
        "ours, CUDA graph",
        "authors, eager",
    ),
    (
        "the same, both under torch.compile",
        "nvidia-h200/train",
        "eva02_at_base_patch16_224 B64 T4",
        "ours, compiled",
        "authors, compiled",
    ),
    ("SwiGLU and LayerNorm, 50,240 x 2,048", "nvidia-h200/norm", "swiglu_norm C2048 bf16", "evaat", "eager"),
    *((f"rotation and attention, 32 clips of {T} frames", ATTENTION[0], f"B32 T{T} bf16", *ATTENTION[1:]) for T in (4, 16)),
    (
        "the last against torch's attention with our rotation",
        ATTENTION[0],
        "B32 T16 bf16",
        "evaat joint_attention",
        "our rope3d + sdpa",
    ),
    ("rotation of q and k, 32 clips of 4 frames", "nvidia-h200/rope3d", "B32 T4 bf16", "evaat rope3d", "eager, as published"),
    ("SMS loss, 1,024 pairs", "nvidia-h200/pairwise", "sms N1024 bf16", "evaat", "dense rewrite"),
    ("SMS loss, 32,768 pairs", "nvidia-h200/pairwise", "sms N32768 bf16", "evaat", "chunks + checkpoint"),
    ("rotation of q and k, 8 clips of 4 frames", "cpu-amd-epyc/rope3d", "T4 fp32", "evaat rope3d", "eager, as published"),
    ("SMS loss, 4,096 pairs", "cpu-amd-epyc/pairwise", "sms N4096 bf16", "evaat", "published formulation"),
    ("InfoNCE, 4,096 pairs", "cpu-amd-epyc/pairwise", "clip N4096 fp32", "evaat", "open_clip"),
    ("InfoNCE, 4,096 pairs", "cpu-amd-epyc/pairwise", "clip N4096 bf16", "evaat", "open_clip"),
]


def results():
    for path in sorted(HERE.glob("results/*/*.json")):
        yield path, json.loads(path.read_text())


def texts():
    """The files that may have markers."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def cell(r):
    beside = [f"{r['ratio']:.2f} x"] if r.get("ratio") else []
    beside += [f"{r['peak_mib']:.0f} MiB"] if "peak_mib" in r else []
    beside += ["eager"] if "not_captured" in r else []
    return f"{short(r['ms']['p50'])} ms" + (f" ({', '.join(beside)})" if beside else "")


def conditions(data):
    e = data["environment"]
    if "threads" in e:
        machine = f"{e['threads']} threads, {e['isa']}"
    else:
        _, clock, driver = e["clocks"].split(", ")  # the first is that of a GPU that rests
        machine = f"CUDA {e['cuda']}, driver {driver}, clock up to {clock}"
    return f"{e['device']}, {machine}; torch {e['torch']}, Triton {e['triton']}, commit {e['commit']}"


def table(data, choice=None):
    """Markdown: one row per case, one column per provider that ran; times relative to the baseline's. choice: of a marker."""
    words, _, names = (choice or "").partition("|")
    names = [name.strip() for name in names.split(";") if name.strip()]
    unknown = set(names) - {r["provider"] for r in data["records"]}
    if unknown:
        raise ValueError(f"{data['op']}: the results have no provider {', '.join(sorted(unknown))}")
    records = [r for r in data["records"] if set(words.split()) <= set(" ".join(case(r)).split())]
    records = [r for r in records if not names or r["provider"] in names]
    ran = [r for r in records if "ms" in r]
    columns, cases = names or list(dict.fromkeys(r["provider"] for r in ran)), {}
    for r in ran:
        cases.setdefault(case(r), {})[r["provider"]] = r
    lines = ["| shape | dtype | mode | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for (shape, dtype, mode), row in cases.items():
        cells = [cell(row[c]) if c in row else "–" for c in columns]
        lines.append(f"| {shape} | {dtype} | {mode} | " + " | ".join(cells) + " |")
    extra = "" if data["op"] == "train" else "extra "
    peak = f", {extra}memory at its peak" if any("peak_mib" in r for r in ran) else ""
    note = f"`python bench/{data['op']}.py` on {conditions(data)}. In brackets: time relative to *{data['baseline']}*{peak}."
    note += "".join(f" {line}" for line in data.get("notes", []))
    if any("not_captured" in r for r in ran):
        note += " Eager: not captured in a CUDA graph, so with the time of its launches."
    failed = dict.fromkeys(name for _, names in without(records, "fail") for name in names)
    if failed:
        note += f" Failed the check, so not timed: {'; '.join(failed)}."
    absent = [f"{'; '.join(names)} ({why})" for why, names in without(records, "absent")]
    if absent:
        note += f" Absent there: {'; '.join(absent)}."
    return "\n".join([*lines, "", note])


def headline():
    """Markdown: a row for each of HEADLINE, what was and what is; and the conditions of every run in it."""
    found = {f"{path.parent.name}/{path.stem}": data for path, data in results()}
    lines = ["| on | what | instead of | forward | forward + backward | memory |", "|---" * 6 + "|"]
    for what, name, words, *providers in HEADLINE:
        data = found[name]
        chosen = [r for r in data["records"] if set(words.split()) <= set(" ".join(case(r)).split())]
        cells = []
        for mode in ("fwd", "fwdbwd"):
            steps = [mode, "step"] if mode == "fwdbwd" else [mode]  # of training, which is forward, backward and update
            if not any(r["mode"] in steps for r in chosen):
                cells.append("–")
                continue
            ours, theirs = (next(r for r in chosen if r["mode"] in steps and r["provider"] == p) for p in providers)
            now, before = ours["ms"]["p50"], theirs["ms"]["p50"]
            cells.append(f"{short(before)} → {short(now)} ms, {short(before / now, 2)} x")
        memory = (
            f"{theirs['peak_mib']:.0f} → {ours['peak_mib']:.0f} MiB" if "peak_mib" in ours and "peak_mib" in theirs else "–"
        )
        on = data["environment"]["device"].removeprefix("NVIDIA ")
        on += f", {data['environment']['threads']} threads" if "threads" in data["environment"] else ""
        lines.append(f"| {on}, {ours['dtype']} | {what} | {providers[1]} | {' | '.join(cells)} | {memory} |")
    names = list(dict.fromkeys(name for _, name, *_ in HEADLINE))
    notes = [
        "x: how many times as fast. Memory: the extra at the peak of forward + backward. H200: time on the device in CUDA "
        "graphs; of training by the clock, ours alone in a graph. What an eager call costs stands in the pages."
    ]
    for data in map(found.get, names):
        notes += [f"`python bench/{data['op']}.py` on {conditions(data)}.", *data.get("notes", [])]
    return "\n".join([*lines, "", " ".join(notes)])


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
        for i, name in enumerate(cases):
            rows = [r for r in ran if r["mode"] == mode and (label(r["shape"]), r["dtype"]) == name]
            y = [providers.index(r["provider"]) + 0.5 * (i / max(1, len(cases) - 1) - 0.5) for r in rows]
            ax.plot([r["ratio"] for r in rows], y, "osD^v"[i % 5], ms=3.5, color=f"C{i % 10}", label=" ".join(name))
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
    peak = data["peak"]
    copy = f"Copy {peak['copy_bytes_per_s'] / 1e9:.1f} GB/s{_engine(data)}, matmul" if "copy_bytes_per_s" in peak else "Matmul"
    lines = [
        f"# {data['op']}: {data['environment']['device']}",
        "",
        f"`python bench/{data['op']}.py` on {conditions(data)}.",
        "",
        f"{copy} {peak['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s in this run.",
        f"x: time relative to *{data['baseline']}*. Error: the largest against float64, in brackets torch's own.",
    ]
    if "cuda" in data["environment"] and any("queued_ms" in r for r in data["records"]):
        lines += ["ms: on the device, in a CUDA graph. Call: the time in which an eager call returns."]
    if data["op"] == "train" and "threads" in data["environment"]:
        lines += ["The largest batch is not looked for on a CPU, whose memory is shared."]
    lines += data.get("notes", [])
    lines += ["", f"![{data['op']}]({data['op']}.svg)"] if has_figure else []
    for (shape, dtype), records in of_tests.items():
        rows = {}
        for r in records:
            if "ms" in r or "fail" in r:
                rows.setdefault(r["provider"], {})[r["mode"]] = numbers(r, peak)
            if "largest" in r:
                rows[r["provider"]]["largest batch"] = batch_of(r["largest"])
        columns = modes + ["largest batch"] * any("largest" in r for r in records)
        lines += [
            "",
            f"## {shape} {dtype}",
            "",
            "| provider | " + " | ".join(columns) + " |",
            "|---" * (1 + len(columns)) + "|",
        ]
        lines += [f"| {p} | " + " | ".join(row.get(m, "–") for m in columns) + " |" for p, row in rows.items()]
        table = where.table(records, "cuda" in data["environment"])
        lines += ["", *table] if table else []
    if any("ran" in r for r in data["records"]):
        ran = {}
        for r in data["records"]:
            for name in r.get("ran", ()):
                ran.setdefault(r["provider"], {}).setdefault(name)
        lines += ["", "Kernels of attention that ran:", "", *(f"- {p}: {'; '.join(names)}" for p, names in ran.items())]
    notes = [("Absent:", "absent"), ("Timed as eager calls with their launches, as they cannot be captured:", "not_captured")]
    for title, key in notes:
        found = without(data["records"], key)
        lines += ["", title, "", *(f"- {'; '.join(names)}: {why}" for why, names in found)] if found else []
    return "\n".join(lines) + "\n"


def _engine(data):
    """Of a copy that was no kernel, in results from before it was one."""
    return " by a copy engine" if "cuda" in data["environment"] and data["peak"].get("copy") != "kernel" else ""


def numbers(r, peak):
    """One cell of a page."""
    if "fail" in r:
        return f"FAIL: {r['fail']}".replace("|", "/")
    seconds, (unit, amount) = r["ms"]["p50"] / 1e3, next(iter(r["work"].items()))
    scale, name = (1e12, "TFLOP/s") if unit == "flop" else (1e9, "GB/s")
    top = peak["matmul_flop_per_s" if unit == "flop" else "copy_bytes_per_s"]
    parts = [f"{short(r['ms']['p50'], 4)} ms"]
    parts += [f"{r['clips_per_s']:.3g} clips/s"] if "clips_per_s" in r else []
    parts += [f"{amount / seconds / scale:.3g} {name} ({100 * amount / seconds / top:.0f} %)"]
    if r.get("queued_ms", r["ms"]["p50"]) < 0.9 * r["ms"]["p50"]:  # a table made anew under capture, for one
        parts.append(f"{short(r['queued_ms'], 4)} ms as eager calls on a busy device: the capture adds work")
    parts += [f"{r['ratio']:.2f} x"] if r.get("ratio") else []
    parts += [f"{r['peak_mib']:.0f} MiB"] if "peak_mib" in r else []
    parts += [f"call {short(r['eager_us'])} us"] if "queued_ms" in r else []  # before it, of a few cold calls
    parts += [f"error {r['error']:.1e} ({r['torch_error']:.1e})"] if "error" in r else []
    return ", ".join(parts)


def batch_of(found):
    """One cell: the largest batch, and how exactly it is known."""
    if "fail" in found:
        return f"FAIL: {found['fail']}".replace("|", "/")
    why = "" if found.get("why", "out of memory") == "out of memory" else f": {found['why']}".replace("|", "/")
    return f"{found['B']}" + (f" ({found['fails']} fails{why})" if "fails" in found else " or more")


def page(path, data):
    """Writes the page of one JSON beside it, and its figure; returns the page's path."""
    text = page_text(data, figure(path, data))
    path.with_suffix(".md").write_text(text)
    return path.with_suffix(".md")


def of_doctor(name):
    """A table of the code, not of results."""
    from evaat_fast import doctor

    return getattr(doctor, name)()


def predicted(choice):
    """A table of what is made of results by a model."""
    import scaling

    return scaling.table(choice)


def generated(text):
    """The text with everything between `<!-- NAME -->`, or `<!-- NAME: CHOICE -->`, and `<!-- end NAME -->` generated anew."""
    parts = {"support matrix": lambda choice: of_doctor("matrix"), "order of choice": lambda choice: of_doctor("orders")}
    parts["headline"], parts["predicted"] = lambda choice: headline(), predicted
    for path, data in results():
        parts[f"results {path.parent.name}/{path.stem}"] = functools.partial(table, data)
    for name, body in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)}(?:: ([^\n]+))? -->\n).*?(<!-- end {re.escape(name)} -->)", re.S)
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body(m[2])}\n{m[3]}", text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = {path: path.read_text() for path in texts()}
    new = {path: generated(text) for path, text in old.items()}
    if args.check:
        pages = ((path.with_suffix(".md"), page_text(data, path.with_suffix(".svg").exists())) for path, data in results())
        stale = [path.name for path in old if old[path] != new[path]]
        stale += [f"{path.parent.name}/{path.name}" for path, text in pages if not path.exists() or path.read_text() != text]
        if stale:
            sys.exit(f"{', '.join(stale)}: not what the results say; run python bench/plot.py")
        return
    for path, text in new.items():
        path.write_text(text)
    for path, data in results():
        print(f"wrote {page(path, data)}")
    import scaling

    if scaling.figure():
        print(f"wrote {scaling.FIGURE}")


if __name__ == "__main__":
    main()
