"""Runs Gluon kernels for Hopper on the CPU: their own functions, over a `gl` of torch tensors and a thread per partition.

What the hardware does when it likes, happens here at any moment that it may, drawn with a seed: copies land, products and
stores read their operands and other partitions go on between a launch and the wait that needs it. So a place in memory that is
given away too early, a wait that is missing or one that never ends shows as a wrong number, or as an error.

    module = emulate(evaat_fast.kernels.attn.sm90, seed=0)
    module.forward(q, k, v, out, lse, None, None, 0, scale)
"""

import importlib
import random
import threading
import types

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper


def data(x):
    return x.data if isinstance(x, Value) else x


class Value:
    """A tensor in registers, or a scalar."""

    def __init__(self, x):
        self.data = x

    dtype = property(lambda self: self.data.dtype)
    type = property(lambda self: types.SimpleNamespace(layout=None, element_ty=self.dtype, shape=self.data.shape))
    __index__ = __int__ = lambda self: int(self.data)

    def __bool__(self):
        return bool(self.data)

    def __getitem__(self, at):
        return Value(self.data[at])

    def __neg__(self):
        return Value(-self.data)

    def to(self, dtype):
        return Value(self.data.to(dtype))

    def reshape(self, shape):
        return Value(self.data.reshape(shape))

    def permute(self, order):
        return Value(self.data.permute(order))

    def broadcast_to(self, shape):
        return Value(self.data.expand(shape))

    def split(self):
        return (Value(self.data[..., 0]), Value(self.data[..., 1]))


def _operator(name):
    def of(self, other):
        return NotImplemented if isinstance(other, Pointer) else Value(getattr(torch.as_tensor(self.data), name)(data(other)))

    return of


