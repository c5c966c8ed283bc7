"""Everybody's names: each layout is built from random weights, loads, computes what its own code does, and comes back."""

import argparse

import foreign
import numpy as np
import pytest
import torch
from foreign import equal, eva, ours, tokens
from peers import peer

import evaat_fast
from evaat_fast.model import EVA02AT, ModelConfig, convert, save_checkpoint
from evaat_fast.model.checkpoints import convert_state, export_state, load_state, read

FOREIGN = {
    "openai": (foreign.OpenAI, dict, dict(activation="quick_gelu"), dict(tower="clip", vision_eps=1e-5, norm="clip")),
    "open_clip": (lambda: foreign.OpenAI(quick=False), dict, dict(activation="gelu"), dict(tower="clip", norm="clip")),
    "avion": (foreign.AVION, dict, {}, dict(tower="clip", activation="gelu", vision_eps=1e-6, norm="lavila")),
    "avion-flash": (foreign.AVION, foreign.flash, {}, dict(tower="clip", activation="gelu", norm="lavila")),
    "avion-picture": (lambda: foreign.AVION(frames=1), foreign.flash, {}, dict(tower="clip", norm="lavila", num_frames=1)),
    "lavila": (foreign.LaViLa, dict, {}, dict(tower="timesformer", activation="quick_gelu", vision_eps=1e-6, norm="lavila")),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_compute_what_their_code_computes(tmp_path, kind):
    """As their scripts write them, under DDP and with the arguments of a script; nothing but the file says what they are."""
    pytest.importorskip("tokenizers")
    make, form, overrides, expected = FOREIGN[kind]
    theirs, path = foreign.shaken(make()), tmp_path / "checkpoint.pt"
    state = {f"module.{name}": x for name, x in form(theirs.state_dict()).items()}
    arguments = argparse.Namespace(model="CLIP_VITB16", lr=3e-5, betas=[0.9, 0.999], output=None, best=np.float32(0.5))
    torch.save(dict(epoch=3, state_dict=state, optimizer={}, best_acc1=np.float64(31.5), args=arguments), path)
    model, tokenizer, _ = evaat_fast.load(path, **overrides)
    for name, value in expected.items():
        assert getattr(model.config, name) == value, name
    video, text = torch.randn(2, 3, model.config.num_frames, 48, 48), tokens()
    with torch.no_grad():
        wanted, captions = theirs.encode_image(video), theirs.encode_text(text)
        assert wanted.std() > 0.1 and captions.std() > 0.1
        torch.testing.assert_close(model.encode_video(video), wanted, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(model.encode_text(text), captions, rtol=1e-5, atol=2e-5)
    assert model.logit_scale.item() == theirs.logit_scale.item() and tokenizer.context_length == 20


@pytest.mark.parametrize("kind", ["openai", "avion-flash", "lavila"])
def test_the_vision_tower_alone(kind):
    """Its own state dict, as a module of theirs gives it; LaViLa's has no projection in it."""
    make, form, overrides, expected = FOREIGN[kind]
    theirs, frames = foreign.shaken(make()), 1 if kind == "openai" else 4
    fields = {**foreign.OURS, "num_frames": frames, "tower": expected["tower"], **overrides}
    fields |= {name: expected[name] for name in ("activation", "vision_eps") if name in expected}
    model = foreign.shaken(EVA02AT(ModelConfig(**fields)))
    before = model.text.text_projection.clone()
    tower = {name.removeprefix("visual."): x for name, x in form(theirs.state_dict()).items() if name.startswith("visual.")}
    if kind == "lavila":
        tower["head.weight"] = theirs.image_projection.mT
    load_state(model, tower, part="visual")
    video = torch.randn(2, 3, frames, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(video), theirs.encode_image(video), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.text.text_projection, before)


def test_which_gelu_a_file_does_not_say(tmp_path):
    torch.save(foreign.OpenAI().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="activation: .*give activation='quick_gelu' .OpenAI's. or 'gelu'"):
        evaat_fast.load(tmp_path / "clip.pt")


def test_equals_open_clips_openai(tmp_path):
    """And what is written for open_clip is what open_clip loads, strictly."""
    open_clip = peer("open_clip")
    vision = dict(layers=2, width=128, head_width=64, patch_size=12, image_size=48)
    text = dict(context_length=20, vocab_size=90, width=64, heads=1, layers=2)
    theirs = foreign.shaken(open_clip.CLIP(24, vision, text, quick_gelu=True))
    torch.save(theirs.state_dict(), tmp_path / "open_clip.bin")
    convert(tmp_path / "open_clip.bin", tmp_path / "ours.safetensors", activation="quick_gelu")
    model = evaat_fast.load(tmp_path / "ours.safetensors").model
    image, caption = torch.randn(2, 3, 48, 48), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(image.unsqueeze(2)), theirs.encode_image(image), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(model.encode_text(caption), theirs.encode_text(caption), rtol=1e-5, atol=2e-5)
    again = open_clip.CLIP(24, vision, text, quick_gelu=True)
    convert(tmp_path / "ours.safetensors", tmp_path / "again.pt", to="open_clip")
    again.load_state_dict(torch.load(tmp_path / "again.pt", weights_only=True)["state_dict"])
    assert equal(again.state_dict(), theirs.state_dict())


def test_timm_loads_what_is_written_for_it(tmp_path):
    """For timm strictly, and EVA's names by timm's own converter."""
    timm = peer("timm")
    model = eva(num_frames=1, vision_heads=2)
    with torch.no_grad():
        model.visual.temporal_embed.zero_()  # which is what pictures have
    changes = dict(img_size=64, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2.5, num_classes=128, ref_feat_shape=(4, 4))
    theirs = timm.create_model("eva02_base_patch16_clip_224", **changes).eval()
    theirs.load_state_dict(export_state(model.state_dict(), model.config, "timm"))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), model.encode_video(image.unsqueeze(2)), rtol=0, atol=2e-5)
    read_by_timm = peer("timm.models.eva").checkpoint_filter_fn(export_state(model.state_dict(), model.config, "eva"), theirs)
    assert equal(dict(read_by_timm), dict(theirs.state_dict()))


