"""With one frame the model is EVA02-CLIP: timm and open_clip say so where installed, stored answers everywhere."""

import json
import re

import pytest
import torch
from golden import eva02_clip as golden
from peers import peer

from evaat_fast.model import EVA02AT, create_model, get_config, load_checkpoint
from evaat_fast.model.checkpoints import load_state

TOLERANCE = dict(rtol=0, atol=1e-5)
VOCABULARY = 1000  # the table is only looked up; 49,408 rows would be most of the time and memory
# Ours, open_clip's name, layers kept.
MODELS = [
    pytest.param(("eva02_at_base_patch16_224", "EVA02-B-16", 2), id="B-16"),
    pytest.param(("eva02_at_large_patch14_224", "EVA02-L-14", 1), id="L-14"),
    pytest.param(("eva02_at_large_patch14_336", "EVA02-L-14-336", 1), id="L-14-336", marks=pytest.mark.slow),
]


def to_eva(state):
    """open_clip's names to those of EVA's own files, with the constants those hold."""
    names = {}
    for name, tensor in state.items():
        name = name.replace("visual.trunk.", "visual.")
        if name.startswith("visual."):
            for ours, theirs in (
                ("attn.norm.", "attn.inner_attn_ln."),
                ("attn.q_proj.bias", "attn.q_bias"),
                ("attn.v_proj.bias", "attn.v_bias"),
                ("mlp.fc1_g.", "mlp.w1."),
                ("mlp.fc1_x.", "mlp.w2."),
                ("mlp.fc2.", "mlp.w3."),
                ("mlp.norm.", "mlp.ffn_ln."),
            ):
                name = name.replace(ours, theirs)
        names[name] = tensor
    tables = torch.zeros(4, 4)
    return {**names, "visual.rope.freqs_cos": tables, "visual.blocks.0.attn.rope.freqs_sin": tables}


FORMATS = {
    "open_clip": lambda state: state,
    "eva": to_eva,
    "ddp": lambda state: {f"module.{k}": v for k, v in to_eva(state).items()},
}


