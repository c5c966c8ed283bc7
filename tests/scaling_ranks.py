"""The bytes that a training step sends, against bench/cost.py: python scaling_ranks.py FOLDER BACKEND, over gloo.

On two and on three processes, both towers under DistributedDataParallel and under FSDP with each loss over the group, as the
trainer has them; of a backend that is slow the loss alone."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pairwise_ranks import Travelled
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from evaat_fast import ops
from evaat_fast.model import create_model
from evaat_fast.train import shards
from evaat_fast.train.config import Config
from evaat_fast.train.ranks import Ranks, leave

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import cost  # noqa: E402

PAIRS, CLASSES = 6, 5
KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}
NARROW = {"vision_layers": 1, "text_layers": 1, "vision_width": 32, "vision_heads": 1, "text_width": 32, "text_heads": 1}


def near(predicted, counted, what):
    """Within 5 %."""
    assert abs(predicted - counted) <= 0.05 * counted, (what, predicted, counted)


def check_loss(travelled, loss, W, E, backend):
    found = {KINDS[name]: size for name, size in travelled.items()}
    wanted = cost.loss_collectives(loss, PAIRS * W, W, E, backend=backend)
    for kind in KINDS.values():
        near(sum(x.bytes for x in wanted if x.kind == kind), found.get(kind, 0), (loss, kind))


def value(loss, video, text, backend):
    group = {"group": dist.group.WORLD, "backend": backend}
    if loss == "clip":
        video, text = (torch.nn.functional.normalize(x, dim=-1) for x in (video, text))
        return ops.clip_loss(video, text, 20.0, **group)
    return ops.sms_loss(video, text, ops.IndexedRelevancy(torch.eye(CLASSES), *torch.randint(CLASSES, (2, PAIRS))), **group)


class Towers(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, video, text):
        return self.model.encode_video(video), self.model.encode_text(text)


def step(loss, W):
    torch.manual_seed(0)
    model = create_model("eva02_at_tiny_patch16_64", num_frames=2, **NARROW)
    model.logit_scale.requires_grad_(False)
    towers = DistributedDataParallel(Towers(model), static_graph=True)
    reduced = []

    def hook(group, bucket):  # DDP hands its gradients over here
        reduced.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    towers.register_comm_hook(dist.group.WORLD, hook)
    text = torch.randint(1, 49000, (PAIRS, 9))
    text[:, -1] = 49407
    video = torch.randint(0, 256, (PAIRS, 2, 64, 64, 3), dtype=torch.uint8)
    for _ in range(3):  # DDP makes its buckets in the first step, and others in the second
        reduced.clear()
        with Travelled() as travelled:
            value(loss, *towers(video, text), "cpu").backward()
    # What DDP sends is seen here too: the gradients, which the hook has counted, and the model's buffer.
    sent = {"allreduce_": 0, **travelled.bytes}
    sent["allreduce_"] -= sum(reduced)
    assert sent.pop("broadcast_", 0) <= 1024
    check_loss(sent, loss, W, model.config.embed_dim, "cpu")
    [gradients] = cost.weight_collectives(model.config, "ddp")
    near(gradients.bytes, sum(reduced), "gradients")


def shared(loss, W):
    """The same by FSDP, as the trainer has it."""
    torch.manual_seed(0)
    model = create_model("eva02_at_tiny_patch16_64", num_frames=2, **NARROW | {"vision_layers": 2})
    model.logit_scale.requires_grad_(False)
    shards.shard(model, Config(), Ranks(dist.get_rank(), W, dist.group.WORLD), torch.device("cpu"))
    text = torch.randint(1, 49000, (PAIRS, 9))
    text[:, -1] = 49407
    video = torch.randint(0, 256, (PAIRS, 2, 64, 64, 3), dtype=torch.uint8)
    for _ in range(2):  # the first step looks around
        with Travelled() as travelled:
            value(loss, model.encode_video(video), model.encode_text(text), "cpu").backward()
    sent = {KINDS[name]: size for name, size in travelled.bytes.items()}
    wanted = cost.loss_collectives(loss, PAIRS * W, W, model.config.embed_dim, backend="cpu")
    wanted += cost.weight_collectives(model.config, "fsdp")
    for kind in KINDS.values():
        near(sum(x.bytes for x in wanted if x.kind == kind), sent.get(kind, 0), (loss, kind, "fsdp"))


def alone(loss, W, backend):
    video, text = torch.randn(2, PAIRS, 16, requires_grad=True).unbind()
    with Travelled() as travelled:
        value(loss, video, text, backend).backward()
    check_loss(travelled.bytes, loss, W, 16, backend)


def main(rank, W, folder, backend):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{W}", rank=rank, world_size=W)
    for loss in ("clip", "sms"):
        if backend == "cpu":
            step(loss, W)
            shared(loss, W)
        else:
            alone(loss, W, backend)
    print("rank", rank, "of", W, "as predicted", flush=True)
    dist.barrier()
    leave()


if __name__ == "__main__":
    for W in (2, 3):
        mp.spawn(main, (W, *sys.argv[1:]), W)
