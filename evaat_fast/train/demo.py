"""The demo: makes a corpus, trains on it as the paper does, evaluates, searches its test videos, and writes a page of it all.

`run("demo")` leaves everything in the folder demo: corpus, configurations, runs, the index, results.json and index.html.
Interrupted, it goes on there.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch

import evaat_fast
from evaat_fast._files import write_atomically
from evaat_fast.data.choices import FRAMES
from evaat_fast.data.ek100 import EK100
from evaat_fast.train import checkpoint, evaluation, inputs, pace, packages, trainer
from evaat_fast.train.config import absolute, load, parse_override, with_values
from evaat_fast.train.log import Progress, duration, read

STAGES = ("pretrain", "finetune")
# What --quick changes: enough to see every part work, not enough to learn the verbs.
QUICK = {
    "pretrain": ["train.epochs=2", "train.batch_size=16", "eval.every=1"],
    "finetune": ["train.epochs=1", "train.batch_size=16"],
}
RANDOM_DRAWS = 20
SHOWN = 5
# Of the index of the test videos: clips as long as those that were narrated, four a second.
SECONDS, OVERLAP = 1.0, 0.75
# Seconds a clip and core, of two AVX-512 cores, for what is said beforehand.
_MAKING, _DECODING = 0.028, 0.008


def run(
    out: str | os.PathLike[str] = "demo",
    *,
    seed: int = 0,
    quick: bool = False,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs the demo.

    Args:
        out: the folder for everything. A corpus that is there is used again; runs of the same configurations, by the same
            version, go on where they were. overwrite: make them anew.
        seed: of weights, batches and crops. quick: a small corpus and few epochs, to see that it works.
        overrides: "section.key=value" for both stages. quiet: print nothing.

    Returns:
        dict: what results.json holds; of several processes that torchrun started the first one's, {} of the others.

    Raises:
        ConfigError: a folder that cannot be written, a device that is not there. FileExistsError: another corpus there.
        ImportError: packages of the extras video and train are missing; all are named before anything is made. OSError: the
        disk is full.
    """
    main = int(os.environ.get("RANK", "0")) == 0  # of several processes, which train together, one makes all else
    quiet = quiet or not main
    say = (lambda *_: None) if quiet else (lambda line="": print(line, flush=True))
    out = trainer.check_folder(out, "--out")
    configs, texts = _configs(out, seed, quick, overrides)
    decoders = packages.of_data(configs["pretrain"]) + packages.of_data(configs["finetune"])
    packages.require("the demo", "av", *decoders, *packages.PAGE, *packages.of_progress(quiet))
    device = trainer.choose_device(configs["pretrain"])
    untrained = trainer.build_model(configs["pretrain"]).to(device)
    out.mkdir(parents=True, exist_ok=True)
    for stage, text in texts.items():
        write_atomically(out / f"{stage}.toml", methodcaller("write", text))
    clock = {"start": time.perf_counter()}
    done = _done(configs, overwrite)
    if not quiet:
        say(_forecast(configs, done, device, quick))

    say(f"1/4  the toy kitchen, in {out / configs['corpus']}")
    while not (main or (out / configs["corpus"] / "kitchen.json").is_file()):
        time.sleep(0.2)  # torchrun ends it with the process that makes them
    _corpus(out / configs["corpus"], quick, quiet)
    clock["corpus"] = time.perf_counter()
    # Both stages see the same clips, which are decoded once.
    data = inputs.splits(configs["pretrain"])
    test = data.test
    assert isinstance(data.train, EK100) and isinstance(test, EK100)  # the toy kitchen is in EK-100's files
    with Progress(len(data.train), "decoding", quiet) as progress:
        inputs.decode(data.train, progress)
    clock["decoding"] = time.perf_counter()
    rows = [("random scores", _chance(test))]
    rows.append(("before training", evaluation.evaluate(untrained, test, configs["pretrain"], device)))
    say(f"     {len(test)} test clips, {len(test.captions)} captions; before training: {evaluation.summary(rows[-1][1])}")

    trained = {}
    for number, (stage, loss) in enumerate((("pretrain", "InfoNCE"), ("finetune", "SMS")), 2):
        say(f"{number}/4  {stage}, {loss}: evaat-fast train {out / stage}.toml")
        data.train.positive = configs[stage].data.positive
        goes_on = done[stage] is not None
        trained = trainer.train(configs[stage], resume=goes_on, overwrite=not goes_on, quiet=quiet, datasets=data)
        rows.append((f"after {'pretraining' if stage == 'pretrain' else 'fine-tuning'} ({loss})", trained["metrics"]))
        clock[stage] = time.perf_counter()

    if not main:
        return {}
    say("4/4  controls, searches and the page")
    config, model = configs["finetune"], trained["model"]
    controls, similarities = [], {}
    for frames in FRAMES:
        shown = evaluation.evaluate(model, test, config, device, frames=frames, return_similarity=True)
        metrics, similarities[frames] = shown
        controls.append((frames, metrics))
    clock["controls"] = time.perf_counter()
    searched, searches = _search(out, Path(config.train.out), test, device)
    clock["search"] = time.perf_counter()
    results = {
        "metrics": [{"name": name, **_finite(metrics)} for name, metrics in rows],
        "controls": [{"name": name, **_finite(metrics)} for name, metrics in controls],
        "search": searched,
        "seed": seed,
        "quick": quick,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "evaat-fast": evaat_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_clips": len(data.train),
        "test_clips": len(test),
        "captions": len(test.captions),
        "verbs": len(set(test.caption_verbs.tolist())),
        "seconds": {b: round(clock[b] - clock[a], 1) for a, b in itertools.pairwise(clock)} | _earlier(configs, done),
        "epochs": {stage: configs[stage].train.epochs for stage in STAGES},
    }
    write_atomically(out / "results.json", lambda f: f.write(json.dumps(results, indent=1).encode()))
    from evaat_fast.train import report

    logs = {stage: read(Path(configs[stage].train.out) / "log.jsonl") for stage in STAGES}
    listed = report.queries(similarities["ordered"], test, SHOWN)
    page = report.write(out / "index.html", results, logs, listed, searches)
    say()
    say(table(results))
    say()
    say(search_line(searched))
    say(f"\n{time.perf_counter() - clock['start']:.0f} s. The page: {page.resolve()}")
    say("Go on with:")
    say(f'    evaat-fast search "{searched["asked"][0]}" --index {shlex.quote(str(out))}')
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    say(
        f"    evaat-fast serve --index {shlex.quote(str(out))}"
        + "      # after pip install 'evaat-fast[serve]'" * bool(missing)
    )
    return results


