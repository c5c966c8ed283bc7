"""evaat_fast.ops and losses inside a program that has nothing but torch: other packages are made unimportable, a block is
trained."""

import subprocess
import sys

PROGRAM = r'''
import importlib.metadata, re, sys

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def required(name, seen):
    if plain(name) not in seen:
        seen.add(plain(name))
        try:
            for line in importlib.metadata.requires(name) or []:
                if "extra ==" not in line:
                    required(re.match(r"[\w.-]+", line)[0], seen)
        except importlib.metadata.PackageNotFoundError:
            pass
    return seen

allowed = required("torch", set()) - {"triton", "numpy"} | {"evaat-fast"}
modules = importlib.metadata.packages_distributions()

class OnlyTorch:
    """A finder that does not find the others."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        owners = modules.get(name.split(".")[0], [])
        if owners and not any(plain(owner) in allowed for owner in owners):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(OnlyTorch, sys.meta_path)
for absent in ("numpy", "triton", "einops", "pytest"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} is still there")

import torch
from evaat_fast import ops
from evaat_fast.losses import avion, egovlp, lavila, open_clip

torch.manual_seed(0)
H, D, grid = 2, 16, (2, 3, 3)

class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.cls = torch.nn.Linear(768, H * D), torch.nn.Parameter(torch.zeros(1, 1, H * D))
        self.qkv, self.out = torch.nn.Linear(H * D, 3 * H * D), torch.nn.Linear(H * D, 8)
        self.freqs = torch.nn.Parameter(ops.joint_freqs(D))

    def forward(self, frames):
        rows = ops.patchify(frames, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        x = torch.cat((self.cls.expand(len(rows), -1, -1), self.patch(rows)), 1)
        x = x + ops.joint_attention_qkv_(self.qkv(x), H, grid).transpose(1, 2).flatten(2)
        q = ops.rope3d(x.unflatten(2, (H, D)).transpose(1, 2), None, grid, freqs=self.freqs)
        return self.out(q.transpose(1, 2).flatten(2)[:, 0])

tower, labels = Tower(), torch.eye(6)
sms = avion.SymmetricMultiSimiliarityLoss(matrix=labels)
frames = torch.randint(0, 256, (6, 2, 48, 48, 3), dtype=torch.uint8)
text = torch.randn(6, 8, requires_grad=True)
optimizer = torch.optim.Adam([*tower.parameters(), text], 1e-2)
losses = []
for step in range(15):
    loss = sms(tower(frames), text, torch.ones(6), torch.arange(6).repeat(2))["loss"]
    loss = loss + ops.clip_loss(tower(frames), text, logit_scale=torch.tensor(10.0))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
print("trained", *(m for m in ("numpy", "triton", "einops") if m in sys.modules))
'''


def test_a_program_that_has_only_torch_trains_with_the_ops():
    run = subprocess.run([sys.executable, "-I", "-c", PROGRAM], capture_output=True, text=True)
    assert run.stdout.split() == ["trained"], run.stdout + run.stderr
