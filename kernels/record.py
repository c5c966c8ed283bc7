"""What a function launches, kept: a step of a small batch takes as long as Python does to decide its launches.

Under a key that tells all it decides by, they are the same each time but for the addresses of tensors, which are kept as places
in the inputs and in what is allocated; `replay.Recorded` launches them anew.
"""

import struct

import torch
from evaat_fast.kernels.launch import RECORDING, at, compiled_by, is_watched
from evaat_fast.kernels.replay import Number, Recorded, launcher, operator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.runtime import driver

_ALIGNED = 16  # bytes
_APART = 256  # bytes, of what shares an allocation
# Of batches of a thousand sizes there are as many, and it begins anew.
_KEPT: dict[tuple, Recorded | None] = {}
_MOST_KEPT = 1024
_UNKNOWN = object()
_MOST_PARTS = 64  # of launches and operators; of more, a device has more to do than Python


def again(key, inputs, function):
    """function(), a tuple of new tensors, or what it launched under this key with tensors as these, launched for these.

    key: hashable, tells with the dtypes, shapes and strides of the inputs all that the function decides by; inputs: all tensors
    that it reads, or None. The function launches by `launch`, and may call torch's operators on tensors, but not read numbers.
    """
    if launcher() is None or is_watched():
        return function()
    addresses, known, low, tensors = [], [key, *compiled_by()], 0, [x for x in inputs if x is not None]
    for x in inputs:
        if x is None:
            known.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            low |= address
            known += (x.dtype, x.shape, x.stride())
    if low % _ALIGNED:  # kernels are compiled for what is aligned
        known.append(("aligned", *[x % _ALIGNED == 0 for x in addresses]))
    if len(set(addresses)) < len(addresses):  # which are alike
        known.append(("alike", *map(addresses.index, addresses)))
    index = tensors[0].get_device()
    known.append(index)
    known = tuple(known)
    recorded = _KEPT.get(known, _UNKNOWN)
    if recorded is _UNKNOWN:
        made, recorded = _record(function, tensors)
        if len(_KEPT) >= _MOST_KEPT:
            _KEPT.clear()
        _KEPT[known] = recorded
        return made
    made = None
    if recorded is not None:
        with at(index):
            made = recorded.replay(tensors, addresses, driver.active.get_current_stream(index))
    return function() if made is None else made  # which says what the driver lacks


def _record(function, tensors):
    recorder = _Recorder(tensors)
    RECORDING.by = recorder
    try:
        with recorder:
            made = function()
    finally:
        RECORDING.by = None
    return made, recorder.recorded(made)


