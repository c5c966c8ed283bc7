"""The paper's runs as configurations: where each value is from, that they differ where they should, and that each trains."""

import json
import re
from pathlib import Path

import formats
import pytest
from corpus import corpus

from evaat_fast.cli import main
from evaat_fast.train import config as configs
from evaat_fast.train import recipes
from evaat_fast.train.config import ConfigError
from evaat_fast.train.log import read

ROOT = Path(__file__).resolve().parents[1]
NAMES = tuple(f"{run}-{size}" for run in ("charades-ego", "egoclip", "egoclip-plus", "ek100-mir") for size in "bl")
# The same models, of few and narrow layers; frames, losses, schedules and how clips are read stay the recipe's.
NARROW = {
    "image_size": 64,
    "patch_size": 32,
    "rope_grid": 2,
    "vision_layers": 1,
    "text_layers": 1,
    "vision_width": 32,
    "vision_heads": 1,
    "vision_mlp": 32,
    "text_width": 32,
    "text_heads": 1,
}
SMALL = [f"model.overrides.{name}={value}" for name, value in NARROW.items()]
SMALL += ["data.workers=0", "train.epochs=1", "train.batch_size=16", "train.device=cpu"]


def test_there_is_one_for_each_run_and_model():
    assert tuple(recipes.titles()) == NAMES
    for name, title in recipes.titles().items():
        assert f"EVA02-AT-{name[-1].upper()} " in title and f"train --recipe {name}\n" in recipes.path(name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_each_value_has_its_source(name):
    lines = recipes.path(name).read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+ = ", line)]
    assert len(values) > 25
    for line in values:
        assert re.search(r" # (paper|AVION|SMS-Loss|ours)\b", line), line
    for keyless in set(lines) - set(values):
        assert not keyless or keyless.startswith(("#", "[")), keyless
    assert max(map(len, lines)) <= 128


# What the paper says (arXiv 2506.14356v1, section V-A), and no file may lose.
PAPER = {
    "egoclip": {
        "model.num_frames": 4,
        "loss.name": "clip",
        "loss.temperature": 0.05,
        "optim.lr": 3e-5,
        "schedule.name": "constant",
        "train.epochs": 5,
    },
    "ek100-mir": {
        "model.num_frames": 16,
        "loss.name": "sms",
        "loss.margin": 0.6,
        "loss.relaxation": 0.1,
        "optim.lr": 2e-5,
        "schedule.start_lr": 1e-6,
        "schedule.warmup_epochs": 1.0,
        "train.epochs": 100,
    },
    "charades-ego": {
        "model.num_frames": 16,
        "loss.name": "sms",
        "loss.rule": "charades",
        "loss.margin": 0.3,
        "optim.lr": 3e-5,
        "schedule.start_lr": 1e-6,
        "train.epochs": 10,
    },
}
BATCHES = {"egoclip-b": 1024, "egoclip-l": 512, "egoclip-plus-b": 1024, "egoclip-plus-l": 512}
NEITHER_SAYS_MORE = {"model.name", "model.pretrained", "train.batch_size", "train.out", "train.init", "schedule.end_lr"}


def values_of(name):
    config = recipes.load(name).to_dict()
    return {key: config[key.split(".")[0]][key.split(".")[1]] for key in configs.KEYS}


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_numbers(name):
    values = values_of(name)
    for key, value in PAPER[name[:-2].replace("-plus", "")].items():
        assert values[key] == value, key
    assert values["data.kind"] == name[:-2]
    assert values["train.batch_size"] == BATCHES.get(name, values["train.batch_size"])
    assert values["model.name"] == {"b": "eva02_at_base_patch16_224", "l": "eva02_at_large_patch14_224"}[name[-1]]


def test_models_and_corpora_differ_in_nothing_else():
    def differing(a, b):
        a, b = values_of(a), values_of(b)
        return {key for key in a if a[key] != b[key]}

    for run in dict.fromkeys(name[:-2] for name in NAMES):
        assert differing(f"{run}-b", f"{run}-l") <= NEITHER_SAYS_MORE
    for size in "bl":
        assert differing(f"egoclip-{size}", f"egoclip-plus-{size}") == {"data.kind", "data.annotations", "train.out"}


# What a page has of its own: where things lie, and a batch and blocks for one GPU.
ITS_OWN = {"data.annotations", "data.videos", "train.out", "train.init", "train.batch_size", "model.grad_checkpointing"}


@pytest.mark.parametrize("page,name", [("ego4d", "egoclip-b"), ("ek100", "ek100-mir-b"), ("charades-ego", "charades-ego-b")])
def test_the_walk_throughs_say_the_same(page, name):
    tomllib = pytest.importorskip("tomllib")
    text = (ROOT / "docs" / "datasets" / f"{page}.md").read_text()
    assert f"evaat-fast recipes {name}`" in text
    values, said = values_of(name), tomllib.loads(re.search(r"^```toml\n(.*?)^```$", text, re.S | re.M)[1])
    for section, keys in said.items():
        for key, value in keys.items():
            if f"{section}.{key}" not in ITS_OWN | {"model.pretrained"}:  # a file there, the same weights' tag here
                assert values[f"{section}.{key}"] == value, f"{section}.{key}"


@pytest.fixture(scope="module")
def places():
    """data.annotations and data.videos of each kind of data."""
    made = formats.kitchen()
    return {
        "egoclip": (made.egoclip, made.ego4d_videos["video_15s"]),
        "egoclip-plus": (made.ego4d, made.ego4d_videos["video_15s"]),
        "ek100-mir": (made.ek100, corpus().videos),
        "charades-ego": (made.charades, made.charades_videos),
    }


def start(name, places, folder, *more):
    """What a user types, with data that are there and a smaller model; the path of the checkpoint."""
    kind = recipes.load(name).data.kind
    annotations, videos = places[kind]
    own = [f"data.annotations={annotations}", f"data.videos={videos}", f"train.out={folder / name}", *SMALL, *more]
    assert main(["train", "--recipe", name, *(word for change in own for word in ("--set", change))]) == 0
    return folder / name / "last.pt"


@pytest.fixture(scope="module")
def pretrained(places, tmp_path_factory):
    pytest.importorskip("tokenizers")
    pytest.importorskip("pyarrow")
    folder, made = tmp_path_factory.mktemp("pretrained"), {}

    def of(size):
        if size not in made:
            made[size] = start(f"egoclip-plus-{size}", places, folder, "model.pretrained=''")
        return made[size]

    return of


# With layers as narrow the large model is the base one, but for its heads and the width of its patches.
WAITS = ("charades-ego-l", "ek100-mir-l")


@pytest.mark.together("recipes")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in WAITS else n for n in NAMES])
def test_each_trains(name, places, pretrained, tmp_path, capsys):
    size = name[-1]
    if name.startswith("egoclip-plus"):
        last = pretrained(size)
    elif name.startswith("egoclip"):
        last = start(name, places, tmp_path, "model.pretrained=''")
    else:  # 4 frames become 16
        last = start(name, places, tmp_path, f"train.init={pretrained(size)}")
    steps = [r for r in read(last.parent / "log.jsonl") if r["event"] == "step"]
    assert last.is_file() and len(steps) >= 1
    written = json.loads((last.parent / "config.json").read_text())
    assert written["loss"] == recipes.load(name).to_dict()["loss"]
    assert written["model"]["num_frames"] == recipes.load(name).model.num_frames


