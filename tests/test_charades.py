"""Charades-Ego's mAP against a loop."""

import math

import pytest
import torch

from evaat_fast.eval import charades


def by_loop(sim, labels):
    """The average precision of each class, None where no video has it; videos without labels come last."""
    found = []
    for c in range(len(sim[0])):
        key = [-sim[v][c] if any(labels[v]) else math.inf for v in range(len(sim))]
        order = sorted(range(len(sim)), key=lambda v: key[v])
        hits, precisions = 0, []
        for rank, video in enumerate(order, 1):
            if labels[video][c]:
                hits += 1
                precisions.append(hits / rank)
        found.append(sum(precisions) / hits if hits else None)
    return found


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("softmax", [False, True], ids=["cosine", "softmax"])
def test_equals_the_loop(ties, softmax):
    sim, labels = torch.randn(60, 17, dtype=torch.float64), torch.rand(60, 17) < 0.15
    sim, labels[::7] = sim.round() if ties else sim, False
    expected = by_loop((sim.softmax(1) if softmax else sim).tolist(), labels.tolist())
    got = charades.average_precision(sim, labels, softmax)
    assert got.tolist() == pytest.approx([math.nan if x is None else x for x in expected], abs=1e-12, nan_ok=True)
    present = [x for x in expected if x is not None]
    result = charades.report(sim, labels.long(), softmax)
    assert result.metrics["mAP"] == pytest.approx(100 * sum(present) / len(present))
    assert result.counts == {
        "videos": 60,
        "unlabelled": int((~labels.any(1)).sum()),
        "classes": 17,
        "absent": 17 - len(present),
    }


def test_softmax_changes_the_order_of_videos():
    sim, labels = torch.tensor([[2.0, 0.0], [3.0, 3.0]]), torch.tensor([[True, False], [False, True]])
    assert charades.average_precision(sim, labels)[0] == 0.5
    assert charades.average_precision(sim, labels, softmax=True)[0] == 1


def test_absent_classes_are_left_out_and_told():
    labels = torch.zeros(5, 3, dtype=torch.bool)
    labels[0, 1] = labels[3, 2] = True
    result = charades.report(torch.randn(5, 3), labels)
    assert math.isfinite(result.metrics["mAP"]) and result.counts["absent"] == 1
    assert result.notes == ("1 of 3 classes are in no video: mAP is over the other 2",)


def test_a_video_without_labels_ranks_last_whatever_its_score():
    sim, labels = torch.tensor([[9.0], [1.0]]), torch.tensor([[False], [True]])
    assert charades.average_precision(sim, labels).tolist() == [1]
    assert charades.average_precision(sim.bfloat16(), labels, softmax=True).tolist() == [1]


def test_labels_that_leave_nothing_to_measure_are_told():
    none = charades.report(torch.randn(3, 2), torch.zeros(3, 2, dtype=torch.bool))
    assert math.isnan(none.metrics["mAP"]) and none.notes == ("mAP is not defined: no video has a label",)
    every = charades.report(torch.randn(3, 2), torch.ones(3, 2, dtype=torch.bool))
    assert math.isnan(every.metrics["mAP"]) and "every video has every class that occurs" in every.notes[0]


def test_bad_input():
    with pytest.raises(ValueError, match="labels: expected 0 and 1"):
        charades.report(torch.randn(3, 2), torch.full((3, 2), 0.5))
    with pytest.raises(ValueError, match=r"one shape, got \[3, 2\] and \[2, 2\]"):
        charades.report(torch.randn(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="sim: 1 NaN"):
        charades.report(torch.tensor([[math.nan]]), torch.ones(1, 1))
