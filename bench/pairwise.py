"""The SMS and InfoNCE losses over a batch: python bench/pairwise.py

fwdbwd is a step: the loss and the gradients of both features. FLOPs: 2 N^2 E for each matrix product, three for SMS (S, dV, dT)
and three for InfoNCE (four where the second sweep recomputes S); one forward. The yardstick is those three products alone,
into buffers that are there. MiB on a CPU: what a step adds to the peak of a fresh process that has run the same at N = 64.
"""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import DTYPES, Benchmark, Unavailable, need, run
from torch.utils.checkpoint import checkpoint

from evaat_fast import ops
from evaat_fast.ops.pairwise.reference import clip_loss_reference, ego_nce_loss_reference, penalty, sms_loss_reference

LOSSES = ("sms", "clip", "ego")
CPU_SHAPES = [{"loss": loss, "N": n, "E": 256} for n in (4096, 256, 1024, 8192) for loss in LOSSES]
GPU_SHAPES = [{"loss": loss, "N": n, "E": 256} for n in (1024, 32768, 4096, 16384, 256, 65536) for loss in LOSSES]
DENSE_LIMIT = 16384  # beyond, a float32 matrix is 4 GB and more, and a dense formula keeps eight of them
CHUNK = 512  # rows
NAIVE_LIMIT = 4096  # the formulation with 165 bytes per pair: 2.8 GB here, 44 GB at 16,384
MARGIN, RELAXATION, EPS, SCALE = 0.6, 0.1, 1.1 / 240, 20.0
POSITIVE = 0.9  # relevancy above which EgoNCE counts a pair as positive


def inputs(shape, dtype, device):
    """Pairs that agree somewhat, and labels as EK-100's: 88 % zeros, 10 % one half, the rest others."""
    N, generator = shape["N"], torch.Generator().manual_seed(0)
    video = torch.randn(N, shape["E"], generator=generator)
    text = video + torch.randn(N, shape["E"], generator=generator)
    # A table of 2,000 clips and captions, as a training set is one; a batch takes rows and columns of it.
    draw = torch.rand(2000, 2000, generator=generator)
    table = torch.where(draw < 0.88, 0.0, torch.where(draw < 0.98, 0.5, (draw - 0.98) * 50)).fill_diagonal_(1.0)
    index = torch.arange(N) % 2000
    if shape["loss"] == "clip":
        video, text = F.normalize(video, dim=1), F.normalize(text, dim=1)
    move = lambda x, as_dtype: x.to(as_dtype).to(device)  # noqa: E731
    return {
        "video": move(video, dtype).requires_grad_(),
        "text": move(text, dtype).requires_grad_(),
        "table": move(table, torch.float32),
        "index": index.to(device),
        "loss": shape["loss"],
    }


def labels_of(inputs, first=0, last=None):
    """Rows of the matrix, gathered as the published code does in every step."""
    return inputs["table"][inputs["index"][first:last]][:, inputs["index"]]


def step(sms, clip, ego=None):
    """A provider from the losses as functions of inputs; None: it has no such loss."""

    def provider(inputs, mode):
        loss = {"sms": sms, "clip": clip, "ego": ego}[inputs["loss"]]
        if loss is None:
            raise Unavailable(f"has no {inputs['loss']} loss")
        features = (inputs["video"], inputs["text"])

        def fwd():
            with torch.no_grad():
                return (loss(inputs),)

        def fwdbwd():
            out = loss(inputs)
            return out, *torch.autograd.grad(out, features)

        return fwd if mode == "fwd" else fwdbwd

    return provider


def fits(inputs):
    if len(inputs["video"]) > DENSE_LIMIT:
        raise Unavailable("builds [N, N] several times")


def dense_sms(inputs):
    fits(inputs)
    labels = labels_of(inputs)
    return sms_loss_reference(inputs["video"], inputs["text"], labels, labels.diagonal(), MARGIN, RELAXATION, EPS)


def dense_clip(inputs):
    fits(inputs)
    return clip_loss_reference(inputs["video"], inputs["text"], SCALE)


def dense_ego(inputs):
    fits(inputs)
    return ego_nce_loss_reference(inputs["video"], inputs["text"], labels_of(inputs) > POSITIVE, 1 / SCALE)


def chunked(part):
    """A loss as the sum of checkpointed blocks of rows: part(inputs, video, text, first, last) is a block's share."""

    def loss(inputs):
        wide = torch.promote_types(inputs["video"].dtype, torch.float32)
        video, text = (inputs[n].to(wide) for n in ("video", "text"))
        if inputs["loss"] != "clip":
            video, text = F.normalize(video, dim=1, eps=1e-8), F.normalize(text, dim=1, eps=1e-8)
        blocks = [(first, min(first + CHUNK, len(video))) for first in range(0, len(video), CHUNK)]
        return sum(checkpoint(part, inputs, video, text, *block, use_reentrant=False) for block in blocks)

    return loss


