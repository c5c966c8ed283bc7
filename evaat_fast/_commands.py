"""What each command of `evaat-fast` does with its parsed arguments. Imports are in the functions, so that no command waits for
what another one needs. A function returns the exit status, or None for 0."""

import argparse
import contextlib
import functools
import json
import math
import os
import shlex
import sys
from pathlib import Path

from evaat_fast._files import write_json


class Mistake(Exception):
    """Another error whose message is all that the user needs."""


@contextlib.contextmanager
def _mistakes(*kinds):
    try:
        yield
    except (ValueError, *kinds) as error:
        raise Mistake(error) from None


def doctor(arguments: argparse.Namespace) -> int | None:
    from evaat_fast import doctor

    print(doctor.report(), flush=True)
    return 0 if doctor.healthy() else 1


def demo(arguments: argparse.Namespace) -> None:
    from evaat_fast.train import demo

    demo.run(
        arguments.out,
        seed=arguments.seed,
        quick=arguments.quick,
        overrides=arguments.overrides,
        overwrite=arguments.overwrite,
    )


def init(arguments: argparse.Namespace) -> None:
    from evaat_fast.train import begin, packages
    from evaat_fast.train.log import Progress

    packages.require("evaat-fast init", "av", "pyarrow", *packages.of_progress())
    with Progress(0, "headers") as progress, _mistakes():
        options = {"overwrite": arguments.overwrite, "minutes": arguments.minutes}
        said = begin.write(arguments.folder, arguments.out, **options, progress=progress.to)
    print(said)


def train(arguments: argparse.Namespace) -> None:
    from evaat_fast.train import Diverged, evaluation, train
    from evaat_fast.train.ranks import OtherFailed

    if arguments.keys:
        from evaat_fast.train.config import template

        print(template())
        return
    config = _run_of(arguments)
    with _mistakes(Diverged, OtherFailed):
        result = train(config, resume=arguments.resume, overwrite=arguments.overwrite)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first prints
        return
    if result["metrics"]:  # not every corpus has a retrieval test
        ranks = () if config.data.kind == "ek100-mir" else ("R@1", "R@5", "R@10", "MedR")
        names = [name for name in ("mAP", "nDCG", *ranks) if f"{name}_v2t" in result["metrics"]]
        if any(math.isfinite(result["metrics"][f"{name}_{way}"]) for name in names for way in ("v2t", "t2v")):
            print("\n".join(evaluation.lines(result["metrics"], names)))
        else:
            print("not measured: too few test clips, or captions, for a rank to mean anything")
    print(f"checkpoint {result['checkpoint']}\nlog        {result['log']}")
    if config.data.kind == "csv":
        folder, run = (shlex.quote(str(path)) for path in (config.data.videos, config.train.out))
        print(f"next: evaat-fast index {folder} --checkpoint {run}")


def _run_of(arguments, training=True):
    """The configuration of `train` and `check`."""
    from evaat_fast.train import load, recipes

    if arguments.recipe is not None:
        return recipes.load(arguments.recipe, arguments.overrides, training=training)
    return load(arguments.config, arguments.overrides, training=training)


def recipes(arguments: argparse.Namespace) -> None:
    from evaat_fast.train import recipes

    if arguments.name is not None:
        print(recipes.path(arguments.name).read_text(), end="")
        return
    titles = recipes.titles()
    width = max(map(len, titles))
    print("\n".join(f"{name:<{width}}  {title}" for name, title in titles.items()))
    print("\nevaat-fast train --recipe NAME --set data.videos=... starts one, evaat-fast recipes NAME > run.toml copies it")


