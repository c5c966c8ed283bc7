"""Steps of the losses that are replayed: C++ must launch for new tensors what Triton launches for them, and torch multiply what
the kernels made. A script, since a process has one driver and one libcuda; it prints how many launches it compared.
"""

import ctypes
import struct
import sys
from dataclasses import replace
from pathlib import Path

import torch
from triton import knobs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import host

from evaat_fast.ops.pairwise import step, triton
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.reference import Penalty
from evaat_fast.ops.pairwise.relevancy import Labels

SEEN = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))


class Driver(host.Driver):
    """Each kernel has a handle of its own. kinds: by handle, the types of what a launch is given; threads, shared memory."""

    def __init__(self):
        super().__init__([])
        self.kernels = {}

    def launcher_cls(self, source, metadata):
        self.kernels[len(self.kernels) + 1] = source, 32 * metadata.num_warps, metadata.shared
        return super().launcher_cls(source, metadata)

    def load_binary(self, name, binary, shared, device):
        return 1, len(self.kernels), 0, 0, 1024


def flat(kinds, given):
    for kind, x in zip(kinds, given, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, x)
        elif kind != "constexpr":
            yield kind, x


def storage(x):
    return x.untyped_storage().data_ptr()


class Comparison:
    """Of the launches of an ordinary call with those of a replay, on other inputs, as they come."""

    def __init__(self, driver, library, before, after):
        self.driver, self.expected, driver.launches = driver, list(driver.launches), []
        self.inputs = {a.data_ptr(): b.data_ptr() for a, b in zip(before, after, strict=True)}
        self.after, self.begins = after, {}  # address of a storage of the ordinary call: (that of the replay's, a tensor in it)
        self.error, self.count, self.multiplied, self.panel, self.rows = None, 0, 0, None, None
        self.callback = SEEN(self.seen)
        self.place = ctypes.c_void_p.in_dll(library, "seen")
        self.place.value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def end(self):
        self.place.value = None
        if self.error is not None:
            raise self.error
        counts = self.count, len(self.expected), len(self.driver.launches)
        assert counts[0] == counts[1] and not counts[2], f"launched {counts[0]} of {counts[1]}, and {counts[2]} by Triton"
        spans = sorted((at, at + x.untyped_storage().nbytes()) for at, x in self.begins.values())
        spans += [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in self.after]
        assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False)), "two things in one place"

    def seen(self, function, numbers, parameters):
        if self.error is None:
            try:
                self.compare(function, numbers[:5], parameters)
            except BaseException as error:
                self.error = error

    def compare(self, function, numbers, parameters):
        source, grid, arguments, early = self.expected[self.count]
        of, threads, shared = self.driver.kernels[function]
        assert of is source and not early and tuple(numbers) == (*grid, threads, shared), (source.fn, grid, list(numbers))
        for i, (kind, given) in enumerate(flat(source.signature.values(), arguments)):
            got = parameters[i][0]
            if kind[0] == "*":
                begin = got - given.data_ptr() + storage(given)
                assert self.address(given, begin) == got, (source.fn, i)
            elif kind == "fp32":
                assert got & 0xFFFFFFFF == int.from_bytes(struct.pack("<f", given), "little"), (source.fn, i)
            else:
                assert (got ^ given) & (1 << int(kind[1:])) - 1 == 0, (source.fn, i, got, given)
        self.count += 1
        self.act(source.fn.__name__, arguments)

    def address(self, x, begin=None):
        """Where the replay has what the ordinary call had in x."""
        known = self.inputs.get(x.data_ptr())
        return known if known is not None else self.begins.setdefault(storage(x), (begin, x))[0] + x.data_ptr() - storage(x)

    def act(self, name, arguments):
        """Fills unit rows and panels as kernels do, with numbers, and looks at the products that the last kernel is given."""
        if name == "prepare_kernel":
            self.rows = [self.fill(x) for x in arguments[1:3]]
        elif name in PANELS and (made := arguments[PANELS[name]].panel) is not None:
            self.panel = self.fill(made)
        elif name == "finish_kernel" and self.panel is not None:
            video, text = self.rows or self.after[:2]
            for grad, product in zip(arguments[4], (self.panel @ text, self.panel.T @ video), strict=True):
                got = torch.empty(grad.shape)
                ctypes.memmove(got.data_ptr(), self.address(grad), 4 * got.numel())
                torch.testing.assert_close(got, product)
                self.multiplied += 1

    def fill(self, x):
        numbers = torch.randn(x.shape)
        ctypes.memmove(self.address(x), numbers.data_ptr(), 4 * numbers.numel())
        return numbers


PANELS = {"contrast_slopes_kernel": 3, "sms_kernel": 4}  # where in their arguments
COSTS = Penalty(0.6, 0.1, 1.1 / 240, "code")


def work(scale=False, needs=(True, True)):
    return step.Work(False, *needs, scale and all(needs), "triton", None)


def margin(labels, own=None, weight=None, needs=(True, True)):
    settings = lambda *x: step.SmsSettings(labels(*x), own and own(*x), COSTS, True, work(needs=needs))  # noqa: E731
    return lambda video, text, *x: step.sms_step.body(video, text, weight and weight(*x), settings(*x))


def contrast(positives=lambda *x: Positives(), normalise=False, scale=True, needs=(True, True), weight=None):
    def call(video, text, multiplier, *x):
        settings = step.ContrastSettings(positives(*x), normalise, work(scale, needs))
        return step.contrast_step.body(video, text, multiplier, weight and weight(*x), settings)

    return call


def ids(N, most=5):
    return torch.randint(most, (N,))


