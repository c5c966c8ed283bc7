"""What autocast asks of an op, in a form that Dynamo can trace: torch 2.11 cannot trace torch.amp.is_autocast_available."""

import contextlib

import torch

_DEVICES = frozenset(d for d in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes products in on a device of this type, None where it is off."""
    if device_type not in _DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which products have the dtype of what is multiplied."""
    return torch.autocast(device_type, enabled=False) if device_type in _DEVICES else contextlib.nullcontext()
