"""``tokenize_chat``: from conversations to instruction data, with the role of each token."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from megacore.data.datasets.indexed import token_dtype
from megacore.data.datasets.instruction import InstructionDescription, Role, writing_instruction_data
from megacore.data.preprocess.conversations import Conversation, MessageKeys, QuestionKeys, read_conversations
from megacore.data.preprocess.encoder import batches
from megacore.data.preprocess.readers import expand
from megacore.data.preprocess.records import abbreviated, require_encodable
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

_BATCH_CONVERSATIONS = 1024

Markup = Literal["template", "megatron-llm"]


@dataclass(frozen=True, kw_only=True)
class ChatSummary:
    """The result of :func:`tokenize_chat`.

    Attributes:
        num_assistant_tokens: Number of the assistant's tokens, which are the targets.
        num_skipped: Number of malformed records, which were skipped.
        num_with_special_tokens: Number of conversations whose text spells special tokens, and was encoded to them.
        new_tokens: The tokens that were added to the tokenizer, and their ids.
        tokenizer_directory: Directory of the tokenizer with these tokens; None if there are none.
    """

    prefix: Path
    num_conversations: int
    num_tokens: int
    num_assistant_tokens: int
    num_skipped: int
    num_with_special_tokens: int
    new_tokens: dict[str, int]
    tokenizer_directory: Path | None


@dataclass(frozen=True)
class _Segment:
    """A text that is encoded separately."""

    text: str
    spans: list[tuple[int, int, Role]]
    """``(start, stop, role)`` of its characters; all others are the prompter's."""


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
    """Tokenize conversations into the instruction dataset ``out``, see :mod:`megacore.data.datasets.instruction`.

    Inputs are files of lines or rows as for :func:`~megacore.data.tokenize`, one conversation each.

    Args:
        inputs: Files, or patterns such as ``data/*.jsonl``.
        tokenizer: A tokenizer's file or directory. Text that spells a special token is encoded to that token, as in
            transformers; such conversations are counted.
        out: The prefix of the dataset.
        keys: Keys of a record's conversation; by default a list under ``messages``.
        markup: ``template``, a chat template; or ``megatron-llm``, ``<|im_start|>question\\n…<|im_end|>\\n`` with the
            roles system, question and answer as in Megatron-LLM, each turn encoded separately, the header and end of an
            answer being targets too. By default the latter for questions and answers, else the former.
        chat_template: A file with the template; by default the tokenizer's template.
        vocab_extra_ids_list: Tokens to add to the vocabulary; the extended tokenizer is written to ``out-tokenizer/``.
        on_error: Treatment of a malformed record: ``stop`` raises its error, ``skip`` skips and counts it.
        on_skip: Called with the error of each skipped record.
        advance: Called with numbers of input bytes after their work.

    Raises:
        DataError: An input, the tokenizer or the template is missing or malformed, or a record (the message has file
            and line), or no record is usable.
        OutputError: An output file exists or cannot be written. After any error nothing is left of the dataset.
    """
    paths = expand([inputs] if isinstance(inputs, str | Path) else inputs)
    keys = keys or MessageKeys()
    markup = markup or ("megatron-llm" if isinstance(keys, QuestionKeys) else "template")
    loaded = load_tokenizer(tokenizer, NewTokens(named=tuple(vocab_extra_ids_list)))
    tokenizer_directory = directory_beside(Path(out)) if loaded.new_tokens else None
    if tokenizer_directory is not None:
        is_saved(loaded, tokenizer_directory)  # raises before the work, not after it
    encoder: _TemplateEncoder | _MegatronLlmEncoder
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

    def rendered() -> Iterator[tuple[Conversation, list[_Segment]]]:
        files = (read_conversations(path, keys, on_error=skip, advance=advance) for path in paths)
        for conversation in chain.from_iterable(files):
            try:
                segments = encoder.segments(conversation)
                for segment in segments:
                    require_encodable(segment.text)
            except DataError as error:
                skip(DataError(f"{conversation.where}: {error}"))
                continue
            yield conversation, segments

    with writing_instruction_data(out, token_dtype(loaded.vocab_size)) as writer:
        for batch in batches(rendered(), _count_characters, _BATCH_CONVERSATIONS):
            encoded = encoder.encode([segment for _, segments in batch for segment in segments])
            for conversation, segments in batch:
                encoded_segments = [next(encoded) for _ in segments]
                ids, roles = (np.concatenate(arrays) for arrays in zip(*encoded_segments, strict=True))
                num_assistant = int(np.count_nonzero(roles == Role.ASSISTANT))
                if num_assistant == 0:
                    message = f"{conversation.where}: none of its tokens is the assistant's, so it has no target"
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
            detail = f"; the first of {num_skipped} skipped records: {first_error}" if first_error else ""
            raise DataError(f"{', '.join(map(str, paths)) or 'no input file'}: no conversation to tokenize{detail}")
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


