"""Pickles of plain data: what Python's own unpickler would give, and nothing run, whatever a file says."""

import collections
import os
import pickle
import pickletools
import random
import signal
import struct

import formats
import numpy as np
import pytest

from evaat_fast.data.readers import egoclip_plus, pickles

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SHARED = ["the same list"]
PLAIN = [
    [],
    [("uid", 1.0, -2, ["a", "b" * 300, "Ünïcode €", ""], [0.5, float("inf")])] * 3,
    {"a": {"b": [1, 2**31, -(2**40), 2**200, True, False, None]}, 3: (), "t": (1,), "u": (1, 2), "v": (1, 2, 3)},
    (b"bytes", b"\0" * 300, "x" * 70_000),
    [SHARED, SHARED, (SHARED, SHARED)],
    "a string",
    3.25,
    [[i, float(i), str(i), (i,)] for i in range(2500)],
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("data", PLAIN, ids=range(len(PLAIN)))
def test_plain_data_is_what_python_reads(tmp_path, data, protocol):
    assert pickles.load(formats.write(tmp_path, "x.pkl", pickle.dumps(data, protocol))) == data
    python = pickle._Pickler if hasattr(pickle, "_Pickler") else pickle.Pickler
    with open(tmp_path / "y.pkl", "wb") as file:
        python(file, protocol).dump(data)
    assert pickles.load(tmp_path / "y.pkl") == data
    optimized = pickletools.optimize(pickle.dumps(data, protocol))
    assert pickles.load(formats.write(tmp_path, "z.pkl", optimized)) == data


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "u1", "b1", ">f4", ">i2"])
@pytest.mark.parametrize("order", "CF")
def test_arrays_and_scalars(tmp_path, dtype, order, protocol):
    array = np.array(np.arange(12).reshape(3, 4) % 2, dtype=dtype, order=order)
    data = [array, array[0], array[0, 1], (np.float32(0.5), np.zeros((0, 3)))]
    read = pickles.load(formats.write(tmp_path, "x.pkl", pickle.dumps(data, protocol)))
    for one, other in zip([*read[:2], read[3][1]], [array, array[0], data[3][1]], strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
    assert read[2] == array[0, 1] and read[3][0] == 0.5 and type(read[3][0]) is float


def test_an_array_is_mapped(tmp_path):
    array = np.arange(1_000_000.0)
    read = pickles.load(formats.write(tmp_path, "x.pkl", pickle.dumps(array)))
    assert not read.flags.owndata and not read.flags.writeable and (read == array).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batches_are_the_items_in_order(tmp_path, protocol):
    data = [(f"uid {i // 50}", i / 7, ["a", f"text {i}"]) for i in range(3456)]
    read = list(pickles.batches(formats.write(tmp_path, "x.pkl", pickle.dumps(data, protocol))))
    assert len(read) >= 1 and [(u.decode(), t, [s.decode() for s in w]) for rows in read for u, t, w in rows] == data


def test_batches_are_of_a_list(tmp_path):
    with pytest.raises(ValueError, match="x.pkl: expected a pickled list, got a dict"):
        list(pickles.batches(formats.write(tmp_path, "x.pkl", {"a": 1})))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


FILE = "evil-was-here"
EVIL = {
    "system": (Evil(os.system, f"touch {FILE}"), "refused: the file would call or build '(posix|nt).system'"),
    "eval": (Evil(eval, f"open({FILE!r}, 'w')"), "refused: .*'(builtins|__builtin__).eval'"),
    "open": (Evil(open, FILE, "w"), "refused: .*'_?io.open'"),
    "getattr": (Evil(getattr, "", "join"), "refused: .*'(builtins|__builtin__).getattr'"),
    "instance": (Plain(), "refused: .*(Plain|copy_?reg._reconstructor)"),
    "class": (collections.OrderedDict(a=1), "refused: .*'collections.OrderedDict'"),
    "set": ({1, 2}, "refused: .*'(builtins|__builtin__).set'|no opcode of plain data"),
    "objects": (np.array([Plain()], object), "refused: an array of 'O8'"),
    "structured": (np.zeros(2, "i4,f4"), "refused: an array of 'V8'"),
    "strings": (np.array(["a"]), "refused: an array of 'U1'"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", EVIL)
def test_nothing_else_is_built_or_run(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    data, message = EVIL[name]
    for wrapped in (data, [("uid", 1.0, 2.0, data)]):
        try:
            path = formats.write(tmp_path, "x.pkl", pickle.dumps(wrapped, protocol))
        except (pickle.PicklingError, TypeError):
            pytest.skip("this protocol cannot hold it")
        with pytest.raises(ValueError, match=message) as caught:
            pickles.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(ValueError):
            list(pickles.batches(path))
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "program, message",
    [
        (b"", "expected a pickle, got an empty file"),
        (b"narration_id,text\n", "expected a pickle; its first byte is none's"),
        (b"\x80\x07N.", "expected a pickle of protocol 0 to 5, got protocol 7"),
        (b"\x80\x04]", "damaged or cut short"),
        (b"\x80\x04X\xff\xff\xff\x7fabc", "damaged or cut short"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc", "a string runs past the end"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "it stores an object as its number 4294967295"),
        (b"\x80\x02]j\xff\xff\xff\xff.", "damaged or cut short"),
        (b"]h\x00.", "damaged or cut short"),
        (b"(]].", "the pickle ends in the middle of its data"),
        (b"\x80\x04N}a.", "items are appended to a NoneType"),
        (b"}]Ns.", "damaged"),
        (b"I" + b"9" * 10_000 + b"\n.", "damaged"),
        (b"\x8b\xff\xff\xff\x7f.", "an integer of 2147483647 bytes"),
        (b"](h\x00e.", "damaged or cut short"),
        (b"]q\x00h\x00a.", "lists within lists, deeper than data is"),
        (b"(" * 100_000, "damaged or cut short"),
        (b"]" * 100_000 + b"a" * 99_999 + b".", "lists within lists, deeper than data is"),
        (b"cnumpy\ndtype\n.", "expected data, got a function"),
        (b"cnumpy\ndtype\n(Vf8\ntR.", "expected data, got a dtype"),
        (b"cnumpy.core.multiarray\n_reconstruct\n)R.", "an array without its data"),
        (b"cnumpy\nndarray\n)R.", "ndarray is called with arguments that are not its own"),
        (b"P0\n.", "refused: the opcode PERSID"),
        (b"cos\nsystem\n(Vls\ntR.", "refused: the file would call or build 'os.system'"),
    ],
)
def test_programs_no_pickler_writes(tmp_path, program, message):
    path = formats.write(tmp_path, "x.pkl", program)
    with pytest.raises(ValueError, match=message) as caught:
        pickles.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_no_array_is_larger_than_its_file(tmp_path):
    whole = pickle.dumps(np.zeros((4, 3)), protocol=4)
    assert whole.count(b"K\x04K\x03") == 1
    path = formats.write(tmp_path, "x.pkl", whole.replace(b"K\x04K\x03", b"M\xff\xffK\x03"))
    with pytest.raises(ValueError, match=r"an array of shape \(65535, 3\) in 96 bytes"):
        pickles.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pickles.load(tmp_path / "x.pkl")


@pytest.mark.sample(6)
@pytest.mark.parametrize("seed", range(60))
def test_damaged_pickles_are_errors_or_data(tmp_path, seed):
    """Bytes overwritten, left out, put in, cut off: a ValueError of one line, or some data; no crash, no wait, no memory."""
    rng = random.Random(seed)
    data = [formats.narrated(40, 3), formats.LAVILA, [np.arange(9.0).reshape(3, 3), {"a": (1, 2.5)}]][seed % 3]
    whole = pickle.dumps(data, protocol=seed % 6)
    for _ in range(50):
        spoiled = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(spoiled) or 1)
            kind = rng.randrange(4)
            if kind == 0 and spoiled:
                spoiled[at] = rng.choice((rng.randrange(256), *b"rjXGBc\x8d\x8e\x96R("))
            elif kind == 1:
                del spoiled[at : at + rng.randrange(1, 9)]
            elif kind == 2:
                spoiled[at:at] = struct.pack("<Q", rng.getrandbits(64))[: rng.randrange(1, 9)]
            else:
                del spoiled[max(1, at) :]
        path = formats.write(tmp_path, "x.pkl", bytes(spoiled))
        for read in (pickles.load, lambda path: list(pickles.batches(path))):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def doubled(levels):
    """A list of two references to a list of two references, and so on: a few hundred bytes, 2^levels leaves."""
    value = ["leaf"]
    for _ in range(levels):
        value = [value, value]
    return value


def test_what_is_referred_to_twice_is_made_once(tmp_path):
    path = tmp_path / "twice.pkl"
    path.write_bytes(pickle.dumps(doubled(20)))
    value = pickles.load(path)
    for _ in range(20):
        assert value[0] is value[1]
        value = value[0]
    assert value == ["leaf"]


@pytest.mark.parametrize("row", [("u", doubled(60), 1.0, ["x"]), ("u", 0.0, 1.0, doubled(60))], ids=["time", "texts"])
def test_a_message_of_it_ends(tmp_path, row):
    path = tmp_path / "twice.pkl"
    path.write_bytes(pickle.dumps([row]))

    def give_up(*_):
        raise AssertionError("the message of a few hundred bytes takes seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    try:
        with pytest.raises(ValueError, match="1 of 1 rows cannot be read"):
            egoclip_plus.read(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
