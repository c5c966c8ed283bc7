"""Embeddings in files: what other programs read is what the model gives, whether or not the run was interrupted."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_tasks import run  # noqa: F401, a fixture

from evaat_fast._files import sha256
from evaat_fast.cli import main
from evaat_fast.train import embedding, inputs, trainer


def expected(config, weights):
    config.train.init = weights
    data, model = inputs.test_split(config), trainer.build_model(config).eval()
    device = torch.device("cpu")
    clips = torch.cat([batch.embeddings for batch in embedding.of_clips(model, data, config, device)])
    texts = list(dict.fromkeys(data.captions))
    return data, clips.numpy(), texts, torch.cat(list(embedding.of_texts(model, texts, config, device))).numpy()


def test_parquet(run, tmp_path, capsys):  # noqa: F811
    dataset = pytest.importorskip("pyarrow.dataset")
    config, weights, toml = run
    out = tmp_path / "features"
    assert main(["features", toml, "--checkpoint", weights, "--out", str(out), "--rows", "6"]) == 0
    assert "16 clips in 3 parquet files" in capsys.readouterr().out
    data, clips, texts, captions = expected(config, weights)
    table = dataset.dataset(sorted(out.glob("clips-*")), format="parquet").to_table()
    assert table.column("id").to_pylist() == [clip.id for clip in data.table]
    np.testing.assert_array_equal(table.column("start").to_numpy(), data.table.column("start"))
    np.testing.assert_allclose(np.array(table.column("embedding").to_pylist(), np.float32), clips, atol=1e-6)
    words = dataset.dataset(sorted(out.glob("texts-*")), format="parquet").to_table()
    assert words.column("text").to_pylist() == texts
    np.testing.assert_allclose(np.array(words.column("embedding").to_pylist(), np.float32), captions, atol=1e-6)
    record = json.loads((out / "features.json").read_text())
    assert record["checkpoint_sha256"] == sha256(weights) and record["preprocessing"]["frames"] == 2
    assert json.loads(table.schema.metadata[b"evaat_fast"])["model"] == record["model"]


def test_an_interrupted_run_goes_on(run, tmp_path, capsys):  # noqa: F811
    _, weights, toml = run
    arguments = ["features", toml, "--checkpoint", weights, "--rows", "5", "--format", "npz", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0 and main([*arguments, str(tmp_path / "part")]) == 0
    (tmp_path / "part/clips-00002-of-00004.npz").unlink()
    stamp = (tmp_path / "part/clips-00001-of-00004.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "part")]) == 0
    assert "3 of them there already" in capsys.readouterr().out
    assert (tmp_path / "part/clips-00001-of-00004.npz").stat().st_mtime_ns == stamp
    files = sorted((tmp_path / "whole").glob("*.npz"))
    assert [p.name for p in files] == sorted(p.name for p in (tmp_path / "part").glob("*.npz"))
    for path in files:
        one, other = np.load(path), np.load(tmp_path / "part" / path.name)
        assert set(one) == set(other) and "embedding" in one
        for name in set(one) - {"embedding"}:
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one["embedding"], other["embedding"], atol=1e-6)


def test_another_model_s_folder_is_refused(run, tmp_path, capsys):  # noqa: F811
    _, weights, toml = run
    arguments = ["features", toml, "--checkpoint", weights, "--out", str(tmp_path / "features")]
    assert main(arguments) == 0
    assert main([*arguments, "--rows", "3"]) == 2
    assert "holds features of another rows (8192, here 3); give another folder" in capsys.readouterr().err
    assert main([*arguments, "--split", "val"]) == 2 and "--split: expected train or test" in capsys.readouterr().err
    assert main([*arguments, "--checkpoint", weights]) == 2 and "features are of one model" in capsys.readouterr().err


def test_what_was_left_out_is_made_up_for(run, tmp_path, capsys):  # noqa: F811
    """A file that lacks clips is no file of all of them: not to a later run to which the videos are there."""
    parquet = pytest.importorskip("pyarrow.parquet")
    config, weights, toml = run
    shutil.copytree(config.data.videos, tmp_path / "videos")
    data = inputs.test_split(config)
    chunk = tmp_path / "videos" / f"{data.table.video(0)}.MP4" / "15.MP4"
    chunk.rename(tmp_path / "15.MP4")
    arguments = ["features", toml, "--checkpoint", weights, "--rows", "6", "--out", str(tmp_path / "f")]
    arguments += ["--videos", str(tmp_path / "videos")]
    assert main([*arguments, "--allow-partial"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--allow-partial"]) == 0
    again = capsys.readouterr().out
    assert "clips left out" in first and first.split(";")[-1] == again.split(";")[-1]
    assert main(arguments) == 2 and "--allow-partial" in capsys.readouterr().err
    (tmp_path / "15.MP4").rename(chunk)
    assert main(arguments) == 0 and "left out" not in capsys.readouterr().out
    ids = [i for path in sorted((tmp_path / "f").glob("clips-*")) for i in parquet.read_table(path).column("id").to_pylist()]
    assert ids == data.table.column("id").tolist()


def test_another_table_s_folder_is_refused(run, tmp_path, capsys):  # noqa: F811
    config, weights, toml = run
    arguments = ["features", toml, "--checkpoint", weights, "--out", str(tmp_path / "features"), "--annotations"]
    shutil.copytree(config.data.annotations, tmp_path / "annotations")
    assert main([*arguments, str(tmp_path / "annotations")]) == 0
    path = tmp_path / "annotations" / "EPIC_100_retrieval_test.csv"
    path.write_text(path.read_text().replace("00:00:00.", "00:00:00.1"))
    assert main([*arguments, str(tmp_path / "annotations")]) == 2
    assert "holds features of another table" in capsys.readouterr().err
