"""What a function launched, launched again for other tensors: C++ puts their addresses into parameters that are kept.

`record.again` makes a `Recorded` and replays it. Replaying works alike in a capture of a CUDA graph, on any stream and in any
number of threads at once.
"""

import ctypes
import functools

import torch


@functools.cache
def launcher():
    """What makes launches of a list of them; None where there is no driver, or no C++."""
    try:
        from evaat_fast import _cpu

        address = ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value
        return functools.partial(_cpu.Launches, address)
    except (ImportError, OSError, AttributeError):
        return None


class Recorded:
    """What is made and called, of numbered tensors: the inputs, the allocations, results of operators, and views.

    allocations: (shape, strides, dtype), the outputs first; results: how many; views: (number, shape, strides, storage offset);
    parts: pairs of whether it is an operator of torch, a function of tensors and addresses, else launches.
    """

    def __init__(self, allocations, outputs, results, views, device, parts, kernels):
        self._allocations, self._outputs, self._device = allocations, outputs, device
        self._later, self._views, self._parts = [None] * results, views, parts
        self._kernels = kernels  # which must stay loaded
        self._functions = list({id(kernel.src.fn): kernel.src.fn for kernel in kernels}.values())

    def replay(self, inputs, addresses, stream):
        """The outputs; None where the driver refuses, or somebody looks on."""
        for function in self._functions:
            if function.pre_run_hooks:
                return None
        device = self._device
        made = [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self._allocations]
        addresses += [x.data_ptr() for x in made]
        tensors = inputs + made
        if self._later:
            addresses += [0] * len(self._later)
            tensors += self._later
        for number, *view in self._views:
            tensors.append(tensors[number].as_strided(*view))
        for is_operator, part in self._parts:
            if is_operator:
                part(tensors, addresses)
            elif part(stream, addresses):
                return None
        return tuple(made[: self._outputs])


class Number(int):
    """Stands for a tensor among an operator's arguments."""


def operator(function, arguments, options, result):
    """A call of an operator, as a function of all tensors and addresses. result: the number of what it makes, or None."""
    if function.name() in ("aten::mm.out", "aten::mm.dtype_out"):  # torch.mm itself takes 3 us less
        (a, b, *dtype), out = arguments, options["out"]
        named = {"out_dtype": dtype[0]} if dtype else {}
        assert list(options) == ["out"]
        return lambda tensors, addresses: torch.mm(tensors[a], tensors[b], out=tensors[out], **named)

    def call(tensors, addresses):
        given = [tensors[x] if type(x) is Number else x for x in arguments]
        made = function(*given, **{name: tensors[x] if type(x) is Number else x for name, x in options.items()})
        if result is not None:
            tensors[result], addresses[result] = made, made.data_ptr()

    return call
