"""What a block keeps for its backward pass, and what it computes again.

    model.set_grad_checkpointing("selective")     # norms and activations again, no product: 70 % of the memory
    model.set_grad_checkpointing(True)            # whole blocks again: 16 % of it, and one block's, for a third more work

A vision block by token, under bfloat16 autocast in a clip of 4 frames, with norms as kernels, which keep their float32 input:

| kept for the backward pass | base: bytes | FLOPs to remake it | bytes/FLOP | large: bytes | FLOPs | bytes/FLOP |
|---|---|---|---|---|---|---|
| second norm's sum and output, less proj's output | 3,072 | 6,900 | 0.44 | 4,096 | 9,200 | 0.44 |
| the attention's norm, for proj | 1,536 | 6,100 | 0.25 | 2,048 | 8,200 | 0.25 |
| SwiGLU with its norm, for fc2 | 4,096 | 28,700 | 0.14 | 5,460 | 38,200 | 0.14 |
| queries, keys and values, turned | 4,608 | 3,540,000 | 0.0013 | 6,144 | 6,290,000 | 0.0010 |
| fc1's output | 8,192 | 6,290,000 | 0.0013 | 10,920 | 11,180,000 | 0.0010 |
| the attention's output | 1,536 | 2,410,000 | 0.0006 | 2,048 | 4,200,000 | 0.0005 |
| first norm's sum and output, proj's output | 6,144 | kept | | 8,192 | kept | |

A product of C channels saves 1/C bytes by FLOP and attention 1/2N, a hundredth of what norms and activations save: "selective"
cuts in that gap. The first norm's sum is the stream, of which one a block stays: the second norm is remade from it. A rotation
keeps nothing, as it turns the projection where it lies.

Each part is a `torch.utils.checkpoint` that ends in a linear layer. Recomputing stops when all that a part had saved is there
again, and a linear layer saves its input before it multiplies: so no product is done twice. Policies of operators
(`create_selective_checkpoint_contexts`) do not serve: they would keep a projection that attention then rotates in place, and
under their dispatch mode norms are plain torch instead of our kernels.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint

Mode = bool | Literal["selective"]


def check_mode(mode: Mode) -> None:
    """Raises ValueError unless `mode` is False, True or "selective"."""
    if not isinstance(mode, bool) and mode != "selective":
        raise ValueError(f"grad_checkpointing: expected False, True or 'selective', got {mode!r}")


def again(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which only the arguments are kept for the backward pass, where it is called again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
