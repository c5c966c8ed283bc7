"""Reads pickles of plain data without running any of them: lists, tuples, dicts, str, int, float, None, bool, and NumPy arrays.

    for rows in batches("ego4d_train.pkl"): ...     # the items of one large list, some at a time
    load("caption_relevancy_EPIC_100_retrieval_test.pkl")   # all of a small one; an array is mapped, not copied

Python's own unpickler calls what a file names. This one has no call to make: its globals are the few names that NumPy's
arrays and scalars are pickled with, each answered by a function below, and any other is refused by its name. It also holds
no more than it was asked for: items are handed on as their list grows, what the memo keeps of a string is where in the file
it stands, and no length that a file states is believed beyond the file's end.

Source: the opcodes of protocols 0 to 5 as `pickletools` of Python's standard library describes them.
"""

import mmap
import os
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaat_fast.data.readers.pickled_arrays import Array, Dtype, Fault, Global, build, kind_of, reduce, resolve

__all__ = ["batches", "load"]

_KEPT = 1 << 17  # lists and tuples that can be referred to again: all of a small file's, a large one's latest
_FLOATS = re.compile(rb"(?:G.{8}){1,64}", re.DOTALL)
_DOUBLES = [struct.Struct(">" + "xd" * count).unpack_from for count in range(65)]
_COUNT = struct.Struct("<I").unpack_from
_REFUSED = {
    b"i": "INST", b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4",
    b"P": "PERSID", b"Q": "BINPERSID", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
}  # fmt: skip
# How the length is written: of BINUNICODE (also SHORT_ and 8), BINSTRING, SHORT_BINSTRING; of BINBYTES (SHORT_, 8), BYTEARRAY8.
_STRINGS = {0x58: "<I", 0x8C: "<B", 0x8D: "<Q", 0x54: "<I", 0x55: "<B"}
_BYTES = {0x42: "<I", 0x43: "<B", 0x8E: "<Q", 0x96: "<Q"}
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}


