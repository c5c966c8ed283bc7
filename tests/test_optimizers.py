"""LAMB against its formulas, layer decay, the average of the weights: what an update does beside AdamW's."""

import copy
import math

import pytest
import torch

from evaat_fast.train import checkpoint, inputs, optimizers, steps, train, trainer
from evaat_fast.train.averaging import Average
from evaat_fast.train.lamb import Lamb
from evaat_fast.train.masters import Masters

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")


def lamb_by_formula(x, gradients, lr, beta1, beta2, eps, decay, adapt):
    """Algorithm 2 of arXiv 1904.00962, element by element, in Python's floats."""
    x, m, v = [float(a) for a in x], [0.0] * len(x), [0.0] * len(x)
    for t, g in enumerate(gradients, 1):
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g, strict=True)]
        r = [a / (1 - beta1**t) / (math.sqrt(b / (1 - beta2**t)) + eps) for a, b in zip(m, v, strict=True)]
        u = [a + decay * b for a, b in zip(r, x, strict=True)]
        long, short = math.sqrt(sum(a * a for a in x)), math.sqrt(sum(a * a for a in u))
        ratio = long / short if adapt and long > 0 and short > 0 else 1.0
        x = [a - lr * ratio * b for a, b in zip(x, u, strict=True)]
    return x


def test_lamb_is_the_papers():
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (7, 3, 5, 4)]
    start[1].zero_()  # its ratio would be 0
    gradients = [[torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in start] for _ in range(4)]
    params = [torch.nn.Parameter(x.clone()) for x in start]
    groups = [
        {"params": params[:3], "weight_decay": 0.1},
        {"params": params[3:], "weight_decay": 0.0, "adapt": False, "lr": 0.02},
    ]
    optimizer = Lamb(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-3)
    for number, gradient in enumerate(gradients):
        for p, g in zip(params, gradient, strict=True):
            p.grad = g.clone()
        if number == 2:  # its state goes through a checkpoint
            stored = copy.deepcopy(optimizer.state_dict())
            optimizer = Lamb(groups, lr=1.0)
            optimizer.load_state_dict(stored)
        optimizer.step()
    for i, p in enumerate(params):
        adapt, decay, lr = (False, 0.0, 0.02) if i == 3 else (True, 0.1, 0.05)
        history = [g[i].tolist() for g in gradients]
        expected = lamb_by_formula(start[i].tolist(), history, lr, 0.8, 0.95, 1e-3, decay, adapt)
        torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    before = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.ones(())
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    assert all(map(torch.equal, before, params)) and optimizer.state[params[0]]["step"] == 4


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"eps": float("nan")}, {"betas": (0.9, 1.0)}], ids=str)
def test_lamb_refuses_nonsense(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Lamb([torch.nn.Parameter(torch.zeros(1))], **option)


def test_layers_learn_the_slower_the_nearer_to_the_input(configure):
    shape = "model.overrides={patch_size=32,vision_layers=3,text_layers=2,vision_width=32,vision_heads=1,vision_mlp=32}"
    config = configure(shape, "optim.layer_decay=0.5", "optim.weight_decay=0.3", "loss.learnable_temperature=true")
    model = trainer.build_model(config)
    optimizer = optimizers.build_optimizer(model, config)
    optimizers.set_lr(optimizer, 0.64)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert found["visual.head.weight"] == found["text.text_projection"] == (0.64, 0.3)
    assert found["logit_scale"] == found["visual.norm.weight"] == found["text.ln_final.bias"] == (0.64, 0.0)
    assert [found[f"visual.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [(0.08, 0.3), (0.16, 0.3), (0.32, 0.3)]
    assert [found[f"text.transformer.resblocks.{i}.ln_1.bias"] for i in range(2)] == [(0.16, 0.0), (0.32, 0.0)]
    assert found["visual.patch_embed.proj.weight"] == (0.04, 0.3) and found["visual.temporal_embed"] == (0.04, 0.0)
    assert found["text.token_embedding.weight"] == (0.08, 0.3) and found["text.positional_embedding"] == (0.08, 0.0)


def test_an_average_is_its_formula_and_is_shown_for_a_while(configure):
    config = configure()
    masters = Masters(trainer.build_model(config).double())
    average, decay = Average(masters, 0.75), 0.75
    expected = {name: p.detach().clone() for name, p in masters.parameters.items()}
    for number in range(3):
        for name, p in masters.parameters.items():
            p.data.add_(number + len(name))
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
        average.update(torch.zeros(()))
    average.update(torch.ones(()))  # a step that trained nothing
    state = average.state_dict()
    for name, x in expected.items():
        if name != "logit_scale":  # which is not trained, and so is what it is
            torch.testing.assert_close(state[name], x, rtol=1e-13, atol=1e-13, msg=name)
    weights = {name: p.detach().clone() for name, p in masters.model.named_parameters()}
    with average.shown():
        assert all(torch.equal(p, state[name]) for name, p in masters.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in masters.model.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16-params"])
def test_the_average_is_resumed_evaluated_and_loaded(configure, precision, tmp_path):
    """With LAMB and layer decay, which have more to remember, too."""
    options = ("train.ema=0.9", "optim.name=lamb", "optim.layer_decay=0.8", f"train.precision={precision}", "optim.lr=0.01")
    whole = train(configure(*options, "train.epochs=2", out="whole"), quiet=True)
    plain = {name: x.clone() for name, x in checkpoint.read(whole["checkpoint"])["state_dict"].items()}
    averaged = checkpoint.read(whole["checkpoint"])["model_ema"]
    moved = [name for name, x in plain.items() if not torch.equal(x, averaged[name])]
    assert "text.text_projection" in moved and "visual.temporal_embed" in moved
    config = configure(*options, f"train.init={whole['checkpoint']}", out="other")
    loaded = trainer.build_model(config)
    assert all(torch.equal(x, averaged[name]) for name, x in loaded.state_dict().items() if name != "logit_scale")
    from evaat_fast.train import evaluation

    data = inputs.test_split(config)
    if precision == "float32":
        assert evaluation.evaluate(loaded, data, config, torch.device("cpu")) == whole["metrics"]
    options = (*options, "train.epochs=2")
    config = configure(*options, "train.save_steps=2", out="killed")
    original, calls = steps.batch_loss, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "batch_loss", cut)
        train(config, quiet=True)
    assert checkpoint.read(tmp_path / "killed/last.pt")["within"]["step"] == 1
    resumed = train(config, resume=True, quiet=True)
    ends = [checkpoint.read(run["checkpoint"]) for run in (whole, resumed)]
    for key in ("state_dict", "model_ema"):
        assert all(torch.equal(x, ends[1][key][name]) for name, x in ends[0][key].items()), key
