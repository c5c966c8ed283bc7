"""What training will take on 1 to 512 GPUs, predicted from one GPU's step: python bench/scaling.py

Nobody has run this on more than one GPU. What goes in is a measurement of this repository (`results/nvidia-h200/train.json` and
others), a number of a datasheet, or a formula of what the code does; everything that comes out is predicted, and says so.

A step is computing, as measured and proportional to the clips, and what of the communication the computing does not hide. Two
cases bound it: at best links give what their datasheets promise and DDP reduces gradients while the backward pass runs, but for
the last bucket; at worst links give half of it and nothing overlaps. A collective costs what NCCL's own tuner expects of it.
"""

import argparse
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from cost import (
    CARDS,
    ETHERNET,
    NDR,
    Cluster,
    Collective,
    MiB,
    buckets,
    loss_collectives,
    loss_scratch,
    memory,
    parameters,
    seconds,
)
from store import short

from evaat_fast.model.configs import ModelConfig, get_config

HERE = Path(__file__).resolve().parent
DEVICE = HERE / "results" / "nvidia-h200"
FIGURE = DEVICE / "scaling.svg"
EPOCHS = 5  # the paper's
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MODELS = {"base": "eva02_at_base_patch16_224", "large": "eva02_at_large_patch14_224"}
STEPS = ("ours, eager", "ours, CUDA graph")
# Clips that an epoch shows. EgoClip: lines of egoclip.csv, by EgoVLP's README. EgoClip+: the rephrased and the narrated list of
# LaViLa, each of the 4.0 M clips that AVION's model zoo counts.
CORPORA = {"EgoClip": 3_847_723, "EgoClip+": 8_000_000}
PAPERS_BATCH = {"base": 1024, "large": 512}


def config(model: str, frames: int = 4) -> ModelConfig:
    """Of a model by its short name."""
    return get_config(MODELS[model], num_frames=frames)


@dataclass(frozen=True)
class Measured:
    """A step on one GPU: seconds, of B clips."""

    seconds: float
    B: int


@dataclass(frozen=True)
class Inputs:
    """What was measured: steps by (model, provider), rows of the benchmark with their memory, seconds that the contrastive loss
    of N pairs takes for each clip and caption, and clips a second that a core decodes."""

    steps: dict
    rows: list
    of_pair: float
    decoded: float
    commit: str
    N: int


def read(folder: Path = DEVICE, decoding: Path = HERE / "results" / "cpu-amd-epyc" / "decode.json") -> Inputs:
    """The committed results."""
    train, pairwise, decode = (
        json.loads(path.read_text()) for path in (folder / "train.json", folder / "pairwise.json", decoding)
    )
    steps = {}
    for r in train["records"]:
        names = [name for name, model in MODELS.items() if r["shape"]["model"] == model]
        if names and r["shape"]["T"] == 4 and r["provider"] in STEPS and "ms" in r:
            steps[names[0], r["provider"]] = Measured(r["ms"]["p50"] / 1e3, r["shape"]["B"])
    rows = [r for r in train["records"] if r["provider"] in STEPS and "peak_mib" in r]
    losses = [r for r in pairwise["records"] if r["shape"]["loss"] == "clip" and r["mode"] == "fwdbwd" and "ms" in r]
    loss = max((r for r in losses if r["provider"].startswith("evaat")), key=lambda r: r["shape"]["N"])
    N = loss["shape"]["N"]
    chunks = [
        r
        for r in decode["records"]
        if r["shape"] == {"encoding": "chunks", "T": 4} and (r["mode"], r["provider"]) == ("crop", "av")
    ]
    return Inputs(steps, rows, loss["ms"]["p50"] / 1e3 / N**2, chunks[0]["clips_per_s"], train["environment"]["commit"], N)


@dataclass(frozen=True)
class Prediction:
    """Of W GPUs with n clips each: seconds of a step and clips a second of all, at best and at worst."""

    W: int
    n: int
    best: float
    worst: float

    @property
    def batch(self) -> int:
        return self.W * self.n

    def clips_per_s(self) -> tuple[float, float]:
        return self.batch / self.worst, self.batch / self.best

    def hours(self, clips: int) -> tuple[float, float]:
        """Of the paper's five epochs of so many clips."""
        return tuple(EPOCHS * clips / rate / 3600 for rate in reversed(self.clips_per_s()))


