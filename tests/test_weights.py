"""Files of weights: where a state dict may lie, what is not run, what is resized, and the table of what does not fit."""

import argparse
import dataclasses
import json
import logging
import pickle

import foreign
import pytest
import torch
import torch.nn.functional as F
from foreign import SMALL, TINY, equal, eva, ours

import evaat_fast
from evaat_fast.model import convert, create_model, get_config, load_checkpoint, save_checkpoint
from evaat_fast.model.checkpoints import LAYOUTS, convert_state, export_state, load_state, read

CONTENTS = {
    "ema": lambda good, other: dict(model_ema=good, model=other),
    "no ema": lambda good, other: dict(model_ema=None, state_dict=good),
    "empty ema": lambda good, other: dict(ema={}, epoch=2, model=good),
    "nested": lambda good, other: dict(model=dict(state_dict=good)),
    "ema of timm": lambda good, other: dict(state_dict=other, state_dict_ema=good),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_where_a_state_dict_lies(tmp_path, kind):
    model, other = eva(), eva()
    torch.save(CONTENTS[kind](model.state_dict(), other.state_dict()), tmp_path / "a.pt")
    load_checkpoint(other, tmp_path / "a.pt")
    assert equal(other.state_dict(), model.state_dict())


class Payload:
    """What a malicious file would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_pickles_do_not_run(tmp_path, place):
    payload = Payload(tmp_path / "executed")
    arguments = argparse.Namespace(run=payload) if place == "inside" else argparse.Namespace()
    torch.save(dict(state_dict=eva().state_dict(), args=arguments, more=payload), tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match=r"torch can read safely \(it asks for (io|_io).open, which is not plain data\)"
    ) as error:
        load_checkpoint(eva(), tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists() and "weights_only" not in str(error.value)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(dict(args=payload), protocol=2))
    with pytest.raises(ValueError, match="torch can read safely"):
        read(tmp_path / "plain.pt")
    assert not (tmp_path / "executed").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # others' files are read as they were


def test_a_pickle_that_holds_itself(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        read(tmp_path / "loop.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_are_refused_by_name(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="is a TorchScript program, as OpenAI's downloads are"):
        read(tmp_path / "clip.pt")


def shards(folder, model, name="model.safetensors"):
    """Two shards and their index."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = dict(model.state_dict())
    halves = [dict(list(state.items())[:20]), dict(list(state.items())[20:])]
    stem, suffix = name.split(".")
    names = [f"{stem}-{i + 1:05}-of-00002.{suffix}" for i in range(2)]
    folder.mkdir(parents=True, exist_ok=True)
    for part, half in zip(names, halves, strict=True):
        (safetensors.save_file if suffix == "safetensors" else torch.save)(half, folder / part)
    places = {key: part for part, half in zip(names, halves, strict=True) for key in half}
    (folder / f"{name}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))
    return names


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path, name):
    model = eva()
    names = shards(tmp_path, model, name)
    for path in (tmp_path, tmp_path / f"{name}.index.json"):
        other = create_model(TINY, pretrained=path, **SMALL, embed_dim=128)
        assert equal(other.state_dict(), model.state_dict())
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"the shard '{names[1]}' is missing beside .*, of 2 shards"):
        load_checkpoint(eva(), tmp_path)
    index = tmp_path / f"{name}.index.json"
    for spoiled in ("{}", json.dumps(dict(weight_map=dict(a="../a.bin"))), json.dumps(dict(weight_map=dict(a=index.name)))):
        index.write_text(spoiled)
        with pytest.raises(ValueError, match="is not an index of shards"):
            read(index)


