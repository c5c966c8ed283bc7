"""sms_loss and its max-margin siblings: against a dense float64 oracle, slopes exactly, and by what must hold."""

import functools

import pairwise_cases as cases
import pairwise_oracle as oracle
import pytest
import torch
from check import close
from pairwise_oracle import gradients

from evaat_fast import _cpu, ops
from evaat_fast.ops._core.native import dtype_codes
from evaat_fast.ops.pairwise.cpu import native_bf16
from evaat_fast.ops.pairwise.reference import sms_loss_reference
from evaat_fast.ops.pairwise.step import sms_step

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(2, 1), (3, 200), (31, 63), (32, 64), (33, 256), (127, 8), (128, 64), (129, 200), (129, 1)]
RULES = ["code", "paper", "charades"]


IN_PANELS = cases.losses(13)


def batch(N, E, dtype=F32, agree=0.7):
    """Features that agree somewhat, and relevancies in tenths with ties."""
    video = torch.randn(N, E)
    text = agree * video + torch.randn(N, E)
    return video.to(dtype), text.to(dtype), torch.randint(0, 11, (N, N)) / 10


def low_precision(video, text, c, rule):
    """The reference as torch computes it from features of this dtype."""
    wide = torch.promote_types(video.dtype, F32)
    c = c.to(wide)
    return sms_loss_reference(video, text, c, c.diag(), 0.6, 0.1, 1.1 / 240 if rule == "code" else 0.1, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("N,E", SIZES)
def test_equals_oracle(N, E, dtype, backend, rule, losses=ops):
    video, text, c = batch(N, E, dtype)
    ours = gradients(lambda v, t: losses.sms_loss(v, t, c, rule=rule, backend=backend), video, text)
    low = gradients(lambda v, t: low_precision(v, t, c, rule), video, text)
    # Features and labels as the computation sees them: rounding a label would move pairs across eps.
    truth = gradients(lambda v, t: oracle.sms(v, t, c, rule=rule), video.double(), text.double())
    for name, *three in zip(("loss", "video", "text"), ours, low, truth, strict=True):
        close(*three, what=name)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_thousand_pairs_in_panels(dtype):
    test_equals_oracle(1000, 256, dtype, "cpu", "code", cases.losses(300))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("N,E", SIZES)
def test_float64_to_1e12(N, E, backend, rule):
    video, text, c = batch(N, E, F64)
    c = c.double()
    ours = gradients(lambda v, t: ops.sms_loss(v, t, c, rule=rule, backend=backend), video, text)
    truth = gradients(lambda v, t: oracle.sms(v, t, c, rule=rule), video, text)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == F64 and (a - b).abs().max() <= 1e-12 * max(b.abs().max(), 1e-3)


def run_panels(x, c, w, numbers, rule, dtype, rows, threads, mode="slopes", weight=None):
    """The C++ epilogue on similarities as given: slopes (videos in the rows), row sums, column sums, row and column losses."""
    N, wide, codes = len(x), torch.promote_types(dtype, F32), dtype_codes(_cpu)
    s = x.T.to(dtype).contiguous()
    assert torch.equal(s.double(), x.T.double())
    diagonal, c, w = x.diag().to(wide).contiguous(), c.to(wide).contiguous(), w.to(wide).contiguous()
    losses, sums = torch.zeros(1 + threads, N, dtype=F64), torch.zeros(1 + threads, N, dtype=torch.int32)
    penalty = _cpu.Penalty(**dict(zip(("margin", "relaxation", "eps"), numbers, strict=True), rule=_cpu.SMS_RULES[rule]))
    labels = _cpu.PairLabels(table=c, dtype=codes[wide], strides=(0, N, 1))
    pairs = _cpu.PairFeatures(wide=codes[wide], N=N, norms=torch.stack((diagonal, diagonal, diagonal)))
    given = {"dtype": codes[dtype], "scales": torch.ones(2, N) if dtype == BF16 else None, "own": w, "weight": weight}
    how = {"labels": labels, "penalty": penalty, "mode": _cpu.SMS_MODES[mode]}
    step = _cpu.SmsStep(pairs=pairs, losses=losses, sums=sums, **given, **how)
    for first in range(0, N, rows):
        part = s[first : first + rows]
        assert not _cpu.sms_panel(step, part.data_ptr(), first, len(part), threads)
    return s, sums[0], sums[1:].sum(0), losses[0], losses[1:].sum(0)


def test_a_field_that_does_not_exist_is_an_error():
    with pytest.raises(AttributeError, match="colour"):
        _cpu.Penalty(margin=0.1, colour=1)


@pytest.mark.sample(27)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("N,rows,threads", [(2, 2, 1), (7, 3, 2), (37, 37, 1), (37, 16, 3), (66, 12, 2)])
def test_slopes_are_exact_on_kinks_and_ties(N, rows, threads, dtype, rule, isa):
    """Eighths and quarters: every m, every |m| - relaxation and every d is exact, and kinks, ties and d == eps are frequent."""
    settings = margin, relaxation, eps = 0.5, 0.25, 0.25
    x = torch.randint(-8, 9, (N, N)) / 8
    c, w = torch.randint(0, 5, (N, N)) / 4, torch.randint(0, 5, (N,)) / 4
    s, row_sum, col_sum, row_loss, _ = run_panels(x, c, w, settings, rule, dtype, rows, threads)
    truth = oracle.slopes(x, c, w, margin, relaxation, eps, rule)
    off = truth - torch.diag(truth.diag())
    assert torch.equal(s.long(), off.T) and torch.equal(s, s.round())
    assert torch.equal(-(row_sum + col_sum).long(), truth.diag())
    assert truth.sum() == 0
    total = oracle.penalties(x.double(), c.double(), w.double(), margin, relaxation, eps, rule)
    assert row_loss.sum() == total.sum()
    for mode in ("loss", "each"):
        again, _, _, of_rows, of_columns = run_panels(x, c, w, settings, rule, dtype, rows, threads, mode)
        assert torch.equal(again.double(), x.T.double()), "similarities must be left alone"
        if mode == "loss":
            assert torch.equal(of_rows, row_loss) and not of_columns.any()
        else:  # text i is the anchor in the first half, video j in the second
            of_texts, of_videos = total.view(2, N, N - 1).sum(2)
            assert torch.equal(of_columns, of_texts) and torch.equal(of_rows, of_videos)
    if dtype != BF16:  # the slopes of a weighted sum are those of each side times the anchor's weight
        weight = torch.randint(-3, 4, (N,)).to(dtype)
        mode = "weighted"
        s, row_sum, col_sum, _, _ = run_panels(x, c, w, settings, rule, dtype, rows, threads, mode, weight)
        weighted = oracle.slopes(x, c, w, *settings, rule, weight)
        assert torch.equal(s.long(), (weighted - torch.diag(weighted.diag())).T)
        assert torch.equal(-(row_sum + col_sum).long() * weight.long(), weighted.diag())


def test_instruction_sets_agree_on_slopes():
    """Random numbers this time: every level rounds alike, so every slope is the same."""
    N = 261
    x, c = torch.rand(N, N) * 2 - 1, torch.rand(N, N)
    before, results = _cpu.isa(), []
    try:
        for level in range(before + 1):
            _cpu.set_isa(level)
            results.append(run_panels(x, c, c.diag(), (0.6, 0.1, 1.1 / 240), "code", F32, 64, 2))
    finally:
        _cpu.set_isa(before)
    for s, row_sum, col_sum, row_loss, _ in results[1:]:
        assert torch.equal(s, results[0][0]) and torch.equal(row_sum, results[0][1]) and torch.equal(col_sum, results[0][2])
        torch.testing.assert_close(row_loss, results[0][3], rtol=1e-6, atol=0)


def off_diagonal(gradient, x, slope_x, other):
    """The part of a gradient that pairs i != j make: the whole less the diagonal's, which is about 34 times larger."""
    N = len(x)
    x, other = x.double(), oracle.unit(other.double())
    norm, direction = x.norm(dim=1, keepdim=True), oracle.unit(x)
    own = slope_x.double()[:, None] * other / (2 * N * (N - 1))
    return gradient.double() - (own - direction * (own * direction).sum(1, keepdim=True)) / norm


@pytest.mark.parametrize("dtype,N,bound", [(F32, 150, 2e-5), (F16, 150, 2e-5), (BF16, 150, 2e-5), (BF16, 1030, 2e-2)], ids=str)
def test_off_diagonal_part_of_the_gradients(dtype, N, bound):
    video, text, c = batch(N, 64, dtype)
    _, *ours = sms_step.body(video, text, None, cases.settings(c, 128))
    v, t = video.double(), text.double()
    x = (oracle.unit(t) @ oracle.unit(v).T).requires_grad_()
    slope = gradients(lambda x: oracle.penalties(x, c.double(), c.double().diag(), 0.6, 0.1, 1.1 / 240).mean(), x)[1]
    own, off = slope.diag() * 2 * N * (N - 1), slope - torch.diag(slope.diag())
    naive = None
    if dtype == BF16:  # what autocast makes of it: unit rows and similarities in bfloat16
        naive = gradients(lambda v, t: oracle.sms(oracle.unit(v), oracle.unit(t), c.to(dtype)), video, text)[1:]
    for k, (a, b, part) in enumerate(((v, t, off.T @ oracle.unit(t)), (t, v, off @ oracle.unit(v)))):
        want = (part - oracle.unit(a) * (part * oracle.unit(a)).sum(1, keepdim=True)) / a.norm(dim=1, keepdim=True)
        error = (off_diagonal(ours[k], a, own, b) - want).norm() / want.norm()
        assert error <= bound, f"{'video text'.split()[k]}: relative error {error:.1e}"
        if naive is not None:
            theirs = (off_diagonal(naive[k], a, own, b) - want).norm() / want.norm()
            assert error <= theirs, f"{error:.1e}, torch in bfloat16 makes {theirs:.1e}"


@pytest.mark.skipif(not native_bf16(), reason="bfloat16 rows are widened on this CPU")
def test_bfloat16_products():
    """Above the threshold bfloat16 rows are multiplied as such; the whole gradients stay within their own rounding."""
    video, text, c = batch(1024, 200, BF16)
    ours = gradients(lambda v, t: IN_PANELS.sms_loss(v, t, c), video, text)
    truth = gradients(lambda v, t: oracle.sms(v, t, c), video.double(), text.double())
    for a, b, bound in zip(ours, truth, (1e-5, 3e-3, 3e-3), strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("N", [0, 1])
def test_no_pairs(N, backend, dtype):
    video, text, c = batch(N, 8, dtype)
    for loss in (
        lambda v, t: ops.sms_loss(v, t, c, backend=backend),
        lambda v, t: ops.mi_mm_loss(v, t, backend=backend),
        lambda v, t: ops.adaptive_mi_mm_loss(v, t, c.diag(), backend=backend),
    ):
        out, *grads = gradients(loss, video, text)
        assert out == 0 and out.dtype == torch.promote_types(dtype, F32)
        assert all(g.shape == (N, 8) and g.dtype == dtype and not g.any() for g in grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_rows_without_a_direction_get_no_gradient(dtype, backend):
    video, text, c = batch(9, 8, dtype)
    video[2], text[5] = 0, 0
    if dtype in (F32, F64):
        video[4] = 1e-10
    loss, gv, gt = gradients(lambda v, t: ops.sms_loss(v, t, c, backend=backend), video, text)
    truth = oracle.sms(video.double(), text.double(), c)
    assert (loss.double() - truth).abs() < 1e-6
    assert not gv[2].any() and not gt[5].any() and gv[3].any() and gt[2].any()
    assert dtype not in (F32, F64) or not gv[4].any()
    assert gv.isfinite().all() and gt.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["video", "text"])
def test_nan_and_inf_reach_the_loss(where, bad, backend):
    video, text, c = batch(40, 16)
    (video if where == "video" else text)[17, 3] = bad
    assert IN_PANELS.sms_loss(video, text, c, backend=backend).isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_label_reaches_the_loss(backend, isa):
    video, text, c = batch(40, 16)
    c[30, 2] = float("nan")
    assert ops.sms_loss(video, text, c, backend=backend).isnan()
    c[30, 2], c[4, 4] = 0, float("nan")
    assert ops.sms_loss(video, text, c, backend=backend).isnan()
    assert ops.sms_loss(video, text, c, self_relevancy=torch.ones(40), backend=backend).isfinite()  # pairs own no label of c


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack((x, x), 2)[..., 1],
        lambda x: x.repeat_interleave(2, 0)[1::2],
    ],
    ids=["row stride", "transposed", "column stride", "every second row"],
)
def test_views(view, dtype):
    video, text, c = batch(45, 24, dtype)
    want = gradients(lambda v, t: ops.sms_loss(v, t, c), video, text)
    ours = gradients(lambda v, t: ops.sms_loss(view(v), view(t), c), video, text)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


