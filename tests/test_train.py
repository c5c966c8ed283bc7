"""The training loop on a small generated corpus: it learns, resumes exactly, writes atomically, and stops on nonsense."""

import json
from collections import Counter

import pytest
import torch

from evaat_fast._files import write_atomically
from evaat_fast.train import Diverged, checkpoint, evaluation, inputs, steps, train, trainer
from evaat_fast.train.config import ConfigError
from evaat_fast.train.log import Log, read
from evaat_fast.train.sampler import EpochSampler

pytest.importorskip("decord")
pytest.importorskip("tokenizers")


def weights(path):
    return checkpoint.read(path)["state_dict"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("loss", ["clip", "sms"])
def test_a_run_lowers_its_loss_and_leaves_its_files(configure, loss, tmp_path, capsys):
    config = configure(f"loss.name={loss}", "train.epochs=4", "eval.every=2", "optim.lr=3e-3", "data.positive=relevant")
    result = train(config)
    records = read(result["log"])
    steps = [r for r in records if r["event"] == "step"]
    assert [r["event"] for r in records if r["event"] != "step"] == [
        "start",
        "epoch",
        "epoch",
        "eval",
        "epoch",
        "epoch",
        "eval",
    ]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert sum(r["loss"] for r in steps[-3:]) < sum(r["loss"] for r in steps[:3])
    assert result["metrics"]["mAP"] == records[-1]["mAP"]
    assert 0 <= result["metrics"]["verb_accuracy"] <= 100
    out = tmp_path / "run"
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "last.pt", "log.jsonl"]
    described = json.loads((out / "config.json").read_text())
    assert described.pop("run") and described == config.to_dict()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "epoch 4/4" in lines[-1] and "mAP" in lines[-1]


def power_cut(function, after):
    """The function, whose call after so many is interrupted."""
    calls = []

    def cut(*args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args)

    return cut


