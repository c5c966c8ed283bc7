"""Recall@k and ranks against every order that ties allow."""

import itertools
import math
import statistics

import pytest
import torch

from evaat_fast.eval import recall


def by_orders(scores, right, ks):
    """Over all orders of the columns, a stable sort each: the shares with a right one among the first k, the mean rank."""
    ranks = []
    for columns in itertools.permutations(range(len(scores))):
        order = sorted(columns, key=lambda c: -scores[c])
        ranks.append(1 + next(i for i, c in enumerate(order) if right[c]))
    return [sum(rank <= k for rank in ranks) / len(ranks) for k in ks], sum(ranks) / len(ranks)


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_equals_the_mean_over_all_orders_of_ties(levels, dtype):
    sim, right = torch.randint(levels, (12, 6)).to(dtype), torch.rand(12, 6) < 0.4
    right[torch.arange(12), torch.randint(6, (12,))] = True
    chances, ranks = recall.per_row(sim, right, (1, 2, 5))
    for row in range(12):
        expected, rank = by_orders(sim[row].tolist(), right[row].tolist(), (1, 2, 5))
        assert chances[row].tolist() == pytest.approx(expected, abs=1e-12)
        assert ranks[row].item() == pytest.approx(rank, abs=1e-12)


def test_report_without_ties():
    sim = torch.rand(40, 30, dtype=torch.float64)
    right = torch.rand(40, 30) < 0.1
    result = recall.report(sim, right, (1, 5))
    for way, scores, labels in (("v2t", sim, right), ("t2v", sim.T, right.T)):
        order = scores.argsort(1, descending=True)
        found = labels.gather(1, order)
        ranks = [1 + row.tolist().index(True) for row in found if row.any()]
        assert result.metrics[f"R@1_{way}"] == pytest.approx(100 * statistics.mean(r <= 1 for r in ranks))
        assert result.metrics[f"R@5_{way}"] == pytest.approx(100 * statistics.mean(r <= 5 for r in ranks))
        assert result.metrics[f"MedR_{way}"] == statistics.median(ranks)
        assert result.counts[f"excluded_{way}"] == int((~labels.any(1)).sum())
    assert result.notes == ()


def test_equal_similarities_get_chance():
    result = recall.report(torch.zeros(50, 20), torch.eye(50, 20, dtype=torch.bool), (1, 10))
    assert result.metrics["R@1_v2t"] == pytest.approx(100 / 20)
    assert result.metrics["R@10_t2v"] == pytest.approx(100 * 10 / 50)
    assert result.metrics["MedR_t2v"] == 25.5


def test_tiles_and_infinities():
    sim, right = torch.randn(300, 20000).round(decimals=1), torch.zeros(300, 20000, dtype=torch.bool)
    right[:, 7] = True
    sim[5, 7], sim[6, 7] = -math.inf, math.inf
    chances, ranks = recall.per_row(sim, right, (1,))
    assert ranks[5] == 20000 and ranks[6] == 1 and chances[5] == 0 and chances[6] == 1
    torch.testing.assert_close(recall.per_row(sim[250:], right[250:], (1,))[1], ranks[250:], rtol=0, atol=0)


def test_what_says_nothing_is_told():
    result = recall.report(torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.bool))
    assert all(math.isnan(value) for value in result.metrics.values())
    assert "R@1_v2t is not defined: no clip has a right caption" in result.notes
    result = recall.report(torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool))
    assert "MedR_t2v is not defined: every clip is right" in result.notes
    result = recall.report(torch.randn(12, 3), torch.eye(12, 3, dtype=torch.bool))
    assert "R@5_v2t is not defined: there are 3 captions only" in result.notes
    assert math.isfinite(result.metrics["R@5_t2v"]) and math.isnan(result.metrics["R@5_v2t"])
    assert result.counts["excluded_v2t"] == 9


@pytest.mark.parametrize(
    "sim, right, ks, error, message",
    [
        (
            torch.zeros(2, 2),
            torch.ones(2, 2),
            (1,),
            TypeError,
            "right: expected bool, as relevancy == 1 gives",
        ),
        (torch.zeros(2, 2), torch.ones(2, 3).bool(), (1,), ValueError, r"got \[2, 2\] and \[2, 3\]"),
        (torch.full((2, 2), math.nan), torch.ones(2, 2).bool(), (1,), ValueError, "sim: 4 NaN, the first at row 0, column 0"),
        (torch.zeros(2, 2), torch.ones(2, 2).bool(), (0,), ValueError, r"ks: expected integers from 1, got \(0,\)"),
        (torch.zeros(2, 2).int(), torch.ones(2, 2).bool(), (1,), TypeError, "sim: expected floating point"),
    ],
)
def test_bad_input(sim, right, ks, error, message):
    with pytest.raises(error, match=message):
        recall.per_row(sim, right, ks)
