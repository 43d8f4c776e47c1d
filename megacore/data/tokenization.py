"""``tokenize``: text files to an indexed dataset, with a description of what was tokenized how."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, Self

from megacore.data.documents import input_files, read_chunks
from megacore.data.encoding import EncodedChunk, Encoding, encoded_chunks
from megacore.data.engines import EnginesDisagreeError
from megacore.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megacore.data.tokenizer import Tokenizer, load_tokenizer
from megacore.errors import DataError

_ALONE_BYTES = 8 << 20
"""Inputs smaller than this are done before other processes have started."""

_TOLD_ERRORS = 5
"""Of documents that are skipped, how many are named; all are counted."""


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
    num_erroneous_documents: int
    """Documents that could not be read, which were skipped."""
    engine: str
    """The library that encoded."""
    seconds: float


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
    prepend_bos: bool = False
    """Whether every document begins with the tokenizer's begin token."""

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
        if missing := sorted(names - {"prepend_bos"} - set(content)):  # which older datasets do not have
            raise DataError(f"{path}: is damaged: {', '.join(missing)} missing")
        if not all(isinstance(content[key], int) for key in ("vocab_size", "num_documents", "num_tokens")):
            raise DataError(f"{path}: is damaged: its numbers are none")
        return cls(**{name: content[name] for name in names & set(content)})


