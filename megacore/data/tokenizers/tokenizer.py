"""Tokenizers, each backed by the library that defines its file: sentencepiece or tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megacore.atomic_output import StagedFiles, output_errors, require_name
from megacore.data.tokenizers.added_tokens import NewTokens, extend_sentencepiece, extend_tokenizer_json
from megacore.errors import DataError, OutputError

EOD_TOKEN = "<EOD>"
"""The token that ends a document in vocabularies that have it; in others the end-of-sequence token does."""

_COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files about the use of a tokenizer, which do not affect its ids."""

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        definition: Content of that file, with the added tokens.
        sha256: Hexadecimal digest of ``definition``.
        library: The library that defines the ids, and its version.
        vocab_size: The smallest number that is larger than every id.
        new_tokens: The tokens that were added to the file's vocabulary, and their ids.
        bos_id: The id that begins a text, or None if the tokenizer has none.
        eod_id: The id that ends a document (``<EOD>`` or the end of sequence), or None if it is not known.
    """

    library: str

    def __init__(
        self,
        file: Path,
        *,
        definition: bytes,
        vocab_size: int,
        new_tokens: Mapping[str, int],
        bos_id: int | None,
        eod_id: int | None,
    ) -> None:
        self.sha256 = hashlib.sha256(definition).hexdigest()
        self.file = file
        self.definition = definition
        self.vocab_size = vocab_size
        self.new_tokens = dict(new_tokens)
        self.bos_id = bos_id
        self.eod_id = eod_id

    def encode(self, text: str) -> list[int]:
        """Encode a text, without begin or end token."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts on all cores."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of a token, special or not, or None if there is no such token."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return all tokens, as the tokenizer's file spells them, and their ids."""

    def known_tokens_sha256(self) -> str:
        """Return the digest of the file's tokens without the new ones; see :func:`digest_of_tokens`."""
        return digest_of_tokens(self.vocabulary(), min(self.new_tokens.values(), default=self.vocab_size))

    @abstractmethod
    def special_tokens(self) -> list[str]:
        """Return the tokens that stand for more than their text, as text spells them, without those of single bytes."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""

    @abstractmethod
    def is_byte(self, token_id: int) -> bool:
        """Return whether a token is a single byte, which is decoded together with the bytes beside it."""

    @property
    @abstractmethod
    def adds_bos(self) -> bool:
        """True if a prompt begins with ``bos_id``, according to the tokenizer's files."""


