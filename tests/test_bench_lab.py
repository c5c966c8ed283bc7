"""The lab's entries are whole, and what they launch is right, emulated without a GPU."""

import importlib

import pytest
import torch


@pytest.fixture
def lab(bench_on_path):
    return importlib.import_module("lab")


def test_entries_say_what_they_ask(lab, capsys):
    lab.main(["--list"])
    shown = capsys.readouterr().out
    for name, entry in lab.ENTRIES.items():
        assert entry.question.endswith("?") and entry.expected and entry.decides
        assert f"{name}: {entry.question}" in shown and entry.expected in shown


@pytest.mark.interpret
def test_heads_of_128(lab, monkeypatch):
    sm90 = pytest.importorskip("evaat_fast.kernels.attn.sm90", reason="needs Triton 3.6", exc_type=ImportError)
    from gluon_emulated import emulate

    monkeypatch.setattr(sm90, "forward", emulate(sm90, 0).forward)
    for case in lab.ENTRIES["wide"].cases("cpu", True):
        assert len(case.variants) == 3
        for make in case.variants.values():
            (found,) = make(case.inputs)()
            case.check((found,))
            with pytest.raises(AssertionError):
                case.check((found + 0.1,))
        case.yardstick(case.inputs)()


@pytest.mark.interpret
def test_packed_clips(lab, monkeypatch):
    sm90 = pytest.importorskip("evaat_fast.kernels.attn.sm90_clips", reason="needs Triton 3.6", exc_type=ImportError)
    from gluon_emulated import emulate

    emulated = emulate(sm90, 0)
    monkeypatch.setattr(sm90, "forward", emulated.forward)
    monkeypatch.setattr(sm90, "backward", emulated.backward)
    for case in lab.ENTRIES["clips"].cases("cpu", True):
        for make in case.variants.values():
            (found,) = make(case.inputs)()
            case.check((found,))
            with pytest.raises(AssertionError):
                case.check((found + 0.1,))


@pytest.mark.interpret
def test_forward_behind_a_launch_that_turns_keys(lab, monkeypatch):
    sm90 = pytest.importorskip("evaat_fast.kernels.attn.sm90", reason="needs Triton 3.6", exc_type=ImportError)
    from gluon_emulated import emulate

    monkeypatch.setattr(sm90, "forward", emulate(sm90, 0).forward)
    for case in lab.ENTRIES["pdl"].cases("cpu", True):
        assert len(case.variants) == 2
        for make in case.variants.values():
            case.check(make(case.inputs)())
        case.yardstick(case.inputs)()


@pytest.mark.interpret
def test_info_nce(lab, monkeypatch):
    kernels = pytest.importorskip("evaat_fast.kernels.pairwise.contrast_sm90", reason="needs Triton 3.6", exc_type=ImportError)
    from gluon_emulated import emulate

    for name, launcher in vars(emulate(kernels, 0)).items():
        monkeypatch.setattr(kernels, name, launcher)
    (case,) = lab.ENTRIES["clip"].cases("cpu", True)
    assert list(case.variants) == ["Triton", "Gluon"]
    for make in case.variants.values():
        found = make(case.inputs)()
        case.check(found)
        with pytest.raises(AssertionError):
            case.check([x + 0.1 for x in found])
    case.yardstick(case.inputs)()


def test_without_a_gpu_it_says_so(lab):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="needs a GPU"):
        lab.main([next(iter(lab.ENTRIES))])
    with pytest.raises(SystemExit):
        lab.main(["nothing"])
