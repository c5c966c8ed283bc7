"""Token ids equal OpenAI's: fuzzed against its code where open_clip is installed, against stored ids everywhere."""

import builtins
import gzip
import json
import pickle

import pytest
import torch
from golden import tokens as golden

import evaat_fast
from evaat_fast.model import tokenizer as module
from evaat_fast.model.tokenizer import CLIPTokenizer

for library in ("ftfy", "regex", "tokenizers", "hypothesis"):
    pytest.importorskip(library)

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

CASES = list(zip(golden.TEXTS, json.loads(golden.FILE.read_text()), strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return evaat_fast.get_tokenizer()


@pytest.fixture(scope="module")
def openai():
    return golden.openai_tokenizer()


@pytest.mark.parametrize("text,ids", CASES, ids=[str(i) for i in range(len(CASES))])
def test_golden(tokenizer, text, ids):
    row = tokenizer(text)
    assert row.shape == (1, 77) and row.dtype == torch.int64
    assert row[0, : len(ids)].tolist() == ids
    assert not row[0, len(ids) :].any()


PIECES = [
    *(text for text in golden.TEXTS if len(text) < 200),
    *(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|",
        "|>",
        "&amp;",
        "&lt;",
        "&#",
        ";",
        "'s",
        "'LL",
        "’",
        "\u0301",
        "\u200d",
        "\ufe0f",
    ),
    *("\x00", "\x1f", "\x7f", "\x85", "\ud800", "\udfff", "🙂", "ﬀ", "İ", "ſ", "Ã©", "â€™", "1", "٣", "_", " ", "\n"),
]
UNICODE = st.text(st.characters(codec=None), max_size=60)  # surrogates too
MIXED = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join)
LATIN = st.text(st.characters(max_codepoint=0x24F), max_size=80)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(UNICODE, MIXED, LATIN))
@example("x" * 5000)
@example("ab " * 5000)
@example("\u0130\u0307" * 50)
def test_fuzz_equals_openai(tokenizer, openai, text):
    assert tokenizer.encode(text) == openai.encode(text)
    assert torch.equal(tokenizer([text, "hello"]), openai([text, "hello"]))


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(st.one_of(UNICODE, MIXED, LATIN))
def test_long_fuzz_equals_openai(tokenizer, openai, text):
    assert tokenizer.encode(text) == openai.encode(text)


def test_every_code_point_equals_openai(tokenizer, openai):
    """Each alone and between letters; a block of 64 at a time."""
    for first in range(0, 0x3000, 64):
        block = " ".join(f"{chr(c)} a{chr(c)}b" for c in range(first, first + 64))
        assert tokenizer.encode(block) == openai.encode(block), hex(first)


def test_merges_need_no_order_but_rank():
    """OpenAI merges all pairs of the best rank at once, `tokenizers` one by one. The two agree because no merge makes a
    token that a merge of a better rank uses."""
    vocabulary, _ = module._model()
    assert len(vocabulary) == 49408 and vocabulary["<|endoftext|>"] == 49407
    lines = gzip.decompress(module.VOCABULARY.read_bytes()).decode().split("\n")[1:48895]
    merges = [tuple(line.split()) for line in lines]
    best = {}
    for rank, pair in enumerate(merges):
        for part in pair:
            best.setdefault(part, rank)
    assert len(set(merges)) == 48894
    assert all(best.get("".join(pair), rank) >= rank for rank, pair in enumerate(merges))


def test_batches_and_lengths(tokenizer):
    assert tokenizer([]).shape == (0, 77)
    assert torch.equal(tokenizer(["a", "b c"]), torch.cat((tokenizer("a"), tokenizer("b c"))))
    assert torch.equal(tokenizer(("a", "b c")), tokenizer(["a", "b c"]))
    short = evaat_fast.get_tokenizer(context_length=8)
    assert short("one two three four five six seven eight").tolist()[0][-1] == 49407
    assert short.context_length == 8
    assert evaat_fast.get_tokenizer("eva02_at_base_patch16_224").context_length == 77
    assert tokenizer.encode("hello world") == [3306, 1002]


def test_pickles(tokenizer):
    """Data loader workers may be spawned."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy("cut the onion"), tokenizer("cut the onion"))


@pytest.mark.parametrize("bad", [3, None, [b"bytes"], ["a", None], [["a"]]], ids=str)
def test_bad_texts(tokenizer, bad):
    with pytest.raises(TypeError, match="texts: expected a str or a list of str, got"):
        tokenizer(bad)


@pytest.mark.parametrize("bad", [1, 0, 7.0, "77"])
def test_bad_context_length(bad):
    with pytest.raises(ValueError, match="context_length: expected an int of at least 2"):
        CLIPTokenizer(bad)


@pytest.mark.parametrize("library", ["ftfy", "regex", "tokenizers"])
def test_missing_library(monkeypatch, library):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    module._libraries.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"the tokenizer needs {library}: pip install 'evaat-fast\[train\]'"):
        CLIPTokenizer()