def check(arguments: argparse.Namespace) -> int | None:
    from evaat_fast.data.check import check as check_clips
    from evaat_fast.train import inputs, packages
    from evaat_fast.train.log import Progress

    config = _run_of(arguments, training=False)
    packages.require("the check", *packages.of_data(config), *packages.of_progress())
    if arguments.json:
        _check_file(arguments.json)
    if arguments.write_sums:
        with Progress(0, "checksums") as progress, _mistakes():
            print(inputs.write_sums(config, progress.to))
    with _mistakes():
        splits = inputs.splits(config, missing="broken")
    record, wrong = {}, False
    for name, data, allowed in (("train", splits.train, config.data.max_broken), ("test", splits.test, 0.0)):
        if data is None:
            continue
        with Progress(0, f"{name}: headers") as progress:
            report = check_clips(data, files="all" if arguments.all else "ends", progress=progress.to)
        print(f"{name}: {report}")
        record[name] = report.to_dict(data.table)
        if report.share > allowed:
            wrong = True
            print(f"  {len(report.broken)} clips ({100 * report.share:.3g} %) cannot be used, more than {100 * allowed:g} %")
    if arguments.json:
        write_json(arguments.json, record)
    return 1 if wrong else 0


def evaluate(arguments: argparse.Namespace) -> None:
    from evaat_fast.train import ConfigError, outcome, packages, tasks, trainer

    config = _config(arguments)
    task = arguments.task or ("retrieval" if config.data.kind == "csv" else "ek100-mir")
    kind = tasks.kind_of(task)
    if config.data.kind != kind and not arguments.annotations:
        raise ConfigError(
            f"--task {task}: the configuration's data are {config.data.kind!r}; give the task's own files by "
            "--annotations and --videos"
        )
    if kind == "ek100-mir" or kind == "csv":
        config.data.kind = kind
    packages.require("evaluation", *packages.of_data(config), *packages.of_progress())
    if arguments.json:
        _check_file(arguments.json)
    options = tasks.Options(
        scores=arguments.scores,
        prompt=arguments.prompt,
        tricks=tuple(dict.fromkeys(arguments.trick)),
        temperature=config.loss.temperature,
        partial=arguments.allow_partial,
    )
    with _mistakes():
        record = outcome.run(
            task,
            config,
            arguments.checkpoint,
            trainer.choose_device(config),
            stage=arguments.stage,
            frames=arguments.frames,
            options=options,
            say=lambda line: print(line, file=sys.stderr),
        )
    print(outcome.text(record))
    if arguments.json:
        write_json(arguments.json, record)


def features(arguments: argparse.Namespace) -> None:
    from evaat_fast.train import ConfigError, features, packages, trainer

    if len(arguments.checkpoint) > 1:
        raise ConfigError("--checkpoint: features are of one model; give it once")
    config = _config(arguments)
    packages.require("features", *packages.of_data(config), *packages.of_progress())
    trainer.check_folder(arguments.out, "--out")
    with _mistakes():
        report = features.write(
            config,
            arguments.checkpoint[0],
            arguments.out,
            trainer.choose_device(config),
            split=arguments.split,
            form=arguments.format,
            rows=arguments.rows,
            partial=arguments.allow_partial,
            say=lambda line: print(line, file=sys.stderr),
        )
    print(report)


def _config(arguments):
    """The configuration of `eval` and `features`: a file's, or the one that a run's checkpoint holds."""
    from evaat_fast.model.checkpoints import read
    from evaat_fast.train.checkpoint import find
    from evaat_fast.train.config import ConfigError, load, of
    from evaat_fast.train.outcome import run_of

    places = {"annotations": arguments.annotations, "videos": arguments.videos}
    overrides = [f"data.{name}={json.dumps(os.path.abspath(path))}" for name, path in places.items() if path]
    overrides += ['data.sums=""'] if arguments.videos else []  # they are of the configuration's own
    overrides = [*arguments.overrides, *overrides]
    if arguments.config:
        config = load(arguments.config, overrides, training=False)
    for i, path in enumerate(arguments.checkpoint):
        if not Path(path).exists():
            raise FileNotFoundError(f"--checkpoint: there is no file {path!r}")
        if Path(path).is_dir():
            arguments.checkpoint[i] = os.fspath(find(path) or path)
    if not arguments.config:
        with _mistakes():
            stored = run_of(arguments.checkpoint[0]).get("config")
            if not stored:
                read(arguments.checkpoint[0])  # says what is wrong with a file that cannot be read
        if not stored:
            raise ConfigError(
                f"CONFIG.toml: expected one, as {arguments.checkpoint[0]!r} is of no run, and does not say how clips are read"
            )
        # The run may have had a GPU that is not here.
        stored = {section: dict(values) for section, values in stored.items()}
        stored["train"] = {**stored["train"], "device": "auto"}
        config = of(stored, arguments.checkpoint[0], overrides, training=False)
    return config


