"""Every code block of the README and of docs/ runs, links lead somewhere, and generated parts are what code and results say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peers import peer

import evaat_fast

ROOT = Path(__file__).resolve().parents[1]
SHOWN = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PROSE = [*SHOWN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
# What a block imports that is no dependency of ours: the module to look for.
PEERS = {"timm": "timm", "transformers": "transformers.integrations.hub_kernels", "peft": "peft"}

pages = pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path, language):
    return [code for found, code in FENCE.findall(path.read_text()) if found == language]


def peers_of(code):
    return [PEERS[name] for name in re.findall(r"^(?:import|from) (\w+)", code, re.M) if name in PEERS]


def run(path, chosen):
    """A page's blocks in order, in one namespace: a page can be read alone."""
    names = {}
    for code in chosen:
        exec(compile(code, str(path), "exec"), names)


@pages
def test_python_blocks_run_in_order(path):
    pytest.importorskip("tokenizers")
    run(path, [code for code in blocks(path, "python") if not peers_of(code)])


@pytest.mark.parametrize(
    "path,code",
    [pytest.param(p, c, id=f"{p.stem}-{peers_of(c)[0]}") for p in SHOWN for c in blocks(p, "python") if peers_of(c)],
)
def test_blocks_for_other_libraries(path, code):
    for name in peers_of(code):
        peer(name)
    run(path, [code])


def as_run_here(words):
    """How a documented command is executed in a test: installs and make as dry runs."""
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
    raise AssertionError(f"a page shows a command that no test runs: {shlex.join(words)}")


# Pages of data sets and of one's own videos are followed on files of theirs, by test_walkthroughs.py.
FOLLOWED = [path for path in SHOWN if path.parent.name == "datasets" or path.stem == "own-videos"]


def commands(paths):
    lines = [line.split("#")[0].strip() for path in paths for code in blocks(path, "bash") for line in code.splitlines()]
    return list(filter(None, lines))


COMMANDS = commands([path for path in SHOWN if path not in FOLLOWED])
COMMANDS = [line for line in dict.fromkeys(COMMANDS) if line not in commands(FOLLOWED)]


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands(command):
    run = subprocess.run(as_run_here(shlex.split(command)), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("text", [code for path in SHOWN for code in blocks(path, "toml")])
def test_configurations(text, tmp_path):
    from evaat_fast.train.config import load

    (tmp_path / "run.toml").write_text(text)
    config = load(tmp_path / "run.toml")
    assert config.model.name in evaat_fast.list_models()


@pages
def test_no_code_that_nothing_runs(path):
    text = path.read_text()
    found = FENCE.findall(text)
    assert {language for language, _ in found} <= {"python", "bash", "toml"}
    assert text.count("```") == 2 * len(found), "a fence that is not closed, or within a line"
    assert not re.search(r"\n\n {4,}\S", FENCE.sub("", text)), "an indented block of code"


def anchors(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_page_is_linked_from_the_readme():
    linked = {ROOT / target for target in re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text())}
    assert linked == set(ROOT.glob("docs/**/*.md"))


def test_paths_in_contributing_exist():
    """Files in backticks, braces and all; OP, BACKEND and what is made at build time stand for others."""
    named = re.findall(r"`((?:evaat_fast|kernels|csrc|tests|bench)/[^`\s]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    for name in named:
        if not re.search(r"OP|BACKEND|DEVICE", name):
            assert all(any(ROOT.glob(path.rstrip("/"))) for path in expanded(name)), name
    for name in re.findall(r"`(\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert any(ROOT.glob(f"evaat_fast/ops/*/{name}")), name


def expanded(name):
    """a/{b,c}.py -> a/b.py, a/c.py."""
    found = re.search(r"\{([^}]+)\}", name)
    if not found:
        return [name]
    return [path for part in found[1].split(",") for path in expanded(name.replace(found[0], part, 1))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_generated_parts_are_current():
    run = subprocess.run([sys.executable, "bench/plot.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
