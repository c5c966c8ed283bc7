"""Gradient caching: a batch embedded a few clips at a time has the loss and the gradients of the batch at once."""

import pytest
import torch

from evaat_fast.train import inputs, steps, train, trainer
from evaat_fast.train.config import ConfigError
from evaat_fast.train.log import read
from evaat_fast.train.masters import Masters

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")

DEVICE = torch.device("cpu")


def gradients(config, dtype, batch=None):
    """(loss, {name: gradient}) of a run's first batch; without its update."""
    data = inputs.splits(config).train
    data.set_epoch(0)
    batch = batch or next(iter(inputs.loader(config, data, inputs.sampler(config, data), inputs.tokenizer(config), DEVICE)))
    model = trainer.build_model(config).to(dtype).train()
    masters = Masters(model)
    run = steps.Steps(masters, steps.build_optimizer(model, config, masters), data.relevancy_table, config, DEVICE)
    loss = run(batch)
    return loss.item(), {name: p.grad.clone() for name, p in masters.parameters.items() if p.grad is not None}, run.norm.item()


@pytest.mark.parametrize(
    "options",
    [
        ("loss.learnable_temperature=true", "optim.clip_norm=0.1"),
        ("loss.name=sms", "data.positive=relevant", "model.patch_dropout=0.5"),
        ("model.grad_checkpointing=true", "model.patch_dropout=0.25"),
    ],
    ids=["clip", "sms", "checkpointed"],
)
@pytest.mark.parametrize("size", [1, 5, 16, 99])
def test_gradients_are_those_of_the_batch_at_once(configure, options, size):
    whole = gradients(configure(*options), torch.float64)
    cached = gradients(configure(*options, f"train.micro_batch={size}"), torch.float64)
    assert cached[0] == pytest.approx(whole[0], rel=1e-12) and cached[2] == pytest.approx(whole[2], rel=1e-10)
    assert cached[1].keys() == whole[1].keys() and len(whole[1]) > 30
    for name, x in whole[1].items():
        torch.testing.assert_close(cached[1][name], x, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-params"])
def test_lower_precisions_agree_to_their_rounding(configure, precision):
    """Every parameter has a gradient, and not one from casts that were made without."""
    options = f"train.precision={precision}", "loss.learnable_temperature=true"
    runs = [gradients(configure(*options, *more), torch.float32) for more in ((), ("train.micro_batch=4",))]
    exact = gradients(configure("loss.learnable_temperature=true"), torch.float32)[1]
    whole, cached = (run[1] for run in runs)
    assert cached.keys() == whole.keys() == exact.keys()
    for name, x in exact.items():
        error, other = ((run[name] - x).norm().item() for run in (cached, whole))
        assert error <= 2 * other + 2e-2 * x.norm().item(), name


def test_the_towers_never_see_more_than_a_part(configure, monkeypatch):
    """Which is what spares memory."""
    seen = []
    original = steps.Towers.forward

    def counted(self, video, text, patches=None):
        seen.append((len(video), len(text), torch.is_grad_enabled()))
        return original(self, video, text, patches)

    monkeypatch.setattr(steps.Towers, "forward", counted)
    train(configure("train.micro_batch=6", "train.epochs=1"), quiet=True)
    step = [(6, 6, False), (6, 6, False), (4, 4, False), (6, 6, True), (6, 6, True), (4, 4, True)]
    assert seen == step * 3


def test_a_run_learns_the_same(configure):
    runs = [train(configure(f"train.micro_batch={size}", out=str(size)), quiet=True) for size in (0, 5)]
    losses = [[r["loss"] for r in read(run["log"]) if r["event"] == "step"] for run in runs]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_no_graph_of_parts(configure):
    with pytest.raises(ConfigError, match="train.micro_batch: not with train.cuda_graph"):
        configure("train.micro_batch=4", "train.cuda_graph=true")
