"""Biases that learn in the norm behind their layer: the step stays what it is, with fewer passes over gradients, and a layer
that is more than its weight is called as ever."""

import importlib

import peers
import pytest
import torch
from foreign import ours
from torch import nn
from torch.profiler import ProfilerActivity, profile

from evaat_fast.ops._core import dispatch

places = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
)
TOWERS = ("eva02", *(pytest.param(tower, marks=pytest.mark.slow) for tower in ("clip", "timesformer")))
EVERY = ("attn.proj.bias", "blocks.0.mlp.fc2.bias", "attn.out_proj.bias", "resblocks.0.mlp.c_proj.bias")
OPEN = {"eva02": (*EVERY, "mlp.fc1.bias"), "clip": EVERY, "timesformer": EVERY}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """As EVAAT_FAST_BACKEND says it: on a CPU the norms are C++'s or torch's, which take no bias."""
    for op in ("add_norm", "swiglu_norm"):
        monkeypatch.setitem(dispatch.DEFAULT, op, "triton")


class Task:
    """A small model, and its loss on a clip and a caption."""

    def __init__(self, tower, device):
        torch.manual_seed(0)
        frames = 2 if tower == "timesformer" else 1
        sizes = {"num_frames": frames, "image_size": 32 if tower == "eva02" else 24, "vision_width": 64, "vision_heads": 1}
        sizes |= {"vision_mlp": 96, "text_width": 64, "text_heads": 1, "text_layers": 2}
        self.model = ours(tower, **sizes).to(device)
        (height, width), self.device = self.model.config.size, device
        self.video = torch.randint(0, 256, (1, frames, height, width, 3), dtype=torch.uint8, device=device)
        self.text = torch.randint(1, 80, (1, 4), device=device)
        self.text[:, -1] = self.model.config.vocab_size - 1

    def step(self):
        """(loss, {name: gradient}, sums in the backward pass)."""
        self.model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            out = self.model(self.video, self.text)
            loss = (out["image_embed"] * out["text_embed"].roll(1, 1)).sum()
        with profile(activities=[ProfilerActivity.CPU]) as run:
            loss.backward()
        sums = sum(e.count for e in run.key_averages() if e.key == "aten::sum")
        return loss.detach(), {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}, sums

    def watch(self):
        """Hooks on all linear layers, which are called then."""
        seen = []
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        return [m.register_forward_hook(lambda *_: seen.append(1)) for m in layers], seen


def assert_same(found, others, summed_elsewhere=()):
    """To the bit on a CPU, but for sums in another order; on a GPU, where attention's gradients vary, within bfloat16."""
    assert found.keys() == others.keys()
    for name, grad in others.items():
        if grad.is_cuda:
            assert (found[name] - grad).norm() <= 2e-2 * grad.norm(), name
        elif name.endswith(tuple(summed_elsewhere)):
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], grad), name


@places
@pytest.mark.parametrize("tower", TOWERS)
def test_a_step_is_the_same_with_fewer_sums(tower, device):
    """To the bit, but what is summed in another order; with hooks the layers are called, and sum themselves."""
    task = Task(tower, device)
    loss, found, sums = task.step()
    hooks, seen = task.watch()
    of_called, called, all_sums = task.step()
    assert torch.equal(loss, of_called) and seen
    assert_same(found, called, OPEN[tower])
    assert all_sums - sums == sum(name.endswith(OPEN[tower]) for name in found) > 0
    for hook in hooks:
        hook.remove()
    for mode in ("selective",) if tower == "eva02" else ():  # in which a bias goes from one part to the next
        task.model.set_grad_checkpointing(mode)
        assert_same(task.step()[1], found)


@places
@pytest.mark.parametrize("norm", [nn.LayerNorm, None])
def test_timms_swiglu(norm, device):
    layers = peers.peer("timm").layers
    torch.manual_seed(0)
    mlp, x = layers.SwiGLU(8, 24, norm_layer=norm).to(device), torch.randn(2, 20, 8, device=device, requires_grad=True)
    runs = []
    for kind in (layers.SwiGLU, importlib.import_module("evaat_fast.integrations._timm_blocks").FusedSwiGLU):
        mlp.__class__ = kind
        loss = mlp(x).square().sum()
        with profile(activities=[ProfilerActivity.CPU]) as run:
            grads = torch.autograd.grad(loss, [x, *mlp.parameters()])
        runs.append((loss, *grads, sum(e.count for e in run.key_averages() if e.key == "aten::sum")))
    torch.testing.assert_close(runs[1][:-1], runs[0][:-1], rtol=1e-4, atol=1e-5)
    assert runs[0][-1] - runs[1][-1] == 2  # of gates and of values; fc2's is left


@pytest.fixture
def alone():
    """A group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("blocks", [False, True])
def test_fsdp(blocks, alone):
    """Around a tower, whose parameters are there while it runs; around each block, whose last bias stays in it."""
    from torch.distributed.fsdp import fully_shard

    task, sharded = Task("eva02", "cpu"), Task("eva02", "cpu")
    visual = sharded.model.visual
    for module in (*visual.blocks, visual) if blocks else (visual,):
        fully_shard(module, mesh=alone)
    (_, whole, sums), (_, found, sums_of_parts) = task.step(), sharded.step()
    found = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    assert_same(found, whole, OPEN["eva02"])
    assert sums_of_parts - sums == blocks


class Adapted(nn.Linear):
    """As adapters and quantised layers: more than a weight."""

    def forward(self, x):
        return super().forward(x) * 2


@places
def test_what_is_called(device):
    """An adapter, a frozen bias, none at all; and biases alone learn what they learn among all."""
    task = Task("eva02", device)
    _, found, sums = task.step()
    biases = {name for name in found if name.endswith(OPEN["eva02"])}
    for name, p in task.model.named_parameters():
        p.requires_grad_(name in biases)
    _, alone, _ = task.step()
    assert_same(alone, {name: found[name] for name in biases})
    for name, p in task.model.named_parameters():
        p.requires_grad_(name not in biases)
    _, others, fewer = task.step()
    assert_same(others, {name: grad for name, grad in found.items() if name not in biases})
    assert fewer == sums
    task.model.requires_grad_(True)
    block = task.model.visual.blocks[0]
    block.register_forward_hook(lambda *_: None)  # as FSDP has, to take parameters back before the next block reads its branch
    block.mlp.fc1.__class__ = Adapted
    block.attn.register_forward_pre_hook(lambda *_: None)
    task.model.visual.blocks[1].attn.proj.bias = None
    _, changed, more = task.step()
    assert more == sums + 3 and changed["visual.blocks.0.mlp.fc1.bias"].any()