def search_line(searched: Mapping[str, Any]) -> str:
    """What is measured of the search, as text."""
    pairs = [f"{name} {right} of {asked}" for name, (right, asked) in searched["pairs"].items()]
    right, asked = searched["pairs_right"], searched["pairs_asked"]
    return (
        f"search, in {searched['clips']} clips of the test videos: the event is among the first five for {searched['hits']} of "
        f"{searched['queries']} texts;\nof two verbs that only time tells apart the right one is first for {right} of {asked}"
        + (f" ({', '.join(pairs)})" if asked else "")
    )


def _search(out, run, test, device):
    """Indexes the test videos; (what results.json holds of it, what the page shows)."""
    from evaat_fast.data import kitchen
    from evaat_fast.search import Index, measure
    from evaat_fast.search.index import FOLDER
    from evaat_fast.search.store import BadIndex
    from evaat_fast.train import report

    folder = out / FOLDER
    try:
        index = Index.open(folder, device=str(device))
        index.check(run, seconds=SECONDS, overlap=OVERLAP)
    except BadIndex:  # none, or of other weights
        if (folder / "index.json").exists():
            shutil.rmtree(folder)
        index = Index.create(folder, run, seconds=SECONDS, overlap=OVERLAP, device=str(device))
    index.add([file for source in test.sources.values() for file in source.files])
    found = measure.answers(index, test)
    hits, queries = measure.hits(found)
    pairs = measure.pairs(found, test, kitchen.PAIRS)

    # Two captions with nothing in common, and the first two that differ in nothing but the direction.
    kinds = {test.kinds[one.kind]: one for one in found}
    (verb, nouns), first = next(iter(kinds.items()))
    second = next((one for kind, one in kinds.items() if kind[0] != verb and not kind[1] & nouns), found[-1])
    both = ([kinds.get((v, nouns)) for v in pair] for pair in kitchen.PAIRS for _, nouns in kinds)
    chosen: list[Any] = [[first], [second], next((pair for pair in both if None not in pair), [])]
    searches = [
        [report.search(test, x.caption, x.moments.to_dicts()[:SHOWN], x.clips[:SHOWN], SECONDS, out) for x in together]
        for together in chosen
        if together
    ]
    names = {" / ".join(kitchen.VERBS[v] for v in pair): list(counts) for pair, counts in pairs.items()}
    searched = {
        "clips": len(index),
        "hits": hits,
        "queries": queries,
        "pairs": names,
        "pairs_right": sum(right for right, _ in names.values()),
        "pairs_asked": sum(asked for _, asked in names.values()),
        "asked": [one["text"] for together in searches for one in together],
    }
    return searched, searches


def table(results: Mapping[str, Any]) -> str:
    """The tables of the results as text."""
    ways = ("v2t", "t2v", "avg")
    lines = [f"{'':<30}" + "".join(f"{f'{m} {d}':>10}" for m in ("mAP", "nDCG") for d in ways) + f"{'verbs':>8}"]
    for row in results["metrics"]:
        keys = [k for m in ("mAP", "nDCG") for k in (f"{m}_v2t", f"{m}_t2v", m)]
        lines.append(f"{row['name']:<30}" + "".join(f"{_text(row[k]):>10}" for k in keys) + f"{_text(row['verb_accuracy']):>8}")
    lines.append("")
    names = {"ordered": "frames in order", "frozen": "one frozen frame"}
    for row in results["controls"]:
        name = names.get(row["name"], f"frames {row['name']}")
        values = [f"{key} {_text(row[key]):>5}" for key in ("mAP", "nDCG")]
        lines.append(f"{name:<30}{'   '.join(values)}   verbs {_text(row['verb_accuracy']):>5} %")
    return "\n".join(lines)