def _check_file(path):
    """Proves that the file of --json can be written to."""
    from evaat_fast.train.config import ConfigError
    from evaat_fast.train.trainer import check_folder

    check_folder(Path(path).parent, "--json")
    if Path(path).is_dir():
        raise ConfigError(f"--json: {path!r} is a folder; expected a file to write")


def index(arguments: argparse.Namespace) -> None:
    from evaat_fast.search import Index
    from evaat_fast.search.index import FOLDER
    from evaat_fast.search.store import MANIFEST
    from evaat_fast.train import packages
    from evaat_fast.train.log import Progress, duration
    from evaat_fast.train.trainer import check_folder

    if arguments.out is None and (len(arguments.videos) > 1 or not Path(arguments.videos[0]).is_dir()):
        if len(arguments.videos) == 1 and not Path(arguments.videos[0]).exists():
            raise FileNotFoundError(f"VIDEOS: there is no folder {arguments.videos[0]!r}")
        raise Mistake("--out: where to? without one VIDEOS is a single folder, in which the index then lies")
    folder = Path(arguments.out) if arguments.out is not None else Path(arguments.videos[0]) / FOLDER
    packages.require("indexing", "pyarrow", *packages.of_progress())  # the others when there is something to read
    if arguments.approximate:
        packages.require("--approximate", "usearch")
    if arguments.json:
        _check_file(arguments.json)
    given = {name: getattr(arguments, name) for name in ("seconds", "overlap", "frames", "shots")}
    with _mistakes(RuntimeError):
        if new := arguments.overwrite or not (folder / MANIFEST).exists():
            check_folder(folder, "--out")
            if arguments.checkpoint is None:
                raise Mistake("--checkpoint: of what? a file of weights, a run's folder, or a name as eva02_clip_b16")
            packages.require("indexing", "av", "ftfy", "regex", "tokenizers")
            some = {name: value for name, value in given.items() if value is not None}
            opened = Index.create(folder, arguments.checkpoint, device=arguments.device, overwrite=arguments.overwrite, **some)
            arguments.begun = arguments.overwrite
        else:
            opened = Index.open(folder, device=arguments.device)
            opened.check(arguments.checkpoint, **given)
        with Progress(0, "index") as progress:

            def advance(at):
                left = f", {duration(at.remaining)} left" if at.bytes else ""
                progress.to(at.bytes, at.all_bytes, f"{at.clips_per_second:.1f} clips/s{left}, {at.videos} of {at.of} videos")

            report = opened.add(arguments.videos, retry=arguments.retry, workers=arguments.workers, progress=advance)
        if arguments.approximate:
            with Progress(0, "graph") as progress:
                opened.build_graph(arguments.workers, progress.to)
    from evaat_fast.search.moments import printable

    for name, why in list(report.unreadable.items())[:_SHOWN]:
        print(f"cannot be read: {printable(name)}: {printable(why)}")
    if (more := len(report.unreadable) - _SHOWN) > 0:
        print(f"... and {more:,} more; --json FILE lists all")
    print(f"{report}\n{_has(opened)}")
    if new and len(opened):
        where = _index_option(folder)
        print(f"next: evaat-fast search TEXT{where}, or for a page evaat-fast serve{where} --open")
    if arguments.json:
        write_json(arguments.json, report.to_dict())


