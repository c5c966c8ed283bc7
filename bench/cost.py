"""What a step of training costs, by formula: memory of a GPU, bytes between GPUs, seconds of a collective.

`scaling.py` predicts with it; `tests/test_scaling.py` holds it to what is counted and measured.
"""

import dataclasses
import math
from dataclasses import dataclass

from evaat_fast.model.configs import ModelConfig

MiB = 2**20
CAPTION = 32  # tokens, as in bench/train.py


@dataclass(frozen=True)
class Cluster:
    """Bytes a second and direction: of a GPU's NVLinks, and of all network ports of a node."""

    name: str
    nvlink: float
    network: float
    node: int = 8


# NVLink: 900 GB/s both ways (NVIDIA H200 datasheet). Ports of a DGX H200 (NVIDIA DGX BasePOD reference architecture): eight of
# 400 Gb/s InfiniBand, one a GPU, and one Ethernet adapter of 100 Gb/s.
NDR = Cluster("InfiniBand NDR, a port a GPU", 450e9, 8 * 50e9)
ETHERNET = Cluster("one 100 Gb/s Ethernet port a node", 450e9, 12.5e9)
# GB by datasheet: RTX A5000, RTX 6000 Ada, H100 SXM, H200.
CARDS = {"RTX A5000": 24e9, "RTX 6000 Ada": 48e9, "H100": 80e9, "H200": 141e9}

# Seconds that NCCL's tuner expects (NVIDIA/nccl, src/graph/tuning.cc, ncclTunerConstantsDefaults and ncclTopoTuneModel): before
# anything, of a step within a node and of one between nodes; and which share of the links a protocol reaches.
RING = {"LL": (6.6e-6, 1.0e-6, 2.7e-6, 0.5), "Simple": (8.4e-6, 3.4e-6, 14.0e-6, 1.0)}
TREE = {"LL": (6.8e-6, 0.6e-6, 5.0e-6, 0.92 / 3.8), "Simple": (8.4e-6, 4.0e-6, 14.0e-6, 0.92)}
LL_BYTES_PER_S = 141.0e9, 20.4e9  # what LL reaches at most within a node and between several, there
BUCKETS = (1 * MiB, 25 * MiB)  # the first and the others of torch's DistributedDataParallel


def parameters(c: ModelConfig) -> int:
    """How many a model has."""
    C, M, w, patches = c.vision_width, c.vision_mlp, c.text_width, c.grid[1] * c.grid[2]
    vision = c.vision_layers * (4 * C * C + 3 * C * M + 10 * C + 4 * M)
    vision += 3 * c.patch_size**2 * C + C * (2 + patches + c.num_frames) + C + 2 * C + (C + 1) * c.embed_dim
    text = c.text_layers * (12 * w * w + 13 * w) + (c.vocab_size + c.context_length) * w + 2 * w + w * c.embed_dim
    return vision + text + 1


def matrices(c: ModelConfig) -> int:
    """How many of them autocast casts: the weights and biases of matrix products."""
    C, M, w = c.vision_width, c.vision_mlp, c.text_width
    vision = c.vision_layers * (4 * C * C + 3 * C * M + 4 * C + 2 * M) + (3 * c.patch_size**2 + 1) * C + (C + 1) * c.embed_dim
    return vision + c.text_layers * (12 * w * w + 9 * w) + w * c.embed_dim


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one GPU, under bfloat16 autocast with float32 weights and AdamW.

    weights, gradients, moments: float32. casts: the weights that autocast keeps for the backward pass. clip: what autograd
    keeps of a clip and its caption. working: how much more the backward pass of a block needs, a clip.
    """

    weights: int
    gradients: int
    moments: int
    casts: int
    clip: int
    working: int

    def peak(self, clips: int, ranks: int = 1, scratch: int = 0) -> int:
        """At its highest, of the trainer's own step, which lets go of the last gradients when the loss is known. DDP keeps a
        second copy of gradients in its buckets."""
        held = self.weights + self.moments + self.casts + clips * self.clip + (self.gradients if ranks > 1 else 0)
        return held + max(self.gradients + scratch, clips * self.working)

    def of_benchmark(self, clips: int) -> int:
        """Of bench/train.py, which lets go of gradients before a step, and keeps a copy of the first step's to compare with."""
        return self.weights + self.moments + self.casts + self.gradients + clips * (self.clip + self.working)


def memory(c: ModelConfig, keep: bool | str = False) -> Memory:
    """The model's. keep: model.grad_checkpointing, False, "selective" or True."""
    P, C, M, w, L = parameters(c), c.vision_width, c.vision_mlp, c.text_width, CAPTION
    N = 1 + math.prod(c.grid)
    statistics = 4 * c.vision_heads + 4 * 8  # log-sum-exp of attention, mean and deviation of four norms
    whole = 22 * C + 6 * M + statistics  # as evaat_fast/model/recompute.py lists it
    kept = {False: whole, "selective": 16 * C + 4 * M + 4 * c.vision_heads + 8, True: 6 * C}[keep]
    last = 12 * C + 16 if keep is not True else 4 * C  # computes the class token alone; the first block has no stream yet
    of_video = N * ((c.vision_layers - 1) * kept + last) + (N - 1) * 2 * 3 * c.patch_size**2
    of_video += (N - 1) * 3 * c.patch_size**2  # its pixels
    of_text = L * c.text_layers * {False: 36, "selective": 24, True: 6}[keep] * w
    # Gradients of the stream, the branch and fc1's output, and the block that is computed again. By then the text tower and the
    # last block have let go of theirs, which is counted all the same, as workspaces of products and attention are not.
    working = N * (6 * C + 4 * M + (whole if keep is True else 0))
    return Memory(4 * P, 4 * P, 8 * P, 2 * matrices(c), of_video + of_text, working)


