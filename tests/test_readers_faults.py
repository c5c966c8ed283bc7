"""Spoiled metadata: an error of one line that names file, line and column, or the same table; never fewer rows in silence."""

import csv
import io
import json
import pickle
import random

import formats
import pytest

pytest.importorskip("pyarrow")

from evaat_fast.data.readers import charades, egoclip, egoclip_plus, egomcq, ek100


def rows_of(table):
    return [repr(clip) for clip in table]


def read_ek100(folder):
    table = ek100.read(folder, "test")
    return rows_of(table), ek100.captions(folder, "test", table).tolist(), 0


def read_egoclip(folder):
    table = egoclip.read(folder / "egoclip.csv", skip=0.5)
    return rows_of(table), None, sum(table.metadata["skipped"].values())


def read_charades(folder):
    return rows_of(charades.read(folder, "test")), None, 0


def read_clips(folder):
    table = charades.read(folder, "train", source="egovlp")
    return rows_of(table), None, sum(table.metadata["skipped"].values())


def read_mcq(folder):
    found = egomcq.read(folder / "egomcq.json")
    return rows_of(found.clips), (found.texts, found.choices.tolist(), found.answers.tolist(), found.types.tolist()), 0


def read_plus(folder):
    table = egoclip_plus.read(folder / "mine.pkl", skip=0.5)
    return rows_of(table), None, sum(table.metadata["skipped"]["mine.pkl"].values())


TEXT = {
    "ek100": ("EPIC_100_retrieval_test.csv", formats.EK100, ",", read_ek100),
    "sentences": ("EPIC_100_retrieval_test_sentence.csv", formats.EK100_SENTENCES, ",", read_ek100),
    "egoclip": ("egoclip.csv", formats.EGOCLIP, "\t", read_egoclip),
    "charades": ("CharadesEgo_v1_test_only1st.csv", formats.CHARADES, ",", read_charades),
    "egovlp": ("metadata_train.csv", formats.CHARADES_TRAIN, "\t", read_clips),
}


@pytest.fixture
def folder(tmp_path):
    formats.charades(formats.ek100(tmp_path))
    formats.write(tmp_path, "egoclip.csv", formats.EGOCLIP)
    formats.write(tmp_path, "metadata_train.csv", formats.CHARADES_TRAIN)
    formats.write(tmp_path, "egomcq.json", formats.questions())
    formats.write(tmp_path, "mine.pkl", formats.narrated(6, 2))
    return tmp_path


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: b"\xef\xbb\xbf" + b, id="bom"),
        pytest.param(lambda b: b.replace(b"\n", b"\r\n"), id="crlf"),
        pytest.param(lambda b: b[:-1], id="no-last-newline"),
        pytest.param(lambda b: b + b"\n\n", id="empty-lines"),
        pytest.param(lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n")[:-2], id="all"),
    ],
)
def test_what_editors_do_changes_nothing(folder, name, change):
    file, _, _, read = TEXT[name]
    before = read(folder)
    spoil(folder, file, change)
    assert read(folder) == before


@pytest.mark.parametrize("name", TEXT)
def test_columns_are_found_by_name(folder, name):
    file, text, delimiter, read = TEXT[name]
    before = read(folder)
    formats.write(folder, file, formats.reordered(text, delimiter))
    assert read(folder) == before


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("other", [";", "|", "\t", ","])
def test_another_delimiter_is_named(folder, name, other):
    file, text, delimiter, read = TEXT[name]
    if other == delimiter:
        pytest.skip("its own")
    header, rest = text.split("\n", 1)
    path = formats.write(folder, file, header.replace(delimiter, other) + "\n" + rest.replace(delimiter, other))
    with pytest.raises(ValueError, match=f"{file}: expected the columns .*; missing: ") as caught:
        read(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", TEXT)
def test_a_missing_column_is_named(folder, name):
    file, text, _, read = TEXT[name]
    column = {
        "ek100": "verb_class",
        "sentences": "narration_id",
        "egoclip": "tag_noun",
        "charades": "actions",
        "egovlp": "cls",
    }[name]
    formats.write(folder, file, text.replace(column, "other", 1))
    with pytest.raises(ValueError, match=f"{file}: expected the columns .*; missing: {column}"):
        read(folder)
    first = text.split("\n", 1)[0]
    again = (
        first.replace("narration" if name == "sentences" else "id", column, 1) if name in ("sentences", "charades") else None
    )
    if again and again != first:
        formats.write(folder, file, text.replace(first, again, 1))
        with pytest.raises(ValueError, match=f"{file}: "):
            read(folder)


@pytest.mark.parametrize("name", TEXT)
def test_fields_that_do_not_fit_the_header(folder, name):
    file, text, delimiter, read = TEXT[name]
    lines = text.splitlines()
    more = "\n".join([*lines[:2], lines[2] + delimiter + "x", *lines[3:]]) + "\n"
    formats.write(folder, file, more)
    if name == "egoclip":
        assert read(folder)[2] == 1  # counted, as pandas did not
    else:
        with pytest.raises(ValueError, match=rf"{file}: line 3 cannot be read: expected \d+ fields, got \d+$"):
            read(folder)
    cut = text[: text.rstrip("\n").rindex(delimiter)]
    formats.write(folder, file, cut)
    with pytest.raises(ValueError, match=rf"{file}: .*cut short"):
        read(folder)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda b: b"", "expected (a header|the columns)", id="empty"),
        pytest.param(lambda b: b.split(b"\n")[0] + b"\n", "no rows", id="header"),
        pytest.param(lambda b: b.decode().encode("utf-16"), "expected text in UTF-8, got UTF-16", id="utf-16"),
        pytest.param(
            lambda b: b.replace(b"\n", b"\n\xff", 2).replace(b"\n\xff", b"\n", 1),
            "line 3 is not UTF-8 text: byte 0xff",
            id="latin",
        ),
    ],
)
def test_files_that_are_no_tables(folder, name, change, message):
    file, _, _, read = TEXT[name]
    spoil(folder, file, change)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        read(folder)


