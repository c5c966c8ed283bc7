"""A configuration is read as written, and every mistake in one is named."""

import math

import pytest

from evaat_fast.train import config as configs
from evaat_fast.train.config import ConfigError, load, parse_override
from evaat_fast.train.schedules import warmup

GOOD = """
[model]
name = "eva02_at_tiny_patch16_64"
overrides = { vision_layers = 1 }
[data]
annotations = "corpus/annotations"
videos = "corpus/videos"
[optim]
lr = 1
[train]
out = "runs/a"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"

    def write(text=GOOD):
        path.write_text(text)
        return path

    return write


def test_values_defaults_and_overrides(file, tmp_path):
    config = load(file(), ["train.epochs=3", "optim.weight_decay = 0", "model.overrides.text_layers=1", "train.device=cpu"])
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.optim.weight_decay == 0.0 and config.optim.beta1 == 0.9
    assert config.train.epochs == 3 and config.train.device == "cpu"
    assert config.model.overrides == {"vision_layers": 1, "text_layers": 1}
    assert config.to_dict()["train"]["epochs"] == 3


def test_paths_are_relative_to_the_file_and_those_of_set_to_the_current_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    config = load(file(), ["data.videos=elsewhere"])
    assert config.data.annotations == str(tmp_path / "corpus/annotations")
    assert config.train.out == str(tmp_path / "runs/a")
    assert config.data.videos == "elsewhere" and config.train.init == ""


@pytest.mark.parametrize(
    "text,parsed",
    [
        ("a.b=1", ("a.b", 1)),
        ("a.b = [1, 2]", ("a.b", [1, 2])),
        ('train.out="x=y"', ("train.out", "x=y")),
        ("train.init=", ("train.init", "")),
        ("train.out=x=y", ("train.out", "x=y")),
        ("loss.name=sms", ("loss.name", "sms")),
        ("data.cache=true", ("data.cache", True)),
    ],
)
def test_parse_override(text, parsed):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["optim.lr", "=1", "optim.lr=", "optim.lr=fast", 'train.out="x', "optim.lr=1\nb=2"])
def test_bad_overrides(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_override(text)


@pytest.mark.parametrize(
    "override,message",
    [
        ("optim.lrr=1", r"--set: optim.lrr: there is no such key; did you mean 'optim.lr'\?"),
        ("optim.epochs=1", r"optim.epochs: .* did you mean 'train.epochs'\?"),
        ("trian.epochs=1", r"trian.epochs: .* did you mean 'train.epochs'\?"),
        ("nothing=1", r"nothing: there is no such section"),
        ("train.epochs=1.5", "train.epochs: expected an integer, got 1.5"),
        ("train.epochs=true", "train.epochs: expected an integer, got True"),
        ("optim.lr=true", "optim.lr: expected a number, got True"),
        ('optim.lr="1"', "optim.lr: expected a number, got '1'"),
        ("data.cache=1", "data.cache: expected true or false, got 1"),
        ("train.out=1", "train.out: expected a string, got 1"),
        ("model.overrides=1", "model.overrides: expected a table, got 1"),
        ("data.labels=verb", "data.labels: expected a list of strings, got 'verb'"),
        ("data.labels=[1]", r"data.labels: expected a list of strings, got \[1\]"),
        ("data.similarity=text-tower", "data.similarity: only 'csv' has it, got data.kind = 'ek100-mir'"),
        ("optim.lr=0", "optim.lr: expected a value above 0, got 0.0"),
        ("optim.lr=-1", "optim.lr: expected a value above 0"),
        ("optim.lr=nan", "optim.lr: expected a finite number"),
        ("optim.weight_decay=-1", "optim.weight_decay: expected a value of at least 0"),
        ("optim.beta1=1.0", "optim.beta1: expected a value of at most 0.9999"),
        ("train.epochs=0", "train.epochs: expected a value of at least 1, got 0"),
        ("train.batch_size=1", "train.batch_size: expected a value of at least 2, got 1"),
        ("loss.name=smss", r"loss.name: expected one of clip, sms, got 'smss'; did you mean 'sms'\?"),
        ("eval.frames=frosen", r"eval.frames: expected one of .*; did you mean 'frozen'\?"),
        ("train.processes=-1", "train.processes: expected a value of at least 0"),
        ("optim=3", "--set: optim: expected section.key, as optim.name: it is a section, of optim.name, optim.lr, "),
        ("train.timeout=0.0001", "train.timeout: expected"),
        ("data.workers=1000", "data.workers: expected"),
        ("train.spike=0.5", "train.spike: expected 0, for never, or a value above 1, got 0.5"),
        ("optim.layer_decay=0", "optim.layer_decay: expected a value above 0"),
        ("schedule.warmup_epochs=2", "schedule.warmup_epochs: expected at most train.epochs=1"),
        ("schedule.end_lr=2", "schedule.end_lr: expected at most optim.lr=1.0"),
        ("model.name=eva02_at_tiny", r"model.name: .*did you mean 'eva02_at_tiny_patch16_64'"),
        ("model.overrides.vision_layer=2", r"model: .*did you mean 'vision_layers'"),
        ("model.overrides.num_frames=2", "model.overrides.num_frames: set model.num_frames instead"),
        ("model.overrides.temperature=2", "model.overrides.temperature: set loss.temperature instead"),
        ("train.out=''", "train.out: a path is required"),
        ("data.videos=''", "data.videos: a path is required"),
    ],
)
def test_mistakes_are_named(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load(file(), [override])


def test_mistakes_in_the_file_name_the_file(file, tmp_path):
    for text, message in (
        (GOOD + "epoch = 3\n", r"run.toml: train.epoch: there is no such key; did you mean 'train.epochs'\?"),
        (GOOD + "[optimm]\n", r"run.toml: optimm: there is no such section; did you mean 'optim'\?"),
        ("model = 1\n", r"run.toml: model: expected a table \[model\], got 1"),
        ("[model\n", "run.toml: not valid TOML"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(file(text))
    with pytest.raises(ConfigError, match="there is no configuration file .*missing.toml"):
        load(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(path)


@pytest.mark.parametrize(
    "text,value", [("false", False), ("true", True), ('"selective"', "selective"), ("selective", "selective")]
)
def test_a_key_that_is_true_false_or_a_word(file, text, value):
    assert load(file(), [f"model.grad_checkpointing={text}"]).model.grad_checkpointing is value or value == "selective"
    if text != "selective":  # in a file a word has quotes
        config = load(file(GOOD.replace("[data]", f"grad_checkpointing = {text}\n[data]")))
        assert config.model.grad_checkpointing == value
    assert "grad_checkpointing = false   # false | true | selective" in configs.template()


@pytest.mark.parametrize("text", ["whole", '"true"', "1", "[]"])
def test_what_is_none_of_these(file, text):
    wanted = "model.grad_checkpointing: expected true or false or selective, got"
    with pytest.raises(ConfigError, match=wanted):
        load(file(), [f"model.grad_checkpointing={text}"])


def test_init_and_pretrained_exclude_each_other(file):
    with pytest.raises(ConfigError, match="train.init: give either this or model.pretrained"):
        load(file(), ["train.init=a.pt", "model.pretrained=b.pt"])


def test_evaluation_needs_no_output_folder(file):
    assert load(file(), ["train.out=''"], training=False).train.out == ""


def test_every_key_has_a_type_that_can_be_checked():
    assert {configs.kind(f) for f in configs.KEYS.values()} == {int, float, bool, str, dict, list}


def test_warmup_and_cosine():
    args = dict(lr=1.0, steps=110, warmup_steps=10, start_lr=0.1, end_lr=0.2)
    rates = [warmup(step, **args) for step in range(110)]
    rises = [b - a for a, b in zip(rates[:10], rates[1:11], strict=True)]
    assert max(rises) - min(rises) < 1e-12 and rates[0] > 0.1
    assert rates[10] == 1.0 and max(rates) == 1.0
    assert math.isclose(rates[60], 0.6) and 0.2 < rates[-1] < 0.201
    assert all(b < a for a, b in zip(rates[10:], rates[11:], strict=False))
    assert {warmup(s, **args | dict(name="constant")) for s in range(10, 110)} == {1.0}
    assert warmup(0, lr=1.0, steps=1, warmup_steps=0) == 1.0


def test_a_byte_order_mark_is_no_key(tmp_path):
    (tmp_path / "run.toml").write_text('[data]\nannotations = "a"\nvideos = "v"\n[train]\nout = "r"\n', encoding="utf-8-sig")
    assert load(tmp_path / "run.toml").data.annotations == str(tmp_path / "a")
