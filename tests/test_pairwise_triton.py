"""The Triton kernels of the pairwise losses in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

import dataclasses
import sys

import pairwise_cases as cases
import pairwise_oracle as oracle
import pytest
import torch
from check import close
from pairwise_oracle import gradients

from evaat_fast import ops
from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.reference import sms_loss_reference

pytestmark = pytest.mark.interpret
F32, F16, F64 = torch.float32, torch.float16, torch.float64
RULES = ["code", "paper", "charades"]
dtypes = pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
rules = pytest.mark.parametrize("rule", RULES)


def batch(N, E, dtype=F32):
    return cases.batch(N, E, dtype)


@pytest.fixture(params=[None, 128], ids=["one panel", "panels"])
def panels(request):
    """The losses."""
    return cases.losses(request.param)


def sms(video, text, c, panels=ops, **options):
    return gradients(lambda v, t: panels.sms_loss(v, t, c, backend="triton", **options), video, text)


def unchecked(video, text, c, indices, rows=None):
    """What CUDA tensors get, whose indices are not read back: the operator's loss and gradients."""
    given = cases.settings(c, rows, "triton", indices=indices, own=torch.ones(len(video)))
    return step.sms_step.body(video, text, None, dataclasses.replace(given, checked=True))


@pytest.mark.sample(8)
@rules
@dtypes
@pytest.mark.parametrize("N,E", [(2, 1), (3, 200), (31, 63), (128, 64), (129, 8), (260, 96)])
def test_equals_oracle(N, E, dtype, rule, panels):
    video, text, c = batch(N, E, dtype)
    eps = 1.1 / 240 if rule == "code" else 0.1
    reference = lambda v, t: sms_loss_reference(v, t, c, c.diag(), 0.6, 0.1, eps, rule)  # noqa: E731
    low = gradients(reference, video, text)
    truth = gradients(lambda v, t: oracle.sms(v, t, c, rule=rule), video.double(), text.double())
    for name, ours, a, b in zip(("loss", "video", "text"), sms(video, text, c, panels, rule=rule), low, truth, strict=True):
        if name == "loss" or dtype == F32:
            close(ours, a, b, what=name)
        else:  # unit rows are rounded once more before the products of the slopes
            assert (ours.double() - b).norm() <= 1.6 * (a.double() - b).norm() + 2e-4 * b.norm(), name


def kernel_pairs(video, text, own, weight=None):
    from evaat_fast.kernels.pairwise import panel, sms

    (norms, inverses), features = torch.empty(2, 2, len(video)), panel.features(video, text)
    panel.prepare(features, torch.empty(2, *video.shape, dtype=video.dtype), norms, inverses)
    pairs = sms.Pairs(*inverses, torch.empty(len(video)), own, weight)
    sms.own_pairs(features, pairs, None)
    return pairs


def kernel_labels(c):
    from evaat_fast.kernels.pairwise import sms

    return sms.Labels(c, *c.stride(), 0, *c.shape, None, None, None, None)


def panel_of(video, text, c, w, settings, rule, weight=None, rows=None):
    """(slopes, sums of both sides, losses of both sides) of the kernel, panel by panel."""
    from evaat_fast.kernels.pairwise import panel
    from evaat_fast.kernels.pairwise import sms as kernels

    N = len(video)
    pairs, sums = kernel_pairs(video, text, w, weight), torch.zeros(2, N, dtype=torch.int32)
    slopes, entries = torch.full((N, N), torch.nan), torch.zeros(2, N)
    for first in range(0, N, rows or N):
        last = min(first + (rows or N), N)
        down, across = panel.tiles(last - first, N, panel.config(video.dtype)["BLOCK"])
        parts = torch.full((across, last - first), torch.nan), torch.full((down, N), torch.nan)
        out = kernels.Out(slopes[first:last], *sums, *parts, first, last)
        kernels.sms_panel(panel.features(video, text), pairs, kernel_labels(c), cases.penalty(*settings, rule), out)
        entries[0, first:last] = parts[0].sum(0)
        entries[1] += parts[1].sum(0)
    return slopes, sums, entries


