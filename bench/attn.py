"""RoPE and attention over the tokens of a clip, as the model calls it: python bench/attn.py

Every provider starts from the packed output of the qkv projection [B, N, 3*H*D] and ends with [B, H, N, D] (and, in fwdbwd,
with the gradient of the packed tensor; bwd is that gradient alone, of a forward pass that stands). FLOPs: 4 B H N^2 D forward,
2.5 times that backward; the rotation is not counted. Every attention of others comes three times: with the rotation as
published, eager; with our rope3d; and with the published rotation under torch.compile. Rows with a projection in them are
charged its time, and no FLOPs for it. --decide, as the first argument, measures what bench/decide.py decides by.
"""

import sys
from dataclasses import replace

import attn_peers
import torch
import where
from harness import Benchmark, Unavailable, main, need, run
from rope3d import published
from torch.nn.functional import linear, scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops.attn.reference import attention_reference


def shape(T, B, H, D, patches=14):
    return {"B": B, "H": H, "T": T, "Hp": patches, "Wp": patches, "D": D, "N": 1 + T * patches**2}


# EVA02-AT-B (H 12, 14 x 14 patches) and -L (H 16, 16 x 16 patches), D = 64, then a sweep over tokens and head dims.
GPU_SHAPES = [shape(T, 32, 12, 64) for T in (4, 16, 8, 32)] + [shape(T, 16, 16, 64, 16) for T in (4, 8, 16, 32)]
GPU_SHAPES += [shape(T, 64 // T, 8, D, 32) for D in (64, 128) for T in (1, 4, 16)]
CPU_SHAPES = [shape(1, 4, 12, 64), shape(4, 2, 12, 64), shape(8, 4, 4, 32, 4)]


def inputs(shape, dtype, device):
    B, H, N, D = (shape[x] for x in "BHND")
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator, device=device).to(dtype)  # noqa: E731
    x, weight = make(B, N, H * D), (make(3 * H * D, H * D) * (H * D) ** -0.5).to(dtype)
    return {
        "qkv": linear(x, weight).requires_grad_(),
        "x": x,  # for those that begin before the projection
        "weight": weight,
        "grad": make(B, N, H, D).transpose(1, 2),  # as models give it; torch reads others by the strides of the first
        "heads": H,
        "grid": (shape["T"], shape["Hp"], shape["Wp"]),
    }


def step(forward):
    """A provider from `forward(qkv, inputs) -> [B, H, N, D]`. Forward alone runs without autograd, as inference does."""

    def provider(inputs, mode):
        qkv, grad = inputs["qkv"], inputs["grad"]

        def fwd():
            with torch.no_grad():
                return (forward(qkv, inputs),)

        def fwdbwd():
            out = forward(qkv, inputs)
            return out, *torch.autograd.grad(out, qkv, grad)

        if mode != "bwd":
            return fwd if mode == "fwd" else fwdbwd
        out = forward(qkv, inputs)
        return lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True)

    return provider


def split(qkv, heads):
    return (x.transpose(1, 2) for x in qkv.unflatten(2, (3, heads, -1)).unbind(2))


def with_eager_rope(core):
    def forward(qkv, inputs):
        q, k, v = split(qkv, inputs["heads"])
        turn = published(inputs["grid"], q.shape[-1], q.dtype, q.device)
        return core(turn(q), turn(k), v)

    return forward


def with_our_rope(core):
    def forward(qkv, inputs):
        q, k, v = split(qkv, inputs["heads"])
        return core(*ops.rope3d(q, k, inputs["grid"]), v)

    return forward


def packed(backend=None):
    # `+ 0` stands for the Linear whose output the op may consume; its cost (one copy) is inside our time.
    return lambda qkv, i: ops.joint_attention_qkv_(qkv + 0, i["heads"], i["grid"], backend=backend)


def unpacked(backend=None):
    return lambda qkv, i: ops.joint_attention(*split(qkv, i["heads"]), grid=i["grid"], backend=backend)


def by_projection(x, weight, inputs, _):
    return ops.joint_attention_qkv_(linear(x, weight), inputs["heads"], inputs["grid"])


def on_gpu(forward):
    """A provider of ours by a backend that `auto` leaves to others somewhere."""

    def provider(inputs, mode):
        if inputs["qkv"].device.type == "cpu":
            raise Unavailable("of a GPU")
        return step(forward)(inputs, mode)

    return provider


def truth(inputs, mode):
    """In float64, clip by clip: all scores of a batch at T = 32 would take 121 GB."""

    def forward(qkv, inputs):
        q, k, v = split(qkv, inputs["heads"])
        q, k = ops.rope3d(q, k, inputs["grid"], backend="reference")
        return attention_reference(q, k, v, q.shape[-1] ** -0.5)

    def all_clips():
        clips = range(inputs["qkv"].shape[0])
        parts = [{**inputs, "qkv": inputs["qkv"][[i]].detach().requires_grad_(), "grad": inputs["grad"][[i]]} for i in clips]
        return [torch.cat(x) for x in zip(*(step(forward)(part, mode)() for part in parts), strict=True)]

    return all_clips


def torch_itself(qkv, inputs):
    q, k, v = split(qkv, inputs["heads"])
    return scaled_dot_product_attention(*ops.rope3d(q, k, inputs["grid"], backend="reference"), v)


