"""joint_attention of packed clips in Gluon: emulated, whatever the order in which a GPU does what it may, and on a GPU."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from check import close, on_hopper
from test_attn_clips import one_by_one, packed, places, results
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops._core import dispatch
from evaat_fast.ops.attn.clips import clip_positions
from evaat_fast.ops.rope3d.rotation import Rotation
from evaat_fast.ops.rope3d.table import table_of

interpret = pytest.mark.interpret
pytest.importorskip("evaat_fast.kernels.attn.sm90", reason="needs Triton 3.6", exc_type=ImportError)
from evaat_fast.kernels.attn import sm90, sm90_backward, sm90_clips  # noqa: E402
from gluon_emulated import emulate  # noqa: E402

F16, D = torch.float16, 64
LENGTHS = (0, 1, 15, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257)


class Clips:
    """Inputs of a call: [1, H, tokens, 64], turned by positions where `turned`."""

    def __init__(self, lengths, H=2, Hk=1, turned=False, dtype=F16, device="cpu"):
        self.inputs, self.limits = packed(lengths, H, Hk, D, dtype, device)
        self.rope = places("positions", sum(lengths), device) if turned else {}
        self.do, self.dlse = torch.randn(sum(lengths), H, D, device=device).to(dtype), None
        self.table = None
        if turned:
            rows = clip_positions(self.limits, sum(lengths), None, self.rope["positions"], self.rope["prefix_tokens"])
            self.table = table_of(Rotation(None, rows, (), 0, True, False, "triton"), D, rows.device)

    def fill(self, clip, number):
        a, b = self.limits[clip : clip + 2].tolist()
        with torch.no_grad():
            for x in (*self.inputs, self.do):
                x[a:b] = number

    def turn(self, x):
        """Of the memory that it is in, [1, H, tokens, 64]."""
        x = x.detach().transpose(0, 1)[None]
        if self.table is None:
            return x
        cos, sin = (t[0].to(torch.float64 if x.dtype == torch.float64 else torch.float32) for t in self.table)
        wide = x.to(cos.dtype).unflatten(-1, (D // 2, 2))
        a, b = wide.unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
        return turned.transpose(1, 2).contiguous().transpose(1, 2)

    def plain(self, dtype):
        """(out, lse, dq, dk, dv) by the specifications, clip by clip."""
        inputs = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        out = one_by_one(scaled_dot_product_attention, inputs, self.limits, self.rope)
        lse = torch.zeros(0)
        if self.dlse is None:
            grads = torch.autograd.grad(out, inputs, self.do.to(dtype))
        q, k = (self.turn(x)[0] for x in inputs[:2])
        wide = torch.promote_types(dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).repeat_interleave(q.shape[0] // k.shape[0], 0).mT * D**-0.5
        clip = torch.searchsorted(self.limits, torch.arange(q.shape[1], device=q.device), right=True)
        lse = scores.masked_fill(clip[:, None] != clip[None, :], float("-inf")).logsumexp(-1)
        return out.detach(), lse, *grads

    def forward(self, module, keep=True):
        q, k, v = (x.detach().transpose(0, 1)[None] for x in self.inputs)
        out = torch.full_like(q, float("nan"))
        lse, turned = q.new_full(q.shape[:3], float("nan"), dtype=torch.float32), torch.full_like(q, float("nan"))
        k = self.turn(self.inputs[1])
        module.forward(q, k, v, out, lse, turned if keep else None, self.table, D**-0.5, self.limits)
        return out, lse, turned

    def backward(self, module, ordered=False):
        """Of exact outputs and log-sum-exps."""
        out, lse, *_ = self.plain(torch.float64)
        q, k = (self.turn(x) for x in self.inputs[:2])
        v, out, do = (x.detach().to(q.dtype).transpose(0, 1)[None] for x in (self.inputs[2], out, self.do))
        grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
        tables, lse = (self.table, self.table), lse.float()[None].contiguous()
        module.backward(q, k, v, out, do, lse, self.dlse, grads, tables, D**-0.5, self.limits, ordered)
        return grads
