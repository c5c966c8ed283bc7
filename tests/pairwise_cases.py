"""What is asked of the pairwise losses on several backends, one random call of any of them among it, held to float64."""

import random
from types import SimpleNamespace

import torch
from pairwise_oracle import gradients

from evaat_fast import ops
from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.check import Options
from evaat_fast.ops.pairwise.contrast import contrast
from evaat_fast.ops.pairwise.reference import Penalty
from evaat_fast.ops.pairwise.relevancy import Labels
from evaat_fast.ops.pairwise.sms import max_margin

SIZES = (0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 1000, 4097)
FEATURES = (1, 8, 63, 64, 200, 256, 512, 768, 1024)
MAX_MARGIN = ("sms", "mi_mm", "adaptive")
OPS = (*MAX_MARGIN, "clip", "ego")
VIEWS = {
    "contiguous": lambda x: x,
    "columns first": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.cat((x, x, x), 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[1::2],
    "one row, expanded": lambda x: x[:1].expand_as(x),
}
# A step's relative error of gradients beside twice torch's own: 16-bit slopes and unit rows are rounded once each before they
# are added up; where bfloat16 rows are multiplied as such (CPU, N >= 1024), a cosine near a kink may round to its other side.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def check_trained_batch(N, noise, op, backend, losses):
    """Pairs that are near each other and, in EgoNCE with N = 256, near one other pair that is positive too."""
    unit, E = torch.nn.functional.normalize, 256
    video, positives = torch.randn(N, E), torch.zeros(N, N, dtype=torch.bool)
    if op == "ego_nce_loss" and N == 256:
        video[1::2] = video[::2] + 0.05 * torch.randn(N // 2, E)
        twin = torch.arange(N) ^ 1
        positives[torch.arange(N), twin] = True
    text = unit(video + noise * torch.randn(N, E), dim=1)
    video, other = unit(video, dim=1), 20.0 if op == "clip_loss" else positives
    run = lambda which: lambda v, t: getattr(losses, op)(v, t, other, backend=which)  # noqa: E731
    ours, truth = gradients(run(backend), video, text), gradients(run("reference"), video.double(), text.double())
    assert 0 < truth[0] < 1e-5
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= 4e-6 * b.norm()


def batch(N, E, dtype):
    """Features that agree somewhat, and relevancies in tenths with ties."""
    video = torch.randn(N, E)
    return video.to(dtype), (0.7 * video + torch.randn(N, E)).to(dtype), torch.randint(0, 11, (N, N)) / 10


def check_reduction_none(losses, rule, dtype, backend, bound):
    """sms_loss of each pair, and the gradient of a weighted sum, within a relative bound."""
    video, text, c = batch(140, 24, dtype)
    weight = torch.randn(140)

    def entries_of(video, text, which):
        return losses.sms_loss(video, text, c, rule=rule, reduction="none", backend=which)

    def weighted(which):
        return lambda v, t: (entries_of(v, t, which) * weight.to(torch.promote_types(v.dtype, torch.float32))).sum()

    exact = video.double(), text.double()
    ours, truth = gradients(weighted(backend), video, text), gradients(weighted("reference"), *exact)
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()
    entries = entries_of(video, text, backend)
    torch.testing.assert_close(entries.double(), entries_of(*exact, "reference"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entries.mean(), ops.sms_loss(video, text, c, rule=rule, backend=backend), rtol=1e-6, atol=0)


def check_siblings(op, N, dtype, backend, bound):
    """mi_mm_loss or adaptive_mi_mm_loss, loss and gradients within a relative bound."""
    video, text, _ = batch(N, 20, dtype)
    arguments = (torch.rand(N),) if op.startswith("adaptive") else ()
    run = lambda which: lambda v, t: getattr(ops, op)(v, t, *arguments, backend=which)  # noqa: E731
    ours, truth = gradients(run(backend), video, text), gradients(run("reference"), video.double(), text.double())
    assert abs(ours[0] - truth[0]) <= 1e-6
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


def check_rows_without_a_direction(dtype, backend):
    """They get no gradient, and spoil no other's."""
    video, text, c = batch(20, 8, dtype)
    video[3] = 0
    loss, grad_video, grad_text = gradients(lambda v, t: ops.sms_loss(v, t, c, backend=backend), video, text)
    assert loss.isfinite() and grad_video.isfinite().all() and grad_text.isfinite().all()
    assert not grad_video[3].any() and grad_video[4].any()


def check_no_pairs(dtype, backend):
    """Of none or one, whose features may be NaN, the loss is 0, and so are the gradients."""
    for N in (0, 1):
        features = torch.full((N, 8), torch.nan, dtype=dtype), torch.ones(N, 8, dtype=dtype)
        loss, *grads = gradients(lambda v, t, N=N: ops.sms_loss(v, t, torch.ones(N, N), backend=backend), *features)
        assert loss == 0 and not any(g.any() for g in grads)


def penalty(margin=0.6, relaxation=0.1, eps=None, rule="code"):
    return Penalty(margin, relaxation, eps if eps is not None else 1.1 / 240 if rule == "code" else 0.1, rule)


def losses(panel_rows):
    """The public losses, in panels of so many videos; None: as the backend chooses."""

    def sms_loss(video, text, relevancy, *, self_relevancy=None, reduction="mean", backend=None, **costs):
        how = Options(reduction, backend=backend, panel_rows=panel_rows)
        return max_margin("sms_loss", video, text, relevancy, self_relevancy, penalty(**costs), how)

    def adaptive_mi_mm_loss(video, text, self_relevancy=None, *, margin=0.4, **how):
        costs = penalty(margin, 0.0, -torch.inf)
        return max_margin("mi_mm_loss", video, text, None, self_relevancy, costs, Options(panel_rows=panel_rows, **how))

    def mi_mm_loss(video, text, *, margin=0.2, **how):
        return adaptive_mi_mm_loss(video, text, margin=margin, **how)

    def clip_loss(video, text, logit_scale, **how):
        return contrast("clip_loss", video, text, logit_scale, None, Options(panel_rows=panel_rows, **how))

    def ego_nce_loss(video, text, positives, *, temperature=0.05, **how):
        return contrast("ego_nce_loss", video, text, 1 / temperature, positives, Options(panel_rows=panel_rows, **how))

    every = (sms_loss, mi_mm_loss, adaptive_mi_mm_loss, clip_loss, ego_nce_loss)
    return SimpleNamespace(**{loss.__name__: loss for loss in every})


def settings(c, rows=None, backend="cpu", *, indices=(), own=None, each=False, needs=(True, True)):
    """What the operator sms_step is given beside features and weight, for labels c and the default penalty."""
    labels = Labels(c, *indices)
    own = labels.diagonal(torch.promote_types(c.dtype, torch.float32)) if own is None else own
    return step.SmsSettings(labels, own, penalty(), False, step.Work(each, *needs, False, backend, rows))


def labels(kind, N, device):
    """(what the kernels get, what the reference gets in float64); eighths, which every source holds exactly."""
    iou, verb, noun = torch.randint(0, 5, (9, 9)) / 4, torch.randint(0, 3, (N,)), torch.randint(0, 9, (N,))
    matrix = 0.5 * (verb[:, None] == verb) + 0.5 * iou[noun[:, None], noun]
    if kind == "verbs and nouns":
        ours = ops.VerbNounRelevancy(verb.to(device), noun.int().to(device), iou.to(device))
    elif kind == "codes":
        ours = ops.DenseRelevancy((matrix * 8).to(torch.uint8).to(device), 1 / 8)
    elif kind.startswith("indexed"):
        rows, columns = torch.randint(0, max(N, 1), (2, N))
        table = matrix.to(device, torch.bfloat16)
        ours = ops.IndexedRelevancy(table, rows.to(device, torch.int32), columns.to(device))
        matrix = matrix[rows[:, None], columns]
    else:
        ours = {"dense": matrix, "dense float16, transposed": matrix.half().T.contiguous().T}[kind].to(device)
    return ours, matrix.double()


def random_call(seed, backend, device, dtypes, sizes=SIZES, features=FEATURES, kinds=OPS):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pick = lambda *choices: rng.choice(choices)  # noqa: E731
    op, N, E, dtype = pick(*kinds), rng.choice(sizes), rng.choice(features), rng.choice(dtypes)
    if N > 2000 and pick(True, True, False):
        N = 257
    video = torch.randn(N, E) * pick(1.0, 1.0, 0.01, 30.0)
    text = 0.7 * video / video.abs().mean().clamp_min(1e-6) + torch.randn(N, E)
    views = [rng.choice(list(VIEWS)) for _ in range(2)]
    if views == ["one row, expanded"] * 2:  # every cosine the same: all ties, and noise decides
        views[1] = "contiguous"
    reduction, sides, factor = pick("mean", "mean", "none"), pick((0, 1), (0, 1), (0,), (1,)), pick(1.0, -0.25, 65536.0)
    if dtype == torch.float16:
        factor = min(factor, 64.0)  # beyond, a gradient of a small batch leaves its range
    if op in ("clip", "ego"):  # logits of at most a few tens, as a model's
        video, text = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-9) for x in (video, text))
    options = {"reduction": reduction}
    ours, wide = (), ()
    if op == "sms":
        relevancy = labels(pick("dense", "dense float16, transposed", "codes", "indexed", "verbs and nouns"), N, device)
        own = torch.randint(0, 9, (N,)) / 8 if pick(True, False) else None
        ours, wide = ((x,) for x in relevancy)
        options |= {"rule": pick("code", "paper", "charades"), "relaxation": pick(0.1, 0.0625), "margin": pick(0.6, 0.3)}
        options |= {"eps": 0.1} | ({} if own is None else {"self_relevancy": own})
    elif op == "adaptive":
        ours = wide = (torch.rand(N),)
    elif op == "clip":
        ours = wide = (pick(1.0, 14.0, 30.0),)
    elif op == "ego":
        hot = [torch.rand(N, K) < 0.05 for K in (rng.choice((1, 31, 64, 118)), rng.choice((2, 33, 300)))]
        matrix = (hot[0].double() @ hot[0].double().T) * (hot[1].double() @ hot[1].double().T) > 0
        ours = (ops.VerbNounPositives(*(x.to(device) for x in hot)) if pick(True, False) else matrix.to(device),)
        wide = (matrix,)
    what = f"seed {seed}: {op} N {N} E {E} {dtype} {views} sides {sides} x {factor} {list(options)} {options.get('rule')}"
    weight = torch.randn(N) if reduction == "none" else None

    def run(backend, device, cast, arguments):
        place = lambda x: x.to(device, cast) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
        given = {k: place(v) for k, v in options.items()}
        arguments = [place(x) if op != "sms" else x for x in arguments]
        leaves = [x.to(dtype).to(device, cast) for x in (video, text)]
        name = {"ego": "ego_nce_loss", "adaptive": "adaptive_mi_mm_loss"}.get(op, f"{op}_loss")

        def loss(*chosen):
            both = list(leaves)
            for side, x in zip(sides, chosen, strict=True):
                both[side] = x
            viewed = [VIEWS[view](x) if N else x for view, x in zip(views, both, strict=True)]
            out = getattr(ops, name)(*viewed, *arguments, **given, backend=backend)
            shape, wide = (N,) if reduction == "none" else (), torch.promote_types(cast, torch.float32)
            assert out.shape == shape and out.dtype == wide, what
            return (out * (factor if weight is None else factor * weight.to(device, out.dtype))).sum()

        return [x.cpu() for x in gradients(loss, *(leaves[side] for side in sides))]

    result = run(backend, device, dtype, ours)
    low, truth = run("reference", "cpu", dtype, tuple(wide)), run("reference", "cpu", torch.float64, tuple(wide))
    if N < 2:
        assert all(not x.any() for x in result), what
        return
    entry = (
        30.0 * abs(factor) * (1 if weight is None else N**0.5)
    )  # logits of a few tens are rounded before they are subtracted
    eps = 1e-14 if dtype == torch.float64 else 2.4e-7
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        # Tensor cores truncate their float32 sums, 16 products at a time: a bias that grows with E.
        eps += E * 2**-30
    assert (result[0].double() - truth[0]).abs() <= 2 * (low[0].double() - truth[0]).abs() + eps * entry, what
    rounding = 1e-2 if dtype == torch.bfloat16 and N > 1000 else ROUNDING[dtype]
    for side, a, b, t in zip(sides, result[1:], low[1:], truth[1:], strict=True):
        assert a.dtype == dtype and a.shape == t.shape and a.isfinite().all(), what
        # What the rows of the gradient are made of before they are projected: they may all but vanish, as at E = 1.
        inverse = (1 / (video, text)[side].double().norm(dim=1).clamp_min(1e-6)).norm() / N
        slopes = (
            abs(factor)
            * inverse
            * (N * weight.norm() / N**0.5 if weight is not None else 1)
            * (30.0 if op in ("clip", "ego") else 1)
        )
        error = (a.double() - t).norm()
        assert error <= 2 * (b.double() - t).norm() + rounding * (t.norm() + slopes), (
            f"{what}: side {side}, {error:.2e} of {t.norm():.2e}"
        )


def calls(block, count=100):
    return range(block * count, block * count + count)