def sdpa(backend=None):
    """Torch's own choice, or the backend of that name."""

    def core(device, dtype):
        if backend is None:
            return scaled_dot_product_attention
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if device == "cpu" and backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            raise Unavailable("SDPA has no such backend on CPU")

        def chosen(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(q, k, v)

        return chosen

    return core


def flex(device, dtype):
    if device == "cpu":
        raise Unavailable("FlexAttention's CPU path has no backward")
    return torch.compile(need("torch.nn.attention.flex_attention").flex_attention)


def tokens_first(module, name):
    """flash-attn 2, 3, 4 and xformers take [B, N, H, D] and half precision on a GPU."""

    def core(device, dtype):
        function = getattr(need(module), name)
        if device == "cpu" or dtype.itemsize != 2:
            raise Unavailable(f"{module} takes half precision on CUDA")

        def attend(q, k, v):
            out = function(*(x.transpose(1, 2) for x in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return attend

    return core


def rotated(core, how):
    """A provider: the attention `core` after a rotation, "eager" as published, "ours", or the published "compiled" with it."""

    def provider(inputs, mode):
        device, dtype = inputs["qkv"].device.type, inputs["qkv"].dtype
        attention = core(device, dtype)
        if how == "ours":
            return step(with_our_rope(attention))(inputs, mode)
        if how == "eager":
            return step(with_eager_rope(attention))(inputs, mode)
        if device == "cpu":
            raise Unavailable("Inductor's compile time is not spent on the CPU run")
        torch._dynamo.reset()
        return step(torch.compile(with_eager_rope(attention), dynamic=False))(inputs, mode)

    return provider


CORES = {
    "sdpa": sdpa(),
    "sdpa cudnn": sdpa("CUDNN_ATTENTION"),
    "sdpa flash": sdpa("FLASH_ATTENTION"),
    "sdpa efficient": sdpa("EFFICIENT_ATTENTION"),
    "sdpa math": sdpa("MATH"),
    "flex_attention": flex,
    "cudnn frontend": attn_peers.cudnn_frontend,
    "flash-attn 2": tokens_first("flash_attn", "flash_attn_func"),
    "flash-attn 3": tokens_first("flash_attn_interface", "flash_attn_func"),
    "flash-attn 4": tokens_first("flash_attn.cute", "flash_attn_func"),
    "xformers": tokens_first("xformers.ops", "memory_efficient_attention"),
}
HOW = {"eager": "eager rope + {}", "ours": "our rope3d + {}", "compiled": "compile(eager rope + {})"}

BENCH = Benchmark(
    op="attn",
    cpu_shapes=CPU_SHAPES,
    gpu_shapes=GPU_SHAPES,
    inputs=inputs,
    providers={
        "evaat joint_attention_qkv_": step(packed()),
        "evaat joint_attention": step(unpacked()),
        "evaat joint_attention_qkv_, SDPA": on_gpu(packed("sdpa")),
        "evaat joint_attention, SDPA": on_gpu(unpacked("sdpa")),
        "evaat joint_attention_qkv_, Gluon": on_gpu(packed("gluon")),
        "evaat joint_attention, Gluon": on_gpu(unpacked("gluon")),
        "evaat joint_attention_qkv_, Triton": on_gpu(packed("triton")),
        "evaat joint_attention, Triton": on_gpu(unpacked("triton")),
        **{name.format(core): rotated(CORES[core], how) for core in CORES for how, name in HOW.items()},
        "cudnn frontend, rope in its plan, in halves": attn_peers.cudnn_with_rope(step, split),
        "evaat projection, joint_attention_qkv_": attn_peers.projected(by_projection),
        "quack's projection with rope + flash-attn 4": attn_peers.projected(
            attn_peers.quack_and_flash_4, attn_peers.quack_tables
        ),
    },
    truth=truth,
    low=step(torch_itself),
    work=lambda s, mode, size: {"flop": {"fwd": 4, "bwd": 10, "fwdbwd": 14}[mode] * s["B"] * s["H"] * s["N"] ** 2 * s["D"]},
    baseline="eager rope + sdpa",
    modes=("fwd", "bwd", "fwdbwd"),
    ran=where.of_attention,
)


def without_rope(inputs, mode):
    """cuDNN's attention of q and k as they are: what no rotation at all would cost."""
    attention = sdpa("CUDNN_ATTENTION")(inputs["qkv"].device.type, inputs["qkv"].dtype)
    return step(lambda qkv, i: attention(*split(qkv, i["heads"])))(inputs, mode)


# What bench/decide.py asks, in a minute: Gluon, forward and the gradients alone, beside cuDNN with and without RoPE.
ASKED = ("evaat joint_attention, Gluon", "evaat joint_attention_qkv_, Gluon", "our rope3d + sdpa cudnn")
DECISION = replace(
    BENCH,
    cpu_shapes=[],
    gpu_shapes=[shape(T, 32, 12, D) for T in (4, 8, 16) for D in (64, 128)],
    providers={name: BENCH.providers[name] for name in ASKED},
    yardsticks={"sdpa cudnn, no rope": without_rope},
    baseline=ASKED[-1],
    modes=("fwd", "bwd"),
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--decide"]:
        sys.exit(main(DECISION, sys.argv[2:]))
    run(BENCH)
