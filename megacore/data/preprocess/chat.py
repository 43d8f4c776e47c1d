"""``tokenize_chat``: conversations to instruction data, with who speaks at each token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megacore.data.datasets.indexed import token_dtype
from megacore.data.datasets.instruction import InstructionDescription, Role, writing_instruction_data
from megacore.data.preprocess.conversations import Conversation, MessageKeys, QuestionKeys, read_conversations
from megacore.data.preprocess.readers import expand
from megacore.data.preprocess.records import require_encodable
from megacore.data.tokenizers.added_tokens import NewTokens
from megacore.data.tokenizers.chat_template import open_chat_template
from megacore.data.tokenizers.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    directory_beside,
    is_saved,
    load_tokenizer,
    save_tokenizer,
)
from megacore.errors import DataError

_BATCH_CHARACTERS = 1 << 20
_BATCH_CONVERSATIONS = 1024

Markup = Literal["template", "megatron-llm"]


@dataclass(frozen=True, kw_only=True)
class ChatSummary:
    """What :func:`tokenize_chat` wrote."""

    prefix: Path
    num_conversations: int
    num_tokens: int
    num_assistant_tokens: int
    """Those that are learned."""
    num_skipped: int
    """Records that could not be used."""
    num_with_special_tokens: int
    """Conversations with text that spells special tokens, which it has become."""
    new_tokens: dict[str, int]
    """The tokens that were added to the tokenizer, and their ids."""
    tokenizer_directory: Path | None
    """Where the tokenizer with these tokens is; None where none was added."""


@dataclass(frozen=True)
class _Piece:
    """Text that is encoded by itself.

    Attributes:
        text: the text.
        spans: ``(start, stop, role)``: who writes which of its characters; the others are the prompter's.
    """

    text: str
    spans: list[tuple[int, int, Role]]


class _Encoder(Protocol):
    """What makes tokens of conversations."""

    template_sha256: str | None
    special_tokens: list[str]
    """What text that spells it becomes one token."""

    def pieces(self, conversation: Conversation) -> list[_Piece]:
        """The text of a conversation. Raises :class:`DataError` for one that cannot be written."""

    def encode(self, pieces: Sequence[_Piece]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The ids and roles of each piece."""