def test_expanded_rows():
    video, text, c = batch(20, 16)
    ours = gradients(lambda v: ops.sms_loss(v.expand(20, 16), text, c), video[:1])
    want = gradients(lambda v: oracle.sms(v.expand(20, 16), text.double(), c), video[:1].double())
    torch.testing.assert_close(ours[1].double(), want[1], rtol=1e-4, atol=1e-7)


def test_one_sided_gradients_compute_only_what_is_needed(monkeypatch):
    video, text, c = batch(50, 16)
    _, gv, gt = gradients(lambda v, t: ops.sms_loss(v, t, c), video, text)
    assert torch.equal(gradients(lambda v: ops.sms_loss(v, text, c), video)[1], gv)
    assert torch.equal(gradients(lambda t: ops.sms_loss(video, t, c), text)[1], gt)
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or original(*a, **k))
    for count, (v, t) in zip((1, 2, 2, 3), ((0, 0), (1, 0), (0, 1), (1, 1)), strict=True):
        products.clear()
        ops.sms_loss(video.clone().requires_grad_(bool(v)), text.clone().requires_grad_(bool(t)), c)
        assert len(products) == count
    products.clear()
    with torch.no_grad():
        loss = ops.sms_loss(video.clone().requires_grad_(), text, c)
    assert len(products) == 1 and not loss.requires_grad


