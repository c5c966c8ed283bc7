"""Training on several processes against one, in float64: python train_ranks.py CONFIG FOLDER CASES WORLD..., over gloo.

FOLDER/places.json has the overrides that find the data of a data.kind.
"""

import contextlib
import importlib
import itertools
import json
import os
import sys
from pathlib import Path

import pairwise_ranks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from evaat_fast import _parts
from evaat_fast.model.checkpoints import save_checkpoint
from evaat_fast.train import checkpoint, inputs, load, shards, similarity, steps, trainer
from evaat_fast.train.averaging import Average
from evaat_fast.train.masters import Masters
from evaat_fast.train.ranks import Ranks, leave

STEPS = 20
CASES = {
    "clip": ["loss.name=clip", "loss.learnable_temperature=true", "optim.clip_norm=1.0"],
    "sms": ["loss.name=sms", "data.positive=relevant"],
    "dropped": ["loss.name=clip", "model.patch_dropout=0.5", "model.grad_checkpointing=selective"],
    "lamb": ["optim.name=lamb", "optim.layer_decay=0.7", "train.ema=0.9", "model.grad_checkpointing=true"],
    "cached": ["loss.learnable_temperature=true", "model.patch_dropout=0.5", "train.micro_batch=5"],
    "all": ["optim.name=lamb", "optim.layer_decay=0.7", "train.ema=0.9", "train.micro_batch=5"],
}
# What a configuration can make of labels: every corpus, rule and way to say what is alike.
LABELS = {
    "paper": ["loss.name=sms", "loss.rule=paper"],
    "charades": ["loss.name=sms", "loss.rule=charades", "loss.margin=0.3"],
    "ek100-clips": ["data.kind=ek100-clips", "loss.name=sms"],
    "charades-ego": ["data.kind=charades-ego", "loss.name=sms", "loss.rule=charades", "optim.name=lamb"],
    "egoclip": ["data.kind=egoclip", "loss.temperature=0.07"],
    "classes": ["data.kind=csv", "loss.name=sms"],
    "captions": ["data.kind=csv", "data.labels=[]", "loss.name=sms"],
    "text-tower": ["data.kind=csv", "data.similarity=text-tower", "loss.name=sms"],
}
# Every loss of ops with every kind of labels, in place of the configuration's.
LOSSES = {f"ops {name}": ["loss.learnable_temperature=true"] * (name == "clip learned") for name in pairwise_ranks.CASES}
CASES |= LABELS | LOSSES


def overrides_of(name, folder):
    """Those of a case, with the places of its data."""
    kind = next((text.split("=")[1] for text in CASES[name] if text.startswith("data.kind=")), "ek100-mir")
    start = [f"train.init={folder}/start.pt"] * (name == "text-tower")
    return [*json.loads(Path(folder, "places.json").read_text()).get(kind, ()), *CASES[name], *start]


@contextlib.contextmanager
def loss_of(name):
    """Within it a step's loss is that of the case."""
    if name not in LOSSES:
        yield
        return
    known = pairwise_ranks.known()

    def loss(embedded, batch, table, config, ranks):
        part = slice(ranks.rank * len(batch["text"]), (ranks.rank + 1) * len(batch["text"]))
        # Unit rows, as log-sum-exp losses take them: of larger ones the rounding of a key's bias, whose gradient is zero, is
        # more than AdamW's eps, and is learned.
        video, text = (torch.nn.functional.normalize(x, dim=-1) for x in embedded[:2])
        return pairwise_ranks.call(name.removeprefix("ops "), known, part, video, text, embedded[2], group=ranks.group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "embedded_loss", loss)
        yield


DEVICE = torch.device("cpu")


def built(config, ranks):
    """(masters, optimizer, average) of a float64 model, shared out where the configuration says so."""
    model = trainer.build_model(config).double().train()
    if ranks.several and config.train.parallel == "fsdp":
        shards.shard(model, config, ranks, DEVICE)
    masters = Masters(model)
    return masters, steps.build_optimizer(model, config, masters), Average(masters, config.train.ema or 0.5)