_SHOWN = 20  # unreadable videos that `index` names


def _has(index):
    return f"{index.folder}: {len(index):,} clips of {len(index.files):,} videos"


def _index_option(folder):
    """What `search` and `serve` need to be told here, so that they find an index."""
    from evaat_fast.search import find
    from evaat_fast.search.index import FOLDER
    from evaat_fast.search.store import BadIndex

    with contextlib.suppress(BadIndex):
        if find().samefile(folder):
            return ""
    return f" --index {shlex.quote(os.fspath(folder.parent if folder.name == FOLDER else folder))}"


def search(arguments: argparse.Namespace) -> int | None:
    from evaat_fast.search import Index, find
    from evaat_fast.train import packages

    if arguments.query is None and not arguments.like:
        raise Mistake("QUERY: expected text, or --like FILE@TIME")
    packages.require("searching", *packages.of_search(arguments.approximate))
    with _mistakes(RuntimeError):
        opened = Index.open(find() if arguments.index is None else arguments.index, device=arguments.device)
        found = opened.search(
            arguments.query,
            like=arguments.like,
            k=arguments.k,
            folder=arguments.folder,
            after=arguments.after,
            before=arguments.before,
            merge=not arguments.clips,
            approximate=arguments.approximate,
        )
    print(found.to_json() if arguments.json else found, flush=True)
    say = functools.partial(print, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.page or arguments.open:
        from evaat_fast.search import page

        try:
            path = page.write(found, arguments.page or opened.folder / "search.html")
        except OSError as error:
            raise Mistake(f"--page: the page cannot be written: {error}; --page FILE writes it elsewhere") from None
        say(f"page {path}")
        if arguments.open:
            import webbrowser

            webbrowser.open(path.as_uri())
    failed = False
    if arguments.cut:
        from evaat_fast.search import cut

        for path, why in cut.cut(found, arguments.cut).items():
            say(f"{path}: {why}" if why else path)
            failed = failed or why is not None
    return 1 if failed else 0


def serve(arguments: argparse.Namespace) -> None:
    from evaat_fast.search import Index, find, server
    from evaat_fast.train import packages

    packages.require("serving", *packages.of_search(arguments.approximate), "PIL", "starlette", "uvicorn")
    if not 0 <= arguments.port < 1 << 16:
        raise Mistake(f"--port: expected 0 to 65535, got {arguments.port}")
    with _mistakes(RuntimeError):
        opened = Index.open(find() if arguments.index is None else arguments.index, device=arguments.device)
        if arguments.approximate:
            opened.graph()

    def started(address):
        print(f"{_has(opened)}\n{address}  (Ctrl-C ends it)", flush=True)
        if not server.is_local(arguments.host):
            print("everyone who reaches this machine can see the videos", file=sys.stderr, flush=True)
        if arguments.open:
            import webbrowser

            webbrowser.open(address)

    try:
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            server.serve(opened, arguments.host, arguments.port, approximate=arguments.approximate, started=started)
    except OSError as error:
        raise Mistake(
            f"--host, --port: {arguments.host} port {arguments.port}: {error.strerror or error}; --port 0 takes a free one"
        ) from None


def convert(arguments: argparse.Namespace) -> None:
    from evaat_fast.model import convert
    from evaat_fast.train.trainer import check_folder

    check_folder(Path(arguments.target).parent, "OUT")
    if all(map(os.path.exists, (arguments.source, arguments.target))) and os.path.samefile(arguments.source, arguments.target):
        raise Mistake(f"OUT: {arguments.target!r} is IN; expected another file")
    if Path(arguments.target).is_dir():
        raise Mistake(f"OUT: {arguments.target!r} is a folder; expected a file to write")
    said = {name: getattr(arguments, name) for name in ("activation", "norm") if getattr(arguments, name)}
    with _mistakes():
        print(convert(arguments.source, arguments.target, arguments.to, **said))


def prepare(arguments: argparse.Namespace) -> int | None:
    from evaat_fast.data import prepare
    from evaat_fast.train import packages
    from evaat_fast.train.log import Progress
    from evaat_fast.train.trainer import check_folder

    if arguments.dataset not in prepare.DATASETS:
        raise Mistake(f"DATASET: expected one of {', '.join(prepare.DATASETS)}, got {arguments.dataset!r}")
    check_folder(arguments.out, "--out")
    packages.require("evaat-fast prepare", "pyarrow", *packages.of_progress())
    bars: dict[str, Progress] = {}
    with contextlib.ExitStack() as opened:

        def advance(what, done, of):
            if what not in bars:
                bars[what] = opened.enter_context(Progress(of, what))
            bars[what].to(done, of)

        with _mistakes():
            report = prepare.prepare(
                arguments.dataset,
                arguments.source,
                arguments.out,
                videos=arguments.videos,
                force=arguments.force,
                progress=advance,
            )
    print(report)
    status = 0 if report.complete else 1
    if arguments.chunk:
        with _mistakes():
            status = max(status, _chunk(arguments, report))
    if not (arguments.chunk and report.complete):
        print(f"next: {report.next}")
    return status


def _chunk(arguments, report):
    """Re-encodes the videos that the data set's tables name, of those that are whole files."""
    from evaat_fast.data import ClipTable, chunks, layout
    from evaat_fast.train.trainer import check_folder

    if not arguments.videos:
        raise Mistake("--chunk: of which videos? give their folder as --videos")
    if Path(arguments.videos).resolve() == Path(arguments.chunk).resolve():
        raise Mistake(f"--chunk: expected another folder than --videos, got {str(arguments.chunk)!r} for both")
    check_folder(arguments.chunk, "--chunk")
    names = dict.fromkeys(name for path in report.tables.values() for name in ClipTable.open(path).videos())
    found = layout.find(arguments.videos, names, missing="skip")
    whole = {name: source for name, source in found.items() if source.layout == "whole"}
    if not whole:
        raise Mistake(f"--chunk: expected whole videos in {arguments.videos!r}; found {len(found)} of {len(names)}, in chunks")
    given = {name: getattr(arguments, name) for name in ("seconds", "short_side", "crf")}
    settings = chunks.Settings(**{name: value for name, value in given.items() if value is not None})
    cost = chunks.estimate(whole, arguments.chunk, settings, arguments.workers)
    print(f"chunks of {settings.seconds} s in {arguments.chunk}: {cost}")
    if arguments.dry_run:
        return 0
    if cost.bytes > cost.free:
        print("there is not enough room; --short-side and --crf make chunks smaller")
        return 1

    def report_video(name, done, of):
        print(f"{done} of {of}: {name}", flush=True)

    failed = chunks.write(whole, arguments.chunk, settings, workers=arguments.workers, progress=report_video)
    for name, why in failed.items():
        print(f"not written: {name}: {why}")
    return 1 if failed else 0


def make_kitchen(arguments: argparse.Namespace) -> None:
    from evaat_fast.data import kitchen
    from evaat_fast.train import packages
    from evaat_fast.train.demo import video_progress
    from evaat_fast.train.trainer import check_folder

    check_folder(arguments.dir, "DIR")
    packages.require("the toy kitchen", "av", *packages.of_progress())
    with _mistakes():
        with video_progress() as progress:
            corpus = kitchen.generate(
                arguments.dir,
                train_clips=arguments.train_clips,
                test_clips=arguments.test_clips,
                seed=arguments.seed,
                progress=progress,
            )
        if arguments.formats == "all":
            from evaat_fast.data.kitchen_formats import write_all

            with video_progress() as progress:
                write_all(corpus, progress=progress)
    print(f"annotations {corpus.annotations}\nvideos      {corpus.videos}")
    if arguments.formats == "all":
        print(f"formats     {corpus.root / 'formats'}")
    print("in a TOML file: [data] annotations = ..., videos = ...; evaat-fast train --keys prints one to start from")
