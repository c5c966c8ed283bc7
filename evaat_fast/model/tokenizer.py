"""CLIP's byte-pair tokens, equal to OpenAI's on any Unicode string.

ftfy and regex clean and split the text exactly as CLIP does; the merges are done by the `tokenizers` library.
"""

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
# The special tokens count when they stand in the text, contractions are split off, each digit stands alone.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_letters():
    """A printable character for each byte, in the order of CLIP's vocabulary: printable Latin-1 stands for itself."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@lru_cache(maxsize=1)
def _libraries():
    try:
        import ftfy
        import regex
        import tokenizers
    except ImportError as error:
        raise ImportError(f"the tokenizer needs {error.name}: pip install 'evaat-fast[train]'") from None
    return ftfy, regex, tokenizers


@lru_cache(maxsize=1)
def _model():
    """(vocabulary, BPE model): 256 bytes, 256 bytes that end a word, 48,894 merges, two special tokens."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(_byte_letters().values())
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = _libraries()[2].models.BPE(vocabulary, merges, end_of_word_suffix="</w>", cache_capacity=0)
    return vocabulary, model


class CLIPTokenizer:
    """Text to token ids.

    Args:
        context_length: L.

    Raises:
        ImportError: tokenizers, ftfy or regex is missing; it names the extra to install.
        ValueError: a context length below 2.
    """

    def __init__(self, context_length: int = 77):
        if not isinstance(context_length, int) or context_length < 2:
            raise ValueError(f"context_length: expected an int of at least 2, got {context_length!r}")
        self.context_length = context_length
        self._ftfy, self._regex, _ = _libraries()
        self._pattern = self._regex.compile(PATTERN, self._regex.IGNORECASE)
        vocabulary, self._bpe = _model()
        self.vocab_size = len(vocabulary)
        self.start, self.end = vocabulary[START], vocabulary[END]
        self._letters = _byte_letters()
        self._words = {START: (self.start,), END: (self.end,)}

    def __getstate__(self) -> int:
        """Workers of a data loader that are spawned get the context length and build the rest."""
        return self.context_length

    def __setstate__(self, context_length: int) -> None:
        CLIPTokenizer.__init__(self, context_length)

    def clean(self, text: str) -> str:
        """Repaired by ftfy, HTML unescaped twice, white space collapsed, lower case."""
        text = html.unescape(html.unescape(self._ftfy.fix_text(text))).strip()
        return self._regex.sub(r"\s+", " ", text).strip().lower()

    def encode(self, text: str) -> list[int]:
        """A str to its list of ids, without start and end, of any length."""
        return [i for word in self._pattern.findall(self.clean(text)) for i in self._word(word)]

    def _word(self, word):
        ids = self._words.get(word)
        if ids is None:
            letters = "".join(self._letters[b] for b in word.encode("utf-8"))
            ids = tuple(token.id for token in self._bpe.tokenize(letters))
            if len(self._words) < 100_000 and len(word) < 64:
                self._words[word] = ids
        return ids

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenises a batch.

        Args:
            texts: a str, or a list or tuple of str.

        Returns:
            int64 [B, L]: start, the text, end, zeros. A text that is too long is cut, and its last token is end.

        Raises:
            TypeError: neither a str nor a list or tuple of str.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"texts: expected a str or a list of str, got a {type(texts).__name__}")
        out = torch.zeros(len(texts), self.context_length, dtype=torch.int64, device="cpu")
        for row, text in zip(out, texts, strict=True):
            if not isinstance(text, str):
                raise TypeError(f"texts: expected a str or a list of str, got a {type(text).__name__} in it")
            ids = [self.start, *self.encode(text)[: self.context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids, device="cpu")
        return out
