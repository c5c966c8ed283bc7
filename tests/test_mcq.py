"""EgoMCQ: types by their right names, ties, and what scores are made of."""

import math

import pytest
import torch

from evaat_fast.eval import mcq


def test_type_1_is_inter_and_type_2_intra():
    sim = torch.eye(5)[torch.tensor([0, 1, 2, 3])]
    result = mcq.report(sim, torch.tensor([0, 1, 0, 3]), torch.tensor([1, 1, 2, 2]))
    assert result.metrics == {"inter": 100, "intra": 50}
    assert (result.counts["inter_questions"], result.counts["intra_questions"], result.counts["questions"]) == (2, 2, 4)
    assert result.notes == ()


def test_equals_a_loop():
    sim, answers, types = torch.randn(200, 5), torch.randint(5, (200,)), torch.randint(1, 3, (200,))
    result = mcq.report(sim.bfloat16(), answers, types)
    for number, name in ((1, "inter"), (2, "intra")):
        mine = [i for i in range(200) if types[i] == number]
        right = sum(sim[i].bfloat16().tolist().index(sim[i].bfloat16().max()) == answers[i] for i in mine)
        assert result.metrics[name] == pytest.approx(100 * right / len(mine))


def test_ties_go_to_the_first_and_are_counted():
    result = mcq.report(torch.zeros(3, 5), torch.tensor([0, 1, 0]), torch.tensor([1, 1, 2]))
    assert result.metrics == {"inter": 50, "intra": 100}
    assert result.counts["tied"] == 3
    assert result.notes == ("in 3 of 3 questions several clips have the best score; the first of them counts",)


def test_a_missing_type_is_told():
    result = mcq.report(torch.randn(3, 5), torch.zeros(3).long(), torch.ones(3).long())
    assert math.isnan(result.metrics["intra"]) and "intra is not defined: there is no question of type 2" in result.notes
    assert math.isnan(mcq.report(torch.randn(3, 1), torch.zeros(3).long(), torch.ones(3).long()).metrics["inter"])


def test_normalising_decides_who_wins():
    text, clips = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.1], [9.0, 9.0]]])
    assert mcq.scores(text, clips).argmax() == 0
    assert mcq.scores(text, clips, normalize=False).argmax() == 1
    torch.testing.assert_close(mcq.scores(text, clips)[0, 1], torch.tensor(0.5).sqrt())
    assert mcq.scores(text.bfloat16(), clips.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "answers, types, error, message",
    [
        ([0, 5], [1, 2], ValueError, "answers: expected 0 to 4, got 5"),
        ([0, -1], [1, 2], ValueError, "answers: expected 0 to 4, got -1"),
        ([0, 1], [1, 0], ValueError, r"types: expected 1 \(inter\) or 2 \(intra\), got 0"),
        ([0], [1, 2], ValueError, r"answers: expected \[2\], as many as sim has rows, got \[1\]"),
        ([0.0, 1.0], [1, 2], TypeError, "answers: expected integers, got torch.float32"),
    ],
)
def test_bad_input(answers, types, error, message):
    with pytest.raises(error, match=message):
        mcq.report(torch.randn(2, 5), torch.tensor(answers), torch.tensor(types))
    with pytest.raises(ValueError, match="texts, clips: expected"):
        mcq.scores(torch.zeros(2, 3), torch.zeros(2, 5, 4))
