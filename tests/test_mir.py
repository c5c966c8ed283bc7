"""The metrics against a straightforward loop, and against published numbers where the annotations are at hand."""

import math
import os
import tracemalloc

import numpy as np
import pytest
import torch

from evaat_fast.data.kinds import kinds_of, kinds_relevancy
from evaat_fast.data.readers import ek100
from evaat_fast.eval import mir

LEVELS = torch.tensor([0.0, 0.0, 1 / 6, 0.5, 2 / 3, 1.0], dtype=torch.float64)


def by_loop(sim, relevancy):
    """mAP and nDCG in pure Python: the definition, query by query. Ties count first to last in the one, last to first
    in the other, as in the challenge's code."""
    precisions, gains = [], []
    for scores, labels in zip(sim.tolist(), relevancy.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda c: -scores[c])  # Python's sort is stable
        seen, at_hits = 0.0, []
        for rank, column in enumerate(order, 1):
            seen += labels[column]
            if labels[column] == 1:
                at_hits.append(seen / rank)
        if at_hits:
            precisions.append(sum(at_hits) / len(at_hits))
        cut = sum(label > 0 for label in labels)
        if cut:
            order = sorted(range(len(scores)), key=lambda c: scores[c])[::-1]
            gain = sum(labels[c] / math.log2(rank + 2) for rank, c in enumerate(order[:cut]))
            best = sum(label / math.log2(rank + 2) for rank, label in enumerate(sorted(labels, reverse=True)[:cut]))
            gains.append(gain / best)
    return sum(precisions) / len(precisions), sum(gains) / len(gains)


