"""The published files in miniature, in their exact layouts: written by each test, so that it can spoil them."""

import csv
import functools
import io
import json
import pickle

from corpus import corpus

EK100 = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,"
    "verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
    "P01_11_0,P01,P01_11,00:00:00.560,00:00:00.00,00:00:01.89,1,113,take plate,take,0,plate,2,['plate'],[2]\n"
    "P01_11_1,P01,P01_11,00:00:01.700,00:00:01.56,00:00:02.45,93,147,put down plate,put-down,1,plate,2,['plate'],[2]\n"
    'P01_11_10,P01,P01_11,00:00:48.500,00:00:49.15,00:00:50.95,2949,3057,"take paper, fold it",take,0,paper,49,'
    "\"['paper', 'bag:plastic']\",\"[49, 12]\"\n"
    "P22_04_144,P22,P22_04,01:02:03.456,01:02:03.00,01:03:60.00,7,9,cut slice,cut,7,slice,82,['slice'],[]\n"
)
# As published, the text of a row may be another's: its id decides.
EK100_SENTENCES = "narration_id,narration\nP01_11_0,take plate\nP22_04_144,wash cooker\nP01_11_10,cut slice\n"
EK100_TRAIN_SENTENCES = (
    "narration_id,narration,verb,verb_classes,nouns,noun_classes\n"
    "P01_11_1,put down plate,put-down,1,['plate'],[2]\nP01_11_0,take plate,take,0,['plate'],[2]\n"
)
EGOCLIP = (
    "clip_idx\tvideo_uid\tvideo_dur\tnarration_source\tnarration_ind\tnarration_time\tclip_start\tclip_end\tclip_text\ttag_verb\t"
    "tag_noun\n"
    "0\t001e3e4e-2743-47fc-8564-d5efd11f9e90\t128.033333\tnarration_pass_1\t0\t3.3445\t2.967651\t3.721266\t"
    "#C C picks a bag of clothes from the floor\t[93]\t[192, 115, 12]\n"
    "1\t001e3e4e-2743-47fc-8564-d5efd11f9e90\t128.033333\tnarration_pass_1\t1\t0.1\t-0.2\t0.4\t"
    '#C C says "hm" to the "l\'eau"\t[]\t[]\n'
    "5\t002ad105-bd9a-4858-953e-54e88dc7587e\t900.0\tnarration_pass_2\t0\t880\t879.5\t880.25\t#O Ünïcode\t[1, 2]\t[581]\n"
)
CHARADES = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    '005BUEGO,PG7Z,Kitchen,6,7,Yes,"A person, at a table.",cup,"Eats; looks",c092 11.90 21.20;c147 0.00 12.60,31.50\n'
    "0A8ZTEGO,PG7Z,Bedroom,6,7,Yes,A person sleeps.,,,,20.10\n"
    "ZZZZZEGO,AAAA,Bedroom,,,No,A person wakes.,,,c156 19.00 3.00;c000 1.00 4.50;c000 5.00 6.00,24.83\n"
)
CHARADES_CLASSES = "".join(f"c{i:03d} Doing thing {i}\n" for i in range(157))
CHARADES_TRAIN = (
    "id\tcls\tt_start\tt_end\tnarration\n005BUEGO\t92\t11.9\t21.2\tDoing thing 92\n005BUEGO\t147\t0.0\t12.6\tDoing thing 147\n"
)
LAVILA = [
    ("001e3e4e", 2.967651, 3.721266, "#C C picks a bag"),
    ("001e3e4e", 7, 8.25, "#O Ünïcode"),
    ("002ad105", 0.0, 0.0, " #C C stands still "),
]


def narrated(count=3, texts=10):
    return [
        (
            f"uid-{i % 2}",
            1.5 * i,
            1.5 * i + 1,
            [f"#C C does thing {i} in way {k}" for k in range(texts)],
            [0.1 * k for k in range(texts)],
        )
        for i in range(count)
    ]


def question(number, kind, answer=2):
    videos = ["same"] * 5 if kind == 2 else [f"video-{(number + i) % 7}" for i in range(5)]
    choices = {
        str(i): {
            "video_uid": video,
            "clip_start": 10.0 * i + number,
            "clip_end": 10.0 * i + number + 1,
            "clip_text": f"#C C {i}",
        }
        for i, video in enumerate(videos)
    }
    query = {"clip_text": f"#C C query {number}", "tag_verb": "[3]", "tag_noun": "[1, 2]"}
    return {"answer": answer, "query": query, "choices": choices, "types": kind}


def questions(count=6):
    return {str(i): question(i, 1 + i % 2, i % 5) for i in range(count)}


def write(folder, name, content):
    """A file of text, bytes, or what pickle or JSON makes of an object; returns its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".json") and not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    if not isinstance(content, (str, bytes)):
        content = pickle.dumps(content, protocol=4)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ek100(folder, split="test", clips=EK100, sentences=None):
    sentences = sentences or (EK100_SENTENCES if split == "test" else EK100_TRAIN_SENTENCES)
    write(folder, f"EPIC_100_retrieval_{split}.csv", clips)
    write(folder, f"EPIC_100_retrieval_{split}_sentence.csv", sentences)
    return folder


def charades(folder, split="test", rows=CHARADES):
    write(folder, f"CharadesEgo_v1_{split}_only1st.csv", rows)
    write(folder, "Charades_v1_classes.txt", CHARADES_CLASSES)
    return folder


def reordered(text, delimiter=","):
    """The same table with its columns from last to first, one more among them."""
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    out = io.StringIO(newline="")
    if delimiter == "\t":
        out.write("".join("\t".join([*row[:0:-1], "more" if i == 0 else "x", row[0]]) + "\n" for i, row in enumerate(rows)))
        return out.getvalue()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([*row[:0:-1], "more" if i == 0 else "x", row[0]] for i, row in enumerate(rows))
    return out.getvalue()


@functools.cache
def kitchen():
    """The small corpus in all formats, made once per process."""
    from evaat_fast.data.kitchen_formats import write_all

    return write_all(corpus())
