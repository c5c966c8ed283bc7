"""A toy kitchen for tests, made once per process."""

import functools
import shutil
import tempfile

import pytest

from evaat_fast.data import kitchen


@functools.cache
def corpus(**settings):
    """A small generated corpus; its folder lives as long as the process. Without PyAV, which makes it, the test is skipped."""
    pytest.importorskip("av")
    folder = tempfile.TemporaryDirectory(prefix="evaat-kitchen-")
    made = kitchen.generate(f"{folder.name}/kitchen", train_clips=48, test_clips=16, **settings)
    _folders.append(folder)
    return made


_folders = []


def copied(folder):
    """The small corpus in a folder of its own, to be damaged."""
    made = corpus()
    shutil.copytree(made.root, folder / "copy")
    return type(made)(folder / "copy", folder / "copy" / "annotations", folder / "copy" / "videos")


def configuration(folder, *overrides, out="run"):
    """A configuration of the smallest model on the small corpus, written to a folder, with changes."""
    from evaat_fast.train import load

    kitchen, path = corpus(), folder / "run.toml"
    path.write_text(f"""
        [model]
        name = "eva02_at_tiny_patch16_64"
        num_frames = 2
        overrides = {{ patch_size = 32, vision_layers = 1, text_layers = 1, vision_width = 32, vision_heads = 1, vision_mlp = 32 }}
        [data]
        annotations = "{kitchen.annotations}"
        videos = "{kitchen.videos}"
        cache = true
        [optim]
        lr = 1e-3
        [schedule]
        warmup_epochs = 0.5
        [train]
        out = "{out}"
        epochs = 2
        batch_size = 16
        device = "cpu"
        """)  # noqa: E501
    return load(path, overrides)
