"""What setup.py builds: contents of sdist and wheel, no torch in the build, CUDA by choice, a module that needs no driver."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup(arguments, folder, **variables):
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist unpacked: what the wheel is built from."""
    out = tmp_path_factory.mktemp("sdist")
    run = setup(["egg_info", "--egg-base", str(out), "sdist", "--dist-dir", str(out)], ROOT)
    assert run.returncode == 0, run.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return next(p for p in out.iterdir() if p.is_dir() and (p / "setup.py").exists())


def test_sdist_holds_every_source(sdist):
    sources = (
        "csrc/**/*.* kernels/**/*.py evaat_fast/**/*.py evaat_fast/**/*.gz evaat_fast/**/*.toml tests/*.py bench/*.py docs/*.md"
    )
    for pattern in sources.split():
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (sdist / path.relative_to(ROOT)).exists(), f"{path.relative_to(ROOT)} is missing from the sdist"
    assert not list(sdist.rglob("*.so"))


@pytest.mark.slow  # .ci/run does it
def test_wheel_contents_without_torch_or_cuda(sdist, tmp_path):
    # A torch that fails to import stands where the build would find it: the build must not ask for torch at all.
    (tmp_path / "torch.py").write_text("raise RuntimeError('the build imported torch')\n")
    # -O0 as nothing of it runs: 20 s of compiling become 10.
    without = dict(EVAAT_FAST_CUDA="0", PYTHONPATH=str(tmp_path), CXXFLAGS="-O0")
    run = setup(["bdist_wheel", "--dist-dir", str(tmp_path)], sdist, **without)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("evaat_fast/_cpu.") and not n.endswith(".pyi") for n in names)
    assert not any(n.startswith("evaat_fast/_cuda.") and not n.endswith(".pyi") for n in names)
    assert "evaat_fast/kernels/__init__.py" in names
    assert {"evaat_fast/py.typed", "evaat_fast/_cpu.pyi", "evaat_fast/_cuda.pyi"} <= set(names)
    assert any(n.endswith("bpe_simple_vocab_16e6.txt.gz") for n in names)
    assert {"evaat_fast/train/pretrain.toml", "evaat_fast/train/recipes/egoclip-b.toml"} <= set(names)
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith((".dist-info", ".data"))} == {"evaat_fast"}, "nothing else may be importable"


def test_extension_has_no_torch_symbols():
    from evaat_fast import _cpu

    if not (nm := subprocess.run(["nm", "-D", _cpu.__file__], capture_output=True, text=True)).returncode == 0:
        pytest.skip("no nm here")
    assert not [line for line in nm.stdout.splitlines() if "c10" in line or "at6Tensor" in line or "_ZN5torch" in line]


def test_cuda_module_imports_without_a_driver():
    from evaat_fast.ops._core import dispatch as _dispatch

    reason = _dispatch.why_not("cuda")
    if reason is not None and "No module named" in reason:
        pytest.skip("built without nvcc")
    assert reason is None


@pytest.mark.parametrize(
    "variables,message",
    [
        ({"EVAAT_FAST_CUDA": "1", "CUDA_HOME": "", "PATH": "/nowhere"}, "EVAAT_FAST_CUDA=1, but there is no nvcc"),
        ({"EVAAT_FAST_CUDA_ARCHS": "hopper"}, "CUDA architecture 'hopper': expected the form of"),
        ({"EVAAT_FAST_CUDA_ARCHS": "99.9"}, "knows no architecture '99.9'"),
    ],
)
def test_bad_build_settings(variables, message, tmp_path):
    import shutil

    if "EVAAT_FAST_CUDA_ARCHS" in variables and not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    run = setup(["build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l")], ROOT, **variables)
    assert run.returncode != 0 and message in run.stderr


def test_every_phony_target_has_a_rule():
    lines = (ROOT / "Makefile").read_text().splitlines()
    (phony,) = (line.split(":")[1].split() for line in lines if line.startswith(".PHONY:"))
    rules = {line.split(":")[0] for line in lines if line[:1].isalpha() and ":" in line}
    assert set(phony) <= rules