@pytest.mark.parametrize("dropped,precision", [(0, "auto"), (0.5, "auto"), (0, "bfloat16-params")])
def test_a_resumed_run_ends_as_an_uninterrupted_one(configure, tmp_path, monkeypatch, dropped, precision):
    options = ("train.epochs=3", f"model.patch_dropout={dropped}", f"train.precision={precision}")
    whole = train(configure(*options, out="whole"), quiet=True)
    config = configure(*options, out="broken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "batch_loss", power_cut(steps.batch_loss, after=4))  # in the middle of the second epoch
        train(config, quiet=True)
    torch.manual_seed(99)
    resumed = train(config, resume=True, quiet=True)
    assert_same(weights(whole["checkpoint"]), weights(resumed["checkpoint"]))
    assert resumed["metrics"] == whole["metrics"]
    untimed = [[{k: v for k, v in r.items() if "second" not in k} for r in read(x["log"])] for x in (whole, resumed)]
    assert untimed[0] == untimed[1]
    again = train(config, resume=True, quiet=True)  # nothing is left to do
    assert again["metrics"] == whole["metrics"]


def test_a_run_with_bfloat16_parameters_keeps_float32_weights(configure):
    """Its log and its checkpoint are those of autocast; what the checkpoint gives evaluates as the run did."""
    runs = {}
    for precision in ("bfloat16", "bfloat16-params"):
        runs[precision] = train(configure(f"train.precision={precision}", "optim.clip_norm=1", out=precision), quiet=True)
    cast, held = runs.values()
    assert held["model"].matrix_dtype == torch.bfloat16 and cast["model"].matrix_dtype == torch.float32
    stored = weights(held["checkpoint"])
    assert_same(weights(cast["checkpoint"]), stored)
    assert all(x.dtype == torch.float32 for x in stored.values()) and cast["metrics"] == held["metrics"]
    for name, x in held["model"].state_dict().items():
        assert torch.equal(x, stored[name].to(x.dtype)), name
    config = configure("train.precision=bfloat16-params", f"train.init={held['checkpoint']}")
    exact, test = trainer.build_model(config), inputs.test_split(config)
    assert_same(exact.state_dict(), stored)
    assert evaluation.evaluate(exact, test, config, torch.device("cpu")) == held["metrics"]
    with pytest.raises(ConfigError, match="made with train.precision = 'bfloat16', this run has 'bfloat16-params'"):
        train(configure("train.precision=bfloat16-params", "optim.clip_norm=1", out="bfloat16"), resume=True, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16-params"])
def test_compiled_blocks_learn_the_same(configure, precision):
    """One compilation for the blocks of a tower; the log, and the names in the checkpoint, are those of an eager run."""
    layers = "model.overrides={patch_size=32,vision_layers=3,text_layers=3,vision_width=32,vision_heads=1,vision_mlp=32}"
    options = "train.epochs=1", layers, f"train.precision={precision}"
    runs = {}
    torch._dynamo.utils.counters.clear()
    for name in ("false", "true"):
        torch._dynamo.reset()
        runs[name] = train(configure(*options, f"train.compile={name}", out=name), quiet=True)
    losses = [[r["loss"] for r in read(run["log"]) if r["event"] == "step"] for run in runs.values()]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert weights(runs["false"]["checkpoint"]).keys() == weights(runs["true"]["checkpoint"]).keys()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12


@pytest.mark.gpu
@pytest.mark.parametrize("loss, precision", [("clip", "auto"), ("sms", "auto"), ("clip", "bfloat16-params")])
def test_a_graph_learns_the_same(configure, loss, precision, monkeypatch):
    """And goes on from an eager run's checkpoint, with the learning rate of the schedule."""
    options = (
        "train.device=cuda",
        "train.epochs=3",
        f"loss.name={loss}",
        f"train.precision={precision}",
        "optim.clip_norm=1",
        "loss.learnable_temperature=true",
    )
    eager = train(configure(*options, out="eager"), quiet=True)
    graphed = train(configure(*options, "train.cuda_graph=true", out="graph"), quiet=True)
    losses = [[r["loss"] for r in read(run["log"]) if r["event"] == "step"] for run in (eager, graphed)]
    torch.testing.assert_close(*losses, rtol=2e-2, atol=1e-3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "batch_loss", power_cut(steps.batch_loss, after=4))  # in the middle of the second epoch
        train(configure(*options, out="mixed"), quiet=True)
    mixed = train(configure(*options, "train.cuda_graph=true", out="mixed"), resume=True, quiet=True)
    rates = [[r["lr"] for r in read(run["log"]) if r["event"] == "step"] for run in (eager, mixed)]
    assert rates[0] == rates[1]
    for name, x in weights(mixed["checkpoint"]).items():
        torch.testing.assert_close(x, weights(eager["checkpoint"])[name], rtol=2e-2, atol=2e-2)


def test_a_graph_needs_a_gpu(configure):
    with pytest.raises(ConfigError, match="train.cuda_graph: needs a CUDA device, got train.device = 'cpu'"):
        train(configure("train.cuda_graph=true"))


def test_workers_change_nothing(configure):
    options = ("train.epochs=1", "data.cache=false", "model.patch_dropout=0.25")
    alone = train(configure(*options, out="alone"), quiet=True)
    helped = train(configure(*options, "data.workers=2", out="helped"), quiet=True)
    assert_same(weights(alone["checkpoint"]), weights(helped["checkpoint"]))


@pytest.mark.parametrize("mode", ["true", "selective"])
def test_checkpointing_learns_the_same(configure, mode):
    plain = train(configure("train.epochs=1", out="plain"), quiet=True)
    config = configure("train.epochs=1", f"model.grad_checkpointing={mode}", out=mode)
    assert_same(weights(train(config, quiet=True)["checkpoint"]), weights(plain["checkpoint"]))


def test_a_run_from_before_a_key_was_there_is_resumed(configure):
    path = train(configure("train.epochs=1"), quiet=True)["checkpoint"]
    stored = torch.load(path, weights_only=True)
    del stored["config"]["model"]["patch_dropout"]
    torch.save(stored, path)
    train(configure("train.epochs=1"), resume=True, quiet=True)
    with pytest.raises(ConfigError, match="made with model.patch_dropout = 0.0, this run has 0.5"):
        train(configure("train.epochs=1", "model.patch_dropout=0.5"), resume=True, quiet=True)


def test_a_folder_with_a_run_is_not_overwritten_unasked(configure):
    config = configure("train.epochs=1")
    first = weights(train(config, quiet=True)["checkpoint"])
    with pytest.raises(ConfigError, match="already holds a run: --resume continues it, --overwrite replaces it"):
        train(config, quiet=True)
    assert_same(first, weights(train(config, overwrite=True, quiet=True)["checkpoint"]))


def test_an_old_run_stands_until_the_new_one_has_a_checkpoint(configure, monkeypatch):
    old = train(configure(), quiet=True)["checkpoint"]
    before = old.read_bytes()
    monkeypatch.setattr(steps, "batch_loss", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(configure(), overwrite=True, quiet=True)
    assert old.read_bytes() == before


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "damage",
    [{"config": 3}, {"optimizer": {}}, {"rng": {}}, {"epoch": "x"}, {"epoch": -3}, {"state_dict": {}}, {"rng": {"cpu": 1}}],
    ids=str,
)
def test_a_damaged_checkpoint_is_not_resumed(configure, damage):
    path = train(configure("train.epochs=1"), quiet=True)["checkpoint"]
    torch.save({**torch.load(path, weights_only=True), **damage}, path)
    with pytest.raises(ValueError, match="last.pt' (is damaged|cannot be continued)"):
        train(configure("train.epochs=1"), resume=True, quiet=True)


def test_resuming_another_run_is_an_error(configure):
    train(configure("train.epochs=1"), quiet=True)
    with pytest.raises(ConfigError, match="made with optim.lr = 0.001, this run has 0.01"):
        train(configure("train.epochs=1", "optim.lr=0.01"), resume=True, quiet=True)
    with pytest.raises(ConfigError, match="made with train.seed = 0, this run has 1"):
        train(configure("train.epochs=1", "train.seed=1"), resume=True, quiet=True)
    with pytest.raises(ConfigError, match="made with data.jitter = True, this run has False"):
        train(configure("train.epochs=1", "data.jitter=false"), resume=True, quiet=True)
    train(configure("train.epochs=1", "model.grad_checkpointing=true"), resume=True, quiet=True)  # computes the same


def test_a_run_is_extended_but_not_made_shorter_than_it_is(configure, capsys):
    """With a constant learning rate it is then the run that was as long from the beginning."""
    whole = train(configure("train.epochs=3", "schedule.name=constant", out="whole"), quiet=True)
    train(configure("train.epochs=2", "schedule.name=constant"), quiet=True)
    extended = train(configure("train.epochs=3", "schedule.name=constant"), resume=True)
    printed = capsys.readouterr().out
    assert "goes on after epoch 2, of 3 epochs" in printed and "3 epochs instead of 2" in printed
    assert_same(weights(whole["checkpoint"]), weights(extended["checkpoint"]))
    assert {"event": "extended", "epoch": 2, "epochs": 3, "before": 2} in read(extended["log"])
    with pytest.raises(ConfigError, match="train.epochs: 2, and .*last.pt is of the end of epoch 3"):
        train(configure("train.epochs=2", "schedule.name=constant"), resume=True, quiet=True)


def test_init_starts_from_a_checkpoint(configure):
    first = train(configure("train.epochs=1", out="first"), quiet=True)
    config = configure(f"train.init={first['checkpoint']}", "loss.temperature=0.1", out="second")
    model = trainer.build_model(config)
    loaded = weights(first["checkpoint"])
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items() if k != "logit_scale")
    assert abs(model.logit_scale.exp().item() - 10) < 1e-4


def test_a_loss_that_is_not_finite_stops_the_run(configure, monkeypatch, tmp_path):
    original, calls = steps.batch_loss, []

    def poisoned(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(steps, "batch_loss", poisoned)
    with pytest.raises(Diverged, match=r"the loss is nan at step 5 of 6, epoch 2, lr .* Lower optim.lr"):
        train(configure(), quiet=True)
    saved = checkpoint.read(tmp_path / "run/last.pt")
    assert saved["epoch"] == 1 and all(torch.isfinite(v).all() for v in saved["state_dict"].values())
    assert saved["within"]["step"] == 1  # the step before it


def test_learnable_temperature_moves_and_a_fixed_one_does_not(configure):
    for learnable in ("false", "true"):
        config = configure(f"loss.learnable_temperature={learnable}", "train.epochs=1", out=learnable)
        state = weights(train(config, quiet=True)["checkpoint"])
        assert (abs(state["logit_scale"].exp().item() - 20) > 1e-4) == (learnable == "true")


def test_weight_decay_spares_vectors_and_positions(configure):
    model = trainer.build_model(configure())
    decayed, spared = steps.build_optimizer(model, configure("optim.weight_decay=0.5")).param_groups
    assert decayed["weight_decay"] == 0.5 and spared["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in (decayed, spared))
    assert "visual.blocks.0.attn.qkv.weight" in decayed and "text.token_embedding.weight" in decayed
    assert {"visual.pos_embed", "visual.temporal_embed", "visual.norm.weight"} <= spared
    assert "logit_scale" not in decayed | spared  # fixed


@pytest.mark.parametrize(
    "override,message",
    [
        ("train.device=tpu", "train.device: expected auto, cpu, cuda"),
        ("train.device=mps", "train.device: expected auto, cpu, cuda"),
        ("train.batch_size=49", "train.batch_size: 49 is more than the 48 training clips"),
        ("data.annotations=/nowhere", "annotations: there is no folder '/nowhere'"),
        ("train.init=/nowhere/last.pt", "/nowhere/last.pt"),
        ("train.out=/dev/null/run", "train.out: the folder '/dev/null/run' cannot be written to"),
    ],
)
def test_mistakes_leave_nothing_behind(configure, override, message, tmp_path):
    with pytest.raises((ConfigError, ValueError, FileNotFoundError), match=message):
        train(configure(override), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(configure):
    with pytest.raises(ConfigError, match="'cuda' was asked for, but torch sees no CUDA device"):
        train(configure("train.device=cuda"))


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoint.read(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="not a checkpoint that torch can read safely"):
        checkpoint.read(tmp_path / "text.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a run, but a Tensor"):
        checkpoint.read(tmp_path / "tensor.pt")
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="it lacks model_config, optimizer, epoch, config, rng"):
        checkpoint.read(tmp_path / "weights.pt")


def test_log_keeps_whole_epochs_and_forgives_a_torn_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for epoch in (1, 2):
        log.write("step", epoch, loss=0.5)
    log.close()
    with open(path, "a") as file:
        file.write('{"event": "st')
    assert [r["epoch"] for r in read(path)] == [1, 2]
    Log(path, keep=1).close()
    assert [r["epoch"] for r in read(path)] == [1]
    path.write_text('{"a"\n{"event": "step", "epoch": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read(path)


def test_sampler_draws_one_clip_of_a_kind():
    kinds = torch.arange(96).repeat_interleave(4)[torch.randperm(384)]
    sampler = EpochSampler(kinds, 48, seed=3, distinct=True)
    first = list(sampler)
    assert len(sampler) == len(first) == 8
    assert all(len(batch) == 48 == len(set(kinds[batch].tolist())) for batch in first)
    assert max(Counter(i for batch in first for i in batch).values()) == 1
    assert first == list(sampler)
    sampler.epoch = 1
    assert first != list(sampler)
    assert first != list(EpochSampler(kinds, 48, seed=4, distinct=True))


def test_sampler_keeps_the_kinds_of_a_group_together():
    """96 kinds of 12 groups: a batch of 48 holds six whole groups; one of 20 two, and what of a third has room."""
    kinds = torch.arange(96).repeat_interleave(4)[torch.randperm(384)]
    groups = kinds % 12
    for size, whole in ((48, 6), (20, 2)):
        sampler = EpochSampler(kinds, size, seed=3, distinct=True, groups=groups)
        batches = list(sampler)
        first = Counter(groups[batches[0]].tolist())
        assert sorted(first.values()) == [size - 8 * whole, *[8] * whole][size % 8 == 0 :]
        assert all(len(set(kinds[batch].tolist())) == size for batch in batches)
        assert max(Counter(i for batch in batches for i in batch).values()) == 1
    assert sorted(i for b in EpochSampler(kinds, 48, distinct=True, groups=groups) for i in b) == list(range(384))
    # A kind without clips left does not come again with its group: 3 batches of 2, as without groups.
    few = torch.tensor([0] * 3 + [1] + [2] * 2)
    batches = list(EpochSampler(few, 2, distinct=True, groups=torch.tensor([0] * 4 + [1] * 2)))
    assert all(len(set(few[batch].tolist())) == 2 for batch in batches) and len(batches) == 3


def test_sampler_wastes_no_more_than_it_must():
    kinds = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [3] * 2)  # at most 3 batches of 3: then kind 0 is alone with one more
    batches = list(EpochSampler(kinds, 3, distinct=True))
    assert len(batches) == len(EpochSampler(kinds, 3, distinct=True)) == 3
    with pytest.raises(ValueError, match=r"train.batch_size: 5 is more than the 4 kinds"):
        EpochSampler(kinds, 5, distinct=True)
    assert sorted(i for b in EpochSampler(kinds, 4) for i in b) == list(range(12))


def test_verb_accuracy_and_controls(configure):
    config = configure()
    test = inputs.test_split(config)
    perfect = evaluation.measure(test.relevancy, test)
    assert perfect["verb_accuracy"] == 100 and abs(perfect["mAP"] - 100) < 1e-9 and abs(perfect["nDCG"] - 100) < 1e-9
    wrong = evaluation.measure(-(test.clip_verbs[:, None] == test.caption_verbs).float(), test)
    assert wrong["verb_accuracy"] == 0
    model = trainer.build_model(config)
    shown = {f: evaluation.embed(model, test, config, torch.device("cpu"), f) for f in ("ordered", "reversed", "frozen")}
    assert not torch.allclose(shown["ordered"], shown["reversed"]) and not torch.allclose(shown["ordered"], shown["frozen"])
    assert torch.equal(shown["ordered"], evaluation.embed(model, test, config, torch.device("cpu"), "ordered"))


def test_a_log_is_json_whatever_a_metric_is(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write("eval", 1, mAP=float("nan"), nDCG=50.0, name="x")
    log.close()
    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert record == {"event": "eval", "epoch": 1, "mAP": None, "nDCG": 50.0, "name": "x"}