@pytest.mark.sample(3)
@rules
@pytest.mark.parametrize("rows", [None, 50])
def test_slopes_are_exact_on_kinks_and_ties(rule, rows):
    """Rows of four signs: cosines are halves, and with quarters as labels every m is exact, kinks and ties frequent."""
    N, settings = 150, (0.5, 0.25, 0.25)
    video, text = (torch.randint(0, 2, (N, 4)) * 2.0 - 1 for _ in range(2))
    c, w = torch.randint(0, 5, (N, N)) / 4, torch.randint(0, 5, (N,)) / 4
    slopes, sums, entries = panel_of(video, text, c, w, settings, rule, rows=rows)
    x = text @ video.T / 4
    truth = oracle.slopes(x, c, w, *settings, rule)
    assert torch.equal(slopes.long(), (truth - torch.diag(truth.diag())).T) and torch.equal(slopes, slopes.round())
    assert torch.equal(-sums.sum(0).long(), truth.diag())
    assert entries.sum() == oracle.penalties(x.double(), c.double(), w.double(), *settings, rule).sum()


def duplicates(N, dtype=F32):
    """(video, text, c) of which pair 150 is pair 3 again, in a tile far from it, and no other pair is near another's.

    Small integers, whose products float32 sums exactly in any order: numpy's may give a row other bits in another place.
    """
    video = torch.randint(-4, 5, (N, 48)).to(dtype)
    video[150] = video[3]
    c = torch.eye(N)
    c[150, 3] = c[3, 150] = 1
    return video, 3 * video, c


@pytest.mark.sample(2)
@dtypes
def test_duplicate_pairs_are_ties(dtype, panels):
    """Noise between the two would be all there is, as no other pair comes near. Each norm is another: so the order of scaling
    shows."""
    video, text, c = duplicates(200, dtype)
    for out in sms(video, text, c, panels, margin=0.0, relaxation=0.0):
        assert not out.any()


def sources(dtype):
    """One matrix from every source of labels, dense first."""
    N = 40
    iou = torch.randint(0, 5, (9, 9)) / 4
    verb, noun = torch.randint(0, 3, (N,)), torch.randint(0, 9, (N,))
    matrix = (0.5 * (verb[:, None] == verb) + 0.5 * iou[noun[:, None], noun]).to(dtype)
    table, rows, columns = torch.zeros(60, 50, dtype=dtype), torch.randperm(60)[:N], torch.randperm(50)[:N]
    table[rows[:, None], columns] = matrix
    codes = (matrix * 8).to(torch.uint8)
    return {
        "dense": matrix,
        "transposed": matrix.T.contiguous().T,
        "codes": ops.DenseRelevancy(codes, 1 / 8),
        "indexed": ops.IndexedRelevancy(table, rows, columns.int()),
        "indexed codes": ops.IndexedRelevancy((table * 8).to(torch.uint8), rows, columns, 1 / 8),
        "verbs and nouns": ops.VerbNounRelevancy(verb, noun.int(), iou),
    }


@pytest.mark.sample(1)
@dtypes
def test_equal_values_give_equal_bits(dtype):
    every = sources(dtype)
    video, text, _ = batch(40, 16, dtype)
    want = sms(video, text, every["dense"])
    for name, source in every.items():
        assert all(map(torch.equal, sms(video, text, source), want)), name


def test_an_index_out_of_range_makes_the_loss_nan():
    video, text, _ = batch(5, 8)
    index = torch.arange(5)
    for bad in (-1, 5):
        indices = index, index.index_fill(0, torch.tensor([2]), bad)
        assert unchecked(video, text, torch.rand(5, 5), indices)[0].isnan()


@pytest.mark.sample(2)
@dtypes
@rules
def test_reduction_none(rule, dtype, panels):
    cases.check_reduction_none(panels, rule, dtype, "triton", {F32: 1e-5, F16: 2e-3}[dtype])


@pytest.mark.parametrize("op", ["mi_mm_loss", "adaptive_mi_mm_loss"])
def test_siblings(op):
    cases.check_siblings(op, 33, F32, "triton", 1e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 0)[::2],
    ],
)
def test_views(view):
    video, text, c = batch(20, 24)
    assert all(map(torch.equal, sms(view(video), view(text), c), sms(video, text, c)))


