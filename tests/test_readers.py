"""Readers of the published files: what stands in each exact layout arrives, with the quirks it is known for."""

import json
import math
import pickle

import formats
import numpy as np
import pytest

pytest.importorskip("pyarrow")

from evaat_fast.data.readers import charades, egoclip, egoclip_plus, egomcq, ek100, ek100_clips


def test_ek100(tmp_path):
    table = ek100.read(formats.ek100(tmp_path), "test")
    assert (table.dataset, table.split, len(table)) == ("ek100-mir", "test", 4)
    assert table[2]._asdict() == {
        "id": "P01_11_10",
        "video": "P01/P01_11",
        "start": 49.15,
        "stop": 50.95,
        "texts": ("take paper, fold it",),
        "verbs": (0,),
        "nouns": (12, 49),
        "labels": (),
    }
    assert table[3].start == 3723 and table[3].stop == 3840 and table[3].nouns == ()
    assert ek100.captions(tmp_path, "test", table).tolist() == [0, 3, 2]  # by id, whatever the text says
    formats.ek100(tmp_path, "train")
    assert ek100.captions(tmp_path, "train", ek100.read(tmp_path, "train")).tolist() == [1, 0]


def test_an_empty_narration_is_left_to_the_check(tmp_path):
    """Its clip can still be shown for another's text: `evaat_fast.data.check` counts it, and training refuses it."""
    table = ek100.read(formats.ek100(tmp_path, clips=formats.EK100.replace("take plate,", " ,")), "test")
    assert len(table) == 4 and table[0].texts == ("",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["relevancy/", ""])
def test_ek100_relevancy(tmp_path, protocol, place):
    table = ek100.read(formats.ek100(tmp_path), "test")
    rows = ek100.captions(tmp_path, "test", table)
    assert ek100.check_relevancy(tmp_path, "test", table, rows) is None
    one = [[1, 0, 0.5], [0.5, 0, 0], [0.5, 0, 1], [0, 1, 0]]
    name = f"{place}caption_relevancy_EPIC_100_retrieval_test.pkl"
    formats.write(tmp_path, name, pickle.dumps(np.array(one), protocol=protocol))
    found = ek100.check_relevancy(tmp_path, "test", table, rows)
    assert found.differing == 0 and found.first is None and found.matrix.tolist() == one and found.cells == 12
    assert "agrees with the closed form in all of 12 cells" in str(found)
    one[1][2] = one[3][0] = 1 / 3
    formats.write(tmp_path, name, pickle.dumps(np.array(one, order="F"), protocol=protocol))
    found = ek100.check_relevancy(tmp_path, "test", table, rows)
    assert found.differing == 2 and found.first == (1, 2) and found.worst == pytest.approx(1 / 3)
    assert "differs from the closed form in 2 of 12 cells, first at clip 1, caption 2, by 0.333" in str(found)


@pytest.mark.parametrize(
    "matrix, message",
    [
        (np.zeros((4, 2)), r"expected floats \[4, 3\], a row a clip and a column a caption, got float64 \[4, 2\]"),
        (np.zeros((4, 3), int), r"expected floats \[4, 3\].* got int64"),
        ([[1.0]], "expected floats .* got list"),
        (np.full((4, 3), 2.0), "clip 0, caption 0: expected a number from 0 to 1, got 2.0"),
        (np.full((4, 3), np.nan), "clip 0, caption 0: expected a number from 0 to 1, got nan"),
    ],
)
def test_ek100_relevancy_of_something_else(tmp_path, matrix, message):
    table = ek100.read(formats.ek100(tmp_path), "test")
    formats.write(tmp_path, "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl", matrix)
    with pytest.raises(ValueError, match=message):
        ek100.check_relevancy(tmp_path, "test", table, ek100.captions(tmp_path, "test", table))


def test_ek100_clips(tmp_path, caplog):
    rows = formats.EK100.replace("P01_11", "P01_111")
    formats.write(tmp_path, "epic-kitchens-100-annotations/EPIC_100_validation.csv", rows)
    for name in ("P01/P01_111_0.mp4", "P01/P01_111_1.mp4", "P02/P01_111_10.mp4", "P01/notes.txt"):
        formats.write(tmp_path, f"clips/{name}", b"x")
    table = ek100_clips.read(tmp_path, "test")
    assert [c.id for c in table] == ["P01_111_0", "P01_111_1"] and table[0].video == "P01/P01_111_0"
    assert math.isnan(table[0].start) and math.isnan(table[0].stop) and table[1].texts == ("put down plate",)
    assert (table.metadata["outside"], table.metadata["missing"]) == (1, 1)
    assert "1 of 3 clips of the extension have no file, first clips/P01/P01_111_10.mp4" in caplog.text
    with pytest.raises(ValueError, match="none of its 4 clips has a file in"):
        other = formats.write(tmp_path, "other.csv", formats.EK100)
        ek100_clips.read(tmp_path, "test", annotations=other)


