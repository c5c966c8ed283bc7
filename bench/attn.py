"""RoPE and attention over the tokens of a clip, as the model calls it: python bench/attn.py

Every provider starts from the packed output of the qkv projection [B, N, 3*H*D] and ends with [B, H, N, D] (and, in fwdbwd,
with the gradient of the packed tensor). FLOPs: 4 B H N^2 D forward, 2.5 times that more backward; the rotation is not counted.
"""

import torch
from harness import Benchmark, Unavailable, need, run
from rope3d import published
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops.attn import attention_reference


def shape(T, B, H, D, patches=14):
    return {"B": B, "H": H, "T": T, "Hp": patches, "Wp": patches, "D": D, "N": 1 + T * patches**2}


# EVA02-AT-B (H 12, 14 x 14 patches) and -L (H 16, 16 x 16 patches), D = 64.
GPU_SHAPES = [shape(T, 32, 12, 64) for T in (4, 8, 16, 32)] + [shape(T, 16, 16, 64, 16) for T in (4, 16)]
CPU_SHAPES = [shape(1, 4, 12, 64), shape(4, 2, 12, 64), shape(8, 4, 4, 32, 4)]


def inputs(shape, dtype, device):
    B, H, N, D = (shape[x] for x in "BHND")
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator, device=device).to(dtype)  # noqa: E731
    return {
        "qkv": make(B, N, 3 * H * D).requires_grad_(),
        "grad": make(B, H, N, D),
        "heads": H,
        "grid": (shape["T"], shape["Hp"], shape["Wp"]),
    }


def step(forward):
    """A provider from `forward(qkv, inputs) -> [B, H, N, D]`. Forward alone runs without autograd, as inference does."""

    def provider(inputs, mode):
        def fwd():
            with torch.no_grad():
                return (forward(inputs["qkv"], inputs),)

        def fwdbwd():
            out = forward(inputs["qkv"], inputs)
            return out, *torch.autograd.grad(out, inputs["qkv"], inputs["grad"])

        return fwd if mode == "fwd" else fwdbwd

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


def packed(qkv, inputs):
    # `+ 0` stands for the Linear whose output the op may consume; its cost (one copy) is inside our time.
    return ops.joint_attention_qkv_(qkv + 0, inputs["heads"], inputs["grid"])


def unpacked(qkv, inputs):
    return ops.joint_attention(*split(qkv, inputs["heads"]), grid=inputs["grid"])


def triton(inputs, mode):
    if inputs["qkv"].device.type == "cpu":
        raise Unavailable("Triton's kernels run on a GPU")
    forward = lambda qkv, i: ops.joint_attention(*split(qkv, i["heads"]), grid=i["grid"], backend="triton")  # noqa: E731
    return step(forward)(inputs, mode)


def truth(qkv, inputs):
    q, k, v = split(qkv, inputs["heads"])
    q, k = ops.rope3d(q, k, inputs["grid"], backend="reference")
    return attention_reference(q, k, v, q.shape[-1] ** -0.5)


def torch_itself(qkv, inputs):
    q, k, v = split(qkv, inputs["heads"])
    return scaled_dot_product_attention(*ops.rope3d(q, k, inputs["grid"], backend="reference"), v)


def sdpa(backend):
    def provider(inputs, mode):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if inputs["qkv"].device.type == "cpu" and backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            raise Unavailable("SDPA has no such backend on CPU")

        def core(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(q, k, v)

        return step(with_our_rope(core))(inputs, mode)

    return provider


def compiled(inputs, mode):
    if inputs["qkv"].device.type == "cpu":
        raise Unavailable("Inductor's compile time is not spent on the CPU run")
    return step(torch.compile(with_eager_rope(scaled_dot_product_attention)))(inputs, mode)


def flex(inputs, mode):
    if inputs["qkv"].device.type == "cpu":
        raise Unavailable("FlexAttention's CPU path has no backward")
    core = torch.compile(need("torch.nn.attention.flex_attention").flex_attention)
    return step(with_our_rope(core))(inputs, mode)


def flash(module, name):
    """flash-attn 2, 3 and 4 take [B, N, H, D] and half precision on a GPU."""

    def provider(inputs, mode):
        function = getattr(need(module), name)
        if inputs["qkv"].device.type == "cpu" or inputs["qkv"].element_size() != 2:
            raise Unavailable(f"{module} takes half precision on CUDA")

        def core(q, k, v):
            out = function(*(x.transpose(1, 2) for x in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return step(with_our_rope(core))(inputs, mode)

    return provider


def xformers(inputs, mode):
    function = need("xformers.ops").memory_efficient_attention
    core = lambda q, k, v: function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)  # noqa: E731
    return step(with_our_rope(core))(inputs, mode)


BENCH = Benchmark(
    op="attn",
    cpu_shapes=CPU_SHAPES,
    gpu_shapes=GPU_SHAPES,
    inputs=inputs,
    providers={
        "evaat joint_attention_qkv_": step(packed),
        "evaat joint_attention": step(unpacked),
        "evaat joint_attention, Triton": triton,
        "eager rope + sdpa": step(with_eager_rope(scaled_dot_product_attention)),
        "torch.compile(eager rope + sdpa)": compiled,
        "our rope3d + sdpa cudnn": sdpa("CUDNN_ATTENTION"),
        "our rope3d + sdpa flash": sdpa("FLASH_ATTENTION"),
        "our rope3d + sdpa efficient": sdpa("EFFICIENT_ATTENTION"),
        "our rope3d + sdpa math": sdpa("MATH"),
        "our rope3d + flex_attention": flex,
        "our rope3d + flash-attn 2": flash("flash_attn", "flash_attn_func"),
        "our rope3d + flash-attn 3": flash("flash_attn_interface", "flash_attn_func"),
        "our rope3d + flash-attn 4": flash("flash_attn.cute", "flash_attn_func"),
        "our rope3d + xformers": xformers,
    },
    truth=step(truth),
    low=step(torch_itself),
    work=lambda s, mode, size: {"flop": (4 if mode == "fwd" else 14) * s["B"] * s["H"] * s["N"] ** 2 * s["D"]},
    baseline="eager rope + sdpa",
)

if __name__ == "__main__":
    run(BENCH)
