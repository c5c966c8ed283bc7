"""What a function launched, kept, and launched again for other tensors: C++ puts their addresses into parameters made before.

A step of a small batch is a dozen launches and as many allocations, and takes as long as Python does to decide them. Under a key
that tells all it decides by, they are the same each time but for the addresses of tensors: these are kept as places in the
inputs and in what is allocated. It works alike in a capture of a CUDA graph, on any stream and in any thread.
"""

import ctypes
import functools
import struct
from collections import namedtuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.runtime import driver

from evaat_fast.kernels.launch import RECORDING, at, compiled_by, is_watched

_ALIGNED = 16  # bytes, of all addresses: what kernels are compiled for
_APART = 256  # bytes, of what shares an allocation
# Of as many keys as batches have sizes; then it begins anew.
_KEPT: dict[tuple, "Recorded | None"] = {}
_MOST_KEPT = 1024
_UNKNOWN = object()

# A tensor as a view of a numbered one: (number, None), the whole, or (number, (shape, strides, storage offset)).
View = namedtuple("View", "number strided")

# An operator of torch: what it is called with, tensors as views; the number of its result, None for one that it writes into.
Called = namedtuple("Called", "function arguments options result")


@functools.cache
def launcher():
    """What makes launches of a list of them, None where there is no driver or no C++."""
    try:
        from evaat_fast import _cpu

        address = ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value
    except (ImportError, OSError, AttributeError):
        return None
    return functools.partial(_cpu.Launches, address)


def again(key, inputs, function):
    """function(), a tuple of new tensors, or what it launched under this key with tensors as these, launched for these.

    key: hashable, tells with the dtypes, shapes and strides of the inputs all that the function decides by; inputs: all tensors
    that it reads, or None. The function launches by `launch`, and may call torch's operators on tensors, but not read numbers.
    """
    if launcher() is None or is_watched():
        return function()
    tensors = [x for x in inputs if x is not None]
    addresses = [x.data_ptr() for x in tensors]
    alike = len(set(addresses)) == len(addresses) or tuple(map(addresses.index, addresses))
    index = tensors[0].get_device()
    known = [None if x is None else (x.dtype, x.shape, x.stride()) for x in inputs]
    key = (key, index, alike, *compiled_by(), *known)
    recorded = _KEPT.get(key, _UNKNOWN)
    if recorded is None or any(x % _ALIGNED for x in addresses):
        return function()
    if recorded is not _UNKNOWN:
        with at(index):
            made = recorded.replay(tensors, addresses, driver.active.get_current_stream(index))
        if made is not None:
            return made
        return function()  # which says what the driver lacks
    recorder = _Recorder(tensors)
    RECORDING.by = recorder
    try:
        with recorder:
            made = function()
    finally:
        RECORDING.by = None
    if len(_KEPT) >= _MOST_KEPT:
        _KEPT.clear()
    _KEPT[key] = recorder.recorded(made)
    return made


class Recorded:
    """allocations: (shape, dtype) of what is made, the outputs first; parts: launches, and what is called of torch between."""

    def __init__(self, allocations, outputs, device, parts, kernels):
        self._allocations, self._outputs, self._device, self._parts = allocations, outputs, device, parts
        self._kernels = kernels  # which must stay loaded

    def replay(self, inputs, addresses, stream):
        """The outputs; None where the driver refuses."""
        device, outputs = self._device, self._outputs
        if any(kernel.src.fn.pre_run_hooks for kernel in self._kernels):
            return None
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._allocations]
        tensors = inputs + made
        addresses += [x.data_ptr() for x in made]
        for part in self._parts:
            if type(part) is not Called:
                if part(stream, addresses):
                    return None
                continue
            function, arguments, options, result = part
            given = [_viewed(x, tensors) if type(x) is View else x for x in arguments]
            found = function(*given, **{name: _viewed(x, tensors) if type(x) is View else x for name, x in options})
            if result is not None:
                assert len(tensors) == result
                tensors.append(found)
                addresses.append(found.data_ptr())
        return tuple(made[:outputs])


def _viewed(view, tensors):
    number, strided = view
    return tensors[number] if strided is None else tensors[number].as_strided(*strided)


