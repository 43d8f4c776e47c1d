"""``tokenize``: text files to an indexed dataset, with a description of what was tokenized how."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from megacore.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megacore.data.tokenizer import load_tokenizer
from megacore.errors import DataError

# What is encoded at once: enough to keep all cores busy, little enough for the library's own bookkeeping (about 100
# bytes a token) to stay small.
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, kw_only=True)
class TokenizeSummary:
    """What :func:`tokenize` wrote."""

    prefix: Path
    num_documents: int
    num_tokens: int
    """End-of-document tokens included."""
    num_text_bytes: int
    """The UTF-8 bytes of the documents' text, without what JSON adds."""
    num_empty_documents: int
    """Documents without a token, which were skipped."""


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """``PREFIX.json``: which tokenizer made a dataset, so that it is not used with a model of another vocabulary."""

    FORMAT: ClassVar = "megacore-dataset"
    VERSION: ClassVar = 1

    tokenizer_file: str
    """Its name, without directories."""
    tokenizer_sha256: str
    vocab_size: int
    """Larger than every id that the tokenizer can give."""
    eod_id: int | None
    append_eod: bool
    """Whether every document ends with ``eod_id``."""
    num_documents: int
    num_tokens: int
    megacore_version: str

    def to_json(self) -> str:
        content = {"format": self.FORMAT, "version": self.VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, prefix: str | Path) -> Self | None:
        """The description of the dataset at ``prefix``; None where it has none, as datasets of other programs do.

        Raises:
            DataError: the file is damaged, or of a newer version.
        """
        path = Path(f"{prefix}.json")
        # A file of this name may also be another program's, and of any size: only ours says so at its start.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            if f'"{cls.FORMAT}"'.encode() not in file.read(100):
                return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: is damaged: {error}") from error
        if content.get("version") != cls.VERSION:
            raise DataError(
                f"{path}: version {content.get('version')} of the description; this megacore reads {cls.VERSION}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - set(content)):
            raise DataError(f"{path}: is damaged: {', '.join(missing)} missing")
        if not all(isinstance(content[key], int) for key in ("vocab_size", "num_documents", "num_tokens")):
            raise DataError(f"{path}: is damaged: its numbers are none")
        return cls(**{name: content[name] for name in names})


def tokenize(
    inputs: str | Path | Iterable[str | Path],
    *,
    tokenizer: str | Path,
    out: str | Path,
    json_key: str = "text",
    append_eod: bool = False,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> TokenizeSummary:
    """Tokenize text files into the dataset ``out`` (``out.bin``, ``out.idx``) and its description (``out.json``).

    A ``.jsonl`` or ``.json`` file holds one JSON object a line, each a document with its text under ``json_key``; lines
    are read as they are needed, and blank ones passed over. Any other file is plain text and one document as a whole,
    held in memory while it is encoded. Text is UTF-8; a byte order mark is dropped, line ends are kept as they are.
    Documents keep their order; those without a token are skipped and counted, with no end-of-document token either.

    Args:
        tokenizer: a tokenizer's file or directory, see :func:`~megacore.data.load_tokenizer`, which also says what
            becomes of text that spells a special token. No begin token is added.
        append_eod: end every document with the tokenizer's end-of-document token.
        advance: is told of every few input bytes done.

    Raises:
        DataError: an input or the tokenizer is missing or malformed (the message has file and line), or holds no text.
        OutputError: an output file exists or cannot be written. After any error nothing is left of the dataset.
    """
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: is a directory, not a file" if path.is_dir() else f"{path}: no such file")
    encoder = load_tokenizer(tokenizer)
    if append_eod and encoder.eod_id is None:
        raise DataError(
            f"{encoder.file}: its end-of-document token is not known, so none can be appended: name it as eos_token in "
            f"a tokenizer_config.json beside a tokenizer.json, or leave out --append-eod"
        )
    ending = [encoder.eod_id] if append_eod else []

    num_documents = num_tokens = num_text_bytes = num_empty_documents = 0
    with IndexedDatasetWriter(out, token_dtype(encoder.vocab_size)) as writer:
        for batch in _batches(chain.from_iterable(_read_documents(path, json_key) for path in paths)):
            for document, ids in zip(batch, encoder.encode_batch([document.text for document in batch]), strict=True):
                if not ids:
                    num_empty_documents += 1
                    continue
                writer.add_document(ids + ending)
                num_documents += 1
                num_tokens += len(ids) + len(ending)
                num_text_bytes += document.num_text_bytes
            advance(sum(document.num_input_bytes for document in batch))
        if num_documents == 0:
            raise DataError(f"{', '.join(map(str, paths)) or 'no input file'}: no text to tokenize")
        description = DatasetDescription(
            tokenizer_file=encoder.file.name,
            tokenizer_sha256=encoder.sha256,
            vocab_size=encoder.vocab_size,
            eod_id=encoder.eod_id,
            append_eod=append_eod,
            num_documents=num_documents,
            num_tokens=num_tokens,
            megacore_version=version("megacore"),
        )
        writer.describe(description.to_json())
    return TokenizeSummary(
        prefix=Path(out),
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_text_bytes=num_text_bytes,
        num_empty_documents=num_empty_documents,
    )


class _Document(NamedTuple):
    text: str
    num_text_bytes: int
    num_input_bytes: int


def _read_documents(path: Path, json_key: str) -> Iterator[_Document]:
    if path.suffix not in (".jsonl", ".json"):
        content = path.read_bytes()
        yield _Document(_decode(content, where=f"{path}"), len(content), len(content))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            text = _text_in(_decode(line.rstrip(), where=where), json_key, where=where)
            try:
                num_text_bytes = len(text.encode())
            except UnicodeEncodeError as error:
                # JSON can spell what no text holds, such as "\ud800"; no tokenizer takes it.
                raise DataError(
                    f"{where}: the text has half of a surrogate pair ({text[error.start]!r}); "
                    f"write the whole pair, or U+FFFD in its place"
                ) from error
            yield _Document(text, num_text_bytes, len(line))


def _text_in(line: str, json_key: str, *, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is not JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep, for Python
        raise DataError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: is JSON, but not an object; each line must be one whole JSON object")
    if json_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: has no key {json_key!r} (its keys: {keys}); choose one with --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: the value of {json_key!r} is {json.dumps(text)[:40]}, not a string; "
            f"remove the line, or choose another key with --json-key"
        )
    return text


def _decode(content: bytes, *, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert the file"
        ) from error


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
