"""Reading a native checkpoint: a rank of any layout reads only the rows and columns that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint.input_files import file_sha256
from megacore.checkpoint.manifest import TOKENIZER_DIRECTORY, Manifest, read_manifest
from megacore.checkpoint.matrix import (
    ConcatenatedColumns,
    ConcatenatedRows,
    LazyMatrix,
    RowsOf,
    StoredMatrix,
    block_of,
    num_rows,
)
from megacore.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from megacore.checkpoint.training_record import Chunk, ChunkedMatrix, read_chunk
from megacore.errors import CheckpointError, CorruptCheckpointError
from megacore.parallel import ParameterSpec


class Checkpoint:
    """A native checkpoint on disk: weights, or a training checkpoint, whose weights are read in the same way.

    Opening it reads the manifest and checks that every file exists and has its length; :meth:`check` reads them all.

    Raises:
        CheckpointError: when the directory is not a checkpoint.
        CorruptCheckpointError: when a file is missing or has another length than was written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._opened: dict[str, SafetensorsFile] = {}
        for name, weights in self.manifest.files.items():
            found = (self.path / name).stat().st_size if (self.path / name).is_file() else None
            if found != weights.record.num_bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {weights.record.num_bytes}"
                raise CorruptCheckpointError(f"{self.path / name} {state}: the checkpoint is incomplete, make it again")
        for file in self.tokenizer_files().values():
            if not file.is_file():
                raise CorruptCheckpointError(f"{file} is missing: the checkpoint is incomplete, make it again")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": {}}  # another process opens the files itself

    @property
    def tokenizer_directory(self) -> Path | None:
        """The directory of the tokenizer's files; ``None`` for a checkpoint without a tokenizer."""
        return self.path / TOKENIZER_DIRECTORY if self.manifest.tokenizer else None

    def tokenizer_files(self) -> dict[str, Path]:
        """Return the tokenizer's files by name; empty for a checkpoint without a tokenizer."""
        return {name: self.path / TOKENIZER_DIRECTORY / name for name in self.manifest.tokenizer}

    @property
    def num_bytes(self) -> int:
        """Total size of the weight files in bytes."""
        return sum(file.record.num_bytes for file in self.manifest.files.values())

    def matrix(self, name: str) -> LazyMatrix:
        """Return parameter ``name`` as one matrix, joined over the ranks that it is cut over; nothing is read yet.

        Raises :class:`CheckpointError` when there is no such parameter.
        """
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.path} has no parameter {name}")
        entry = self.manifest.parameters[name]
        spec, tp = entry.spec, self.manifest.layout.tp
        if self.manifest.training is not None:
            stored = f"model.{name}"
            return ChunkedMatrix(stored, self.manifest.training.tensors[stored], spec.row_dims, self._open)
        if spec.shard_dim is None or tp == 1:
            return self._part(name, 0, *spec.matrix_shape)
        blocks = [spec.stored_block(tp, rank) for rank in range(tp)]
        parts = [
            self._part(name, rank, num_rows(rows), columns.stop - columns.start)
            for rank, (rows, columns) in enumerate(blocks)
        ]
        if spec.shard_dim >= spec.row_dims:
            return ConcatenatedColumns(parts)
        merged = ConcatenatedRows(parts)
        if all(isinstance(rows, slice) for rows, _ in blocks):
            return merged
        # The ranks hold rows in another order than the whole.
        numbers = [rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop) for rows, _ in blocks]
        return RowsOf(merged, torch.cat(numbers).argsort())

    def read_local(self, name: str, spec: ParameterSpec, *, tp_size: int, tp_rank: int) -> Tensor:
        """Read a copy of the part of parameter ``name`` that rank ``tp_rank`` of ``tp_size`` holds."""
        block = block_of(self.matrix(name), *spec.block(tp_size, tp_rank))
        local = block.read(slice(0, block.rows), slice(0, block.columns))
        return local.reshape(spec.local_shape(tp_size, tp_rank)).clone()

    def check_parameters(self, specs: Mapping[str, ParameterSpec]) -> None:
        """Raise :class:`CheckpointError` unless the checkpoint has exactly the parameters ``specs`` of its model."""
        stored = self.manifest.specs
        differing = sorted(stored.keys() ^ specs.keys())
        differing += [name for name in stored.keys() & specs.keys() if not stored[name].is_same_parameter(specs[name])]
        if differing:
            listed = ", ".join(differing[:8]) + (" and more" if len(differing) > 8 else "")
            raise CheckpointError(
                f"{self.path} does not have the parameters of its model: {listed} differ. "
                f"Was it made with another version of the plugin for {self.manifest.family}?"
            )

    def check(self, *, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read every file, and raise :class:`CorruptCheckpointError` with the names of those that differ in digest."""
        expected = {self.path / name: file.record.sha256 for name, file in self.manifest.files.items()}
        expected |= {path: self.manifest.tokenizer[name] for name, path in self.tokenizer_files().items()}
        damaged = [
            str(path)
            for path, digest in expected.items()
            if not path.is_file() or file_sha256(path, advance=advance) != digest
        ]
        if damaged:
            remedy = "Take another checkpoint of the run" if self.manifest.training else "Make the checkpoint again"
            raise CorruptCheckpointError(f"damaged since written: {', '.join(damaged)}. {remedy}")

    @cached_property
    def _file_of(self) -> dict[tuple[str, int], str]:
        return {(tensor, file.tp_rank): name for name, file in self.manifest.files.items() for tensor in file.tensors}

    def _part(self, name: str, tp_rank: int, rows: int, columns: int) -> LazyMatrix:
        """Return the part of ``name`` in the file of ``tp_rank``; a parameter that is not cut is in that of rank 0."""
        file_name = self._file_of.get((name, tp_rank))
        if file_name is None:
            raise CorruptCheckpointError(f"{self.path}: no file contains {name} of tp rank {tp_rank}; make it again")
        entry = self.manifest.parameters[name]
        shape = entry.spec.stored_shape(self.manifest.layout.tp, tp_rank)

        def load() -> Tensor:
            file = self._open(file_name)
            file.require(name, shape, entry.dtype)
            return file.tensor(name)

        return StoredMatrix(rows, columns, DTYPES[entry.dtype], load)

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Return a chunk of tensor ``name`` of a training checkpoint, mapped and not yet read."""
        assert self.manifest.training is not None
        return read_chunk(self._open(chunk.file), name, self.manifest.training.tensors[name], chunk)

    def _open(self, file_name: str) -> SafetensorsFile:
        if file_name not in self._opened:
            self._opened[file_name] = SafetensorsFile(self.path / file_name)
        return self._opened[file_name]


@contextmanager
def check_in_background(checkpoint: Checkpoint) -> Iterator[Callable[[], None]]:
    """Check the digests of ``checkpoint`` in another thread while the block reads it.

    Yields a function that waits for the check and raises its :class:`CorruptCheckpointError`. Call it before the
    results of the block are made visible.
    """
    abandoned = False

    def stop_if_abandoned(num_bytes: int) -> None:
        if abandoned:
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(checkpoint.check, advance=stop_if_abandoned)
        try:
            yield check.result
        except BaseException:
            abandoned = True
            raise
