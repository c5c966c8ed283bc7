"""The kernel of the max-margin losses that needs no panel, in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

import pairwise_oracle as oracle
import pytest
import torch
from pairwise_cases import losses, penalty
from pairwise_oracle import gradients
from test_pairwise_triton import batch, dtypes, duplicates, kernel_labels, kernel_pairs, rules, sources, unchecked

from evaat_fast import ops
from evaat_fast.ops.pairwise.reference import sms_loss_reference
from evaat_fast.ops.pairwise.step import Work

pytestmark = pytest.mark.interpret
F32, F16, F64 = torch.float32, torch.float16, torch.float64


# It serves bfloat16, which the interpreter does not have, at N >= 256k.
sms_loss = losses(0).sms_loss


def sms(video, text, c, **options):
    return gradients(lambda v, t: sms_loss(v, t, c, backend="triton", **options), video, text)


def test_the_kernel_without_panels_serves_large_batches_of_bfloat16():
    from evaat_fast.ops.pairwise import triton

    work = lambda *needs, rows=None: Work(False, *needs, False, "triton", rows)  # noqa: E731
    for shape, dtype, how, served in [
        ((1 << 18, 256), torch.bfloat16, work(True, False), True),
        ((1 << 18, 256), torch.bfloat16, work(False, False), False),
        ((1 << 18, 256), torch.bfloat16, work(True, True, rows=128), False),
        ((1 << 18, 257), torch.bfloat16, work(True, True), False),
        ((1 << 17, 256), torch.bfloat16, work(True, True), False),
        ((1 << 18, 256), F16, work(True, True), False),
        ((100, 256), F32, work(True, True, rows=0), True),
    ]:
        assert triton.without_panels(*shape, dtype, how) == served


@pytest.mark.sample(5)
@rules
@dtypes
@pytest.mark.parametrize("N,E", [(2, 1), (3, 200), (16, 16), (127, 64), (129, 8)])
def test_equals_oracle(N, E, dtype, rule):
    video, text, c = batch(N, E, dtype)
    eps = 1.1 / 240 if rule == "code" else 0.1
    low = gradients(lambda v, t: sms_loss_reference(v, t, c, c.diag(), 0.6, 0.1, eps, rule), video, text)
    truth = gradients(lambda v, t: oracle.sms(v, t, c, rule=rule), video.double(), text.double())
    ours = sms(video, text, c, rule=rule)
    assert (ours[0] - truth[0]).abs() <= 2 * (low[0] - truth[0]).abs() + 1e-7
    for a, b, t in zip(ours[1:], low[1:], truth[1:], strict=True):
        assert (a.double() - t).norm() <= 1.6 * (b.double() - t).norm() + (1e-6 if dtype == F32 else 3e-4) * t.norm()


@pytest.mark.sample(2)
@rules
@pytest.mark.parametrize("weighted", [False, True])
def test_everything_is_exact_on_kinks_and_ties(rule, weighted):
    """Rows of four signs: cosines are halves, and with quarters as labels every m is exact, kinks and ties frequent."""
    from evaat_fast.kernels.pairwise import panel, sms_recompute

    N, settings = 150, (0.5, 0.25, 0.25)
    features = [torch.randint(0, 2, (N, 4)) * 2.0 - 1 for _ in range(2)]
    c, w = torch.randint(0, 5, (N, N)) / 4, torch.randint(0, 5, (N,)) / 4
    weight = torch.randint(-3, 4, (N,)).float() if weighted else None
    pairs = kernel_pairs(*features, w, weight)
    x = features[1] @ features[0].T / 4
    truth = oracle.slopes(x, c, w, *settings, rule, weight)
    own, plain = truth.diag(), oracle.slopes(x, c, w, *settings, rule).diag()
    off, total = (truth - torch.diag(own)).float(), torch.zeros(N, dtype=torch.int32)
    penalties = oracle.penalties(x.double(), c.double(), w.double(), *settings, rule).view(2, N, N - 1).sum(2)
    for captions in (False, True):
        entries, sums = torch.full((N,), torch.nan, dtype=F64), torch.zeros(N, dtype=torch.int32)
        out = sms_recompute.Out(entries, sums, torch.empty(N, 4))
        costs = penalty(*settings, rule)
        sms_recompute.sms_rows(panel.features(*features), pairs, kernel_labels(c), costs, out, captions)
        assert torch.equal(out.grad, (off if captions else off.T) @ features[1 - captions] / 2)
        assert torch.equal(entries, penalties[1 - captions])
        total += sums
    assert torch.equal(-total.long(), plain)


@pytest.mark.sample(1)
@dtypes
def test_duplicate_pairs_are_ties(dtype):
    """Noise between the two would be all there is, as no other pair comes near. Each norm is another: so the order of scaling
    shows."""
    video, text, c = duplicates(200, dtype)
    for out in sms(video, text, c, margin=0.0, relaxation=0.0):
        assert not out.any()


@pytest.mark.sample(1)
@dtypes
def test_equal_values_give_equal_bits(dtype):
    every = sources(dtype)
    video, text, _ = batch(40, 16, dtype)
    want = sms(video, text, every["dense"])
    for name, source in every.items():
        assert all(map(torch.equal, sms(video, text, source), want)), name


def test_asymmetric_tables_and_views():
    """Each run takes its own indices, strides and sizes; a mistake in one would be a wrong gradient of one side."""
    N, table = 50, torch.rand(70, 90).T
    index = torch.randint(0, 90, (N,)), torch.randint(0, 70, (N,))
    video, text, _ = batch(N, 24)
    want = sms(video, text, table[index[0][:, None], index[1]])
    views = video.T.contiguous().T, torch.cat((text, text), 1)[:, :24]
    assert all(map(torch.equal, sms(*views, ops.IndexedRelevancy(table, *index)), want))


@pytest.mark.sample(1)
@dtypes
@rules
def test_reduction_none(rule, dtype):
    video, text, c = batch(140, 24, dtype)
    weight = torch.randn(140)

    def run(backend, *features):
        loss = lambda v, t: sms_loss(v, t, c, rule=rule, reduction="none", backend=backend)  # noqa: E731
        return gradients(lambda v, t: (loss(v, t) * weight.to(torch.promote_types(v.dtype, F32))).sum(), *features)

    ours, truth = run("triton", video, text), run("reference", video.double(), text.double())
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= {F32: 1e-5, F16: 2e-3}[dtype] * b.norm()


def test_one_sided_gradients():
    video, text, c = batch(40, 16)
    loss = lambda v, t: sms_loss(v, t, c, backend="triton")  # noqa: E731
    value, both_video, both_text = sms(video, text, c)
    for side, want in (
        (gradients(lambda v: loss(v, text), video), both_video),
        (gradients(lambda t: loss(video, t), text), both_text),
    ):
        assert torch.equal(side[0], value) and torch.equal(side[1], want)


def test_nan_inf_and_indices_out_of_range_reach_the_loss():
    for bad in (torch.nan, torch.inf):
        for where in (0, 1):
            features = list(batch(20, 8)[:2])
            features[where][7, 3] = bad
            assert not sms(*features, torch.rand(20, 20))[0].isfinite()
    index = torch.arange(5)
    for bad in (-1, 5):
        indices = index, index.index_fill(0, torch.tensor([2]), bad)
        assert unchecked(*batch(5, 8)[:2], torch.rand(5, 5), indices, 0)[0].isnan()


def test_rows_without_a_direction_get_no_gradient():
    video, text, c = batch(20, 8)
    video[3] = 0
    loss, grad_video, grad_text = sms(video, text, c)
    assert loss.isfinite() and grad_video.isfinite().all() and grad_text.isfinite().all()
    assert not grad_video[3].any() and grad_video[4].any()