def test_folder_of_the_hubs_cache(tmp_path):
    """models--owner--name: snapshots, and which of them is main. The configuration beside the weights says which GELU."""
    pytest.importorskip("tokenizers")
    theirs, folder = foreign.shaken(foreign.OpenAI()), tmp_path / "models--openai--clip"
    for revision, model in (("a1", foreign.OpenAI()), ("b2", theirs), ("c3", foreign.OpenAI())):
        (folder / "snapshots" / revision).mkdir(parents=True)
        torch.save(model.state_dict(), folder / "snapshots" / revision / "open_clip_pytorch_model.bin")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b2")
    described = folder / "snapshots" / "b2" / "open_clip_config.json"
    described.write_text(json.dumps(dict(model_cfg=dict(embed_dim=24, quick_gelu=True))))
    model = evaat_fast.load(folder).model
    assert model.config.activation == "quick_gelu" and equal(convert_state(theirs.state_dict()), dict_without_time(model))
    described.write_text(json.dumps(dict(model_cfg=dict(embed_dim=24))))
    assert evaat_fast.load(folder).model.config.activation == "gelu"
    with pytest.raises(FileNotFoundError, match="none of open_clip_model.safetensors, .* is in the folder"):
        read(folder / "refs")


def dict_without_time(model):
    return {name: x for name, x in model.state_dict().items() if name != "visual.temporal_embed"}


def test_a_run_and_its_folder(tmp_path):
    """A checkpoint of the trainer, as it writes it, needs no further argument."""
    pytest.importorskip("tokenizers")
    from evaat_fast.train import checkpoint, config, masters

    model = eva(norm="lavila", image_size=(64, 48))
    held = masters.Masters(model)
    checkpoint.save(tmp_path / "last.pt", held, torch.optim.AdamW(model.parameters()), 2, config.Config())
    clip = torch.randint(0, 256, (4, 90, 120, 3), dtype=torch.uint8)
    (tmp_path / "parts").mkdir()
    checkpoint.save(tmp_path / "parts" / "last.parts", held, torch.optim.AdamW(model.parameters()), 2, config.Config())
    for path in (tmp_path / "last.pt", str(tmp_path), tmp_path / "parts", tmp_path / "parts" / "last.parts"):
        loaded = evaat_fast.load(path)
        assert loaded.model.config == model.config and not loaded.model.training
        video, text = loaded.transform(clip)[None], loaded.tokenizer(["cut the onion"]) % 100
        with torch.no_grad():
            assert torch.equal(loaded.model.encode_video(video), model.encode_video(video))
            assert loaded.model.encode_text(text).shape == (1, 128)
    said = convert(tmp_path / "parts", tmp_path / "one.safetensors")
    assert said.config == model.config and equal(
        evaat_fast.load(tmp_path / "one.safetensors").model.state_dict(), model.state_dict()
    )
    (tmp_path / "parts" / "last.parts").rename(tmp_path / "last.parts")  # the file is older than these parts
    assert read(tmp_path).source == str(tmp_path / "last.parts")
    longer = evaat_fast.load(tmp_path, num_frames=16, image_size=64)
    assert longer.model.config.num_frames == 16 and longer.transform.image_size == 64
    with pytest.raises(ValueError, match="was made with vision_layers=2, the model has 3"):
        evaat_fast.load(tmp_path, vision_layers=3)
    with pytest.raises(ValueError, match="overrides: there is no 'frames'; did you mean 'num_frames'"):
        evaat_fast.load(tmp_path, frames=3)


SPOILED = [
    ({"visual.head.weight": torch.tensor(1.0)}, {}, "does not say what model it is of, by shapes such as visual.head.weight"),
    ({"text.positional_embedding": torch.ones(3)}, {}, r"by shapes such as text.positional_embedding \[3\]"),
    ({"visual.blocks.999999999.norm1.weight": torch.ones(1)}, {}, "does not fit the model; .*1 unexpected: visual.blocks.9"),
    ({"visual.pos_embed": torch.ones(1, 1, 128)}, {}, r"visual.pos_embed \[1, 1, 128\] for"),
    ({"visual.pos_embed": None}, {}, "it has no configuration, and no visual.pos_embed; create the model by name"),
    ({}, {"vision_layers": 999_999_999}, "says vision_layers=999999999, and has 2 blocks"),
    ({}, {"vocab_size": 999_999_999, "text_width": 99_999_998}, "its model cannot be built: "),
    ({}, {"vision_width": "wide"}, "has a damaged configuration: vision_width: expected int, got 'wide'"),
    ({}, {"norm": "timmm"}, "has a damaged configuration: norm: there is no 'timmm'"),
]


