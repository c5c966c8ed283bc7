"""The norms in Triton: the launchers, as `function.py` calls them."""

from evaat_fast.kernels.norm import add, swiglu

__all__ = ["add", "swiglu"]
