"""CLIP's towers as AVION and LaViLa have them, and what other tools make of any tower: compilers, devices, adapters."""

import copy
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
import torch
import torch.nn.functional as F
from foreign import ours

from evaat_fast.model import EVA02AT, draw_patches

TOWERS = ("eva02", "clip", "timesformer")
each_tower = pytest.mark.parametrize("tower", TOWERS)


def clip(model, batch=2):
    frames, (height, width) = model.config.num_frames, model.config.size
    return torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8)


def captions(batch=2):
    text = torch.randint(1, 80, (batch, 20))
    text[:, 9] = 89
    return text


def gradients(model, video, text):
    model.zero_grad()
    out = model(video, text)
    (out["image_embed"] * out["text_embed"].roll(1, 0)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("tower", ["clip", "timesformer"])
def test_gradients_and_checkpointing(tower, amp):
    """They reach every parameter, and are the same whatever is kept for the backward pass."""
    model = ours(tower)
    video, text = clip(model), captions()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        plain = gradients(model, video, text)
        assert plain.keys() == {name for name, _ in model.named_parameters()} - {"logit_scale"}
        for name, grad in plain.items():
            assert grad.isfinite().all() and grad.any(), name
        for mode in (True, "selective"):
            model.set_grad_checkpointing(mode)
            for name, grad in gradients(model, video, text).items():
                torch.testing.assert_close(grad, plain[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tower", ["clip", "timesformer"])
def test_matrices_in_bfloat16(tower):
    model = ours(tower)
    video, text = clip(model), captions()
    with torch.no_grad():
        exact = model(video, text)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(video, text)
        exactly = model.hold_matrices(torch.bfloat16)
        held = model(video, text)
    assert "visual.blocks.0.attn.qkv.weight" in exactly and "visual.norm_pre.weight" not in exactly
    for key in ("image_embed", "text_embed"):
        for rounded in (mixed, held):
            assert F.cosine_similarity(exact[key], rounded[key].float()).min() > 0.995


def test_patches_of_a_clip_tower():
    """All of them are the clip; half of them, wherever they are, what the tower makes of these alone."""
    model = ours("clip")
    video, grid = clip(model), model.config.grid
    with torch.no_grad():
        whole = model.encode_video(video)
        torch.testing.assert_close(model.encode_video(video, patches=draw_patches(2, grid, 0.0)), whole, rtol=1e-5, atol=1e-5)
        first = torch.arange(16).expand(2, -1)  # the first of four frames: a picture
        alone = ours("clip", num_frames=1)
        state = model.state_dict()
        state["visual.temporal_embed"] = state["visual.temporal_embed"][:, :1]
        alone.load_state_dict(state)
        expected = alone.encode_video(video[:, :1])
        torch.testing.assert_close(model.encode_video(video, patches=first), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="patches: attention over time needs all of them"):
        ours("timesformer").encode_video(video, patches=first)


def test_time_adds_nothing_at_first():
    """LaViLa's initialisation: a model that was never trained over time is that of each frame with the class token."""
    model = EVA02AT(ours("timesformer").config).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.visual.blocks:
            block.norm3.weight.mul_(3).add_(1)
        assert torch.equal(model.encode_video(video := clip(model)), other.encode_video(video))


@pytest.mark.parametrize("tower", ["clip", "timesformer"])
def test_compiles_in_one_graph(tower):
    model = ours(tower)
    video = clip(model)
    compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video), model.visual(video), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_take_any_batch():
    """Training, evaluation and one clip after another: what is compiled serves, and Dynamo gives nothing up."""
    model, graphs = ours("eva02", vision_layers=3, text_layers=2), []
    model.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in (4, 2, 1, 3, 5):
            seen, video, text = len(graphs), clip(model, batch), captions(batch)
            with torch.no_grad():
                out = model(video, text)
            torch.testing.assert_close(model(video, text)["image_embed"], out["image_embed"], rtol=1e-4, atol=1e-5)
    assert len(graphs) == seen > 8


@each_tower
@pytest.mark.parametrize("pixels", ["uint8", "float"])
def test_exports_with_gradients(tower, pixels):
    """For any batch; the program's parameters are trained as the model's."""
    model = ours(tower)
    video = clip(model, 3)
    video = video if pixels == "uint8" else torch.randn(3, 3, 4, *model.config.size)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model.visual, (video[:2],), dynamic_shapes=({0: batch},))
    module = program.module()
    for some in (video[:2], video):
        torch.testing.assert_close(module(some), model.visual(some), rtol=1e-4, atol=1e-5)
    module(video).square().sum().backward()
    model.visual(video).square().sum().backward()
    theirs = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in model.visual.named_parameters():
        torch.testing.assert_close(theirs[name], parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


@each_tower
def test_jit_trace_without_gradients(tower, tmp_path):
    """For other clips and batches, from a file too; with gradients it is an error that says so."""
    model = ours(tower)
    with torch.no_grad():
        traced = torch.jit.trace(model.visual, (clip(model),))
        torch.jit.save(traced, tmp_path / "tower.pt")
        video = clip(model, 3)
        expected = model.visual(video)
        for some in (traced, torch.jit.load(tmp_path / "tower.pt")):
            torch.testing.assert_close(some(video), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace keeps no gradients .* trace under torch.no_grad\(\)"):
        torch.jit.trace(model.visual, (video,))


def test_devices():
    """Where models and what they need are made, in a process whose torch.empty is torch's own."""
    script = Path(__file__).with_name("devices.py")
    run = subprocess.run([sys.executable, str(script), *TOWERS], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == list(TOWERS), run.stdout + run.stderr


@each_tower
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dynamic_quantisation(tower):
    model = ours(tower)
    video, text = clip(model), captions()
    quantization = pytest.importorskip("torch.ao.quantization")  # which torch calls deprecated
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no int8 products")
    low = quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    assert (
        "Quantized" in type(low.visual.blocks[0].attn.qkv).__name__
        or "quantized" in type(low.visual.blocks[0].attn.qkv).__module__
    )
    with torch.no_grad():
        for key in ("image_embed", "text_embed"):
            assert F.cosine_similarity(low(video, text)[key], model(video, text)[key]).min() > 0.97


class Adapter(torch.nn.Module):
    """What peft puts in the place of a layer: its output and that of two small ones."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@each_tower
def test_adapters_count(tower):
    """A layer in another's place is called, not passed by for its weight: in every block, the last included."""
    model = ours(tower)
    video = clip(model)
    for block in model.visual.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    merged = ours(tower)
    state = {
        name.replace("base_layer.", ""): x
        for name, x in model.state_dict().items()
        if ".down." not in name and ".up." not in name
    }
    for i, block in enumerate(model.visual.blocks):
        state[f"visual.blocks.{i}.attn.qkv.weight"] = (
            block.attn.qkv.weight + block.attn.qkv.up.weight @ block.attn.qkv.down.weight
        )
    merged.load_state_dict(state)
    torch.testing.assert_close(model.encode_video(video), merged.encode_video(video), rtol=1e-4, atol=1e-5)
    model.encode_video(video).square().sum().backward()
    assert all(block.attn.qkv.up.weight.grad.any() and block.attn.qkv.down.weight.grad.any() for block in model.visual.blocks)


def test_names_are_those_of_layer_decay():
    """Every tower's blocks are `visual.blocks.N`, and what is not decayed is named alike."""
    for tower in TOWERS:
        names = {name for name, _ in ours(tower).named_parameters()}
        assert ours(tower).no_weight_decay() <= names and "visual.patch_embed.proj.weight" in names
        assert any(name.startswith("visual.blocks.1.") for name in names) and "visual.head.weight" in names
    assert foreign.OURS["vision_layers"] == 2


def test_time_is_nowhere_without_both():
    """Spatial rotations and no temporal embedding: a clip is a set of frames; with either it is not."""
    for changes, same in (
        (dict(rope="spatial", temporal_embed=False), True),
        (dict(rope="spatial"), False),
        (dict(rope="split", temporal_embed=False), False),
    ):
        model = ours("eva02", **changes)
        video = clip(model)
        with torch.no_grad():
            assert torch.allclose(model.encode_video(video), model.encode_video(video.flip(1)), atol=1e-4) is same


@pytest.mark.parametrize(
    "name,more",
    [
        ("avion_vit_base_patch16_224", "image_size = [64, 96]"),
        ("lavila_tsf_base_patch16_224", "image_size = 64"),
        ("eva02_at_tiny_patch16_64", 'image_size = [96, 64], rope = "split", temporal_embed = false'),
    ],
)
def test_a_run_trains_it(configure, name, more, capsys):
    """Rows to compare with, by a configuration alone; the checkpoint is a model without any, and is evaluated."""
    pytest.importorskip("decord")
    pytest.importorskip("tokenizers")
    import evaat_fast
    from evaat_fast.cli import main
    from evaat_fast.train import train

    sizes = "patch_size = 32, vision_layers = 1, text_layers = 1, vision_width = 32, vision_heads = 1, vision_mlp = 32"
    sizes += ", text_width = 64, text_heads = 2"
    result = train(configure(f'model.name="{name}"', f"model.overrides={{ {more}, {sizes} }}", "train.epochs=1"))
    loaded = evaat_fast.load(result["checkpoint"])
    assert loaded.model.config == result["model"].config and loaded.model.config.num_frames == 2
    video = loaded.transform(torch.randint(0, 256, (2, 80, 100, 3), dtype=torch.uint8))[None]
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_video(video), result["model"].eval().encode_video(video))
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(result["checkpoint"]), "--trick", "three-crops"]) == 0
    assert "three-crops" in capsys.readouterr().out
