"""Training on several processes against one, in float64: python train_ranks.py CONFIG FOLDER WORLD..., over gloo."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from evaat_fast.data.labels import LabelledClips
from evaat_fast.train import checkpoint, inputs, load, steps, trainer
from evaat_fast.train.masters import Masters
from evaat_fast.train.ranks import Ranks

STEPS = 20
CASES = {
    "clip": ["loss.name=clip", "loss.learnable_temperature=true", "optim.clip_norm=1.0"],
    "sms": ["loss.name=sms", "data.positive=relevant"],
    "dropped": ["loss.name=clip", "model.patch_dropout=0.5", "model.grad_checkpointing=selective"],
    "cached": ["loss.learnable_temperature=true", "model.patch_dropout=0.5", "train.micro_batch=5"],
}


def trained(config, ranks, broken=None):
    """Losses of STEPS steps, and the parameters after them, all float64. broken: a file; half-way, within an epoch, all
    is saved there, thrown away and begun anew from there."""
    device, data = torch.device("cpu"), inputs.splits(config).train
    assert isinstance(data, LabelledClips)
    sampler, losses = inputs.sampler(config, data), []

    def begun():
        masters = Masters(trainer.build_model(config).double().train())
        optimizer = steps.build_optimizer(masters.model, config, masters)
        return masters, optimizer, steps.Steps(masters, optimizer, data.relevancy_table, config, device, ranks)

    masters, optimizer, run = begun()
    at = checkpoint.Position()
    while len(losses) < STEPS:
        data.set_epoch(at.epoch)
        sampler.epoch = at.epoch
        for batch in inputs.loader(config, data, sampler, inputs.tokenizer(config), device, ranks, at.step):
            losses.append(run(batch).item())
            at = checkpoint.Position(at.epoch, at.step + 1)
            if broken and len(losses) == STEPS // 2 - 1:
                checkpoint.save(broken, masters, optimizer, at, config)
                masters, optimizer, run = begun()
                checkpoint.restore(checkpoint.read(broken), masters, optimizer, broken)
                break
            if len(losses) == STEPS:
                break
        else:
            at = checkpoint.Position(at.epoch + 1)
    return losses, {name: p.detach().clone() for name, p in masters.parameters.items()}


def main(rank, world, path, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    ranks = Ranks(rank, world, dist.group.WORLD)
    for name, overrides in CASES.items():
        losses, weights = trained(load(path, overrides), ranks, f"{folder}/{name}-{rank}-of-{world}.pt")
        alone, expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=1e-10, atol=1e-12)
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    print("rank", rank, "of", world, "agrees", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, folder, *worlds = sys.argv[1:]
    os.environ.pop("WORLD_SIZE", None)
    for name, overrides in CASES.items():
        overrides = [text for text in overrides if "micro_batch" not in text]  # alone with the whole batch at once
        torch.save(trained(load(path, overrides), Ranks()), Path(folder) / f"{name}.pt")
    for world in map(int, worlds):
        mp.spawn(main, (world, path, folder), world)