class SentencePieceTokenizer(Tokenizer):
    """A ``tokenizer.model``.

    Text that spells a control token, such as ``</s>``, is encoded as plain characters; only user-defined symbols of the
    model are recognized in text. That is sentencepiece's own rule.

    Raises:
        DataError: The file is no such model, or files beside it define tokens with ids that it does not have.
    """

    def __init__(self, file: Path, new_tokens: NewTokens = NewTokens()) -> None:  # noqa: B008 (it is frozen)
        import sentencepiece

        self.library = f"sentencepiece {sentencepiece.__version__}"
        definition = file.read_bytes()
        processor = _load_sentencepiece(definition, file)
        num_known = processor.vocab_size()
        _refuse_tokens_beside(file, num_known)
        if new_tokens:
            known = (processor.id_to_piece(piece) for piece in range(num_known))
            definition = extend_sentencepiece(definition, new_tokens, known=known, has_padding=processor.pad_id() >= 0)
            processor = _load_sentencepiece(definition, file)
        self._processor = processor
        self.num_threads = -1  # that encode a batch: one per core
        vocab_size = processor.vocab_size()
        added = {processor.id_to_piece(piece): piece for piece in range(num_known, vocab_size)}
        # sentencepiece returns -1 for a token that the model does not have.
        bos_id, eos_id = processor.bos_id(), processor.eos_id()
        eod_id = self.token_id(EOD_TOKEN)
        super().__init__(
            file,
            definition=definition,
            vocab_size=vocab_size,
            new_tokens=added,
            bos_id=bos_id if bos_id >= 0 else None,
            eod_id=eos_id if eod_id is None and eos_id >= 0 else eod_id,
        )

    @property
    def normalizes_text(self) -> bool:
        """True if the model changes characters other than spaces, or their number, before encoding."""
        codes = array("I", [*range(1, 0xD800), *range(0xE000, 0x110000)])  # all but surrogates
        every_character = codes.tobytes().decode(f"utf-32-{sys.byteorder[0]}e")  # ten times as fast as chr for each
        text = f"x  y{every_character} "
        normalized: str = self._processor.normalize(text)
        return normalized.lstrip("▁") != text.replace(" ", "▁")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        threads = 1 if len(texts) == 1 else self.num_threads
        ids: list[list[int]] = self._processor.encode(
            list(texts), out_type=int, add_bos=False, add_eos=False, num_threads=threads
        )
        return ids

    def token_id(self, token: str) -> int | None:
        piece = self._processor.piece_to_id(token)  # the unknown token, if there is no such piece
        return piece if self._processor.id_to_piece(piece) == token else None

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(piece): piece for piece in range(self.vocab_size)}

    def control_tokens(self) -> list[str]:
        """Return the control tokens, such as ``</s>``, which text is never encoded to."""
        model = self._processor
        return [model.id_to_piece(piece) for piece in range(model.vocab_size()) if model.is_control(piece)]

    def special_tokens(self) -> list[str]:
        model = self._processor
        # sentencepiece has no query for user-defined symbols; they have the score 0, as few others do.
        return [
            model.id_to_piece(piece)
            for piece in range(model.vocab_size())
            if model.is_control(piece) or (model.get_score(piece) == 0.0 and not model.is_byte(piece))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token_id) for token_id in ids]))

    def is_byte(self, token_id: int) -> bool:
        return bool(self._processor.is_byte(token_id))

    @property
    def adds_bos(self) -> bool:
        # The file has no such setting; prompts of models that are published with one begin with it.
        setting = json_object(self.file.with_name("tokenizer_config.json")).get("add_bos_token", True)
        return bool(setting) and self.bos_id is not None


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, with the names of its begin and end tokens from the files beside it.

    Text that spells one of the file's added tokens, special or not, is encoded to that token. That is the tokenizers
    library's own rule: remove such strings from the text if they must not have that effect.
    """

    def __init__(self, file: Path, new_tokens: NewTokens = NewTokens()) -> None:  # noqa: B008 (it is frozen)
        import tokenizers

        self.library = f"tokenizers {tokenizers.__version__}"
        definition = file.read_bytes()
        try:
            tokenizer = tokenizers.Tokenizer.from_str(definition.decode())
        except Exception as error:  # the library raises no other type
            raise DataError(f"{file}: cannot be read as a tokenizer: {error}") from error
        names = special_token_names(file.parent)
        known = tokenizer.get_vocab(with_added_tokens=True)
        if not known:
            raise DataError(f"{file}: its vocabulary is empty")
        if new_tokens:
            has_padding = names.get("pad_token") in known
            extend_tokenizer_json(tokenizer, new_tokens, has_padding=has_padding)
            definition = tokenizer.to_str(pretty=True).encode()
        # A file may request truncation or padding, which documents must not get.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The post-processor adds no token here, but may remove white space from the offsets of a token.
        self._post_processor, tokenizer.post_processor = tokenizer.post_processor, None
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True) if new_tokens else known
        added = sorted(vocabulary.keys() - known, key=vocabulary.__getitem__)
        # The library takes the number of entries as the next id, instead of the largest id + 1.
        if added and vocabulary[added[0]] <= max(known.values()):
            raise DataError(
                f"{file}: its ids have gaps, and the tokenizers library would put the new token {added[0]} in one, at "
                f"{vocabulary[added[0]]}, and the next ones onto ids that are taken: leave the vocabulary as it is "
                f"(--no-new-tokens), or add the tokens to the file"
            )
        ids = {name: vocabulary.get(token) for name, token in names.items()}
        super().__init__(
            file,
            definition=definition,
            # Not the number of entries: ids may have gaps.
            vocab_size=max(vocabulary.values()) + 1,
            new_tokens={token: vocabulary[token] for token in added},
            bos_id=ids.get("bos_token"),
            eod_id=vocabulary.get(EOD_TOKEN, ids.get("eos_token")),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode texts like :meth:`encode_batch`; return ids and the characters of each token.

        The latter are ``(start, stop)``, equal for a token that stands for no character.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=False)

    def is_byte(self, token_id: int) -> bool:
        return re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(token_id) or "") is not None

    @property
    def adds_bos(self) -> bool:
        if self.bos_id is None or self._post_processor is None:
            return False
        without = self._tokenizer.encode("a")
        with_special = self._post_processor.process(without).ids
        return bool(with_special[:1] == [self.bos_id] != without.ids[:1])


def load_tokenizer(path: str | Path, new_tokens: NewTokens = NewTokens()) -> Tokenizer:  # noqa: B008 (it is frozen)
    """Load the tokenizer in a file ``*.json`` or ``*.model``, or in a directory with ``tokenizer.json`` or ``.model``.

    In a directory with both, ``tokenizer.json`` is used: other programs use it too, and it alone has the tokens that
    were added after the SentencePiece model was trained. A lone ``tokenizer.model`` is used as it is and never
    converted, since a conversion may produce other ids.

    ``new_tokens`` are added in memory; the file is not changed.

    Raises:
        DataError: There is no such file, it is not a tokenizer, or it is a ``tokenizer.model`` that lacks tokens which
            files beside it add.
    """
    path = Path(path)
    kinds: dict[str, type[JsonTokenizer] | type[SentencePieceTokenizer]]
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    if path.is_dir():
        for suffix, kind in kinds.items():
            if (file := path / f"tokenizer{suffix}").is_file():
                return kind(file, new_tokens)
        raise DataError(f"{path}: has neither tokenizer.json nor tokenizer.model")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file or directory; give a tokenizer.json, a tokenizer.model or their directory"
        )
    if path.suffix not in kinds:
        raise DataError(f"{path}: a tokenizer is a file tokenizer.json or tokenizer.model, or a directory with one")
    return kinds[path.suffix](path, new_tokens)


def digest_of_tokens(vocabulary: Mapping[str, int], num_ids: int) -> str:
    """Return the hexadecimal SHA-256 of the tokens of the first ``num_ids`` ids.

    It is the same for all tokenizers in which these ids stand for the same tokens, whatever their other ids are and
    however they encode.
    """
    tokens: list[str | None] = [None] * num_ids
    for token, number in vocabulary.items():
        if number < num_ids:
            tokens[number] = token
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def special_token_names(directory: Path) -> dict[str, str]:
    """Return the text of the special tokens of the tokenizer in ``directory``, by name (``bos_token``, ``eos_token``…).

    They stand in ``tokenizer_config.json``. If that does not list the added tokens, as old ones do not,
    ``special_tokens_map.json`` has precedence. That is the rule of transformers.
    """
    config = json_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= json_object(directory / "special_tokens_map.json")
    texts = {
        name: token.get("content") if isinstance(token := config.get(name), dict) else token
        for name in _SPECIAL_TOKEN_NAMES
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or ``{}`` without the file. Raises :class:`DataError` if it holds no object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object")
    return content


def directory_beside(prefix: Path) -> Path:
    """Return the directory of the tokenizer of a dataset with new tokens."""
    require_name(prefix)
    return prefix.with_name(f"{prefix.name}-tokenizer")


def is_saved(tokenizer: Tokenizer, directory: Path) -> bool:
    """Return whether the tokenizer is in ``directory``. Raises :class:`OutputError` if something else is."""
    with output_errors(directory):
        if not directory.exists():
            return False
        copy = directory / _file_name(tokenizer)
        if copy.is_file() and copy.read_bytes() == tokenizer.definition:
            return True
    raise OutputError(
        f"{directory} exists already, with another tokenizer. Nothing is overwritten: name another output, or remove "
        "it first"
    )


def save_tokenizer(tokenizer: Tokenizer, directory: Path, files: StagedFiles) -> None:
    """Write the tokenizer, with its new tokens, to ``directory``, and copy the files beside it that describe its use.

    The directory appears together with ``files``.

    Raises:
        OutputError: The directory exists with another tokenizer, is being written by another process, or cannot be
            written.
    """
    if is_saved(tokenizer, directory):
        return
    files.claim(directory)
    staged = files.path(directory)
    with output_errors(directory):
        staged.mkdir()
        (staged / _file_name(tokenizer)).write_bytes(tokenizer.definition)
        for name in _COMPANION_FILES:
            if (companion := tokenizer.file.with_name(name)).is_file():
                shutil.copyfile(companion, staged / name)


def _file_name(tokenizer: Tokenizer) -> str:
    return f"tokenizer{tokenizer.file.suffix}"


def _refuse_tokens_beside(file: Path, num_known: int) -> None:
    """Raise :class:`DataError` if a file beside a ``tokenizer.model`` adds tokens after its own.

    Many fine-tuned models are published like this. Without these tokens text would get other ids than in their
    training, and new tokens would get the ids of these. Often such a file only repeats ``<s>`` and the like.
    """
    for name in ("added_tokens.json", "tokenizer_config.json"):
        beyond = {token: number for token, number in _added_by(file.with_name(name)).items() if number >= num_known}
        if not beyond:
            continue
        replacement = file.with_name("tokenizer.json")
        remedy = (
            f"give {replacement} instead, which has them"
            if replacement.is_file()
            else "give the model's tokenizer.json instead; where there is none, transformers makes one: "
            f"AutoTokenizer.from_pretrained({str(file.parent)!r}).save_pretrained(DIRECTORY)"
        )
        some = ", ".join(f"{token!r} ({number})" for token, number in list(beyond.items())[:3])
        raise DataError(
            f"{file}: its {num_known} tokens are not all tokens of the model: {name} beside it adds "
            f"{some}{' and others' if len(beyond) > 3 else ''}: {remedy}"
        )


def _added_by(path: Path) -> dict[str, int]:
    """Return the tokens and ids of an ``added_tokens.json``, or of the ``added_tokens_decoder`` of a configuration."""
    content = json_object(path)
    try:
        if path.name != "added_tokens.json":
            listed = content.get("added_tokens_decoder") or {}
            content = {token["content"]: number for number, token in listed.items()}
        return {token: int(number) for token, number in content.items()}
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: its added tokens are not tokens with an id each") from error


def _load_sentencepiece(definition: bytes, file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(definition)
    except RuntimeError as error:
        raise DataError(
            f"{file}: is not a SentencePiece model. Some models are published with a file of this name in another "
            f"format; give their tokenizer.json instead"
        ) from error
    return processor