PAIRS = [("eva02", to) for to in ("ours", "eva", "timm", "open_clip")]
PAIRS += [("clip", to) for to in ("ours", "timm", "open_clip", "avion")] + [("timesformer", to) for to in ("ours", "lavila")]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("tower,to", PAIRS)
def test_round_trips_to_the_bit(tmp_path, tower, to, suffix):
    model = ours(tower, norm="lavila")
    save_checkpoint(model, tmp_path / f"ours.{suffix}")
    there = convert(tmp_path / f"ours.{suffix}", tmp_path / f"there.{suffix}", to=to)
    assert there.to == to and there.config == model.config and f"layout {to} (from ours)" in str(there)
    back = convert_state(read(tmp_path / f"there.{suffix}").state)
    expected = {k: v for k, v in model.state_dict().items() if to != "timm" or k.startswith("visual.")}
    assert equal(back, expected)
    if to != "timm":  # which has no text tower
        pytest.importorskip("tokenizers")
        loaded = evaat_fast.load(tmp_path / f"there.{suffix}").model
        assert loaded.config == model.config and loaded.config.norm == "lavila"
        assert equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["openai", "avion-flash", "lavila"])
def test_foreign_names_come_back(kind):
    make, form, overrides, expected = FOREIGN[kind]
    state = form(foreign.shaken(make()).state_dict())
    frames = 1 if kind == "openai" else 4
    config = ModelConfig(**foreign.OURS, num_frames=frames, tower=expected["tower"])
    assert equal(export_state(convert_state(state), config, {"openai": "open_clip"}.get(kind, kind.split("-")[0])), state)


@pytest.mark.parametrize("tower", ["eva02", "clip"])
def test_fused_and_split_projections(tower):
    """EVA02 in one piece with a bias of three parts, as some write it, and CLIP's q, k and v apart."""
    model = ours(tower)
    state = dict(model.state_dict())
    for i in range(2):
        stem = f"visual.blocks.{i}.attn"
        if tower == "eva02":
            q, v = (state.pop(f"{stem}.{part}_bias") for part in "qv")
            state[f"{stem}.qkv.bias"] = torch.cat((q, torch.zeros_like(q), v))
        else:
            for kind in ("weight", "bias"):
                parts = state.pop(f"{stem}.qkv.{kind}").chunk(3)
                state |= {f"{stem}.{part}_proj.{kind}": x for part, x in zip("qkv", parts, strict=True)}
    assert equal(convert_state(state), model.state_dict())


def prefixed(*words, tower=None):
    def wrap(state):
        word = ".".join(words) + "."
        if tower is None:
            return {word + name: x for name, x in state.items()}
        return {
            name.replace(f"{tower}.", f"{tower}.{word}", 1) if name.startswith(tower) else name: x for name, x in state.items()
        }

    return wrap


WRAPPED = {
    "compile-ddp": prefixed("_orig_mod", "module"),
    "ddp-compile": prefixed("module", "_orig_mod"),
    "ddp-twice": prefixed("module", "module"),
    "three": prefixed("_orig_mod", "module", "_orig_mod", "_fsdp_wrapped_module"),
    "tower-compiled": prefixed("_orig_mod", tower="visual"),
    "tower-text": prefixed("module", "_orig_mod", tower="text"),
    "both": lambda state: prefixed("module")(prefixed("_orig_mod", tower="visual")(state)),
    "blocks": lambda state: {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): x for name, x in state.items()},
    "lightning": prefixed("model"),
    "trainer": prefixed("module", "model"),
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module")(state)},
    "averaged-ddp": lambda state: prefixed("module")({"n_averaged": torch.tensor(3), **prefixed("module")(state)}),
    "averaged-compiled": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module", "_orig_mod")(state)},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_names_load(wrap):
    model, other = eva(), eva()
    load_state(other, WRAPPED[wrap](model.state_dict()))
    assert equal(other.state_dict(), model.state_dict())


def test_wrapped_models_load():
    """The words that torch itself puts there."""
    model, other = eva(), eva()
    averaged = torch.optim.swa_utils.AveragedModel(
        torch.compile(model), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn()
    )
    averaged.update_parameters(torch.compile(model))
    load_state(other, averaged.state_dict())
    assert equal(other.state_dict(), model.state_dict())
    partly = eva()
    partly.load_state_dict(model.state_dict())
    partly.visual = torch.compile(partly.visual)
    load_state(other := eva(), partly.state_dict())
    assert equal(other.state_dict(), model.state_dict())


def test_two_names_that_become_one():
    state = dict(eva().state_dict())
    state["module.visual.norm.weight"] = state["visual.norm.weight"]
    with pytest.raises(
        ValueError, match="two of its tensors are visual.norm.weight, of which one is module.visual.norm.weight"
    ):
        load_state(eva(), state)
