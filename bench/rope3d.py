"""The rotation of q and k against copies of the same bytes, eager code and other libraries: python bench/rope3d.py

The copies are handed the rotated tensors, so that they pass the check that every provider must pass; what they cost is the
floor of a memory-bound operation. Bytes: q and k read once and written once, in fwdbwd their gradients too. Other libraries
get the memory order they are made for ([B, N, H, D], pairs in halves where they know no others), with tables made beforehand.
"""

import functools

import torch
from harness import Benchmark, Unavailable, need, run
from timing import copy_kernel

from evaat_fast import ops
from evaat_fast.ops._core.dispatch import BackendError
from evaat_fast.ops.rope3d.freqs import grid_positions


def shape(B, T, H=12, D=64, patches=14):
    return {"B": B, "H": H, "T": T, "Hp": patches, "Wp": patches, "D": D, "N": 1 + T * patches**2}


def make_inputs(shape, dtype, device):
    size = [shape[x] for x in "BHND"]
    generator = torch.Generator(device).manual_seed(0)
    make = lambda: torch.randn(size, generator=generator, device=device).to(dtype)  # noqa: E731
    q, k = make().requires_grad_(), make().requires_grad_()
    return {"q": q, "k": k, "dq": make(), "dk": make(), "grid": (shape["T"], shape["Hp"], shape["Wp"])}


def tensors(inputs):
    return [inputs[name] for name in ("q", "k", "dq", "dk")]


def rotation(forward, q, k, dq, dk, mode):
    """The step of forward(q, k) -> (q, k) with new tensors."""

    def fwd():
        with torch.no_grad():
            return forward(q, k)

    def fwdbwd():
        out = forward(q, k)
        return *out, *torch.autograd.grad(out, (q, k), (dq, dk))

    return fwd if mode == "fwd" else fwdbwd


def ours(backend=None):
    def provider(inputs, mode):
        serves(backend, inputs["q"])
        return rotation(lambda q, k: ops.rope3d(q, k, inputs["grid"], backend=backend), *tensors(inputs), mode)

    return provider


def serves(backend, x):
    """Unavailable if that backend of ours does not take x."""
    try:
        ops.rope3d(x.detach()[:1, :1, :2], None, (1, 1, 1), backend=backend)
    except BackendError as why:
        raise Unavailable(str(why)) from None


def results(inputs, mode):
    """What the operation gives, computed beforehand."""
    return [x.detach() for x in ours()(inputs, mode)()]


def clone(inputs, mode):
    not_a_copy_engine(inputs)
    sources = results(inputs, mode)
    return lambda: [x.clone() for x in sources]


def copy(inputs, mode):
    not_a_copy_engine(inputs)
    sources = results(inputs, mode)
    buffers = [torch.empty_like(x) for x in sources]
    return lambda: [b.copy_(x) for b, x in zip(buffers, sources, strict=True)]


def not_a_copy_engine(inputs):
    if inputs["q"].is_cuda:
        raise Unavailable("in a CUDA graph it is the work of a copy engine, which is slower than a kernel")


def copy_by_kernel(inputs, mode):
    if not inputs["q"].is_cuda:
        raise Unavailable("for a GPU")
    sources = results(inputs, mode)
    buffers = [torch.empty_like(x) for x in sources]
    return lambda: [copy_kernel(x, b) for b, x in zip(buffers, sources, strict=True)]


def in_place(backend=None):
    def provider(inputs, mode):
        if mode != "fwd":
            raise Unavailable("rope3d_ has no gradient")
        serves(backend, inputs["q"])
        q, k = (x.detach().clone() for x in tensors(inputs)[:2])
        return lambda: ops.rope3d_(q, k, inputs["grid"], backend=backend)

    return provider


def packed(backend=None):
    def provider(inputs, mode):
        serves(backend, inputs["q"])
        q, k, dq, dk = (x.detach().transpose(1, 2) for x in tensors(inputs))
        heads = q.shape[2]
        qkv, grad = torch.stack((q, k, q), 2).flatten(2), torch.stack((dq, dk, dq), 2).flatten(2)
        parts = lambda x: [y.transpose(1, 2) for y in x.unflatten(2, (3, heads, -1)).unbind(2)[:2]]  # noqa: E731
        turn = lambda x: ops.rope3d_qkv_(x, heads, inputs["grid"], backend=backend)  # noqa: E731
        leaf = qkv.clone().requires_grad_() if mode != "fwd" else None

        def fwdbwd():
            out = turn(leaf + 0)  # + 0 stands for the linear layer; its copy is in our time
            return *parts(out), *parts(torch.autograd.grad(out, leaf, grad)[0])

        return fwdbwd if mode != "fwd" else lambda: parts(turn(qkv))

    return provider


def reference(inputs, mode):
    return rotation(lambda q, k: ops.rope3d(q, k, inputs["grid"], backend="reference"), *tensors(inputs), mode)


def angles(grid, freqs, device):
    """Radians [N, D/2] in float64, zero for the class token; freqs: [3, D/2]."""
    of_patches = grid_positions(grid).double() @ freqs.double()
    return torch.cat((torch.zeros_like(of_patches[:1]), of_patches)).to(device)


