"""The command line: `evaat-fast`, and `python -m evaat_fast`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from evaat_fast import __version__, _commands
from evaat_fast.data.choices import FRAMES
from evaat_fast.search import PORT

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
    if arguments.command in ("train", "check") and not getattr(arguments, "keys", False):
        given = (arguments.config is not None) + (arguments.recipe is not None)
        if given != 1:
            also = ", not both" if given else "; train --keys prints one to start from, evaat-fast recipes lists the paper's"
            parser.error(f"{arguments.command}: expected CONFIG.toml or --recipe NAME{also}")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a failed download is one line of ours, not twelve warnings before it
    try:
        return _run(arguments)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        again = "; the same command continues"
        index = again + (" without --overwrite" if getattr(arguments, "begun", False) else "")
        goes_on = {"train": "; --resume continues", "demo": again, "index": index}.get(arguments.command, "")
        if text := "interrupted" if type(stop) is KeyboardInterrupt else str(stop):  # of several processes one speaks
            print(text + goes_on, file=sys.stderr)
        return getattr(stop, "status", 130)


def _run(arguments):
    try:
        from evaat_fast.ops._core.dispatch import BackendError
    except ValueError as error:  # EVAAT_FAST_BACKEND
        return _complain(arguments, error)
    from evaat_fast.data.video import VideoError
    from evaat_fast.train.config import ConfigError

    try:
        return arguments.run(arguments) or 0
    except (ConfigError, VideoError, BackendError, NotImplementedError, OSError, ImportError, _commands.Mistake) as error:
        if isinstance(error, BrokenPipeError) or (isinstance(error, ImportError) and "pip install" not in str(error)):
            raise  # ours name the extra to install; any other is a fault
        return _complain(arguments, error)


def _complain(arguments, error):
    # torch's reasons run over many lines, the first of which says it; of what a worker raised, the last.
    lines = (str(error) or type(error).__name__).strip().splitlines()
    text = lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else lines[0]
    print(f"evaat-fast {arguments.command or 'doctor'}: {text}", file=sys.stderr)
    return EXIT_MISTAKE


def _parser():
    parser = argparse.ArgumentParser(
        prog="evaat-fast",
        description="Train and evaluate EVA02-AT, and search your own videos by text; without a command: what works here, and "
        "why not.",
    )
    parser.add_argument("--version", action="version", version=f"evaat-fast {__version__}")
    parser.set_defaults(run=_commands.doctor, command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser("demo", help="make a small corpus, train on it, show the result as a page")
    command.add_argument("--out", default="demo", metavar="DIR", help="folder of the corpus, the runs and the page (demo)")
    command.add_argument("--seed", type=_seed, default=0, help="of weights, batches and crops (0)")
    command.add_argument("--quick", action="store_true", help="a tiny corpus and few epochs, to see that all of it works")
    command.add_argument("--overwrite", action="store_true", help="train anew, and do not go on where an earlier one was")
    _add_set(command, "for both stages")
    command.set_defaults(run=_commands.demo)

    command = commands.add_parser(
        "init",
        help="captions and a configuration for a folder of your own videos",
        description="A configuration and a file of captions for a folder of your own videos.",
    )
    command.add_argument("folder", metavar="FOLDER", help="of videos, at any depth; captions beside them are used")
    command.add_argument("--out", default=".", metavar="DIR", help="where captions.csv and config.toml are written (.)")
    command.add_argument("--overwrite", action="store_true", help="replace them where they are there; never written captions")
    command.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long training may take here (10)")
    command.set_defaults(run=_commands.init)

    command = commands.add_parser(
        "check",
        help="what is missing or unreadable in a run's data",
        description="What is missing, unreadable or outside its video in a run's data.",
    )
    _add_run(command)
    command.add_argument("--all", action="store_true", help="read the header of every file, not of each video's ends alone")
    command.add_argument("--json", metavar="FILE", help="write the findings there too, with every clip they touch")
    command.add_argument(
        "--write-sums", action="store_true", help="first read every file whole, and keep its checksums in the folder data.sums"
    )
    _add_set(command)
    command.set_defaults(run=_commands.check)

    command = commands.add_parser("train", help="train as a TOML file says; --keys lists what it can say")
    _add_run(command)
    command.add_argument("--keys", action="store_true", help="print every key with its default and meaning, as a TOML file")
    _add_set(command)
    group = command.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if there is one")
    group.add_argument("--overwrite", action="store_true", help="start anew where train.out already holds a run")
    command.set_defaults(run=_commands.train)

    command = commands.add_parser(
        "eval",
        help="a checkpoint on a test set, beside the paper's numbers",
        description="A checkpoint on a benchmark's test set, beside the paper's numbers.",
    )
    _add_model(command)
    command.add_argument(
        "--task", choices=("ek100-mir", "egomcq", "charades-ego", "retrieval"), help="(ek100-mir; of data.kind = csv retrieval)"
    )
    command.add_argument("--stage", choices=("zero-shot", "fine-tuned"), help="the rows of the paper to show (a guess)")
    command.add_argument("--json", metavar="FILE", help="write what came out, and all that repeating it needs")
    command.add_argument("--allow-partial", action="store_true", help="go on without clips that cannot be read, and say so")
    command.add_argument("--frames", choices=FRAMES, help="a control (eval.frames)")
    command.add_argument("--scores", choices=("cosine", "lavila"), default="cosine", help="lavila: as its code has them")
    command.add_argument("--prompt", default="{}", metavar="TEXT", help="what Charades-Ego's class names are put into")
    command.add_argument(
        "--trick",
        action="append",
        default=[],
        choices=("flip", "three-crops", "dual-softmax"),
        help="raises the numbers, and is said beside them; can be given again",
    )
    command.set_defaults(run=_commands.evaluate)

    _add_index(commands)
    _add_search(commands)
    _add_serve(commands)

    command = commands.add_parser("features", help="embeddings of clips and captions, for other programs")
    _add_model(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the files; an interrupted run goes on there")
    command.add_argument("--split", default="test", help="of data.kind: train or test (test)")
    command.add_argument("--format", choices=("parquet", "npz"), default="parquet", help="(parquet)")
    command.add_argument("--rows", type=int, default=8192, metavar="N", help="a file has (8192)")
    command.add_argument("--allow-partial", action="store_true", help="go on without clips that cannot be read, and say so")
    command.set_defaults(run=_commands.features)

    command = commands.add_parser("recipes", help="the paper's runs as configurations; with a NAME, that file")
    command.add_argument("name", metavar="NAME", nargs="?")
    command.set_defaults(run=_commands.recipes)

    command = commands.add_parser(
        "prepare",
        help="check a download of a data set and convert its metadata",
        description="Check a download of a data set and convert its metadata; can be run again.",
    )
    command.add_argument(
        "dataset", metavar="DATASET", help="ek100-mir, ek100-clips, egoclip, egoclip-plus, egomcq or charades-ego"
    )
    command.add_argument("source", metavar="SOURCE", help="its file or folder of annotations")
    command.add_argument(
        "--videos", metavar="DIR", help="folder of its videos, which are looked for and whose headers are read"
    )
    command.add_argument("--out", default="prepared", metavar="DIR", help="where DATASET/ is made (prepared)")
    command.add_argument("--force", action="store_true", help="make anew what is up to date, too")
    chunking = command.add_argument_group("re-encoding to chunks that decode fast")
    chunking.add_argument("--chunk", metavar="FOLDER", help="write the videos there, in chunks; goes on where it was")
    chunking.add_argument("--chunk-seconds", type=int, metavar="N", help="of a chunk (15)", dest="seconds")
    chunking.add_argument("--short-side", type=int, metavar="PIXELS", help="of its pictures (288)")
    chunking.add_argument("--crf", type=int, help="quality, lower is better and larger (23)")
    chunking.add_argument("--workers", type=int, metavar="N", help="processes; one for each processor")
    chunking.add_argument("--dry-run", action="store_true", help="say what it will cost, and stop")
    command.set_defaults(run=_commands.prepare)

    command = commands.add_parser(
        "convert",
        help="weights in other names: ours, EVA's, timm's, open_clip's, ...",
        description="A file of weights in other names: ours, EVA's, timm's, open_clip's, AVION's.",
    )
    command.add_argument("source", metavar="IN", help="a file, the index of one in shards, or a folder that holds one")
    command.add_argument("target", metavar="OUT", help="the file to write: .safetensors, or another name for torch's format")
    layouts = ("ours", "eva", "timm", "open_clip", "avion", "lavila")
    command.add_argument("--to", choices=layouts, default="ours", help="whose names (ours)")
    command.add_argument(
        "--activation", choices=("gelu", "quick_gelu"), help="of a CLIP whose file does not say: OpenAI's is quick"
    )
    command.add_argument(
        "--norm", choices=("clip", "lavila", "timm"), help="the pixels' mean that it was trained with, if IN says another"
    )
    command.set_defaults(run=_commands.convert)

    command = commands.add_parser("make-kitchen", help="generate the toy kitchen, a corpus in EK-100's layout")
    command.add_argument("dir", metavar="DIR")
    command.add_argument("--train-clips", type=int, default=1536)
    command.add_argument("--test-clips", type=int, default=192)
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument(
        "--formats", choices=("ek100", "all"), default="ek100", help="all: also every other real layout (ek100)"
    )
    command.set_defaults(run=_commands.make_kitchen)

    command = commands.add_parser("doctor", help="versions, and which backend serves which op here")
    command.set_defaults(run=_commands.doctor)
    return parser


def _add_index(commands):
    command = commands.add_parser(
        "index",
        help="make videos searchable by text; again: what is new or gone",
        description="Make videos searchable by text; run again, it takes up what is new, changed or gone.",
    )
    command.add_argument("videos", metavar="VIDEOS", nargs="+", help="folders, or files")
    command.add_argument(
        "--checkpoint", metavar="PATH", help="weights: a file, a run's folder, or a name as eva02_clip_b16; needed once"
    )
    command.add_argument("--out", metavar="DIR", help="folder of the index (VIDEOS/.evaat-index)")
    command.add_argument("--seconds", type=float, metavar="S", help="of a clip (2)")
    command.add_argument("--overlap", type=float, metavar="SHARE", help="of a clip with the next (0.5)")
    command.add_argument("--frames", type=int, metavar="T", help="of a clip (as the weights were trained; 4 for pictures)")
    command.add_argument("--shots", action="store_true", default=None, help="no clip reaches beyond a cut; decodes all frames")
    command.add_argument("--workers", type=int, metavar="N", help="threads that decode; one for each processor")
    command.add_argument("--device", default="auto", help="of the model: auto, cpu or cuda (auto)")
    command.add_argument("--retry", action="store_true", help="try again what could not be read")
    command.add_argument("--overwrite", action="store_true", help="index anew, with other weights or settings")
    command.add_argument("--approximate", action="store_true", help="also a graph for search --approximate, up to date with it")
    command.add_argument("--json", metavar="FILE", help="write there what was indexed, and what could not be read")
    command.set_defaults(run=_commands.index)


def _add_search(commands):
    command = commands.add_parser(
        "search",
        help="the best moments of indexed videos for a text",
        description="The best moments of indexed videos for a text, or like another moment.",
    )
    command.add_argument(
        "query", metavar="QUERY", nargs="?", help='text; "a + b" adds, "a - b" takes away, signs with spaces around them'
    )
    command.add_argument(
        "--like", action="append", default=[], metavar="FILE@TIME", help="as video.mp4@12.5 or @01:02; can be given again"
    )
    _add_opened(command)
    command.add_argument("-k", "--k", type=int, default=10, metavar="N", help="moments (10)")
    command.add_argument("--folder", metavar="DIR", help="only videos below it")
    command.add_argument("--after", metavar="DATE", help="only files of this date or later, as 2026-05-31")
    command.add_argument("--before", metavar="DATE", help="only files of earlier dates")
    command.add_argument("--clips", action="store_true", help="single clips; those of one event are not united")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--page", metavar="FILE", help="write a page that shows them")
    command.add_argument("--open", action="store_true", help="open that page (search.html in the index, without --page)")
    command.add_argument("--cut", metavar="DIR", help="write each moment there as an mp4 file")
    command.set_defaults(run=_commands.search)


def _add_serve(commands):
    command = commands.add_parser(
        "serve",
        help="a page that searches indexed videos and plays what it finds",
        description="A page on this machine that searches indexed videos and plays what it finds.",
    )
    _add_opened(command)
    command.add_argument("--port", type=int, default=PORT, help=f"0 takes a free one ({PORT})")
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 lets everyone in the network see the videos (127.0.0.1, this machine alone)",
    )
    command.add_argument("--open", action="store_true", help="open the page in a browser")
    command.set_defaults(run=_commands.serve)


def _add_opened(command):
    command.add_argument("--index", metavar="DIR", help="an index, or a folder that has one (this one, or the nearest above)")
    command.add_argument("--device", default="auto", help="of the model: auto, cpu or cuda (auto)")
    command.add_argument("--approximate", action="store_true", help="by the graph of index --approximate: tens of millions")


def _add_run(command):
    """What `train` and `check` share: a configuration, or a recipe."""
    command.add_argument("config", metavar="CONFIG.toml", nargs="?")
    command.add_argument(
        "--recipe", metavar="NAME", help="instead of a file, one of evaat-fast recipes; paths are this folder's"
    )


def _add_model(command):
    """What `eval` and `features` share: a model, and the files it is shown."""
    command.add_argument("config", metavar="CONFIG.toml", nargs="?", help="not needed for a checkpoint of a run, which has it")
    command.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="PATH",
        help="of a run (last.pt, last.parts, or its folder), or other weights",
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
