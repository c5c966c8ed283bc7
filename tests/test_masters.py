"""Matrices held in bfloat16 with float32 masters: autocast's numbers to the last bit, without its casts."""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evaat_fast
from evaat_fast import ops
from evaat_fast.train.config import Config
from evaat_fast.train.masters import Masters
from evaat_fast.train.steps import Steps, build_optimizer

BF16, F32 = torch.bfloat16, torch.float32
B, L = 3, 7


def small_model():
    torch.manual_seed(0)
    sizes = dict(patch_size=32, vision_layers=2, text_layers=2, vision_width=64, vision_heads=2, vision_mlp=96)
    return evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=2, temperature=0.1, **sizes)


def batches(count, model):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        text = torch.randint(1, model.config.vocab_size - 1, (B, L), generator=generator)
        text[:, -1] = model.config.vocab_size - 1
        video = torch.randint(0, 256, (B, 2, 64, 64, 3), dtype=torch.uint8, generator=generator)
        yield {"video": video, "text": text, "kind": torch.arange(B), "text_kind": torch.arange(B)}


def configuration(precision, loss="clip"):
    config = Config()
    config.train.precision, config.loss.name, config.loss.learnable_temperature = precision, loss, True
    config.optim.lr, config.optim.weight_decay = 1e-3, 0.1
    return config


def training(config, model=None):
    model = model or small_model()
    masters = Masters(model, BF16 if config.train.precision == "bfloat16-params" else None)
    table = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]])
    return Steps(masters, build_optimizer(model, config, masters), table, config, torch.device("cpu"))


@pytest.mark.parametrize("loss", ["clip", "sms"])
def test_steps_are_those_of_autocast_to_the_last_bit(loss):
    """Losses, weights and moments, of three steps with weight decay, a limit of the gradient and a temperature that learns."""
    runs = []
    for precision in ("bfloat16", "bfloat16-params"):
        config = configuration(precision, loss)
        config.optim.clip_norm = 0.1
        steps = training(config)
        losses = [steps(batch) for batch in batches(3, steps.model)]
        names = {p: name for name, p in steps.masters.parameters.items()}
        moments = {names[p]: state for p, state in steps.optimizer.state.items()}
        flat = {f"{name} {of}": x for of, state in moments.items() for name, x in state.items()}
        runs.append({**steps.masters.state_dict(), **flat, "losses": torch.stack(losses)})
    assert runs[0].keys() == runs[1].keys()
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]) and x.dtype == runs[1][name].dtype, name


def test_a_step_is_adamw_in_float64_of_bfloat16_gradients():
    config = configuration("bfloat16-params")
    steps, (batch,) = training(config), batches(1, small_model())
    before = {name: p.detach().double() for name, p in steps.masters.parameters.items()}
    gradients = {}
    for name, p in steps.model.named_parameters():
        p.register_hook(lambda g, name=name: gradients.update({name: g.clone()}))
    steps(batch)
    spared = steps.model.no_weight_decay()
    for name, p in steps.model.named_parameters():
        g, master = gradients[name].double(), steps.masters.parameters[name]
        decay = config.optim.lr * config.optim.weight_decay if p.ndim >= 2 and name not in spared else 0
        expected = before[name] * (1 - decay) - config.optim.lr * g / (g.abs() + config.optim.eps)
        # Two float32 roundings of the weight, and some of the update.
        torch.testing.assert_close(master.double(), expected, rtol=2e-7, atol=1e-6 * config.optim.lr, msg=name)
        assert gradients[name].dtype == p.dtype and master.dtype == F32
        assert torch.equal(p, master.to(p.dtype)), name