CELLS = [
    ("ek100", "00:00:49.15", "soon", r"line 4 cannot be read: start_timestamp: expected a time as HH:MM:SS.ss, got 'soon'"),
    ("ek100", "00:00:49.15", "nan", r"start_timestamp: expected a time as HH:MM:SS.ss, got 'nan'"),
    ("ek100", "00:00:49.15", "-1:00:49.15", r"start_timestamp: expected a time"),
    ("ek100", "00:00:49.15", "00:61:49.15", r"start_timestamp: expected a time"),
    ("ek100", "00:00:49.15", "49.15", r"start_timestamp: expected a time"),
    ("ek100", "00:00:50.95", "00:00:inf", r"stop_timestamp: expected a time"),
    ("ek100", "00:00:49.15", "00:00:51.15", r"line 4 .*: stop_timestamp 00:00:50.95 lies before start_timestamp 00:00:51.15"),
    ("ek100", "take plate,take,0", "take plate,take,0.5", r"verb_class: expected a class number from 0, got '0.5'"),
    ("ek100", "take plate,take,0", "take plate,take,", r"verb_class: expected a class number from 0, got ''"),
    ("ek100", "take plate,take,0", "take plate,take,99999999999999", r"verb_class: expected a class number"),
    (
        "ek100",
        "['plate'],[2]",
        "['plate'],[x]",
        r"line 2 .*all_noun_classes: expected a list of class numbers as \[3, 14\], got '\[x\]'",
    ),
    ("ek100", "['plate'],[2]", "['plate'],2", r"all_noun_classes: expected a list of class numbers"),
    ("ek100", "['plate'],[2]", "['plate'],[2", r"all_noun_classes: expected a list of class numbers"),
    ("ek100", "['plate'],[2]", "['plate'],[-2]", r"all_noun_classes: expected a list of class numbers"),
    ("ek100", "P01_11_1,", "P01_11_0,", r"line 3 .*: narration_id: 'P01_11_0' was already given in line 2; expected each once"),
    ("ek100", "\nP01_11_1,", '\n"P01_11_1,', r"line 3 cannot be read: .*"),
    ("ek100", "put down", "put\0down", r"line 3 is not UTF-8 text: byte 0x00"),
    ("sentences", "P22_04_144", "P99_04_144", r"1 narration ids are not in the clips' file, first 'P99_04_144'"),
    ("sentences", "P22_04_144", "P01_11_0", r"line 3 .*: narration_id: 'P01_11_0' was already given in line 2"),
    ("sentences", "P22_04_144", "", r"line 3 cannot be read: narration_id: expected a text, got ''"),
    ("egoclip", "\n1\t", "\n0\t", r"clip_idx: 0 was given 2 times, line 2 and line 3; expected each once"),
    ("charades", "\n0A8ZTEGO", "\n005BUEGO", r"line 3 .*: id: '005BUEGO' was already given in line 2"),
    ("charades", "c147 0.00", "c157 0.00", r"line 2 .*: actions: expected .* of classes c000 to c156, got 'c157 0.00 12.60'"),
    ("charades", "c147 0.00 12.60", "c147 0.00", r"actions: expected actions as .*, got 'c147 0.00'"),
    ("charades", "c147 0.00", "c147 nan", r"actions: expected"),
    ("charades", "c147 0.00", "x147 0.00", r"actions: expected"),
    ("charades", "31.50", "long", r"line 2 .*: length: expected a finite number, got 'long'"),
    ("egovlp", "\t92\t", "\t157\t", r"line 2 .*: cls: expected a class from 0 to 156, got '157'"),
    (
        "egovlp",
        "Doing thing 147",
        "Doing thing 14",
        r"line 3 .*: narration: expected the name of class 147, 'Doing thing 147', got",
    ),
    ("egovlp", "11.9", "inf", r"line 2 .*: t_start: expected a finite number, got 'inf'"),
]