def test_a_recipe_is_printed_and_listed(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +EVA02-AT-", printed, re.M) for name in NAMES)
    assert main(["recipes", "egoclip-b"]) == 0
    assert capsys.readouterr().out == recipes.path("egoclip-b").read_text()


@pytest.mark.parametrize("arguments", [["recipes", "egoclip"], ["train", "--recipe", "egoclip"], ["check", "--recipe", "ego"]])
def test_an_unknown_one_is_named(arguments, capsys):
    assert main(arguments) == 2
    assert "did you mean 'egoclip-" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="^recipe: there is no 'nothing'"):
        recipes.path("nothing")


@pytest.mark.parametrize("arguments", [["train"], ["check"], ["train", "a.toml", "--recipe", "egoclip-b"]])
def test_a_file_or_a_recipe(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected CONFIG.toml or --recipe NAME" in capsys.readouterr().err


def test_paths_are_the_current_folders(places, tmp_path, monkeypatch, capsys):
    (tmp_path / "EK100").mkdir()
    (tmp_path / "prepared").mkdir()
    (tmp_path / "EK100/video_320p_15sec").symlink_to(places["ek100-mir"][1])
    (tmp_path / "prepared/ek100-mir").symlink_to(places["ek100-mir"][0])
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--recipe", "ek100-mir-b"]) == 0
    assert "48 clips" in capsys.readouterr().out
