"""The command line: `evaat-fast`, and `python -m evaat_fast`."""

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from evaat_fast import __version__

EXIT_MISTAKE = 2  # what the user can mend; argparse's own code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; None for the process's own.

    Returns:
        0, or 2 where the input was wrong: the message is one line on stderr then. Other failures raise.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "train" and arguments.config is None and not arguments.keys:
        parser.error("train: expected CONFIG.toml; --keys prints one to start from")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return _run(arguments)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted" + ("; --resume continues" if arguments.command == "train" else ""), file=sys.stderr)
        return 130


def _run(arguments):
    try:
        from evaat_fast.ops._core.dispatch import BackendError
    except ValueError as error:  # EVAAT_FAST_BACKEND
        return _complain(arguments, error)
    from evaat_fast.data.video import VideoError
    from evaat_fast.train.config import ConfigError

    try:
        return arguments.run(arguments) or 0
    except (ConfigError, VideoError, BackendError, NotImplementedError, OSError, ImportError, _Mistake) as error:
        if isinstance(error, BrokenPipeError) or (isinstance(error, ImportError) and "pip install" not in str(error)):
            raise  # ours name the extra to install; any other is a fault
        return _complain(arguments, error)


def _complain(arguments, error):
    # torch's reasons run over many lines, the first of which says it; of what a worker raised, the last.
    lines = (str(error) or type(error).__name__).strip().splitlines()
    text = lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else lines[0]
    print(f"evaat-fast {arguments.command or 'doctor'}: {text}", file=sys.stderr)
    return EXIT_MISTAKE


class _Mistake(Exception):
    """Another error whose message is all that the user needs."""


