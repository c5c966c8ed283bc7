"""What a call costs the CPU of a GPU machine, in microseconds: python bench/host.py

An eager step of small tensors lasts as long as Python takes to launch it. On a CUDA device calls are queued and not waited for.
Without one a driver stands in that compiles for an H200 and launches nothing: of a call in Triton all that stands between the
choice of a backend and the launch is run as it is, of the losses in float32, whose products a CPU makes in little time. The
figures of the backward pass have autograd's own 20 us in them.
"""

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import tempfile
import time

import torch

from evaat_fast import ops

CALLS = 20  # between two looks at the clock; a queue takes a thousand launches


class Driver:
    """An H200 for Triton that has none. launches: a list for (what was compiled, grid, arguments, whether it may begin early)
    of each launch, or None."""

    def __init__(self, launches=None):
        self.launches, self.utils = launches, self

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launched, enter, leave, *arguments):
            if enter is not None:
                enter(launched)
            if self.launches is not None:
                self.launches.append((source, (x, y, z), arguments, metadata.launch_pdl))
            if leave is not None:
                leave(launched)

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass


# What stands in for the library of a driver: it calls what `seen` is set to, if it is, with a launch's function, its grid,
# threads and shared memory, and its parameters, and fails with `status`.
_LIBRARY = """
void (*seen)(void*, unsigned*, void**);
int status;
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b, unsigned c, unsigned shared,
                   void* stream, void** parameters, void** extra) {
  unsigned numbers[] = {x, y, z, threads, shared};
  if (seen) seen(f, numbers, parameters);
  return b != 1 || c != 1 || extra != 0 ? 1 : status;
}
"""


def library():
    """It, loaded: who asks for libcuda.so.1 then gets it."""
    with tempfile.TemporaryDirectory() as folder:
        path, compiler = f"{folder}/libcuda.so.1", os.environ.get("CC", "cc").split()
        flags = "-x", "c", "-", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", path
        subprocess.run([*compiler, *flags], input=_LIBRARY, text=True, check=True)
        return ctypes.CDLL(path)


def stand_in(driver=None):
    """Makes a `Driver` Triton's, and its library that of the process, which is returned."""
    from triton import runtime

    runtime.driver.set_active(driver or Driver())
    return library()


def tensors(device):
    """Of a block, small: a forward pass's activations are bfloat16, its stream and weights float32."""
    learned = lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype, device=device, requires_grad=True)  # noqa: E731
    low, (B, N, H, D) = torch.bfloat16, (1, 197, 2, 64)
    return {
        "x": learned(B, N, H * D, dtype=low),
        "stream": learned(B, N, H * D),
        "wide": learned(B, N, 2 * H * D, dtype=low),
        "weight": learned(H * D),
        "bias": learned(H * D),
        "of_wide": learned(2 * H * D),
        "qkv": learned(B, N, 3 * H * D, dtype=low),
        "q": learned(B, H, N, D, dtype=low),
        "video": learned(64, 64, dtype=low),
        "text": learned(64, 64, dtype=low),
        "scale": learned(),
    }


def public(t):
    """{name: a call} of the public functions, wherever the tensors are."""
    codes = torch.randint(241, (64, 64), dtype=torch.uint8, device=t["x"].device)
    table = ops.DenseRelevancy(codes, 1 / 240)
    return {
        "add_norm": lambda: ops.add_norm(t["x"], t["stream"], t["weight"], t["bias"]),
        "add_norm, x_bias": lambda: ops.add_norm(t["x"], t["stream"], t["weight"], t["bias"], x_bias=t["bias"]),
        "layer norm": lambda: ops.add_norm(t["x"], None, t["weight"], t["bias"])[:1],
        "swiglu_norm, x_bias": lambda: ops.swiglu_norm(t["wide"], t["weight"], t["bias"], x_bias=t["of_wide"]),
        "rope3d": lambda: ops.rope3d(t["q"], t["q"], (1, 14, 14)),
        "joint_attention_qkv_, a copy": lambda: ops.joint_attention_qkv_(t["qkv"].clone(), 2, (1, 14, 14)),
        "clip_loss": lambda: ops.clip_loss(t["video"], t["text"], t["scale"]),
        "sms_loss": lambda: ops.sms_loss(t["video"], t["text"], table),
    }


