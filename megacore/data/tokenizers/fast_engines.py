"""Text to token ids: the library that defines a tokenizer, or a faster one for as long as both agree."""

from __future__ import annotations

import importlib
import unicodedata
import zlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.data.tokenizers.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

# At the start all texts are compared, as far as these many characters go; later a few passages of every mebibyte.
# fastokens is some 100 times as fast as tokenizers: of each mebibyte, 1 KiB that both encode costs about a tenth.
_FIRST_CHARACTERS = 1 << 16
_PASSAGES = 2
_PASSAGE_CHARACTERS = 512


class EncodedTexts(NamedTuple):
    """The ids of several texts, back to back, and how many each has, ``[num_texts]``."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]


class LeftOut(NamedTuple):
    """Why the fast engine does not do the work."""

    reason: str
    """For people, a clause."""
    is_missing: bool = False
    """Whether it would perhaps, if it were installed."""


class FastEngine(ABC):
    """A library that is made to give the ids of the defining one, faster."""

    library: ClassVar[str]

    @property
    def name(self) -> str:
        """The library and its version."""
        return f"{self.library} {version(self.library)}"

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """The ids of texts. Raises whatever the library raises."""


class Fastokens(FastEngine):
    """fastokens, for a ``tokenizer.json``."""

    library = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = importlib.import_module(self.library).Tokenizer.from_json_str(
            tokenizer.definition.decode()
        )
        self._tokenizer.no_truncation()

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        ids, ends = self._tokenizer.encode_batch_flat(list(texts), add_special_tokens=False)
        offsets = np.frombuffer(ends, "<u8").astype(np.int64)
        return EncodedTexts(np.frombuffer(ids, "<u4"), offsets[1:] - offsets[:-1])


class Kitoken(FastEngine):
    """kitoken, for a ``tokenizer.model``."""

    library = "kitoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = importlib.import_module(self.library).Kitoken.from_sentencepiece(tokenizer.definition)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        return _flattened(self._tokenizer.encode_all(list(texts), False))


class DisagreementError(Exception):
    """The fast engine gives other ids than the defining one for a text: what it has encoded cannot be trusted.

    Attributes:
        index: of the text among those encoded.
    """

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Engine:
    """Encodes with the fast engine of a tokenizer, comparing with the defining one, or with the defining one alone.

    Attributes:
        name: what does the work, for people.
        left_out: why that is the defining one alone; None where it is not, or was asked for.
    """

    def __init__(self, tokenizer: Tokenizer, *, use_fast: bool) -> None:
        self._tokenizer = tokenizer
        fast = _fast_engine(tokenizer) if use_fast else None
        self._fast = fast if isinstance(fast, FastEngine) else None
        self.left_out = fast if isinstance(fast, LeftOut) else None
        self.name = tokenizer.library
        if self._fast is not None:
            self.name = f"{self._fast.name}, compared with {tokenizer.library}"

    def encode(self, texts: Sequence[str], *, batch_number: int) -> EncodedTexts:
        """The ids of a batch of texts; its number decides which passages are compared, on any number of processes.

        Raises:
            DisagreementError: when the engines do.
        """
        if self._fast is None:
            return _encoded_by_definition(self._tokenizer, texts)
        for index, passage in _passages(texts, batch_number):
            found = _encoded_by(self._fast, [passage])
            if found is not None and found.ids.tolist() != self._tokenizer.encode(passage):
                raise DisagreementError(index)
        if (encoded := _encoded_by(self._fast, texts)) is not None:
            return encoded
        # A text that it refuses (a byte that the vocabulary lacks, for one) is the defining library's to encode.
        each = [_encoded_by(self._fast, [text]) or _encoded_by_definition(self._tokenizer, [text]) for text in texts]
        return EncodedTexts(
            np.concatenate([encoded.ids for encoded in each]), np.concatenate([encoded.lengths for encoded in each])
        )


def _fast_engine(tokenizer: Tokenizer) -> FastEngine | LeftOut:
    """The fast engine for a tokenizer, or why it is of no use.

    That is so where it is not installed, does not take the file, or gives other ids for texts that are known to be
    difficult; and kitoken, where a model rewrites text (nmt_nfkc and the like): it was seen to give other ids then, now
    and again.
    """
    kind: type[Fastokens] | type[Kitoken] = Fastokens if isinstance(tokenizer, JsonTokenizer) else Kitoken
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.rewrites_text:
        return LeftOut(f"{kind.library} is not used with a model that rewrites text, for which it may give other ids")
    try:
        engine = kind(tokenizer)
    except ImportError:
        return LeftOut(
            f"{kind.library}, which is faster, is not installed: pip install 'megacore[fast]'", is_missing=True
        )
    except BaseException as error:
        _pass_on_what_ends_the_process(error)
        told = (str(error).splitlines() or [type(error).__name__])[0]
        return LeftOut(f"{kind.library} {version(kind.library)} does not take {tokenizer.file}: {told}")
    for text in probes(tokenizer.special_tokens()):
        found = _encoded_by(engine, [text])
        if found is not None and found.ids.tolist() != tokenizer.encode(text):
            return LeftOut(f"{engine.name} gives other ids for difficult text, {text[:40]!r} for one")
    return engine


def _encoded_by(engine: FastEngine, texts: Sequence[str]) -> EncodedTexts | None:
    """The ids that the engine gives; None where it refuses one of the texts."""
    try:
        return engine.encode(texts)
    except BaseException as error:
        _pass_on_what_ends_the_process(error)
        return None


def _encoded_by_definition(tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedTexts:
    return _flattened(tokenizer.encode_batch(texts))


def _pass_on_what_ends_the_process(error: BaseException) -> None:
    """A panic in a library written in Rust arrives as a BaseException of no type that could be named in an except."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def _passages(texts: Sequence[str], batch_number: int) -> list[tuple[int, str]]:
    """What both engines encode, each with the index of its text: of the first batch the beginning, then a sample.

    A batch is about a mebibyte, or one text that may be of any length: the sample grows with it.
    """
    passages = []
    if batch_number == 0:
        room = _FIRST_CHARACTERS
        for index, text in enumerate(texts):
            if room <= 0:
                break
            passages.append((index, text[:room]))
            room -= len(text)
    ends = list(accumulate(map(len, texts)))
    if not ends or ends[-1] == 0:
        return passages
    mebibytes = max(1, round(ends[-1] / (1 << 20)))
    length = ends[-1] // mebibytes
    for number in range(_PASSAGES if batch_number == 0 else 0, _PASSAGES * mebibytes):
        # A digest, so that the same input is compared in the same places whatever the processes.
        place = number // _PASSAGES * length + zlib.crc32(f"{batch_number} {number}".encode()) % length
        index = bisect_right(ends, place)
        text = texts[index]
        start = min(place - (ends[index] - len(text)), max(0, len(text) - _PASSAGE_CHARACTERS))
        passages.append((index, text[start : start + _PASSAGE_CHARACTERS]))
    return passages


def _flattened(texts: list[list[int]]) -> EncodedTexts:
    ids = array("I")
    for text in texts:
        ids.fromlist(text)  # five times as fast as numpy
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return EncodedTexts(np.frombuffer(ids, np.uint32), lengths)


# --- difficult texts

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
