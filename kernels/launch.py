"""What launchers ask of a tensor's device."""

import contextlib

import torch


def on(tensor):
    """The device of a launch as a context."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def generation(tensor):
    """8 for Ampere and Ada, 9 for Hopper, 10 and more for Blackwell; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9