def test_one_sided_gradients():
    video, text, c = batch(40, 16)
    _, both_video, both_text = sms(video, text, c)
    loss = lambda v, t: ops.sms_loss(v, t, c, backend="triton")  # noqa: E731
    assert torch.equal(gradients(lambda v: loss(v, text), video)[1], both_video)
    assert torch.equal(gradients(lambda t: loss(video, t), text)[1], both_text)
    with torch.no_grad():
        assert torch.equal(loss(video, text), loss(video.clone().requires_grad_(), text))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_loss(bad):
    for where in (0, 1):
        features = list(batch(20, 8)[:2])
        features[where][7, 3] = bad
        assert not ops.sms_loss(*features, torch.rand(20, 20), backend="triton").isfinite()
    labels = torch.rand(20, 20)
    labels[3, 4] = torch.nan
    assert ops.sms_loss(*batch(20, 8)[:2], labels, backend="triton").isnan()


@dtypes
def test_rows_without_a_direction_get_no_gradient(dtype):
    cases.check_rows_without_a_direction(dtype, "triton")


def test_no_pairs():
    cases.check_no_pairs(F32, "triton")


def contrast_batch(N, E, dtype):
    video, text, _ = batch(N, E)
    unit = torch.nn.functional.normalize
    verbs, nouns = torch.rand(N, 40) < 0.05, torch.rand(N, 33) < 0.1
    return unit(video, dim=1).to(dtype), unit(text, dim=1).to(dtype), verbs, nouns


def agree(ours, low, truth, dtype):
    """Gradients of 16-bit features come from slopes that are rounded to 16 bits once before they are added up."""
    for a, b, c in zip(ours, low, truth, strict=True):
        if dtype == F32:
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6 * c.norm()
        else:
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 5e-4 * c.norm()


@pytest.mark.sample(8)
@dtypes
@pytest.mark.parametrize("N,E", [(2, 1), (3, 200), (65, 63), (129, 8), (260, 40)])
def test_clip_equals_the_reference(N, E, dtype, panels):
    video, text, _, _ = contrast_batch(N, E, dtype)
    scale = torch.tensor(14.0)
    run = lambda backend: lambda v, t, s: panels.clip_loss(v, t, s, backend=backend)  # noqa: E731
    ours = gradients(run("triton"), video, text, scale)
    low = gradients(lambda v, t, s: oracle.clip(v.float(), t.float(), s), video, text, scale)
    truth = gradients(run("reference"), video.double(), text.double(), scale.double())
    assert abs(ours[0] - truth[0]) <= 14 * 2e-7 and abs(ours[3] - truth[3]) <= 14 * 2e-7
    agree(ours[1:3], low[1:3], truth[1:3], dtype)


@pytest.mark.sample(5)
@dtypes
@pytest.mark.parametrize("source", ["matrix", "bits", "own"])
@pytest.mark.parametrize("N,E", [(2, 1), (65, 63), (140, 24)])
def test_ego_nce_equals_the_reference(N, E, source, dtype, panels):
    video, text, verbs, nouns = contrast_batch(N, E, dtype)
    dense = (verbs.double() @ verbs.double().T) * (nouns.double() @ nouns.double().T) > 0
    dense &= source != "own"
    positives = ops.VerbNounPositives(verbs, nouns) if source == "bits" else dense
    ours = gradients(lambda v, t: panels.ego_nce_loss(v, t, positives, backend="triton"), 3 * video, text)
    run = lambda v, t: ops.ego_nce_loss(v, t, dense, backend="reference")  # noqa: E731
    low, truth = gradients(run, 3 * video, text), gradients(run, (3 * video).double(), text.double())
    assert abs(ours[0] - truth[0]) <= 20 * 4e-7
    agree(ours[1:], low[1:], truth[1:], dtype)


@pytest.mark.sample(2)
@pytest.mark.parametrize("op", ["clip_loss", "ego_nce_loss"])
def test_contrast_reduction_none(op, panels):
    video, text, verbs, nouns = contrast_batch(140, 24, F32)
    weight, other = torch.randn(140), 9.0 if op == "clip_loss" else ops.VerbNounPositives(verbs, nouns)

    def run(backend, *features):
        def loss(v, t):
            entries = getattr(panels, op)(v, t, other, reduction="none", backend=backend)
            return (entries * weight.to(entries.dtype)).sum()

        return gradients(loss, *features)

    for a, b in zip(run("triton", video, text), run("reference", video.double(), text.double()), strict=True):
        assert (a.double() - b).norm() <= 3e-6 * b.norm()


