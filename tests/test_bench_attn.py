"""The attention benchmark: peers that take more than a call get what their documentation asks for, by stand-ins that do what it
says and refuse what does not fit; and which kernels ran is told."""

import importlib
import math
import types

import pytest
import torch

from evaat_fast import ops

pytestmark = pytest.mark.usefixtures("bench_on_path")
GRID, HEADS, D = (2, 3, 4), 3, 16


@pytest.fixture
def attn():
    return importlib.import_module("attn")


@pytest.fixture
def inputs(attn):
    return attn.inputs(attn.shape(2, 2, HEADS, D, 3) | {"Hp": 3, "Wp": 4, "N": 25}, torch.float16, "cpu")


class Node:
    """A tensor of a graph: what it is, and its value while the graph runs."""

    def __init__(self, dim=None, stride=None, data_type=None, compute=None):
        self.dim, self.stride, self.data_type, self.compute, self.is_output = dim, stride, data_type, compute, False

    def set_output(self, is_output):
        self.is_output = is_output
        return self

    def set_dim(self, dim):
        self.dim = tuple(dim)
        return self

    def set_stride(self, stride):
        self.stride = tuple(stride)
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self


def halves(x, angles, sign=1):
    """RoPE as cuDNN documents it: the halves of a head, by angles [N, 1, 1, D] of which the halves are alike."""
    assert angles.shape == (x.shape[2], 1, 1, x.shape[3]) and torch.equal(*angles.chunk(2, -1))
    (low, high), angle = x.chunk(2, -1), angles[:, 0, 0].chunk(2, -1)[0]
    cos, sin = angle.cos(), sign * angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Graph:
    """A graph of cuDNN's frontend, in float32."""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert (io_data_type, intermediate_data_type, compute_data_type) == (torch.float16, torch.float32, torch.float32)
        self.nodes, self.built, self.handle = [], False, handle

    def add(self, compute, count=1, **known):
        """Nodes of a result, which is computed once."""
        nodes, kept = [Node(**known) for _ in range(count)], []

        def nth(i):
            kept[:] = kept or compute()
            return kept[i]

        for i, node in enumerate(nodes):
            node.compute = lambda i=i: nth(i)
        self.nodes += nodes
        return nodes

    def tensor(self, name, dim, stride, data_type):
        self.nodes.append(Node(tuple(dim), tuple(stride), data_type))
        return self.nodes[-1]

    def rope(self, input, freqs):
        return self.add(lambda: [halves(self.value(input), self.value(freqs))])[0]

    def rope_backward(self, dY, freqs):
        return self.add(lambda: [halves(self.value(dY), self.value(freqs), -1)])[0]

    def sdpa(self, name, q, k, v, attn_scale, generate_stats):
        def compute():
            scores = self.value(q) @ self.value(k).mT * attn_scale
            return [scores.softmax(-1) @ self.value(v), scores.logsumexp(-1, keepdim=True)]

        out, stats = self.add(compute, 2)
        return out, stats if generate_stats else None

    def sdpa_backward(self, name, q, k, v, o, dO, stats, attn_scale):
        def compute():
            q_, k_, v_, o_, dO_ = map(self.value, (q, k, v, o, dO))
            p = (q_ @ k_.mT * attn_scale - self.value(stats)).exp()
            ds = p * (dO_ @ v_.mT - (dO_ * o_).sum(-1, keepdim=True)) * attn_scale
            return [ds @ k_, ds.mT @ q_, p.mT @ dO_]

        return self.add(compute, 3)

    def build(self, modes):
        assert modes == ["A", "FALLBACK"]
        self.built = True

    def get_workspace_size(self):
        return 7

    def value(self, node):
        return (self.given[node] if node.compute is None else node.compute()).float()

    def execute(self, given, workspace, handle):
        assert (
            self.built and workspace.numel() >= 7 and handle is self.handle and not any(x.requires_grad for x in given.values())
        )
        assert given.keys() == {n for n in self.nodes if n.compute is None or n.is_output}
        for node, x in given.items():
            assert (x.shape, x.stride(), x.dtype) == (node.dim, node.stride, node.data_type)
        self.given = given
        for node, x in given.items():
            if node.is_output:
                x.copy_(node.compute())


@pytest.fixture
def cudnn(monkeypatch):
    """Stands for the frontend, and for the stream of a GPU."""
    kind = types.SimpleNamespace(FLOAT=torch.float32, HALF=torch.float16, BFLOAT16=torch.bfloat16)
    streams = []
    module = types.SimpleNamespace(
        data_type=kind, heur_mode=types.SimpleNamespace(A="A", FALLBACK="FALLBACK"), pygraph=Graph, create_handle=object
    )
    module.set_stream = lambda handle, stream: streams.append(stream)
    monkeypatch.setitem(importlib.import_module("sys").modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=5))
    peers = importlib.import_module("attn_peers")
    peers.plans_of.cache_clear()
    yield peers
    peers.plans_of.cache_clear()
    assert set(streams) == {5}


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwdbwd"])
@pytest.mark.parametrize("turned", [False, True])
def test_cudnn_by_its_frontend(cudnn, attn, inputs, turned, mode):
    """Alone behind our rotation, and with its own in halves: both are the same attention, and a plan serves call after call."""
    heads = inputs["heads"]
    qkv = cudnn.in_halves(inputs["qkv"].detach(), heads).requires_grad_() if turned else inputs["qkv"]
    forward = attn.with_our_rope(cudnn.attend)
    if turned:
        forward = lambda qkv, i: cudnn.attend(*attn.split(qkv, heads), i["grid"])  # noqa: E731
    run = attn.step(forward)({**inputs, "qkv": qkv}, mode)
    for _ in range(2):
        found = list(run())
    if turned and mode != "fwd":
        found[-1] = cudnn.in_halves(found[-1], heads, True)
    for x, y in zip(found, attn.truth(doubled(inputs), mode)(), strict=True):
        assert (x.double() - y).abs().max() < 5e-3 * y.abs().max()
    assert cudnn.plans_of.cache_info().misses == 1


