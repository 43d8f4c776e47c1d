"""Encoding with a faster library than the one that defines a tokenizer, as long as both agree."""

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

# The first characters are compared completely, then a few excerpts of every mebibyte. fastokens is about 100 times as
# fast as tokenizers: comparing 1 KiB of each mebibyte costs about a tenth of the time.
_FIRST_CHARACTERS = 1 << 16
_EXCERPTS = 2
_EXCERPT_CHARACTERS = 512


class EncodedTexts(NamedTuple):
    """The ids of several texts, back to back, and the number of ids of each, ``[num_texts]``."""

    ids: NDArray[Any]
    lengths: NDArray[np.int64]


class UnusedEngine(NamedTuple):
    """The reason for which the fast engine is not used, a clause; ``is_missing`` if it is not installed."""

    reason: str
    is_missing: bool = False


class FastEngine(ABC):
    """A library that reproduces the ids of the defining one, faster."""

    library: ClassVar[str]

    @property
    def name(self) -> str:
        """Name and version of the library."""
        return f"{self.library} {version(self.library)}"

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts. Raises whatever the library raises."""


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
    """The fast engine produced other ids for the text ``index`` of a batch, so that none of its ids can be trusted."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Engine:
    """Encodes with the fast engine of a tokenizer, compared with the defining library, or with that library alone.

    Attributes:
        name: Description of the engine for messages.
        unused: The reason why the fast engine is not used; None if it is used or was not requested.
    """

    def __init__(self, tokenizer: Tokenizer, *, use_fast: bool) -> None:
        self._tokenizer = tokenizer
        fast = _fast_engine(tokenizer) if use_fast else None
        self._fast = fast if isinstance(fast, FastEngine) else None
        self.unused = fast if isinstance(fast, UnusedEngine) else None
        self.name = tokenizer.library
        if self._fast is not None:
            self.name = f"{self._fast.name}, compared with {tokenizer.library}"

    def encode(self, texts: Sequence[str], *, batch_number: int) -> EncodedTexts:
        """Encode a batch of texts; its number determines which excerpts are compared, with any number of processes.

        Raises :class:`DisagreementError` if the engines produce different ids.
        """
        if self._fast is None:
            return _flattened(self._tokenizer.encode_batch(texts))
        for index, excerpt in _excerpts(texts, batch_number):
            found = _encoded_by(self._fast, [excerpt])
            if found is not None and found.ids.tolist() != self._tokenizer.encode(excerpt):
                raise DisagreementError(index)
        if (encoded := _encoded_by(self._fast, texts)) is not None:
            return encoded
        # The defining library encodes texts that the engine refuses, as it does for bytes missing in the vocabulary.
        each = [_encoded_by(self._fast, [text]) or _flattened(self._tokenizer.encode_batch([text])) for text in texts]
        return EncodedTexts(
            np.concatenate([encoded.ids for encoded in each]), np.concatenate([encoded.lengths for encoded in each])
        )


def _fast_engine(tokenizer: Tokenizer) -> FastEngine | UnusedEngine:
    """Return the fast engine for a tokenizer, or the reason why it is not used.

    It is not used if it is not installed, refuses the file, or produces other ids for the texts of :func:`probes`.
    kitoken is not used with a model that normalizes text (nmt_nfkc and the like), for which it was seen to produce
    other ids occasionally.
    """
    kind: type[Fastokens] | type[Kitoken] = Fastokens if isinstance(tokenizer, JsonTokenizer) else Kitoken
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.normalizes_text:
        return UnusedEngine(
            f"{kind.library} is not used with a model that normalizes text, for which it may give other ids"
        )
    try:
        engine = kind(tokenizer)
    except ImportError:
        return UnusedEngine(
            f"{kind.library}, which is faster, is not installed: pip install 'megacore[fast]'", is_missing=True
        )
    except BaseException as error:
        _raise_unless_refusal(error)
        message = (str(error).splitlines() or [type(error).__name__])[0]
        return UnusedEngine(f"{kind.library} {version(kind.library)} refuses {tokenizer.file}: {message}")
    for text in probes(tokenizer.special_tokens()):
        found = _encoded_by(engine, [text])
        if found is not None and found.ids.tolist() != tokenizer.encode(text):
            return UnusedEngine(f"{engine.name} gives other ids for difficult text, {text[:40]!r} for one")
    return engine


def _encoded_by(engine: FastEngine, texts: Sequence[str]) -> EncodedTexts | None:
    """Encode texts with an engine; return None if it refuses one of them."""
    try:
        return engine.encode(texts)
    except BaseException as error:
        _raise_unless_refusal(error)
        return None


def _raise_unless_refusal(error: BaseException) -> None:
    """Raise errors that end the process. (A panic in a Rust library is a BaseException without an importable type.)"""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


def _excerpts(texts: Sequence[str], batch_number: int) -> list[tuple[int, str]]:
    """Return the excerpts to compare, each with the index of its text: the start of batch 0, and samples.

    A batch is about a mebibyte, or a single text of any length: the sample grows with it.
    """
    excerpts = []
    if batch_number == 0:
        room = _FIRST_CHARACTERS
        for index, text in enumerate(texts):
            if room <= 0:
                break
            excerpts.append((index, text[:room]))
            room -= len(text)
    ends = list(accumulate(map(len, texts)))
    if not ends or ends[-1] == 0:
        return excerpts
    mebibytes = max(1, round(ends[-1] / (1 << 20)))
    length = ends[-1] // mebibytes
    for number in range(_EXCERPTS if batch_number == 0 else 0, _EXCERPTS * mebibytes):
        # A digest, so that the same places of an input are compared with any number of processes.
        place = number // _EXCERPTS * length + zlib.crc32(f"{batch_number} {number}".encode()) % length
        index = bisect_right(ends, place)
        text = texts[index]
        start = min(place - (ends[index] - len(text)), max(0, len(text) - _EXCERPT_CHARACTERS))
        excerpts.append((index, text[start : start + _EXCERPT_CHARACTERS]))
    return excerpts


def _flattened(texts: list[list[int]]) -> EncodedTexts:
    ids = array("I")
    for text in texts:
        ids.fromlist(text)  # five times as fast as numpy
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return EncodedTexts(np.frombuffer(ids, np.uint32), lengths)


# --- texts that libraries are known to disagree about

_DIFFICULT_TEXTS = [
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
_CODE_POINTS = [*range(0x3001), 0xFEFF, *range(0xFFF9, 0xFFFC), 0xE0001, 0xE0020, 0xE007F]
"""Code points that include nearly all of the following categories."""
_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of control and format characters and of spaces."""


def probes(special_tokens: list[str]) -> list[str]:
    """Return texts for a first comparison; some of them spell ``special_tokens``, which are the tokenizer's own."""
    characters = [chr(code) for code in _CODE_POINTS if unicodedata.category(chr(code)) in _CATEGORIES]
    with_characters = [f"a{character}b {character} {character}{character}" for character in characters]
    with_tokens = [f"a{token}b {token} c{token}{token}\n{token}" for token in special_tokens]
    return _DIFFICULT_TEXTS + with_characters + with_tokens