def trained(config, ranks, broken=None, count=STEPS):
    """Losses of so many steps, and the parameters after them or their average, all float64. broken: a checkpoint; half-way,
    within an epoch, all is saved there, thrown away and begun anew from there."""
    data = inputs.splits(config).train
    sampler, losses, table = inputs.sampler(config, data), [], torch.zeros(0, 0)
    if config.data.similarity == "text-tower":
        table = similarity.labels(config, data, Path(config.train.out), DEVICE, ranks, trainer.build_model(config))
        assert not torch.equal(table, table.round())
    elif config.loss.name == "sms":
        table = data.relevancy_table

    def begun():
        masters, optimizer, average = built(config, ranks)
        kept = average if config.train.ema else None
        return masters, optimizer, average, steps.Steps(masters, optimizer, table, config, DEVICE, ranks, kept)

    masters, optimizer, average, run = begun()
    at = checkpoint.Position()
    while len(losses) < count:
        data.set_epoch(at.epoch)
        sampler.epoch = at.epoch
        for batch in inputs.loader(config, data, sampler, inputs.tokenizer(config), DEVICE, ranks, at.step):
            losses.append(run(batch).item())
            at = checkpoint.Position(at.epoch, at.step + 1)
            if broken and len(losses) == count // 2 - (count > 2):
                checkpoint.save(broken, masters, optimizer, at, config, average=average, ranks=ranks)
                ranks.gather(None)  # it is written before it is read
                masters, optimizer, average, run = begun()
                checkpoint.restore(checkpoint.read(broken), masters, optimizer, broken, average)
                break
            if len(losses) == count:
                break
        else:
            at = checkpoint.Position(at.epoch + 1)
    weights = average.weights if config.train.ema else masters.parameters
    return losses, {name: shards.whole(p).detach().clone() for name, p in weights.items()}


def kept(config, ranks, path):
    """All that a checkpoint puts in its place, whole."""
    masters, optimizer, average = built(config, ranks)
    checkpoint.restore(checkpoint.read(path), masters, optimizer, path, average)
    if ranks.several and config.train.parallel == "fsdp":
        assert sum(map(shards.is_part, masters.parameters.values())) == len(masters.parameters) - 1  # but for the temperature
        check_copy(masters.model)
    return shards.whole([dict(masters.state_dict()), optimizer.state_dict()["state"], average.weights])


def check_copy(model):
    """What is evaluated in place of parts embeds as they do."""
    copied, config = shards.copy_of(model).eval(), model.config
    clips = torch.rand(2, 3, config.num_frames, config.image_size, config.image_size, dtype=torch.float64)
    with torch.no_grad():
        expected = model.eval().encode_video(clips)
    torch.testing.assert_close(copied.encode_video(clips).detach(), expected, rtol=1e-10, atol=1e-10)


def check_checkpoint(path, file, parallel, ranks):
    """What processes write, one process and those that each hold all read, and those that share the weights out."""
    overrides = ["train.ema=0.9", "optim.name=lamb"]
    trained(load(path, [*overrides, f"train.parallel={parallel}"]), ranks, file, 2)
    configs = [load(path, [*overrides, f"train.parallel={parallel}"]) for parallel in ("fsdp", "ddp")]
    shared, each, one = kept(configs[0], ranks, file), kept(configs[1], ranks, file), kept(configs[1], Ranks(), file)
    for other in (each, one):
        torch.testing.assert_close(shared, other, rtol=0, atol=0)
    moments = checkpoint.read(file)["optimizer"]["state"].values()
    assert all(x["exp_avg"].norm() > 0 for x in moments)