def _parser():
    parser = argparse.ArgumentParser(
        prog="evaat-fast", description="Train and evaluate EVA02-AT; without a command: what works here, and why not."
    )
    parser.add_argument("--version", action="version", version=f"evaat-fast {__version__}")
    parser.set_defaults(run=_doctor, command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("doctor", help="versions, and which backend serves which op here")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("demo", help="make a small corpus, train on it, and write a page that shows the result")
    command.add_argument("--out", default="demo", metavar="DIR", help="folder of the corpus, the runs and the page (demo)")
    command.add_argument("--seed", type=_seed, default=0, help="of weights, batches and crops (0)")
    command.add_argument("--quick", action="store_true", help="a tiny corpus and few epochs, to see that all of it works")
    _add_set(command, "for both stages")
    command.set_defaults(run=_demo)

    command = commands.add_parser("train", help="train as a TOML file says; --keys lists what it can say")
    command.add_argument("config", metavar="CONFIG.toml", nargs="?")
    command.add_argument("--keys", action="store_true", help="print every key with its default and meaning, as a TOML file")
    _add_set(command)
    group = command.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if there is one")
    group.add_argument("--overwrite", action="store_true", help="start anew where train.out already holds a run")
    command.set_defaults(run=_train)

    command = commands.add_parser("check", help="what is missing, unreadable or outside its video in a run's data")
    command.add_argument("config", metavar="CONFIG.toml")
    command.add_argument("--all", action="store_true", help="read the header of every file, not of each video's ends alone")
    command.add_argument("--json", metavar="FILE", help="write the findings there too, with every clip they touch")
    _add_set(command)
    command.set_defaults(run=_check)

    command = commands.add_parser("eval", help="a checkpoint on a benchmark's test set, beside the paper's numbers")
    _add_model(command)
    command.add_argument("--task", choices=("ek100-mir", "egomcq", "charades-ego"), default="ek100-mir", help="(ek100-mir)")
    command.add_argument("--stage", choices=("zero-shot", "fine-tuned"), help="the rows of the paper to show (a guess)")
    command.add_argument("--json", metavar="FILE", help="write what came out, and all that repeating it needs")
    command.add_argument("--allow-partial", action="store_true", help="go on without clips that cannot be read, and say so")
    command.add_argument("--frames", choices=("ordered", "shuffled", "reversed", "frozen"), help="a control (eval.frames)")
    command.add_argument("--scores", choices=("cosine", "lavila"), default="cosine", help="lavila: as its code has them")
    command.add_argument("--prompt", default="{}", metavar="TEXT", help="what Charades-Ego's class names are put into")
    command.add_argument(
        "--trick",
        action="append",
        default=[],
        choices=("flip", "three-crops", "dual-softmax"),
        help="raises the numbers, and is said beside them; can be given again",
    )
    command.set_defaults(run=_eval)

    command = commands.add_parser("features", help="embeddings of clips and captions, for other programs")
    _add_model(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the files; an interrupted run goes on there")
    command.add_argument("--split", default="test", help="of data.kind: train or test (test)")
    command.add_argument("--format", choices=("parquet", "npz"), default="parquet", help="(parquet)")
    command.add_argument("--rows", type=int, default=8192, metavar="N", help="a file has (8192)")
    command.add_argument("--allow-partial", action="store_true", help="go on without clips that cannot be read, and say so")
    command.set_defaults(run=_features)

    command = commands.add_parser("prepare", help="check a download of a data set and convert its metadata; can be run again")
    command.add_argument(
        "dataset", metavar="DATASET", help="ek100-mir, ek100-clips, egoclip, egoclip-plus, egomcq or charades-ego"
    )
    command.add_argument("source", metavar="SOURCE", help="its file or folder of annotations")
    command.add_argument(
        "--videos", metavar="DIR", help="folder of its videos, which are looked for and whose headers are read"
    )
    command.add_argument("--out", default="prepared", metavar="DIR", help="where DATASET/ is made (prepared)")
    command.add_argument("--force", action="store_true", help="make anew what is up to date, too")
    from evaat_fast.data import chunks

    chunks.add_arguments(command)
    command.set_defaults(run=_prepare)

    command = commands.add_parser("make-kitchen", help="generate the toy kitchen, a corpus in EK-100's layout")
    command.add_argument("dir", metavar="DIR")
    command.add_argument("--train-clips", type=int, default=1536)
    command.add_argument("--test-clips", type=int, default=192)
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument(
        "--formats", choices=("ek100", "all"), default="ek100", help="all: also every other real layout (ek100)"
    )
    command.set_defaults(run=_make_kitchen)
    return parser


def _add_model(command):
    """What `eval` and `features` share: a model, and the files it is shown."""
    command.add_argument("config", metavar="CONFIG.toml", nargs="?", help="not needed for a checkpoint of a run, which has it")
    command.add_argument(
        "--checkpoint", action="append", required=True, metavar="PATH", help="of a run (last.pt), or other weights"
    )
    command.add_argument("--annotations", metavar="PATH", help="instead of data.annotations")
    command.add_argument("--videos", metavar="DIR", help="instead of data.videos")
    _add_set(command)


def _add_set(command, note="a value in TOML, or a bare word; can be given again"):
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help=note)


def _seed(text):
    try:
        if 0 <= (seed := int(text)) < 2**31:
            return seed
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2147483647, got {text!r}")


def _doctor(arguments):
    from evaat_fast import doctor

    print(doctor.report(), flush=True)
    return 0 if doctor.healthy() else 1


def _demo(arguments):
    from evaat_fast.train import demo

    demo.run(arguments.out, seed=arguments.seed, quick=arguments.quick, overrides=arguments.overrides)


def _train(arguments):
    from evaat_fast.train import Diverged, load, train

    if arguments.keys:
        from evaat_fast.train.config import template

        print(template())
        return
    config = load(arguments.config, arguments.overrides)
    try:
        result = train(config, resume=arguments.resume, overwrite=arguments.overwrite)
    except (Diverged, ValueError) as error:
        raise _Mistake(error) from None
    if result["metrics"]:  # not every corpus has a retrieval test
        print(_metrics(result["metrics"]))
    print(f"checkpoint {result['checkpoint']}\nlog        {result['log']}")


def _check(arguments):
    from pathlib import Path

    from evaat_fast._files import write_atomically
    from evaat_fast.data.check import check
    from evaat_fast.train import inputs, load, packages
    from evaat_fast.train.log import Progress
    from evaat_fast.train.trainer import check_folder

    config = load(arguments.config, arguments.overrides, training=False)
    packages.require("the check", *packages.of_data(config), *packages.of_progress())
    if arguments.json:
        check_folder(Path(arguments.json).parent, "--json")
    try:
        splits = inputs.splits(config, missing="broken")
    except ValueError as error:
        raise _Mistake(error) from None
    record, wrong = {}, False
    for name, data, allowed in (("train", splits.train, config.data.max_broken), ("test", splits.test, 0.0)):
        if data is None:
            continue
        progress = Progress(0, f"{name}: headers")
        report = check(data, files="all" if arguments.all else "ends", progress=progress.to)
        progress.close()
        print(f"{name}: {report}")
        record[name] = report.to_dict(data.table)
        if report.share > allowed:
            wrong = True
            print(f"  {len(report.broken)} clips ({100 * report.share:.3g} %) cannot be used, more than {100 * allowed:g} %")
    if arguments.json:
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(arguments.json, lambda file: file.write(text.encode()))
    return 1 if wrong else 0


def _eval(arguments):
    from evaat_fast.train import evaluation_config, outcome, packages, tasks, trainer

    config = evaluation_config.of_task(arguments)
    packages.require("evaluation", *packages.of_data(config), *packages.of_progress())
    if arguments.json:
        evaluation_config.check_file(arguments.json, "--json")
    options = tasks.Options(
        scores=arguments.scores,
        prompt=arguments.prompt,
        tricks=tuple(dict.fromkeys(arguments.trick)),
        temperature=config.loss.temperature,
        partial=arguments.allow_partial,
    )
    try:
        record = outcome.run(
            arguments.task,
            config,
            arguments.checkpoint,
            trainer.choose_device(config),
            stage=arguments.stage,
            frames=arguments.frames,
            options=options,
            say=lambda line: print(line, file=sys.stderr),
        )
    except ValueError as error:
        raise _Mistake(error) from None
    print(outcome.text(record))
    if arguments.json:
        outcome.write(record, arguments.json)


def _features(arguments):
    from evaat_fast.train import evaluation_config, features, packages, trainer

    config = evaluation_config.of_features(arguments)
    packages.require("features", *packages.of_data(config), *packages.of_progress())
    trainer.check_folder(arguments.out, "--out")
    try:
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
    except ValueError as error:
        raise _Mistake(error) from None
    print(report)


def _metrics(metrics):
    """A table of both directions and their average, and the verb accuracy."""
    lines = [f"{'':<6}{'video->text':>13}{'text->video':>13}{'average':>9}"]
    for name in ("mAP", "nDCG"):
        lines.append(f"{name:<6}{metrics[f'{name}_v2t']:>13.2f}{metrics[f'{name}_t2v']:>13.2f}{metrics[name]:>9.2f}")
    if "verb_accuracy" in metrics:
        lines.append(f"verb accuracy of the caption retrieved first: {metrics['verb_accuracy']:.2f} %")
    excluded = metrics.get("excluded_v2t", 0), metrics.get("excluded_t2v", 0)
    if any(excluded):
        lines.append(f"left out of mAP, for nothing matches them exactly: {excluded[0]} clips, {excluded[1]} captions")
    return "\n".join(lines)


def _prepare(arguments):
    from evaat_fast.data import prepare
    from evaat_fast.train import packages
    from evaat_fast.train.trainer import check_folder

    if arguments.dataset not in prepare.DATASETS:
        raise _Mistake(f"DATASET: expected one of {', '.join(prepare.DATASETS)}, got {arguments.dataset!r}")
    check_folder(arguments.out, "--out")
    packages.require("evaat-fast prepare", "pyarrow", *packages.of_progress())
    bars: dict[str, Any] = {}
    try:
        report = prepare.prepare(
            arguments.dataset,
            arguments.source,
            arguments.out,
            videos=arguments.videos,
            force=arguments.force,
            progress=functools.partial(_advance, bars) if packages.of_progress() else None,
        )
    except ValueError as error:
        raise _Mistake(error) from None
    finally:
        for bar in bars.values():
            bar.close()
    print(report)
    if arguments.chunk:
        try:
            return _chunk(arguments, report)
        except ValueError as error:
            raise _Mistake(error) from None
    print(f"next: {report.next}")
    return 0 if report.complete else 1


def _chunk(arguments, report):
    """Re-encodes the videos that the data set's tables name, of those that are whole files."""
    from evaat_fast.data import ClipTable, chunks, layout
    from evaat_fast.train.trainer import check_folder

    if not arguments.videos:
        raise _Mistake("--chunk: of which videos? give their folder as --videos")
    check_folder(arguments.chunk, "--chunk")
    names = dict.fromkeys(name for path in report.tables.values() for name in ClipTable.open(path).videos())
    found = layout.find(arguments.videos, names, missing="skip")
    whole = {name: source for name, source in found.items() if source.kind == "whole"}
    if not whole:
        raise _Mistake(f"--chunk: expected whole videos in {arguments.videos!r}; found {len(found)} of {len(names)}, in chunks")
    return chunks.run(arguments, whole)


def _advance(bars, what, done, total):
    from tqdm import tqdm

    if what not in bars:
        scale = total > 1 << 24
        bars[what] = tqdm(desc=what, total=total, unit="B" if scale else "", unit_scale=scale, leave=False)
    bars[what].update(done - bars[what].n)


def _make_kitchen(arguments):
    from evaat_fast.data import kitchen
    from evaat_fast.train import packages
    from evaat_fast.train.demo import video_progress
    from evaat_fast.train.trainer import check_folder

    check_folder(arguments.dir, "DIR")
    packages.require("the toy kitchen", "av", *packages.of_progress())
    try:
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
    except ValueError as error:
        raise _Mistake(error) from None
    print(f"annotations {corpus.annotations}\nvideos      {corpus.videos}")
    if arguments.formats == "all":
        print(f"formats     {corpus.root / 'formats'}")
    print("in a TOML file: [data] annotations = ..., videos = ...; evaat-fast train --keys prints one to start from")
