"""What launchers ask of a tensor."""

import contextlib

import torch


def on(device):
    """A launch's device as a context."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def generation(device):
    """8 for Ampere and Ada, 9 for Hopper, 10 and more for Blackwell; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def table_strides(table):
    """Of a table [2, 1 or B, 1 or H, ..] of cosines and sines: the way to the sines, and the strides of clips and heads, 0
    where there is one for all."""
    return table.stride(0), *(table.stride(i) if table.shape[i] > 1 else 0 for i in (1, 2))
