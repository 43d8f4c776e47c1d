"""``tokenize``: text files to an indexed dataset, with a description of what was tokenized how."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from megacore.atomic_output import StagedFiles, require_name
from megacore.data.datasets.description import DatasetDescription
from megacore.data.datasets.indexed import IndexedDatasetWriter, token_dtype
from megacore.data.preprocess.encoder import MAX_REPORTED_PROBLEMS, EncodedDocuments, EncodedPiece, Job
from megacore.data.preprocess.readers import Piece, expand, pieces, total_size
from megacore.data.preprocess.records import Problem
from megacore.data.preprocess.worker_pool import Encoders
from megacore.data.tokenizers.added_tokens import NewTokens
from megacore.data.tokenizers.tokenizer import Tokenizer, directory_beside, is_saved, load_tokenizer, save_tokenizer
from megacore.errors import DataError

_MIN_BYTES_PER_PROCESS = 4 << 20
"""Bytes of input from which a process is worth its start."""


@dataclass(frozen=True, kw_only=True)
class TokenizeSummary:
    """The result of :func:`tokenize`; numbers are totals of all datasets.

    Attributes:
        num_tokens: Number of tokens, with begin and end-of-document tokens.
        num_text_bytes: UTF-8 bytes of the documents' text, without JSON syntax.
        num_empty_documents: Number of skipped documents without a token.
        num_erroneous_documents: Number of skipped malformed records.
        first_errors: Errors of the first malformed records, with their locations.
        prefixes: Prefixes of the datasets: ``prefix``, or with several keys ``prefix_KEY`` for each.
        new_tokens: The tokens that were added to the tokenizer, and their ids.
        tokenizer_directory: Directory of the tokenizer with these tokens; None if there are none.
        engine: Description of the library that encoded.
    """

    prefix: Path
    num_documents: int
    num_tokens: int
    num_text_bytes: int
    num_empty_documents: int
    num_erroneous_documents: int
    first_errors: tuple[str, ...]
    prefixes: tuple[Path, ...]
    new_tokens: dict[str, int]
    tokenizer_directory: Path | None
    engine: str
    seconds: float


def tokenize(
    inputs: str | Path | Iterable[str | Path],
    *,
    tokenizer: str | Path,
    out: str | Path,
    json_key: str | Sequence[str] = "text",
    append_eod: bool = False,
    prepend_bos: bool = False,
    new_tokens: bool = True,
    vocab_extra_ids: int = 0,
    vocab_extra_ids_list: Sequence[str] = (),
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    report: Callable[[str], None] = lambda note: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    advance_documents: Callable[[int], None] = lambda num_documents: None,
) -> TokenizeSummary:
    """Tokenize text files into the dataset ``out`` (``out.bin``, ``out.idx``) and its description (``out.json``).

    A ``.jsonl`` or ``.json`` file holds one JSON object per line, each a document with its text under ``json_key``;
    blank lines are ignored. A ``.parquet`` file has the texts in the column of that name. Any other file is plain text
    and a single document, held in memory while it is encoded. Files of lines or text may be compressed (``.gz``,
    ``.zst``). Text is UTF-8; a byte order mark is dropped, line ends are kept. Documents keep their order; those
    without a token are skipped and counted.

    The ids are those of the library that defines the tokenizer. A faster library is used if it is installed and accepts
    the file. Both are compared on excerpts of every mebibyte; if they differ, everything is encoded again without it.

    Args:
        inputs: Files, or patterns such as ``data/*.jsonl``.
        tokenizer: A tokenizer's file or directory, see :func:`~megacore.data.load_tokenizer`; the tokenizer classes
            describe the encoding of text that spells a special token.
        out: The prefix of the dataset.
        json_key: Key of the text in a record. Each of several keys makes a dataset of its own, ``out_KEY``.
        append_eod: End every document with the tokenizer's end-of-document token.
        prepend_bos: Begin every document with the tokenizer's begin token.
        new_tokens: Add ``<CLS> <SEP> <EOD> <MASK>`` to the vocabulary, and ``<PAD>`` if it has no padding token.
        vocab_extra_ids: Number of tokens ``<extra_id_0>``… to add, even if ``new_tokens`` is false.
        vocab_extra_ids_list: Tokens to add, even if ``new_tokens`` is false. If any token is new, the extended
            tokenizer is written to ``out-tokenizer/``.
        on_error: Treatment of a malformed record: ``stop`` raises its error, ``skip`` skips and counts it.
        workers: Number of processes; by default one per core, and only the calling one for a small input.
        report: Called with messages for the user, a sentence each.
        advance: Called with numbers of input bytes after their work; with a negative number when work starts again.
        advance_documents: Called with numbers of documents in the same way.

    Raises:
        DataError: An input or the tokenizer is missing, cannot be read or is malformed (the message has file and line),
            or holds no text.
        OutputError: An output file exists, is being written by another process or cannot be written. After any error
            nothing is left of the dataset.
        WorkerError: A process died.
    """
    started = time.monotonic()
    require_name(Path(out))
    paths = expand([inputs] if isinstance(inputs, str | Path) else inputs)
    keys = (json_key,) if isinstance(json_key, str) else tuple(json_key)
    if not keys or len(set(keys)) < len(keys):
        raise DataError(f"give one or more different JSON keys, not {', '.join(keys) or 'none is given'}")
    if len(keys) > 1 and (unnameable := [key for key in keys if "/" in key]):
        raise DataError(
            f"the JSON key {unnameable[0]!r} cannot be a part of the name of its dataset: tokenize it alone, without "
            "other keys"
        )
    added = NewTokens(standard=new_tokens, num_extra_ids=vocab_extra_ids, named=tuple(vocab_extra_ids_list))
    job = Job(
        tokenizer=Path(tokenizer),
        new_tokens=added,
        use_fast=True,
        json_keys=keys,
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        skip_erroneous=on_error == "skip",
    )
    workers = workers or _default_workers(paths)
    with Encoders(job, num_workers=workers, report=report) as encoders:
        vocabulary = load_tokenizer(tokenizer, added)  # while the processes load it too
        _require_begin_and_end(vocabulary, append_eod=append_eod, prepend_bos=prepend_bos)
        run = _Run(
            job=job,
            paths=paths,
            vocabulary=vocabulary,
            out=Path(out),
            advance=advance,
            advance_documents=advance_documents,
        )
        try:
            counts = run.write(encoders)
        except EnginesDisagreeError as found:
            report(f"{found}; everything is tokenized again with {vocabulary.library} alone")
            advance(-found.num_bytes_done)
            advance_documents(-found.num_documents_done)
            counts = None
    if counts is None:
        with Encoders(dataclasses.replace(job, use_fast=False), num_workers=workers) as encoders:
            counts = run.write(encoders)
    return TokenizeSummary(
        prefix=Path(out),
        prefixes=tuple(run.prefixes),
        tokenizer_directory=run.tokenizer_directory if vocabulary.new_tokens else None,
        new_tokens=vocabulary.new_tokens,
        seconds=time.monotonic() - started,
        **counts,
    )


class EnginesDisagreeError(DataError):
    """The fast engine and the defining library produce different ids, so that no ids so far can be trusted."""

    def __init__(self, message: str, *, num_bytes_done: int, num_documents_done: int) -> None:
        super().__init__(message)
        self.num_bytes_done = num_bytes_done
        self.num_documents_done = num_documents_done


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One pass over the input, from the first piece to complete datasets."""

    job: Job
    paths: list[Path]
    vocabulary: Tokenizer
    out: Path
    advance: Callable[[int], None]
    advance_documents: Callable[[int], None]

    @property
    def prefixes(self) -> list[Path]:
        """Prefixes of the datasets, one per key."""
        keys = self.job.json_keys
        return [self.out] if len(keys) == 1 else [self.out.with_name(f"{self.out.name}_{key}") for key in keys]

    @property
    def tokenizer_directory(self) -> Path:
        """Directory of the tokenizer if it has new tokens."""
        return directory_beside(self.out)

    def write(self, encoders: Encoders) -> dict[str, Any]:
        """Write the datasets; return the counts by their names in the summary."""
        if self.vocabulary.new_tokens:
            is_saved(self.vocabulary, self.tokenizer_directory)  # raises before the work, not after it
        total = _Counts(by_key=[_KeyCounts() for _ in self.prefixes])
        with StagedFiles(self.out) as files, ExitStack() as stack:
            dtype = token_dtype(self.vocabulary.vocab_size)
            writers = [
                stack.enter_context(IndexedDatasetWriter(prefix, dtype, files=files)) for prefix in self.prefixes
            ]
            for encoded in self._checked(encoders.encode(self._pieces()), total):
                for writer, counts, documents in zip(writers, total.by_key, encoded.by_key, strict=True):
                    for ids, lengths in zip(documents.ids, documents.lengths, strict=True):
                        writer.add_documents(ids, lengths)
                    counts.add(documents)
            self._require_text(total)
            for writer, counts in zip(writers, total.by_key, strict=True):
                writer.describe(self._description(counts).to_json())
            if self.vocabulary.new_tokens:
                save_tokenizer(self.vocabulary, self.tokenizer_directory, files)
        return total.totals()

    def _require_text(self, total: _Counts) -> None:
        counts = zip(self.job.json_keys, total.by_key, strict=True)
        if empty := [repr(key) for key, key_counts in counts if key_counts.num_documents == 0]:
            files = ", ".join(map(str, self.paths)) or "no input file"
            where = f" under {' or '.join(empty)}" if len(self.job.json_keys) > 1 else ""
            raise DataError(f"{files}: no text to tokenize{where}")

    def _pieces(self) -> Iterator[Piece]:
        for path in self.paths:
            yield from pieces(path, self.job.json_keys)

    def _checked(self, work: Iterator[tuple[Piece, EncodedPiece]], total: _Counts) -> Iterator[EncodedPiece]:
        """Yield the encoded pieces that may be written, after checking them for errors."""
        file: Path | None = None
        start = num_bytes = num_documents = 0
        for piece, encoded in work:
            if piece.path != file or piece.is_first:
                file, start = piece.path, 0
            if encoded.problems and not self.job.skip_erroneous:
                raise DataError(_located(piece, start, encoded.problems[0]))
            if encoded.disagreement is not None:
                raise EnginesDisagreeError(
                    f"{piece.where(start + encoded.disagreement)}: "
                    f"the engine is {encoded.engine}, and they encode this document differently",
                    num_bytes_done=num_bytes,
                    num_documents_done=num_documents,
                )
            total.engine = encoded.engine
            total.num_erroneous += encoded.num_problems
            remaining = MAX_REPORTED_PROBLEMS - len(total.first_errors)
            total.first_errors += [_located(piece, start, problem) for problem in encoded.problems[:remaining]]
            start += encoded.num_positions
            yield encoded
            num_bytes += piece.num_input_bytes
            num_encoded = sum(len(lengths) for lengths in encoded.by_key[0].lengths)
            num_documents += num_encoded
            self.advance(piece.num_input_bytes)
            self.advance_documents(num_encoded)

    def _description(self, counts: _KeyCounts) -> DatasetDescription:
        return DatasetDescription(
            tokenizer_file=self.vocabulary.file.name,
            tokenizer_sha256=self.vocabulary.sha256,
            vocab_size=self.vocabulary.vocab_size,
            eod_id=self.vocabulary.eod_id,
            append_eod=self.job.append_eod,
            num_documents=counts.num_documents,
            num_tokens=counts.num_tokens,
            megacore_version=version("megacore"),
            prepend_bos=self.job.prepend_bos,
            new_tokens=self.vocabulary.new_tokens,
            known_tokens_sha256=self.vocabulary.known_tokens_sha256(),
            tokenizer_directory=self.tokenizer_directory.name if self.vocabulary.new_tokens else None,
        )


@dataclass
class _KeyCounts:
    num_documents: int = 0
    num_tokens: int = 0
    num_text_bytes: int = 0
    num_empty_documents: int = 0

    def add(self, documents: EncodedDocuments) -> None:
        self.num_documents += sum(len(lengths) for lengths in documents.lengths)
        self.num_tokens += sum(len(ids) for ids in documents.ids)
        self.num_text_bytes += documents.num_text_bytes
        self.num_empty_documents += documents.num_empty


@dataclass
class _Counts:
    by_key: list[_KeyCounts]
    engine: str = ""
    num_erroneous: int = 0
    first_errors: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        names = [count.name for count in dataclasses.fields(_KeyCounts)]
        return {
            **{name: sum(getattr(counts, name) for counts in self.by_key) for name in names},
            "num_erroneous_documents": self.num_erroneous,
            "first_errors": tuple(self.first_errors),
            "engine": self.engine,
        }


def _located(piece: Piece, start: int, problem: Problem) -> str:
    return f"{piece.where(start + problem.position)}: {problem.message}"


def _require_begin_and_end(vocabulary: Tokenizer, *, append_eod: bool, prepend_bos: bool) -> None:
    """Raise :class:`DataError` if the tokenizer lacks the requested begin or end-of-document token."""
    if append_eod and vocabulary.eod_id is None:
        problem, name, option = "end-of-document token is not known, so none can be appended", "eos_token", "append-eod"
    elif prepend_bos and vocabulary.bos_id is None:
        problem, name, option = "begin token is not known, so none can be prepended", "bos_token", "prepend-bos"
    else:
        return
    raise DataError(
        f"{vocabulary.file}: its {problem}: name it as {name} in a tokenizer_config.json beside a tokenizer.json, "
        f"or leave out --{option}"
    )


def _default_workers(paths: Iterable[Path]) -> int:
    """Return one process per core, but fewer for an input that is encoded before they have started."""
    return max(1, min(len(os.sched_getaffinity(0)), total_size(paths) // _MIN_BYTES_PER_PROCESS))
