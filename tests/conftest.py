"""Fixtures of every tier. Unwritten outputs fail: torch.empty and its kin are filled with what shows."""

import functools
import os
import random
from pathlib import Path

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
PLACE = pytest.StashKey[int]()
torch.manual_seed(0)  # for what modules draw as they are collected, which every process of a tier must draw alike


def spread(cases, n, seed):
    """n of the cases, each the one with the most values of parameters that none before it has, until all were there; again."""
    rest, chosen, seen = random.Random(seed).sample(cases, len(cases)), [], set()
    while rest and len(chosen) < n:
        values = [{(name, str(value)) for name, value in case.callspec.params.items()} for case in rest]
        best = max(range(len(rest)), key=lambda i: len(values[i] - seen))
        seen = seen | values[best] if values[best] - seen else values[best]
        chosen.append(rest.pop(best))
    return chosen


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    """Each tier runs where it can: `interpret` only in its own process, `gpu` only with a device. Of the cases that a tier
    has of a test marked `sample(n)` all but n, chosen by its name, are slow; with `sample(n, tier)` in that tier alone. Tests
    marked `together(name)` follow the first of that name."""
    sampled = {}
    for item in items:
        mark = item.get_closest_marker("sample")
        if mark and all(tier in item.keywords for tier in mark.args[1:]):
            name = item.nodeid.split("[")[0]
            sampled.setdefault((name, *(tier in item.keywords for tier in ("interpret", "gpu"))), []).append(item)
    for (name, *_), cases in sampled.items():
        for item in set(cases).difference(spread(cases, cases[0].get_closest_marker("sample").args[0], name)):
            item.add_marker(pytest.mark.slow)
    first = {}
    for i, item in enumerate(items):
        mark = item.get_closest_marker("together")
        item.stash[PLACE] = first.setdefault(mark.args[0], i) if mark else i
    items.sort(key=lambda item: item.stash[PLACE])
    for item in items:
        if "interpret" in item.keywords and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 in a process of its own (make test does it)"))
        if INTERPRET and "interpret" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason="not a test of the interpreter"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """Memory that a kernel forgets to write must not look like zeros."""
    if request.node.get_closest_marker("counts"):
        return

    def poison(make):
        def filled(*args, **kwargs):
            x = make(*args, **kwargs)
            if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.device.type == "meta":
                return x
            return fill(x)

        return filled

    @torch.no_grad()  # some are parameters
    def fill(x):
        """NaN; of signed integers a number that is no index and no count; 165 of bytes; every second bool, as none is wrong."""
        if x.dtype == torch.bool:
            return x.copy_((torch.arange(x.numel(), device=x.device) % 2 == 0).view(x.shape))
        if x.is_floating_point() or x.is_complex():
            return x.fill_(float("nan"))
        limits = torch.iinfo(x.dtype)
        return x.fill_(limits.min // 3 if limits.min else 165)

    made = {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty", "new_empty_strided")}
    for owner, names in made.items():
        for name in names:
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def bench_on_path(monkeypatch):
    """The scripts of bench/ import one another."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def isa(request):
    """Each instruction set that the C++ kernels are compiled for and this machine has."""
    from evaat_fast import _cpu

    before = _cpu.isa()
    if _cpu.set_isa(request.param) != request.param:
        _cpu.set_isa(before)
        pytest.skip("this machine has no such instructions")
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture
def configure(tmp_path):
    """Configurations of runs in the test's own folder: see `corpus.configuration`."""
    from corpus import configuration

    return functools.partial(configuration, tmp_path)
