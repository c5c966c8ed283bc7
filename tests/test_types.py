"""py.typed is true: mypy passes over the package, a user's code sees its types, and no public name lacks them."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from evaat_fast import losses, ops

MODULES = (ops, losses, losses.avion, losses.lavila, losses.egovlp, losses.open_clip)
ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "evaat_fast" / "ops"  # of which the public names are few, and looked up below
FILES = [path for path in sorted((ROOT / "evaat_fast").rglob("*.py")) if OPS not in path.parents]
USER = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import evaat_fast
from evaat_fast import losses, ops
from evaat_fast.data import EK100, read_clip
from evaat_fast.eval import mir
from evaat_fast.losses import egovlp, lavila, open_clip

q, video = torch.rand(2, 4, 9, 64), torch.zeros(2, 4, 64, 64, 3, dtype=torch.uint8)
assert_type(ops.rope3d(q, grid=(1, 2, 4)), Tensor)
assert_type(ops.rope3d(q, q, (1, 2, 4), freqs=ops.joint_freqs(64)), tuple[Tensor, Tensor])
assert_type(ops.rope3d_(q, q, (1, 2, 4), inverse=True), tuple[Tensor, Tensor])
assert_type(ops.joint_attention(q, q, q, grid=(1, 2, 4)), Tensor)
assert_type(ops.joint_attention(q, q, q, scale=1.0, return_lse=True), tuple[Tensor, Tensor])
assert_type(ops.joint_attention_qkv_(q, 4, (1, 2, 4), deterministic=True), Tensor)
assert_type(ops.patchify(video, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), Tensor)
assert_type(losses.ClipLoss().forward(q, q, 20.0), dict[str, Tensor])
assert_type(losses.open_clip.ClipLoss().forward(q, q, 20.0), Tensor)
assert_type(open_clip.ClipLoss().forward(q, q, 20.0, output_dict=True), dict[str, Tensor])
assert_type(lavila.CLIPLoss().forward({"image_embed": q, "text_embed": q, "logit_scale": q}), dict[str, Tensor])
assert_type(egovlp.NormSoftmaxLoss().forward(q), Tensor)
model = evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=4)
assert_type(model.encode_video(video), Tensor)
assert_type(model.forward(video)["text_embed"], Tensor | None)
assert_type(evaat_fast.get_tokenizer()(["wash the pan"]), Tensor)
assert_type(evaat_fast.load("last.pt").tokenizer("wash the pan"), Tensor)
clips = evaat_fast.load("last.pt", num_frames=16).transform(video[0])
assert_type(evaat_fast.load("last.pt")[0].encode_video(clips), Tensor)
assert_type(read_clip("a.mp4", 0.0, 1.0, 4, decoder="av"), Tensor)
assert_type(EK100("annotations", "videos", "test", num_frames=4).captions, list[str])
assert_type(mir.evaluate(q[0, 0], q[0, 0].numpy()), dict[str, float])

# What mypy does not find wrong here is an unused comment, an error of its own.
ops.rope3d(q, q, (1, 2, 4), prefix=1)  # type: ignore[call-overload]
ops.joint_attention(q, q, q, dropout=0.1)  # type: ignore[call-overload]
losses.ClipLoss(rank="0")  # type: ignore[arg-type]
read_clip("a.mp4", 0.0, 1.0, 4, decoder="opencv")  # type: ignore[arg-type]
evaat_fast.create_modell  # type: ignore[attr-defined]
"""


def mypy(*arguments, cwd):
    pytest.importorskip("mypy", reason="mypy is not installed: pip install -e .[dev]")
    variables = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    run = subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=cwd, env=variables, capture_output=True, text=True)
    return run.stdout + run.stderr if run.returncode else ""


@pytest.mark.slow
def test_mypy_passes_over_the_package():
    report = mypy(cwd=ROOT)
    assert not report, report


@pytest.mark.slow
def test_a_user_sees_the_types(tmp_path):
    """Installed as a wheel installs it, since mypy reads the types of a package elsewhere only where py.typed allows it."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "evaat_fast", site / "evaat_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", site / "evaat_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # Whatever else is installed here, but for an editable install of ours, which mypy would not find anyway.
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    (tmp_path / "user.py").write_text(USER)
    options = ["--python-executable", str(tmp_path / "venv" / "bin" / "python"), "--strict", "--warn-unused-ignores"]
    report = mypy(*options, "--cache-dir", str(ROOT / ".mypy_cache" / "user"), "user.py", cwd=tmp_path)
    assert not report, report


def lacking(function, skip):
    """The parameters of an ast.FunctionDef that have no type, and "return" if it has none."""
    of = function.args
    parameters = (of.posonlyargs + of.args)[skip:] + of.kwonlyargs + [x for x in (of.vararg, of.kwarg) if x]
    missing = [x.arg for x in parameters if x.annotation is None]
    typed_init = function.name == "__init__" and parameters
    return missing + ["return"] * (function.returns is None and not typed_init)


def public_functions(body, name="", in_class=False):
    """(name, node, how many of its first parameters are `self` or `cls`)."""
    for node in body:
        public = not node.name.startswith("_") or node.name.startswith("__") if hasattr(node, "name") else None
        if isinstance(node, ast.ClassDef) and public:
            yield from public_functions(node.body, f"{name}{node.name}.", True)
        elif isinstance(node, ast.FunctionDef) and public:
            static = any(getattr(d, "id", None) == "staticmethod" for d in node.decorator_list)
            yield name + node.name, node, int(in_class and not static)


def test_public_functions_are_typed():
    gaps = {}
    for path in FILES:
        for name, node, skip in public_functions(ast.parse(path.read_text()).body):
            gaps[f"{path.relative_to(ROOT)}: {name}"] = ", ".join(lacking(node, skip))
    assert len(gaps) > 100
    assert not any(gaps.values()), "no types for\n" + "\n".join(f"{k}: {v}" for k, v in gaps.items() if v)


def test_public_names_of_ops_and_losses_are_typed():
    """As a user's help() shows them: for a class its constructor and public methods, those of our base classes too."""
    functions, gaps = {}, {}
    for public in (getattr(module, name) for module in MODULES for name in module.__all__):
        if inspect.isclass(public):
            own = [vars(base).items() for base in public.__mro__ if base.__module__.startswith("evaat_fast")]
            own = {k: f for items in reversed(own) for k, f in items if k == "__init__" or k[0] != "_"}
            functions |= {f"{public.__module__}.{public.__name__}.{k}": f for k, f in own.items() if inspect.isfunction(f)}
        else:
            functions[public.__name__] = public
    for name, function in functions.items():
        signature = inspect.signature(function)
        missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        missing += ["return"] * (signature.return_annotation is signature.empty and not name.endswith("__init__"))
        gaps[name] = ", ".join(missing)
    assert len(gaps) > 20
    assert not any(gaps.values()), "no types for\n" + "\n".join(f"{k}: {v}" for k, v in gaps.items() if v)