def test_the_gradients_are_all_that_is_saved():
    video, text, c = batch(64, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.sms_loss(video.requires_grad_(), text.requires_grad_(), c)
    assert sum(x.numel() for x in saved) == 2 * 64 * 16


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_scaled_backward(dtype):
    """A power of two as the loss scale scales the gradients exactly, before they are rounded."""
    video, text, c = batch(33, 16, dtype)
    plain = sms_step.body(video, text, None, cases.settings(c))[1:]
    scaled = gradients(lambda v, t: ops.sms_loss(v, t, c) * 1024, video, text)[1:]
    assert all(torch.equal((1024 * p).to(dtype), s) for p, s in zip(plain, scaled, strict=True))
    loss = ops.sms_loss(video.requires_grad_(), text, c)
    first, second = (torch.autograd.grad(loss, video, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_double_backward_is_a_clear_error():
    video, text, c = batch(8, 4, F64)
    video.requires_grad_()
    for loss in (ops.sms_loss(video, text, c), ops.clip_loss(video, text, 2.0)):
        with pytest.raises(RuntimeError, match='no double backward.* use backend="reference"'):
            torch.autograd.grad(loss, video, create_graph=True)


def test_permutation_equivariance():
    video, text, c = batch(60, 16, F64)
    c, order = c.double(), torch.randperm(60)
    loss, gv, gt = gradients(lambda v, t: ops.sms_loss(v, t, c), video, text)
    moved = gradients(lambda v, t: ops.sms_loss(v, t, c[order][:, order]), video[order], text[order])
    for a, b in zip(moved, (loss, gv[order], gt[order]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_videos_and_texts_swap_with_transposed_labels():
    video, text, c = batch(60, 16, F64)
    loss, gv, gt = gradients(lambda v, t: ops.sms_loss(v, t, c), video, text)
    swapped = gradients(lambda t, v: ops.sms_loss(t, v, c.T), text, video)
    for a, b in zip(swapped, (loss, gt, gv), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_duplicate_pairs_are_ties():
    """A batch of one pair over and over: m = margin * d exactly, and equal labels cost nothing."""
    video, text = torch.full((12, 16), 0.5), torch.full((12, 16), -2.0)
    assert ops.sms_loss(video, text, torch.ones(12, 12), relaxation=0.0) == 0
    c = torch.eye(12)  # d = 1: every penalty is the margin
    assert ops.sms_loss(video, text, c, margin=0.25) == 0.25


@pytest.mark.parametrize("op,labels", [("mi_mm_loss", None), ("adaptive_mi_mm_loss", 0.5)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_siblings(op, labels, backend, dtype):
    video, text, _ = batch(70, 24, dtype)
    w = torch.rand(70, dtype=F64) if labels else torch.ones(70, dtype=F64)
    if dtype != F64:
        w = w.float()

    def truth(v, t):
        x = oracle.unit(t) @ oracle.unit(v).T
        both = [(0.3 * w.double().unsqueeze(k) - x.diag().unsqueeze(k) + x).clamp_min(0) for k in (0, 1)]
        return ((both[0] + both[1]) * (1 - torch.eye(70))).sum() / (2 * 70 * 69)

    arguments = (w,) if labels else ()
    ours = gradients(lambda v, t: getattr(ops, op)(v, t, *arguments, margin=0.3, backend=backend), video, text)
    want = gradients(truth, video.double(), text.double())
    for a, b in zip(ours, want, strict=True):
        assert (a.double() - b).norm() <= {F32: 1e-6, F64: 1e-13, BF16: 4e-3}[dtype] * b.norm()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "op",
    [
        lambda v, t, c, **k: ops.sms_loss(v, t, c, **k),
        lambda v, t, c, **k: ops.sms_loss(v, t, c, rule="charades", **k),
        lambda v, t, c, **k: ops.mi_mm_loss(v, t, **k),
    ],
)
def test_reduction_none(op, backend):
    video, text, c = batch(30, 8, F64)
    op = functools.partial(op, backend=backend)
    entries = op(video, text, c, reduction="none")
    assert entries.shape == (30,)
    torch.testing.assert_close(entries.mean(), op(video, text, c), rtol=1e-13, atol=0)
    # Entry i holds text i against all videos and video i against all texts.
    video[7] += 10
    other = op(video, text, c, reduction="none") - entries
    assert other[7].abs() > 1e-3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("N,E", SIZES)
def test_reduction_none_has_the_reference_s_gradients(N, E, rule):
    """Any weights of the entries, on one side and on both."""
    video, text, c = batch(N, E, F64)
    weight = torch.randn(N, dtype=F64)

    def run(backend):
        def loss(v, t):
            return (IN_PANELS.sms_loss(v, t, c, rule=rule, reduction="none", backend=backend) * weight).sum()

        return *gradients(loss, video, text), gradients(lambda v: loss(v, text), video)[1]

    for ours, theirs in zip(run("cpu"), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_reduction_none_of_narrow_features(dtype, isa):
    """Beyond 1024, from where bfloat16 rows are multiplied as such."""
    N = 1101
    video, text, c = batch(N, 24, dtype)
    weight = torch.randn(N)

    def run(cast, backend):
        loss = lambda v, t: (ops.sms_loss(v, t, c, reduction="none", backend=backend) * weight.to(cast)).sum()  # noqa: E731
        return gradients(loss, video.to(cast), text.to(cast))

    loss = lambda v, t: (ops.sms_loss(v, t, c, reduction="none") * weight).sum()  # noqa: E731
    for ours, want in zip(gradients(loss, video, text), run(F64, "cpu"), strict=True):
        assert (ours.double() - want).norm() <= 8e-3 * want.norm()


def test_reduction_none_saves_no_matrix():
    video, text, c = batch(300, 8)
    out = ops.sms_loss(video.requires_grad_(), text, c, reduction="none", backend="cpu")
    saved = sum(x.numel() for x in out.grad_fn.saved_tensors if x is not None)
    assert saved == 300 * 300 + 300 + 2 * 300 * 8  # the caller's own labels, their diagonal, and the features


def test_reduction_none_is_row_i_and_column_i():
    x = torch.tensor([[1.0, 0.5], [0.2, 0.6]], dtype=F64)  # rows: texts
    video = torch.eye(2, dtype=F64)
    text = torch.nn.functional.normalize(x, dim=1)
    x = text @ video.T
    ours = ops.mi_mm_loss(video, text, margin=1.0, reduction="none")
    want = [(2 - 2 * x[0, 0] + x[0, 1] + x[1, 0]) / 2, (2 - 2 * x[1, 1] + x[1, 0] + x[0, 1]) / 2]
    torch.testing.assert_close(ours, torch.stack(want), rtol=1e-12, atol=0)