@pytest.fixture(scope="module")
def answers():
    return json.loads(golden.FILE.read_text())["models"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", golden.MODELS)
def test_equals_golden(answers, name, form):
    sizes = golden.MODELS[name]["ours"]
    text = {f"text_{k}": v for k, v in golden.TEXT.items()}
    config = get_config(
        name,
        num_frames=1,
        embed_dim=golden.EMBED,
        vocab_size=golden.VOCABULARY,
        context_length=golden.CONTEXT,
        **text,
        **sizes,
    )
    model = EVA02AT(config)
    state = {k: golden.weight(k, shape) for k, shape in answers[name]["shapes"].items()}
    load_state(model, FORMATS[form](state))
    with torch.no_grad():
        video = model.encode_video(golden.image(name, config.image_size).unsqueeze(2))
        text = model.encode_text(golden.tokens())
    torch.testing.assert_close(video, torch.tensor(answers[name]["image_embed"]), **TOLERANCE)
    torch.testing.assert_close(text, torch.tensor(answers[name]["text_embed"]), **TOLERANCE)
    torch.testing.assert_close(model.logit_scale, state["logit_scale"])


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """(our name, our overrides, open_clip's model): real widths, few layers, every weight and bias random."""
    ours, theirs, layers = request.param
    open_clip, timm_model = peer("open_clip"), peer("open_clip.timm_model")
    config = open_clip.get_model_config(theirs)
    config["text_cfg"].update(layers=layers, vocab_size=VOCABULARY)
    config.pop("custom_text")
    create = timm_model.timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_model.timm, "create_model", lambda *args, **kwargs: create(*args, depth=layers, **kwargs))
        model = open_clip.CustomTextCLIP(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    sizes = dict(embed_dim=config["embed_dim"], vision_layers=layers, text_layers=layers, vocab_size=VOCABULARY)
    return ours, dict(num_frames=1, **sizes), model


def tokens(count=3):
    ids = torch.randint(1, VOCABULARY - 2, (count, 77))
    for row, end in zip(ids, (76, 12, 1), strict=True):
        row[0], row[end], row[end + 1 :] = VOCABULARY - 2, VOCABULARY - 1, 0
    return ids


def test_equals_open_clip(pair, record_property):
    name, overrides, theirs = pair
    ours = create_model(name, **overrides)
    load_state(ours, theirs.state_dict())
    image, text = torch.randn(2, 3, ours.config.image_size, ours.config.image_size), tokens()
    with torch.no_grad():
        video, expected_video = ours.encode_video(image.unsqueeze(2)), theirs.encode_image(image)
        caption, expected_caption = ours.encode_text(text), theirs.encode_text(text)
        out, expected = ours(image.unsqueeze(2), text), theirs(image, text)
    assert expected_video.std() > 0.1 and expected_caption.std() > 0.1
    record_property("video_error", float((video - expected_video).abs().max()))
    record_property("text_error", float((caption - expected_caption).abs().max()))
    torch.testing.assert_close(video, expected_video, **TOLERANCE)
    torch.testing.assert_close(caption, expected_caption, **TOLERANCE)
    for one, other in zip((out["image_embed"], out["text_embed"], out["logit_scale"]), expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_uint8_equals_open_clip(pair):
    name, overrides, theirs = pair
    ours = create_model(name, **overrides)
    load_state(ours, theirs.state_dict())
    size = ours.config.image_size
    video = torch.randint(0, 256, (1, 1, size, size, 3), dtype=torch.uint8)
    open_clip = peer("open_clip")
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    image = (video[:, 0].permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_video(video), theirs.encode_image(image), **TOLERANCE)


def test_timm_tower(pair):
    """timm's names have no prefix and no text."""
    name, overrides, theirs = pair
    ours = create_model(name, **overrides)
    before = ours.text.text_projection.clone()
    state = theirs.visual.trunk.state_dict()
    with pytest.raises(ValueError, match=r"load it with load_checkpoint\(model, path, part='visual'\)"):
        load_state(ours, state)
    load_state(ours, state, part="visual")
    assert torch.equal(ours.text.text_projection, before)
    image = torch.randn(1, 3, ours.config.image_size, ours.config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_video(image.unsqueeze(2)), theirs.visual(image), **TOLERANCE)


def test_eva_names_are_what_timm_reads(pair):
    """timm's own converter takes our idea of EVA's names back to timm's."""
    _, _, theirs = pair
    trunk = theirs.visual.trunk
    read = peer("timm.models.eva").checkpoint_filter_fn(to_eva(theirs.state_dict()), trunk)
    expected = trunk.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[k], expected[k]) for k in expected)


def test_image_weights_become_video_weights(pair, tmp_path, caplog):
    """EVA's fp16 file into a 4-frame model with the paper's 256-d space: frame by frame the same, projections fresh."""
    name, overrides, theirs = pair
    path = tmp_path / "EVA02_CLIP.pt"
    torch.save({k: v.half() for k, v in to_eva(theirs.state_dict()).items()}, path)
    image_model = create_model(name, pretrained=path, **overrides)
    model = create_model(name, pretrained=str(path), **{**overrides, "num_frames": 4, "embed_dim": 256})
    assert re.search(r"another embedding space than 256: left fresh: visual.head.weight.*logit_scale", caplog.text)
    assert not model.visual.temporal_embed.any() and model.visual.temporal_embed.shape[1] == 4
    for k, v in image_model.visual.blocks.state_dict().items():
        assert torch.equal(v, model.visual.blocks.state_dict()[k])
    assert model.logit_scale.exp().item() == pytest.approx(20)
    assert model.visual.head.weight.std().item() == pytest.approx(model.config.vision_width**-0.5, rel=0.05)
    with pytest.raises(ValueError, match=r"3 of another shape: .*visual.head.weight \[\d+, \d+\] for \[256, \d+\]"):
        load_checkpoint(model, path)
