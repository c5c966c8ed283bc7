"""The benchmark's own logic: what is checked, written, left out and said of it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted(ROOT.glob("bench/results/*/*.json"))


pytestmark = pytest.mark.usefixtures("bench_on_path")


@pytest.fixture
def store():
    return importlib.import_module("store")


@pytest.fixture
def plot():
    return importlib.import_module("plot")


def record(provider, shape, mode="fwd", **known):
    return {"shape": shape, "dtype": "fp32", "mode": mode, "provider": provider, **known}


SMALL, LARGE = {"loss": "sms", "N": 64}, {"loss": "clip", "N": 4096}
TIMED = {"ms": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "ratio": 1.0, "work": {"byte": 10}}


def test_writer_and_reader_agree(store, tmp_path):
    results = {
        "op": "x",
        "peak": {"rate": 123456789.0},
        "records": [record("a", SMALL, error=1.23456e-7, absent='ünd "so" on')],
    }
    store.write(tmp_path / "x.json", results)
    text = (tmp_path / "x.json").read_text()
    again = json.loads(text)
    assert again["records"][0] == {**results["records"][0], "error": 1.235e-7} and again["peak"] == {"rate": 123500000.0}
    assert store.dumps(again) == text and len(text.splitlines()) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_committed_results_are_as_the_writer_writes_them(store, path):
    results = json.loads(path.read_text())
    assert store.dumps(results) == path.read_text()
    assert results["records"] and "commit" in results["environment"]
    assert all("ms" in r or "absent" in r or "fail" in r for r in results["records"])


def test_digits(store):
    shown = {0.04213: "0.0421", 0.97: "0.970", 1.0: "1.00", 62.23: "62.2", 1003.0: "1003", 44600.0: "44600", 0.0: "0"}
    assert {number: store.short(number) for number in shown} == shown


def test_reasons_are_whole_and_each_in_its_place(store):
    long = "a reason that is longer than sixty characters, and whose end says what it is about"
    records = [
        record("everywhere", SMALL, absent=long),
        record("everywhere", LARGE, absent=long),
        record("two reasons", SMALL, absent="not installed"),
        record("two reasons", LARGE, absent=long),
        record("by mode", SMALL, "fwd", **TIMED),
        record("by mode", SMALL, "fwdbwd", absent="no gradient"),
        record("by mode", LARGE, "fwdbwd", absent="no gradient"),
        record("failing", SMALL, fail="wrong"),
        record("failing", LARGE, **TIMED),
    ]
    assert store.without(records, "absent") == [
        (long, ["everywhere", "two reasons [clip]"]),
        ("not installed", ["two reasons [sms]"]),
        ("no gradient", ["by mode [fwdbwd]"]),
    ]
    assert store.without(records, "fail") == [("wrong", ["failing [sms]"])]


def results_of(records):
    environment = {"device": "d", "threads": 2, "isa": "i", "torch": "t", "triton": "r", "commit": "c"}
    return {"op": "x", "baseline": "a", "environment": environment, "records": records}


def test_a_table_speaks_of_what_it_shows(plot):
    records = [record("a", LARGE, **TIMED), record("b", LARGE, **TIMED), record("b", SMALL, fail="wrong")]
    records += [record("c", SMALL, absent="too small"), record("c", LARGE, absent="too | large")]
    data = results_of(records)
    whole, chosen = plot.table(data), plot.table(data, "N4096 fwd | b")
    assert "Failed the check, so not timed: b [sms]" in whole and "c [sms] (too small)" in whole
    assert "wrong" not in chosen and "Failed" not in chosen and "Absent" not in chosen
    assert chosen.splitlines()[0] == "| shape | dtype | mode | b |" and len(chosen.splitlines()) == 5
    with pytest.raises(ValueError, match="the results have no provider nobody"):
        plot.table(data, "N4096 | nobody")


def doubling(how):
    """A provider of 2 x."""

    def provider(inputs, mode):
        return lambda: [how(inputs["x"])]

    return provider


def absent(inputs, mode):
    raise importlib.import_module("harness").Unavailable("not for this machine")


def broken(inputs, mode):
    raise RuntimeError("no such kernel")


def test_a_run_checks_times_writes_and_goes_on(tmp_path, capsys, monkeypatch):
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)  # it is for the process
    bench = harness.Benchmark(
        op="double",
        cpu_shapes=[{"N": 8}, {"N": 16}],
        gpu_shapes=[],
        inputs=lambda shape, dtype, device: {"x": torch.arange(1.0, shape["N"] + 1).to(dtype)},
        providers={
            "evaat sum": doubling(lambda x: x + x),
            "evaat wrong": doubling(lambda x: x * 2.1),
            "evaat broken": broken,
            "peer": doubling(lambda x: 2 * x),
            "peer broken": broken,
            "peer absent": absent,
        },
        truth=doubling(lambda x: 2 * x),
        work=lambda shape, mode, size: {"byte": 2 * shape["N"] * size},
        baseline="peer",
        yardsticks={"copy": doubling(torch.clone)},
        modes=("fwd",),
        dtypes=("fp32",),
    )
    path = tmp_path / "double.json"
    command = ["--device", "cpu", "--seconds", "0.001", "--json", str(path)]
    assert harness.main(bench, [*command, "--first", "1", "--skip", "copy"]) == 1
    first = json.loads(path.read_text())
    found = {r["provider"]: r for r in first["records"]}
    assert "copy" not in found and found["peer"]["ratio"] == 1.0 and found["evaat sum"]["error"] == 0.0
    assert "error" in found["evaat wrong"]["fail"] and "ms" not in found["evaat wrong"]
    assert found["evaat broken"]["fail"] == "RuntimeError: no such kernel"
    assert found["peer broken"]["absent"] == "RuntimeError: no such kernel"
    assert found["peer absent"]["absent"] == "not for this machine"
    assert list(tmp_path.iterdir()) == [path], "only what was asked for"

    assert harness.main(bench, [*command, "--append", "--budget", "0"]) == 1
    assert json.loads(path.read_text()) == first and "1 of 1 cases not begun" in capsys.readouterr().out
    harness.main(bench, [*command, "--append"])
    both = json.loads(path.read_text())
    assert both["records"][: len(first["records"])] == first["records"]
    assert {r["shape"]["N"] for r in both["records"]} == {8, 16} and both["records"][-1]["yardstick"] is True


def test_what_is_timed_on_the_host_of_a_gpu_can_be_called():
    host = importlib.import_module("host")
    for call in host.public(host.tensors("cpu")).values():
        call()


def test_failing_tests_are_named_at_once(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\n"
        "def test_fuzz(): os.environ['AT_ONCE_UNTIL'] = '0'\n"  # the time is over while it runs
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_good(): pass\n"
        "def test_thousand(): pass\n"
    )
    environment = {"PYTHONPATH": str(ROOT / "bench"), "AT_ONCE_TSV": str(tmp_path / "it.tsv")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "at_once", "-p", "no:cacheprovider", "test_it.py"]
    run = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 1
    assert re.search(r"FAILED test_it.py::test_bad after 0 s: AssertionError: one is not two", run.stdout), run.stdout
    lines = [line.split("\t") for line in (tmp_path / "it.tsv").read_text().splitlines()]
    assert [(a, c.split("::")[1]) for a, _, c in lines] == [
        ("failed", "test_bad"),
        ("passed", "test_good"),
        ("passed", "test_fuzz"),
        ("no time", "test_thousand"),
    ]


def test_the_gpu_check_needs_a_gpu(tmp_path):
    script = ROOT / "bench" / "gpu_check.sh"
    for arguments, words in (["--help"], "--minutes M"), (["--only"], "--only needs the name of an op"):
        run = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
        assert run.returncode != 0 and words in run.stdout + run.stderr
    if not torch.cuda.is_available():
        run = subprocess.run(["bash", script], capture_output=True, text=True, env={**os.environ, "OUT": str(tmp_path)})
        assert run.returncode == 2 and not list(tmp_path.iterdir())


def test_the_host_benchmark_calls_public_functions_as_they_are():
    """It times them on a GPU alone; here each runs forward and backward, once."""
    host = importlib.import_module("host")
    calls = host.public(host.tensors("cpu"))
    assert {"add_norm", "rope3d", "clip_loss", "sms_loss"} < set(calls)
    for name, call in calls.items():
        out = call()
        out = list(out) if isinstance(out, tuple) else [out]
        torch.autograd.backward(out, [torch.ones_like(x) for x in out])
        assert all(x.isfinite().all() for x in out), name
