"""What launchers ask of a tensor, what travels together into a kernel as one named tuple, and the launch itself."""

import contextlib
import threading
from collections import namedtuple
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

# A tensor [B, H, N, ..] with a contiguous last dimension: its address, and the strides of clips, heads and tokens.
Rows = namedtuple("Rows", "at b h n")

# Cosines, then sines [2, 1 or B, 1 or H, N, D/2]: their address, the way to the sines, and the strides of clips and heads, 0
# where there is one for all.
Table = namedtuple("Table", "at half b h")

# An option of every launch: a product and a sum are one instruction. Triton has it off by default from 3.10 on, and 3.9 warns
# of that.
FUSED = {"enable_fp_fusion": True}


class _Recording(threading.local):
    """by: what is told of each launch of this thread, (compiled or None, grid, all arguments), or None."""

    by = None


RECORDING = _Recording()
_HERE = contextlib.nullcontext()
_CONSTANTS: dict[int, tuple] = {}  # the tuples that `constants` made, by their ids
# What a launch was compiled to, and the constants behind its arguments, by all that decides it. Of batches of a thousand sizes
# there are as many, and it begins anew.
_KEPT: dict[tuple, tuple] = {}
_MOST_KEPT = 4096


def cdiv(a, b):
    """triton.cdiv is a function of constants, too, and takes 2 us, as next_power_of_2 does."""
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def table_of(x):
    if x is None:
        return None
    (half, b, h, *_), (_, clips, heads, *_) = x.stride(), x.shape
    return Table(x, half, b if clips > 1 else 0, h if heads > 1 else 0)


@lru_cache(maxsize=None, typed=True)
def constants(kind, *values):
    """A named tuple of what a kernel is compiled for. Kept, since making it takes as long as half a launch."""
    made = kind(*map(tl.constexpr, values))
    _CONSTANTS[id(made)] = made
    return made


def at(index):
    """A launch's device as a context; negative: the CPU."""
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def launch(kernel, grid, arguments, options):
    """kernel[grid](*arguments, **options), where the tensors are.

    Triton binds the arguments of each call, finds out what of them it compiles for, and looks that up: 7 us of a launch's 9.
    Here a call whose dtypes, integers and constants were seen before is told by these alone, and what it was compiled to is
    launched as it is, by which hooks of profilers are called, too.

    arguments: tensors, descriptors, numbers, None, what `constants` made, and named tuples of these, the kernel's first ones;
    options: its constants in their order, and Triton's.
    """
    kinds, tensors = [id(kernel), *options.values()], []
    plain = _is_plain(kernel)
    known = _describe(arguments, kinds, tensors) and plain
    index = tensors[0].get_device()
    with at(index):
        key = (index, *compiled_by(), *kinds) if known else None
        kept = _KEPT.get(key)
        if kept is not None:
            compiled, rest = kept
            compiled[(*grid, 1, 1)](*arguments, *rest)
        else:
            assert "enable_fp_fusion" in options  # of which versions of Triton think differently
            compiled = kernel[grid](*arguments, **options)
            # Interpreted kernels are none; those of other vendors are compiled for sizes in bytes, too.
            plain = plain and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"
            rest = tuple(options[name] for name in kernel.arg_names[len(arguments) :]) if plain else ()
            if known and plain:
                if len(_KEPT) >= _MOST_KEPT:
                    _KEPT.clear()
                _KEPT[key] = compiled, rest
    if RECORDING.by is not None:
        RECORDING.by.launched(compiled if plain else None, grid, (*arguments, *rest))


# Knobs that decide what a kernel is compiled to, where a version of Triton has them.
_COMPILED_BY = ("instrumentation_mode", "fpsan_homomorphic_casts")


def compiled_by():
    return (knobs.runtime.debug, *(getattr(knobs.compilation, name, None) for name in _COMPILED_BY))


def _is_plain(kernel):
    """Whether nobody looks on as a kernel is bound or compiled."""
    if knobs is None or getattr(kernel, "pre_run_hooks", True):
        return False
    return getattr(knobs.runtime, "add_stages_inspection_hook", None) is None


def is_watched():
    """Whether somebody looks on as any kernel is compiled or launched: a profiler by Triton's hooks, say."""
    if knobs is None or getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return True
    return any(
        x is not None and getattr(x, "calls", True) for x in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    )


def _describe(arguments, kinds, tensors):
    """Whether what is put into kinds tells all of the arguments: not where one does not lie at a multiple of 16 bytes, which is
    rare, and for which Triton compiles another kernel."""
    told = True
    for x in arguments:
        kind = type(x)
        if x is None or kind is int:
            kinds.append(x)
        elif kind is bool:  # equal to a number, and compiled otherwise
            kinds += (bool, x)
        elif isinstance(x, Tensor):
            tensors.append(x)
            kinds.append(x.dtype)
            if x.data_ptr() % 16:
                told = False
        elif id(x) in _CONSTANTS:
            kinds.append(id(x))
        elif isinstance(x, tuple):
            kinds.append(len(x))
            told = _describe(x, kinds, tensors) and told
        elif kind is float:
            kinds.append(kind)
        elif hasattr(x, "block_shape"):  # a descriptor of TMA
            tensors.append(x.base)
            kinds += (x.base.dtype, *x.block_shape, x.padding, getattr(x, "layout", None))
        else:
            told = False
    return told


@lru_cache(maxsize=64)
def multiprocessors(device):
    """2 in the interpreter, so that there are sums to be added up."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@lru_cache(maxsize=64)
def generation(device):
    """8 for Ampere and Ada, 9 for Hopper, 10 and more for Blackwell; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