class _Recorder(TorchDispatchMode):
    """Sees every operator and every launch of a function."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.kernels = inputs, []
        self.whole = True  # as long as all of it can be replayed
        self.parts = []  # (operator, arguments, options, result's storage or None), or what `Launches` takes of a launch
        self.storages = {}  # address: a tensor that keeps what lies there, of what is no input's
        self.operands = {}  # address of a storage: the tensors in it that operators are given
        self.results = []  # addresses of what operators make

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        found = function(*arguments, **options)
        given = [*arguments, *options.values()]
        tensors = [x for x in given if isinstance(x, Tensor)]
        if not self.whole or function.is_view or "empty" in function.name() or not (tensors or isinstance(found, Tensor)):
            return found
        tags = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.nondeterministic_seeded
        nested = any(isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x) for x in given)
        if nested or not isinstance(found, Tensor) or any(tag in function.tags for tag in tags):
            self._refuse()
            return found
        for x in tensors:
            self._place(x)
            self.operands.setdefault(_storage(x), []).append(x)
        result = None
        if _storage(found) not in map(_storage, tensors):  # else it is written into
            result = _storage(found)
            self.storages[result] = found
            self.results.append(result)
        self.parts.append((function, arguments, options, result))
        return found

    def _refuse(self):
        """And lets go of what is held."""
        self.whole = False
        for held in (self.parts, self.storages, self.operands, self.kernels):
            held.clear()

    def launched(self, compiled, grid, arguments):
        """compiled: None for a launch that cannot be kept."""
        if not self.whole or len(self.parts) >= _MOST_PARTS or not _is_simple(compiled):
            self._refuse()
            return
        values, places = [], []
        for kind, x in _flat(compiled.src.signature.values(), arguments):
            if kind[0] == "*" and isinstance(x, Tensor):
                self._place(x)
                places.append((len(values), x))
                values.append(0)
            elif kind == "fp32":
                values.append(int.from_bytes(struct.pack("<f", x), "little"))
            elif kind[0] in "iu" and isinstance(x, int):
                values.append(x & (1 << 64) - 1)
            else:
                self._refuse()
                return
        values += (0, 0)  # scratch memory, of which simple kernels have none
        warps, _, shared = compiled.packed_metadata
        self.parts.append((compiled.function, (*grid, 1, 1)[:3], 32 * warps, shared, values, places))
        self.kernels.append(compiled)

    def _place(self, x):
        """(an input's number or the address of another storage, bytes from there) of where x begins."""
        address, storage = x.data_ptr(), _storage(x)
        inside = {y.data_ptr(): i for i, y in reversed(list(enumerate(self.inputs))) if _storage(y) == storage}
        if address in inside:
            return Number(inside[address]), 0
        if inside:
            (begin, number), *others = inside.items()
            self.whole = self.whole and not others and begin <= address  # else it is not known of which one it is a part
            return Number(number), max(address - begin, 0)
        self.storages.setdefault(storage, x)
        return storage, address - storage

    def recorded(self, outputs):
        """A `Recorded` of what was seen, None where it cannot be."""
        for x in outputs:
            self._place(x)
        ends = [_storage(x) if x.numel() else None for x in outputs]
        known = all(x is None or (x in self.storages and x not in self.results and ends.count(x) == 1) for x in ends)
        if not (self.whole and self.kernels and known and all(x.is_contiguous() and not x.storage_offset() for x in outputs)):
            return None
        allocations, shared, begins = [_like(x) for x in outputs], 0, {}  # begins: a storage's number, and bytes from there
        first = len(self.inputs)
        begins |= {storage: (first + i, 0) for i, storage in enumerate(ends)}
        others = [x for x in self.storages if x not in begins and x not in self.results]
        for storage in [x for x in others if x in self.operands]:
            begins[storage] = first + len(allocations), 0
            allocations.append(_like(_whole(self.operands[storage])))
        for storage in [x for x in others if x not in self.operands]:  # one allocation for all that torch is not given
            begins[storage] = first + len(allocations), shared
            shared += -(-self.storages[storage].untyped_storage().nbytes() // _APART) * _APART
        allocations += [((shared,), (1,), torch.uint8)] if shared else []
        begins |= {storage: (first + len(allocations) + i, 0) for i, storage in enumerate(self.results)}
        tensors = [*map(_like, self.inputs), *allocations, *(_like(self.storages[x]) for x in self.results)]
        views, parts, waiting = [], [], []

        def begin(x):
            at, offset = self._place(x)
            return (at, offset) if type(at) is Number else (begins[at][0], begins[at][1] + offset)

        def numbered(x):
            if not isinstance(x, Tensor):
                return x
            number, offset = begin(x)
            shape, strides, dtype = _like(x)
            if (shape, strides, dtype) == tensors[number] and not offset:
                return Number(number)
            # An input's place in its own storage may be another next time; what an operator makes comes after the views.
            kept = number < first and offset or number >= first + len(allocations)
            self.whole = self.whole and dtype == tensors[number][2] and not kept
            view = number, shape, strides, x.storage_offset() if offset else None
            views.extend([view] if view not in views else [])
            return Number(len(tensors) + views.index(view))

        for part in self.parts:
            if callable(part[0]):
                function, arguments, options, result = part
                parts += [(False, launcher()(waiting))] if waiting else []
                waiting = []
                options = {name: numbered(x) for name, x in options.items()}
                result = None if result is None else begins[result][0]
                parts.append((True, operator(function, [numbered(x) for x in arguments], options, result)))
            else:
                *of, places = part
                waiting.append((*of, [(parameter, *begin(x)) for parameter, x in places]))
        parts += [(False, launcher()(waiting))] if waiting else []
        if not self.whole:
            return None
        device = self.inputs[0].device
        return Recorded(allocations, len(outputs), len(self.results), views, device, parts, self.kernels)


def _like(x):
    return tuple(x.shape), x.stride(), x.dtype


def _whole(operands):
    """A storage as one of these tensors has it, or flat."""
    for x in operands:
        if x.is_contiguous() and x.numel() * x.element_size() == x.untyped_storage().nbytes():
            return x
    x = operands[0]
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _storage(x):
    return x.untyped_storage().data_ptr()


def _is_simple(compiled):
    """Whether all there is to a launch are its parameters, grid, threads and shared memory."""
    if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return False
    more = "launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "tensordesc_meta"
    # Before Triton 3.6 there are clusters among them.
    plain = len(compiled.packed_metadata) == 3 and compiled.packed_metadata[1] == 1
    return plain and not any(getattr(compiled.metadata, name, None) for name in more)


def _flat(kinds, arguments):
    """(type, argument) of each parameter; a constant is none."""
    for kind, x in zip(kinds, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, x)
        elif kind != "constexpr":
            yield kind, x