for _name in "add radd sub rsub mul rmul truediv rtruediv floordiv mod lt le gt ge eq ne and rand or ror xor rshift".split():
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Into the memory of a tensor; at: elements from its beginning."""

    def __init__(self, memory, at):
        self.memory, self.at = memory, at

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.memory.dtype))

    def __add__(self, other):
        return Pointer(self.memory, self.at + data(other))


def pointer(x):
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return Pointer(whole, torch.tensor(x.storage_offset()))


class Shared:
    """Shared memory. unfenced: of all views of an allocation, whether it was written by a store that no fence has followed."""

    def __init__(self, x, machine, unfenced=None):
        self.x, self.machine, self.unfenced = x, machine, [False] if unfenced is None else unfenced

    dtype = property(lambda self: self.x.dtype)

    def index(self, i):
        return Shared(self.x[int(i)], self.machine, self.unfenced)

    def reshape(self, shape):
        return Shared(self.x.view(shape), self.machine, self.unfenced)

    def permute(self, order):
        return Shared(self.x.permute(order), self.machine, self.unfenced)

    def load(self, layout):
        return Value(self.x.clone())

    def store(self, value):
        self.x.copy_(value.data)
        self.unfenced[0] = True
        self.machine.here.unfenced.append(self.unfenced)

    def read(self):
        """What the copies and products see of it."""
        assert not self.unfenced[0], "a store that no fence has followed is read"
        return self.x.clone()


class Barriers:
    """One mbarrier, or an array of them."""

    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.all[int(i)]


class Barrier:
    def __init__(self):
        self.count = self.left = self.bytes = self.phases = 0

    def arrive(self, count=0, bytes=0):
        self.left, self.bytes = self.left - count, self.bytes + bytes
        assert self.left >= 0, "more arrivals than a barrier was made for"
        if self.left == 0 and self.bytes == 0:
            self.left, self.phases = self.count, self.phases + 1


class Descriptor:
    """Memory as TMA sees it, in blocks: zeros beyond its ends, where nothing is written. Addresses have 64 bits."""

    def __init__(self, base, shape, strides, block, layout):
        assert strides[-1] == 1 and all(stride * base.element_size() % 16 == 0 for stride in strides[:-1])
        assert all(0 <= stride * base.element_size() < 2**40 for stride in strides) and all(0 < n <= 2**32 for n in shape)
        self.memory, self.first, self.size = pointer(base).memory, base.storage_offset(), base.element_size()
        self.shape, self.strides, self.block, self.dtype, self.layout = shape, strides, block, base.dtype, None
        self.block_type = types.SimpleNamespace(nbytes=self.size * torch.Size(block).numel())

    @classmethod
    def from_tensor(cls, x, block, layout):
        return cls(x, x.shape, x.stride(), block, layout)

    def _places(self, at):
        """(which of a block's elements are inside, where these lie in memory)."""
        inside, where = torch.tensor(True), torch.tensor(0)
        for i, (begin, n, size, stride) in enumerate(zip(at, self.block, self.shape, self.strides, strict=True)):
            along = (begin + torch.arange(n)).view(-1, *[1] * (len(self.block) - 1 - i))
            inside, where = inside & (along >= 0) & (along < size), where + along * (stride * self.size)
        return inside, where[inside] // self.size + self.first

    def read(self, at):
        inside, where = self._places(at)
        whole = torch.zeros(self.block, dtype=self.dtype)
        whole[inside] = self.memory[where]
        return whole

    def write(self, at, value, add):
        inside, where = self._places(at)
        value = value.reshape(self.block)[inside]
        self.memory[where] = self.memory[where] + value if add else value


class Machine:
    """One program, or several at once: partitions take turns, and change where they meet a barrier, a copy or a product."""

    def __init__(self, seed):
        self.draw, self.error, self.copies, self.partitions, self.idle, self.polls = random.Random(seed), None, [], [], 0, 0
        self.turns, self.here = {}, threading.local()
        # How likely a product, a store and a copy happens before it must, and how often a partition's turn comes.
        self.soon = [self.draw.choice((0.02, 0.3, 0.9)) for _ in range(3)]
        self.often = {}

    def run(self):
        """The partitions [(function, arguments)], until all have come to their end."""
        threads = [threading.Thread(target=self._part, args=part, daemon=True) for part in self.partitions]
        self.turns = {thread: threading.Semaphore(0) for thread in threads}
        self.often = {thread: self.draw.choice((1, 1, 40)) for thread in threads}
        for thread in threads:
            thread.start()
        self.turns[threads[0]].release()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _part(self, function, arguments):
        me = threading.current_thread()
        self.turns[me].acquire()
        self.here.products, self.here.uncovered, self.here.stores, self.here.unfenced = [], [], [], []
        try:
            function(*arguments)
            assert not self.here.uncovered and not self.here.stores, "a partition ends with work under way"
        except BaseException as error:
            self.error = self.error or error
        del self.turns[me]
        if self.turns:
            self.turns[self._next()].release()

    def _next(self):
        return self.draw.choices([*self.turns], [self.often[thread] for thread in self.turns])[0]

    def pause(self, ready=lambda: True):
        """Lets others go on until `ready`."""
        mine = self.turns[threading.current_thread()]
        while True:
            for queue, soon in zip((self.here.products, self.here.stores), self.soon, strict=False):
                while queue and self.draw.random() < soon:
                    queue.pop(0)()
            if self.copies and self.draw.random() < self.soon[2]:
                self.copies.pop(self.draw.randrange(len(self.copies)))()
                self.idle = 0
            following = self.turns[self._next()]
            if following is not mine:
                following.release()
                mine.acquire()
            if self.error is not None:
                raise RuntimeError("another partition has failed")
            if ready():
                self.idle = 0
                return
            self.idle += not self.copies
            if self.idle > 2000:
                raise RuntimeError("all partitions wait for each other")


class Gluon:
    """What kernels know as gl, mbarrier and tma, of one program."""

    bfloat16, float16, float32, int64, constexpr = torch.bfloat16, torch.float16, torch.float32, torch.int64, None
    static_range = range
    exp2, log2 = (staticmethod(lambda x, f=f: Value(f(x.data))) for f in (torch.exp2, torch.log2))
    max, sum = (staticmethod(lambda x, axis, f=f: Value(f(x.data, axis))) for f in (torch.amax, torch.sum))
    maximum = staticmethod(lambda x, y: Value(torch.maximum(*(torch.as_tensor(data(z)) for z in (x, y)))))
    expand_dims = staticmethod(lambda x, axis: Value(x.data.unsqueeze(axis)))
    join = staticmethod(lambda x, y: Value(torch.stack((x.data, y.data), -1)))
    convert_layout = staticmethod(lambda x, layout: x)
    NVMMADistributedLayout = NVMMASharedLayout = DotOperandLayout = BlockedLayout = SliceLayout = MBarrierLayout = staticmethod(
        lambda *_, **__: None
    )
    SwizzledSharedLayout = SliceLayout

    def __init__(self, machine, program, programs):
        self.machine, self.program, self.programs = machine, program, programs

    def program_id(self, axis):
        return Value(torch.tensor(self.program))

    def num_programs(self, axis):
        return Value(torch.tensor(self.programs))

    def zeros(self, shape, dtype, layout):
        return Value(torch.zeros(shape, dtype=dtype))

    def arange(self, first, last, layout):
        return Value(torch.arange(first, last))

    def where(self, condition, x, y):
        if not any(isinstance(z, Value) for z in (condition, x, y)):
            return Value(torch.tensor(x if condition else y))
        return Value(torch.where(torch.as_tensor(data(condition)), data(x), data(y)))

    def load(self, at, mask=True, other=0):
        where, mask = torch.broadcast_tensors(at.at, torch.as_tensor(data(True if mask is None else mask)))
        found = torch.full(where.shape, other, dtype=at.memory.dtype)
        found[mask] = at.memory[where[mask]]
        return Value(found)

    def store(self, at, value, mask=True):
        where, mask, value = torch.broadcast_tensors(at.at, *(torch.as_tensor(data(x)) for x in (mask, value)))
        at.memory[where[mask]] = value[mask].to(at.memory.dtype)

    def allocate_shared_memory(self, dtype, shape, layout):
        if dtype == torch.int64:
            return Barriers(shape[0])
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.machine)

    def warp_specialize(self, partitions, warps, registers):
        self.machine.partitions += partitions

    def atomic_add(self, at, value, mask=True, sem=None):
        self.machine.pause()
        before = int(at.memory[at.at])
        self.machine.polls = 0 if value else self.machine.polls + 1
        if self.machine.polls > 20000:
            raise RuntimeError("programs wait for each other")
        if mask:
            at.memory[at.at] += value
        return Value(torch.tensor(before))

    def warpgroup_mma(self, a, b, acc, use_acc=True, is_async=False):
        result, here = Product(), self.machine.here

        def happen():
            x, y = (z.read() if isinstance(z, Shared) else z.data for z in (a, b))
            before = acc.value if isinstance(acc, Product) else acc.data
            result.value = x.float() @ y.float() + (before if use_acc else 0)

        assert is_async
        here.products.append(happen)
        here.uncovered.append(result)
        self.machine.pause()
        return result

    def warpgroup_mma_wait(self, left, deps):
        here = self.machine.here
        while len(here.products) > left:
            here.products.pop(0)()
        here.uncovered = here.uncovered[len(here.uncovered) - left :] if left else []
        assert not any(x is y for x in deps for y in here.uncovered), "a result is taken before a wait covers it"
        self.machine.pause()
        found = tuple(Value(x.value) for x in deps)
        return found if len(found) > 1 else found[0]

    def fence_async_shared(self):
        for unfenced in self.machine.here.unfenced:
            unfenced[0] = False
        self.machine.here.unfenced = []

    def init(self, barrier, count):
        barrier.count = barrier.left = count

    def expect(self, barrier, size):
        barrier.arrive(1, size)

    def arrive(self, barrier, count, pred=True):
        self.machine.pause()
        if pred:
            barrier.arrive(count)

    def wait(self, barrier, phase, pred=True):
        self.machine.pause((lambda: barrier.phases & 1 != int(phase)) if pred else lambda: True)

    def copy_in(self, descriptor, at, barrier, place):
        at = [int(x) for x in at]

        def land():
            place.x.copy_(descriptor.read(at).view(place.x.shape))
            barrier.arrive(0, -descriptor.block_type.nbytes)

        self.machine.copies.append(land)
        self.machine.pause()

    def copy_out(self, descriptor, at, place, add=False):
        at = [int(x) for x in at]
        self.machine.here.stores.append(lambda: descriptor.write(at, place.read(), add))
        self.machine.pause()

    def copy_add(self, descriptor, at, place):
        self.copy_out(descriptor, at, place, True)

    def zero_here(self, n):
        return Value(torch.tensor(0.0))

    def only_here(self, n):
        return n

    def stores_done(self):
        self.store_wait(0)

    def store_wait(self, pendings):
        while len(self.machine.here.stores) > pendings:
            self.machine.here.stores.pop(0)()
        self.machine.pause()