def test_egoclip(tmp_path):
    table = egoclip.read(formats.write(tmp_path, "egoclip.csv", formats.EGOCLIP))
    assert (table.dataset, table.split, len(table)) == ("egoclip", "train", 3)
    assert table[0]._asdict() == {
        "id": "0",
        "video": "001e3e4e-2743-47fc-8564-d5efd11f9e90",
        "start": 2.967651,
        "stop": 3.721266,
        "texts": ("#C C picks a bag of clothes from the floor",),
        "verbs": (93,),
        "nouns": (192, 115, 12),
        "labels": (),
    }
    assert (
        table[1].start == 0 and table[1].texts == ('#C C says "hm" to the "l\'eau"',) and table[1].verbs == table[1].nouns == ()
    )
    assert table[2].id == "5" and table[2].texts == ("#O Ünïcode",) and table[2].verbs == (1, 2)
    assert table.metadata["moved"] == 1 and table.metadata["beyond"] == 0 and table.metadata["skipped"] == {}


def test_egoclip_counts_what_it_leaves_out(tmp_path, caplog):
    good = formats.EGOCLIP.splitlines()
    bad = [
        good[1].replace("0\t", "10\t", 1) + "\tmore",
        good[1].replace("0\t", "11\t", 1).replace("[93]", "nan"),
        good[1].replace("0\t", "12\t", 1).replace("3.721266", "2.5"),
        good[1].replace("0\t", "13\t", 1).replace("#C C picks a bag of clothes from the floor", " "),
    ]
    path = formats.write(tmp_path, "egoclip.csv", "\n".join([*good[:2], *bad, *good[2:]]) + "\n")
    message = "4 of 7 rows cannot be read .skip = 0.001 of all may be left out.*"
    message += "1 of lines of another number of fields than the header's 11, first line 3 of 12"
    with pytest.raises(ValueError, match=message):
        egoclip.read(path)
    table = egoclip.read(path, skip=0.6)
    assert [c.id for c in table] == ["0", "1", "5"] and sum(table.metadata["skipped"].values()) == 4
    assert "4 of 7 rows are left out" in caplog.text
    assert "tag_verb: expected a list of class numbers as [3, 14], first line 4, got 'nan'" in caplog.text
    assert "clip_end: expected a time from clip_start on, first line 5, got '2.5'" in caplog.text
    assert "clip_text: expected a text, first line 6" in caplog.text


def test_egoclip_in_another_unit_of_time(tmp_path):
    rows = [line.split("\t") for line in formats.EGOCLIP.splitlines()]
    for row in rows[1:]:
        row[6:8] = [str(1000 * float(t)) for t in row[6:8]]
    path = formats.write(tmp_path, "egoclip.csv", "\n".join("\t".join(row) for row in rows) + "\n")
    with pytest.raises(
        ValueError, match="2 of 3 clips start after their video ends, first clip 0 starts at 2967.65 of 128.033"
    ):
        egoclip.read(path)


@pytest.mark.parametrize("protocol", range(6))
def test_egoclip_plus(tmp_path, protocol):
    rephrased = [(u, s, e, [t.strip(), f"{t.strip()} again", f"{t.strip()} anew"]) for u, s, e, t in formats.LAVILA]
    lists = {
        "rephraser": rephrased,
        "narrator": formats.narrated(4),
        "val": formats.LAVILA,
        "uncovered": formats.narrated(2, 5),
    }
    for kind, rows in lists.items():
        formats.write(tmp_path, egoclip_plus.FILES[kind], pickle.dumps(rows, protocol=protocol))
    table = egoclip_plus.read(tmp_path)
    assert [c.id for c in table] == [*(f"rephraser/{i}" for i in (1, 2, 3)), *(f"narrator/{i}" for i in (1, 2, 3, 4))]
    assert table[1]._asdict() == {
        "id": "rephraser/2",
        "video": "001e3e4e",
        "start": 7.0,
        "stop": 8.25,
        "texts": ("#O Ünïcode", "#O Ünïcode again", "#O Ünïcode anew"),
        "verbs": (),
        "nouns": (),
        "labels": (),
    }
    assert table[6].texts == tuple(formats.narrated(4)[3][3]) and table[6].video == "uid-1"
    assert table.metadata["rows"] == {egoclip_plus.FILES["rephraser"]: 3, egoclip_plus.FILES["narrator"]: 4}
    val = egoclip_plus.read(tmp_path, "val")
    assert val.split == "val" and val[2].texts == ("#C C stands still",) and val[2].id == "val/3"
    assert len(egoclip_plus.read(tmp_path, kinds=["uncovered"])[0].texts) == 5
    assert len(egoclip_plus.read(tmp_path / egoclip_plus.FILES["uncovered"])) == 2