@pytest.mark.parametrize("tensors,fields,message", SPOILED, ids=[message[:30] for *_, message in SPOILED])
def test_damaged_files_are_named(tmp_path, tensors, fields, message):
    """By one error, before a model is built that no memory holds."""
    model = eva()
    content = {"state_dict": {name: x for name, x in {**model.state_dict(), **tensors}.items() if x is not None}}
    if fields:
        content["model_config"] = {**dataclasses.asdict(model.config), **fields}
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=message):
        evaat_fast.load(tmp_path / "bad.pt")


def test_configurations_of_other_versions(tmp_path):
    """Fields that are younger than a file have their defaults; one that we do not know is an error."""
    model = eva()
    stored = dataclasses.asdict(model.config)
    for name in ("tower", "rope", "temporal_embed", "activation", "vision_eps"):
        del stored[name]
    torch.save(dict(state_dict=model.state_dict(), model_config=stored), tmp_path / "old.pt")
    assert equal(evaat_fast.load(tmp_path / "old.pt").model.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="was made with rope='joint', the model has 'spatial'"):
        load_checkpoint(eva(rope="spatial"), tmp_path / "old.pt")
    torch.save(dict(state_dict=model.state_dict(), model_config={**stored, "depth": 3}), tmp_path / "new.pt")
    with pytest.raises(ValueError, match="has a configuration of another version: it says depth"):
        evaat_fast.load(tmp_path / "new.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resizing_is_done_in_float32(dtype):
    """The file's numbers are as they are, but what is made of them is not rounded to its dtype."""
    state = {name: x.to(dtype) for name, x in eva().state_dict().items()}
    model = eva(num_frames=16, image_size=96, context_length=40)
    load_state(model, state)
    frames = F.interpolate(state["visual.temporal_embed"].float().mT, 16, mode="linear").mT
    assert torch.equal(model.visual.temporal_embed, frames)
    grid = state["visual.pos_embed"][:, 1:].float().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True).flatten(2).mT
    assert torch.equal(model.visual.pos_embed[:, 1:], grid)
    words = F.interpolate(state["text.positional_embedding"].float().mT[None], 40, mode="linear")[0].mT
    assert torch.equal(model.text.positional_embedding, words)
    assert not torch.equal(frames, frames.to(dtype).float())


def test_shorter_texts_keep_their_embeddings():
    model, shorter = eva(), eva(context_length=12)
    load_state(shorter, model.state_dict())
    text = torch.randint(1, 98, (2, 12))
    text[:, 7] = 99
    with torch.no_grad():
        torch.testing.assert_close(shorter.encode_text(text), model.encode_text(text))


def test_frames_that_are_not_square(tmp_path):
    """What a file's places are is known where the file says it."""
    model = eva(image_size=(32, 128))
    save_checkpoint(model, tmp_path / "wide.pt")
    other = create_model(TINY, pretrained=tmp_path / "wide.pt", **SMALL, image_size=(64, 32))
    grid = model.visual.pos_embed[:, 1:].unflatten(1, (2, 8)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 2), mode="bicubic", antialias=True).flatten(2).mT
    assert torch.equal(other.visual.pos_embed[:, 1:], grid)
    torch.save(eva(image_size=(32, 80)).state_dict(), tmp_path / "unknown.pt")
    with pytest.raises(ValueError, match=r"image_size: .* has 10 places, no square: give image_size="):
        evaat_fast.load(tmp_path / "unknown.pt")


