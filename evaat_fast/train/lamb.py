"""LAMB: AdamW whose update of each tensor is as long as a share of that tensor, for large batches.

Source: You et al., arXiv 1904.00962, algorithm 2, with phi(z) = z. What weight decay spares is not rescaled either, as in the
authors' own code, whose `exclude_from_layer_adaptation` is `exclude_from_weight_decay` unless it is said otherwise: a bias that
starts at zero would never leave it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """For each tensor x with gradient g, at step t:

        m = beta1 m + (1 - beta1) g                          v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x
        x = x - lr (|x| / |u|) u                             the ratio is 1 where a norm is 0, or the group's "adapt" is False

    Args:
        params: tensors, or groups of them; a group with "adapt" False is AdamW's without its decay, but for where eps stands.
        lr, betas, eps, weight_decay: as of torch.optim.AdamW.

    Attributes:
        found_inf: None, or a scalar tensor: a step changes nothing where it is not 0. To read it the host waits for the device.

    Raises:
        ValueError: a number out of its range.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adapt=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Returns what `closure` returns, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and self.found_inf.item():
            return loss
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if p not in self.state:
                self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        gradients, (beta1, beta2) = [p.grad for p in params], group["betas"]
        first, second = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        counts = [int(self.state[p]["step"]) for p in params]
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, [(1 - beta2**t) ** 0.5 for t in counts])
        torch._foreach_add_(scale, group["eps"])
        updates = torch._foreach_div(first, scale)
        torch._foreach_div_(updates, [1 - beta1**t for t in counts])
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        if group["adapt"]:
            lengths, long = torch._foreach_norm(params), torch._foreach_norm(updates)
            ratios = [torch.where((x > 0) & (u > 0), x / u, 1.0) for x, u in zip(lengths, long, strict=True)]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(params, updates, alpha=-float(group["lr"]))
