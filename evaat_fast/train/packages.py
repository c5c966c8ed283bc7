"""The packages of the extras that a command needs, looked for before it begins."""

import importlib
import sys

from evaat_fast.train.config import Config

# The extra that brings each module; PIL is pillow's.
EXTRAS = {
    "av": "video",
    "decord": "video",
    "ftfy": "train",
    "jinja2": "train",
    "matplotlib": "train",
    "PIL": "train",
    "pyarrow": "video",
    "regex": "train",
    "starlette": "serve",
    "tokenizers": "train",
    "tqdm": "train",
    "usearch": "usearch",
    "uvicorn": "serve",
}
PAGE = ("jinja2", "matplotlib", "PIL")  # what `report` needs


def of_data(config: Config) -> tuple[str, ...]:
    """What reading clips and captions needs: PyAV reads headers whatever decodes."""
    decoder = ("decord",) if config.data.decoder == "decord" else ()
    return "av", *decoder, "pyarrow", "ftfy", "regex", "tokenizers"


def of_progress(quiet: bool = False) -> tuple[str, ...]:
    """What `Progress` needs: a bar is drawn on a terminal only."""
    return () if quiet or not sys.stderr.isatty() else ("tqdm",)


def of_search(approximate: bool = False) -> tuple[str, ...]:
    """What searching an index needs."""
    return "av", "pyarrow", "ftfy", "regex", "tokenizers", *(("usearch",) if approximate else ())


def require(what: str, *names: str) -> None:
    """Imports the packages, as one that is there may still be broken.

    Args:
        what: needs them, to begin the message with. names: keys of EXTRAS.

    Raises:
        ImportError: names all that cannot be imported, and the one command that installs them.
    """
    missing = {}
    for name in dict.fromkeys(names):
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library of its own
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            missing[name] = "" if absent else f" ({(str(error) or type(error).__name__).splitlines()[0]})"
    if missing:
        extras = ",".join(sorted({EXTRAS[name] for name in missing}))
        listed = ", ".join(name + reason for name, reason in missing.items())
        raise ImportError(f"{what} needs {listed}: pip install 'evaat-fast[{extras}]'")


def require_boards(config: Config) -> None:
    """Imports what train.tensorboard and train.wandb need.

    Raises:
        ImportError: names the key, and the command that installs its package.
    """
    wanted = {"tensorboard": (config.train.tensorboard, "torch.utils.tensorboard"), "wandb": (config.train.wandb, "wandb")}
    for name, (asked, module) in wanted.items():
        if not asked:
            continue
        try:
            importlib.import_module(module)
        except (ImportError, OSError, AttributeError):  # the last is torch's, where an old one is installed
            raise ImportError(f"train.{name} needs {name}: pip install {name}") from None