def by_formulas(sim, relevancy):
    """The same in NumPy, whole matrices at a time, with a sort for each."""
    order = (-sim).argsort(axis=1, kind="stable")
    ranked = np.take_along_axis(relevancy, order, 1)
    precision = (ranked.cumsum(1) / np.arange(1, sim.shape[1] + 1) * (ranked == 1)).sum(1) / (ranked == 1).sum(1)
    discounts = 1 / np.log2(np.arange(sim.shape[1]) + 2)
    best = np.sort(relevancy, axis=1)[:, ::-1]
    order = sim.argsort(axis=1, kind="stable")[:, ::-1]
    gain = (np.take_along_axis(relevancy, order, 1) * (best > 0) * discounts).sum(1) / (best * discounts).sum(1)
    return precision.mean(), gain.mean()


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (7, 1), (13, 29), (40, 31)])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_loop(rows, columns, ties, dtype):
    sim = torch.randn(rows, columns)
    if ties:
        sim = sim.round()
    relevancy = LEVELS[torch.randint(len(LEVELS), (rows, columns))].to(dtype)
    relevancy[0, columns // 2] = 1
    precision, gain = by_loop(sim, relevancy)
    assert mir.mean_average_precision(sim, relevancy) == pytest.approx(precision, rel=1e-12)
    assert mir.ndcg(sim, relevancy) == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scores", ["distinct", "close", "integers", "equal"])
def test_equals_the_formulas(scores, dtype):
    """More rows than a tile has, similarities that differ in their last bits alone, and runs of ties."""
    sim = torch.randn(120, 1700, dtype=torch.float64)
    if scores == "close":
        sim = 1 + sim.abs().mul(64).round() * 2.0**-52
    elif scores == "integers":
        sim = sim.mul(2).round()  # zeros of both signs
    elif scores == "equal":
        sim = torch.zeros_like(sim)
    sim, relevancy = sim.to(dtype), LEVELS[torch.randint(len(LEVELS), (120, 1700))]
    for some, labels in ((sim, relevancy), (sim.T, relevancy.T)):
        precision, gain = by_formulas(some.double().numpy(), labels.numpy())
        assert mir.mean_average_precision(some, labels) == pytest.approx(precision, rel=1e-12)
        assert mir.ndcg(some, labels) == pytest.approx(gain, rel=1e-12)


def test_class_numbers_of_any_size():
    """Relevancy is of which classes are the same: a number, which a file may have up to 2^31, is no width of a matrix."""
    kinds = [(0, frozenset({1, 2})), (2**31 - 1, frozenset({2})), (0, frozenset())]
    far = [(verb, frozenset(2**31 - n for n in nouns)) for verb, nouns in kinds]
    assert torch.equal(kinds_relevancy(far), kinds_relevancy(kinds))


def test_ties_count_first_to_last_in_one_metric_and_last_to_first_in_the_other():
    sim, relevancy = torch.tensor([[-0.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert mir.mean_average_precision(sim, relevancy) == 1
    assert mir.ndcg(sim, relevancy) == 0


def test_a_number_of_threads_changes_nothing():
    sim, relevancy = torch.randn(200, 3000).round(decimals=1), LEVELS[torch.randint(len(LEVELS), (200, 3000))]
    before, threads = mir.per_row(sim, relevancy), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        after = mir.per_row(sim, relevancy)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_needs_little_memory():
    """Beside its inputs, of 48 MB here. NumPy's arrays are traced, torch's small ones are not."""
    sim, relevancy = torch.randn(3000, 2000), LEVELS[torch.randint(len(LEVELS), (3000, 2000))]
    tracemalloc.start()
    try:
        mir.evaluate(sim, relevancy)
        assert tracemalloc.get_traced_memory()[1] < 12e6 * torch.get_num_threads()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("side", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_changes_nothing(side):
    sim, relevancy = torch.randn(300, 900).round(decimals=1), LEVELS[torch.randint(len(LEVELS), (300, 900))]
    for scores in (sim, sim.half(), sim.bfloat16(), sim.double()):
        here, there = mir.per_row(scores, relevancy), mir.per_row(scores.to(side), relevancy.to(side))
        for one, other in zip(here, there, strict=True):
            assert other.device.type == side
            torch.testing.assert_close(one, other.cpu(), rtol=1e-12, atol=0, equal_nan=True)


def test_labels_that_leave_nothing_to_measure_are_told():
    sim = torch.randn(4, 3)
    result = mir.report(sim, torch.ones(4, 3))
    assert all(math.isnan(value) for value in result.metrics.values())
    assert "mAP_v2t is not defined: every caption is as relevant as any other: any order gets 100 %" in result.notes
    half = mir.report(sim, torch.full((4, 3), 0.5))
    assert "mAP_t2v is not defined: no caption has a clip of relevancy 1" in half.notes
    assert "nDCG_t2v is not defined: every clip is as relevant as any other: any order gets 100 %" in half.notes
    assert half.counts["excluded_t2v"] == 3
    none = mir.report(sim, torch.zeros(4, 3))
    assert "nDCG_v2t is not defined: no clip has a caption of a relevancy above 0" in none.notes
    one = mir.report(sim[:, :1], torch.tensor([[1.0], [0.0], [0.5], [0.0]]))
    assert "nDCG_v2t is not defined: there is one caption only: any order gets 100 %" in one.notes
    assert math.isfinite(one.metrics["nDCG_t2v"]) and math.isnan(one.metrics["nDCG"])


def test_queries_that_cannot_fail_and_equal_similarities_are_told():
    relevancy = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    result = mir.report(torch.zeros(3, 2), relevancy)
    assert "mAP_v2t: 1 of 3 clips get 100 % whatever the similarities are" in result.notes
    assert any("all similarities are equal" in note for note in result.notes)
    assert result.counts["excluded_v2t"] == 1
    assert mir.report(torch.randn(3, 2), torch.eye(3, 2)).notes == ()


def test_rows_of_a_large_matrix_are_those_of_its_parts():
    """2.4 million elements, more than are sorted at once."""
    sim, relevancy = torch.randn(300, 8000).round(decimals=1), LEVELS[torch.randint(len(LEVELS), (300, 8000))]
    parts = [mir.per_row(sim[rows], relevancy[rows]) for rows in (slice(100), slice(100, 300))]
    for whole, *some in zip(mir.per_row(sim, relevancy), *parts, strict=True):
        torch.testing.assert_close(whole, torch.cat(some), rtol=1e-12, atol=0, equal_nan=True)


def test_evaluate_names_the_directions():
    sim, relevancy = torch.randn(12, 8), LEVELS[torch.randint(len(LEVELS), (12, 8))]
    relevancy[0, 0] = 1
    metrics = mir.evaluate(sim, relevancy)
    assert metrics["mAP_v2t"] == pytest.approx(100 * mir.mean_average_precision(sim, relevancy))
    assert metrics["mAP_t2v"] == pytest.approx(100 * mir.mean_average_precision(sim.T, relevancy.T))
    assert metrics["nDCG_t2v"] == pytest.approx(100 * mir.ndcg(sim.T, relevancy.T))
    assert metrics["mAP"] == pytest.approx((metrics["mAP_v2t"] + metrics["mAP_t2v"]) / 2)
    assert metrics["excluded_v2t"] == int((relevancy != 1).all(1).sum())
    assert metrics["excluded_t2v"] == int((relevancy != 1).all(0).sum())


def test_a_perfect_order_gets_everything_but_what_grading_costs():
    relevancy = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 1.0]])
    assert mir.mean_average_precision(relevancy, relevancy) == 1
    assert mir.ndcg(relevancy, relevancy) == 1


def test_precision_accumulates_graded_relevancies():
    # The hit comes second, after a relevancy of 0.5: (0.5 + 1) / 2, where a binary precision would be 1 / 2.
    assert mir.mean_average_precision(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 1.0]])) == 0.75


