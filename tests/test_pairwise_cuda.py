"""The max-margin losses in CUDA C++, thread by thread on the CPU (tests/cuda_emulated.py)."""

import dataclasses
import weakref

import numpy as np
import pairwise_cases as cases
import pairwise_oracle as oracle
import pytest
import torch
from check import close
from cuda_emulated import emulated
from pairwise_oracle import gradients

from evaat_fast import ops
from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.ranks import Batch
from evaat_fast.ops.pairwise.reference import sms_loss_reference
from evaat_fast.ops.pairwise.relevancy import Labels

pytestmark = pytest.mark.together("emulated")
BF16, F16 = torch.bfloat16, torch.float16
RULES = ["code", "paper", "charades"]
dtypes = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
rules = pytest.mark.parametrize("rule", RULES)
ROUNDING = {BF16: 8e-3, F16: 1e-3}


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    with emulated(monkeypatch):
        yield


@pytest.fixture(params=[None, 128, 50], ids=["one panel", "panels", "ragged panels"])
def panels(request):
    """The losses."""
    return cases.losses(request.param)


def batch(N, E, dtype=BF16):
    return cases.batch(N, E, dtype)


def sms(video, text, c, panels=ops, **options):
    return gradients(lambda v, t: panels.sms_loss(v, t, c, backend="cuda", **options), video, text)


@pytest.mark.sample(8)
@rules
@dtypes
@pytest.mark.parametrize("N,E", [(2, 1), (3, 200), (31, 63), (128, 64), (129, 8), (132, 300), (260, 96)])
def test_equals_oracle(N, E, dtype, rule, panels):
    video, text, c = batch(N, E, dtype)
    eps = 1.1 / 240 if rule == "code" else 0.1
    low = gradients(lambda v, t: sms_loss_reference(v, t, c, c.diag(), 0.6, 0.1, eps, rule), video, text)
    truth = gradients(lambda v, t: oracle.sms(v, t, c, rule=rule), video.double(), text.double())
    ours = sms(video, text, c, panels, rule=rule)
    close(ours[0], low[0], truth[0], what="loss")
    for name, x, a, b in zip(("video", "text"), ours[1:], low[1:], truth[1:], strict=True):
        # Unit rows are rounded once more before the products of the slopes.
        assert (x.double() - b).norm() <= 1.6 * (a.double() - b).norm() + ROUNDING[dtype] * b.norm() / 4, name


def panel_of(video, text, labels, own, penalty, rows=None, each=False):
    """(slopes, sums of both sides, losses) of the kernels, panel by panel."""
    from evaat_fast.ops.pairwise import cuda

    work = step.Work(each, not each, not each, False, "cuda", rows)
    this = cuda.Sms(video, text, None, None, step.SmsSettings(labels, own, penalty, True, work))
    this.prepare()
    parts = []
    for first in range(0, len(video), this.rows):
        slopes = this.slopes(first, min(first + this.rows, len(video)))
        parts.append(None if each else slopes.clone())
    return None if each else torch.cat(parts), this.sums, this.losses if each else this.part.double().sum()


def slopes_of(x, c, w, margin, relaxation, eps, rule):
    """`oracle.slopes` of one side of each pair, at once: [N, N] of the texts' and of the videos', texts in the rows."""
    for anchor in (1, 0):
        d, near = w.unsqueeze(anchor) - c.T, x - x.diagonal().unsqueeze(anchor)
        m = margin * d + near
        source = m if rule == "code" else near
        more = d > eps if rule == "code" else d >= eps
        less = torch.zeros_like(m) if rule == "charades" else -(m < 0).double()
        g = torch.where(d.abs() < eps, source.sign() * (source.abs() > relaxation), torch.where(more, (m > 0).double(), less))
        yield g.fill_diagonal_(0)


def test_slopes_at_once_are_the_oracles():
    x, c, w = (torch.randint(0, 5, shape).double() / 4 for shape in ((20, 20), (20, 20), (20,)))
    for rule in RULES:
        text, video = slopes_of(x, c, w, 0.5, 0.25, 0.25, rule)
        diagonal = -torch.diag(text.sum(1) + video.sum(0))
        assert torch.equal((text + video + diagonal).long(), oracle.slopes(x, c, w, 0.5, 0.25, 0.25, rule))


