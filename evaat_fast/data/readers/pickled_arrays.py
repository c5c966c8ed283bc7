"""What a pickle may build beside plain data: NumPy's arrays and scalars of numbers, from bytes that are checked first.

None of NumPy's own functions is called with what stands in a file: these stand in for them, and make the array at the end.
"""

import re
from typing import Any

import numpy as np

__all__ = ["Array", "Dtype", "Fault", "Global", "build", "kind_of", "reduce", "resolve"]

_NUMPY = re.compile(
    rb"numpy\._?core\.multiarray (_reconstruct|scalar)|numpy\._?core\.numeric (_frombuffer)|numpy (ndarray|dtype)"
    rb"|_codecs (encode)|(?:__builtin__|builtins) (bytes)"
)


class Fault(Exception):
    """What is wrong with a pickle, without its name."""


class Global:
    def __init__(self, name: str):
        self.name = name


class Dtype:
    """A dtype of booleans or numbers. `code`: as NumPy writes it, "f8", to which BUILD adds the byte order."""

    def __init__(self, code: str):
        self.code, self.order = code, "|"

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class Array:
    """What an array is built from."""

    def __init__(self) -> None:
        self.parts: tuple[Any, ...] | None = None

    def numpy(self) -> np.ndarray:
        if self.parts is None:
            raise Fault("an array without its data")
        raw, dtype, shape, order = self.parts
        return np.frombuffer(raw, dtype).reshape(shape, order=order)


def resolve(module: Any, name: Any) -> Global:
    """The stand-in of a global, or a Fault that names the one that is refused."""
    if not isinstance(module, bytes) or not isinstance(name, bytes):
        raise Fault("the file is damaged: a global's name is no string")
    known = _NUMPY.fullmatch(module + b" " + name)
    if known is None:
        shown = (module + b"." + name).decode("utf-8", "replace")[:80]
        raise Fault(f"refused: the file would call or build {shown!r}, and only plain data and NumPy arrays are read")
    return Global(next(filter(None, known.groups())).decode())


def reduce(function: Any, arguments: Any) -> Any:
    """What a REDUCE of a known global makes."""
    name = function.name if isinstance(function, Global) else None
    if name is None or type(arguments) is not tuple:
        raise Fault(f"the file is damaged: {kind_of(function)} is called")
    if name == "dtype" and arguments and isinstance(arguments[0], bytes):
        code = arguments[0].decode("ascii", "replace")
        if not re.fullmatch("[iu][1248]|f[248]|b1", code):
            raise Fault(f"refused: an array of {code!r}; expected numbers or booleans")
        return Dtype(code)
    if name == "_reconstruct":
        return Array()
    if name == "scalar" and len(arguments) == 2 and isinstance(arguments[0], Dtype):
        return np.frombuffer(_raw(arguments[1]), arguments[0].numpy())[0].item()
    if name == "encode" and len(arguments) == 2 and isinstance(arguments[0], bytes) and arguments[1] == b"latin1":
        return memoryview(arguments[0].decode().encode("latin1"))  # how protocols 0 to 2 hold bytes
    if name == "bytes" and not arguments:
        return memoryview(b"")  # how protocols 0 to 2 hold none
    if name == "_frombuffer" and len(arguments) == 4:
        array = Array()
        _fill(array, *arguments)
        return array
    raise Fault(f"the file is damaged: {name} is called with arguments that are not its own")


def build(target: Any, state: Any) -> None:
    """Gives a dtype its byte order, an array its data."""
    if isinstance(target, Dtype) and type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None):
        order = state[1].decode("ascii", "replace") if isinstance(state[1], bytes) else None
        if order in ("<", ">", "|", "="):
            target.order = order
            return
    elif isinstance(target, Array) and type(state) is tuple and len(state) == 5:
        _fill(target, state[4], state[2], state[1], b"F" if state[3] else b"C")
        return
    raise Fault(f"refused: a state for {kind_of(target)}; expected one of a NumPy array of numbers")


def _fill(array, raw, dtype, shape, order):
    if not isinstance(dtype, Dtype) or type(shape) is not tuple or order not in (b"F", b"C"):
        raise Fault("the file is damaged: an array without shape or dtype")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise Fault(f"the file is damaged: an array of shape {shape!r}")
    kind, cells = dtype.numpy(), 1
    for n in shape:
        cells *= n
    raw = _raw(raw)
    if len(raw) != cells * kind.itemsize:
        raise Fault(f"the file is damaged: an array of shape {shape} in {len(raw)} bytes")
    array.parts = raw, kind, shape, order.decode()


def _raw(value):
    if not isinstance(value, memoryview):
        raise Fault(f"the file is damaged: expected bytes of an array, got {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What an object is, for a message."""
    if isinstance(value, (Global, Dtype, Array)):
        return {"Global": "a function", "Dtype": "a dtype", "Array": "an array"}[type(value).__name__]
    return "a string" if isinstance(value, bytes) else f"a {type(value).__name__}"
