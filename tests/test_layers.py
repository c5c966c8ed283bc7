"""Imports run one way, and importing stays light: read from the source, then measured in a fresh process."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# A layer may import itself and the layers before it.
LAYERS = [
    ("kernels",),
    ("ops",),
    ("losses", "model", "integrations"),
    ("data", "eval"),
    ("factory",),
    ("train",),
    ("search",),
    ("cli", "_commands", "doctor", "demo"),
]
ABOVE = {("train", "demo.py"): "demo"}  # it ends by searching
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = set(
    "triton decord av torchcodec tokenizers ftfy regex tqdm matplotlib jinja2 huggingface_hub safetensors pyarrow".split()
)


def files():
    for path in sorted(ROOT.glob("evaat_fast/**/*.py")) + sorted(ROOT.glob("kernels/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, (parts[0] if parts[0] == "kernels" else ABOVE.get((parts[1], path.name), parts[1]))


def imports(path):
    """(module, is at the top level) for every import in the file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize("path,layer", list(files()), ids=lambda x: x.name if isinstance(x, Path) else None)
def test_imports_run_one_way(path, layer):
    rank = RANK.get(layer)
    for name, top in imports(path):
        parts = name.split(".")
        if parts[0] == "evaat_fast" and len(parts) > 1 and rank is not None:
            other = RANK.get(parts[1])
            assert other is None or other <= rank, f"{path.name} ({layer}) imports {name}, a higher layer"
        if top and layer != "kernels":
            assert parts[0] not in HEAVY, f"{path.name} imports {parts[0]} at the top"
        if layer == "ops":
            assert parts[0] not in ("numpy", "einops"), f"{path.name}: ops need only torch"


def test_file_lengths():
    long = {}
    for pattern in ("evaat_fast/**/*.py", "kernels/**/*.py", "csrc/**/*.*", "bench/*.py", "tests/*.py", "setup.py"):
        for path in ROOT.glob(pattern):
            count = len(path.read_text().splitlines())
            if count > 500:
                long[path.name] = count
    assert not long, f"files over 500 lines: {long}"


@pytest.mark.parametrize(
    "statement,absent",
    [
        pytest.param("import evaat_fast", HEAVY | {"einops"}, marks=pytest.mark.slow),  # the next one does
        ("from evaat_fast import ops", HEAVY | {"einops"}),
        ("import evaat_fast.model, evaat_fast.data, evaat_fast.eval", HEAVY),
        ("import evaat_fast.cli", HEAVY),
    ],
)
def test_import_is_light(statement, absent):
    # torch brings what it brings; only what our import adds counts.
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {m.split(".")[0] for m in out} & absent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts a process for each from one in which torch is imported")
def test_every_submodule_is_an_attribute():
    """After `import evaat_fast` alone: each in a process in which nothing else was imported."""
    packages = [
        ROOT / "evaat_fast",
        *(ROOT / "evaat_fast" / name for name in ("data", "eval", "integrations", "losses", "model", "search", "train")),
    ]
    names = []
    for package in packages:
        found = [p.stem for p in package.glob("*.py")] + [p.parent.name for p in package.glob("*/__init__.py")]
        names += [".".join((*package.relative_to(ROOT).parts, name)) for name in found if not name.startswith("_")]
    assert {"evaat_fast.losses", "evaat_fast.integrations.timm"} <= set(names)
    code = f"""
import os, torch, evaat_fast
for name in {sorted(names)} + ["evaat_fast.kernels"]:
    if (child := os.fork()) == 0:
        try:
            eval(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stdout + run.stderr


@pytest.mark.parametrize(
    "name", ["evaat_fast", "evaat_fast.data", "evaat_fast.integrations", "evaat_fast.search", "evaat_fast.train"]
)
def test_lazy_packages_list_their_names_and_name_what_is_missing(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package)) and "__doc__" in dir(package)
    for listed in package.__all__:
        getattr(package, listed)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_kernels_folder_is_not_importable_by_its_bare_name():
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert "installs as evaat_fast.kernels" in run.stderr


def test_every_launch_says_whether_products_and_sums_are_fused():
    """Triton 3.10 changes its default: a kernel that says nothing would lose instructions there, and nobody would see."""
    from evaat_fast.kernels.launch import launch
    from evaat_fast.kernels.norm.add import add_norm_kernel

    launches, undecided = 0, []
    for path in ROOT.glob("kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            launches += ast.unparse(node.func) == "launch"  # which refuses options that do not say it
            if isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func.value) and path.name != "launch.py":
                launches += 1
                if "FUSED" not in {ast.unparse(word.value) for word in node.keywords if word.arg is None}:
                    undecided.append(f"{path.name}:{node.lineno}")
    assert launches >= 20 and not undecided
    assert '"enable_fp_fusion": False' in (ROOT / "kernels" / "pairwise" / "panel.py").read_text()
    with pytest.raises(AssertionError):
        launch(add_norm_kernel, (1,), (torch.zeros(4),), {"num_warps": 4})
