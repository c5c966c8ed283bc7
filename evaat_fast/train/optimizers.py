"""The optimiser of a run: AdamW or LAMB, in groups that differ in weight decay and, with layer decay, in learning rate."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from evaat_fast.model import EVA02AT
from evaat_fast.train.config import Config
from evaat_fast.train.lamb import Lamb
from evaat_fast.train.masters import Masters
from evaat_fast.train.shards import is_part, whole

_BLOCK = re.compile(r"(visual\.blocks|text\.transformer\.resblocks)\.(\d+)\.")
_EMBEDDING = re.compile(
    r"visual\.(patch_embed\.|cls_token|pos_embed|temporal_embed|norm_pre\.)|text\.(token_|positional_)embedding"
)


def depth(name: str, model: EVA02AT) -> int:
    """How far from the end of its tower a parameter is: 0 behind the last block, 1 in it, the number of blocks + 1 for what
    makes tokens. A learning rate is multiplied by optim.layer_decay to this power, as BEiT and EVA have it."""
    blocks = len(model.visual.blocks) if name.startswith("visual.") else len(model.text.transformer.resblocks)
    if found := _BLOCK.match(name):
        return blocks - int(found[2])
    return blocks + 1 if _EMBEDDING.match(name) else 0


def build_optimizer(model: EVA02AT, config: Config, masters: Masters | None = None) -> torch.optim.Optimizer:
    """With weight decay on the matrices only: not on vectors, scalars and the positional embeddings. It updates the masters of
    what the model holds in a lower precision. A group's "lr_scale" is what its learning rate is multiplied by."""
    spared, decay = model.no_weight_decay(), config.optim.layer_decay
    groups: dict[tuple[int, bool, bool], list[torch.nn.Parameter]] = {(0, True, False): [], (0, False, False): []}
    # Of those FSDP shares some out and leaves others whole, which no optimiser takes together.
    apart = model.meets_stream() if config.train.precision == "bfloat16-params" else ()
    for name, parameter in (masters or Masters(model)).parameters.items():
        if parameter.requires_grad:
            place = depth(name, model) if decay != 1 else 0
            matrix = parameter.ndim >= 2 and name not in spared
            groups.setdefault((place, matrix, not matrix and name in apart), []).append(parameter)
    listed = [
        {
            "params": parameters,
            "weight_decay": config.optim.weight_decay if matrices else 0.0,
            "lr_scale": decay**place,
            **({"adapt": matrices} if config.optim.name == "lamb" else {}),
        }
        for (place, matrices, _), parameters in groups.items()
    ]
    betas, eps = (config.optim.beta1, config.optim.beta2), config.optim.eps
    if config.optim.name == "lamb":
        return Lamb(listed, lr=config.optim.lr, betas=betas, eps=eps)
    return torch.optim.AdamW(listed, lr=config.optim.lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, before what each group multiplies it by."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)  # runs from before it have none
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a graph reads it there
        else:
            group["lr"] = rate


def fit_optimizer(optimizer: torch.optim.Optimizer, config: Config, device: torch.device) -> None:
    """Lets a graph read the learning rate from memory, or nobody: a checkpoint's optimizer may be of the other kind."""
    for group in optimizer.param_groups:
        group["capturable"] = config.train.cuda_graph
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if config.train.cuda_graph else rate


def gradient_norm(parameters: Mapping[str, torch.nn.Parameter], clip_norm: float) -> Tensor:
    """The norm of the whole gradient, a scalar that nobody waits for; with `clip_norm` the gradient is scaled to be no
    longer."""
    # Parts of tensors go with parts only: the temperature is whole.
    kinds: tuple[list[Tensor], list[Tensor]] = [], []
    for p in parameters.values():
        if p.grad is not None:
            kinds[is_part(p.grad)].append(p)
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])) for some in kinds if some]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    for some in kinds if clip_norm else ():
        torch.nn.utils.clip_grads_with_norm_(some, clip_norm, norm)
    return norm
