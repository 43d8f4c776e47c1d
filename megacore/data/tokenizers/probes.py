"""Texts that libraries for tokenizing are known to disagree about, to find out before there are any ids."""

from __future__ import annotations

import unicodedata

_TRICKY = [
    "def f(x):\r\n\treturn x  # two  spaces\r\n",
    "\n\n\n a\n b \r c",
    " " * 1 + "x" + " " * 2 + "y" + " " * 17 + "z" + " " * 130,
    "\t" * 9 + "x" + "-" * 70 + "=" * 33 + "0" * 40,
    "1234567 3.14159 1e-10 0xff x1y22z333",
    "I'm you're WE'LL don't 'tis o\u2019clock",
    "naïve nai\u0308ve \uac00\u1100\u1161 \u00bd \ufb01 \uff21 \u2460 \u3392",  # composed, decomposed, compatible
    "中文分词\uff0c没有空格。日本語の文 カタカナ 한국어",
    "العربية لُغَةٌ עברית ไทย हिन्दी",
    "👩‍👩‍👧 🏳️‍🌈 👍🏽 🇫🇷 \U0010ffff \ue000",
    "<s> </s> <unk> <pad> <|endoftext|> [INST] [/INST] <<SYS>> <0x0A> <|im_start|>user<|im_end|>",
    "▁ ▁▁a ▁b",
    "\ufeffx \x00\x00 \ufffd \ufffe",
    "",
    " ",
    "\n",
]
_SEARCHED = [*range(0x3001), 0xFEFF, *range(0xFFF9, 0xFFFC), 0xE0001, 0xE0020, 0xE007F]
"""Code points that have all of the following but a few."""
_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Control and format characters, and all kinds of spaces."""


def probes(special_tokens: list[str]) -> list[str]:
    """The texts; ``special_tokens`` are a tokenizer's own, which text may spell."""
    odd = [chr(code) for code in _SEARCHED if unicodedata.category(chr(code)) in _CATEGORIES]
    by_themselves = [f"a{character}b {character} {character}{character}" for character in odd]
    spelled = [f"a{token}b {token} c{token}{token}\n{token}" for token in special_tokens]
    return _TRICKY + by_themselves + spelled