class _Recorder(TorchDispatchMode):
    """Sees every operator and every launch of a function; `whole` while all of it can be replayed."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.whole, self.parts, self.kernels = inputs, True, [], []
        self.storages = {}  # address -> (number, a tensor that keeps it)
        self.used = {}  # number -> tensors as operators are given them

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        found = function(*arguments, **options)
        if function.is_view or function.namespace != "aten" or "empty" in function.name():
            self.whole = self.whole and function.namespace == "aten"
            return found
        if not isinstance(found, Tensor) and not any(isinstance(x, Tensor) for x in (*arguments, *options.values())):
            return found  # of dtypes, say
        tags = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded
        if not isinstance(found, Tensor) or any(tag in function.tags for tag in tags):
            self.whole = False
            return found
        given = [self._operand(x) for x in arguments], [(name, self._operand(x)) for name, x in options.items()]
        writes = any(x.alias_info is not None and x.alias_info.is_write for x in function._schema.arguments)
        result = None
        if not writes:
            result = self._number(found)
            self.used[result] = [found]
        self.parts.append(Called(function, *given, result))
        return found

    def launched(self, compiled, grid, arguments):
        """compiled: None for a launch that cannot be kept."""
        if not _is_simple(compiled):
            self.whole = False
            return
        values, places = [], []
        for kind, x in _flat(compiled.src.signature.values(), arguments):
            if kind[0] == "*" and isinstance(x, Tensor):
                places.append((len(values), *self._place(x)))
                values.append(0)
            elif kind == "fp32":
                values.append(int.from_bytes(struct.pack("<f", x), "little"))
            elif kind[0] in "iu" and isinstance(x, int):
                values.append(x & (1 << 64) - 1)
            else:
                self.whole = False
                return
        values += (0, 0)  # scratch memory, which simple kernels have none of
        warps, _, shared = compiled.packed_metadata
        self.parts.append((compiled.function, (*grid, 1, 1)[:3], 32 * warps, shared, values, places))
        self.kernels.append(compiled)

    def _place(self, x):
        """(number, bytes) of where x begins."""
        address = x.data_ptr()
        exact = next((i for i, y in enumerate(self.inputs) if y.data_ptr() == address), None)
        if exact is not None:
            return exact, 0
        storage = x.untyped_storage().data_ptr()
        inside = {y.data_ptr(): i for i, y in reversed(list(enumerate(self.inputs))) if _storage(y) == storage}
        if inside:
            begin, number = next(iter(inside.items()))
            self.whole = self.whole and len(inside) == 1 and begin <= address  # else it is not known of which one it is a part
            return number, max(address - begin, 0)
        return self._number(x), address - storage

    def _number(self, x):
        number, _ = self.storages.setdefault(_storage(x), (len(self.inputs) + len(self.storages), x))
        return number

    def _operand(self, x):
        if not isinstance(x, Tensor):
            if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
                self.whole = False
            return x
        number, offset = self._place(x)
        if number < len(self.inputs):
            of = self.inputs[number]
            same = (of.shape, of.stride(), of.dtype) == (x.shape, x.stride(), x.dtype) and not offset
            self.whole = self.whole and of.dtype == x.dtype
        else:
            same = False
            self.used.setdefault(number, []).append(x)
        return View(number, None if same else (tuple(x.shape), x.stride(), x.storage_offset()))

    def recorded(self, outputs):
        """A `Recorded` of what was seen, None where it cannot be."""
        ends = [self.storages.get(_storage(x), (None,))[0] if x.numel() else -1 - i for i, x in enumerate(outputs)]
        whole = all(x.is_contiguous() and not x.storage_offset() for x in outputs)
        if not self.whole or not whole or None in ends or len(set(ends)) < len(ends) or not self.kernels:
            return None
        results = [part.result for part in self.parts if isinstance(part, Called) and part.result is not None]
        if set(ends) & set(results):
            return None
        return _Layout(self, outputs, ends, results).made()


class _Layout:
    """Gives numbers to allocations: those of outputs, those that torch's operators read, one for all others, and results."""

    def __init__(self, recorder, outputs, ends, results):
        self.recorder, first = recorder, len(recorder.inputs)
        held = {number: x for number, x in recorder.storages.values() if number not in results}
        self.numbers = {i: (i, 0) for i in range(first)}  # -> number, bytes
        self.allocations, self.outputs = [(tuple(x.shape), x.dtype) for x in outputs], len(outputs)
        self.shapes = {number: tuple(x.shape) for number, x in zip(ends, outputs, strict=True)}
        self.numbers |= {number: (first + i, 0) for i, number in enumerate(ends)}
        for number in [x for x in recorder.used if x in held and x not in self.shapes]:
            x = self._whole(number)
            self.numbers[number], self.shapes[number] = (first + len(self.allocations), 0), tuple(x.shape)
            self.allocations.append((tuple(x.shape), x.dtype))
        size = 0
        for number in [x for x in held if x not in self.numbers]:
            self.numbers[number] = first + len(self.allocations), size
            size += -(-held[number].untyped_storage().nbytes() // _APART) * _APART
        if size:
            self.allocations.append(((size,), torch.uint8))
        self.numbers |= {number: (first + len(self.allocations) + i, 0) for i, number in enumerate(results)}
        self.shapes |= {number: tuple(recorder.used[number][0].shape) for number in results}

    def _whole(self, number):
        """The storage as an operator was given it, or flat."""
        for x in self.recorder.used[number]:
            if x.is_contiguous() and x.numel() * x.element_size() == x.untyped_storage().nbytes():
                return x
        x = self.recorder.used[number][0]
        return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)

    def made(self):
        parts, waiting, make = [], [], launcher()
        for part in self.recorder.parts:
            if isinstance(part, Called):
                parts += [make(waiting)] if waiting else []
                waiting = []
                arguments = [self._view(x) for x in part.arguments]
                options = [(name, self._view(x)) for name, x in part.options]
                result = None if part.result is None else self.numbers[part.result][0]
                parts.append(Called(part.function, arguments, options, result))
            else:
                *known, places = part
                waiting.append((*known, [(i, *self._at(number, offset)) for i, number, offset in places]))
        parts += [make(waiting)] if waiting else []
        device = self.recorder.inputs[0].device
        return Recorded(self.allocations, self.outputs, device, parts, self.recorder.kernels)

    def _at(self, number, offset):
        new, begin = self.numbers[number]
        return new, begin + offset

    def _view(self, x):
        if not isinstance(x, View):
            return x
        new, strided = self.numbers[x.number][0], x.strided
        if strided is not None and x.number in self.shapes:
            shape = self.shapes[x.number]
            whole = strided == (shape, torch.empty(shape, device="meta").stride(), 0)
            strided = None if whole else strided
        return View(new, strided)


def _storage(x):
    return x.untyped_storage().data_ptr()


def _is_simple(compiled):
    """Whether all there is to a launch are its parameters, grid, threads and shared memory."""
    if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return False
    more = "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "tensordesc_meta"
    return compiled.packed_metadata[1] == 1 and not any(getattr(compiled.metadata, name, None) for name in more)


def _flat(kinds, arguments):
    """(type, argument) of each parameter; a constant is none."""
    for kind, x in zip(kinds, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, x)
        elif kind != "constexpr":
            yield kind, x
