"""A toy kitchen for tests, made once per process."""

import functools
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
