"""Tables of clips: what goes in comes out, from memory, a mapped file and Parquet, in this process and in workers."""

import ast
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest

from evaat_fast.data import ClipTable
from evaat_fast.data.table import COLUMNS, Clip

pa = pytest.importorskip("pyarrow")

ROWS = [
    Clip("a", "P01/P01_01", 0.5, 2.25, ("wash pan",), (3,), (1, 2), ()),
    Clip("b b", "Ünïcode\n", 7.0, 7.0, ("#C C öffnet", "", 'opens, the "door"'), (), (), (9,)),
    Clip("c", "v", float("nan"), float("nan"), (), (0, 4), (), (2**31 - 1, 0)),
]


def columns(rows=ROWS):
    return {name: [getattr(row, name) for row in rows] for name in COLUMNS}


def same(row, other):
    return repr(row) == repr(other)  # in which NaN is NaN


@pytest.fixture(params=["memory", ".arrow", ".parquet", "pickled", "pickled .arrow"])
def table(request, tmp_path):
    made = ClipTable.of(columns(), dataset="toy", split="test", source=["x.csv"])
    if "." in request.param:
        path = tmp_path / f"clips{request.param[-6:].strip()}" if "arrow" in request.param else tmp_path / "clips.parquet"
        made.save(path)
        made = ClipTable.open(path)
    return pickle.loads(pickle.dumps(made)) if "pickled" in request.param else made


def test_what_goes_in_comes_out(table):
    assert len(table) == 3 and all(map(same, table, ROWS)) and same(table[-1], ROWS[2])
    assert (table.dataset, table.split, table.metadata["source"]) == ("toy", "test", ["x.csv"])
    assert table.videos() == [row.video for row in ROWS]
    assert table.row("b b") == 1
    assert table.column("start").dtype == np.float64 and table.column("stop")[:2].tolist() == [2.25, 7.0]
    assert table.column("id").tolist() == ["a", "b b", "c"]
    chosen = table.select([2, 0])
    assert same(chosen[0], ROWS[2]) and same(chosen[1], ROWS[0]) and chosen.dataset == "toy"


def test_what_is_not_given_is_empty():
    table = ClipTable.of({"id": ["a"], "video": ["v"], "texts": [["t"]]})
    assert same(table[0], Clip("a", "v", float("nan"), float("nan"), ("t",), (), (), ()))
    assert len(ClipTable.of({"id": [], "video": [], "texts": []})) == 0


