"""The pages of docs/datasets, followed word by word on miniature files of the real names and layouts, whole and damaged; and
that of one's own videos, on such as a phone has."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.request
from pathlib import Path

import formats
import pytest
from corpus import corpus
from test_readme import blocks, commands

import evaat_fast as package
from evaat_fast.cli import main
from evaat_fast.train.config import toml_value

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[1]
# In this order: what is fine-tuned was pretrained on the first page.
PAGES = [ROOT / "docs" / "datasets" / f"{name}.md" for name in ("ego4d", "ek100", "charades-ego")]
FENCE = re.compile(r"^```(bash|toml)\n(.*?)^```$", re.S | re.M)
TINY = {
    "model": {
        "name": "eva02_at_tiny_patch16_64",
        "num_frames": 2,
        "overrides": {
            "patch_size": 32,
            "vision_layers": 1,
            "text_layers": 1,
            "vision_width": 32,
            "vision_heads": 1,
            "vision_mlp": 32,
        },
    },
    "data": {"workers": 0},
    "train": {"epochs": 1, "batch_size": 8, "device": "cpu"},
}


def place(folder):
    """The miniature data sets where the pages have them."""
    made = formats.kitchen()
    # Its chunks are what the page makes.
    shutil.copytree(made.ego4d, folder / "Ego4D", ignore=shutil.ignore_patterns("video_*"))
    for name, target in {
        "EK100/epic-kitchens-100-annotations/retrieval_annotations": made.ek100,
        "EK100/video_320p_15sec": corpus().videos,
        "epic-kitchens-100-clips": made.ek100_clips,
        "CharadesEgo/CharadesEgo": made.charades,
        "CharadesEgo/CharadesEgo_v1_480": made.charades_videos,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return place(tmp_path_factory.mktemp("walkthrough"))


def small(text):
    """A page's configuration for a model that trains in seconds; all that says where data lie, and how they are read, stays."""
    tomllib = pytest.importorskip("tomllib")
    values = tomllib.loads(text)
    values["model"].pop("pretrained", None)
    for section, changes in TINY.items():
        values[section] = {**values.get(section, {}), **changes}
    values["schedule"]["warmup_epochs"] = min(values["schedule"]["warmup_epochs"], 1)
    return "\n".join(f"[{s}]\n" + "\n".join(f"{k} = {toml_value(v)}" for k, v in keys.items()) for s, keys in values.items())


@pytest.fixture
def evaat_fast(capsys, monkeypatch):
    """Runs a command line in a folder, in this process: a page has a dozen, and each would import torch."""

    def run(line, folder):
        words = shlex.split(line)
        assert words[0] == "evaat-fast"
        monkeypatch.chdir(folder)
        status = main(words[1:])
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, captured.out, captured.err)

    return run


def steps(page):
    """("toml", name, text) and ("bash", line, None), in order."""
    for language, code in FENCE.findall(page.read_text()):
        if language == "toml":
            yield "toml", re.match(r"# (\S+\.toml)\n", code)[1], code
        else:
            yield from (("bash", line, None) for line in code.splitlines())


@pytest.mark.together("walkthroughs")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page, workspace, evaat_fast):
    said = ""
    for kind, what, text in steps(page):
        if kind == "toml":
            (workspace / what).write_text(small(text))
            continue
        run = evaat_fast(what, workspace)
        assert run.returncode == 0, f"{what}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
        said += run.stdout
    assert "nothing wrong found" in said
    assert "EVA02-AT" in said  # the paper's rows stand beside ours


def test_every_page_is_followed():
    assert sorted(PAGES) == sorted((ROOT / "docs" / "datasets").glob("*.md"))
    assert all(blocks(page, "bash") and blocks(page, "toml") for page in PAGES)


DAMAGE = {
    "ego4d": ("Ego4D/egoclip.csv", "Ego4D/full_scale/*.mp4"),
    "ek100": (
        "EK100/epic-kitchens-100-annotations/retrieval_annotations/EPIC_100_retrieval_train.csv",
        "EK100/video_320p_15sec/P01/*/0.MP4",
    ),
    "charades-ego": ("CharadesEgo/CharadesEgo/CharadesEgo_v1_test_only1st.csv", "CharadesEgo/CharadesEgo_v1_480/*.mp4"),
}