@pytest.mark.sample(6)
@rules
@dtypes
@pytest.mark.parametrize("rows", [None, 50])
@pytest.mark.parametrize(
    "kind", ["dense", "dense, transposed", "indexed", "codes", "verbs and nouns", "one", "one, and one own"]
)
def test_slopes_are_exact_on_kinks_and_ties(kind, rows, dtype, rule):
    """Rows of four signs: cosines are halves, and with quarters as labels every m is exact, kinks and ties frequent."""
    N, settings = 260, (0.5, 0.25, 0.25)
    video, text = ((torch.randint(0, 2, (N, 4)) * 2.0 - 1).to(dtype) for _ in range(2))
    labels, c = of_quarters(kind, N)
    w = torch.full((1,), 0.5).expand(N) if kind.endswith("own") else torch.randint(0, 5, (N,)) / 4
    slopes, sums, losses = panel_of(video, text, labels, w, cases.penalty(*settings, rule), rows)
    x, c, w = (text.double() @ video.double().T / 4, c.double(), w.double())
    of_text, of_video = slopes_of(x, c, w, *settings, rule)
    assert torch.equal(slopes.double(), (of_text + of_video).T)
    assert torch.equal(sums.double(), torch.stack((of_video.sum(0), of_text.sum(1))))
    want = oracle.penalties(x, c, w, *settings, rule).sum()
    assert losses == want
    assert panel_of(video, text, labels, w.float(), cases.penalty(*settings, rule), rows, each=True)[2].sum() == want


def of_quarters(kind, N):
    """(labels that are quarters as the kernels are given them, the matrix)."""
    iou, verb, noun = torch.randint(0, 3, (9, 9)) / 2, torch.randint(0, 3, (N,)), torch.randint(0, 9, (N,))
    matrix = 0.5 * (verb[:, None] == verb) + 0.5 * iou[noun[:, None], noun]
    if kind.startswith("one"):
        return Labels(torch.tensor([[0.25]]).expand(N, N)), torch.full((N, N), 0.25)
    if kind.startswith("dense"):
        return Labels(matrix if kind == "dense" else matrix.T.contiguous().T), matrix
    source = ops.VerbNounRelevancy(verb - 1, noun.int(), iou)
    if kind == "codes":
        source = ops.DenseRelevancy((matrix * 4).to(torch.uint8), 1 / 4)
    elif kind == "indexed":
        rows, columns = torch.randint(0, N, (2, N))
        source, matrix = ops.IndexedRelevancy(matrix, rows, columns.int()), matrix[rows[:, None], columns]
    return source.labels(Batch(N, matrix.device, None), True, None)[0], matrix


@pytest.mark.sample(2)
@dtypes
def test_duplicate_pairs_are_ties(dtype, panels):
    """Noise between the two would be all there is, as no other pair comes near. Each norm is another: so the order of scaling
    shows."""
    video = torch.randn(200, 48).to(dtype)
    video[150] = video[3]
    c = torch.eye(200)
    c[150, 3] = c[3, 150] = 1
    for out in sms(video, 3 * video, c, panels, margin=0.0, relaxation=0.0):
        assert not out.any()


def sources(N):
    """One matrix from every source of labels, dense first."""
    iou = torch.randint(0, 5, (9, 9)) / 4
    verb, noun = torch.randint(0, 3, (N,)), torch.randint(0, 9, (N,))
    matrix = 0.5 * (verb[:, None] == verb) + 0.5 * iou[noun[:, None], noun]
    table, rows, columns = torch.zeros(N + 20, N + 10), torch.randperm(N + 20)[:N], torch.randperm(N + 10)[:N]
    table[rows[:, None], columns] = matrix
    return {
        "dense": matrix,
        "of another stride": torch.nn.functional.pad(matrix, (0, 1))[:, :N],
        "transposed": matrix.T.contiguous().T,
        "float64": matrix.double(),
        "bfloat16": matrix.bfloat16(),
        "float16": matrix.half(),
        "codes": ops.DenseRelevancy((matrix * 8).to(torch.uint8), 1 / 8),
        "indexed": ops.IndexedRelevancy(table, rows, columns.int()),
        "indexed float64": ops.IndexedRelevancy(table.double(), rows.int(), columns),
        "indexed codes": ops.IndexedRelevancy((table * 8).to(torch.uint8), rows, columns, 1 / 8),
        "verbs and nouns": ops.VerbNounRelevancy(verb, noun.int(), iou),
        "negative verbs": ops.VerbNounRelevancy((verb - 1).int(), noun, iou),
    }


@pytest.mark.sample(2)
@dtypes
@pytest.mark.parametrize("rule", ["code", "paper"])
def test_equal_values_give_equal_bits(rule, dtype):
    every = sources(260)
    video, text, _ = batch(260, 16, dtype)
    want = sms(video, text, every["dense"], rule=rule)
    for name, source in every.items():
        assert all(map(torch.equal, sms(video, text, source, rule=rule), want)), name


@pytest.mark.parametrize("codes", [False, True])
def test_an_index_out_of_range_makes_the_loss_nan(codes):
    """What CUDA tensors get, whose indices are not read back: the operator's loss."""
    video, text, _ = batch(5, 8)
    index, table = torch.arange(5), torch.rand(5, 5)
    for bad in (-1, 5):
        for side in (0, 1):
            indices = [index, index]
            indices[side] = index.index_fill(0, torch.tensor([2]), bad)
            more = (None, torch.rand(256)) if codes else ()
            given = cases.settings(table, None, "cuda", indices=(*indices, *more), own=torch.ones(5))
            if codes:
                labels = dataclasses.replace(given.labels, table=(table * 9).to(torch.uint8))
                given = dataclasses.replace(given, labels=labels)
            assert step.sms_step.body(video, text, None, dataclasses.replace(given, checked=True))[0].isnan()


