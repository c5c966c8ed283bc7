"""Attention by libraries that take more than a call, for attn.py: cuDNN through its own frontend, alone and with the rotation
in its plan, and the rotation in the epilogue of the projection, by quack, before FlashAttention-4."""

import functools

import torch
from harness import Unavailable, need

from evaat_fast import ops
from evaat_fast.ops.rope3d.freqs import grid_positions


def halves_on_gpu(tensor, library):
    if tensor.device.type == "cpu" or tensor.dtype.itemsize != 2:
        raise Unavailable(f"{library} takes half precision on CUDA")


def positions(grid, device):
    """float32 [N, 3], the class token at the origin, where nothing is turned."""
    return torch.cat([torch.zeros(1, 3, device=device), grid_positions(grid, device).float()])


class Plans:
    """cuDNN's plans for q, k and v [B, H, N, D] of certain strides, each made when it is first asked for, with its workspace.
    angles: float32 [N, 1, 1, D], by which the two halves of each head are turned within the plan, or None."""

    def __init__(self, shape, strides, dtype, device, angles=None):
        self.cudnn, self.shape, self.strides, self.angles, self.device = need("cudnn"), shape, strides, angles, device
        self.dtype = {torch.bfloat16: self.cudnn.data_type.BFLOAT16, torch.float16: self.cudnn.data_type.HALF}[dtype]
        self.handle, self.backward_plans = self.cudnn.create_handle(), {}
        B, H, N, D = shape
        self.tokens_first, self.of_stats = (N * H * D, D, H * D, 1), ((B, H, N, 1), (H * N, N, 1, 1))

    def forward_plan(self, training):
        graph, of = self._begun(dict(zip("qkv", self.strides, strict=True)))
        q, k = of["q"], of["k"]
        if self.angles is not None:
            q, k = (self._put(of, f"turned {n}", graph.rope(of[n], of["angles"]), self.tokens_first) for n in "qk")
        out, stats = graph.sdpa(name="sdpa", q=q, k=k, v=of["v"], attn_scale=self.shape[3] ** -0.5, generate_stats=training)
        self._put(of, "out", out, self.tokens_first)
        if training:
            dim, stride = self.of_stats
            of["stats"] = stats.set_output(True).set_dim(dim).set_stride(stride).set_data_type(self.cudnn.data_type.FLOAT)
        return self._built(graph, of)

    def backward_plan(self, of_grad):
        of_q, of_k = self.strides[:2] if self.angles is None else (self.tokens_first,) * 2
        strides = (of_q, of_k, self.strides[2], self.tokens_first, of_grad)
        graph, of = self._begun(dict(zip(("q", "k", "v", "out", "grad"), strides, strict=True)))
        dim, stride = self.of_stats
        of["stats"] = graph.tensor(name="stats", dim=dim, stride=stride, data_type=self.cudnn.data_type.FLOAT)
        named = {"q": of["q"], "k": of["k"], "v": of["v"], "o": of["out"], "dO": of["grad"], "stats": of["stats"]}
        found = graph.sdpa_backward(name="sdpa_backward", **named, attn_scale=self.shape[3] ** -0.5)
        for name, x in zip(("dq", "dk", "dv"), found, strict=True):
            if self.angles is not None and name != "dv":
                self._put(of, f"turned {name}", x, self.tokens_first)
                x = graph.rope_backward(x, of["angles"])
            self._put(of, name, x, self.tokens_first)
        return self._built(graph, of)

    def _begun(self, strides):
        float32 = self.cudnn.data_type.FLOAT
        wide = {"intermediate_data_type": float32, "compute_data_type": float32}
        graph = self.cudnn.pygraph(io_data_type=self.dtype, **wide, handle=self.handle)
        of = {n: graph.tensor(name=n, dim=self.shape, stride=x, data_type=self.dtype) for n, x in strides.items()}
        if self.angles is not None:
            dim, stride = tuple(self.angles.shape), self.angles.stride()
            of["angles"] = graph.tensor(name="angles", dim=dim, stride=stride, data_type=float32)
        return graph, of

    def _put(self, of, name, x, stride):
        of[name] = x.set_output(True).set_dim(self.shape).set_stride(stride).set_data_type(self.dtype)
        return of[name]

    def _built(self, graph, of):
        graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        return graph, of, torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=self.device)

    def _run(self, plan, given):
        graph, of, workspace = plan
        given |= {} if self.angles is None else {"angles": self.angles}
        assert given.keys() == of.keys()
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        graph.execute({of[name]: x.detach() for name, x in given.items()}, workspace, handle=self.handle)

    training = functools.cached_property(lambda self: self.forward_plan(True))
    inference = functools.cached_property(lambda self: self.forward_plan(False))

    def forward(self, q, k, v, training):
        """(out, the queries and keys that the scores are of, log-sum-exps, None without training)."""
        B, H, N, D = self.shape
        make = lambda: q.new_empty((B, N, H, D)).transpose(1, 2)  # noqa: E731
        given = {"q": q, "k": k, "v": v, "out": make()}
        if training:
            given["stats"] = q.new_empty(self.of_stats[0], dtype=torch.float32)
        if self.angles is not None:
            given |= {"turned q": make(), "turned k": make()}
        self._run(self.training if training else self.inference, given)
        return given["out"], given.get("turned q", q), given.get("turned k", k), given.get("stats")

    def backward(self, q, k, v, out, stats, grad):
        """dQ, dK and dV."""
        plan = self.backward_plans.get(grad.stride())
        if plan is None:
            plan = self.backward_plans[grad.stride()] = self.backward_plan(grad.stride())
        names = ("dq", "dk", "dv") if self.angles is None else ("dq", "dk", "dv", "turned dq", "turned dk")
        given = {"q": q, "k": k, "v": v, "out": out, "stats": stats, "grad": grad}
        given |= {name: torch.empty_like(out) for name in names}
        self._run(plan, given)
        return given["dq"], given["dk"], given["dv"]


