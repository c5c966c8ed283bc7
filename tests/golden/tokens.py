"""OpenAI's token ids for awkward texts, from the copy of OpenAI's code in open_clip.

    cd tests && python -m golden.tokens

writes tokens.json beside this file. It needs open_clip; the test that reads it does not.
"""

import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
TEXTS = [
    "",
    " ",
    "hello world",
    "#C C cuts the onion with a knife, then puts it down.",
    "#O A man X picks up 2 spoons & 13 forks",
    "Don't you'll I'VE we're it's 'tis o'clock 'S",
    "naïve café ÅNGSTRÖM straße İstanbul ΑΣ ΣΑΣ",
    "e\u0301 a\u0308 n\u0303o \u1e9b\u0323",
    "日本語のテキスト 한국어 中文字符 ไทย",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "👩‍🍳🔪🧅 ✋🏽 🇩🇪 ☕️ 1️⃣",
    "&lt;b&gt; &amp;amp; &amp;lt; &#x41; &#128512; &nbsp;x &bogus; &notit;",
    "<|startoftext|>inside<|endoftext|> <|EndOfText|> <|ſtartoftext|> <start_of_text> <|",
    "tab\tnew\nline\r\nfeed\x0cvertical\x0bnull\x00bell\x07del\x7fnel\x85\u2028\u2029\u00a0\u3000end",
    "x\x1cy\x1dz &#x1c; &#11; &#133;",
    "\u200bzero\u200dwidth\ufeff \ufffd \ud83d \U000e0041 \U0010ffff",
    "â€œmojibakeâ€\x9d schÃ¶n l’humanitÃ© “curly” ‘quotes’ ﬁﬂ ｆｕｌｌ ¼ ² Ⅷ ٣ ३",
    "K Å ſ 'ſ ß ẞ ǅ ŉ",
    "____ --- ... !?!?!? $$$ €9.99 1,000,000 3.14159 a1b2c3 _x_",
    "https://example.org/a?b=c&d=e#f user@mail.com C:\\path \\n",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 300,
    "ab" * 200 + " " + "🙂" * 100,
    "word " * 75,
    "word " * 74 + "last",
    "word " * 100,
]


def openai_tokenizer():
    """open_clip's SimpleTokenizer, an edited copy of OpenAI's, with OpenAI's spelling of the special tokens."""
    from peers import peer

    tokenizer = peer("open_clip.tokenizer").SimpleTokenizer()
    words = {"<|startoftext|>": tokenizer.sot_token_id, "<|endoftext|>": tokenizer.eot_token_id}
    regex = peer("regex")
    tokenizer.cache = {word: word for word in words}
    tokenizer.encoder.update(words)
    tokenizer.pat = regex.compile(
        r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""",
        regex.IGNORECASE,
    )
    return tokenizer


def main():
    ids = [row[: int(row.nonzero().max()) + 1].tolist() for row in openai_tokenizer()(TEXTS)]
    FILE.write_text(json.dumps(ids))


if __name__ == "__main__":
    main()