def predict(
    inputs: Inputs, model: str, provider: str, W: int, n: int = 0, cluster: Cluster = NDR, more: float = 1.0
) -> Prediction:
    """The step of `provider` on W GPUs. n: clips on each, as many as were measured where it is 0. more: how many times the
    computing, of blocks that are computed again."""
    measured, c = inputs.steps[model, provider], config(model)
    n = n or measured.B
    computing = more * measured.seconds * n / measured.B + inputs.of_pair * n * n * W
    if W == 1:
        return Prediction(W, n, computing, computing)
    cut = buckets(4 * parameters(c))
    found = []
    for rate, overlap in ((1.0, True), (0.5, False)):
        of_loss = sum(seconds(x.kind, x.bytes, W, cluster, rate) for x in loss_collectives("clip", n * W, W, c.embed_dim))
        each = [seconds("all-reduce", size, W, cluster, rate) for size in cut]
        # Of the FLOPs of a step the backward pass has two thirds, with blocks computed again three quarters.
        backward = computing * (1 - 1 / (3 * more))
        found.append(computing + of_loss + (max(each[-1], sum(each) - backward) if overlap else sum(each)))
    return Prediction(W, n, *found)


def shown(values: tuple[float, float], digits: int = 3) -> str:
    """Two bounds as "low–high" of so many significant digits, or one number where they are the same."""

    def rounded(x):
        return f"{int(float(f'{x:.{digits - 1}e}')):,}" if x >= 10 ** (digits - 1) else short(x, digits)

    low, high = map(rounded, sorted(values))
    return low if low == high else f"{low}–{high}"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def lines(heads: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([row(*heads), "|---" * len(heads) + "|", *rows])


def scaling_table(inputs: Inputs, model: str) -> str:
    """A row for each number of GPUs, of as many clips on each as were measured."""
    names = [name for name in STEPS if (model, name) in inputs.steps]
    if not names:
        return "No step of this model was measured."
    alone = {name: predict(inputs, model, name, 1).clips_per_s()[0] for name in names}
    rows = []
    for W in GPUS:
        cells = []
        for name in names:
            p = predict(inputs, model, name, W)
            efficiency = tuple(100 * x / W / alone[name] for x in p.clips_per_s())
            hours = "; ".join(shown(p.hours(clips), 2) for clips in CORPORA.values())
            cells += [shown(p.clips_per_s()), f"{shown(efficiency)} %" if W > 1 else "measured", hours]
        slow = predict(inputs, model, names[-1], W, cluster=ETHERNET).clips_per_s()
        cells += [shown(slow) if W > ETHERNET.node else "", f"{math.ceil(p.clips_per_s()[1] / inputs.decoded):,}"]
        rows.append(row(W, f"{p.batch:,}", *cells))
    each = [f"{head}, {name.removeprefix('ours, ')}" for name in names for head in ("clips/s", "efficiency", "hours")]
    return lines(("GPUs", "batch", *each, f"clips/s, {ETHERNET.name}", "cores to decode"), rows)


def batch_table(inputs: Inputs) -> str:
    """The paper's batches, shared by few GPUs of 141 GB."""
    rows = []
    for model, N in PAPERS_BATCH.items():
        if (model, STEPS[0]) not in inputs.steps:
            continue
        c = config(model)
        for W in (1, 2, 4, 8, 16):
            n, room = N // W, 0.95 * CARDS["H200"]
            scratch = loss_scratch(n, N, c.embed_dim)
            keep = next(k for k in (False, True) if k or memory(c).peak(n, W, scratch) <= room)
            p = predict(inputs, model, STEPS[0], W, n, more=4 / 3 if keep else 1.0)
            size = memory(c, keep).peak(n, W, scratch) / 2**30
            cells = [model, W, n, "their inputs" if keep else "everything", f"{size:.0f} GiB", shown(p.clips_per_s())]
            rows.append(row(*cells, *(shown(p.hours(clips), 2) for clips in CORPORA.values())))
    heads = ("model", "GPUs", "clips on each", "blocks keep", "memory of each", "clips/s, eager")
    return lines((*heads, *(f"hours, {name}" for name in CORPORA)), rows)


def memory_table(inputs: Inputs) -> str:
    """The measured rows beside the model."""
    rows = []
    for r in inputs.rows:
        shape = r["shape"]
        c = get_config(shape["model"], num_frames=shape["T"])
        predicted = memory(c).of_benchmark(shape["B"]) / MiB
        cells = (shape["model"], shape["B"], shape["T"], r["provider"], f"{r['peak_mib']:,.0f}", f"{predicted:,.0f}")
        rows.append(row(*cells, f"{100 * (predicted / r['peak_mib'] - 1):+.1f} %"))
    return lines(("model", "clips", "frames", "step", "measured, MiB", "predicted, MiB", "off by"), rows)


def largest_table(inputs: Inputs) -> str:
    """Clips that fit a GPU, to the nearest multiple of 8 below, with a twentieth of the memory left free."""
    rows = []
    for card, size in CARDS.items():
        for keep, words in ((False, "everything"), ("selective", "no norms and activations"), (True, "their inputs")):
            cells = []
            for model in MODELS:
                for T in (4, 16):
                    m = memory(config(model, T), keep)
                    clips = 0
                    while m.peak(clips + 8, 2) <= 0.95 * size:
                        clips += 8
                    cells.append(f"{clips:,}" if clips else "–")
            rows.append(row(f"{card}, {size / 1e9:.0f} GB", words, *cells))
    heads = [f"{model}, {T} frames" for model in MODELS for T in (4, 16)]
    return lines(("GPU", "blocks keep", *heads), rows)


def bytes_table(inputs: Inputs) -> str:
    """What travels in a step, what of it a rank sends, and what the loss holds meanwhile."""
    rows = []
    for model in MODELS:
        c = config(model)
        n = next((m.B for (name, _), m in inputs.steps.items() if name == model), 0)
        for W in (16, 512) if n else ():
            for loss in ("clip", "sms"):
                # The trainer's InfoNCE is of float32 features; SMS takes them as the towers give them under autocast.
                found = loss_collectives(loss, n * W, W, c.embed_dim, feature=4 if loss == "clip" else 2)
                whole = {
                    kind: sum(x.bytes for x in found if x.kind == kind)
                    for kind in ("all-gather", "reduce-scatter", "all-reduce")
                }
                sent = sum(x.sent(W) for x in found)
                gradients = Collective("gradients", "all-reduce", 4 * parameters(c))
                cells = [f"{short(x / 1e6)} MB" if x else "–" for x in whole.values()]
                cells += [f"{short(sent / 1e6)} MB", f"{short(gradients.sent(W) / 1e6)} MB"]
                cells += [f"{short(loss_scratch(n, n * W, c.embed_dim) / 1e6)} MB"]
                rows.append(row(f"{model}, {loss}", W, f"{n * W:,}", *cells))
    heads = ("model, loss", "GPUs", "pairs", "all-gathered", "reduce-scattered", "all-reduced")
    return lines((*heads, "a GPU sends of these", "and of DDP's gradients", "the loss holds"), rows)


def inputs_table(inputs: Inputs) -> str:
    """What goes in, and where it is from."""
    results = "../bench/results"
    train, pairwise = (f"[{name}.json]({results}/nvidia-h200/{name}.json)" for name in ("train", "pairwise"))
    decode, code = f"[decode.json]({results}/cpu-amd-epyc/decode.json)", "../evaat_fast"
    keeps = {model: f"{memory(config(model)).clip / MiB:.0f} MiB" for model in MODELS}
    counts = {model: f"{parameters(config(model)):,}" for model in MODELS}
    network, corpora = " or ".join(short(c.network / 1e9) for c in (NDR, ETHERNET)), CORPORA.items()

    def each(values):
        return ", ".join(f"{name} {value}" for name, value in values.items())

    rows = [
        (f"a step of {model}, {m.B} clips of 4 frames, {name.removeprefix('ours, ')}", f"{short(m.seconds * 1e3)} ms", train)
        for (model, name), m in inputs.steps.items()
    ]
    rows += [
        ("contrastive loss, of a clip and a caption", f"{inputs.of_pair * 1e12:.1f} ps", f"{inputs.N:,} pairs, {pairwise}"),
        ("4 frames decoded, a core", f"{inputs.decoded:.0f} clips/s", f"`prepare`'s chunks, {decode}"),
    ]
    rows = [(*r[:2], f"measured: {r[2]}") for r in rows]
    rows += [
        ("parameters", each(counts), "formula, counted by a test"),
        ("kept for the backward pass, a clip", each(keeps), f"formula of [recompute.py]({code}/model/recompute.py), counted"),
        ("bytes of the losses' collectives", "below", f"formula of [ranks.py]({code}/ops/pairwise/ranks.py), counted"),
        ("gradients", "float32 in buckets of 25 MiB", "torch's DistributedDataParallel, counted"),
        ("a collective's latency and share of a link", "ring, tree; LL, Simple", "formula: NVIDIA/nccl, src/graph/tuning.cc"),
        ("NVLink, a GPU and direction", f"{NDR.nvlink / 1e9:.0f} GB/s", "datasheet: NVIDIA H200, 900 GB/s both ways"),
        ("network, a node and direction", f"{network} GB/s", "datasheet: NVIDIA DGX BasePOD, DGX H200: 8 x 400, 1 x 100 Gb/s"),
        ("memory of a GPU", each({name: f"{size / 1e9:.0f} GB" for name, size in CARDS.items()}), "datasheets"),
        (
            "clips an epoch",
            each({k: f"{v:,}" for k, v in corpora}),
            "EgoVLP's README; twice the 4.0 M of AVION's docs/MODEL_ZOO.md",
        ),
        ("epochs", EPOCHS, "the paper, arXiv 2506.14356"),
    ]
    return lines(("input", "value", "from"), [row(*r) for r in rows])


def table(choice: str | None, inputs: Inputs | None = None) -> str:
    """Markdown of one of the page's tables: inputs, memory, largest, bytes, batch, base or large."""
    inputs = inputs or read()
    if choice not in TABLES:
        raise ValueError(f"predicted: expected one of {', '.join(TABLES)}, got {choice!r}")
    made = TABLES[choice](inputs)
    return made if choice == "inputs" else f"*Predicted, from steps of commit {inputs.commit} on one H200.*\n\n{made}"


TABLES = {
    "inputs": inputs_table,
    "memory": memory_table,
    "largest": largest_table,
    "bytes": bytes_table,
    "batch": batch_table,
    **{model: functools.partial(scaling_table, model=model) for model in MODELS},
}


def figure(path: Path = FIGURE, inputs: Inputs | None = None) -> bool:
    """Efficiency and hours over GPUs. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evaat"  # the same numbers draw the same file
    import matplotlib.pyplot as plt

    inputs = inputs or read()
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4))
    shown = [(model, name) for model in MODELS for name in STEPS if (model, name) in inputs.steps]
    for i, (model, name) in enumerate(shown):
        label = f"{model}, {name.removeprefix('ours, ')}"
        for cluster, style in ((NDR, "-"), (ETHERNET, ":")):
            found = [predict(inputs, model, name, W, cluster=cluster) for W in GPUS]
            alone = found[0].clips_per_s()[0]
            rates = [[x / p.W / alone for x in p.clips_per_s()] for p in found]
            hours = [p.hours(CORPORA["EgoClip+"]) for p in found]
            for ax, values in ((left, rates), (right, hours)):
                low, high = zip(*values, strict=True)
                ax.plot(GPUS, high if ax is left else low, style, color=f"C{i}", lw=1, label=label if style == "-" else None)
                if cluster is NDR:
                    ax.fill_between(GPUS, low, high, color=f"C{i}", alpha=0.2, lw=0)
    left.set(xscale="log", xlabel="GPUs", ylabel="efficiency, predicted", ylim=(0, 1.05))
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="hours for EgoClip+, predicted")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(GPUS, [str(W) for W in GPUS], fontsize=6)
        ax.grid(alpha=0.3)
    left.legend(fontsize=6, loc="lower left")
    fig.suptitle("Predicted. Bands: InfiniBand at worst and at best. Dotted: 100 Gb/s Ethernet a node, at best.", fontsize=8)
    fig.tight_layout()
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", default="base", choices=TABLES)
    print(table(parser.parse_args(argv).table))


if __name__ == "__main__":
    main()
