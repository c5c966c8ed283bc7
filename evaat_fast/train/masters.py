"""float32 masters of the parameters that a model holds in a lower precision.

    masters = Masters(model, torch.bfloat16)
    optimizer = torch.optim.AdamW(masters.parameters.values(), fused=True)
    loss.backward(); masters.take_gradients(); optimizer.step(); masters.give_weights()

The products then read weights that nobody casts, and gradients leave them in the weights' dtype; both cross to the masters in a
few launches for all tensors. Optimisers with masters of their own save those too, by count 0.4 of the 77 ms of a base model's
step on an H200, but run on CUDA alone: FlashOptim 0.1.4 also counts its steps on the host, which a captured graph would not,
and Transformer Engine's FusedAdam needs an extension compiled for each torch. torch's AdamW serves every device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evaat_fast.model import EVA02AT


class Masters:
    """What an optimiser updates instead of a model's own parameters.

    Args:
        model: an EVA02AT of float32, on its device. dtype: what its matrices are held in from now on; None leaves them as they
            are, and there is nothing to cross.

    Attributes:
        parameters: by the model's names, in its order: the master where there is one, elsewhere the model's own parameter.
    """

    def __init__(self, model: EVA02AT, dtype: torch.dtype | None = None):
        self.model = model
        if dtype is not None and model.matrix_dtype != torch.float32:
            raise ValueError(f"model: expected its matrices in float32, got {model.matrix_dtype}, of which masters are lost")
        exact = {} if dtype is None else model.hold_matrices(dtype)
        held = dict(model.named_parameters())
        self._masters = {name: nn.Parameter(x, held[name].requires_grad) for name, x in exact.items()}
        self._pairs = [(held[name], master) for name, master in self._masters.items()]
        self.parameters: dict[str, nn.Parameter] = {**held, **self._masters}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """After a backward pass: moves the gradients to the masters."""
        given = {master: low.grad for low, master in self._pairs if low.grad is not None}
        taken = [torch.empty_like(master) for master in given]
        if given:
            torch._foreach_copy_(taken, list(given.values()))
        for master, gradient in zip(given, taken, strict=True):
            master.grad = gradient
        for low, _ in self._pairs:
            low.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """After an update: rounds the masters to the model's parameters."""
        if self._pairs:
            torch._foreach_copy_([low for low, _ in self._pairs], [master for _, master in self._pairs])

    def state_dict(self) -> dict[str, Tensor]:
        """The model's, of the masters."""
        return {**self.model.state_dict(), **{name: master.detach() for name, master in self._masters.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fills the masters, and rounds them to the model's parameters.

        Raises:
            RuntimeError: names or shapes that do not fit.
        """
        self.model.load_state_dict(state)
        for name, master in self._masters.items():
            master.copy_(state[name])