def doubled(inputs):
    return importlib.import_module("harness").doubled(inputs)


def test_halves_are_another_order_of_the_same_channels(cudnn, attn, inputs):
    qkv = inputs["qkv"].detach()
    other = cudnn.in_halves(qkv, HEADS)
    assert torch.equal(cudnn.in_halves(other, HEADS, True), qkv) and not torch.equal(other, qkv)
    cudnn.attend(*attn.split(qkv.detach(), HEADS))  # the fixture asks for a stream
    q, k, v = attn.split(qkv.double(), HEADS)
    turned_q, turned_k, _ = attn.split(other.double(), HEADS)
    plain = ops.joint_attention(q, k, v, grid=GRID)
    torch.testing.assert_close(ops.joint_attention(turned_q, turned_k, v, grid=GRID, interleaved=False), plain)


def test_the_rotation_in_quacks_epilogue(monkeypatch, attn, inputs):
    """D = A B + bias, neighbouring columns turned by the sum of an axis' position times its frequency, in turns and in two
    float32 numbers whose sum it is."""

    def table(inv_freq, rotary_n, nonrotary_n):
        turns = inv_freq.double() / (2 * math.pi)
        high = turns.float()
        head = torch.stack([high, (turns - high.double()).float()], -1).flatten()
        return torch.nn.functional.pad(head.repeat(rotary_n // len(head)), (0, nonrotary_n))

    def epilogue(A, B, *, bias, **operands):
        (M, K), n = A.shape, B.shape[1]
        assert B.shape == (K, n) and bias.shape == (1, n) and bias.dtype == torch.float32
        assert operands.keys() == {f"{x}_{axis}" for x in ("pos", "freq") for axis in "thw"}
        turns = torch.zeros(M, n // 2, dtype=torch.float64)
        for axis in "thw":
            at, freq = operands[f"pos_{axis}"], operands[f"freq_{axis}"]
            assert at.shape == (1, M) and freq.shape == (1, n) and {at.dtype, freq.dtype} == {torch.float32}
            turns += at[0].double()[:, None] * freq[0].double().view(-1, 2).sum(1)
        x = (A.double() @ B.double() + bias).unflatten(1, (-1, 2))
        cos, sin = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
        turned = torch.stack([x[..., 0] * cos - x[..., 1] * sin, x[..., 0] * sin + x[..., 1] * cos], -1)
        return {"D": turned.flatten(1).to(A.dtype)}

    def attention(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), None

    peers, modules = importlib.import_module("attn_peers"), importlib.import_module("sys").modules
    rotary = types.SimpleNamespace(mrope_posfreq_epi=epilogue, make_interleaved_inv_freq=table)
    monkeypatch.setitem(modules, "quack.epilogue.rotary", rotary)
    monkeypatch.setitem(modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_func=attention))
    with pytest.raises(importlib.import_module("harness").Unavailable, match="on CUDA"):
        peers.quack_tables(inputs)
    operands = peers.of_epilogue(rotary, inputs)
    out = peers.quack_and_flash_4(inputs["x"], inputs["weight"], inputs, (epilogue, operands, attention))
    (truth,) = attn.truth(doubled(inputs), "fwd")()
    assert (out.double() - truth).abs().max() < 5e-3 * truth.abs().max()
    (ours,) = attn.BENCH.providers["evaat projection, joint_attention_qkv_"](inputs, "fwd")()
    assert (ours.double() - truth).abs().max() < 5e-3 * truth.abs().max()


def test_peers_that_are_not_here_say_why(attn, inputs):
    """Whatever one raises, it is shown with its reason, and the others go on."""
    harness = importlib.import_module("harness")
    names = ["our rope3d + cudnn frontend", "cudnn frontend, rope in its plan, in halves", "our rope3d + flash-attn 4"]
    names += ["quack's projection with rope + flash-attn 4", "our rope3d + sdpa"]
    args = types.SimpleNamespace(providers=names, skip=[])
    found = harness.check(attn.BENCH, inputs, "fwd", torch.float16, args)
    for name in names[:-1]:
        assert found[name][0] is None and found[name][1]["absent"], name
    assert found["our rope3d + sdpa"][0] is not None


def test_which_attention_ran():
    where = importlib.import_module("where")
    found = {
        "void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor<float>>": (3.0, 4),
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128": (1.0, 1),
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>": (0.5, 1),
    }
    shown = where.of_attention(found)
    assert [x[:20] for x in shown] == ["cudnn_generated_fort", "pytorch_flash::flash"]
    math_ = {"nvjet_sm90_tst": (2.0, 2), "softmax_warp_forward": (3.0, 1), "copy_kernel": (0.1, 1), "mul": (0.2, 1)}
    assert where.of_attention(math_) == ["softmax_warp_forward", "nvjet_sm90_tst", "mul"]