def test_pictures_become_clips(tmp_path):
    """OpenAI's weights in AVION's model and in LaViLa's, whose attention over time adds nothing at first."""
    torch.save(foreign.shaken(foreign.OpenAI()).state_dict(), tmp_path / "openai.pt")
    small = {**foreign.OURS, "activation": "quick_gelu", "vision_eps": 1e-5, "norm": "clip"}
    picture = create_model("clip_vit_base_patch16_224", pretrained=tmp_path / "openai.pt", **small)
    image = torch.randn(2, 3, 1, 48, 48)
    avion = create_model("avion_vit_base_patch16_224", 4, tmp_path / "openai.pt", **small)
    lavila = create_model("lavila_tsf_base_patch16_224", 4, tmp_path / "openai.pt", **small)
    assert not avion.visual.temporal_embed.any()
    with torch.no_grad():
        expected = picture.encode_video(image)
        # The same frame four times: every patch has four copies, which weigh as one, but for the class token's own.
        clip = image.expand(-1, -1, 4, -1, -1).contiguous()
        assert F.cosine_similarity(avion.encode_video(clip), expected).min() > 0.9
        assert F.cosine_similarity(lavila.encode_video(clip), expected).min() > 0.9
    # AVION's and LaViLa's own typo in red comes with their names, and with files in their layouts.
    assert get_config("avion_vit_base_patch16_224").norm == get_config("lavila_tsf_large_patch14_336").norm == "lavila"


def test_norm_comes_with_the_layout(tmp_path, caplog):
    torch.save({"state_dict": foreign.shaken(foreign.AVION()).state_dict()}, tmp_path / "avion.pt")
    small = {**foreign.OURS, "num_frames": 4}
    assert create_model("clip_vit_base_patch16_224", pretrained=tmp_path / "avion.pt", **small).config.norm == "lavila"
    chosen = create_model("clip_vit_base_patch16_224", pretrained=tmp_path / "avion.pt", **small, norm="clip")
    assert chosen.config.norm == "clip"
    load_checkpoint(chosen, tmp_path / "avion.pt")
    assert "files of this layout were trained with norm='lavila', the model has 'clip'" in caplog.text
    for style, norm in (("openai", "lavila"), ("timm", "timm")):  # which its script is told
        arguments = argparse.Namespace(norm_style=style)
        torch.save({"state_dict": foreign.AVION().state_dict(), "args": arguments}, tmp_path / "avion.pt")
        assert create_model("avion_vit_base_patch16_224", pretrained=tmp_path / "avion.pt", **small).config.norm == norm


def test_our_own_file_into_another_embedding_space(tmp_path):
    """As a converted CLIP's, only where that is asked for."""
    model, other = eva(embed_dim=64), eva()
    save_checkpoint(model, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="was made with embed_dim=64, the model has 128; .*fresh_heads=True"):
        load_checkpoint(other, tmp_path / "a.pt")
    head = other.visual.head.weight.clone()
    report = load_checkpoint(other, tmp_path / "a.pt", fresh_heads=True)
    assert "text.text_projection" in report["left fresh"] and torch.equal(other.visual.head.weight, head)
    assert torch.equal(other.visual.norm.weight, model.visual.norm.weight)


def test_norm_stays_when_a_run_goes_on(configure, tmp_path):
    """It came with the weights that the run began with, which a continued run does not read again."""
    pytest.importorskip("decord")
    pytest.importorskip("tokenizers")
    from evaat_fast.train import train

    config = configure("train.epochs=1")
    init = create_model(config.model.name, 2, **config.model.overrides, norm="lavila")
    save_checkpoint(init, tmp_path / "init.pt")
    config = configure("train.epochs=1", f"train.init={json.dumps(str(tmp_path / 'init.pt'))}")
    assert train(config, quiet=True)["model"].config.norm == "lavila"
    config = configure("train.epochs=2", f"train.init={json.dumps(str(tmp_path / 'init.pt'))}")
    result = train(config, resume=True, quiet=True)
    assert result["model"].config.norm == "lavila"
    assert read(result["checkpoint"]).config["norm"] == "lavila"