def _text(value):
    return "n/a" if value is None else f"{value:.1f}"


def _finite(metrics):
    """JSON has no NaN: a metric that no query defines becomes null."""
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def _configs(out, seed, quick, overrides):
    """The two configurations, their paths in `out`, and the texts of their files."""
    configs: dict[str, Any] = {"corpus": "corpus-quick" if quick else "corpus"}
    texts = {}
    for stage in STAGES:
        changes = [f"train.seed={seed}"] + (quick_overrides(stage, out / configs["corpus"]) if quick else []) + [*overrides]
        with resources.as_file(resources.files("evaat_fast.train").joinpath(f"{stage}.toml")) as path:
            configs[stage] = load(path, changes, base=out)
            # What was changed stands in the file, with absolute paths: it can be moved, and repeats the stage by itself.
            names = dict.fromkeys(".".join(parse_override(text)[0].split(".")[:2]) for text in changes)
            texts[stage] = with_values(path.read_text(), absolute(configs[stage], names), names).encode()
    return configs, texts


def quick_overrides(stage: str, corpus: Path) -> list[str]:
    """What --quick changes in a stage's configuration."""
    places = {"annotations": corpus / "annotations", "videos": corpus / "videos"}
    return QUICK[stage] + [f"data.{name}={json.dumps(str(path))}" for name, path in places.items()]


@contextlib.contextmanager
def video_progress(quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """What `kitchen.generate` calls after each video: a bar on a terminal, four lines elsewhere."""
    progress = None

    def report(done, total):
        nonlocal progress
        progress = progress or Progress(total, "videos", quiet)
        if not progress.bar and (done * 4 // total > (done - 1) * 4 // total):
            progress.say(f"     video {done} of {total}")
        progress.step()

    try:
        yield report
    finally:
        if progress:
            progress.close()


def _corpus(root, quick, quiet):
    """Makes the corpus unless it is there."""
    from evaat_fast.data import kitchen

    sizes = {name: _clips(quick, name) for name in ("train_clips", "test_clips")}
    with video_progress(quiet) as progress:
        kitchen.generate(root, progress=progress, **sizes)


def _done(configs, overwrite):
    """For each stage how many epochs of it are there to go on from; None where it is to be made anew."""
    done: dict[str, float | None] = {}
    before = None
    for stage in STAGES:
        last = checkpoint.find(configs[stage].train.out)
        done[stage] = None
        if overwrite or last is None or (before is not None and checkpoint.written(last) < checkpoint.written(before)):
            overwrite = True  # what follows began from the weights of this stage
            continue
        try:
            stored = checkpoint.read(last)
        except ValueError:
            stored = {}
        same = stored.get("version") == evaat_fast.__version__ and stored["config"] == absolute(configs[stage]).to_dict()
        if same:
            done[stage], before = stored["epoch"], last
        overwrite = not same or stored["epoch"] < configs[stage].train.epochs
    return done


def _earlier(configs, done):
    """What the epochs of a stage took, where some were trained by an earlier call."""
    logs = {stage: read(Path(configs[stage].train.out) / "log.jsonl") for stage in STAGES if done[stage]}
    return {stage: round(sum(r["seconds"] for r in log if r["event"] == "epoch"), 1) for stage, log in logs.items()}


def _forecast(configs, done, device, quick):
    """How long it will take, in words: a few steps of each stage are timed, on clips of noise."""
    videos, training = 0.0, 0.0
    if not (Path(configs["pretrain"].data.annotations).parent / "kitchen.json").exists():
        videos = _clips(quick, "train_clips", "test_clips") * _MAKING / min(8, os.cpu_count() or 1)
    training += _clips(quick, "train_clips") * _DECODING / min(16, os.cpu_count() or 1)
    for stage in STAGES:
        config = configs[stage]
        left = config.train.epochs - (done[stage] or 0)
        if left > 0:
            training += left * (_clips(quick, "train_clips") // config.train.batch_size) * pace.step_seconds(config, device)
    found = ", ".join(f"{done[s]} of {configs[s].train.epochs} epochs of {s}" for s in STAGES if done[s])
    words = f"about {duration(videos + training)} on this machine" + (
        f", {duration(videos)} of it for videos" if videos else ""
    )
    words += f"; found: {found}; --overwrite would make them anew" if found else "; interrupted, the same command goes on"
    return words


def _clips(quick, *names):
    sizes = {"train_clips": 96, "test_clips": 48} if quick else {"train_clips": 3072, "test_clips": 192}
    return sum(sizes[name] for name in names)


def _chance(test):
    """The metrics of random scores, the mean over some draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        evaluation.measure(torch.rand(len(test), len(test.captions), generator=generator), test) for _ in range(RANDOM_DRAWS)
    ]
    return {name: sum(d[name] for d in draws) / len(draws) for name in draws[0]}