@pytest.mark.parametrize("name, old, new, message", CELLS)
def test_a_spoiled_cell_is_named(folder, name, old, new, message):
    file, text, _, read = TEXT[name]
    assert old in text
    formats.write(folder, file, text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read(folder)
    assert str(folder / file) in str(caught.value) and "\n" not in str(caught.value)


EGOCLIP_CELLS = [
    ("2.967651", "nan", r"clip_start: expected a finite number, first line 2, got 'nan'"),
    ("2.967651", "inf", r"clip_start: expected a finite number, first line 2, got 'inf'"),
    ("2.967651", "1e999", r"clip_start: expected a finite number, first line 2, got '1e999'"),
    ("128.033333", "", r"video_dur: expected a finite number, first line 2, got ''"),
    ("3.721266", "2.721266", r"clip_end: expected a time from clip_start on, first line 2, got '2.721266'"),
    ("[93]", "93", r"tag_verb: expected a list of class numbers as \[3, 14\], first line 2, got '93'"),
    ("[192, 115, 12]", "[192, 115, x]", r"tag_noun: expected a list of class numbers"),
    ("[192, 115, 12]", "__import__('os').system('true')", r"tag_noun: expected a list of class numbers"),
    ("[192, 115, 12]", "[192, 99999999999999999999999]", r"tag_noun: expected class numbers below 2147483648"),
    ("#C C picks a bag of clothes from the floor", "", r"clip_text: expected a text, first line 2, got ''"),
    ("\n0\t", "\n0.0\t", r"clip_idx: expected a whole number, first line 2, got '0.0'"),
]


@pytest.mark.parametrize("old, new, message", EGOCLIP_CELLS)
def test_a_spoiled_cell_of_egoclip_is_named(folder, old, new, message):
    path = formats.write(folder, "egoclip.csv", formats.EGOCLIP.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"1 of 3 rows cannot be read .*{message}") as caught:
        egoclip.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(egoclip.read(path, skip=0.5)) == 2


QUESTIONS = [
    (lambda d: d["3"].pop("answer"), r"question '3': expected the key 'answer', got 'query', 'choices', 'types'"),
    (lambda d: d["3"].update(answer=5), r"question '3': answer: expected one of 0, 1, 2, 3, 4, got 5"),
    (lambda d: d["3"].update(answer=True), r"question '3': answer: expected one of"),
    (lambda d: d["3"].update(types=3), r"question '3': types: expected one of 1, 2, got 3"),
    (lambda d: d["3"]["query"].update(clip_text=" "), r"question '3': clip_text: expected a text, got ' '"),
    (lambda d: d["3"]["query"].update(clip_text="\ud800"), r"question '3': clip_text: expected a text in Unicode"),
    (lambda d: d["3"].update(query=[]), r"question '3': query: expected an object, got \[\]"),
    (
        lambda d: d["3"]["choices"].pop("4"),
        r"question '3': choices: expected the choices '0' to '4', got \['0', '1', '2', '3'\]",
    ),
    (lambda d: d["3"]["choices"]["2"].pop("video_uid"), r"question '3', choice '2': expected the key 'video_uid'"),
    (
        lambda d: d["3"]["choices"]["2"].update(clip_end=0.5),
        r"question '3', choice '2': clip_end: expected a time from clip_start, 23, on",
    ),
    (lambda d: d["3"]["choices"]["2"].update(clip_end="nan"), r"clip_end: expected a finite number of seconds, got 'nan'"),
    (lambda d: d["3"]["choices"]["2"].update(clip_end=float("nan")), r"clip_end: expected a finite number of seconds, got nan"),
    (lambda d: d["3"]["choices"]["2"].update(clip_end=None), r"clip_end: expected a finite number of seconds, got None"),
    (lambda d: d.pop("2"), r"expected the questions '0' to '4', of which '2' is missing"),
    (lambda d: d.clear(), r"expected an object with the questions"),
]


@pytest.mark.parametrize("change, message", QUESTIONS)
def test_a_spoiled_question_is_named(folder, change, message):
    data = formats.questions()
    change(data)
    path = formats.write(folder, "egomcq.json", json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        egomcq.read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"0": {"answer": 1', r"egomcq.json: line 1, column 19: expected JSON"),
        ('{"0": 1, "0": 2}', r"expected each key once, got '0' twice in one object"),
        ("[" * 100_000, r"lists within lists, deeper than data is|expected JSON"),
        ("[]", r"expected an object with the questions"),
        ("", r"line 1, column 1: expected JSON"),
    ],
)
def test_what_is_no_json_of_questions(folder, text, message):
    with pytest.raises(ValueError, match=message):
        egomcq.read(formats.write(folder, "egomcq.json", text))


def test_missing_files(tmp_path):
    for read in (read_ek100, read_egoclip, read_charades, read_clips, read_mcq, read_plus):
        with pytest.raises(FileNotFoundError, match="annotations: there is no file "):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match="annotations: there is no folder"):
        ek100.read(tmp_path / "nowhere", "test")