@pytest.mark.parametrize("scale", [1000.0, -1000.0, 0.0])
def test_contrast_is_stable_with_logits_of_a_thousand(scale):
    video, text, _, _ = contrast_batch(40, 16, F32)
    ours = gradients(lambda v, t: ops.clip_loss(v, t, scale, backend="triton"), video, text)
    truth = gradients(lambda v, t: oracle.clip(v, t, scale), video.double(), text.double())
    for a, b in zip(ours, truth, strict=True):
        assert a.isfinite().all() and (a.double() - b).norm() <= 3e-4 * b.norm().clamp_min(1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_contrast_lets_nan_and_inf_reach_the_loss(bad):
    video, text, _, _ = contrast_batch(20, 8, F32)
    video[7, 3] = bad
    assert not ops.clip_loss(video, text, 5.0, backend="triton").isfinite()
    assert not ops.ego_nce_loss(video, text, torch.zeros(20, 20).bool(), backend="triton").isfinite()


@pytest.mark.parametrize("op", ["clip_loss", "ego_nce_loss"])
@pytest.mark.parametrize("N,noise", [(8, 0.1), (256, 0.1)])
def test_what_a_trained_batch_still_costs_is_kept(N, noise, op, panels):
    cases.check_trained_batch(N, noise, op, "triton", panels)


@pytest.mark.parametrize("op", ["clip_loss", "ego_nce_loss", "sms_loss"])
def test_a_loss_may_be_divided_in_place(op):
    """As loops that accumulate gradients do, which a loss that is a view would not let them."""
    video, text, c = batch(20, 8)
    argument = {"clip_loss": torch.tensor(5.0, requires_grad=True), "ego_nce_loss": c > 0.9, "sms_loss": c}[op]

    def loss(video, text, halved):
        out = getattr(ops, op)(video, text, argument, backend="triton")
        out /= 2 if halved else 1
        return out

    whole, half = (gradients(lambda v, t, h=h: loss(v, t, h), video, text) for h in (False, True))
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("op,most", [("clip_loss", 7), ("ego_nce_loss", 9), ("sms_loss", 7), ("sms_loss, codes", 8)])
def test_a_small_batch_is_few_launches(op, most, monkeypatch):
    """Of Triton's kernels and of torch's: all that a step of one panel asks of a GPU, the backward pass included."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.undo()  # memory that is not poisoned
    video, text, c = batch(40, 16)
    video.requires_grad_(), text.requires_grad_()
    argument = {
        "clip_loss": torch.tensor(14.0, requires_grad=True),
        "ego_nce_loss": c > 0.9,
        "sms_loss": c,
        "sms_loss, codes": ops.DenseRelevancy((c * 10).to(torch.uint8), 0.1),
    }[op]
    leaves = [x for x in (video, text, argument) if getattr(x, "requires_grad", False)]
    ones, regions = torch.ones(()), []

    def see(frame, event, _):  # what the interpreter asks of torch is not the step's
        if frame.f_code is GridExecutor.__call__.__code__ and event == "call":
            regions.append(torch.profiler.record_function("launch"))
            regions[-1].__enter__()
        elif frame.f_code is GridExecutor.__call__.__code__ and event == "return":
            regions[-1].__exit__(None, None, None)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sys.setprofile(see)
        try:
            loss = getattr(ops, op.split(",")[0])(video, text, argument, backend="triton")
            torch.autograd.grad(loss, leaves, ones)
        finally:
            sys.setprofile(None)
    own = [e for e in profile.events() if e.name.startswith("aten::") and not any(p.name == "launch" for p in parents(e))]
    work = [e.name for e in own if e.name in {f"aten::{x}" for x in ("mm", "addmm_", "copy_", "fill_", "mul", "sum")}]
    rest = {e.name for e in own} - set(work) - {f"aten::{x}" for x in NO_LAUNCH.split()}
    assert not rest, rest
    assert len(regions) + len(work) <= most, (len(regions), work)


# The last three launch a fill_ or a copy_, where they launch anything.
NO_LAUNCH = """empty empty_strided empty_like promote_types unbind select slice as_strided detach view reshape diagonal permute
    resolve_conj numpy_T alias full to _to_copy"""


def parents(event):
    while (event := event.cpu_parent) is not None:
        yield event


def test_the_kernels_know_the_rules_of_cpp():
    from evaat_fast.kernels.pairwise.sms import RULES

    from evaat_fast import _cpu

    assert RULES == _cpu.SMS_RULES