def sms_rows(inputs, video, text, first, last):
    """What pairs of videos first .. last - 1 with all captions contribute, from both sides."""
    N, wide = len(video), video.dtype
    x, own = video[first:last] @ text.T, (video * text).sum(1)
    c, w = labels_of(inputs, first, last).to(wide), inputs["table"].diagonal()[inputs["index"]].to(wide)
    others = torch.arange(N, device=x.device) != torch.arange(first, last, device=x.device)[:, None]
    settings = (MARGIN, RELAXATION, EPS, "code")
    both = penalty(w - c, own - x, *settings) + penalty(w[first:last, None] - c, own[first:last, None] - x, *settings)
    return (both * others).sum() / (2 * N * (N - 1))


def contrast_rows(inputs, video, text, first, last):
    """Rows first .. last - 1 of both directions."""
    N, loss = len(video), 0.0
    for a, b, positives in ((video, text, labels_of(inputs, first, last)), (text, video, None)):
        s = SCALE * a[first:last] @ b.T
        positive = torch.arange(N, device=s.device) == torch.arange(first, last, device=s.device)[:, None]
        if inputs["loss"] == "ego":
            c = positives if positives is not None else inputs["table"][:, inputs["index"][first:last]][inputs["index"]].T
            positive = positive | (c > POSITIVE)
        loss = loss + (s.logsumexp(1) - s.masked_fill(~positive, -torch.inf).logsumexp(1)).sum()
    return loss / (N if inputs["loss"] == "ego" else 2 * N)


CHUNKED = step(chunked(sms_rows), chunked(contrast_rows), chunked(contrast_rows))


def naive_sms(inputs):
    """The published formulation: both directions concatenated, the off-diagonal entries picked by index."""
    video, text = inputs["video"], inputs["text"]
    N = len(video)
    if N > NAIVE_LIMIT:
        raise Unavailable(f"needs 165 bytes for each of {N} x {N} pairs")
    labels = labels_of(inputs)
    x = F.normalize(text.float(), dim=1) @ F.normalize(video.float(), dim=1).T
    own, relevancy = labels.diagonal(), labels.T
    keep = torch.cat((1 - torch.eye(N), 1 - torch.eye(N))).flatten().nonzero().flatten().to(video.device)
    first = x.diagonal()[:, None].expand(N, N)
    similarity = torch.cat((first, first)).flatten()[keep] - torch.cat((x, x.T)).flatten()[keep]
    weight = own[:, None].expand(N, N)
    d = torch.cat((weight, weight)).flatten()[keep] - torch.cat((relevancy, relevancy.T)).flatten()[keep]
    m = MARGIN * d - similarity
    terms = torch.where(d > EPS, F.relu(m), F.relu(-m))
    return torch.where(d.abs() < EPS, F.relu(m.abs() - RELAXATION), terms).mean()


def open_clip(inputs):
    loss = need("open_clip.loss").ClipLoss()
    return loss(inputs["video"], inputs["text"], SCALE)


def inf_cl(inputs):
    """One direction a call."""
    loss = need("inf_cl").cal_flash_loss
    if inputs["video"].device.type == "cpu":
        raise Unavailable("its kernels run on a GPU")
    video, text = inputs["video"], inputs["text"]
    E = video.shape[1]
    return sum(loss(a, b, scale=SCALE, head_dim=E).mean() for a, b in ((video, text), (text, video))) / 2


def both_ways(inputs, loss, gpu=True):
    """A fused linear cross-entropy (features, weights of the classes, targets): captions are the classes of the videos, and the
    reverse."""
    video, text = inputs["video"], inputs["text"]
    if gpu and video.device.type == "cpu":
        raise Unavailable("its kernels run on a GPU")
    target = torch.arange(len(video), device=video.device)
    return (loss(text, SCALE * video, target) + loss(video, SCALE * text, target)) / 2


