"""Patch dropout: what is kept stays where it was, by a plain transcription; what is dropped counts for nothing."""

import pytest
import torch
import torch.nn.functional as F

import evaat_fast
from evaat_fast import ops
from evaat_fast.model import draw_patches

SMALL = dict(image_size=48, patch_size=12, vision_width=48, vision_layers=2, vision_heads=3, vision_mlp=100, text_width=40)
SMALL |= dict(text_layers=1, text_heads=2, vocab_size=120, embed_dim=24)


def small(frames=3):
    model = evaat_fast.create_model("eva02_at_tiny_patch16_64", **SMALL, num_frames=frames)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def clip(batch=2, frames=3):
    return torch.randint(0, 256, (batch, frames, 48, 48, 3), dtype=torch.uint8)


def by_hand(tower, video, patches):
    """All tokens are embedded, those of `patches` gathered, and turned by their own positions, in plain torch."""
    config = tower.config
    T, Hp, Wp = config.grid
    H = config.vision_heads
    x = tower.patch_embed(video) + (tower.pos_embed[:, 1:].unsqueeze(1) + tower.temporal_embed.unsqueeze(2)).flatten(1, 2)
    x = torch.stack([row[mine] for row, mine in zip(x, patches, strict=True)])
    x = torch.cat(((tower.cls_token + tower.pos_embed[:, :1]).expand(len(x), -1, -1), x), 1)
    places = torch.cartesian_prod(*map(torch.arange, (T, Hp, Wp)))
    angles = torch.cat((torch.zeros(len(x), 1, 3), places[patches].float()), 1).double() @ tower.freqs.double()
    cos, sin = (f(angles).to(x.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
    norm = lambda x, m: F.layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-6)  # noqa: E731
    for block in tower.blocks:
        attn = block.attn
        bias = torch.cat((attn.q_bias, 0 * attn.q_bias, attn.v_bias))
        q, k, v = F.linear(norm(x, block.norm1), attn.qkv.weight, bias).unflatten(2, (3, H, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.stack((z[..., 0::2] * cos - z[..., 1::2] * sin, z[..., 1::2] * cos + z[..., 0::2] * sin), -1).flatten(-2)
            for z in (q, k)
        )
        y = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + attn.proj(norm(y.transpose(1, 2).flatten(2), attn.norm))
        gate, value = block.mlp.fc1(norm(x, block.norm2)).chunk(2, -1)
        x = x + block.mlp.fc2(norm(F.silu(gate) * value, block.mlp.norm))
    return tower.head(norm(x, tower.norm)[:, 0])


@pytest.mark.parametrize("learns", [False, True], ids=["constant", "learning"])
@pytest.mark.parametrize("dropped", [0.3, 0.5, 0.99])
def test_kept_patches_stay_where_they_were(dropped, learns):
    model = small().double()
    tower, video, patches = model.visual, clip(), draw_patches(2, model.config.grid, dropped)
    if learns:
        tower.freqs.requires_grad_()
    theirs, ours = by_hand(tower, video, patches), model.encode_video(video, patches=patches)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    parameters = [*tower.parameters(), *([tower.freqs] if learns else [])]
    for expected, got in zip(
        torch.autograd.grad(theirs.square().sum(), parameters),
        torch.autograd.grad(ours.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_all_patches_are_none(amp):
    """To the bit: the table of rotations by position is the grid's."""
    model, video = small(), clip()
    everything = draw_patches(2, model.config.grid, 0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        results = [model.encode_video(video, patches=p) for p in (None, everything)]
        assert torch.equal(*results)
        grads = [torch.autograd.grad(r.float().square().sum(), list(model.visual.parameters())) for r in results]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    out = model(video, patches=everything)["image_embed"]
    torch.testing.assert_close(out, F.normalize(results[1].float(), dim=-1), rtol=1e-2, atol=1e-2)


def test_what_is_dropped_has_no_gradient_and_no_say():
    model, video = small(), clip()
    pixels = torch.randn(2, 3, 3, 48, 48, requires_grad=True)
    patches = draw_patches(2, model.config.grid, 0.5)
    model.encode_video(pixels, patches=patches).square().sum().backward()
    shown = torch.zeros(2, 48, dtype=torch.bool).scatter_(1, patches, True)
    grads = pixels.grad.unflatten(4, (4, 12)).unflatten(3, (4, 12)).permute(0, 2, 3, 5, 1, 4, 6).reshape(2, 48, -1)
    assert torch.equal(grads.abs().sum(-1) > 0, shown)
    unseen = ~shown.any(0)
    positions = model.visual.pos_embed.grad[0, 1:].abs().sum(-1) > 0
    assert torch.equal(positions, shown.any(0).view(3, 16).any(0)) and unseen.any()
    noise = torch.where(shown.view(2, 3, 4, 4)[..., None, None, None], 0, 255).to(torch.uint8)  # in the dropped patches
    noise = noise.expand(-1, -1, -1, -1, 12, 12, 3).permute(0, 1, 2, 4, 3, 5, 6).reshape(video.shape)
    with torch.no_grad():
        assert torch.equal(model.encode_video(video, patches=patches), model.encode_video(video ^ noise, patches=patches))


def test_one_table_for_all_blocks(monkeypatch):
    """And none of their calls makes or compares one."""
    from evaat_fast.ops.rope3d import rotate

    model, video = small(), clip()
    patches = draw_patches(2, model.config.grid, 0.5)
    expected = model.encode_video(video, patches=patches)
    monkeypatch.setattr(rotate, "table_of", lambda *a: pytest.fail("a block made a table"))
    ours = model.encode_video(video, patches=patches)
    assert torch.equal(ours, expected)
    ours.square().sum().backward()


def test_draws():
    grid = (4, 14, 14)
    patches = draw_patches(3, grid, 0.5, torch.Generator().manual_seed(1))
    assert patches.shape == (3, 392) and patches.dtype == torch.int64
    assert (patches.diff() > 0).all() and patches.min() >= 0 and patches.max() < 784
    assert not torch.equal(patches[0], patches[1])
    assert torch.equal(patches, draw_patches(3, grid, 0.5, torch.Generator().manual_seed(1)))
    assert draw_patches(1, (1, 2, 2), 0.99).shape == (1, 1)  # one stays
    assert draw_patches(1, grid, 0.9).shape == (1, int(784 * (1 - 0.9)))  # as AVION rounds
    often = draw_patches(4000, (2, 2, 2), 0.5).flatten().bincount(minlength=8)
    assert (often - 2000).abs().max() < 200
    for share in (1, 1.5, -0.1):
        with pytest.raises(ValueError, match="dropped: expected a share from 0 to below 1, got"):
            draw_patches(1, grid, share)


def test_compiles():
    """The tower whole, which then rotates by positions, and its blocks, which are handed the table."""
    model, video = small(), clip()
    patches = draw_patches(2, model.config.grid, 0.5)
    expected = model.encode_video(video, patches=patches)
    torch._dynamo.reset()
    whole = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(video, patches), expected, rtol=1e-4, atol=1e-5)
    for block in model.visual.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    ours = model.encode_video(video, patches=patches)
    ours.square().sum().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


BAD = [
    (lambda p: p.float(), TypeError, "expected int64 numbers of patches .*, got torch.float32"),
    (lambda p: p.tolist(), TypeError, r"draw_patches makes them\), got list"),
    (lambda p: p[:1], ValueError, r"expected \[2, 1 to 48\], got \[1, 24\]"),
    (lambda p: p[:, :0], ValueError, r"got \[2, 0\]"),
    (lambda p: p.repeat(1, 3), ValueError, r"got \[2, 72\]"),
    (lambda p: p + 48, ValueError, "expected numbers from 0 to 47, got "),
    (lambda p: p - 48, ValueError, "expected numbers from 0 to 47, got -"),
    (lambda p: p.to("meta"), ValueError, "expected a tensor on cpu as the video, got meta"),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_patches(change, error, message):
    model = small()
    with pytest.raises(error, match="patches: .*" + message):
        model.encode_video(clip(), patches=change(draw_patches(2, model.config.grid, 0.5)))


def test_rotation_by_a_table_made_before():
    """Of the projection in place, and of keys alone: what the same positions give without it."""
    from evaat_fast.model.patches import place

    patches, freqs = draw_patches(2, (2, 3, 4), 0.5), ops.joint_freqs(16)
    placed = place(patches, (2, 3, 4), freqs, torch.float32)
    qkv, results = torch.randn(2, 13, 3 * 2 * 16, requires_grad=True), []
    for positions in (placed, placed.positions):
        out = ops.joint_attention_qkv_(qkv * 1, 2, freqs=freqs, positions=positions)
        k = ops.rope3d(qkv[..., :16].unsqueeze(1), freqs=freqs, positions=positions)
        grad = torch.autograd.grad(out.square().sum() + k.square().sum(), qkv)
        results.append((out, k, *grad))
    assert all(map(torch.equal, *results))