def test_what_is_held():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exact = model.hold_matrices(BF16)
    assert model.matrix_dtype == BF16 and model.visual.freqs.dtype == F32
    kept = {name for name, p in model.named_parameters() if p.dtype == F32}
    assert kept == before.keys() - exact.keys()
    embeddings = {"logit_scale", "text.token_embedding.weight", "text.positional_embedding"}
    assert {n for n in kept if "norm" not in n and "ln_" not in n} == embeddings | {
        "visual.cls_token",
        "visual.pos_embed",
        "visual.temporal_embed",
    }
    assert {"visual.patch_embed.proj.weight", "visual.blocks.0.attn.q_bias", "text.text_projection"} <= exact.keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name].to(p.dtype)) and torch.equal(exact.get(name, before[name]), before[name])
    assert model.hold_matrices(BF16) == {}


def test_masters_without_a_dtype_are_the_parameters():
    model = small_model()
    masters = Masters(model)
    assert all(masters.parameters[name] is p for name, p in model.named_parameters())
    model.text.text_projection.grad = gradient = torch.ones_like(model.text.text_projection)
    masters.take_gradients()
    masters.give_weights()
    assert model.text.text_projection.grad is gradient


def test_a_state_dict_holds_the_masters_and_fills_them():
    steps, (batch,) = training(configuration("bfloat16-params")), batches(1, small_model())
    steps(batch)
    state = {name: x.clone() for name, x in steps.masters.state_dict().items()}
    assert {x.dtype for x in state.values()} == {F32} and list(state) == list(steps.model.state_dict())
    assert not torch.equal(state["text.text_projection"], state["text.text_projection"].to(BF16).float())
    other = Masters(small_model(), BF16)
    other.load_state_dict(state)
    for name, x in other.state_dict().items():
        assert torch.equal(x, state[name]) and torch.equal(
            other.model.state_dict()[name], x.to(other.model.state_dict()[name].dtype)
        )
    with pytest.raises(RuntimeError, match="text_projection"):
        other.load_state_dict({name: x for name, x in state.items() if name != "text.text_projection"})


def test_a_parameter_without_a_gradient_has_none_and_frozen_ones_stay():
    model = small_model()
    model.visual.requires_grad_(False)
    config = configuration("bfloat16-params")
    steps = training(config, model)
    before = {name: x.clone() for name, x in steps.masters.state_dict().items()}
    for batch in batches(2, model):
        steps(batch)
    for name, x in steps.masters.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("visual."), name
        assert (steps.masters.parameters[name].grad is None) == name.startswith("visual."), name


class Casts(TorchDispatchMode):
    """Counts what changes a floating dtype and nothing else, by (shape, from, to), and the launches over many tensors."""

    def __init__(self):
        super().__init__()
        self.found, self.many, self.paused = Counter(), 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.many += name == "_foreach_copy_"
        if name in ("_to_copy", "copy_") and not self.paused:
            source, target = args[name == "copy_"], out
            if source.is_floating_point() and target.is_floating_point() and source.dtype != target.dtype:
                self.found[tuple(target.shape), source.dtype, target.dtype] += 1
        return out

    @contextmanager
    def without(self):
        self.paused = True
        yield
        self.paused = False


class InOneKernel(torch.autograd.Function):
    """A norm as a GPU has it: the casts of the CPU's specification happen in registers, and are not counted."""

    @staticmethod
    def forward(ctx, casts, op, options, *inputs):
        ctx.casts, ctx.op, ctx.options, ctx.amp = casts, op, options, torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(*inputs)
        with casts.without():
            outs = op(*inputs, **options)
        return tuple(x.view_as(x) for x in outs) if isinstance(outs, tuple) else outs

    @staticmethod
    def backward(ctx, *upstream):
        given = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with ctx.casts.without(), torch.enable_grad(), torch.autocast("cpu", BF16, enabled=ctx.amp):
            outs = ctx.op(*given, **ctx.options)
            gradients = iter(torch.autograd.grad(outs, [x for x in given if x is not None], upstream))
        return None, None, None, *(None if x is None else next(gradients) for x in given)