class Product:
    """A product that may be under way; value: when it has happened."""


class Launcher:
    """kernel[grid](*arguments): one program after the other, or all at once where they may wait for each other."""

    def __init__(self, kernel, seed):
        self.kernel, self.seed = kernel, seed

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            arguments = [of(x) for x in arguments]
            named = {name: x for name, x in options.items() if name in self.kernel.arg_names}
            at_once = Machine(self.seed) if options.get("launch_cooperative_grid") else None
            for program in range(grid[0]):
                machine = at_once or Machine(f"{self.seed} {program}")
                rebuilt(self.kernel.fn, Gluon(machine, program, grid[0]))(*arguments, **named)
                if not at_once:
                    machine.run()
            if at_once:
                at_once.run()

        def of(x):
            if isinstance(x, torch.Tensor):
                return pointer(x)
            if isinstance(x, tuple):
                return type(x)(*map(of, x)) if hasattr(x, "_fields") else tuple(map(of, x))
            return x

        return launch


def rebuilt(function, fake):
    """A function, or one that the kernels call, with `fake` in place of Gluon."""
    known = {id(gl): fake, id(hopper.mbarrier): fake, id(hopper.tma): fake}
    for name in ("warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared"):
        known[id(getattr(hopper, name))] = getattr(fake, name, None)
    sm90 = importlib.import_module("evaat_fast.kernels.attn.sm90")
    known |= {
        id(getattr(sm90, name)): getattr(fake, name)
        for name in ("copy_in", "copy_out", "copy_add", "stores_done", "zero_here", "only_here")
    }

    def of(x):
        if id(x) in known:
            return known[id(x)]
        if isinstance(x, GluonJITFunction):
            known[id(x)] = rebuilt_of(x.fn)
            return known[id(x)]
        return x.value if isinstance(x, gl.constexpr) else x

    def rebuilt_of(function):
        names = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
        fakes = {name: of(x) for name, x in names.items()}
        return types.FunctionType(function.__code__, fakes, function.__name__, function.__defaults__)

    return rebuilt_of(function)


def emulate(module, seed, programs=2):
    """The module's launchers, by name, whose kernels run here, as on a GPU of so many multiprocessors."""
    found = dict(vars(module))
    kernels = {name: Launcher(x, seed) for name, x in found.items() if isinstance(x, GluonJITFunction)}
    fake = {**found, **kernels, "TensorDescriptor": Descriptor, "multiprocessors": lambda device: programs}
    own = {name: x for name, x in found.items() if isinstance(x, types.FunctionType) and x.__module__ == module.__name__}
    own = {name: types.FunctionType(x.__code__, fake, name, x.__defaults__, x.__closure__) for name, x in own.items()}
    fake.update(own)  # they call one another
    return types.SimpleNamespace(**own)
