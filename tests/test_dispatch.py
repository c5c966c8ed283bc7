"""The backend table: choice, names, reasons, the environment variable, the doctor."""

import subprocess
import sys

import pytest
import torch

from evaat_fast import doctor, ops
from evaat_fast.ops._core import dispatch as _dispatch

CPU = torch.device("cpu")


def test_auto_takes_the_first_usable():
    assert _dispatch.pick("rope3d", CPU, torch.float32) == "cpu"
    assert _dispatch.pick("rope3d", CPU, torch.float32, "auto") == "cpu"
    assert _dispatch.pick("rope3d", CPU, torch.float64) == "reference"


def test_every_row_of_auto_is_supported():
    for (op, _), order in _dispatch.AUTO.items():
        assert set(order) <= set(_dispatch.SUPPORT[op]), op


def test_other_devices_get_what_plain_torch_gives():
    assert _dispatch.pick("rope3d", torch.device("meta"), torch.float32) == "reference"


@pytest.mark.parametrize(
    "backend,error,message",
    [
        (
            "nonsense",
            ValueError,
            "backend: expected one of auto, gluon, triton, cuda, cpu, sdpa, reference, got 'nonsense'",
        ),
        ("sdpa", RuntimeError, "rope3d: backend 'sdpa' was asked for but cannot serve this call: no sdpa version of rope3d"),
        ("triton", RuntimeError, "triton takes CUDA tensors"),
    ],
)
def test_named_backend_never_falls_back(backend, error, message):
    with pytest.raises(error, match=message):
        _dispatch.pick("rope3d", CPU, torch.float32, backend)


def in_a_process(code, **environment):
    return subprocess.run([sys.executable, "-I", "-c", code], env={"PATH": "", **environment}, capture_output=True, text=True)


def test_missing_module_is_a_recorded_reason():
    code = (
        "import sys; sys.modules['evaat_fast._cpu'] = None  # its import fails\n"
        "import torch; from evaat_fast import ops\n"
        "q = torch.ones(1, 1, 9, 8)\n"
        "print(ops.rope3d(q, grid=(2, 2, 2)).equal(ops.rope3d(q, grid=(2, 2, 2), backend='reference')))\n"
        "try: ops.rope3d(q, grid=(2, 2, 2), backend='cpu')\n"
        "except RuntimeError as e: print(e)"
    )
    run = in_a_process(code)
    assert run.stdout.startswith("True\nrope3d: backend 'cpu' was asked for but cannot serve this call: "), run.stderr
    assert "import of evaat_fast._cpu halted" in run.stdout and "rope3d: cpu passed over" in run.stderr


def test_a_triton_without_gluon_is_told_which_has_it():
    pytest.importorskip("triton")
    code = (
        "import sys; sys.modules['triton.experimental'] = None  # its import fails, as before Triton 3.4\n"
        "from evaat_fast.ops._core import dispatch; print(dispatch.why_not('gluon'), dispatch.why_not('triton'))"
    )
    run = in_a_process(code)
    assert run.stdout.strip().endswith(" (attention in Gluon needs Triton 3.6 or later) None"), run.stdout + run.stderr


def test_kernels_of_another_gpu_are_passed_over():
    code = (
        "import sys, types; sys.modules['evaat_fast._cuda'] = types.SimpleNamespace(CODES='sm_80 sm_90a compute_120')\n"
        "import torch; from evaat_fast.ops._core import dispatch\n"
        "torch.cuda.device_count = lambda: 1\n"
        "sys.modules['triton'] = None  # its import fails\n"
        "for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 1)):\n"
        "    torch.cuda.get_device_capability = lambda i: capability\n"
        "    dispatch.why_not.cache_clear(); dispatch._chosen.cache_clear()\n"
        "    print(dispatch.pick('rope3d', torch.device('cuda'), torch.float32), dispatch.why_not('cuda'))\n"
    )
    run = in_a_process(code)
    built = "evaat_fast._cuda is built for sm_80 sm_90a compute_120, but there is an"
    expected = [f"reference {built} sm_75", "cuda None", "cuda None", "cuda None", f"reference {built} sm_100", "cuda None"]
    assert run.stdout.splitlines() == expected, run.stderr


