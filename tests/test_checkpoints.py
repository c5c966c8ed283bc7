"""Weights in and out: round trips, inflation, and an error for everything that does not fit."""

import argparse
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import evaat_fast
from evaat_fast.model import create_model, load_checkpoint, save_checkpoint
from evaat_fast.model.checkpoints import load_state, read_checkpoint

TINY = "eva02_at_tiny_patch16_64"
SMALL = dict(vision_layers=1, text_layers=1, vocab_size=100, num_frames=4)


def small(**changes):
    return create_model(TINY, **{**SMALL, **changes})


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("wrap", [dict, lambda s: dict(model=s), lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_state_dict_round_trip(tmp_path, wrap):
    model, path = small(), tmp_path / "model.pt"
    torch.save(wrap(model.state_dict()), path)
    other = small()
    load_checkpoint(other, path)
    assert equal(other.state_dict(), model.state_dict())


def test_compiled_models_names():
    model, other = small(), small()
    load_state(other, torch.compile(model).state_dict())
    assert equal(other.state_dict(), model.state_dict())


def test_own_file(tmp_path):
    model, path = small(norm="lavila"), tmp_path / "model.pt"
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(model, path, epoch=3, optimizer=optimizer.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert torch.load(path, weights_only=True)["epoch"] == 3
    other = create_model(TINY, pretrained=path, **SMALL)
    assert equal(other.state_dict(), model.state_dict())
    assert other.config == model.config and other.config.norm == "lavila"
    clip = torch.randint(0, 256, (1, 4, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(other.encode_video(clip), model.encode_video(clip))


def test_failed_save_leaves_the_old_file(tmp_path):
    model, path = small(), tmp_path / "model.pt"
    save_checkpoint(model, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(model, path, broken=lambda: 0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other, path = small(), small(), tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), path)
    load_checkpoint(other, path)
    assert equal(other.state_dict(), model.state_dict())


def test_missing_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_checkpoint(small(), path)


@pytest.mark.parametrize("frames", [1, 2, 8, 16])
def test_frames_are_interpolated(tmp_path, frames):
    model, path = small(), tmp_path / "model.pt"
    save_checkpoint(model, path)
    other = create_model(TINY, pretrained=path, **{**SMALL, "num_frames": frames})
    # EVA02-AT's authors use bilinear interpolation of [1, C, T, 1] without aligned corners: the same numbers.
    expected = F.interpolate(model.visual.temporal_embed.mT.unsqueeze(3), (frames, 1), mode="bilinear", align_corners=False)
    torch.testing.assert_close(other.visual.temporal_embed, expected.squeeze(3).mT)
    assert torch.equal(other.visual.pos_embed, model.visual.pos_embed)


def test_patch_grid_is_interpolated(tmp_path):
    model, path = small(), tmp_path / "model.pt"
    with torch.no_grad():
        model.visual.pos_embed[:, 1:] = 0.5  # a constant stays one
    save_checkpoint(model, path)
    other = create_model(TINY, pretrained=path, **SMALL, image_size=96)
    assert other.visual.pos_embed.shape == (1, 37, 128)
    torch.testing.assert_close(other.visual.pos_embed[:, 1:], torch.full((1, 36, 128), 0.5))
    assert torch.equal(other.visual.pos_embed[:, 0], model.visual.pos_embed[:, 0])


def drop(state):
    del state["visual.norm.weight"], state["text.ln_final.bias"]


def add(state):
    state["visual.surplus"] = torch.zeros(1)


def reshape(state):
    state["text.text_projection"] = torch.zeros(2, 3)


def halve_qkv(state):
    for part in ("q", "k"):
        state[f"visual.blocks.0.attn.{part}_proj.weight"] = torch.zeros(128, 128)
    del state["visual.blocks.0.attn.qkv.weight"]


BAD_STATES = [
    (drop, "2 missing: text.ln_final.bias, visual.norm.weight$"),
    (add, "1 unexpected: visual.surplus$"),
    (reshape, r"1 of another shape: text.text_projection \[2, 3\] for \[64, 128\]$"),
    (halve_qkv, "1 missing: visual.blocks.0.attn.qkv.weight; 2 unexpected: visual.blocks.0.attn.k_proj.weight, "),
    (lambda state: state.clear(), r"4\d missing: logit_scale, .* and 3\d more$"),
]


@pytest.mark.parametrize("spoil,message", BAD_STATES)
def test_strict(spoil, message):
    model = small()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, small().state_dict()
    spoil(state)
    with pytest.raises(ValueError, match="(?m)checkpoint: state dict does not fit the model; .*" + message):
        load_state(model, state)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("change", [dict(norm="lavila"), dict(embed_dim=64), dict(rope_grid=16)], ids=str)
def test_stored_configuration_must_fit(tmp_path, change):
    path, ((name, theirs),) = tmp_path / "model.pt", change.items()
    save_checkpoint(small(**change), path)
    with pytest.raises(ValueError, match=f"was made with {name}={theirs!r}, the model has"):
        load_checkpoint(small(), path)
    if name == "norm":
        with pytest.raises(ValueError, match="was made with norm='lavila', the model has 'clip'"):
            small(norm="clip", pretrained=path)


BAD_FILES = [
    (b"not weights", "is not a file of weights that torch can read safely"),
    (b"", "is empty: copy it again"),
    (b"PK\3\4 and no more", "is damaged or was cut short, at 16 bytes: copy it again"),
    (dict(epoch=3, args="x"), r"no state dict in .*, only the keys \['args', 'epoch'\]"),
    ([torch.zeros(1)], "expected a state dict in .*, got list"),
    (dict(args=argparse.Namespace(a=1)), r"no state dict in .*, only the keys \['args'\]"),
    (dict(args=types.SimpleNamespace(a=1)), r"torch can read safely \(it asks for types.SimpleNamespace, .* not plain data\)"),
]


@pytest.mark.parametrize("content,message", BAD_FILES)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no file"):
        load_checkpoint(small(), tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="pretrained: there is no file"):
        small(pretrained=tmp_path / "none.pt")
    with pytest.raises(ValueError, match="part: expected 'all' or 'visual', got 'text'"):
        load_checkpoint(small(), tmp_path / "none.pt", part="text")


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError):
    pass


@pytest.fixture
def hub(monkeypatch):
    """A Hugging Face hub of one's own: repository/file -> path, or an error to raise."""
    files = {}

    def hf_hub_download(repo, name, local_files_only=False):
        answer = files.get(f"{repo}/{name}", files.get(repo, EntryNotFoundError("404")))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    errors = types.SimpleNamespace(EntryNotFoundError=EntryNotFoundError, LocalEntryNotFoundError=LocalEntryNotFoundError)
    module = types.SimpleNamespace(hf_hub_download=hf_hub_download, errors=errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return files


def test_hub(hub, tmp_path):
    model, path = small(), tmp_path / "pytorch_model.bin"
    save_checkpoint(model, path)
    hub["owner/name/pytorch_model.bin"] = path
    assert equal(small(pretrained="hf-hub:owner/name").state_dict(), model.state_dict())
    hub["owner/name"] = LocalEntryNotFoundError("no network and not cached")  # but for the one that is
    assert equal(small(pretrained="hf-hub:owner/name").state_dict(), model.state_dict())


def test_tag(hub):
    """A tag of list_pretrained goes to timm's repository."""
    hub["timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"] = ConnectionError("no route to host")
    with pytest.raises(RuntimeError, match=r"could not download 'timm/eva02_base.* \(no route to host\).*pass its path"):
        create_model("eva02_at_base_patch16_224", pretrained="merged2b_s8b_b131k")
    hub["timm/vit_large_patch14_clip_336.openai"] = ConnectionError("no route to host")
    with pytest.raises(RuntimeError, match=r"could not download 'timm/vit_large_patch14_clip_336.openai'"):
        create_model("avion_vit_large_patch14_336", pretrained="openai", vision_layers=1)


@pytest.mark.parametrize(
    "answer,message",
    [
        (EntryNotFoundError("404"), r"it has none of open_clip_model.safetensors, "),
        (LocalEntryNotFoundError("no network and not cached"), "no network and not cached"),
    ],
)
def test_hub_failures(hub, answer, message):
    hub["owner/name"] = answer
    with pytest.raises(RuntimeError, match=message):
        evaat_fast.create_model(TINY, pretrained="hf-hub:owner/name")


def test_missing_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        evaat_fast.create_model(TINY, pretrained="hf-hub:owner/name")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logit_scale": torch.ones(2)}, r"logit_scale \[2\]"),
        (
            {"logit_scale": torch.ones((), dtype=torch.bool)},
            "dense floating-point weights, got logit_scale torch.bool",
        ),
        ({"visual.pos_embed": torch.ones(1, 0, 128)}, "visual.pos_embed"),
        ({"visual.cls_token": torch.ones(1, 1, 128, dtype=torch.complex64)}, "got visual.cls_token torch.complex64"),
        ({"visual.cls_token": torch.ones(1, 1, 128).to_sparse()}, "got visual.cls_token torch.sparse_coo"),
        ({"visual.cls_token": torch.ones(1, 1, 128, device="meta")}, "on meta"),
    ],
    ids=str,
)
def test_weights_that_are_none(change, message):
    model = evaat_fast.create_model(TINY)
    with pytest.raises(ValueError, match=message):
        load_state(model, {**model.state_dict(), **change})


def test_files_that_hold_no_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    torch.save({1: torch.ones(1)}, tmp_path / "numbered.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, message in (
        ("a.safetensors", "not a .safetensors file that can be read"),
        ("numbered.pt", "no state dict"),
        ("empty.pt", "is empty: copy it again"),
    ):
        if name.endswith("s"):
            pytest.importorskip("safetensors")
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / name)
