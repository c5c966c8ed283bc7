"""The model: a plain transcription of the paper gives the same, under every option; what does not fit is named."""

import copy

import pytest
import torch
import torch.nn.functional as F

import evaat_fast
from evaat_fast import ops
from evaat_fast.model import NORMS, ModelConfig, get_config, list_pretrained, trim

TINY = "eva02_at_tiny_patch16_64"
# Small in every direction, all sizes different.
SMALL = dict(
    image_size=48,
    patch_size=12,
    vision_width=48,
    vision_layers=2,
    vision_heads=3,
    vision_mlp=100,
    text_width=40,
    text_layers=2,
    text_heads=2,
    vocab_size=120,
    embed_dim=24,
)


def small(**changes):
    return evaat_fast.create_model(TINY, **{**SMALL, "num_frames": 3, **changes})


def clip(batch=2, frames=3, size=48):
    return torch.randint(0, 256, (batch, frames, size, size, 3), dtype=torch.uint8)


def captions(batch=2, length=77, end=119):
    ids = torch.randint(1, end, (batch, length))
    for i, row in enumerate(ids):
        row[5 + i], row[6 + i :] = end, 0
    return ids


def normalised(video, norm="clip", dtype=torch.float32):
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in NORMS[norm])
    return ((video.double() - mean) / std).permute(0, 4, 1, 2, 3).to(dtype)