def loss_scratch(n: int, N: int, E: int) -> int:
    """Bytes that the contrastive loss holds at once for n of N pairs, with float32 features (evaat_fast/ops/pairwise/gpu.py):
    gathered captions and their gradients, a panel, statistics of rows and columns."""
    rows = min(n, max(512, 128 * MiB // (4 * N) // 128 * 128))
    return 2 * 4 * N * E + 2 * 4 * n * E + 4 * rows * N + 128 * N


@dataclass(frozen=True)
class Collective:
    """kind: "all-gather", "reduce-scatter" or "all-reduce". bytes: the whole of what is gathered, scattered or reduced."""

    what: str
    kind: str
    bytes: int

    def sent(self, W: int) -> float:
        """By each rank, over a ring."""
        return self.bytes * (W - 1) / W * (2 if self.kind == "all-reduce" else 1)


def loss_collectives(
    loss: str, N: int, W: int, E: int, feature: int = 4, backend: str = "triton", wide: int = 4
) -> list[Collective]:
    """Of a training step's "clip" or "sms" loss (evaat_fast/ops/pairwise/ranks.py), the one of "sms" with labels by index.
    feature, wide: bytes of a number of the features and of the computation."""
    triton = backend == "triton"
    gather = [("what each rank was called with", 1024 * W)]
    if loss == "clip":
        gather += [("captions", N * E * feature), ("loss and gradient of the scale", 16 * W)]
        gather += [("own similarities", N * wide)] if triton else []
        reduce = [("totals of columns", "all-reduce", 8 * N)] * 2
        scatter = [("gradients of captions", N * E * wide)]
    else:
        gather += [("captions", N * E * wide if not triton else N * E * feature)]
        gather += [("unit captions", N * E * feature)] if triton else []
        gather += [("norms and own cosines", 3 * N * wide), ("own relevancies", N * wide), ("indices", 16 * N)]
        gather += [("loss", (16 if triton else 8) * W)]
        reduce, scatter = [], [("gradients of captions", N * E * wide), ("sums of slopes", 4 * N)]
    found = [Collective(what, "all-gather", size) for what, size in gather]
    found += [Collective(*x) for x in reduce]
    return found + [Collective(what, "reduce-scatter", size) for what, size in scatter]


def weight_collectives(c: ModelConfig, parallel: str) -> list[Collective]:
    """Of a training step's weights and gradients, float32, by "ddp" or "fsdp" (evaat_fast/train/shards.py). FSDP gathers
    a block for either pass, and what is no block's once."""
    size = 4 * parameters(c)
    if parallel == "ddp":
        return [Collective("gradients", "all-reduce", size)]
    blocks = 0
    for layers in ("vision_layers", "text_layers"):
        one, two = (parameters(dataclasses.replace(c, **{layers: n})) for n in (1, 2))
        blocks += 4 * getattr(c, layers) * (two - one)
    gathered = Collective("weights", "all-gather", size + blocks)
    return [gathered, Collective("gradients", "reduce-scatter", size)]


def buckets(size: int) -> list[int]:
    """How DDP cuts a model's gradients of so many bytes, in the order in which they are ready."""
    first, others = BUCKETS
    rest = max(0, size - first)
    cut = [min(size, first)] + [others] * (rest // others) + [rest % others] * (rest % others > 0)
    return cut


def seconds(kind: str, size: float, W: int, cluster: Cluster, rate: float = 1.0) -> float:
    """What NCCL's tuner expects of a collective on whole nodes, the better of ring and tree. rate: which share of the
    datasheets' bytes a second the links give."""
    if W == 1:
        return 0.0
    nodes = math.ceil(W / cluster.node)
    links = rate * (cluster.nvlink if nodes == 1 else min(cluster.nvlink, cluster.network))
    times = 2 if kind == "all-reduce" else 1
    steps, between = times * (W - 1), times * (nodes - 1)
    ways = []
    for name, (base, near, far, share) in RING.items():
        reached = min(links * share, LL_BYTES_PER_S[nodes > 1]) if name == "LL" else links * share
        ways.append(base + (steps - between) * near + between * far + size * steps / W / reached)
    for base, near, far, share in TREE.values() if kind == "all-reduce" else ():
        latency = base + 2 * ((W / nodes - 1) * near + math.log2(nodes) * far)
        ways.append(latency + 2 * size / (links * share))
    return min(ways)