def tokenize_chat(
    inputs: str | Path | Iterable[str | Path],
    *,
    tokenizer: str | Path,
    out: str | Path,
    keys: MessageKeys | QuestionKeys | None = None,
    markup: Markup | None = None,
    chat_template: str | Path | None = None,
    vocab_extra_ids_list: Sequence[str] = (),
    on_error: Literal["stop", "skip"] = "stop",
    on_skip: Callable[[DataError], None] = lambda error: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> ChatSummary:
    """Tokenize conversations into the instruction dataset ``out``; :mod:`megacore.data.datasets.instruction` has its
    files.

    Inputs are files of lines or rows as :func:`~megacore.data.tokenize` takes them, one conversation each.

    Args:
        inputs: files, or patterns such as ``data/*.jsonl``.
        tokenizer: a tokenizer's file or directory. Text that spells a special token becomes that token, as it does in
            transformers; such conversations are counted.
        keys: where a record has its conversation; by default a list under ``messages``.
        markup: ``template``, a chat template; or ``megatron-llm``, ``<|im_start|>question\\n…<|im_end|>\\n`` with the
            roles system, question and answer, which that program writes, each turn encoded by itself, its header and
            end learned with an answer. By default the latter for questions and answers, else the former.
        chat_template: a file with the template; by default it is the tokenizer's.
        vocab_extra_ids_list: add these tokens to the vocabulary; the tokenizer that knows them is written to
            ``out-tokenizer/``.
        on_error: what to do about a record that cannot be used.
        on_skip: is told of each record that is skipped.
        advance: is told of every few input bytes done.

    Raises:
        DataError: an input, the tokenizer or the template is missing or malformed, or a record (the message has file
            and line), or no record can be used.
        OutputError: an output file exists or cannot be written. After any error nothing is left of the dataset.
    """
    paths = expand([inputs] if isinstance(inputs, str | Path) else inputs)
    keys = keys or MessageKeys()
    markup = markup or ("megatron-llm" if isinstance(keys, QuestionKeys) else "template")
    loaded = load_tokenizer(tokenizer, NewTokens(named=tuple(vocab_extra_ids_list)))
    tokenizer_directory = directory_beside(Path(out)) if loaded.new_tokens else None
    if tokenizer_directory is not None:
        is_saved(loaded, tokenizer_directory)  # refused now, not after the work
    encoder: _Encoder
    if markup == "template":
        encoder = _TemplateEncoder(loaded, None if chat_template is None else Path(chat_template))
    elif chat_template is not None:
        raise DataError(f"the chat template {chat_template} has no effect with the markup of megatron-llm; give one")
    else:
        encoder = _MegatronLlmEncoder(loaded)
    special = re.compile("|".join(map(re.escape, encoder.special_tokens)) or "(?!)")

    num_skipped = num_conversations = num_tokens = num_assistant_tokens = num_with_special_tokens = 0
    first_error: DataError | None = None

    def skip(error: DataError) -> None:
        nonlocal num_skipped, first_error
        if on_error == "stop":
            raise error
        first_error = first_error or error
        num_skipped += 1
        on_skip(error)

    def written() -> Iterator[tuple[Conversation, list[_Piece]]]:
        files = (read_conversations(path, keys, on_error=skip, advance=advance) for path in paths)
        for conversation in chain.from_iterable(files):
            try:
                pieces = encoder.pieces(conversation)
                for piece in pieces:
                    require_encodable(piece.text)
            except DataError as error:
                skip(DataError(f"{conversation.where}: {error}"))
                continue
            yield conversation, pieces

    with writing_instruction_data(out, token_dtype(loaded.vocab_size)) as writer:
        for batch in _batches(written()):
            encoded = encoder.encode([piece for _, pieces in batch for piece in pieces])
            for conversation, pieces in batch:
                of_pieces = [next(encoded) for _ in pieces]
                ids, roles = (np.concatenate(arrays) for arrays in zip(*of_pieces, strict=True))
                num_assistant = int(np.count_nonzero(roles == Role.ASSISTANT))
                if num_assistant == 0:
                    message = f"{conversation.where}: none of its tokens is the assistant's: nothing to learn from it"
                    skip(DataError(message))
                    continue
                writer.add(ids, roles)
                num_conversations += 1
                num_tokens += len(ids)
                num_assistant_tokens += num_assistant
                num_with_special_tokens += any(
                    special.search(str(message.get("content", ""))) for message in conversation.messages
                )
        if num_conversations == 0:
            told = f"; the first of {num_skipped} that were skipped: {first_error}" if first_error else ""
            raise DataError(f"{', '.join(map(str, paths)) or 'no input file'}: no conversation to tokenize{told}")
        writer.description = InstructionDescription(
            tokenizer_file=loaded.file.name,
            tokenizer_sha256=loaded.sha256,
            vocab_size=loaded.vocab_size,
            markup=markup,
            template_sha256=encoder.template_sha256,
            num_conversations=num_conversations,
            num_tokens=num_tokens,
            num_assistant_tokens=num_assistant_tokens,
            megacore_version=version("megacore"),
            new_tokens=loaded.new_tokens,
            known_tokens_sha256=loaded.known_tokens_sha256(),
            tokenizer_directory=tokenizer_directory.name if tokenizer_directory is not None else None,
        )
        if tokenizer_directory is not None:
            save_tokenizer(loaded, tokenizer_directory, writer.files)
    return ChatSummary(
        prefix=Path(out),
        num_conversations=num_conversations,
        num_tokens=num_tokens,
        num_assistant_tokens=num_assistant_tokens,
        num_skipped=num_skipped,
        num_with_special_tokens=num_with_special_tokens,
        new_tokens=loaded.new_tokens,
        tokenizer_directory=tokenizer_directory,
    )


def _batches(
    written: Iterable[tuple[Conversation, list[_Piece]]],
) -> Iterator[list[tuple[Conversation, list[_Piece]]]]:
    batch: list[tuple[Conversation, list[_Piece]]] = []
    num_characters = 0
    for conversation, pieces in written:
        batch.append((conversation, pieces))
        num_characters += sum(len(piece.text) for piece in pieces)
        if num_characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_CONVERSATIONS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


class _TemplateEncoder:
    """Conversations as a chat template writes them, encoded as a whole; the characters say whose each token is.

    A token that has a character of the assistant's is the assistant's.
    """

    def __init__(self, tokenizer: Tokenizer, template_file: Path | None) -> None:
        self._with_tools, self._template = (
            open_chat_template(tokenizer, template_file, with_tools=with_tools) for with_tools in (True, False)
        )
        assert isinstance(tokenizer, JsonTokenizer), "a chat template takes no other"
        self._tokenizer = tokenizer
        self.special_tokens = tokenizer.special_tokens()
        self.template_sha256: str | None = hashlib.sha256(self._template.source.encode()).hexdigest()

    def pieces(self, conversation: Conversation) -> list[_Piece]:
        template = self._template if conversation.tools is None else self._with_tools
        chat = template.render_marked(conversation.messages, tools=conversation.tools)
        spans = [(0, chat.system_stop, Role.SYSTEM)] if chat.system_stop else []
        return [_Piece(chat.text, spans + [(start, stop, Role.ASSISTANT) for start, stop in chat.assistant])]

    def encode(self, pieces: Sequence[_Piece]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        encoded = self._tokenizer.encode_with_places([piece.text for piece in pieces])
        for piece, (ids, of_ids) in zip(pieces, encoded, strict=True):
            places = np.array(of_ids, np.int64).reshape(-1, 2)
            # A token may stand for no character, such as a sign for the beginning of a word: it is of the next one.
            starts, stops = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
            roles = np.full(len(places), Role.PROMPTER, np.int64)
            for start, stop, role in piece.spans:
                roles[(starts < stop) & (stops > start)] = role
            yield np.array(ids, np.int64), roles


class _MegatronLlmEncoder:
    """Turns as Megatron-LLM writes them, each encoded by itself."""

    template_sha256: str | None = None

    _MARKS: ClassVar = ("<|im_start|>", "<|im_end|>")
    _NAMES: ClassVar = {
        "system": ("system", Role.SYSTEM),
        "user": ("question", Role.PROMPTER),
        "assistant": ("answer", Role.ASSISTANT),
    }

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = tokenizer.special_tokens()
        self._tokens: re.Pattern[str] | None = None
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokens = {*tokenizer.control_tokens(), *tokenizer.new_tokens, *self._MARKS}
            self.special_tokens = sorted(tokens, key=len, reverse=True)
            self._tokens = re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})")
        for token in self._MARKS:
            # Twice, since sentencepiece may put a piece for a space before the first.
            once, twice = tokenizer.encode_batch([token, token + token])
            if len(twice) - len(once) != 1:
                raise DataError(
                    f"{tokenizer.file}: does not know {token} as a token, which the markup of megatron-llm needs: add "
                    "both with --vocab-extra-ids-list '<|im_start|>,<|im_end|>' and give the model rows for them "
                    "(--add-tokens), or write the conversations with a chat template"
                )

    def pieces(self, conversation: Conversation) -> list[_Piece]:
        pieces = []
        for number, message in enumerate(conversation.messages, start=1):
            if message["role"] not in self._NAMES or not isinstance(message.get("content"), str):
                raise DataError(
                    f"message {number}: the markup of megatron-llm has text of {', '.join(self._NAMES)}, and nothing "
                    f"else; not {json.dumps(message)[:40]}"
                )
            name, role = self._NAMES[message["role"]]
            text = f"<|im_start|>{name}\n{message['content']}<|im_end|>\n"
            pieces.append(_Piece(text, [(0, len(text), role)]))
        return pieces

    def encode(self, pieces: Sequence[_Piece]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        parts = [self._parts(piece.text) for piece in pieces]
        encoded = iter(self._tokenizer.encode_batch([text for of_piece in parts for text in of_piece[::2]]))
        for piece, of_piece in zip(pieces, parts, strict=True):
            [(_, _, role)] = piece.spans
            # A text, a token, a text, and so on.
            ids = [
                [self._tokenizer.token_id(part)] if number % 2 else next(encoded)
                for number, part in enumerate(of_piece)
            ]
            yield np.array(list(chain.from_iterable(ids)), np.int64), np.full(sum(map(len, ids)), role, np.int64)

    def _parts(self, text: str) -> list[str]:
        """The text cut at each token that Megatron-LLM looks for itself, around a SentencePiece model.

        What lies between is encoded as a text of its own, which may begin with a piece for a space.
        """
        return [text] if self._tokens is None else self._tokens.split(text)