def check_precision(path, ranks):
    """What is bfloat16 as blocks run is what one process holds so, and the first loss is the same to the bit."""
    found, losses = {}, []
    for parallel in ("ddp", "fsdp"):
        config = load(
            path, ["train.precision=bfloat16-params", f"train.parallel={parallel}", "loss.learnable_temperature=true"]
        )
        model, data = trainer.build_model(config).train(), inputs.splits(config).train
        if parallel == "fsdp":
            shards.shard(model, config, ranks, DEVICE)
        masters = Masters(model, torch.bfloat16 if parallel == "ddp" else None)
        optimizer, average = steps.build_optimizer(model, config, masters), Average(masters, 0.9)
        run = steps.Steps(masters, optimizer, data.relevancy_table, config, DEVICE, ranks, average)
        seen = found[parallel] = {}

        def note(module, _, seen=seen, model=model):
            place = next(name for name, other in model.named_modules() if other is module)
            seen.update({f"{place}.{name}": p.dtype for name, p in module.named_parameters(recurse=False)})

        inner = [m for m in model.modules() if m is not model and not isinstance(m, torch.nn.LayerNorm)]
        for module in inner:
            module.register_forward_pre_hook(note)

        def of_norms(module, _, seen=seen, model=model):
            for name, m in model.named_modules():
                if isinstance(m, torch.nn.LayerNorm) and m.weight.device.type != "meta":
                    seen[f"{name}.weight"] = m.weight.dtype

        model.visual.blocks[0].register_forward_pre_hook(of_norms)
        data.set_epoch(0)
        batches = inputs.loader(config, data, inputs.sampler(config, data), inputs.tokenizer(config), DEVICE, ranks)
        losses.append([run(batch).item() for batch in itertools.islice(batches, 2)])
    assert found["ddp"] == found["fsdp"] and set(found["ddp"].values()) == {torch.bfloat16, torch.float32}
    assert losses[0][0] == losses[1][0] and abs(losses[0][1] - losses[1][1]) < 1e-2 * losses[0][1]


def check_failure(file, ranks):
    """What one process cannot put in its place, all hear of, and the next write is whole."""
    _parts.write(file, {"n": 1}, ranks.group)
    old = Path(file).with_name(f".{Path(file).name}.old")
    if ranks.main:
        old.write_text("in the way")
    try:
        _parts.write(file, {"n": 2}, ranks.group)
    except OSError:
        assert ranks.gather("heard") == ["heard"] * ranks.world
    else:
        raise AssertionError("it was written over a file")
    if ranks.main:
        old.unlink()
    _parts.write(file, {"n": 3}, ranks.group)
    assert _parts.read(file) == {"n": 3}


def main(rank, world, path, folder, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    ranks = Ranks(rank, world, dist.group.WORLD)
    for name, (parallel, kind) in itertools.product(cases, (("ddp", "pt"), ("fsdp", "parts"))):
        config = load(path, [*overrides_of(name, folder), f"train.parallel={parallel}", f"train.out={folder}/{name}-{world}"])
        with loss_of(name):
            losses, weights = trained(config, ranks, f"{folder}/{name}-{parallel}-{world}.{kind}")
        assert all(other == losses for other in ranks.gather(losses))  # to the bit, or limits of it would part them
        alone, expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=1e-10, atol=1e-12)
        for key, value in weights.items():
            of = f"{name}, {parallel}, {key}"
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10, msg=lambda text, of=of: f"{of}: {text}")
    if any(name not in LABELS | LOSSES for name in cases):
        for parallel, kind in (("fsdp", "pt"), ("ddp", "parts")):
            check_checkpoint(path, f"{folder}/{parallel}-{world}.{kind}", parallel, ranks)
        check_precision(path, ranks)
        check_failure(f"{folder}/failed-{world}.parts", ranks)
    print("rank", rank, "of", world, "agrees", flush=True)
    leave()


def alone(_, path, folder, cases):
    """What several processes are compared with: one that has the whole batch at once."""
    torch.set_num_threads(1)
    save_checkpoint(trainer.build_model(load(path)), f"{folder}/start.pt")
    for name in cases:
        overrides = [text for text in overrides_of(name, folder) if "micro_batch" not in text]
        with loss_of(name):
            torch.save(trained(load(path, [*overrides, f"train.out={folder}/{name}"]), Ranks()), Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    path, folder, cases, *worlds = sys.argv[1:]
    cases = cases.split(",")
    os.environ.pop("WORLD_SIZE", None)
    # Forked, they find all imported; nothing is computed here, which those that are forked later could not bear.
    for name in ("_dynamo", "distributed.checkpoint", "distributed.fsdp", "distributed.tensor"):
        importlib.import_module(f"torch.{name}")
    mp.start_processes(alone, (path, folder, cases), 1, start_method="fork")
    for world in map(int, worlds):
        mp.start_processes(main, (world, path, folder, cases), world, start_method="fork")