def _count_characters(rendered: tuple[Conversation, list[_Segment]]) -> int:
    return sum(len(segment.text) for segment in rendered[1])


class _TemplateEncoder:
    """Encodes conversations in the markup of a chat template; the role of a token is that of its characters.

    A token with any character of the assistant is the assistant's.

    Attributes:
        special_tokens: Tokens to which text that spells them is encoded.
        template_sha256: Digest of the template, if there is one.
    """

    def __init__(self, tokenizer: Tokenizer, template_file: Path | None) -> None:
        self._with_tools, self._template = (
            open_chat_template(tokenizer, template_file, with_tools=with_tools) for with_tools in (True, False)
        )
        assert isinstance(tokenizer, JsonTokenizer), "open_chat_template accepts no other"
        self._tokenizer = tokenizer
        self.special_tokens = tokenizer.special_tokens()
        self.template_sha256: str | None = hashlib.sha256(self._template.source.encode()).hexdigest()

    def segments(self, conversation: Conversation) -> list[_Segment]:
        """Return the text of a conversation. Raises :class:`DataError` if the markup cannot represent it."""
        template = self._template if conversation.tools is None else self._with_tools
        chat = template.render_marked(conversation.messages, tools=conversation.tools)
        spans = [(0, chat.system_stop, Role.SYSTEM)] if chat.system_stop else []
        return [_Segment(chat.text, spans + [(start, stop, Role.ASSISTANT) for start, stop in chat.assistant])]

    def encode(self, segments: Sequence[_Segment]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the ids and roles of each segment."""
        encoded = self._tokenizer.encode_with_offsets([segment.text for segment in segments])
        for segment, (ids, spans) in zip(segments, encoded, strict=True):
            offsets = np.array(spans, np.int64).reshape(-1, 2)
            # A token without a character, such as a mark of the beginning of a word, belongs to the next character.
            starts, stops = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
            roles = np.full(len(offsets), Role.PROMPTER, np.int64)
            for start, stop, role in segment.spans:
                roles[(starts < stop) & (stops > start)] = role
            yield np.array(ids, np.int64), roles


class _MegatronLlmEncoder:
    """Encodes conversations in the markup of Megatron-LLM, each turn separately; see :class:`_TemplateEncoder`."""

    template_sha256: str | None = None

    _TURN_TOKENS: ClassVar = ("<|im_start|>", "<|im_end|>")
    _ROLES: ClassVar = {
        "system": ("system", Role.SYSTEM),
        "user": ("question", Role.PROMPTER),
        "assistant": ("answer", Role.ASSISTANT),
    }

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_tokens = tokenizer.special_tokens()
        self._tokens: re.Pattern[str] | None = None
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokens = {*tokenizer.control_tokens(), *tokenizer.new_tokens, *self._TURN_TOKENS}
            self.special_tokens = sorted(tokens, key=len, reverse=True)
            self._tokens = re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})")
        for token in self._TURN_TOKENS:
            # Compare with two tokens, since sentencepiece may put a piece for a space before the first.
            once, twice = tokenizer.encode_batch([token, token + token])
            if len(twice) - len(once) != 1:
                raise DataError(
                    f"{tokenizer.file}: does not know {token} as a token, which the markup of megatron-llm needs: add "
                    "both with --vocab-extra-ids-list '<|im_start|>,<|im_end|>' and give the model rows for them "
                    "(--add-tokens), or write the conversations with a chat template"
                )

    def segments(self, conversation: Conversation) -> list[_Segment]:
        segments = []
        for number, message in enumerate(conversation.messages, start=1):
            if message["role"] not in self._ROLES or not isinstance(message.get("content"), str):
                raise DataError(
                    f"message {number}: the markup of megatron-llm has only text of {', '.join(self._ROLES)}, "
                    f"not {abbreviated(message)}"
                )
            name, role = self._ROLES[message["role"]]
            text = f"<|im_start|>{name}\n{message['content']}<|im_end|>\n"
            segments.append(_Segment(text, [(0, len(text), role)]))
        return segments

    def encode(self, segments: Sequence[_Segment]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        parts = [self._parts(segment.text) for segment in segments]
        encoded = iter(self._tokenizer.encode_batch([text for segment_parts in parts for text in segment_parts[::2]]))
        for segment, segment_parts in zip(segments, parts, strict=True):
            [(_, _, role)] = segment.spans
            # Texts and tokens alternate.
            ids = [
                [self._tokenizer.token_id(part)] if number % 2 else next(encoded)
                for number, part in enumerate(segment_parts)
            ]
            yield np.array(list(chain.from_iterable(ids)), np.int64), np.full(sum(map(len, ids)), role, np.int64)

    def _parts(self, text: str) -> list[str]:
        """Split the text at each token that Megatron-LLM itself looks for with a SentencePiece model.

        The texts between are encoded separately, each of which may begin with a piece for a space.
        """
        return [text] if self._tokens is None else self._tokens.split(text)