@functools.lru_cache(maxsize=4)  # of each case its plans, of the case before none
def plans_of(shape, strides, dtype, device, grid=None):
    """grid: turned by it within the plan."""
    angles = None
    if grid is not None:
        by_pair = positions(grid, device) @ ops.joint_freqs(shape[3]).to(device)
        angles = torch.cat([by_pair, by_pair], 1)[:, None, None]
    return Plans(shape, strides, dtype, device, angles)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plans, q, k, v):
        out, q, k, stats = plans.forward(q, k, v, True)
        ctx.plans = plans
        ctx.save_for_backward(q, k, v, out, stats)
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, *ctx.plans.backward(*ctx.saved_tensors, grad)


def attend(q, k, v, grid=None):
    """softmax(q k^T / sqrt(D)) v by cuDNN; with a grid, q and k are turned before, in halves."""
    plans = plans_of(tuple(q.shape), tuple(x.stride() for x in (q, k, v)), q.dtype, q.device, grid)
    if torch.is_grad_enabled() and q.requires_grad:
        return _Attention.apply(plans, q, k, v)
    return plans.forward(q, k, v, False)[0]


def cudnn_frontend(device, dtype):
    """An attention for attn.py's list of them."""
    halves_on_gpu(torch.empty(0, dtype=dtype, device=device), "cuDNN")
    need("cudnn")
    return attend


def in_halves(qkv, heads, inverse=False):
    """A projection's output with the channels of each query and key head in another order, first those of all pairs' first
    halves: what a projection whose rows are stored so would give. Scores stay as they are."""
    parts = qkv.unflatten(2, (3, heads, -1))
    D = parts.shape[-1]
    order = torch.arange(D, device=qkv.device).view(-1, 2).T.flatten()
    order = order.argsort() if inverse else order
    return torch.cat([parts[:, :, :2, :, order], parts[:, :, 2:]], 2).flatten(2)


def cudnn_with_rope(step, split):
    """A provider for attn.py, by its step and split: cuDNN's RoPE and SDPA in one plan."""

    def provider(inputs, mode):
        heads, grid = inputs["heads"], inputs["grid"]
        halves_on_gpu(inputs["qkv"], "cuDNN")
        if need("cudnn").backend_version() < 92400:
            raise Unavailable(f"a rotation in its plan needs cuDNN 9.24, this is {need('cudnn').backend_version()}")
        reordered = in_halves(inputs["qkv"].detach(), heads).requires_grad_()
        run = step(lambda qkv, i: attend(*split(qkv, heads), grid))({**inputs, "qkv": reordered}, mode)

        def results():
            found = run()
            return found if mode == "fwd" else (*found[:-1], in_halves(found[-1], heads, True))

        call = lambda: run()  # noqa: E731
        call.results = results
        return call

    return provider


def projected(forward, prepare=lambda inputs: None):
    """A provider of forward(x, weight, inputs, what is prepared) -> [B, H, N, D] that begins before the projection."""

    def provider(inputs, mode):
        if mode != "fwd":
            raise Unavailable("the projection's own gradients are not compared")
        prepared = prepare(inputs)

        def run():
            with torch.no_grad():
                return (forward(inputs["x"], inputs["weight"], inputs, prepared),)

        return run

    return provider


def quack_tables(inputs):
    """Quack's product with an epilogue, what that takes, and the attention."""
    halves_on_gpu(inputs["qkv"], "FlashAttention-4")
    rotary, attention = need("quack.epilogue.rotary"), need("flash_attn.cute").flash_attn_func
    return rotary.mrope_posfreq_epi, of_epilogue(rotary, inputs), attention


def of_epilogue(rotary, inputs):
    """Positions of rows and frequencies of columns, by which neighbouring columns are turned: those of queries and keys."""
    device, (B, _, width) = inputs["qkv"].device, inputs["qkv"].shape
    at, freqs = positions(inputs["grid"], device).T, ops.joint_freqs(width // 3 // inputs["heads"]).to(device)
    operands = {"bias": torch.zeros(1, width, device=device)}
    for axis, name in enumerate("thw"):
        of_columns = rotary.make_interleaved_inv_freq(freqs[axis].double(), width // 3 * 2, width // 3)
        operands |= {f"pos_{name}": at[axis].repeat(B)[None], f"freq_{name}": of_columns[None]}
    return operands


def quack_and_flash_4(x, weight, inputs, prepared):
    epilogue, operands, attention = prepared
    qkv = epilogue(x.flatten(0, 1), weight.mT, **operands)["D"].view(inputs["qkv"].shape)
    out = attention(*qkv.unflatten(2, (3, inputs["heads"], -1)).unbind(2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
