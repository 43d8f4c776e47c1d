"""Text of all kinds, as much as is asked for: code, English, Chinese, Arabic, emoji, control characters, spaces."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SPELLED = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<EOD>", "[INST]", "<0x0A>", "▁"]


def mixed_documents(num_bytes: int, *, seed: int = 0) -> Iterator[str]:
    """Documents of some characters up to tens of thousands, until there are ``num_bytes`` of UTF-8."""
    generator = random.Random(seed)
    code = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kinds = [
        lambda: generator.choice(code).read_text(encoding="utf-8"),
        lambda: generator.choice(sorted(topics.values())),
        lambda: _of(generator, (0x4E00, 0x9FFF), (0x3000, 0x30FF), (0x20, 0x7E)),
        lambda: _of(generator, (0x0600, 0x06FF), (0x20, 0x20)),
        lambda: _of(generator, (0x1F300, 0x1FAFF), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F1E6, 0x1F1FF)),
        lambda: _of(generator, (0x00, 0x1F), (0x7F, 0xA0), (0x2028, 0x2029), (0xFEFF, 0xFEFF), (0x61, 0x7A)),
        lambda: _of(generator, (0x0300, 0x036F), (0x61, 0x7A), (0x1100, 0x11FF), (0xAC00, 0xD7A3)),
        lambda: _of(generator, (0xE000, 0xFFFF), (0x10000, 0x10FFFF)),
        lambda: "".join(generator.choice(" \n\t\r\u00a0") * generator.randrange(1, 300) + "x" for _ in range(9)),
        lambda: "".join(generator.choice([*SPELLED, " ", "a", "."]) for _ in range(200)),
        lambda: " ".join(str(generator.randrange(10 ** generator.randrange(1, 20))) for _ in range(100)),
    ]
    while num_bytes > 0:
        text = "".join(generator.choice(kinds)() for _ in range(generator.randrange(1, 4)))
        num_bytes -= len(text.encode())
        yield text


def _of(generator: random.Random, *ranges: tuple[int, int]) -> str:
    """Some characters of the ranges of code points, as many of each range."""
    chosen = [generator.choice(ranges) for _ in range(generator.randrange(1, 2000))]
    return "".join(chr(generator.randint(first, last)) for first, last in chosen)