@functools.lru_cache(4)
def published(grid, D, dtype, device, scale=(1.0, 1.0, 1.0)):
    """x -> x as EVA-02's code rotates, which is run twice for a video: over space, then over time.

    Each: float32 buffers of cosines and sines over the whole head dim, the pairs swapped by a stack, the class token cut
    off and put back, the result rounded to the dtype of x.
    """
    time, space = ops.joint_freqs(D, scale=scale), ops.joint_freqs(D, scale=scale)
    time[1:], space[0] = 0, 0
    kind = torch.promote_types(dtype, torch.float32)
    buffers = [angles(grid, f, device)[1:].repeat_interleave(2, -1) for f in (space, time)]
    buffers = [(a.cos().to(kind), a.sin().to(kind)) for a in buffers]

    def turn(x):
        for cos, sin in buffers:
            patches = x[:, :, 1:]
            swapped = torch.stack((-patches[..., 1::2], patches[..., 0::2]), -1).flatten(-2)
            x = torch.cat((x[:, :, :1], patches * cos + swapped * sin), -2).type_as(x)
        return x

    return turn


def as_published(inputs):
    x = inputs["q"]
    turn = published(inputs["grid"], x.shape[-1], x.dtype, x.device)
    return lambda q, k: (turn(q), turn(k))


def eager(inputs, mode):
    return rotation(as_published(inputs), *tensors(inputs), mode)


def compiled(inputs, mode):
    if inputs["q"].device.type == "cpu":
        raise Unavailable("on a CPU torch.compile takes minutes")
    return rotation(torch.compile(as_published(inputs)), *tensors(inputs), mode)


def tokens_first(inputs, mode, rotate, halves=False):
    """A peer's step, from rotate(q, k) on [B, N, H, D]; halves: it pairs channel c with c + D/2."""
    split = lambda x: torch.cat((x[..., 0::2], x[..., 1::2]), -1) if halves else x  # noqa: E731
    prepared = [split(x.detach().transpose(1, 2)).contiguous() for x in tensors(inputs)]
    q, k = (x.requires_grad_(mode != "fwd") for x in prepared[:2])
    step = rotation(rotate, q, k, *prepared[2:], mode)

    def ordered():
        out = (torch.stack(x.chunk(2, -1), -1).flatten(-2) if halves else x for x in step())
        return [x.transpose(1, 2) for x in out]

    step.results = ordered  # what is checked; the timed step does not reorder
    return step


def peer_angles(inputs):
    """`angles` of the inputs, if they are on a GPU."""
    x = inputs["q"]
    if x.device.type == "cpu":
        raise Unavailable("its kernels run on a GPU")
    return angles(inputs["grid"], ops.joint_freqs(x.shape[-1]), x.device)


def flash_attn(inputs, mode):
    rotate = need("flash_attn.layers.rotary").apply_rotary_emb
    a = peer_angles(inputs)
    cos, sin = a.cos().to(inputs["q"].dtype), a.sin().to(inputs["q"].dtype)  # it asks for the dtype of x
    return tokens_first(inputs, mode, lambda q, k: [rotate(x, cos, sin, interleaved=True) for x in (q, k)])


def liger(inputs, mode):
    """Rotates q, k and their gradients in place, whatever autograd thinks."""
    rotate = need("liger_kernel.ops.rope").LigerRopeFunction.apply
    a = peer_angles(inputs)
    cos, sin = (torch.cat((x, x), -1)[None].to(inputs["q"].dtype) for x in (a.cos(), a.sin()))

    def turn(q, k):
        return [x.transpose(1, 2) for x in rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]

    return tokens_first(inputs, mode, turn, halves=True)


def transformer_engine(inputs, mode):
    try:
        rotate = need("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
    except Unavailable:
        rotate = need("transformer_engine.pytorch.attention").apply_rotary_pos_emb  # before 2.2
    freqs = peer_angles(inputs).float().repeat_interleave(2, -1)[:, None, None]
    options = dict(tensor_format="bshd", interleaved=True, fused=True)
    return tokens_first(inputs, mode, lambda q, k: [rotate(x, freqs, **options) for x in (q, k)])


BENCH = Benchmark(
    op="rope3d",
    # EVA02-AT-B, 4 frames, 8 clips: the case that the bars of the CPU kernels are set on.
    cpu_shapes=[shape(8, 4)],
    gpu_shapes=[shape(32, T) for T in (4, 16, 8, 32)]
    + [shape(32, T, H, D) for H, D in ((16, 64), (12, 128), (16, 128)) for T in (4, 32)],
    inputs=make_inputs,
    providers={
        "clone of q and k": clone,
        "copy_ of q and k": copy,
        "copy kernel over q and k": copy_by_kernel,
        "evaat rope3d": ours(),
        "evaat rope3d_": in_place(),
        "evaat rope3d_qkv_": packed(),
        "evaat rope3d, Triton": ours("triton"),
        "evaat rope3d_, Triton": in_place("triton"),
        "evaat rope3d_qkv_, Triton": packed("triton"),
        "eager, one rotation": reference,
        "eager, as published": eager,
        "torch.compile(as published)": compiled,
        "flash-attn": flash_attn,
        "Liger": liger,
        "Transformer Engine": transformer_engine,
    },
    truth=reference,
    work=lambda s, mode, size: {"byte": (4 if mode == "fwd" else 8) * s["B"] * s["H"] * s["N"] * s["D"] * size},
    baseline="copy_ of q and k",
    gpu_baseline="copy kernel over q and k",
)

if __name__ == "__main__":
    run(BENCH)