def test_ndcg_looks_no_further_than_the_relevant_count():
    assert mir.ndcg(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 1.0]])) == 0


def test_rows_without_a_hit_are_left_out():
    sim = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    relevancy = torch.tensor([[0.5, 1.0], [0.5, 0.5]])
    assert mir.mean_average_precision(sim, relevancy) == 0.75
    assert mir.per_row(sim, relevancy)[0].isnan().tolist() == [False, True]
    assert math.isnan(mir.mean_average_precision(sim, torch.full((2, 2), 0.5)))
    assert math.isnan(mir.ndcg(sim, torch.zeros(2, 2)))


def test_arrays_infinities_strides_and_gradients():
    sim = torch.randn(9, 14)
    sim[0, 3], sim[1, 4] = math.inf, -math.inf
    relevancy = LEVELS[torch.randint(len(LEVELS), (9, 14))]
    relevancy[0, 0] = 1
    expected = by_loop(sim, relevancy)[0]
    assert mir.mean_average_precision(sim.numpy(), relevancy.numpy()) == pytest.approx(expected)
    assert mir.mean_average_precision(sim.T.contiguous().T.requires_grad_(), relevancy) == pytest.approx(expected)


@pytest.mark.parametrize(
    "sim, relevancy, error, message",
    [
        (torch.tensor([[0.0, math.nan]]), torch.ones(1, 2), ValueError, "sim: 1 NaN, the first at row 0, column 1"),
        (torch.zeros(2, 3), torch.ones(3, 2), ValueError, r"one shape, not empty, got \[2, 3\] and \[3, 2\]"),
        (torch.zeros(0, 3), torch.ones(0, 3), ValueError, "not empty"),
        (torch.zeros(3), torch.ones(3), ValueError, "two matrices"),
        (
            torch.zeros(1, 2),
            torch.tensor([[0.5, 1.5]]),
            ValueError,
            "relevancy: expected values from 0 to 1, got 0.5 to 1.5",
        ),
        (torch.zeros(1, 2), torch.tensor([[0.5, math.nan]]), ValueError, "relevancy: 1 NaN"),
        (torch.zeros(1, 2), torch.ones(1, 2).half(), TypeError, "relevancy: expected float32 or float64"),
        (torch.zeros(1, 2).long(), torch.ones(1, 2), TypeError, "sim: expected floating point, got torch.int64"),
    ],
)
def test_bad_input(sim, relevancy, error, message):
    with pytest.raises(error, match=message):
        mir.evaluate(sim, relevancy)


@pytest.mark.skipif("EVAAT_FAST_EK100" not in os.environ, reason="EVAAT_FAST_EK100 names no folder with the annotations")
def test_real_annotations_give_the_published_numbers():
    from pathlib import Path

    folder = Path(os.environ["EVAAT_FAST_EK100"])
    table = ek100.read(folder, "test")
    rows = ek100.captions(folder, "test", table)
    assert (len(table), len(rows)) == (9668, 3842)
    kinds, index = kinds_of(table)
    relevancy = kinds_relevancy(kinds)[index][:, index[rows]]
    assert len(relevancy.unique()) == 18
    assert (relevancy > 0).double().mean().item() == pytest.approx(0.114, abs=0.0005)
    hits = (relevancy == 1).sum(1)
    assert hits.min() == 1 and hits.double().mean().item() == pytest.approx(6.47, abs=0.005)
    sim = torch.from_numpy(np.random.default_rng(0).standard_normal(relevancy.shape, dtype=np.float32))
    metrics = mir.evaluate(sim, relevancy)
    got = [metrics[name] for name in ("mAP_v2t", "mAP_t2v", "nDCG_v2t", "nDCG_t2v")]
    assert got == pytest.approx([5.7, 5.6, 10.8, 10.9], abs=0.06)
    assert metrics["excluded_v2t"] == metrics["excluded_t2v"] == 0
