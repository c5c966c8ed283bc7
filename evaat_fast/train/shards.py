"""Weights, gradients and moments shared out among the processes, by torch's FSDP2: `train.parallel = "fsdp"`.

Each block of both towers is gathered when it is needed, and its gradient goes back in parts: the mean over the processes, as
DDP's. A checkpoint is read as whole tensors, whoever wrote it and how: any number of processes goes on from it.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from evaat_fast.model import EVA02AT
from evaat_fast.train.config import Config, ConfigError
from evaat_fast.train.ranks import Ranks


def shard(model: EVA02AT, config: Config, ranks: Ranks, device: torch.device) -> None:
    """Leaves of each parameter this process's part, a DTensor, but for the temperature, which is one number, and whose gradient
    `average_whole` averages. With "bfloat16-params" all that `Masters` keeps in float32 stays whole but the table of tokens, in
    all 0.2 % of the base model: FSDP gathers the parameters of a block in one dtype.

    Args:
        model: on `device`, the same on all processes. config: a Config; with "bfloat16-params" parts are gathered in bfloat16,
            and gradients are added up in float32.

    Raises:
        ConfigError: "bfloat16-params" with a torch before 2.7.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # A linear layer's output is a view; nothing that is done to a block's is done in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(ranks.group, device.type)
    options: dict[str, Any] = {"mesh": mesh}
    if config.train.precision == "bfloat16-params":
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise ConfigError("train.precision: 'bfloat16-params' with train.parallel = 'fsdp' needs torch 2.7 or newer")
        fully_shard(model.text.token_embedding, mesh=mesh)  # in float32, gathered when it is read
        kept = model.meets_stream() - {"text.token_embedding.weight"}
        options["ignored_params"] = {parameter for name, parameter in model.named_parameters() if name in kept}
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for tower, blocks in ((model.visual, model.visual.blocks), (model.text, model.text.transformer.resblocks)):
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(tower, **options)


def average_whole(parameters: Mapping[str, Tensor], ranks: Ranks) -> None:
    """The mean over the processes of the gradients of parameters that are not shared out; those of parts FSDP averages."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None and not is_part(p.grad)]
    for dtype in dict.fromkeys(x.dtype for x in gradients):
        some = [x for x in gradients if x.dtype == dtype]
        mean = torch.cat([x.flatten() for x in some])
        torch.distributed.all_reduce(mean, group=ranks.group)
        mean /= ranks.world
        torch._foreach_copy_(some, [x.view_as(y) for x, y in zip(mean.split([y.numel() for y in some]), some, strict=True)])


def is_part(x: object) -> bool:
    """Whether x is a process's part of a tensor."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def whole(tree: Any, keep: bool | None = None, group: Any = None) -> Any:
    """Tensors, or dicts, lists and tuples of them, with whole tensors in place of parts. Every process must call.

    Args:
        keep: whether this process needs them, then on the CPU; None: all do, where the parts are.
        group: through which they are gathered, with keep on its first process alone; None: the one that they belong to.
    """
    if is_part(tree):
        if group is not None:
            return _gathered(tree, group)
        found = tree.detach().full_tensor()
        return found if keep is None else found.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: whole(x, keep, group) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole(x, keep, group) for x in tree)
    return tree


def _gathered(part, group):
    """The whole tensor on the first process, None on the others, whatever became of the part's own group."""
    main = torch.distributed.get_rank(group) == 0
    found: Any = [None] * torch.distributed.get_world_size(group) if main else None
    torch.distributed.gather_object(part.detach().to_local().cpu(), found, dst=0, group=group)
    return torch.cat(found).view(part.shape) if main else None  # rows in the order of the processes, as FSDP cuts them


def part_of(x: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, as `like` is of its own; x itself where that is whole."""
    from torch.distributed.tensor import distribute_tensor

    if not is_part(like) or is_part(x) or not isinstance(x, Tensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements)


def parts_of(stored: Mapping[str, Any], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A checkpoint with parts where this process holds parts, and moments whose memory is not that of the file. Every process
    must call."""
    content = dict(stored)
    for name in ("state_dict", "model_ema"):
        if name in stored:
            content[name] = {key: part_of(x, parameters.get(key)) for key, x in stored[name].items()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(x: Any, i: int) -> Any:
        part = part_of(x, ordered[i])
        # An optimiser takes moments as they are where they need not move; they may lie in a file.
        return part.clone() if part is x and isinstance(x, Tensor) and not is_part(x) and not ordered[i].is_cuda else part

    content["optimizer"] = {
        **stored["optimizer"],
        "state": {
            i: {key: placed(x, i) for key, x in state.items()} if 0 <= i < len(ordered) else state
            for i, state in stored["optimizer"]["state"].items()
        },
    }
    return content


def likeness(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Callable[[str, torch.Size], Tensor | None]:
    """For `_parts.read` of a checkpoint: an empty part, where this process holds a part, of the tensor of a name."""
    ordered = [p for group in optimizer.param_groups for p in group["params"]]

    def like(name: str, size: torch.Size) -> Tensor | None:
        _, of, rest = (*name.split("/", 2), "", "")[:3]
        held: Any = parameters.get(rest) if of in ("state_dict", "model_ema") else None
        if of == "optimizer" and rest.startswith("state/"):
            number = int(rest.split("/")[1])
            held = ordered[number] if number < len(ordered) else None
        return torch.empty_like(held.detach()) if is_part(held) and held.shape == size else None

    return like


def copy_of(model: EVA02AT) -> EVA02AT:
    """The model whole, for what is not done in step, as evaluation. Every process must call."""
    state = whole(dict(model.state_dict()))
    with torch.device("meta"):
        copied = EVA02AT(model.config)
    copied.load_state_dict(state, assign=True)  # in its dtype, and no second time in memory
    return copied.train(model.training)