def liger(inputs):
    return both_ways(inputs, need("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss())


def quack(inputs):
    loss = need("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return both_ways(inputs, lambda x, weight, target: loss(x, weight, target, reduction="mean"))


def torch_chunked(inputs):
    """torch's own, of 2.13 and later, which sums in the dtype of the features as it chooses."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return both_ways(inputs, lambda *given: F.linear_cross_entropy(*given, options=options), gpu=False)


def compiled(inputs, mode):
    if inputs["video"].device.type == "cpu":
        raise Unavailable("Inductor's compile time is not spent on the CPU run")
    fits(inputs)
    return step(*(torch.compile(loss) for loss in (dense_sms, dense_clip, dense_ego)))(inputs, mode)


def bare_products(inputs, mode):
    """The three matrix products of a step, without allocation."""
    video, text = inputs["video"].detach(), inputs["text"].detach()
    N = len(video)
    S, dv, dt = video.new_empty(N, N), torch.empty_like(video), torch.empty_like(text)
    # Not random: torch's generator stays unusable after another provider's capture failed.
    row = (torch.arange(N, device=video.device) % 5).to(torch.int8)
    G = ((row[:, None] + 2 * row) % 5 - 2).to(video.dtype)

    def work():
        torch.mm(video, text.T, out=S)
        if mode == "fwdbwd":
            torch.mm(G, text, out=dv)
            torch.mm(G.T, video, out=dt)
        return ()

    return work


def low(inputs, mode):
    """Torch's own error: the dense formula; for bfloat16 with the similarities rounded to it, as autocast does."""
    if inputs["video"].dtype == torch.float32:
        return CHUNKED(inputs, mode)
    rounded = lambda i: {**i, **{n: F.normalize(i[n], dim=1) for n in ("video", "text")}}  # noqa: E731
    return step(lambda i: chunked(sms_rows)(rounded(i)), chunked(contrast_rows), chunked(contrast_rows))(inputs, mode)


def check(ours, low, truth, name):
    """A rounded similarity next to a kink turns a slope around, so gradients differ in a few places in any float32 or bfloat16
    computation: each is held to a relative error, the loss to torch's own.
    """
    error, size = (ours.double() - truth).norm(), truth.norm()
    if truth.ndim == 0:
        # Tensor cores truncate the sums of 16-bit products, 16 at a time, by up to E / 2**30 of a logit: more
        # than is left of the mean of 32k losses that round to nearest.
        truncated = SCALE * 256 / 2**30 if ours.is_cuda else 0.0
        allowed = 1e-6 + 2 * (low.double() - truth).norm() / size + truncated / size
    else:
        allowed = 1e-3 if low.dtype == torch.float32 else 1e-2
    assert error <= allowed * size, f"{name}: relative error {error / size:.1e} > {allowed:.1e}"


def to_double(inputs):
    """Features in float64; labels stay the float32 numbers they are."""
    wide = {n: inputs[n].detach().double().requires_grad_() for n in ("video", "text")}
    return {**inputs, **wide, "table": inputs["table"].double()}


def our_labels(inputs):
    """As they are: a table and indices."""
    return ops.IndexedRelevancy(inputs["table"], inputs["index"], inputs["index"])


OURS = step(
    lambda i: ops.sms_loss(i["video"], i["text"], our_labels(i), margin=MARGIN, relaxation=RELAXATION),
    lambda i: ops.clip_loss(i["video"], i["text"], SCALE),
    lambda i: ops.ego_nce_loss(i["video"], i["text"], labels_of(i) > POSITIVE, temperature=1 / SCALE),
)


def sms_by(backend):
    """The max-margin loss of a backend that is asked for by name."""
    how = {"margin": MARGIN, "relaxation": RELAXATION, "backend": backend}
    return step(lambda i: ops.sms_loss(i["video"], i["text"], our_labels(i), **how), None)


def cuda(inputs, mode):
    if inputs["video"].device.type == "cpu":
        raise Unavailable("its kernels run on a GPU")
    if inputs["video"].dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable("takes 16-bit features")
    return sms_by("cuda")(inputs, mode)


PROVIDERS = {
    "evaat": OURS,
    "evaat, CUDA C++": cuda,
    "dense rewrite": step(dense_sms, dense_clip, dense_ego),
    "chunks + checkpoint": CHUNKED,
    "published formulation": step(naive_sms, None),
    "torch.compile(dense rewrite)": compiled,
    "open_clip": step(None, open_clip),
    "Inf-CL": step(None, inf_cl),
    "Liger": step(None, liger),
    "quack": step(None, quack),
    "torch linear_cross_entropy": step(None, torch_chunked),
}


def peak(shape, dtype, mode, provider):
    """MiB that one step adds to the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak", shape["loss"], str(shape["N"]), str(shape["E"]), dtype, mode, provider]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(loss, N, E, dtype, mode, provider):
    def status(name):
        return next(
            int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
        )

    big = inputs({"loss": loss, "N": int(N), "E": int(E)}, DTYPES[dtype], "cpu")
    PROVIDERS[provider](inputs({"loss": loss, "N": 64, "E": int(E)}, DTYPES[dtype], "cpu"), mode)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the step would live in what making the inputs left behind
    Path("/proc/self/clear_refs").write_text("5")  # the peak of making the inputs must not hide that of the step
    before = status("VmRSS")
    PROVIDERS[provider](big, mode)()
    print((status("VmHWM") - before) / 1024)


BENCH = Benchmark(
    op="pairwise",
    cpu_shapes=CPU_SHAPES,
    gpu_shapes=GPU_SHAPES,
    inputs=inputs,
    providers=PROVIDERS,
    yardsticks={"three bare products": bare_products},
    truth=CHUNKED,
    low=low,
    check=check,
    to_double=to_double,
    work=lambda s, mode, size: {"flop": (2 if mode == "fwd" else 6) * s["N"] ** 2 * s["E"]},
    baseline="three bare products",
    peak=peak,
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        run(BENCH)