def casts_of_a_step(precision, loss, monkeypatch):
    """The Casts of a step, and the model's parameters' shapes."""
    casts, add_norm, swiglu_norm = Casts(), ops.add_norm, ops.swiglu_norm
    steps = training(configuration(precision, loss))
    (batch,) = batches(1, steps.model)

    def counted(op, inputs, options):
        *tensors, eps = inputs
        return InOneKernel.apply(casts, op, {"eps": eps, **options}, *tensors)

    with monkeypatch.context() as patch, casts:
        patch.setattr(ops, "add_norm", lambda *x, **options: counted(add_norm, x, options))
        patch.setattr(ops, "swiglu_norm", lambda *x, **options: counted(swiglu_norm, x, options))
        steps(batch)
    return casts


@pytest.mark.parametrize("loss", ["clip", "sms"])
def test_no_weight_is_cast_and_of_activations_only_these(loss, monkeypatch):
    casts = casts_of_a_step("bfloat16-params", loss, monkeypatch)
    embed, width, patches = 128, 64, 2 * 2 * 2
    expected = Counter()
    # The gradient of the patches, which leave the float32 stream here: the cast is the contiguous copy, without the class
    # token's row, that the product with it needs anyway.
    expected[(B, patches, width), F32, BF16] = 1
    # The loss computes in float32, from unit vectors: rounded to bfloat16 they would move a logit by 1 / (256 temperature).
    expected[(B, embed), F32, BF16] = 2
    if loss == "clip":  # sms_loss takes features as they are
        expected[(B, embed), BF16, F32] = 2
    assert casts.found == expected
    assert casts.many == 2  # gradients up, weights down


def test_autocast_casts_every_matrix_twice(monkeypatch):
    """That the counter counts: what the other test says is gone is there."""
    casts = casts_of_a_step("bfloat16", "clip", monkeypatch)
    matrices = small_model().hold_matrices(BF16)
    both = {"visual.blocks.0.attn.q_bias", "visual.blocks.0.attn.v_bias", "visual.blocks.1.attn.v_bias"}
    assert casts.many == 0 and sum(casts.found.values()) > 2 * (len(matrices) - len(both))
    for name in ("visual.blocks.0.mlp.fc1.weight", "text.text_projection", "text.transformer.resblocks.0.mlp.c_fc.bias"):
        shape = tuple(matrices[name].shape)
        assert casts.found[shape, F32, BF16] and casts.found[shape, BF16, F32], name


def test_checkpointed_and_evaluated_alike():
    """Recomputed blocks give the same gradients, and a float32 model under autocast what a held one gives without."""
    config = configuration("bfloat16-params")
    whole, less = training(config), training(config)
    less.model.set_grad_checkpointing()
    for batch in batches(2, whole.model):
        assert torch.equal(whole(batch), less(batch))
    for a, b in zip(whole.model.parameters(), less.model.parameters(), strict=True):
        assert torch.equal(a, b)
    exact = small_model()
    exact.load_state_dict(whole.masters.state_dict())
    with torch.no_grad():
        held = whole.model.encode_video(batch["video"]), whole.model.encode_text(batch["text"])
        with torch.autocast("cpu", BF16):
            cast = exact.encode_video(batch["video"]), exact.encode_text(batch["text"])
    assert all(map(torch.equal, held, cast))
    assert math.isfinite(sum(x.float().sum().item() for x in held))


def test_what_cannot_be_held():
    model = evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=2)
    for dtype in (torch.int8, "bfloat16", None, torch.float64):
        with pytest.raises(TypeError, match="dtype: expected torch.bfloat16 or torch.float16, got"):
            model.hold_matrices(dtype)
    model.visual.freqs = torch.nn.Parameter(model.visual.freqs.clone())
    model.hold_matrices(torch.bfloat16)
    assert model.visual.freqs.dtype == torch.float32
    model.encode_video(torch.zeros(1, 2, 64, 64, 3, dtype=torch.uint8)).float().sum().backward()
    with pytest.raises(ValueError, match="model: expected its matrices in float32, got torch.bfloat16"):
        Masters(model, torch.bfloat16)