def test_table_of_what_does_not_fit():
    state = dict(eva(vision_layers=3).state_dict())
    del state["text.ln_final.bias"]
    state["visual.norm.weight"] = torch.ones(64)
    with pytest.raises(ValueError) as error:
        load_state(eva(), state, source="a.pt")
    first, head, *rows = str(error.value).splitlines()
    assert f" {len(eva().state_dict()) - 2} tensors fit;" in head
    assert first.startswith(
        "checkpoint: a.pt does not fit the model; 1 missing: text.ln_final.bias; 17 unexpected: visual.blocks.2."
    )
    assert head.endswith("tensors fit; layout: ours") and rows[0].split() == "tensor in the file in the model".split()
    cells = [row.split("  ") for row in rows[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert ["text.ln_final.bias", "missing", "-", "[64]"] in cells
    assert ["visual.blocks.*.attn.qkv.weight", "unexpected", "[384, 128]", "-"] in cells
    assert ["visual.norm.weight", "of another shape", "[64]", "[128]"] in cells


def test_table_of_what_was_changed(caplog):
    with caplog.at_level(logging.INFO, "evaat_fast"):
        report = load_state(eva(num_frames=8, embed_dim=64), eva().state_dict(), fresh_heads=True, source="a.pt")
    assert report["resized"] == ["visual.temporal_embed"] and "visual.head.weight" in report["left fresh"]
    assert str(report) in caplog.text
    assert "visual.temporal_embed  resized     [1, 4, 128]  [1, 8, 128]" in str(report)


@pytest.mark.parametrize(
    "file,model,message",
    [
        ("timesformer", "clip", "attention over time and space apart, as lavila_tsf_base"),
        ("clip", "eva02", "the file is of a CLIP, as clip_vit_base"),
        ("eva02", "clip", "the file is of an EVA02 tower"),
    ],
)
def test_another_models_file_says_whose(file, model, message):
    with pytest.raises(ValueError, match=message):
        load_state(ours(model), ours(file).state_dict())


@pytest.mark.parametrize("tower,to", [("eva02", "avion"), ("clip", "eva"), ("timesformer", "open_clip"), ("clip", "lavila")])
def test_layouts_without_names_for_a_tower(tower, to):
    model = ours(tower)
    with pytest.raises(ValueError, match=f"to: {to} has no names for a vision tower of the kind '{tower}'"):
        export_state(model.state_dict(), model.config, to)
    with pytest.raises(ValueError, match="to: expected one of ours, eva, "):
        export_state(model.state_dict(), model.config, "openai")


def test_convert_command(tmp_path, capsys):
    from evaat_fast.cli import main

    model = ours("clip")
    state = {f"module.{k}": v for k, v in export_state(model.state_dict(), model.config, "avion").items()}
    torch.save(dict(state_dict=state, args=argparse.Namespace(a=1)), tmp_path / "avion.pt")
    files = [str(tmp_path / name) for name in ("avion.pt", "ours.safetensors", "back.pt")]
    assert main(["convert", *files[:2]]) == 0
    assert "layout ours (from avion)" in (said := capsys.readouterr().out) and "norm 'lavila'" in said
    assert main(["convert", *files[1:], "--to", "avion"]) == 0
    assert equal(torch.load(files[2], weights_only=True)["state_dict"], state)
    capsys.readouterr()
    for arguments, message in (
        (["nothing.pt", files[1]], "there is no file 'nothing.pt'"),
        ([files[1], files[1]], "is IN; expected another file"),
        ([*files[:2], "--to", "eva"], "eva has no names for a vision tower"),
        ([files[0], str(tmp_path / "avion.pt" / "x.pt")], "OUT: the folder"),
    ):
        assert main(["convert", *arguments]) == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "{" + ",".join(LAYOUTS) + "}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