def turn(x, angle):
    """Rotates interleaved pairs of x [..., N, D] by angle [N, D/2]."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def paper(tower, video):
    """The vision tower as the paper writes it: a convolution, full blocks, a spatial and then a temporal turn."""
    config, weights = tower.config, dict(tower.named_parameters())
    T, Hp, Wp = config.grid
    H, D = config.vision_heads, config.vision_width // config.vision_heads

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x, name, bias=None):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"] if bias is None else bias)

    frames = video.transpose(1, 2).flatten(0, 1)
    x = F.conv2d(frames, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], config.patch_size)
    x = x.flatten(2).mT.reshape(len(video), T * Hp * Wp, -1)
    x = torch.cat((weights["cls_token"].expand(len(video), -1, -1), x), 1)
    position = weights["pos_embed"]
    x = x + torch.cat((position[:, :1], position[:, 1:].repeat(1, T, 1)), 1)
    if config.temporal_embed:
        x[:, 1:] += weights["temporal_embed"].repeat_interleave(Hp * Wp, 1)

    t, h, w = torch.meshgrid(torch.arange(T), torch.arange(Hp), torch.arange(Wp), indexing="ij")
    axis = 10000.0 ** (-4 * torch.arange(D // 4, dtype=torch.float64) / D)
    rows, columns = (p.flatten()[:, None] * config.rope_grid / n * axis for p, n in ((h, Hp), (w, Wp)))
    space = torch.cat((rows, columns), 1)
    time = t.flatten()[:, None] * 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    if config.rope == "spatial":
        time = 0 * time
    elif config.rope == "split":  # each axis has channels of its own, 4, 6 and 6 of 16
        parts = [(t, 1.0, D // 4), (h, config.rope_grid / Hp, 3 * D // 8), (w, config.rope_grid / Wp, 3 * D // 8)]
        turned = [p.flatten()[:, None] * s * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for p, s, d in parts]
        space, time = torch.cat(turned, 1), 0 * time
    for i in range(config.vision_layers):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.norm1")
        q_bias, v_bias = weights[f"{block}.attn.q_bias"], weights[f"{block}.attn.v_bias"]
        qkv = linear(y, f"{block}.attn.qkv", torch.cat((q_bias, 0 * q_bias, v_bias)))
        q, k, v = (z.unflatten(2, (H, D)).transpose(1, 2) for z in qkv.chunk(3, -1))
        q, k = (torch.cat((z[:, :, :1], turn(turn(z[:, :, 1:], space), time)), 2) for z in (q, k))
        y = (q @ k.mT * D**-0.5).softmax(-1) @ v
        y = norm(y.transpose(1, 2).flatten(2), f"{block}.attn.norm")
        x = x + linear(y, f"{block}.attn.proj")
        gate, value = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1").chunk(2, -1)
        x = x + linear(norm(F.silu(gate) * value, f"{block}.mlp.norm"), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def shaken(model):
    """Norms and biases start at 0 and 1; a test should not."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_is_the_paper(frames):
    model = shaken(small(num_frames=frames)).double()
    video = normalised(clip(frames=frames), dtype=torch.float64)
    ours, theirs = model.encode_video(video), paper(model.visual, video)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # the frequencies are float32
    parameters = list(model.visual.parameters())
    for expected, got, (name, _) in zip(
        torch.autograd.grad(theirs.square().sum(), parameters),
        torch.autograd.grad(ours.square().sum(), parameters),
        model.visual.named_parameters(),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize(
    "change",
    [
        dict(rope="spatial"),
        dict(rope="split"),
        dict(temporal_embed=False),
        dict(rope="split", temporal_embed=False),
        dict(image_size=(36, 60)),
        dict(image_size=[48, 24], rope="split"),
    ],
    ids=str,
)
def test_table_four_and_other_shapes(change):
    """Learnable is rope="spatial", RoPE alone temporal_embed=False; a head has 16 channels here."""
    model = shaken(small(**change)).double()
    height, width = model.config.size
    video = torch.randint(0, 256, (2, 3, height, width, 3), dtype=torch.uint8)
    assert (model.visual.temporal_embed is None) == ("temporal_embed" in change)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        pixels = normalised(video, dtype=torch.float64)
        torch.testing.assert_close(model.encode_video(pixels), paper(model.visual, pixels), rtol=0, atol=2e-6)
        assert model.encode_video(video).shape == (2, 24)


def test_time_matters():
    model = small()
    video = clip()
    with torch.no_grad():
        assert not torch.allclose(model.encode_video(video), model.encode_video(video.flip(1)), atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_uint8_is_the_normalised_float(norm):
    model, video = small(norm=norm), clip()
    with torch.no_grad():
        ours = model.encode_video(video)
        torch.testing.assert_close(ours, model.encode_video(normalised(video, norm)), rtol=1e-5, atol=1e-5)
        crop = torch.zeros(2, 3, 60, 64, 3, dtype=torch.uint8)
        crop[:, :, 5:53, 7:55] = video
        assert torch.equal(model.encode_video(crop[:, :, 5:53, 7:55]), ours)


def test_norm_constants():
    """LaViLa's red mean is CLIP's times 225, the others times 255."""
    assert NORMS["clip"][0] == pytest.approx([255 * m for m in (0.48145466, 0.4578275, 0.40821073)])
    assert NORMS["clip"][1] == pytest.approx([255 * s for s in (0.26862954, 0.26130258, 0.27577711)])
    assert NORMS["timm"][0] == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    assert NORMS["timm"][1] == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])
    assert NORMS["lavila"] == ((pytest.approx(225 * 0.48145466), *NORMS["clip"][0][1:]), NORMS["clip"][1])


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes(batch):
    model = small()
    out = model(clip(batch), captions(batch))
    assert set(out) == {"image_embed", "text_embed", "logit_scale"}
    assert out["image_embed"].shape == out["text_embed"].shape == (batch, 24)
    assert out["logit_scale"].item() == pytest.approx(20)
    for key in ("image_embed", "text_embed"):
        torch.testing.assert_close(out[key].norm(dim=-1), torch.ones(batch))
    alone = model(text=captions(batch))
    assert alone["image_embed"] is None and alone["text_embed"].shape == (batch, 24)


def test_bfloat16():
    torch.manual_seed(0)
    model, video, text = small(), clip(), captions()
    with torch.no_grad():
        exact = model(video, text)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(video, text)
            assert model.encode_video(video).dtype == torch.bfloat16
            model.encode_video(normalised(video, dtype=torch.bfloat16))
        low = model.bfloat16()(video, text)
    assert low["image_embed"].dtype == low["text_embed"].dtype == torch.bfloat16
    for key in ("image_embed", "text_embed"):
        for rounded in (mixed, low):
            assert F.cosine_similarity(exact[key], rounded[key].float()).min() > 0.999


