"""An exponential moving average of the weights, which often evaluates better than the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evaat_fast.train.masters import Masters
from evaat_fast.train.shards import is_part


class Average:
    """average = decay average + (1 - decay) weights, after each step, from the weights that the run began with.

    Args:
        masters: of the model; those of its parameters that are trained are averaged, in their masters' dtype. decay: above 0,
            below 1, as a rule 1 - 1 / (a few thousand steps).
    """

    def __init__(self, masters: Masters, decay: float) -> None:
        self._masters, self.decay = masters, decay
        self._trained: dict[str, Tensor] = {name: p for name, p in masters.parameters.items() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """After a step. skip: a scalar on the weights' device, 1 where there was none: the average then stays."""
        for parts in (False, True):  # which torch does not take together
            names = [name for name, x in self.weights.items() if is_part(x) == parts]
            average, trained = [self.weights[name] for name in names], [self._trained[name] for name in names]
            if not names:
                continue
            if skip is None:
                torch._foreach_lerp_(average, trained, 1 - self.decay)
                continue
            weight = (1 - skip) * (1 - self.decay)  # the host does not know it yet
            weights: Any = [weight.to(x.dtype) for x in average]
            torch._foreach_lerp_(average, trained, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's, with averaged weights."""
        return {**self._masters.state_dict(), **self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError, RuntimeError: names or shapes that do not fit."""
        for name, x in self.weights.items():
            x.copy_(state[name])

    @contextmanager
    @torch.no_grad()
    def shown(self) -> Iterator[None]:
        """The model holds the averaged weights, rounded as its own are, until the block ends."""
        held = {name: p for name, p in self._masters.model.named_parameters() if name in self.weights}
        before = {name: p.detach().clone() for name, p in held.items()}
        for name, p in held.items():
            p.copy_(self.weights[name])  # in place: graphs and optimisers know its memory
        try:
            yield
        finally:
            for name, p in held.items():
                p.copy_(before[name])
