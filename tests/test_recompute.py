"""What blocks keep for the backward pass: fewer bytes level by level, the same gradients to the bit, no product done twice
where only what is cheap is computed again."""

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import evaat_fast
from evaat_fast.model import draw_patches

MODES = [False, "selective", True]


def model_and_batch(amp=False):
    model = evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    video = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    text = torch.randint(1, 49000, (2, 20))
    text[:, 9], text[:, 10:] = 49407, 0

    def loss(patches=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            video_embed, text_embed = model.encode_video(video, patches=patches), model.encode_text(text)
        return (video_embed.float() * text_embed.float()).sum()

    return model, loss


def saved(model, loss):
    """(bytes that autograd keeps besides parameters, the loss)."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    sizes = {}

    def pack(x):
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in own)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        value = loss()
    return sum(sizes.values()), value


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count[function._overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))

    def products(self):
        return sum(n for name, n in self.count.items() if name in ("mm", "addmm", "bmm") or "attention" in name)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert torch.equal(ours[name], grad), name


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_levels(amp):
    model, loss = model_and_batch(amp)
    kept, grads, products = {}, {}, {}
    for mode in MODES:
        model.set_grad_checkpointing(mode)
        kept[mode], value = saved(model, loss)
        grads[mode] = gradients(model, value)
        with Operators() as operators:  # in which the norms are torch's: both passes, or they would not fit together
            gradients(model, loss())
        products[mode] = operators.products()
    assert kept[True] < 0.35 * kept[False] and kept[True] < kept["selective"] < 0.8 * kept[False]
    assert products["selective"] == products[False] < products[True]
    assert_same(grads["selective"], grads[False])
    assert_same(grads[True], grads[False])


def test_the_count_of_the_docstring_is_that_of_a_block():
    """Of a vision block whose norms keep what our kernels keep: 16 C + 4 h bytes of 22 C + 6 h in half precision."""
    C, h = 128, 320
    model, loss = model_and_batch(amp=True)
    block, sizes = model.visual.blocks[1], {}
    x = torch.randn(2, 33, C, dtype=torch.bfloat16, requires_grad=True) * 1
    stream = torch.randn(2, 33, C, requires_grad=True) * 1
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.ndim > 1 and 33 in (*x.shape, x.numel() // x.shape[-1] // 2):
            sizes[storage.data_ptr()] = storage.nbytes() / 66
        return x

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda x: x):
        block(x, stream, model.config.grid, model.visual.freqs, selective=True)
    # The first norm is torch's here, which keeps what ours keeps, a float32 sum, and its own output before it is rounded.
    assert sum(sizes.values()) == pytest.approx(16 * C + 4 * h, rel=0.05)


@pytest.mark.parametrize("mode", ["selective", True])
def test_of_compiled_blocks(mode):
    model, loss = model_and_batch()
    exact = gradients(model, loss())
    torch._dynamo.reset()
    for block in (*model.visual.blocks, *model.text.transformer.resblocks):
        block.compile(backend="aot_eager")
    plain = gradients(model, loss())
    model.set_grad_checkpointing(mode)
    ours = gradients(model, loss())
    torch._dynamo.reset()
    for name, grad in exact.items():
        for found in (plain[name], ours[name]):
            assert (found - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("mode", ["selective", True])
def test_with_patches(mode):
    model, loss = model_and_batch()
    patches = draw_patches(2, model.config.grid, 0.5)
    plain = gradients(model, loss(patches))
    model.set_grad_checkpointing(mode)
    assert_same(gradients(model, loss(patches)), plain)


@pytest.mark.parametrize("mode", ["whole", "Selective", None, 1])
def test_unknown_modes(mode):
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match="grad_checkpointing: expected False, True or 'selective', got"):
        model.set_grad_checkpointing(mode)


def test_nothing_is_kept_without_gradients():
    model, loss = model_and_batch()
    model.set_grad_checkpointing("selective")
    with torch.no_grad(), saved_tensors_hooks(lambda x: 1 / 0, lambda x: x):
        loss()
