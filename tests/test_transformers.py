"""integrations.transformers: the same model with joint_attention in it, forward and backward."""

import copy
import pickle

import pytest
import torch
from peers import peer

from evaat_fast.integrations import transformers as integration

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8)
MODELS = {
    "VJEPA2": dict(
        crop_size=32,
        frames_per_clip=4,
        hidden_size=48,
        num_hidden_layers=2,
        pred_hidden_size=48,
        num_attention_heads=2,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        patch_size=8,
    ),
    "ViT": SMALL,
    "VideoMAE": SMALL | dict(num_frames=4),
    "DINOv3ViT": SMALL,
}


@pytest.fixture(autouse=True)
def transformers():
    peer("transformers.integrations.hub_kernels")  # it finds out whether there is a package `kernels`, once
    integration.register()
    return peer("transformers")


def make(name, implementation, **changes):
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name] | changes, attn_implementation=implementation)
    return getattr(transformers, f"{name}Model")(config).eval()


def run(model, name):
    torch.manual_seed(1)
    x = torch.randn(*((2, 4) if name in ("VJEPA2", "VideoMAE") else (2,)), 3, 32, 32)
    out = model(x, **({"skip_predictor": True} if name == "VJEPA2" else {})).last_hidden_state
    model.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out, *(p.grad for p in model.parameters() if p.grad is not None)


@pytest.fixture
def calls(transformers):
    """The calls that transformers' models make of what `register` gave them."""
    interface, count = transformers.AttentionInterface, []
    assert interface()["evaat_fast"] is integration.attention

    def counting(*arguments, **options):
        count.append(1)
        return integration.attention(*arguments, **options)

    interface.register("evaat_fast", counting)
    yield count
    integration.register()


@pytest.mark.parametrize("name", MODELS)
def test_equal(name, calls):
    theirs, ours = run(make(name, "sdpa"), name), run(make(name, "evaat_fast"), name)
    assert len(calls) == 2 and len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(duplicate, calls):
    model = make("ViT", "evaat_fast")
    twin = duplicate(model)
    expected = run(model, "ViT")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(map(torch.equal, run(twin, "ViT"), expected)) and len(calls) == 4


def test_what_it_has_not_is_said(transformers):
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    bert = transformers.BertModel(transformers.BertConfig(**small, attn_implementation="evaat_fast")).eval()
    tokens = torch.randint(0, 50, (2, 7))
    assert bert(tokens).last_hidden_state.shape == (2, 7, 32)
    with pytest.raises(ValueError, match="no such option: an attention mask"):
        bert(tokens, attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
    with pytest.raises(ValueError, match="no such option: attention dropout"):
        bert.train()(tokens)
    llama = transformers.LlamaModel(transformers.LlamaConfig(**small, attn_implementation="evaat_fast")).eval()
    with pytest.raises(ValueError, match="no such option: (an attention mask|causal order)"):
        llama(tokens)
    with pytest.raises(TypeError, match="name: expected a str, got 3"):
        integration.register(3)