def test_frequencies_that_learn_are_a_need_of_rope3d(caplog):
    """CUDA C++ lacks their gradient, says so by name, and is passed over without a word."""
    device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="rope3d: backend 'cuda' was asked for but .* no gradient of freqs"):
        _dispatch.pick("rope3d", device, torch.float32, "cuda", (_dispatch.LEARNED,))
    assert _dispatch.pick("rope3d", device, torch.float32, None, (_dispatch.LEARNED,)) in ("triton", "reference")
    assert "rope3d: cuda" not in caplog.text


@pytest.mark.parametrize("capability,little", [((8, 9), True), ((9, 0), False)])
def test_dynamo_takes_what_a_machine_has_for_constants(monkeypatch, capability, little):
    """It would trace the import of a backend, and break the graph."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 90 + little)  # which nothing has asked for before

    def told(x):
        return x + 1 if _dispatch.has_triton() else x + 2, x * 2 if _dispatch.has_little_shared(device) else x

    x = torch.ones(3)
    for a, b in zip(torch.compile(told, backend="eager", fullgraph=True)(x), told(x), strict=True):
        assert torch.equal(a, b)
    assert _dispatch.has_little_shared(device) is little


def test_a_gpu_of_little_shared_memory_is_a_need_of_the_max_margin_losses(caplog):
    """Chunks of E of 129 to 256 do not fit there: CUDA C++ says so by name, and is passed over without a word."""
    device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="sms_loss: backend 'cuda' was asked for but .* E up to 128 or above 256"):
        _dispatch.pick("sms_loss", device, torch.bfloat16, "cuda", (_dispatch.LITTLE_SHARED,))
    for need in (_dispatch.LITTLE_SHARED, _dispatch.FEW_PAIRS):
        assert _dispatch.pick("sms_loss", device, torch.bfloat16, None, (need,)) in ("triton", "reference")
    assert "sms_loss: cuda" not in caplog.text


@pytest.mark.parametrize(
    "text,expected",
    [
        ("", {}),
        ("auto", {}),
        ("rope3d=cpu, patchify=reference", {"rope3d": "cpu", "patchify": "reference"}),
        ("reference", dict.fromkeys(_dispatch.SUPPORT, "reference")),
    ],
)
def test_environment_variable(text, expected):
    assert _dispatch.read_default(text) == expected


@pytest.mark.parametrize("text", ["fast", "rope=cpu", "rope3d=fast", "=cpu=cpu"])
def test_bad_environment_variable(text):
    with pytest.raises(ValueError, match="EVAAT_FAST_BACKEND=.*expected one of auto"):
        _dispatch.read_default(text)


def test_environment_variable_forces_and_never_falls_back():
    code = (
        "import torch; from evaat_fast import ops\n"
        "try: ops.patchify(torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), 16, (0,) * 3, (1,) * 3)\n"
        "except RuntimeError as e: print(e)"
    )
    run = in_a_process(code, EVAAT_FAST_BACKEND="cuda")
    assert "patchify: backend 'cuda' was asked for" in run.stdout, run.stderr


def test_doctor_prints_columns_with_a_space_between():
    """Each row of the table, found by its words: an op or none, whether it serves (as `auto` would), a backend, its state."""
    lines = doctor.report().splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("op x backend")) + 1 :]
    rows, served, op = [], {}, None
    for line in table:
        words = line.split()
        op, words = (words[0], words[1:]) if words[0] in _dispatch.SUPPORT else (op, words)
        if words[0] == "*":
            served[op], words = words[1], words[1:]
        rows.append((op, words[0]))
        assert len(words) > 1, line
    assert rows == [(op, backend) for op, row in _dispatch.SUPPORT.items() for backend in row]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert served == {op: _dispatch.pick(op, device, torch.float32) for op in _dispatch.SUPPORT}


def test_doctor_tells_everything():
    text = doctor.report()
    for op in _dispatch.SUPPORT:
        assert op in text
    assert f"torch {torch.__version__}" in text


def test_every_public_name_stands():
    for name in ops.__all__:
        assert callable(getattr(ops, name))
