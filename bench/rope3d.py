"""The rotation of q and k against copies of the same bytes: python bench/rope3d.py

The copies are handed the rotated tensors, so that they pass the check that every provider must pass; what they cost is the
floor of a memory-bound operation. Bytes: q and k read once and written once, in fwdbwd their gradients too.
"""

import torch
from harness import Benchmark, Unavailable, run

from evaat_fast import ops


def shape(B, T, H=12, patches=14, D=64):
    return {"B": B, "H": H, "T": T, "Hp": patches, "Wp": patches, "D": D, "N": 1 + T * patches**2}


def make_inputs(shape, dtype, device):
    size = [shape[x] for x in "BHND"]
    generator = torch.Generator(device).manual_seed(0)
    make = lambda: torch.randn(size, generator=generator, device=device).to(dtype)  # noqa: E731
    q, k = make().requires_grad_(), make().requires_grad_()
    return {"q": q, "k": k, "dq": make(), "dk": make(), "grid": (shape["T"], shape["Hp"], shape["Wp"])}


def tensors(inputs):
    return [inputs[name] for name in ("q", "k", "dq", "dk")]


def step(forward):
    """A provider from forward(q, k, grid) -> (q, k) with new tensors."""

    def provider(inputs, mode):
        q, k, dq, dk = tensors(inputs)

        def fwd():
            with torch.no_grad():
                return forward(q, k, inputs["grid"])

        def fwdbwd():
            out = forward(q, k, inputs["grid"])
            return *out, *torch.autograd.grad(out, (q, k), (dq, dk))

        return fwd if mode == "fwd" else fwdbwd

    return provider


def results(inputs, mode):
    """What the operation gives, computed beforehand."""
    return [x.detach() for x in step(ops.rope3d)(inputs, mode)()]


def clone(inputs, mode):
    sources = results(inputs, mode)
    return lambda: [x.clone() for x in sources]


def copy(inputs, mode):
    sources = results(inputs, mode)
    buffers = [torch.empty_like(x) for x in sources]
    return lambda: [b.copy_(x) for b, x in zip(buffers, sources, strict=True)]


def in_place(inputs, mode):
    if mode != "fwd":
        raise Unavailable("rope3d_ has no gradient")
    q, k = (x.detach().clone() for x in tensors(inputs)[:2])
    return lambda: ops.rope3d_(q, k, inputs["grid"])


def packed(inputs, mode):
    q, k, dq, dk = (x.detach().transpose(1, 2) for x in tensors(inputs))
    heads = q.shape[2]
    qkv, grad = torch.stack((q, k, q), 2).flatten(2), torch.stack((dq, dk, dq), 2).flatten(2)
    parts = lambda x: [y.transpose(1, 2) for y in x.unflatten(2, (3, heads, -1)).unbind(2)[:2]]  # noqa: E731

    def fwd():
        return parts(ops.rope3d_qkv_(qkv, heads, inputs["grid"]))

    leaf = qkv.clone().requires_grad_() if mode != "fwd" else None

    def fwdbwd():
        out = ops.rope3d_qkv_(leaf + 0, heads, inputs["grid"])  # + 0 stands for the linear layer; its copy is in our time
        return *parts(out), *parts(torch.autograd.grad(out, leaf, grad)[0])

    return fwd if mode == "fwd" else fwdbwd


def reference(q, k, grid):
    return ops.rope3d(q, k, grid, backend="reference")


def compiled(inputs, mode):
    if inputs["q"].device.type == "cpu":
        raise Unavailable("on a CPU torch.compile takes minutes")
    return step(torch.compile(reference))(inputs, mode)


BENCH = Benchmark(
    op="rope3d",
    # EVA02-AT-B, 4 frames, 8 clips: the case that the bars of the CPU kernels are set on.
    cpu_shapes=[shape(8, 4)],
    gpu_shapes=[shape(32, T) for T in (4, 8, 16)] + [shape(16, T, 16, 16) for T in (4, 16)],
    inputs=make_inputs,
    providers={
        "clone of q and k": clone,
        "copy_ of q and k": copy,
        "evaat rope3d": step(ops.rope3d),
        "evaat rope3d_": in_place,
        "evaat rope3d_qkv_": packed,
        "eager (the reference)": step(reference),
        "torch.compile(the reference)": compiled,
    },
    truth=step(reference),
    work=lambda s, mode, size: {"byte": (4 if mode == "fwd" else 8) * s["B"] * s["H"] * s["N"] * s["D"] * size},
    baseline="copy_ of q and k",
)

if __name__ == "__main__":
    run(BENCH)
