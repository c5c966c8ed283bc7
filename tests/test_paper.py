"""The published numbers: as they are printed, and how ours stand beside them."""

import math

import pytest

from evaat_fast.eval import paper


def test_every_row_has_its_task_s_numbers_and_a_source():
    found = [row for task in paper.TASKS for row in paper.rows(task)]
    assert len(found) == len({(r.task, r.stage, r.model, r.pretraining) for r in found}) > 35
    for row in found:
        assert set(row.metrics) == set(paper.COLUMNS[row.task]) and all(0 < v < 100 for v in row.metrics.values())
        assert row.source.startswith("arXiv 2506.14356v1, Table I")


@pytest.mark.parametrize("stage", paper.STAGES)
def test_averages_are_those_of_both_directions(stage):
    """A digit that was mistyped shows here: the averages are printed too."""
    for row in paper.rows("ek100-mir", stage):
        for name in ("mAP", "nDCG"):
            both = (row.metrics[f"{name}_v2t"] + row.metrics[f"{name}_t2v"]) / 2
            assert row.metrics[name] == pytest.approx(both, abs=0.11), (row.model, row.pretraining, name)


def test_some_rows_as_printed():
    def of(task, stage, model, pretraining):
        return next(r.metrics for r in paper.rows(task, stage) if (r.model, r.pretraining) == (model, pretraining))

    assert of("ek100-mir", "zero-shot", "EVA02-AT-L", "EgoClip+")["mAP"] == 38.9
    assert of("ek100-mir", "fine-tuned", "EVA02-AT-L + SMS", "EgoClip+")["nDCG_t2v"] == 72.3
    assert of("egomcq", "zero-shot", "EVA02-AT-B", "EgoClip") == {"inter": 94.8, "intra": 62.0}
    assert of("charades-ego", "fine-tuned", "EVA02-AT-B + SMS", "EgoClip+") == {"mAP": 38.0}
    assert of("charades-ego", "zero-shot", "AVION-L*", "EgoClip+") == {"mAP": 29.9}


def test_differences_are_spelt_out():
    protocol = {"num_frames": 4, "image_size": 224, "normalisation": "clip", "tricks": ["flip"], "frames": "ordered"}
    first, second, third = paper.differences("ek100-mir", protocol)
    assert first == "frames: ours 4, the paper's 16"
    assert second == "tricks: ours flip, the paper's none"
    assert third == "the paper does not say: normalisation (ours: clip)"
    same = {"num_frames": 16, "image_size": 224, "tricks": [], "captions": "own narration by narration_id"}
    assert paper.differences("ek100-mir", same) == []
    assert "order of frames: ours reversed, the paper's ordered" in paper.differences("egomcq", {"frames": "reversed"})


def test_the_table_has_theirs_and_ours():
    lines = paper.table("egomcq", "zero-shot", [("ours", {"inter": 12.345, "intra": math.nan})]).splitlines()
    assert len(lines) == 1 + len(paper.rows("egomcq")) + 2
    assert lines[-1].split() == ["ours", "12.35", "-"] or lines[-1].split() == ["ours", "12.34", "-"]
    assert any(line.split() == ["EVA02-AT-L", "EgoClip+", "95.9", "66.5"] for line in lines)
    assert len({len(line) for line in lines}) == 1
    assert "fine-tuned" not in paper.table("egomcq", "fine-tuned", [])


def test_bad_input():
    with pytest.raises(ValueError, match="task: expected one of ek100-mir, egomcq, charades-ego, got 'mir'"):
        paper.rows("mir")
    with pytest.raises(ValueError, match="stage: expected one of zero-shot, fine-tuned, got 'zs'"):
        paper.rows("egomcq", "zs")
