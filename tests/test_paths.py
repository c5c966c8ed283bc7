"""How far an argument travels: from a public function to its kernel it enters at most four files, and none twice.

A file is entered when one of its functions is called, from another file of the package, with the argument or a view of its
memory, by itself or in a tuple, a list or a dataclass. What torch calls back is called by whoever called torch.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import evaat_fast
from evaat_fast import ops

PACKAGE = str(Path(evaat_fast.__file__).parent)
KERNELS = str(Path(__file__).resolve().parents[1] / "kernels")
GRID, N = (2, 2, 2), 9


def holds(value, address, depth=3):
    if isinstance(value, torch.Tensor):
        return value.numel() > 0 and value.untyped_storage().data_ptr() == address
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (tuple, list)) and depth:
        return any(holds(x, address, depth - 1) for x in value)
    return False


def name_of(frame):
    path = frame.f_code.co_filename
    for root, name in ((PACKAGE, "evaat_fast"), (KERNELS, "kernels")):
        if path.startswith(root):
            return name + path[len(root) :]
    return None


def entries(call, tensor):
    """The files that `tensor` enters while call() runs, in order, one entry each time."""
    found, address = [], tensor.untyped_storage().data_ptr()

    def watch(frame, event, _):
        file = name_of(frame) if event == "call" else None
        if file is None or frame.f_code.co_name.startswith("<"):  # a comprehension is its function's
            return
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        arguments = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
        if not any(holds(x, address) for x in arguments):
            return
        above = frame.f_back
        while above is not None and name_of(above) is None:
            above = above.f_back
        if above is None or name_of(above) != file:
            found.append(file)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def heads(*shape):
    return torch.randn(*shape, requires_grad=True)


def features():
    return torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)


def rope3d(backend):
    q, k = heads(1, 2, N, 16), heads(1, 2, N, 16)
    return lambda: ops.rope3d(q, k, GRID, backend=backend), q


def rope3d_(backend):
    q, k = torch.randn(1, 2, N, 16), torch.randn(1, 2, N, 16)
    return lambda: ops.rope3d_(q, k, GRID, backend=backend), q


def rope3d_qkv_(backend):
    qkv = heads(1, N, 96) * 1
    return lambda: ops.rope3d_qkv_(qkv, 2, GRID, backend=backend), qkv


def joint_attention(backend):
    q, k, v = heads(1, 2, N, 16), heads(1, 2, N, 16), heads(1, 2, N, 16)
    return lambda: ops.joint_attention(q, k, v, grid=GRID, backend=backend), q


def joint_attention_qkv_(backend):
    qkv = heads(1, N, 96) * 1
    return lambda: ops.joint_attention_qkv_(qkv, 2, GRID, backend=backend), qkv


def sms_loss(backend):
    relevancy = torch.rand(8, 8)
    return lambda: ops.sms_loss(*features(), relevancy, backend=backend), relevancy


def sms_loss_of_table(backend):
    table, index = torch.rand(9, 9), torch.arange(8)
    return lambda: ops.sms_loss(*features(), ops.IndexedRelevancy(table, index, index), backend=backend), table


def sms_loss_of_video(backend):
    video, text = features()
    return lambda: ops.sms_loss(video, text, torch.rand(8, 8), backend=backend), video


def clip_loss(backend):
    video, text = features()
    return lambda: ops.clip_loss(video, text, 5.0, backend=backend), video


def patchify(backend):
    video = torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8)
    return lambda: ops.patchify(video, 16, (0.0,) * 3, (1.0,) * 3, backend=backend), video


def add_norm(backend):
    x, stream, weight, bias = heads(2, N, 16), heads(2, N, 16), heads(16), heads(16)
    return lambda: ops.add_norm(x, stream, weight, bias, backend=backend), x


def swiglu_norm(backend):
    x, weight, bias = heads(2, N, 32), heads(16), heads(16)
    return lambda: ops.swiglu_norm(x, weight, bias, backend=backend), x


CASES = [
    *((make, backend) for make in (rope3d, rope3d_, rope3d_qkv_) for backend in ("cpu", "triton")),
    *((make, backend) for make in (joint_attention, joint_attention_qkv_) for backend in ("sdpa", "triton")),
    *((make, backend) for make in (sms_loss, sms_loss_of_table) for backend in ("cpu", "triton")),
    (sms_loss_of_video, "cpu"),
    (clip_loss, "cpu"),
    *((make, backend) for make in (add_norm, swiglu_norm) for backend in ("reference", "cpu", "triton")),
    (patchify, "cpu"),
]


@pytest.mark.parametrize(
    "make,backend", [pytest.param(m, b, marks=[pytest.mark.interpret] if b == "triton" else []) for m, b in CASES]
)
def test_an_argument_enters_few_files(make, backend):
    call, tensor = make(backend)
    call()  # what is imported or cached at first is not on the path
    call, tensor = make(backend)
    files = entries(call, tensor)
    assert files, "the argument was not seen anywhere"
    ours = [file for file in files if not file.startswith("kernels")]
    # Attention launches the rotation's kernel and its own: each ends a path, in what launches all. Labels end two in one file,
    # as one kernel reads those of the pairs themselves before another reads all.
    once = ours if make in (sms_loss, sms_loss_of_table) else [file for file in files if file != "kernels/launch.py"]
    assert len(ours) + (len(files) > len(ours)) <= 4 and len(set(once)) == len(once), " -> ".join(files)


def test_the_watch_sees_views_and_dataclasses():
    q = torch.randn(2, 3)
    assert holds((1, [q.T]), q.untyped_storage().data_ptr()) and not holds([torch.randn(2, 3)], q.untyped_storage().data_ptr())
    labels = ops.DenseRelevancy(torch.zeros(2, 2, dtype=torch.uint8), 1.0)
    assert not holds(labels, q.untyped_storage().data_ptr())
