"""Every code block of the README runs, and its generated parts are what the code and the results say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peers import peer

import evaat_fast

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


PYTHON = [code for language, code in BLOCKS if language == "python"]


def run(blocks, names):
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)


def test_python_blocks_run_in_order():
    pytest.importorskip("tokenizers")
    run([code for code in PYTHON if "evaat_fast.integrations" not in code], {})


def test_blocks_for_other_libraries():
    timm, _ = peer("timm"), peer("transformers.integrations.hub_kernels")
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2)
    blocks = [code for code in PYTHON if "evaat_fast.integrations" in code]
    assert len(blocks) == 2
    run(blocks, {"timm_model": model})


def as_run_here(words, folder):
    """How a documented command is executed in a test: installs and make as dry runs, benchmarks and demos small."""
    python = sys.executable
    match words:
        case ["make", target]:
            return ["make", "-n", target]
        case ["pip", "install", *what]:
            return [python, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "-q", *what]
        case ["python", "-m", "evaat_fast", *rest]:
            return [python, "-m", "evaat_fast", *rest]
        case ["evaat-fast", *rest]:
            return [python, "-m", "evaat_fast", *rest]
        case ["python", script, *rest] if script.startswith("bench/"):
            return [python, script, "--quick", "--seconds", "0.01", "--json", str(folder / "result.json"), *rest]
    raise AssertionError(f"README shows a command that no test runs: {shlex.join(words)}")


COMMANDS = [line.split("#")[0].strip() for language, code in BLOCKS if language == "bash" for line in code.splitlines()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c])
def test_shell_commands(command, tmp_path):
    run = subprocess.run(as_run_here(shlex.split(command), tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("text", [code for language, code in BLOCKS if language == "toml"])
def test_configurations(text, tmp_path):
    from evaat_fast.train.config import load

    (tmp_path / "run.toml").write_text(text)
    config = load(tmp_path / "run.toml")
    assert config.model.name in evaat_fast.list_models()


def test_no_other_languages():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "toml"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_generated_parts_are_current():
    run = subprocess.run([sys.executable, "bench/plot.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