def test_egoclip_plus_leaves_out_and_counts(tmp_path, caplog):
    rows = [
        *formats.narrated(6),
        ("uid", 1.0, float("nan"), "text"),
        ("uid", 2.0, 1.0, "text"),
        ("uid", 1.0, 2.0, ["", " "]),
        ("uid", 1.0, 2.0, ["", "said"]),
        ("uid", "1.0", 2.0, "text"),
        ("uid", 1.0, 2.0),
        {"uid": 1},
        (None, 1.0, 2.0, "text"),
        ("uid", 1.0, 2.0, []),
        ("uid", 1.0, 2.0, [3]),
    ]
    path = formats.write(tmp_path, "mine.pkl", rows)
    with pytest.raises(ValueError, match=r"mine.pkl: 9 of 16 rows cannot be read .*first row 7: got 1 to nan"):
        egoclip_plus.read(path)
    table = egoclip_plus.read(path, skip=0.6)
    assert [c.id for c in table] == [*(f"mine/{i}" for i in range(1, 7)), "mine/10"]
    assert table[6].texts == ("said",) and table.metadata["empty"] == 1
    assert sum(table.metadata["skipped"]["mine.pkl"].values()) == 9
    assert "rows whose start is no number, first row 11: got '1.0'" in caplog.text


def test_egoclip_plus_in_another_unit_of_time(tmp_path):
    rows = [(u, 1000 * s, 1000 * e, t, n) for u, s, e, t, n in formats.narrated(8)]
    with pytest.raises(
        ValueError, match="expected times in seconds, got what looks like milliseconds or frame numbers: half of"
    ):
        egoclip_plus.read(formats.write(tmp_path, "mine.pkl", rows))


def test_many_rows_come_in_batches(tmp_path):
    """More than what is read at a time, of which rows in the middle are left out."""
    rows = [(f"uid-{i // 1000}", float(i), i + 1.0, f"text {i}") for i in range(40_000)]
    rows[20_000] = ("uid", 1.0, 0.5, "text")
    rows[20_005] = ("uid", 1.0, 1.5, "\ud800")
    table = egoclip_plus.read(formats.write(tmp_path, "mine.pkl", pickle.dumps(rows, protocol=2)))
    assert len(table) == 39_998 and table[39_997].id == "mine/40000" and table[39_997].texts == ("text 39999",)
    assert [table[i].id for i in (19_999, 20_000, 20_003, 20_004)] == ["mine/20000", "mine/20002", "mine/20005", "mine/20007"]
    assert table.metadata["skipped"]["mine.pkl"] == {"clips that end before they start": 1, "texts that are not UTF-8": 1}


def test_egomcq(tmp_path):
    found = egomcq.read(formats.write(tmp_path, "egomcq.json", formats.questions()))
    assert len(found) == 6 and found.texts[3] == "#C C query 3" and found.answers.tolist() == [0, 1, 2, 3, 4, 0]
    assert found.types.tolist() == [egomcq.INTER, egomcq.INTRA] * 3 and found.choices.shape == (6, 5)
    clip = found.clips[int(found.choices[3, 4])]
    assert (clip.video, clip.start, clip.stop, clip.texts) == ("same", 43.0, 44.0, ("#C C 4",))
    inter = [found.clips[int(row)].video for row in found.choices[2]]
    assert inter == [f"video-{(2 + i) % 7}" for i in range(5)]


def test_egomcq_shares_clips(tmp_path):
    data = {"0": formats.question(0, 2), "1": formats.question(0, 2)}
    data["1"]["choices"]["3"]["clip_text"] = "#C C in other words"
    data["1"]["choices"]["0"]["clip_start"] = -0.5
    found = egomcq.read(formats.write(tmp_path, "egomcq.json", data))
    assert len(found.clips) == 5 and found.choices[0].tolist() == found.choices[1].tolist()
    assert found.clips[3].texts == ("#C C 3", "#C C in other words")