def test_wrong_rows_are_refused(table):
    with pytest.raises(IndexError, match="expected one of 3 clips, got 3"):
        table[3]
    with pytest.raises(KeyError, match="no clip 'nobody'"):
        table.row("nobody")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": ["a", "c", "a"]}, "id: 'a' occurs 2 times, in rows 0 and 2"),
        ({"id": ["a", "b"]}, "expected one length"),
        ({"video": ["v", None, "v"]}, "video: 1 values are missing"),
        ({"texts": [["ab"], [None, "c"], ["d"]]}, "texts: 1 values are missing"),
        ({"texts": ["ab", "c", "d"]}, "texts: expected a list a clip, got a string"),
        ({"verbs": [[2**31], [], []]}, "verbs: expected list<item: int32>"),
        ({"start": ["0:01", "0:02", "0:03"]}, "start: expected double"),
        ({"caption": ["x", "y", "z"]}, "unknown: caption"),
    ],
)
def test_wrong_columns_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ClipTable.of({**columns(), **change})


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ClipTable.open(tmp_path / "none.arrow")
    for name, content in (("a.arrow", b""), ("b.arrow", b"ARROW1" + bytes(50)), ("c.parquet", b"PAR1" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a table of clips"):
            ClipTable.open(tmp_path / name)
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d.parquet: not a table of clips: expected the columns .*; missing: video"):
        ClipTable.open(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"expected a name in .arrow or .parquet"):
        ClipTable.of(columns()).save(tmp_path / "clips.csv")


def test_tables_of_other_tools_are_read(tmp_path):
    """Parquet as pandas or DuckDB write it: other widths of strings and integers, columns in another order, more of them."""
    import pyarrow.parquet

    other = pa.table(
        {
            "note": ["x"],
            "texts": pa.array([["t"]], pa.list_(pa.string())),
            "verbs": pa.array([[1]], pa.list_(pa.int64())),
            "nouns": pa.array([[]], pa.list_(pa.int64())),
            "labels": pa.array([[]], pa.list_(pa.int64())),
            "id": pa.array(["a"], pa.large_string()),
            "video": ["v"],
            "start": pa.array([1], pa.int64()),
            "stop": pa.array([2.5], pa.float32()),
        }
    )
    pyarrow.parquet.write_table(other, tmp_path / "other.parquet")
    assert same(ClipTable.open(tmp_path / "other.parquet")[0], Clip("a", "v", 1.0, 2.5, ("t",), (1,), (), ()))


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
@pytest.mark.parametrize(
    "name, values, message",
    [
        ("id", ["a", "c", "a"], "id: 'a' occurs 2 times, in rows 0 and 2"),
        ("video", ["v", None, "v"], "video: 1 values are missing"),
        ("start", [0.5, None, 1.0], "start: 1 values are missing"),  # which is not NaN, all of the video
        ("texts", [["x"], None, ["y"]], "texts: 1 values are missing"),
        ("texts", [["x"], [None, None], ["y"]], "texts: 2 values are missing"),
    ],
)
def test_what_other_tools_leave_out_is_refused(tmp_path, suffix, name, values, message):
    import pyarrow.parquet

    arrow = ClipTable.of(columns()).arrow.replace_schema_metadata(None)
    place = arrow.column_names.index(name)
    arrow = arrow.set_column(place, name, pa.array(values, arrow.schema.field(name).type))
    path = tmp_path / f"other{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(arrow, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, arrow.schema) as writer:
            writer.write_table(arrow)
    with pytest.raises(ValueError, match=f"not a table of clips: columns: {message}"):
        ClipTable.open(path)


def test_a_table_is_found_from_another_folder(tmp_path, monkeypatch):
    ClipTable.of(columns()).save(tmp_path / "clips.arrow")
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(ClipTable.open("clips.arrow"))
    monkeypatch.chdir("/")
    assert len(pickle.loads(pickled)) == 3


def test_a_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "clips.arrow"
    ClipTable.of(columns()).save(path)
    before = path.read_bytes()
    (tmp_path / "deep").mkdir()
    with pytest.raises(OSError):
        ClipTable.of(columns()).save(tmp_path / "nowhere" / "clips.arrow")
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["clips.arrow", "deep"]


def test_another_process_maps_the_same_file(tmp_path):
    """As a spawned worker does, which is sent the table pickled."""
    ClipTable.of(columns()).save(tmp_path / "clips.arrow")
    sent = pickle.dumps(ClipTable.open(tmp_path / "clips.arrow"))
    assert len(sent) < 1000  # the path, and no column
    code = "import pickle, sys; print(repr([repr(row) for row in pickle.load(sys.stdin.buffer)]))"
    run = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert ast.literal_eval(run.stdout.decode()) == [repr(row) for row in ROWS]


def test_a_forked_worker_reads_on(tmp_path):
    ClipTable.of(columns()).save(tmp_path / "clips.arrow")
    table = ClipTable.open(tmp_path / "clips.arrow")
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: writer.send([repr(row) for row in table]))
    worker.start()
    assert reader.poll(60) and reader.recv() == [repr(row) for row in ROWS]
    worker.join()


def test_a_table_of_another_program_needs_three_columns(tmp_path):
    import pyarrow.parquet

    few = pa.table(
        {"id": ["a", "b"], "video": ["v", "v"], "texts": [["t"], ["u", "w"]], "start": [0.5, 1.5], "stop": [1.0, 2.0]}
    )
    pyarrow.parquet.write_table(few, tmp_path / "few.parquet")
    table = ClipTable.open(tmp_path / "few.parquet")
    assert same(table[1], Clip("b", "v", 1.5, 2.0, ("u", "w"), (), (), ()))
    pyarrow.parquet.write_table(few.select(["id", "video", "texts"]), tmp_path / "whole.parquet")
    assert same(ClipTable.open(tmp_path / "whole.parquet")[0], Clip("a", "v", float("nan"), float("nan"), ("t",), (), (), ()))


def test_damage_is_an_error_or_in_a_value(tmp_path):
    """Offsets that lead anywhere made reading take forever."""
    rows = [row._replace(id=f"{row.id}{n}") for n in range(40) for row in ROWS]
    whole = tmp_path / "whole.arrow"
    ClipTable.of(columns(rows)).save(whole)
    content, random, refused = whole.read_bytes(), np.random.default_rng(0), 0
    for n in range(200):
        damaged = bytearray(content)
        for place in random.integers(len(content), size=3):
            damaged[place] = random.integers(256)
        path = tmp_path / f"{n}.arrow"
        path.write_bytes(damaged)
        try:
            assert len(list(ClipTable.open(path))) == len(rows)
        except ValueError as error:
            assert f"{n}.arrow: not a table of clips" in str(error)
            refused += 1
    assert refused > 20
