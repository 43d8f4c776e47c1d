"""Tokenizers, each run by the library that defines its file: sentencepiece or tokenizers."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from megacore.errors import DataError


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        library: name of the library that defines it.
        file: the file that defines it.
        sha256: that file's digest, hexadecimal.
        vocab_size: the smallest number that is larger than every id.
        bos_id: the id that begins a text, or None where the tokenizer has none.
        eod_id: the id that ends a document (the tokenizer's end of sequence), or None where it is not known.
    """

    library: ClassVar[str]

    def __init__(self, file: Path, *, vocab_size: int, bos_id: int | None, eod_id: int | None) -> None:
        with file.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self.file = file
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eod_id = eod_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no begin or end token is added."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As :meth:`encode` for each text, on all cores."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""


class SentencePieceTokenizer(Tokenizer):
    """A ``tokenizer.model``.

    Text that spells a control token, such as ``</s>``, is encoded as the characters that it is; only symbols which
    the model itself calls user-defined are recognized in text. That is sentencepiece's own rule.
    """

    library = "sentencepiece"

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(file.read_bytes())
        except RuntimeError as error:
            raise DataError(
                f"{file}: is not a SentencePiece model. Some models are published with a file of this name in another "
                f"format; give their tokenizer.json instead"
            ) from error
        # sentencepiece says -1 where the model has no such token.
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        super().__init__(
            file,
            vocab_size=self._processor.vocab_size(),
            bos_id=bos_id if bos_id >= 0 else None,
            eod_id=eos_id if eos_id >= 0 else None,
        )

    @property
    def rewrites_text(self) -> bool:
        """Whether the model changes other characters than spaces, or their number, before it encodes."""
        surrogates = range(0xD800, 0xE000)
        text = "x  y" + "".join(chr(code) for code in range(1, 0x110000) if code not in surrogates) + " "
        return self._processor.normalize(text).lstrip("▁") != text.replace(" ", "▁")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int, add_bos=False, add_eos=False, num_threads=-1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token_id) for token_id in ids])


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, with the names of its begin and end tokens from ``tokenizer_config.json`` beside it.

    Text that spells one of the file's added tokens, special ones included, becomes that token's id. That is the
    tokenizers library's own rule: clean the text of such strings where they must not have that power.
    """

    library = "tokenizers"

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing more special
            raise DataError(f"{file}: cannot be read as a tokenizer: {error}") from error
        # A file may ask for texts to be cut or filled to some length; a document is neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{file}: its vocabulary is empty")
        config = _tokenizer_config(file.with_name("tokenizer_config.json"))
        super().__init__(
            file,
            # Not the number of entries: ids may have gaps.
            vocab_size=max(vocabulary.values()) + 1,
            bos_id=_token_id(vocabulary, config.get("bos_token")),
            eod_id=_token_id(vocabulary, config.get("eos_token")),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file ``*.json`` or ``*.model``, or in a directory that has ``tokenizer`` with such an ending.

    Where a directory has both, ``tokenizer.json`` defines: it is what the model's other users get from that directory,
    and it alone has the tokens that were added after the SentencePiece model was trained. Where there is only
    ``tokenizer.model``, it is used as it is and never converted, since a conversion may give other ids.

    Raises:
        DataError: there is no such file, or it is not a tokenizer.
    """
    path = Path(path)
    kinds: dict[str, type[JsonTokenizer] | type[SentencePieceTokenizer]]
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    if path.is_dir():
        for suffix, kind in kinds.items():
            if (file := path / f"tokenizer{suffix}").is_file():
                return kind(file)
        raise DataError(f"{path}: has neither tokenizer.json nor tokenizer.model")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file or directory; give a tokenizer.json, a tokenizer.model or their directory"
        )
    if path.suffix not in kinds:
        raise DataError(f"{path}: a tokenizer is a file tokenizer.json or tokenizer.model, or a directory with one")
    return kinds[path.suffix](path)


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; nothing where there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: is not a JSON object")
    return config


def _token_id(vocabulary: dict[str, int], token: str | dict[str, Any] | None) -> int | None:
    """The id of a token that the configuration names by its text, or by an object with the text under ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else vocabulary.get(text)