def test_charades(tmp_path):
    folder = formats.charades(tmp_path)
    table = charades.read(folder, "test")
    assert [c.id for c in table] == ["005BUEGO", "0A8ZTEGO", "ZZZZZEGO"] and table[0].video == "005BUEGO"
    assert [c.labels for c in table] == [(92, 147), (), (0, 156)] and table[0].texts == ("A person, at a table.",)
    assert math.isnan(table[0].start) and table.metadata["reversed"] == 1
    assert charades.classes(folder)[156] == "Doing thing 156"


def test_charades_clips(tmp_path, caplog):
    folder = formats.charades(tmp_path, "train", formats.CHARADES.replace("19.00 3.00", "3.00 19.00"))
    clips = charades.read(folder, "train")
    assert [c.id for c in clips] == ["005BUEGO/0", "005BUEGO/1", "ZZZZZEGO/0", "ZZZZZEGO/1", "ZZZZZEGO/2"]
    assert clips[1]._asdict() | {"texts": None} == clips[1]._asdict() | {
        "texts": None,
        "start": 0.0,
        "stop": 12.6,
        "labels": (147,),
    }
    assert clips[1].texts == ("Doing thing 147",)
    formats.write(folder, "metadata_train.csv", formats.CHARADES_TRAIN)
    egovlp = charades.read(folder, "train")
    assert [tuple(c) for c in egovlp] == [tuple(c) for c in clips][:2] and egovlp.metadata["source"] == ["metadata_train.csv"]
    rows = [("005BUEGO", 11.9, 21.2, "Doing thing 92"), ("005BUEGO", 0, 12.6, "Something else")]
    formats.write(folder, "metadata_filtered_train.pkl", rows)
    lavila = charades.read(folder, "train")
    assert tuple(lavila[0]) == tuple(clips[0]) and lavila[1].labels == () and lavila[1].texts == ("Something else",)
    assert charades.read(folder, "train", source="egovlp").metadata["source"] == ["metadata_train.csv"]
    with pytest.raises(
        ValueError, match="1 of 3 rows cannot be read .* clips that end before they start, first row 3: got 5 to 4"
    ):
        charades.read(formats.write(folder, "metadata_filtered_train.pkl", [*rows, ("a", 5, 4.0, "b")]).parent, "train")


def test_the_kitchen_in_every_format():
    """The same clips, whatever file they stand in."""
    made = formats.kitchen()
    for split in ("train", "test"):
        clips = ek100.read(made.ek100, split)
        rows = ek100.captions(made.ek100, split, clips)
        assert ek100.check_relevancy(made.ek100, split, clips, rows).differing == 0
        cut = ek100_clips.read(made.ek100_clips, split)
        assert [c.texts for c in cut] == [c.texts for c in clips]
    train, test = (ek100.read(made.ek100, split) for split in ("train", "test"))
    tagged = egoclip.read(made.egoclip)
    assert [(c.start, c.stop, c.texts[0][5:], c.verbs) for c in tagged] == [
        (c.start, c.stop, c.texts[0], c.verbs) for c in train
    ]
    plus = egoclip_plus.read(made.ego4d)
    assert len(plus) == 96 and [len(c.texts) for c in plus] == 48 * [3] + 48 * [10]
    assert [(c.video, c.start, c.stop) for c in plus] == 2 * [(c.video, c.start, c.stop) for c in tagged]
    mcq = egomcq.read(made.egomcq)
    for text, choices, answer in zip(mcq.texts, mcq.choices, mcq.answers, strict=True):
        assert [mcq.clips[int(row)].texts == (text,) for row in choices] == [i == answer for i in range(5)]
    assert sorted(set(mcq.types.tolist())) == [1, 2] and len(mcq) == 32
    names = charades.classes(made.charades)
    lists = [charades.read(made.charades, "train", source=name) for name in ("lavila", "egovlp", "actions")]
    assert all([tuple(c) for c in table] == [tuple(c) for c in lists[0]] for table in lists)
    assert all(c.texts == (names[c.labels[0]],) for c in lists[0]) and len(lists[0]) == 48
    videos = charades.read(made.charades, "test")
    assert sum(len(c.labels) for c in videos) == len(test) == len(charades.read(made.charades, "val"))


def test_questions_of_swapped_types_are_refused(tmp_path):
    data = formats.questions()
    for entry in data.values():
        entry["types"] = 3 - entry["types"]
    message = "types: expected 1 for candidates of other videos and 2 for candidates of one; in 6 of 6 questions it is not so"
    with pytest.raises(ValueError, match=message):
        egomcq.read(formats.write(tmp_path, "egomcq.json", json.dumps(data)))