@pytest.mark.parametrize("change", ["bfloat16", "half", "double", "to", "to_empty", "deepcopy"])
def test_frequencies_stay_float32(change):
    model = small()
    expected = model.visual.freqs.clone()
    model = {
        "to": lambda: model.to(torch.bfloat16),
        "to_empty": lambda: model.to("meta").to_empty(device="cpu"),
        "deepcopy": lambda: copy.deepcopy(model),
    }.get(change, lambda: getattr(model, change)())()
    assert model.visual.freqs.dtype == torch.float32 and torch.equal(model.visual.freqs, expected)
    assert "visual.freqs" not in model.state_dict()
    scale = SMALL["image_size"] // SMALL["patch_size"]
    assert torch.equal(
        expected, ops.joint_freqs(16, scale=(1.0, model.config.rope_grid / scale, model.config.rope_grid / scale))
    )


def contrastive(model, video, text):
    out = model(video, text)
    return F.cross_entropy(out["logit_scale"] * out["image_embed"] @ out["text_embed"].T, torch.arange(len(video)))


def gradients(model, video, text):
    model.zero_grad()
    contrastive(model, video, text).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_gradients_reach_every_parameter(amp):
    model = shaken(small())
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        grads = gradients(model, clip(3), captions(3))
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.any(), name


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_checkpointing_changes_nothing(amp):
    model, video, text = small(), clip(), captions()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        plain = gradients(model, video, text)
        model.set_grad_checkpointing()
        calls = []
        model.visual.blocks[0].register_forward_pre_hook(lambda *_: calls.append("visual"))
        model.text.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append("text"))
        again = gradients(model, video, text)
    assert sorted(calls) == ["text", "text", "visual", "visual"]
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6, msg=name)
    model.set_grad_checkpointing(False)
    model(video, text)
    assert sorted(calls) == ["text"] * 3 + ["visual"] * 3


def test_compiles():
    """The vision tower in one graph; the text tower's columns are not trimmed then."""
    model, video, text = small(), clip(), captions()
    expected = model(video, text)
    ours = torch.compile(model, fullgraph=True, backend="aot_eager")(video, text)
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-5, atol=1e-6)


def test_trim():
    model, text = small(), captions(3)
    assert trim(text).shape == (3, 8) and trim(text[:0]).shape == (0, 77)
    with torch.no_grad():
        full = model.encode_text(text)
        torch.testing.assert_close(model.encode_text(text[:, :9]), full)
        torch.testing.assert_close(model.encode_text(text.int()), full)
        tower = model.text
        x = sum(tower.transformer(tower.token_embedding(text) + tower.positional_embedding))
        plain = tower.ln_final(x[torch.arange(3), text.argmax(-1)]) @ tower.text_projection
    torch.testing.assert_close(full, plain, rtol=1e-5, atol=1e-5)