def cases(N, E):
    """{name: (call, what makes its inputs)}."""
    features = lambda: [torch.randn(N, E), torch.randn(N, E)]  # noqa: E731
    strided = lambda: [torch.randn(N, 2 * E)[:, :E], torch.randn(N, E)]  # noqa: E731
    columns = lambda: [torch.randn(E, N).T, torch.randn(N, E)]  # noqa: E731
    codes, multiplier = lambda: torch.randint(9, (N, N), dtype=torch.uint8), lambda: torch.ones(())  # noqa: E731
    both = lambda table, noun, verb, values: Labels(table, noun, noun.view(-1), verb, values)  # noqa: E731
    words = lambda: torch.ones(N, 1, dtype=torch.int32)  # noqa: E731
    return {
        "clip": (contrast(), lambda: [*features(), multiplier()]),
        "clip, strided": (contrast(), lambda: [*strided(), multiplier()]),
        "clip, columns": (contrast(), lambda: [*columns(), multiplier()]),
        "clip, a constant scale": (contrast(scale=False), lambda: [*features(), multiplier()]),
        "clip, no gradient": (contrast(needs=(False, False)), lambda: [*features(), multiplier()]),
        "clip, weighted": (contrast(weight=lambda w: w), lambda: [*features(), multiplier(), torch.rand(N)]),
        "ego_nce, dense": (contrast(Positives, True, False), lambda: [*features(), multiplier(), torch.rand(N, N) > 0.5]),
        "ego_nce, classes": (
            contrast(lambda *x: Positives(None, *x), True, False),
            lambda: [*features(), multiplier(), words(), words()],
        ),
        "sms": (margin(Labels), lambda: [*features(), torch.rand(N, N)]),
        "sms, no gradient": (margin(Labels, needs=(False, False)), lambda: [*features(), torch.rand(N, N)]),
        "sms, own": (margin(lambda c, w: Labels(c), lambda c, w: w), lambda: [*features(), torch.rand(N, N), torch.rand(N)]),
        "sms, weighted": (
            margin(lambda c, w: Labels(c), None, lambda c, w: w),
            lambda: [*features(), torch.rand(N, N), torch.rand(N)],
        ),
        "sms, codes": (
            margin(lambda c, values: Labels(c, values=values)),
            lambda: [*features(), codes(), torch.rand(256, dtype=torch.float64)],
        ),
        "sms, indexed": (margin(Labels), lambda: [*features(), torch.rand(7, 9), ids(N), ids(N)]),
        "sms, verbs and nouns": (
            margin(both),
            lambda: [*features(), torch.zeros(2, 5, 5, dtype=torch.uint8), ids(N), ids(N), torch.rand(256)],
        ),
        "mi_mm": (
            margin(lambda zero, one: Labels(zero.expand(N, N)), lambda zero, one: one.expand(N)),
            lambda: [*features(), torch.zeros(1, 1), torch.ones(1)],
        ),
        "scaled": (
            lambda factor, *x: triton.scaled(factor, x, (torch.float32, torch.bfloat16, torch.float32)),
            lambda: [torch.ones(()), *features(), torch.ones(())],
        ),
    }


@torch.no_grad()
def main():
    driver, compared = Driver(), 0
    library = host.stand_in(driver)
    for N, E in ((64, 32), (48, 20), (33, 16)):
        for name, (call, make) in cases(N, E).items():
            before, after = make(), make()
            call(*before)
            assert driver.launches, name
            comparison = Comparison(driver, library, before, after)
            out = call(*after)
            comparison.end()
            # With the factor's, 7 launches of a step forward and backward, its two products included.
            assert comparison.count == {"clip": 4, "sms": 4, "scaled": 1}.get(name, comparison.count), name
            assert comparison.multiplied == (2 if comparison.panel is not None else 0), name
            assert len({storage(x) for x in out if x.numel()}) == sum(x.numel() > 0 for x in out), name
            compared += comparison.count
    print(compared)
    not_replayed(driver, library)


def not_replayed(driver, library):
    """What differs in what is launched, and all while somebody looks on or the driver refuses, is launched by Triton."""
    call, make = cases(64, 32)["clip"]

    def launched(*inputs):
        driver.launches.clear()
        call(*inputs)
        return len(driver.launches)

    given = make()
    assert launched(*given) == 0
    panels = lambda *x: step.contrast_step.body(  # noqa: E731
        *x, None, step.ContrastSettings(Positives(), False, replace(work(), panel_rows=2))
    )
    for _ in range(2):  # of 32 panels
        driver.launches.clear()
        panels(*given)
        assert len(driver.launches) == 3 * 32 + 1
    assert launched(torch.randn(64 * 32 + 1)[1:].view(64, 32), *given[1:]) == 4  # begins elsewhere
    assert launched(given[0], *given[:1], given[2]) == 4  # one tensor twice
    assert launched(given[0], *given[:1], given[2]) == 0 and launched(*given) == 0
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    assert launched(*given) == 4 and len(seen) == 4
    knobs.runtime.launch_enter_hook.remove(hook)
    assert launched(*given) == 0
    from evaat_fast.kernels.pairwise.contrast import contrast_stats_kernel

    contrast_stats_kernel.add_pre_run_hook(lambda *arguments, **options: seen.append(1))
    assert launched(*given) == 4 and len(seen) == 5
    contrast_stats_kernel.pre_run_hooks.clear()
    assert launched(*given) == 0
    ctypes.c_int.in_dll(library, "status").value = 201  # a thread without a context, which Triton finds one for
    assert launched(*given) == 4
    ctypes.c_int.in_dll(library, "status").value = 0
    assert launched(*given) == 0


if __name__ == "__main__":
    main()