def tokenize(
    inputs: str | Path | Iterable[str | Path],
    *,
    tokenizer: str | Path,
    out: str | Path,
    json_key: str = "text",
    append_eod: bool = False,
    prepend_bos: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    advance: Callable[[int, int], None] = lambda num_documents, num_bytes: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> TokenizeSummary:
    """Tokenize text files into the dataset ``out`` (``out.bin``, ``out.idx``) and its description (``out.json``).

    A ``.jsonl`` or ``.json`` file holds one JSON object a line, each a document with its text under ``json_key``; lines
    are read as they are needed, and blank ones passed over. A ``.parquet`` file is a table, each row a document with
    its text in the column ``json_key``. Any other file is plain text and one document as a whole, held in memory while
    it is encoded. All but tables may be compressed, ``.gz`` or ``.zst``. Text is UTF-8; a byte order mark is dropped,
    line ends are kept as they are. Documents keep their order; those without a token are skipped and counted, with no
    end-of-document token either.

    Args:
        inputs: files, or patterns of their names.
        tokenizer: a tokenizer's file or directory, see :func:`~megacore.data.load_tokenizer`, which also says what
            becomes of text that spells a special token.
        append_eod: end every document with the tokenizer's end-of-document token.
        prepend_bos: begin every document with the tokenizer's begin token.
        on_error: what to do about a document that cannot be read: ``"stop"``, or ``"skip"`` it and tell ``on_note``.
        workers: processes that encode; by default as many as there are cores, and for small inputs none but this one.
            Each of them imports the main module: a script guards what it does with ``if __name__ == "__main__":``.
        advance: is told of every few documents and input bytes done.
        on_note: is told what a person should know.

    Raises:
        DataError: an input or the tokenizer is missing or malformed (the message has file and line), or holds no text.
        OutputError: an output file exists or cannot be written. After any error nothing is left of the dataset.
        WorkerError: a process that encodes was killed.
    """
    started = time.monotonic()
    paths = input_files(inputs)
    encoder = load_tokenizer(tokenizer)
    encoding = Encoding(
        tokenizer=encoder.file,
        json_key=json_key,
        prepended=_required(encoder, encoder.bos_id, "begin", "bos_token", "--prepend-bos") if prepend_bos else None,
        appended=_required(encoder, encoder.eod_id, "end-of-document", "eos_token", "--append-eod")
        if append_eod
        else None,
        dtype=token_dtype(encoder.vocab_size),
    )
    counts = _Counts()
    describe = partial(_description, encoder, append_eod=append_eod, prepend_bos=prepend_bos)
    write = partial(_write, out, paths, describe=describe, workers=_workers(workers, paths), advance=advance)
    tell = on_note if on_error == "skip" else None
    try:
        write(encoding, counts, tell=tell)
    except EnginesDisagreeError as disagreement:
        on_note(
            f"{disagreement.document}: {disagreement.engine} gives other ids than {encoder.library}, which defines "
            f"{encoder.file}; starting again with {encoder.library}, which is slower"
        )
        advance(-counts.num_documents, -counts.num_input_bytes)
        encoding, counts = dataclasses.replace(encoding, may_be_fast=False), _Counts()
        write(encoding, counts, tell=tell)
    return TokenizeSummary(
        prefix=Path(out),
        num_documents=counts.num_documents,
        num_tokens=counts.num_tokens,
        num_text_bytes=counts.num_text_bytes,
        num_empty_documents=counts.num_empty_documents,
        num_erroneous_documents=counts.num_erroneous_documents,
        engine=counts.engine,
        seconds=time.monotonic() - started,
    )


@dataclass
class _Counts:
    """How far a dataset is."""

    num_documents: int = 0
    num_tokens: int = 0
    num_text_bytes: int = 0
    num_empty_documents: int = 0
    num_erroneous_documents: int = 0
    num_input_bytes: int = 0
    engine: str = ""

    def add(self, chunk: EncodedChunk) -> None:
        self.num_documents += len(chunk.lengths)
        self.num_tokens += len(chunk.ids)
        self.num_text_bytes += chunk.num_text_bytes
        self.num_empty_documents += chunk.num_empty
        self.num_erroneous_documents += len(chunk.errors)
        self.num_input_bytes += chunk.num_input_bytes
        self.engine = chunk.engine


def _write(
    out: str | Path,
    paths: Sequence[Path],
    encoding: Encoding,
    counts: _Counts,
    *,
    describe: Callable[[_Counts], DatasetDescription],
    workers: int,
    advance: Callable[[int, int], None],
    tell: Callable[[str], None] | None,
) -> None:
    """Write the dataset, and count what is in it; errors are told to ``tell``, or the first one is raised."""
    with IndexedDatasetWriter(out, encoding.dtype) as writer:
        chunks = (chunk for path in paths for chunk in read_chunks(path, encoding.json_key))
        for chunk in encoded_chunks(chunks, encoding, workers=workers):
            for number, error in enumerate(chunk.errors, start=counts.num_erroneous_documents + 1):
                if tell is None:
                    raise error
                if number <= _TOLD_ERRORS:
                    tell(f"skipped: {error}")
            writer.add_documents(chunk.ids, chunk.lengths)
            counts.add(chunk)
            advance(len(chunk.lengths), chunk.num_input_bytes)
        if counts.num_documents == 0:
            raise DataError(f"{', '.join(map(str, paths)) or 'no input file'}: no text to tokenize")
        writer.describe(describe(counts).to_json())


def _description(encoder: Tokenizer, counts: _Counts, *, append_eod: bool, prepend_bos: bool) -> DatasetDescription:
    return DatasetDescription(
        tokenizer_file=encoder.file.name,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eod_id=encoder.eod_id,
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        num_documents=counts.num_documents,
        num_tokens=counts.num_tokens,
        megacore_version=version("megacore"),
    )


def _required(encoder: Tokenizer, token: int | None, kind: str, name: str, option: str) -> int:
    if token is None:
        raise DataError(
            f"{encoder.file}: its {kind} token is not known, so documents cannot have it: name "
            f"it as {name} in a tokenizer_config.json beside a tokenizer.json, or leave out {option}"
        )
    return token


def _workers(asked_for: int | None, paths: Sequence[Path]) -> int:
    if asked_for is not None:
        return asked_for
    is_small = sum(path.stat().st_size for path in paths) < _ALONE_BYTES
    return 1 if is_small else len(os.sched_getaffinity(0))