def test_a_verb_beyond_32_bits_is_never_taken_for_another():
    """Exact where any labels are read; a NaN where verbs are compared in 32 bits."""
    video, text, _ = batch(8, 8)
    verb, iou = torch.arange(8) % 2 << 32, torch.eye(3)
    source = ops.VerbNounRelevancy(verb, torch.zeros(8, dtype=torch.int64), iou)
    assert sms(video, text, source)[0].isnan()
    paper = lambda v, t, b: ops.sms_loss(v, t, source, rule="paper", backend=b)  # noqa: E731
    torch.testing.assert_close(paper(video, text, "cuda"), paper(video.float(), text.float(), "reference"))


@pytest.mark.sample(2)
@dtypes
@rules
def test_reduction_none(rule, dtype, panels):
    cases.check_reduction_none(panels, rule, dtype, "cuda", ROUNDING[dtype])


@dtypes
@pytest.mark.parametrize("N", [33, 260])
@pytest.mark.parametrize("op", ["mi_mm_loss", "adaptive_mi_mm_loss"])
def test_siblings(op, N, dtype):
    cases.check_siblings(op, N, dtype, "cuda", ROUNDING[dtype])


@pytest.mark.parametrize("view", list(cases.VIEWS)[1:4])
def test_views(view):
    video, text, c = batch(20, 24)
    view = cases.VIEWS[view]
    assert all(map(torch.equal, sms(view(video), view(text), c), sms(video, text, c)))


def test_one_sided_gradients():
    video, text, c = batch(40, 16)
    _, both_video, both_text = sms(video, text, c)
    loss = lambda v, t: ops.sms_loss(v, t, c, backend="cuda")  # noqa: E731
    assert torch.equal(gradients(lambda v: loss(v, text), video)[1], both_video)
    assert torch.equal(gradients(lambda t: loss(video, t), text)[1], both_text)
    with torch.no_grad():
        torch.testing.assert_close(loss(video, text), loss(video.clone().requires_grad_(), text), rtol=1e-6, atol=0)


@pytest.mark.parametrize("N", [20, 260])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_loss(bad, N):
    for where in (0, 1):
        features = list(batch(N, 8)[:2])
        features[where][7, 3] = bad
        assert not ops.sms_loss(*features, torch.rand(N, N), backend="cuda").isfinite()
        assert not sms(*features, torch.rand(N, N))[0].isfinite()
    labels = torch.rand(N, N)
    labels[3, N - 1] = torch.nan
    assert ops.sms_loss(*batch(N, 8)[:2], labels, backend="cuda").isnan() and sms(*batch(N, 8)[:2], labels)[0].isnan()


@dtypes
def test_rows_without_a_direction_get_no_gradient(dtype):
    cases.check_rows_without_a_direction(dtype, "cuda")


def test_no_pairs():
    cases.check_no_pairs(BF16, "cuda")


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed):
    sizes, features = (0, 1, 2, 33, 129, 260), (1, 8, 63, 64, 200, 256, 320)
    cases.random_call(seed, "cuda", "cpu", (BF16, F16), sizes, features, cases.MAX_MARGIN)


@pytest.mark.parametrize("verbs", [False, True])
def test_pairs_in_the_order_of_their_captions_places(verbs):
    """Losses, gradients and weights belong to the pairs that were given."""
    from evaat_fast.ops.pairwise import cuda
    from evaat_fast.ops.pairwise.reference import Penalty

    class Ordered(cuda.Sms):
        ORDERED_FROM = 2

        def begin(self):
            super().begin()
            if self.panel is not None:  # in memory whose end can be seen
                memory = np.zeros((len(self.panel), self.panel.stride(0)), np.float16)
                self.panel, self.memory = torch.from_numpy(memory)[:, : self.N], weakref.ref(memory)

        def finish(self):
            self.panel = None
            assert not self.learns or self.memory() is None, "somebody else keeps the panel"
            return super().finish()

    N = 140
    video, text, _ = batch(N, 24, F16)
    rows, columns, verb = torch.randint(0, 5, (3, N))
    table = torch.rand(2, 5, 5) if verbs else torch.rand(5, 5)
    labels = Labels(table, rows, columns, verb if verbs else None)
    own = labels.diagonal(torch.float32)

    def run(kind, each, weight):
        work = step.Work(each, not each, not each, False, "cuda", None)
        settings = step.SmsSettings(labels, own, Penalty(0.6, 0.1, 1.1 / 240, "code"), True, work)
        return step.run(kind(video, text, None, weight, settings))

    for each, weight in ((False, None), (False, torch.rand(N)), (True, None)):
        given, ordered = (run(kind, each, weight) for kind in (cuda.Sms, Ordered))
        for x, y in zip(given, ordered, strict=True):
            assert x.shape == y.shape and (x - y).norm() <= 2e-3 * x.norm()