def test_seed_decides_initialisation():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(small().state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert not torch.equal(models[0]["visual.pos_embed"], models[2]["visual.pos_embed"])
    assert all(v.isfinite().all() for v in models[0].values())


def test_names():
    assert evaat_fast.list_models() == sorted(evaat_fast.list_models())
    theirs = [f"{name}_{size}" for name in ("clip_vit", "avion_vit", "lavila_tsf") for size in ("base_patch16_224",)]
    theirs += [f"{name}_large_patch14_{side}" for name in ("clip_vit", "avion_vit", "lavila_tsf") for side in (224, 336)]
    eva = [TINY, "eva02_at_base_patch16_224", "eva02_at_large_patch14_224", "eva02_at_large_patch14_336"]
    assert set(evaat_fast.list_models()) == {*eva, *theirs}
    for name in (*eva, *theirs):
        assert name in evaat_fast.list_models()
        assert isinstance(get_config(name), ModelConfig)
    assert get_config(TINY, image_size=(64, 64)) == get_config(TINY) and get_config(TINY, image_size=[64, 32]).grid == (8, 4, 2)
    assert ("eva02_at_base_patch16_224", "merged2b_s8b_b131k") in list_pretrained()
    assert {name for name, _ in list_pretrained()} <= set(evaat_fast.list_models())


@pytest.mark.parametrize(
    "name,millions,grid",
    [
        ("eva02_at_base_patch16_224", (86, 63), (4, 14, 14)),
        ("eva02_at_large_patch14_336", (304, 124), (4, 24, 24)),
        ("avion_vit_base_patch16_224", (86, 63), (4, 14, 14)),
        ("avion_vit_large_patch14_224", (303.7, 124), (4, 16, 16)),
        ("lavila_tsf_base_patch16_224", (114.3, 63), (4, 14, 14)),
    ],
)
def test_sizes_are_the_papers(name, millions, grid):
    config = get_config(name)
    assert config.grid == grid and config.embed_dim == 256
    model = evaat_fast.create_model(name, vision_layers=1, text_layers=1)
    towers = (
        (model.visual, model.visual.blocks, config.vision_layers),
        (model.text, model.text.transformer, config.text_layers),
    )
    for (tower, block, layers), expected in zip(towers, millions, strict=True):
        whole, one = (sum(p.numel() for p in module.parameters()) for module in (tower, block))
        assert (whole + (layers - 1) * one) / 1e6 == pytest.approx(expected, rel=0.01)


def test_tiny_is_tiny():
    model = evaat_fast.create_model(TINY)
    assert sum(p.numel() for p in model.visual.blocks.parameters()) < 650_000
    assert model.config.num_frames == 8


def test_no_weight_decay_names_parameters():
    model = small()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_transforms():
    model, train, evaluate = evaat_fast.create_model_and_transforms(TINY, num_frames=2)
    for transform in (train, evaluate):
        frames = transform(torch.randint(0, 256, (2, 96, 120, 3), dtype=torch.uint8))
        assert frames.shape == (2, 64, 64, 3) and frames.dtype == torch.uint8
        assert model.encode_video(frames[None]).shape == (1, 128)


BAD_VIDEO = [
    (lambda v: v[:, :2], ValueError, r"expected uint8 \[B, 3, 48, 48, 3\], got \[2, 2, 48, 48, 3\]; .*num_frames=2"),
    (lambda v: v[:, :, :36], ValueError, r"expected uint8 \[B, 3, 48, 48, 3\], got \[2, 3, 36, 48, 3\]$"),
    (lambda v: v[0], ValueError, r"got \[3, 48, 48, 3\]"),
    (lambda v: v.permute(0, 4, 1, 2, 3), ValueError, r"expected uint8 \[B, 3, 48, 48, 3\]"),
    (lambda v: v.float(), ValueError, r"expected float \[B, 3, 3, 48, 48\], got \[2, 3, 48, 48, 3\]"),
    (lambda v: normalised(v)[:, :, :1], ValueError, r"expected float \[B, 3, 3, 48, 48\], .*num_frames=1"),
    (lambda v: normalised(v).double(), TypeError, "expected uint8 or torch.float32 as the model, got torch.float64"),
    (lambda v: v.int(), TypeError, "expected uint8 or floating point, got torch.int32"),
    (lambda v: v.numpy(), TypeError, "expected a tensor, got ndarray"),
    (lambda v: v.to("meta"), ValueError, "expected a tensor on cpu as the model, got meta"),
]


@pytest.mark.parametrize("change,error,message", BAD_VIDEO)
def test_bad_video(change, error, message):
    with pytest.raises(error, match="video: .*" + message):
        small().encode_video(change(clip()))


BAD_TEXT = [
    (lambda t: t.float(), TypeError, "expected int64 or int32 token ids .*, got torch.float32"),
    (lambda t: ["a caption"], TypeError, r"evaat_fast.get_tokenizer makes them\), got list"),
    (lambda t: t[0], ValueError, r"expected \[B, 77\] or shorter, got \[77\]"),
    (lambda t: t.repeat(1, 2), ValueError, r"expected \[B, 77\] or shorter, got \[2, 154\]"),
    (lambda t: t[:, :0], ValueError, r"got \[2, 0\]"),
    (lambda t: t + 1, ValueError, "expected token ids from 0 to 119, got 120"),
    (lambda t: t - 1, ValueError, "expected token ids from 0 to 119, got -1"),
    (lambda t: t.to("meta"), ValueError, "expected a tensor on cpu as the model, got meta"),
]


@pytest.mark.parametrize("change,error,message", BAD_TEXT)
def test_bad_text(change, error, message):
    with pytest.raises(error, match="text: .*" + message):
        small().encode_text(change(captions()))


BAD_CONFIG = [
    (dict(name="eva02_at_bse_patch16_224"), ValueError, "name: there is no .*did you mean 'eva02_at_base_patch16_224'"),
    (dict(embed_dims=512), ValueError, "overrides: there is no 'embed_dims'; did you mean 'embed_dim'"),
    (dict(norm="imagenet"), ValueError, "norm: there is no 'imagenet'.* Known: clip, lavila"),
    (dict(num_frames=0), ValueError, "num_frames: expected a positive number, got 0"),
    (dict(num_frames=2.0), TypeError, "num_frames: expected int, got 2.0"),
    (dict(num_frames=True), TypeError, "num_frames: expected int, got True"),
    (dict(image_size=60), ValueError, "image_size: expected a multiple of patch_size=16, got 60"),
    (dict(image_size=(64, 60)), ValueError, r"image_size: expected a multiple of patch_size=16, got \(64, 60\)"),
    (dict(image_size=(64, 0)), ValueError, r"image_size: expected a positive number of at most 1e9, got \(64, 0\)"),
    (dict(image_size=(64,)), TypeError, r"image_size: expected int or \(height, width\), got \(64,\)"),
    (dict(image_size="64"), TypeError, r"image_size: expected int or \(height, width\), got '64'"),
    (dict(rope="axial"), ValueError, "rope: there is no 'axial'.* Known: joint, split, spatial"),
    (dict(tower="vit"), ValueError, "tower: there is no 'vit'.* Known: eva02, clip, timesformer"),
    (dict(temporal_embed=1), TypeError, "temporal_embed: expected bool, got 1"),
    (dict(rope="split", vision_heads=32), ValueError, "rope: expected heads of at least 8 channels to split, got 4"),
    (dict(name="clip_vit_base_patch16_224", rope="spatial"), ValueError, "tower='clip' has no rotary embedding"),
    (dict(vision_heads=3), ValueError, "vision_width: expected a multiple of vision_heads=3 times 4, got 128"),
    (dict(text_heads=3), ValueError, "text_width: expected a multiple of text_heads=3, got 64"),
    (dict(temperature=-1.0), ValueError, "temperature: expected a positive number, got -1.0"),
    (dict(pretrained=7), TypeError, "pretrained: expected None, a path, 'hf-hub:...' or a tag, got 7"),
    (
        dict(pretrained="merged2b"),
        ValueError,
        r"pretrained: there is no 'merged2b'. Known: none \(tags of eva02_at_tiny",
    ),
    (
        dict(name="eva02_at_base_patch16_224", pretrained="merged2b"),
        ValueError,
        "there is no 'merged2b'; did you mean 'merged2b_s8b_b131k'",
    ),
    (dict(pretrained="missing.pt"), FileNotFoundError, "pretrained: there is no file 'missing.pt'"),
]


@pytest.mark.parametrize("change,error,message", BAD_CONFIG)
def test_bad_config(change, error, message):
    with pytest.raises(error, match=message):
        evaat_fast.create_model(**{"name": TINY, **change})


def test_tokenizer_of_unknown_model():
    with pytest.raises(ValueError, match="name: there is no 'eva02'"):
        evaat_fast.get_tokenizer("eva02")


def test_frequencies_stay_where_nothing_moves_them():
    """And what somebody made of them stays, float32, through every conversion."""
    visual = small().visual
    before = visual.freqs
    assert visual.float().freqs is before and visual.to("cpu").freqs is before and visual.bfloat16().freqs is before
    visual.freqs = changed = before * 2
    assert visual.half().freqs is changed and visual.freqs.dtype == torch.float32
    del visual.freqs
    visual.freqs = torch.nn.Parameter(changed)
    assert visual.double().freqs.dtype == torch.float32 and torch.equal(visual.freqs, changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_video_of_any_float_dtype_under_autocast(dtype):
    model = small().to(dtype)
    pixels = torch.randn(1, 3, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.encode_video(clip(1)).isfinite().all()
        for kind in (torch.float32, torch.float64, torch.bfloat16):
            assert model.encode_video(pixels.to(kind)).isfinite().all()
