"""What the scaling page is predicted from: formulas held to counts and to measurements, and what holds of any prediction."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import evaat_fast
from evaat_fast.model import get_config

ROOT = Path(__file__).resolve().parents[1]
RANKS = Path(__file__).with_name("scaling_ranks.py")


@pytest.fixture(autouse=True)
def on_path(bench_on_path):
    pass


@pytest.mark.parametrize("name", ["eva02_at_tiny_patch16_64", "eva02_at_large_patch14_336"])
def test_parameters(name):
    import cost

    with torch.device("meta"):
        model = evaat_fast.create_model(name, num_frames=16)
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert cost.matrices(model.config) == sum(x.numel() for x in model.hold_matrices(torch.bfloat16).values())


def kept(model, clips):
    """Bytes that autograd keeps besides the parameters, of a step under autocast."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    side, sizes, held = model.config.image_size, {}, []

    def pack(x):
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in own)
        held.append(storage)  # or another's address could be its own
        return x

    text = torch.randint(1, 49000, (clips, 32))
    text[:, -1] = 49407
    video = torch.randint(0, 256, (clips, model.config.num_frames, side, side, 3), dtype=torch.uint8)
    with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model.encode_video(video), model.encode_text(text)
    return sum(sizes.values()), video[0].nbytes


@pytest.mark.parametrize("keep", [False, "selective", True])
@pytest.mark.parametrize(
    "shape", [{"image_size": 64, "num_frames": 8}, {"image_size": 128, "num_frames": 2, "vision_mlp": 344}]
)
def test_what_is_kept_of_a_clip(keep, shape):
    """The formula, within 5 % of the bytes that autograd saves; the casts of weights are the same for any number of clips."""
    import cost

    model = evaat_fast.create_model(
        "eva02_at_tiny_patch16_64",
        **{"vision_layers": 6, "vision_width": 128, "text_layers": 3, "text_width": 64, "patch_size": 8, **shape},
    )
    model.set_grad_checkpointing(keep)
    (more, video), (less, _) = kept(model, 4), kept(model, 2)
    assert cost.memory(model.config, keep).clip - video == pytest.approx((more - less) / 2, rel=0.05)


def test_memory_is_near_what_was_measured():
    """Of every row of the benchmark on a GPU, within 5 %."""
    import cost
    import scaling

    rows = scaling.read().rows
    assert rows
    for r in rows:
        c = get_config(r["shape"]["model"], num_frames=r["shape"]["T"])
        assert cost.memory(c).of_benchmark(r["shape"]["B"]) / cost.MiB == pytest.approx(r["peak_mib"], rel=0.05), r["shape"]


def counted(tmp_path, backend, **environment):
    command = [sys.executable, str(RANKS), str(tmp_path), backend]
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    own = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run(command, capture_output=True, text=True, env=own, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("as predicted") == 2 + 3


def test_bytes_of_a_training_step(tmp_path):
    """On two and three processes: the losses' collectives and the gradients that DDP reduces."""
    counted(tmp_path, "cpu")


@pytest.mark.interpret
@pytest.mark.slow
def test_bytes_of_the_losses_in_triton(tmp_path):
    counted(tmp_path, "triton", TRITON_INTERPRET="1")


def test_buckets():
    import cost

    for size in (10, cost.MiB, 30 * cost.MiB, 600_000_000):
        cut = cost.buckets(size)
        assert sum(cut) == size and all(0 < x <= 25 * cost.MiB for x in cut) and cut[0] <= cost.MiB


def test_a_collective():
    import cost

    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        assert cost.seconds(kind, 1e9, 1, cost.NDR) == 0
        for W in (2, 8, 16, 512):
            whole = cost.seconds(kind, 1e9, W, cost.NDR)
            # Never faster than its bytes over the links, slower over slower ones and with more to carry.
            bus = cost.NDR.nvlink if W <= 8 else cost.NDR.network
            assert whole >= 1e9 * (W - 1) / W * (2 if kind == "all-reduce" else 1) / bus
            assert cost.seconds(kind, 1e9, W, cost.NDR, 0.5) > whole
            assert cost.seconds(kind, 2e9, W, cost.NDR) > whole
            assert cost.seconds(kind, 1e9, W, cost.ETHERNET) >= whole


@pytest.mark.parametrize("cluster", ["NDR", "ETHERNET"])
def test_a_prediction(cluster):
    import cost
    import scaling

    inputs = scaling.read()
    assert ("base", "ours, CUDA graph") in inputs.steps
    for (model, provider), measured in inputs.steps.items():
        alone = scaling.predict(inputs, model, provider, 1)
        assert alone.best == alone.worst == pytest.approx(measured.seconds, rel=1e-4)
        before = measured.seconds
        for W in scaling.GPUS[1:]:
            p = scaling.predict(inputs, model, provider, W, cluster=getattr(cost, cluster))
            assert measured.seconds < p.best < p.worst and p.best > before  # each GPU more costs something
            before = p.best
            low, high = p.clips_per_s()
            assert low < high < W * alone.clips_per_s()[0]
            for clips in scaling.CORPORA.values():
                assert p.hours(clips) == pytest.approx((5 * clips / high / 3600, 5 * clips / low / 3600))


def test_it_follows_the_measured_step():
    """A step twice as long takes twice as long on one GPU, and less than twice on many."""
    import scaling

    inputs = scaling.read()
    slower = {k: dataclasses.replace(m, seconds=2 * m.seconds) for k, m in inputs.steps.items()}
    slow = dataclasses.replace(inputs, steps=slower)
    for W in (1, 64):
        was, now = (scaling.predict(x, "base", "ours, CUDA graph", W).worst for x in (inputs, slow))
        assert now == pytest.approx(2 * was, rel=1e-3) if W == 1 else was < now < 2 * was


def test_every_table_is_on_the_page_and_says_what_it_is():
    import scaling

    page = (ROOT / "docs" / "scaling.md").read_text()
    for name in scaling.TABLES:
        made = scaling.table(name)
        assert f"<!-- predicted: {name} -->\n{made}\n" in page  # plot.py wrote it
        assert made.startswith("*Predicted, ") == (name != "inputs")
    sources = [line.split(" | ")[-1] for line in scaling.table("inputs").splitlines()[2:]]
    assert all(x.startswith(("measured: ", "formula", "datasheet", "torch's", "EgoVLP's", "the paper")) for x in sources)
    with pytest.raises(ValueError, match="predicted: expected one of inputs"):
        scaling.table("nothing")


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    import scaling

    assert scaling.figure(tmp_path / "scaling.svg")
    assert "predicted" in (tmp_path / "scaling.svg").read_text()
