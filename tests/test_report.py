"""The demo, quick but whole: its files, its page, and that the page needs nothing from outside."""

import inspect
import json
import os
import re
import signal
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from evaat_fast.cli import main
from evaat_fast.data import kitchen, layout
from evaat_fast.search import Index, Moments, measure
from evaat_fast.train import demo, inputs, load, report, steps

for package in ("av", "decord", "tokenizers", "jinja2", "matplotlib"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo.run(out, quick=True, overrides=["train.device=cpu", "model.num_frames=4"], quiet=True)


class Page(HTMLParser):
    """Collects the tags that are open, all links and all text; an unbalanced page fails."""

    VOID = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.links, self.text = [], {}, [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_files(run):
    out, results = run
    names = {"corpus-quick", ".evaat-index", "results.json", "index.html"}
    names |= {*demo.STAGES, *(f"{stage}.toml" for stage in demo.STAGES)}
    assert {p.name for p in out.iterdir()} == names
    assert json.loads((out / "results.json").read_text()) == results
    assert [r["name"] for r in results["metrics"]][:2] == ["random scores", "before training"]
    assert [r["name"] for r in results["controls"]] == ["ordered", "shuffled", "reversed", "frozen"]
    assert results["controls"][0]["mAP"] == results["metrics"][-1]["mAP"]
    assert results["train_clips"] == 96 and results["verbs"] == 8


def test_the_configurations_are_real_ones(run):
    out, _ = run
    for stage in demo.STAGES:
        config = load(out / f"{stage}.toml")
        assert config.train.out == str(out / stage) and config.data.videos == str(out / "corpus-quick/videos")
    assert config.train.init == str(out / "pretrain") and config.loss.name == "sms"


def test_page_is_whole_and_self_contained(run):
    out, results = run
    html = (out / "index.html").read_text()
    page = Page(html)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(([^)]*)\)", html))
    assert "<script" not in html and "@import" not in html
    assert page.counts["table"] == 2 and page.counts["section"] == 19
    text = " ".join(page.text)
    searched = results["search"]
    assert len(searched["asked"]) == 4 and all(f"“{query}”" in text for query in searched["asked"])
    verbs = [{word for word in query.split() if word not in (*kitchen.COLOURS, *kitchen.SHAPES)} for query in searched["asked"]]
    assert verbs[2] | verbs[3] == {"push", "left", "right"}, "the last two differ in time alone"
    assert f"first five for {searched['hits']}." in " ".join(text.split()) and f"in {searched['clips']} overlapping" in text
    assert len(re.findall(r"corpus-quick/videos/P02/P02_00.MP4/\d+.MP4, \d+.\d – \d+.\d s", html)) == 4 * 5
    for row in (*results["metrics"], results["controls"][-1]):
        assert f"{row['mAP']:.1f}" in text and f"{row['verb_accuracy']:.1f}" in text
    assert "prefers-color-scheme: dark" in html and "currentColor" in html


def test_queries_mark_what_is_right(run):
    out, _ = run
    # The file says what was run: the small corpus, few epochs, the seed, and what was overridden.
    config = load(out / "pretrain.toml")
    assert (config.train.epochs, config.train.seed, config.model.num_frames) == (2, 0, 4)
    test = inputs.test_split(config)
    found = report.queries(test.relevancy.double(), test)
    for query in found["text_to_video"]:
        assert [f["right"] for f in query["found"]].count(True) == min(5, query["matching"])
        assert query["found"][0]["text"] == query["text"] and query["found"][0]["strip"].startswith("data:image/jpeg")
    assert all(q["found"][0]["right"] and q["found"][0]["text"] == q["text"] for q in found["video_to_text"])
    worst = report.queries(-test.relevancy.double(), test)
    assert not any(f["right"] or f["verb"] for q in worst["text_to_video"] for f in q["found"])


def test_what_is_found_is_judged_by_the_table(run, monkeypatch):
    """A search that knows the answers, one that knows their opposites, and one that finds what nobody narrated."""
    out, results = run
    test = inputs.test_split(load(out / "pretrain.toml"))
    index = Index.open(out)
    (source,) = test.sources.values()
    assert len(index.files) == len(source.files) > 1 and len(index) == results["search"]["clips"]

    def finds(wanted, offset=0.0):
        def search(query, k):
            kind = test.caption_kind[test.captions.index(query)]
            clips = [test.table[row] for row in (test.clip_kind == wanted(int(kind))).nonzero()[:, 0].tolist()]
            middles = np.array([(clip.start + clip.stop) / 2 + offset for clip in clips])
            homes = [layout.home(source, second) for second in middles]
            peak = middles - np.array([source.starts[home] for home in homes])
            files = [str(source.files[home].resolve()) for home in homes]
            return Moments(query, np.zeros(len(peak), np.float32), files, peak - 0.5, peak + 0.5, peak, [None] * len(peak))

        monkeypatch.setattr(index, "search", search)
        return measure.answers(index, test)

    number = {kind: i for i, kind in enumerate(test.kinds)}

    def opposite(kind):
        verb, nouns = test.kinds[kind]
        return number.get((verb ^ 1, nouns), kind)

    both = {kind for kind in range(len(number)) if opposite(kind) != kind}
    right = finds(lambda kind: kind)
    assert measure.hits(right) == (40, 40) and [one.kinds[0] for one in right] == test.caption_kind.tolist()
    assert sum(n for n, _ in measure.pairs(right, test, kitchen.PAIRS).values()) == len(both) > 0
    wrong = measure.pairs(finds(opposite), test, kitchen.PAIRS)
    assert {right for right, _ in wrong.values()} == {0} and sum(asked for _, asked in wrong.values()) == len(both)
    beyond = finds(lambda kind: kind, offset=1e4)
    assert measure.hits(beyond) == (0, 40) and all(set(one.clips) == {-1} for one in beyond)


def test_table_has_a_row_for_everything(run):
    _, results = run
    text = demo.table(results)
    for name in ("random scores", "before training", "after pretraining (InfoNCE)", "after fine-tuning (SMS)"):
        assert name in text
    for name in ("frames in order", "frames shuffled", "frames reversed", "one frozen frame"):
        assert name in text


def test_a_second_run_finds_the_corpus(run, capsys):
    out, first = run
    stamp = (out / "corpus-quick/kitchen.json").stat().st_mtime_ns
    second = demo.run(out, quick=True, overrides=["train.device=cpu", "model.num_frames=4"])
    assert (out / "corpus-quick/kitchen.json").stat().st_mtime_ns == stamp
    assert second["metrics"] == first["metrics"]
    printed = capsys.readouterr().out
    assert "The page: " in printed and "found: 2 of 2 epochs of pretrain, 1 of 1 epochs of finetune" in printed


def test_an_interrupted_demo_goes_on_where_it_was(run, tmp_path, monkeypatch, capsys):
    """In the midst of either stage, however it is saved; then nothing is left to do, until it is asked for anew."""
    original, calls = steps.batch_loss, []

    def counted(*arguments):
        if arguments[1]["video"].dtype == torch.uint8 and interesting():
            calls.append(1)
            if len(calls) in (8, 15):  # in the second epoch of the first stage, and in the second stage
                os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    def interesting():  # what is timed beforehand is no step of a run
        return not any(frame.function == "step_seconds" for frame in inspect.stack(0)[:12])

    monkeypatch.setattr(steps, "batch_loss", counted)
    arguments = ["demo", "--quick", "--out", str(tmp_path / "out"), "--set=train.device=cpu", "--set=model.num_frames=4"]
    arguments.append("--set=train.save_as=parts")
    assert main(arguments) == 130 and len(calls) == 8
    printed = capsys.readouterr()
    assert re.search(r"about \d+ s on this machine, \d+ s of it for videos; interrupted, the same command goes on", printed.out)
    assert "stopped by Ctrl-C in epoch 2, after step 2 of 6, which is saved; the same command continues" in printed.err
    assert main(arguments) == 130 and len(calls) == 15
    assert "found: 1 of 2 epochs of pretrain" in capsys.readouterr().out
    assert main(arguments) == 0 and len(calls) == 18
    assert json.loads((tmp_path / "out/results.json").read_text())["metrics"] == run[1]["metrics"]
    assert main([*arguments, "--overwrite", "--set=train.epochs=1"]) == 0 and len(calls) == 18 + 12
