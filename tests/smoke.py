"""Run in a fresh environment that has only torch and the wheel: python smoke.py. Proves what `pip install` gives."""

import sys

import torch

import evaat_fast
from evaat_fast import _cpu, ops

assert "site-packages" in evaat_fast.__file__, f"imported from the source tree: {evaat_fast.__file__}"
heavy = {"triton", "numpy.testing", "decord", "av", "tokenizers", "einops"} & set(sys.modules)
assert not heavy, f"import evaat_fast.ops brought in {heavy}"

q, k = torch.randn(2, 2, 3, 1 + 2 * 3 * 3, 32).unbind()
ours, expected = ops.rope3d(q, k, (2, 3, 3)), ops.rope3d(q, k, (2, 3, 3), backend="reference")
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, expected, strict=True))
ops.joint_attention(q, k, k, grid=(2, 3, 3))

video, text = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
loss = ops.sms_loss(video, text, torch.eye(8), backend="cpu")
loss.backward()
assert torch.isfinite(loss) and video.grad.abs().sum() > 0
rows = ops.patchify(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), 16, (0, 0, 0), (1, 1, 1))
assert rows.shape == (1, 8, 768)
print(f"smoke: evaat-fast {evaat_fast.__version__} from {evaat_fast.__file__}, instruction set level {_cpu.isa()}")
print("4 passed, 0 failed")