def behind(t):
    """{name: a call} of what stands behind the choice of a backend, in Triton, on tensors that are on the CPU."""
    from evaat_fast.ops.attn.fused import attend_packed
    from evaat_fast.ops.attn.plan import AttentionPlan
    from evaat_fast.ops.norm import function
    from evaat_fast.ops.pairwise import step
    from evaat_fast.ops.pairwise.positives import Positives
    from evaat_fast.ops.pairwise.reference import Penalty
    from evaat_fast.ops.pairwise.relevancy import Labels
    from evaat_fast.ops.rope3d.rotate import rotate
    from evaat_fast.ops.rope3d.rotation import Rotation

    low, rotation = torch.bfloat16, Rotation(None, None, (1, 14, 14), 1, True, False, "triton")
    attention = AttentionPlan(rotation, None, True, None, None, 0.125, "triton")
    video, text = (t[name].detach().float().requires_grad_() for name in ("video", "text"))
    labels, costs = Labels(torch.rand(64, 64)), Penalty(0.6, 0.1, 1.1 / 240, "code")
    work = lambda learns, scale: step.Work(False, learns, learns, learns and scale, "triton", None)  # noqa: E731
    settings = {
        step.contrast_step: lambda learns: step.ContrastSettings(Positives(), False, work(learns, True)),
        step.sms_step: lambda learns: step.SmsSettings(labels, None, costs, True, work(learns, False)),
    }

    def norm(x, stream, x_bias):
        return function.add_norm("triton", x, stream, t["weight"], t["bias"], x_bias, 1e-6, low)[: 1 if stream is None else 2]

    def attend():
        qkv = t["qkv"].clone()
        return attend_packed(qkv, qkv if torch.is_grad_enabled() else None, 2, None, attention)[0]

    def loss(of, *inputs):
        learns = torch.is_grad_enabled()
        if learns:
            return step.Mean.apply(of, False, settings[of](True), *inputs)
        return of.body(*inputs, None, settings[of](False))[0]

    return {
        "add_norm": lambda: norm(t["x"], t["stream"], None),
        "add_norm, x_bias": lambda: norm(t["x"], t["stream"], t["bias"]),
        "layer norm": lambda: norm(t["x"], None, None),
        "swiglu_norm, x_bias": lambda: function.swiglu_norm(
            "triton", t["wide"], t["weight"], t["bias"], t["of_wide"], 1e-6, low
        ),
        "rope3d": lambda: rotate(t["q"], t["q"], rotation),
        "joint_attention_qkv_, a copy": attend,
        "clip_loss": lambda: loss(step.contrast_step, video, text, t["scale"]),
        "sms_loss": lambda: loss(step.sms_step, video, text),
    }


def microseconds(call, sync, seconds):
    """Of the CPU, the median of many."""
    found, until = [], time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < until:
        sync()
        gc.disable()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - began) / CALLS * 1e6)
        gc.enable()
    return statistics.median(found)


def passes(call, sync, seconds):
    """Of a call without gradients, of one with them, and of its backward pass."""
    out = call()
    out = list(out) if isinstance(out, tuple) else [out]
    gradients = [torch.zeros_like(x) for x in out]

    def both():
        made = call()
        torch.autograd.backward(list(made) if isinstance(made, tuple) else [made], gradients)

    both()
    with torch.no_grad():
        without = microseconds(call, sync, seconds)
    forward, whole = microseconds(call, sync, seconds), microseconds(both, sync, seconds)
    return without, forward, whole - forward


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each figure")
    args = parser.parse_args(argv)
    import triton

    on_gpu = args.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
        stand_in()
    print(f"Triton {triton.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'no GPU'}")
    print(f"{'us a call':<30} {'no grad':>8} {'forward':>8} {'backward':>8}")
    sync, t = torch.cuda.synchronize if on_gpu else lambda: None, tensors(args.device)
    for name, call in (public if on_gpu else behind)(t).items():
        if not args.only or any(word in name for word in args.only):
            shown = " ".join(f"{x:8.1f}" for x in passes(call, sync, args.seconds))
            print(f"{name:<30} {shown}", flush=True)


if __name__ == "__main__":
    main()