@pytest.fixture
def spoilt(tmp_path):
    """The data sets as files of the test's own."""
    original = place(tmp_path / "linked")
    shutil.copytree(original, tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_damage_is_named_and_counted(page, spoilt, evaat_fast):
    metadata, pattern = DAMAGE[page.stem]
    prepare = [what for kind, what, _ in steps(page) if kind == "bash" and what.startswith("evaat-fast prepare")]
    prepare = prepare[0].partition(" --chunk ")[0]
    video = sorted(spoilt.glob(pattern))[0]
    video.write_bytes(video.read_bytes()[:1000])
    run = evaat_fast(prepare, spoilt)
    assert run.returncode == 1 and "INCOMPLETE" in run.stdout and "1 files damaged" in run.stdout, run.stdout + run.stderr
    assert video.name in run.stdout and "get what is missing" in run.stdout
    _, name, text = next(step for step in steps(page) if step[0] == "toml")
    (spoilt / name).write_text(small(text).replace("init =", "# init =").replace("Ego4D/video_15s", "Ego4D/full_scale"))
    run = evaat_fast(f"evaat-fast check {name}", spoilt)
    assert run.returncode == 1 and video.stem in run.stdout, run.stdout + run.stderr
    assert "files that cannot be read" in run.stdout
    run = evaat_fast(f"evaat-fast train {name}", spoilt)
    assert run.returncode == 2 and "cannot be used, more than data.max_broken" in run.stderr.splitlines()[-1]
    table = spoilt / metadata
    table.write_bytes(table.read_bytes()[:-40])
    run = evaat_fast(prepare, spoilt)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert re.search(rf"{table.name}: (the last )?line", run.stderr), run.stderr


OWN = ROOT / "docs" / "own-videos.md"
CAPTIONS = ["a dog runs", "somebody opens the door", "waves on the beach", "somebody closes the door"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Weights of pictures where a download would put them."""
    small = {**TINY["model"]["overrides"], "num_frames": 1}
    package.model.save_checkpoint(package.create_model("eva02_at_tiny_patch16_64", **small), tmp_path / "hub.safetensors")
    monkeypatch.setattr(
        pytest.importorskip("huggingface_hub"), "hf_hub_download", lambda *_, **__: str(tmp_path / "hub.safetensors")
    )


@pytest.fixture
def visits(monkeypatch):
    """What came of each address that was to be opened: a served page is asked as a browser would, then comes Ctrl-C."""
    seen = []

    def opened(address):
        if not address.startswith("http"):
            seen.append((address, Path(urllib.request.url2pathname(address.removeprefix("file://"))).read_text(), None))
            return
        threading.Thread(target=visit, args=(address,), daemon=True).start()

    def visit(address):
        def get(path):
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                return answer.read()

        try:
            page, found = get("").decode(), json.loads(get("api/search?q=the+dog+runs"))["moments"]
            best = found[0]
            assert get(f"poster/{best['key']}?t={best['peak']}")[:2] == b"\xff\xd8" and len(get(f"video/{best['key']}")) > 1000
            seen.append((address, page, found))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("webbrowser.open", opened)
    return seen


def test_own_videos(tmp_path, evaat_fast, visits, hub):
    """Also what the page says around its commands: captions are written after the first init, and nothing is changed by any."""
    pytest.importorskip("uvicorn")
    films = pytest.importorskip("films")
    folder, table = tmp_path / "Phone Videos", tmp_path / "captions.csv"
    unreadable = films.phone(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    small = " ".join(f"--set {shlex.quote(f'model.{k}={toml_value(v)}')}" for k, v in TINY["model"].items() if k != "name")
    added = {"train": f" {small} --set train.epochs=2 --set train.device=cpu", "serve": " --port 0", "init": "", "index": ""}
    ran, said = [], ""
    for line in commands([OWN]):
        what = line.split()[1]
        run = evaat_fast(line + added.get(what, ""), tmp_path)
        assert run.returncode == 0 and not run.stderr, f"{line}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
        ran.append(what)
        said += run.stdout
        if what == "init" and ran.count("init") == 1:
            assert "fill in the column caption" in run.stdout and f"index '{folder.name}' --checkpoint run" in run.stdout
            assert all(f"cannot be read: {name!r}" in run.stdout for name in unreadable)
            with open(table, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == 12
            with open(table, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows({**row, "caption": CAPTIONS[i % len(CAPTIONS)]} for i, row in enumerate(rows))
    assert ran[:2] == ["index", "serve"] and set(ran) == {"init", "check", "train", "index", "serve", "search"}
    assert "nothing wrong found" in said and said.count("of 12 videos") >= 2 and "clips of 12 videos" in said
    assert "captions: captions.csv, 12 clips of 12 videos" in said and "next: evaat-fast index 'Phone Videos' --check" in said
    served = [found for _, _, found in visits if found is not None]
    assert len(served) == 2 and all(len({m["file"] for m in found}) == 12 for found in served)
    assert sum("<video" in page for address, page, _ in visits if address.startswith("file:")) == 1
    assert any((tmp_path / "moments").glob("*.mp4"))
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in folder.rglob("*") if path.is_file()} - set(before) == set((folder / ".evaat-index").glob("*"))
