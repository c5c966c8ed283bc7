"""Pages that name keys and commands: all of them exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from evaat_fast.cli import _parser
from evaat_fast.data.prepare import DATASETS
from evaat_fast.model import ModelConfig
from evaat_fast.train import recipes
from evaat_fast.train.config import KEYS, SECTIONS, parse_override

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("migration.md", "cluster.md", "scaling.md", "training.md", "../README.md")
FIELDS = {f.name for f in dataclasses.fields(ModelConfig)}


def ours(page):
    """The code between backticks, of tables without their first column, which is theirs in one page."""
    lines = (DOCS / page).read_text().splitlines()
    text = "\n".join(line.split(" | ", 1)[-1] if page == "migration.md" and line.startswith("| ") else line for line in lines)
    return re.findall(r"`([^`\n]+)`", text)


def check_key(name):
    section, _, field = name.partition(".overrides.")
    assert name in KEYS or (section == "model" and field in FIELDS), name


@pytest.mark.parametrize("page", PAGES)
def test_every_key_exists(page):
    found = {name for code in ours(page) for name in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z]\w*(?:\.\w+)*", code)}
    found = {name for name in found if not name.endswith((".sbatch", ".toml", ".py", ".recompute"))}  # files, and a module
    assert len(found) >= {"migration.md": 30, "cluster.md": 8, "training.md": 5}.get(page, 0)
    for name in found:
        check_key(name)


def commands(page):
    for code in ours(page):
        words = shlex.split(code)
        if words[:1] == ["evaat-fast"] and len(words) > 1:
            yield words[1:]
        elif "evaat_fast" in words and words[0] == "torchrun" and words[-1] != "evaat_fast":
            yield words[words.index("evaat_fast") + 1 :]
        elif "docs/cluster/train.sbatch" in words:
            yield ["train", *words[words.index("docs/cluster/train.sbatch") + 1 :]]
        elif words[:2] == ["python", "docs/cluster/submit.py"]:
            yield ["train", *words[words.index("--") + 1 :]]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page):
    found = list(commands(page))
    assert len(found) >= {"migration.md": 15, "cluster.md": 4}.get(page, 0)
    parser = _parser()
    for words in found:
        try:
            arguments = parser.parse_args(words if len(words) > 1 or words[0] != "eval" else [*words, "--checkpoint", "a.pt"])
        except SystemExit:
            raise AssertionError(f"{page}: evaat-fast {shlex.join(words)}") from None
        if arguments.command == "prepare":
            assert arguments.dataset in DATASETS
        if getattr(arguments, "recipe", None):
            assert arguments.recipe in recipes.titles()
        for change in getattr(arguments, "overrides", ()):
            check_key(parse_override(change)[0])


def test_every_recipe_and_task_has_a_command():
    """Someone who comes from elsewhere finds each of them."""
    text = (DOCS / "migration.md").read_text()
    assert all(f"--recipe {name[:-2]}-b" in text for name in recipes.titles())
    assert all(name in text for name in ("ek100-mir", "egomcq", "charades-ego"))
    assert all(f"evaat-fast prepare {name} " in text for name in DATASETS if name != "ek100-clips")
