"""LayerNorm fused with what stands before it, against eager torch, torch.compile and other libraries: python bench/norm.py

Shapes are rows (clips times tokens) and channels of EVA-02: add_norm between its branches (the stream of float32), layer_norm
before the output projection (the same op without a residual), swiglu_norm inside its MLP. Bytes: what must be read and written
once, the copy's are as many. Others get their parts where they have no whole: a sum, then a norm.
"""

import torch
import torch.nn.functional as F
from harness import Benchmark, Unavailable, need, run
from timing import copy_kernel

from evaat_fast import ops


def make_inputs(shape, dtype, device):
    M, C = shape["M"], shape["C"]
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *size: torch.randn(size, generator=generator, device=device)  # noqa: E731
    inputs = {"op": shape["op"], "x": make(M, 2 * C if shape["op"] == "swiglu_norm" else C).to(dtype)}
    inputs |= {"weight": 1 + make(C) / 8, "bias": make(C) / 8}
    if shape["op"] == "add_norm":
        inputs |= {"residual": 2 * make(M, C), "dtotal": make(M, C)}
    inputs = {n: x.requires_grad_(n != "dtotal") if n != "op" else x for n, x in inputs.items()}
    return inputs | {"dY": make(M, C).to(dtype)}


def provider(function):
    """function(x, residual, weight, bias) -> (normed, total), or normed where there is no residual."""

    def make(inputs, mode):
        step = function(inputs)
        names = [n for n in ("x", "residual", "weight", "bias") if n in inputs]
        given = [inputs.get(n) for n in ("x", "residual", "weight", "bias")]
        upstream = [inputs[n] for n in ("dY", "dtotal") if n in inputs]

        def fwd():
            with torch.no_grad():
                out = step(*given)
            return out if isinstance(out, tuple) else (out,)

        def fwdbwd():
            outs = step(*given)
            outs = outs if isinstance(outs, tuple) else (outs,)
            return *outs, *torch.autograd.grad(outs, [inputs[n] for n in names], upstream)

        return fwd if mode == "fwd" else fwdbwd

    return make


def ours(backend=None):
    def function(inputs):
        op = inputs["op"]
        if op == "swiglu_norm":
            call = lambda x, _, weight, bias: ops.swiglu_norm(x, weight, bias, backend=backend)  # noqa: E731
        else:
            call = lambda *given: ops.add_norm(*given, backend=backend)[: 1 + (op == "add_norm")]  # noqa: E731
        return call

    return provider(function)


def as_autocast(norm):
    """What a block of EVA-02 does under autocast, with norm(x, weight, bias) -> x's dtype."""

    def function(inputs):
        dtype = inputs["x"].dtype
        if inputs["op"] == "swiglu_norm":
            return lambda x, _, weight, bias: norm(F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], weight, bias).to(dtype)
        if inputs["op"] == "layer_norm":
            return lambda x, _, weight, bias: norm(x, weight, bias).to(dtype)

        def block(x, residual, weight, bias):
            total = residual + x
            return norm(total, weight, bias).to(dtype), total

        return block

    return function


def layer_norm(x, weight, bias):
    """In float32, as autocast has it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), 1e-6)


EAGER = as_autocast(layer_norm)
EAGER_STEP = provider(EAGER)


def compiled(inputs):
    if inputs["x"].device.type == "cpu":
        raise Unavailable("on a CPU torch.compile takes minutes")
    return torch.compile(EAGER(inputs), dynamic=False)


def on_gpu(inputs):
    if inputs["x"].device.type == "cpu":
        raise Unavailable("its kernels run on a GPU")


def liger(inputs):
    on_gpu(inputs)
    norm = need("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    both = need("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
    if inputs["op"] == "swiglu_norm":
        return lambda x, _, weight, bias: norm(both(*(y.contiguous() for y in x.chunk(2, -1))), weight, bias, 1e-6)
    return as_autocast(lambda x, weight, bias: norm(x, weight, bias, 1e-6))(inputs)


class QuackNorm(torch.autograd.Function):
    """quack has the two passes, and leaves their connection to its users."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        out, rstd, mean = need("quack.rmsnorm").layernorm_fwd(x, weight, bias, 1e-6, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, weight, rstd, mean)
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, rstd, mean = ctx.saved_tensors
        return need("quack.rmsnorm").layernorm_bwd(x, weight, dout.contiguous(), rstd, mean)


def quack(inputs):
    on_gpu(inputs)
    need("quack.rmsnorm")
    return as_autocast(QuackNorm.apply)(inputs)


def apex(inputs):
    on_gpu(inputs)
    norm = need("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return as_autocast(lambda x, weight, bias: norm(x.float(), weight, bias, weight.shape, 1e-6))(inputs)


def cudnn(inputs):
    on_gpu(inputs)
    norm = need("cudnn.experimental.ops").layer_norm
    return as_autocast(lambda x, weight, bias: norm(x, weight.shape, weight, bias, 1e-6))(inputs)


def copy(inputs, mode):
    """As many bytes read and written as the op must."""
    (M, C), size = inputs["dY"].shape, inputs["x"].element_size()
    moved = work({"op": inputs["op"], "M": M, "C": C}, mode, size)["byte"]
    source = torch.zeros(moved // 8, dtype=torch.float32, device=inputs["x"].device)
    target = torch.empty_like(source)
    return lambda: [copy_kernel(source, target)]


# Of each element, (in the dtype, in float32) numbers that are read or written: forward, backward.
BYTES = {"add_norm": [(2, 2), (2, 3)], "layer_norm": [(2, 0), (3, 0)], "swiglu_norm": [(3, 0), (5, 0)]}


def work(shape, mode, size):
    low, wide = (sum(x) for x in zip(*BYTES[shape["op"]][: 1 if mode == "fwd" else 2], strict=True))
    return {"byte": shape["M"] * shape["C"] * (low * size + wide * 4)}


def shapes(M, *pairs):
    return [{"op": op, "M": M, "C": C} for op, C in pairs]


BENCH = Benchmark(
    op="norm",
    # 2 clips of 4 frames of EVA02-AT-B, 1 of L; and the class tokens of 2, which are all that the last block's end computes.
    cpu_shapes=shapes(2 * 785, ("add_norm", 768), ("layer_norm", 768), ("swiglu_norm", 2048))
    + shapes(1025, ("swiglu_norm", 2730))
    + shapes(2, ("add_norm", 768), ("swiglu_norm", 2048)),
    # 64 clips of 4 frames of EVA02-AT-B, 32 of L.
    gpu_shapes=shapes(64 * 785, ("add_norm", 768), ("swiglu_norm", 2048), ("layer_norm", 768))
    + shapes(32 * 1025, ("add_norm", 1024), ("swiglu_norm", 2730), ("layer_norm", 1024))
    + shapes(64 * 785, ("add_norm", 384), ("swiglu_norm", 4096)),
    inputs=make_inputs,
    providers={
        "evaat": ours(),
        "evaat, the reference": ours("reference"),
        "eager": EAGER_STEP,
        "torch.compile(eager)": provider(compiled),
        "Liger": provider(liger),
        "quack": provider(quack),
        "Apex": provider(apex),
        "cuDNN frontend": provider(cudnn),
    },
    truth=EAGER_STEP,
    work=work,
    baseline="eager",
    yardsticks={"copy of as many bytes": copy},
)

if __name__ == "__main__":
    run(BENCH)
