"""What launchers ask of a tensor, and what travels together into a kernel as one named tuple."""

import contextlib
from collections import namedtuple
from functools import lru_cache

import torch
import triton.language as tl

# A tensor [B, H, N, ..] with a contiguous last dimension: its address, and the strides of clips, heads and tokens.
Rows = namedtuple("Rows", "at b h n")

# Cosines, then sines [2, 1 or B, 1 or H, N, D/2]: their address, the way to the sines, and the strides of clips and heads, 0
# where there is one for all.
Table = namedtuple("Table", "at half b h")

# An option of every launch: a product and a sum are one instruction. Triton has it off by default from 3.10 on, and 3.9 warns
# of that.
FUSED = {"enable_fp_fusion": True}


def table_of(x):
    return None if x is None else Table(x, x.stride(0), *(x.stride(i) if x.shape[i] > 1 else 0 for i in (1, 2)))


@lru_cache(maxsize=256, typed=True)
def constants(kind, *values):
    """A named tuple of what a kernel is compiled for. Kept, since making it takes as long as half a launch."""
    return kind(*map(tl.constexpr, values))


def on(device):
    """A launch's device as a context."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@lru_cache(maxsize=64)
def multiprocessors(device):
    """2 in the interpreter, so that there are sums to be added up."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def generation(device):
    """8 for Ampere and Ada, 9 for Hopper, 10 and more for Blackwell; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