def mutated(rng, raw, delimiter):
    """A file as it may come: bytes and fields changed, lines doubled, left out or cut."""
    lines = raw.split(b"\n")
    kind, at = rng.randrange(9), rng.randrange(1, max(2, len(lines) - 1))
    if kind == 0:
        place = rng.randrange(len(raw))
        return raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    if kind == 1:
        return raw[: rng.randrange(len(raw))]
    if kind == 2:
        lines.insert(at, lines[at])
    elif kind == 3:
        fields = lines[at].split(delimiter)
        fields[rng.randrange(len(fields))] = rng.choice(
            (b"", b"nan", b"-1", b"inf", b"1e400", "ü\u2028ñ".encode(), b'"', b"[1,,2]", b"0x1")
        )
        lines[at] = delimiter.join(fields)
    elif kind == 4:
        lines[at] = lines[at] + delimiter * rng.randrange(1, 3)
    elif kind == 5:
        lines[at] = lines[at].replace(delimiter, b";")
    elif kind == 6:
        place = rng.randrange(len(raw))
        return raw[:place] + rng.choice((b"\n", b"\r", b"\0", b'"', b"\t", b",", b"\xef\xbb\xbf")) + raw[place:]
    elif kind == 7:
        place = rng.randrange(len(raw))
        return raw[:place] + raw[place + rng.randrange(1, 30) :]
    else:
        lines[at], lines[-2] = lines[-2], lines[at]
    return b"\n".join(lines)


def records(raw, delimiter, quotes):
    """How many records a file has, beside its header, by Python's csv."""
    text = io.StringIO(raw.decode("utf-8-sig"), newline="")
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return sum(1 for row in csv.reader(text, delimiter=delimiter, quoting=quoting) if row) - 1


@pytest.mark.sample(10)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", TEXT)
def test_fuzzed_tables(folder, name, seed):
    rng = random.Random(f"{name} {seed}")
    file, text, delimiter, read = TEXT[name]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(50):
        raw = mutated(rng, text.encode(), delimiter.encode())
        formats.write(folder, file, raw)
        try:
            rows, captions, skipped = read(folder)
        except ValueError as error:
            assert file in str(error) and "\n" not in str(error), error
            outcomes["refused"] += 1
        else:
            count = len(captions) if name == "sentences" else len(rows) + skipped
            assert count == records(raw, delimiter, name != "egoclip"), raw
            outcomes["read"] += 1
    assert min(outcomes.values()) > 0


class Python(pickle._Unpickler):
    """Python's own, in Python, which holds no memory for what a spoiled number says; it calls nothing."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError


@pytest.mark.sample(2)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["egomcq.json", "mine.pkl"])
def test_fuzzed_objects(folder, name, seed):
    rng = random.Random(f"{name} {seed}")
    read, raw = (read_mcq if name == "egomcq.json" else read_plus), (folder / name).read_bytes()
    for _ in range(50):
        changed = bytearray(raw)
        for _ in range(rng.choice((1, 2, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if rng.random() < 0.2:
            del changed[rng.randrange(1, len(changed)) :]
        path = formats.write(folder, name, bytes(changed))
        try:
            rows, more, skipped = read(folder)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            try:  # a byte may say that two rows are one
                expected = 6 if more else len(Python(io.BytesIO(bytes(changed))).load())
            except UnicodeDecodeError:  # of a row that was left out
                assert skipped > 0
            else:
                assert len(more[0] if more else rows) + skipped == expected