def load(path: str | os.PathLike[str]) -> Any:
    """The object of a pickle. str for strings, and an array that is mapped from the file where it holds one.

    Args:
        path: of a file that `pickle.dump` wrote.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, cut short, or of more than plain data; names what and where.
    """
    *_, (_, result) = _guarded(Path(path), drain=False)
    try:
        return _text(result)
    except RecursionError:
        raise ValueError(f"{path}: lists within lists, deeper than data is") from None
    except (Fault, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def batches(path: str | os.PathLike[str]) -> Iterator[list[Any]]:
    """The items of a pickled list, in order, as lists of them. Strings are bytes in UTF-8, not yet checked to be that.

    Args, Raises: as `load`; ValueError also where the pickle is no list.
    """
    for rows, result in _guarded(Path(path), drain=True):
        if rows is None and not isinstance(result, list):
            raise ValueError(f"{path}: expected a pickled list, got {kind_of(result)}")
        if some := result if rows is None else rows:
            yield some


def _guarded(path, drain):
    if not path.is_file():
        raise FileNotFoundError(f"annotations: there is no file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected a pickle, got an empty file")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last array that is mapped from it
    machine = _Machine(data)
    try:
        yield from machine.run(drain)
    except Fault as fault:
        raise ValueError(f"{path}: byte {machine.at}: {fault}") from None
    except (IndexError, struct.error):
        said = "the file is damaged or cut short: an opcode finds less than it needs"
        raise ValueError(f"{path}: byte {machine.at} of {len(data)}: {said}") from None
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: byte {machine.at}: the file is damaged: {said}") from None


class _Machine:
    """The stack machine that a pickle is a program for. `at`: about where it stopped."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0
        self.memo = array("q")  # from 0: where a string begins; -1: nothing; below: -2 - number of an object in `kept`
        self.kept: list[Any] = []
        self.dropped = 0  # of those that were kept before

    def run(self, drain: bool) -> Iterator[tuple[list[Any] | None, Any]]:
        """Yields (items of the outermost list so far, None), emptying it, where `drain`; last (None, the result)."""
        at = 0
        try:
            stack: list[Any] = []
            marks: list[list[Any]] = []
            last = -1  # where the string on top of the stack stands, -1 for another object
            data, memo, size = self.data, self.memo, len(self.data)
            while True:
                op = data[at]
                if op == 0x8C:  # SHORT_BINUNICODE, mostly one of several, each with its MEMOIZE
                    while op == 0x8C:
                        last = at
                        at += 2 + data[at + 1]
                        stack.append(data[last + 2 : at])
                        op = data[at]
                        if op == 0x94:
                            memo.append(last)
                            at += 1
                            op = data[at]
                elif op == 0x58:  # BINUNICODE, the same with LONG_BINPUT
                    while op == 0x58:
                        last = at
                        at += 5 + _COUNT(data, at + 1)[0]
                        stack.append(data[last + 5 : at])
                        op = data[at]
                        if op == 0x72 and _COUNT(data, at + 1)[0] == len(memo):
                            memo.append(last)
                            at += 5
                            op = data[at]
                elif op == 0x94:  # MEMOIZE
                    at += 1
                    memo.append(last if last >= 0 else self._keep(stack[-1]))
                elif op == 0x71 or op == 0x72:  # BINPUT, LONG_BINPUT
                    slot, at = (data[at + 1], at + 2) if op == 0x71 else (_COUNT(data, at + 1)[0], at + 5)
                    self._put(slot, at, last if last >= 0 else self._keep(stack[-1]))
                elif op == 0x47:  # BINFLOAT, mostly one of several
                    end = _FLOATS.match(data, at)
                    if end is None:
                        raise IndexError
                    count = (end.end() - at) // 9
                    stack.extend(_DOUBLES[count](data, at))
                    at, last = end.end(), -1
                elif op == 0x28:  # MARK
                    at += 1
                    marks.append(stack)
                    stack, last = [], -1
                elif op == 0x65 or op == 0x61:  # APPENDS, APPEND
                    if op == 0x65:
                        items, stack = stack, marks.pop()
                    else:
                        items = [stack.pop()]
                    at, last = at + 1, -1
                    target = stack[-1]
                    if type(target) is not list:
                        raise Fault(f"items are appended to {kind_of(target)}")
                    target.extend(items)
                    if drain and len(stack) == 1 and not marks:
                        yield target.copy(), None
                        target.clear()
                        if len(self.kept) > _KEPT:
                            self.dropped += len(self.kept)
                            self.kept.clear()
                elif op == 0x5D:  # EMPTY_LIST
                    at, last = at + 1, -1
                    stack.append([])
                elif op == 0x74:  # TUPLE
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                    at, last = at + 1, -1
                elif op == 0x68 or op == 0x6A:  # BINGET, LONG_BINGET
                    slot, at = (data[at + 1], at + 2) if op == 0x68 else (_COUNT(data, at + 1)[0], at + 5)
                    stack.append(self._kept(memo[slot]))
                    last = max(memo[slot], -1)
                elif op == 0x95:  # FRAME, whose opcodes follow
                    at += 9
                    if struct.unpack_from("<Q", data, at - 8)[0] > size - at:
                        raise Fault("a frame runs past the end: the file is cut short or damaged")
                elif op == 0x2E:  # STOP
                    if marks or len(stack) != 1:
                        raise Fault("the pickle ends in the middle of its data")
                    yield None, stack[0]
                    return
                else:
                    at, stack, last = self._rare(op, at, stack, marks)
        finally:
            self.at = at

    def _rare(self, op, at, stack, marks):
        """An opcode that few rows have: (where the next one stands, the stack, where the string on it stands or -1)."""
        data = self.data
        if op in _STRINGS or op in _BYTES:
            begin, end = self._span(at)
            # A memoryview stands for pickled bytes: they may be a mapped array of gigabytes.
            stack.append(data[begin:end] if op in _STRINGS else memoryview(data)[begin:end])
            return end, stack, at if op in _STRINGS else -1
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
            return at + 1, stack, -1
        if op in (0x4A, 0x4B, 0x4D):  # BININT, BININT1, BININT2
            form = {0x4A: "<i", 0x4B: "<B", 0x4D: "<H"}[op]
            stack.append(struct.unpack_from(form, data, at + 1)[0])
            return at + 1 + struct.calcsize(form), stack, -1
        if op in (0x8A, 0x8B):  # LONG1, LONG4
            begin = at + (2 if op == 0x8A else 5)
            length = data[at + 1] if op == 0x8A else struct.unpack_from("<i", data, at + 1)[0]
            if not 0 <= length <= 64:
                raise Fault(f"an integer of {length} bytes")
            stack.append(int.from_bytes(data[begin : begin + length], "little", signed=True))
            return begin + length, stack, -1
        if op in b"IFLVpgc":  # with arguments on lines: INT, FLOAT, LONG, UNICODE, PUT, GET, GLOBAL
            return self._lines(op, at, stack)
        if op == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif op in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
            count = op - 0x84
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif op == 0x7D:  # EMPTY_DICT
            stack.append({})
        elif op in b"ldu1":  # LIST, DICT, SETITEMS, POP_MARK
            items, stack = stack, marks.pop()
            if op == 0x6C:
                stack.append(items)
            elif op == 0x64:
                stack.append(_pairs({}, items))
            elif op == 0x75:
                _pairs(stack[-1], items)
        elif op == 0x73:  # SETITEM
            value, key = stack.pop(), stack.pop()
            _pairs(stack[-1], [key, value])
        elif op == 0x30:  # POP
            stack.pop()
        elif op == 0x32:  # DUP
            stack.append(stack[-1])
        elif op == 0x80:  # PROTO
            if data[at + 1] > 5:
                raise Fault(f"expected a pickle of protocol 0 to 5, got protocol {data[at + 1]}")
            return at + 2, stack, -1
        elif op == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(resolve(module, name))
        elif op == 0x52:  # REDUCE
            arguments, function = stack.pop(), stack.pop()
            stack.append(reduce(function, arguments))
        elif op == 0x62:  # BUILD
            state = stack.pop()
            build(stack[-1], state)
        elif bytes([op]) in _REFUSED:
            raise Fault(f"refused: the opcode {_REFUSED[bytes([op])]} builds more than plain data")
        elif at == 0:
            raise Fault("expected a pickle; its first byte is none's")
        else:
            raise Fault(f"the file is damaged: {op:#04x} is no opcode of plain data")
        return at + 1, stack, -1

    def _lines(self, op, at, stack):
        line, at = self._line(at + 1)
        if op == 0x63:  # GLOBAL
            name, at = self._line(at)
            stack.append(resolve(line, name))
        elif op == 0x70:  # PUT
            self._put(int(line), at, self._keep(stack[-1]))
        elif op == 0x67:  # GET
            stack.append(self._kept(self.memo[_slot(line)]))
        elif op == 0x56:  # UNICODE
            stack.append(line.decode("raw-unicode-escape").encode("utf-8", "surrogatepass"))
        elif op == 0x49 and line in (b"00", b"01"):
            stack.append(line == b"01")
        else:
            stack.append(float(line) if op == 0x46 else int(line.rstrip(b"L")))
        return at, stack, -1

    def _line(self, at):
        end = self.data.find(b"\n", at)
        if end < 0:
            raise IndexError
        return self.data[at:end], end + 1

    def _span(self, at):
        form = (_STRINGS | _BYTES)[self.data[at]]
        begin = at + 1 + struct.calcsize(form)
        end = begin + struct.unpack_from(form, self.data, at + 1)[0]
        if end >= len(self.data):
            raise Fault("a string runs past the end: the file is cut short or damaged")
        return begin, end

    def _string(self, at):
        begin, end = self._span(at)
        return self.data[begin:end]

    def _keep(self, value):
        self.kept.append(value)
        return -1 - self.dropped - len(self.kept)

    def _kept(self, code):
        if code >= 0:
            return self._string(code)
        if code == -1:
            raise Fault("the file is damaged: it refers to what it did not store")
        if -2 - code < self.dropped:
            raise Fault("a row refers back to a list or tuple far before it, which this reader does not keep")
        return self.kept[-2 - code - self.dropped]

    def _put(self, slot, at, code):
        # A pickler numbers what it stores from 0, so a number beyond the bytes read so far is no pickler's.
        if not 0 <= slot <= at:
            raise Fault(f"the file is damaged: it stores an object as its number {slot}")
        if slot >= len(self.memo):
            self.memo.extend([-1] * (slot + 1 - len(self.memo)))
        self.memo[slot] = code


def _slot(line):
    slot = int(line)
    if slot < 0:
        raise IndexError
    return slot


def _pairs(target, items):
    if type(target) is not dict or len(items) % 2:
        raise Fault(f"pairs are put into {kind_of(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key] = value
    return target


def _text(value, done=None):
    """Strings for bytes, and arrays, throughout. `done`: what was made of lists and tuples by their ids, for a file of a few
    bytes can refer to each of them twice from the next, 2^50 times in all."""
    done = {} if done is None else done
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Array):
        return value.numpy()
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, (Global, Dtype)):
        raise Fault(f"expected data, got {kind_of(value)}")
    if not isinstance(value, (list, tuple, dict)):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {_text(k, done): _text(v, done) for k, v in value.items()}
        else:
            done[id(value)] = type(value)(_text(item, done) for item in value)
    return done[id(value)]
