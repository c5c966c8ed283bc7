"""One file of captions beside a folder of videos: what is read, what is refused, who is tested, what is alike."""

import math
import os
import unicodedata

import numpy as np
import pytest
import torch

from evaat_fast.data import ClipTable, choices
from evaat_fast.data.kinds import kinds_relevancy, sets_relevancy
from evaat_fast.data.plain import PlainClips
from evaat_fast.data.readers import plain, text

pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path):
    """A folder of files with videos' names; nothing here decodes one."""
    for name in ("a.mp4", "b.mov", "trip/monday.mp4", "trip/x.mp4", "home/x.mp4", "odd, name.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(b"x")
    return tmp_path


def write(folder, text, name="captions.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def read(folder, text, split="train", name="captions.csv", encoding="utf-8", **options):
    return plain.read(write(folder, text, name, encoding), folder / "videos", split, **{"test_share": 0.0, **options})


@pytest.mark.parametrize(
    "said,seconds",
    [("12.5", 12.5), ("1:02.5", 62.5), ("01:02:03", 3723.0), ("0:01:02,25", 62.25), ("90:00", 5400.0), (" 7 ", 7.0)]
    + [(bad, None) for bad in ("", "soon", "1:2:3:4", "1:75", "1:70:00", "nan", "1,5", "-1:00", "٣")],
)
def test_times(said, seconds):
    assert text.seconds(said) == seconds


def test_a_file_of_captions(folder):
    table = read(
        folder,
        "path,caption,start,stop,verb,noun\n"
        "trip/monday.mp4,opens the fridge,0:12.5,0:15,open,fridge\n"
        'trip/monday.mp4,"takes milk, and eggs",15,18,take,"milk; Eggs|milk"\n'
        "trip/monday.mp4,opens the door of it,12.500,15.0,Open,door\n"
        "b.mov,  sings ,,,,\n",
    )
    assert [clip.id for clip in table] == ["trip/monday.mp4@12.5-15", "trip/monday.mp4@15-18", "b.mov"]
    assert table[0].texts == ("opens the fridge", "opens the door of it") and table[2].texts == ("sings",)
    assert (table[0].start, table[0].stop) == (12.5, 15.0) and math.isnan(table[2].start) and math.isnan(table[2].stop)
    assert table.metadata["classes"] == {"verb": ["open", "take"], "noun": ["fridge", "milk", "eggs", "door"]}
    assert [clip.labels for clip in table] == [(0, 2, 5), (1, 3, 4), ()]
    table.save(folder / "t.arrow")
    assert ClipTable.open(folder / "t.arrow").metadata == table.metadata


@pytest.mark.parametrize(
    "text,name,encoding",
    [
        ("path,caption\na.mp4,runs\nb.mov,sits\n", "c.csv", "utf-8-sig"),
        ("path,caption\r\na.mp4,runs\r\nb.mov,sits\r\n", "c.csv", "utf-8"),
        ("path\tcaption\na.mp4\truns\nb.mov\tsits", "c.tsv", "utf-8"),
        ("path\tcaption\na.mp4\truns\nb.mov\tsits", "c.csv", "utf-8"),
        ("\ncaption;path\nruns;a.mp4\n\nsits;b.mov\n", "c.csv", "utf-8"),
        ('"path","caption"\n"a.mp4","runs"\n"./b.mov","sits"\n', "c.csv", "utf-8"),
    ],
)
def test_how_programs_write_it(folder, text, name, encoding):
    table = read(folder, text, name=name, encoding=encoding)
    assert [(clip.video, clip.texts) for clip in table] == [("a.mp4", ("runs",)), ("b.mov", ("sits",))]


def test_quotes_and_line_breaks_within_a_cell(folder):
    table = read(folder, 'path,caption\n"odd, name.mp4","says ""hello""\nand goes"\na.mp4,6" of snow\n')
    assert [(clip.video, clip.texts[0]) for clip in table] == [
        ("odd, name.mp4", 'says "hello"\nand goes'),
        ("a.mp4", '6" of snow'),
    ]


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("said", ["NFC", "NFD"])
def test_accents_are_one_letter_or_two(folder, disk, said):
    """macOS may write two where the file of captions has one."""
    name = unicodedata.normalize(disk, "été/à la plage.mp4")
    (folder / "videos" / name).parent.mkdir()
    (folder / "videos" / name).write_bytes(b"x")
    row = unicodedata.normalize(said, "été/à la plage.mp4")
    for path in (row, row.split("/")[1], row.replace("/", "\\"), str(folder / "videos" / row)):
        table = read(folder, f"path,caption\n{path},swims\n")
        assert table[0].video == name, path
    data = PlainClips(table, folder / "videos", num_frames=1)
    assert data.source(0).files == (folder / "videos" / name,)


def test_a_bare_name_is_enough_where_it_is_the_only_one(folder):
    assert read(folder, "path,caption\nmonday.mp4,runs\n")[0].video == "trip/monday.mp4"
    for said in ("Monday.MP4", "TRIP/monday.mp4"):  # a camera writes the one, its owner the other
        assert read(folder, f"path,caption\n{said},runs\n")[0].video == "trip/monday.mp4"
    (folder / "videos" / "trip" / "X.mp4").write_bytes(b"x")
    assert read(folder, "path,caption\nX.mp4,runs\n")[0].video == "trip/X.mp4"
    with pytest.raises(ValueError, match=r"line 2 .*path: expected the name of one video; 2 have it: trip/X.mp4, trip/x.mp4"):
        read(folder, "path,caption\ntrip\\x.MP4,runs\n")
    with pytest.raises(ValueError, match=r"line 2 .*path: expected the name of one video; 2 have it: home/x.mp4, trip/x.mp4"):
        read(folder, "path,caption\nx.mp4,runs\n")
    (folder / "elsewhere.mp4").write_bytes(b"x")
    for outside in ("../elsewhere.mp4", str(folder / "elsewhere.mp4"), "trip/../../elsewhere.mp4"):
        with pytest.raises(ValueError, match="line 2 .*path: expected a video below"):
            read(folder, f"path,caption\n{outside},runs\n")


def test_links_that_lead_in_a_circle(folder):
    os.symlink(folder / "videos", folder / "videos" / "trip" / "again")
    os.symlink(folder / "nowhere", folder / "videos" / "dangling.mp4")
    os.symlink("a link to itself", folder / "videos" / "a link to itself")
    assert read(folder, "path,caption\nmonday.mp4,runs\n")[0].video == "trip/monday.mp4"


def test_missing_videos_are_left_to_the_check(folder):
    table = read(folder, "path,caption\ngone.mp4,runs\na.mp4,sits\n")
    data = PlainClips(table, folder / "videos", num_frames=1, missing="broken")
    assert list(data.sources) == ["a.mp4"] and data.source(0) is None
    with pytest.raises(FileNotFoundError, match="1 of 2 videos are not in .*: gone.mp4"):
        PlainClips(table, folder / "videos", num_frames=1)


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "path,text\na.mp4,x\n",
            "expected the columns path, caption; missing: caption; the first line has \\['path', 'text'\\]",
        ),
        ("", "expected a header with the columns path, caption, got an empty file"),
        ("path,caption\n", "no rows"),
        ("path,caption\na.mp4,\nb.mov, \n", "none of its 2 rows has a caption: fill in the column caption"),
        ("path,caption\n,runs\n", "line 2 cannot be read: path: expected a text, got ''"),
        ("path,caption\na.mp4,runs,fast\n", "line 2 cannot be read: expected 2 fields, got 3"),
        (
            "path,caption,start,stop\na.mp4,runs,1,soon\n",
            "line 2 cannot be read: stop: expected seconds or a time as 1:02:03.5",
        ),
        ("path,caption,start,stop\na.mp4,runs,NaN,2\n", "line 2 cannot be read: start: expected seconds or a time"),
        ("path,caption,start,stop\na.mp4,runs,3,2\n", "line 2 cannot be read: stop: expected a time after start = 3, got '2'"),
        ("path,caption,start,stop\na.mp4,runs,2,2\n", "stop: expected a time after start = 2"),
        ("path,caption,start,stop\na.mp4,runs,-1,2\n", "line 2 cannot be read: start: expected seconds"),
        ("path,caption,start,stop\na.mp4,runs,2,\n", "stop: expected .* as start is given; or neither, for the whole video"),
        (
            "path,caption,start_ms,stop_ms\na.mp4,runs,2,3\n",
            "expected times in columns start and stop, .*got start_ms, stop_ms",
        ),
        ("path,caption,Start,Stop\na.mp4,runs,2,3\n", "expected times in columns start and stop, .*got Start, Stop"),
        ("path,caption,start frame,end frame\na.mp4,runs,2,3\n", "expected times in .*got start frame, end frame"),
        ("path,caption,start,end\na.mp4,runs,2,3\n", "expected times in columns start and stop, .*got end"),
        ("path,caption,start,stop\na.mp4,runs,1500ms,2s\n", "start: expected seconds or a time as 1:02:03.5, got '1500ms'"),
        ("path,caption,start,stop\na.mp4,runs,0:0:1:12,2\n", "start: expected seconds or a time as 1:02:03.5, got '0:0:1:12'"),
        ("path,caption,start\na.mp4,runs,2\n", "stop: expected a column of this name beside the other one"),
        ("path,caption,start,stop\na.mp4,runs,0,900000\n", "stop: expected seconds, of no video of two days or more"),
        ("path,caption,split\na.mp4,runs,dev\n", "split: expected train or test, or nothing, got 'dev'"),
        ("path,caption,split\na.mp4,r,train\na.mp4,s,test\n", "line 3 .*split: expected train, as line 2 of the same clip has"),
        ("path,caption,caption\na.mp4,runs,x\n", "line 1 names the column caption 2 times"),
        ('path,caption\na.mp4,"runs\n', "line 2 cannot be read: .*the file ends within quotes"),
    ],
)
def test_mistakes_name_file_line_and_column(folder, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(folder, text)
    assert str(folder / "captions.csv") in str(error.value) and "\n" not in str(error.value)


def test_other_mistakes(folder):
    text = "path,caption\na.mp4,runs\n"
    with pytest.raises(FileNotFoundError, match="annotations: there is no file"):
        plain.read(folder / "none.csv", folder / "videos", "train")
    with pytest.raises(FileNotFoundError, match="videos: there is no folder"):
        plain.read(write(folder, text), folder / "nowhere", "train")
    with pytest.raises(ValueError, match="expected a file of .csv, .tsv, .parquet, .arrow"):
        read(folder, text, name="captions.json")
    with pytest.raises(ValueError, match="expected text in UTF-8, got UTF-16"):
        read(folder, text, encoding="utf-16")
    with pytest.raises(ValueError, match="labels: expected a column 'verb'; there are path, caption"):
        read(folder, text, labels=["verb"])
    with pytest.raises(ValueError, match="test_share: expected a share"):
        read(folder, text, test_share=1.0)
    with pytest.raises(ValueError, match="expected two videos or more, of which one is tested; got clips of 'a.mp4' alone"):
        read(folder, text, test_share=0.1)


def test_rows_without_a_caption_and_columns_that_are_not_read_are_said(folder, caplog):
    assert len(read(folder, "path,caption,mood\na.mp4,,x\nb.mov,sits,y\n")) == 1
    assert "1 of 2 rows have no caption and are left out, first line 2" in caplog.text
    assert "columns that are not read: mood; data.labels names those that hold classes" in caplog.text
    caplog.clear()
    assert len(read(folder, "path,caption,mood\na.mp4,runs,x\n", labels=["mood"])) == 1 and not caplog.text
    many = [f"c{n}" for n in range(10_000)]
    assert len(read(folder, f"path,caption,{','.join(many)}\na.mp4,runs{',1' * 10_000}\n")) == 1
    assert "c8, c9 and 9,990 more; data.labels" in caplog.text
    caplog.clear()
    spare = "path,caption,start,stop,end_time,to\na.mp4,runs,1,2,x,x\n"  # beside times, or as labels, they are others
    assert read(folder, spare, labels=["to"])[0].stop == 2 and "not read: end_time;" in caplog.text
    assert read(folder, "path,caption,to\na.mp4,runs,x\n", labels=["to"])[0].video == "a.mp4"


def test_names_that_no_disk_has(folder):
    """Too long, of a tar file that is none, or of a folder: missing videos, as others."""
    long = "a" * 5000
    table = read(folder, f"path,caption\n{long}.mp4,runs\n{long}.tar/x.mp4,sits\n")
    assert list(PlainClips(table, folder / "videos", num_frames=1, missing="broken").sources) == []


@pytest.mark.parametrize("name", ["captions.parquet", "captions.arrow"])
def test_typed_columns(folder, name):
    import pyarrow as pa
    import pyarrow.parquet

    columns = {
        "path": ["a.mp4", "a.mp4", "b.mov"],
        "caption": pa.array([["runs", "is fast"], ["sits"], ["sings"]]),
        "start": [0.5, 3.0, None],
        "stop": [2.0, 4.0, float("nan")],
        "label": pa.array([[1, 2], [3], None]),
        "class_name": ["x; y", None, "z"],
    }
    table, path = pa.table(columns), folder / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    found = plain.read(path, folder / "videos", "train", test_share=0.0)
    assert [clip.texts for clip in found] == [("runs", "is fast"), ("sits",), ("sings",)]
    assert found.metadata["classes"] == {"label": ["1", "2", "3"], "class_name": ["x", "y", "z"]}
    assert found[0].labels == (0, 1, 3, 4) and found[1].labels == (2,) and math.isnan(found[2].stop)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        plain.read(path, folder / "videos", "train")


def test_nanoseconds_need_no_pandas(folder):
    import pyarrow as pa
    import pyarrow.parquet

    times = {name: pa.array([at, None], pa.duration("ns")) for name, at in (("start", 1_500_000_001), ("stop", 2_400_000_000))}
    table = pa.table({"path": ["a.mp4", "b.mov"], "caption": ["runs", "sits"], **times})
    pyarrow.parquet.write_table(table, folder / "captions.parquet")
    clip = plain.read(folder / "captions.parquet", folder / "videos", "train", test_share=0.0)[0]
    assert (clip.start, clip.stop) == (1.5, 2.4)


def test_a_wrong_row_of_a_table_is_named(folder):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"path": ["a.mp4", "b.mov"], "caption": ["x", "y"], "start": [0.0, 2.0], "stop": [1.0, 1.0]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet: row 2 cannot be read: stop: expected a time after start = 2"):
        plain.read(folder / "c.parquet", folder / "videos", "train")


def test_columns_of_other_types(folder):
    import pyarrow as pa
    import pyarrow.parquet

    for columns, message in (
        ({"path": [b"a.mp4"], "caption": ["x"]}, "c.parquet: path: expected a column of text, got binary"),
        ({"path": ["a.mp4"], "caption": [{"x": 1}]}, "c.parquet: caption: expected a column of text, got struct"),
    ):
        pyarrow.parquet.write_table(pa.table(columns), folder / "c.parquet")
        with pytest.raises(ValueError, match=message):
            plain.read(folder / "c.parquet", folder / "videos", "train")
    views = pa.array(["a.mp4"], pa.string_view())
    pyarrow.parquet.write_table(pa.table({"path": views, "caption": views}), folder / "c.parquet")
    assert plain.read(folder / "c.parquet", folder / "videos", "train", test_share=0.0)[0].texts == ("a.mp4",)
    spans = {"start": pa.array([1500], pa.duration("ms")), "stop": pa.array([3000], pa.duration("ms"))}
    table = pa.table({"path": pa.array(["a.mp4"]).dictionary_encode(), "caption": pa.array([["x"]]), **spans})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    assert plain.read(folder / "c.parquet", folder / "videos", "train", test_share=0.0)[0].start == 1.5


def sides(folder, count, **options):
    text = "path,caption\n" + "".join(f"v{i}.mp4,c{i}\n" for i in range(count))
    return {s: {clip.video for clip in read(folder, text, s, **{"test_share": 0.2, **options})} for s in choices.SPLITS}


def test_the_split_is_by_video_and_seeded_and_stays(folder):
    few, many = sides(folder, 60), sides(folder, 600)
    assert few["train"] | few["test"] == {f"v{i}.mp4" for i in range(60)} and not few["train"] & few["test"]
    assert few["train"] <= many["train"] and few["test"] <= many["test"]
    assert abs(len(many["test"]) / 600 - 0.2) < 0.05
    assert sides(folder, 60) == few and sides(folder, 60, seed=1) != few
    assert few["test"] <= sides(folder, 60, test_share=0.4)["test"]  # a larger share moves none back
    assert sides(folder, 60, test_share=0.0)["test"] == set()
    for seed in range(5):
        assert all(map(len, sides(folder, 2, seed=seed, test_share=0.01).values()))
        assert all(map(len, sides(folder, 2, seed=seed, test_share=0.9).values()))
    # All clips of a video are on one side.
    text = "path,caption,start,stop\n" + "".join(f"v{i % 9}.mp4,c{i},{i},{i + 1}\n" for i in range(90))
    tables = [read(folder, text, s, test_share=0.3) for s in choices.SPLITS]
    assert sum(map(len, tables)) == 90 and not set(tables[0].videos()) & set(tables[1].videos())


def test_a_column_split_outranks_the_draw(folder, caplog):
    text = "path,caption,split\n" + "".join(f"v{i}.mp4,c{i},{'test' if i < 5 else 'Train'}\n" for i in range(20))
    assert {clip.video for clip in read(folder, text, "test", test_share=0.5)} == {f"v{i}.mp4" for i in range(5)}
    read(folder, "path,caption,start,stop,split\na.mp4,x,0,1,train\na.mp4,y,1,2,test\n")
    assert "1 videos are in both train and test, by the column split; first 'a.mp4'" in caplog.text


def clips(folder, text, **options):
    kept = {"similarity": options.pop("similarity")} if "similarity" in options else {}
    return PlainClips(read(folder, text, **options), folder / "videos", num_frames=1, missing="broken", **kept)


def test_relevancy_of_verbs_and_nouns_is_that_of_ek100(folder):
    rng = np.random.default_rng(0)
    pairs = [(int(rng.integers(3)), frozenset(rng.integers(5, size=rng.integers(0, 4)).tolist())) for _ in range(30)]
    text = "path,caption,verb,noun\n"
    text += "".join(f"v{i}.mp4,c{i},v{v},{';'.join(f'n{n}' for n in sorted(nouns))}\n" for i, (v, nouns) in enumerate(pairs))
    data = clips(folder, text)
    assert data.labelled and data.relevancy.dtype == torch.float64
    torch.testing.assert_close(data.relevancy, kinds_relevancy(pairs, torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(data.relevancy_table[data.clip_kind][:, data.clip_kind], kinds_relevancy(pairs), rtol=0, atol=0)


def test_one_column_is_its_intersection_over_union(folder):
    data = clips(folder, "path,caption,label\na.mp4,x,p|q\nb.mov,y,q;r\ntrip/x.mp4,z,\nhome/x.mp4,Z ,\nc.mp4,u,s\n")
    expected = [[1, 1 / 3, 0, 0], [1 / 3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert data.captions == ["x", "y", "z", "u"]  # without a class a clip is like those of its captions
    torch.testing.assert_close(data.relevancy, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)
    assert data.clip_kind[2] == data.clip_kind[3]
    assert sets_relevancy([(frozenset(),), (frozenset({1}),)]).tolist() == [[1, 0], [0, 1]]


def test_a_caption_is_as_relevant_as_the_most_relevant_of_its_clips(folder):
    data = clips(folder, "path,caption,label\na.mp4,it moves,p\nb.mov,it moves,q\nc.mp4,it stands,q\n")
    assert data.relevancy.tolist() == [[1, 0], [1, 1], [1, 1]]


def test_without_labels_equal_captions_are_equal(folder):
    text = "path,caption,start,stop\na.mp4,Opens  a DOOR,0,1\na.mp4,enters,0,1\nb.mov,opens a door,,\nc.mp4,leaves,,\n"
    data = clips(folder, text)
    assert not data.labelled and data.captions == ["Opens  a DOOR", "enters", "leaves"]
    assert data.relevancy_table.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]] and data.clip_kind.tolist() == [0, 1, 2]
    seen = {tuple(data.caption(0, torch.Generator().manual_seed(i))[k] for k in ("kind", "text_kind")) for i in range(20)}
    assert seen == {(0, 0), (0, 1)}
    assert not clips(folder, "path,caption,verb\na.mp4,x,p\nb.mov,y,p\n", labels=[]).labelled
    assert not clips(folder, "path,caption,verb\na.mp4,x,p\nb.mov,y,p\n", similarity="text-tower").labelled


def test_a_table_of_too_many_captions_is_refused(folder, monkeypatch):
    monkeypatch.setattr("evaat_fast.data.plain.LARGEST", 1)
    with pytest.raises(ValueError, match="2 captions: a table of the relevancy .* train with loss.name = 'clip'"):
        clips(folder, "path,caption\na.mp4,x\nb.mov,y\n").relevancy_table  # noqa: B018
