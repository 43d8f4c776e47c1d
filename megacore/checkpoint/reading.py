"""Reading a native checkpoint: any rank of any layout takes the rows and columns it needs, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint.manifest import TOKENIZER_DIRECTORY, Manifest, read_manifest
from megacore.checkpoint.matrix import (
    ConcatenatedColumns,
    ConcatenatedRows,
    LazyMatrix,
    RowsOf,
    StoredMatrix,
    block_of,
    count,
)
from megacore.checkpoint.safetensors_file import DTYPES, SafetensorsFile, file_sha256
from megacore.checkpoint.training_record import Chunk, ChunkedMatrix, read_chunk
from megacore.errors import CheckpointError, CorruptCheckpointError
from megacore.parallel import ParameterSpec, Rows


class Checkpoint:
    """A native checkpoint on disk: weights, or a training checkpoint, whose weights are read in the same way.

    Opening it reads the manifest and checks that every file is there with its length; :meth:`check` reads them all.

    Raises:
        CheckpointError: when the directory holds no checkpoint.
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

    @property
    def tokenizer_directory(self) -> Path | None:
        """Where the tokenizer's own files are; ``None`` where the checkpoint came without."""
        return self.path / TOKENIZER_DIRECTORY if self.manifest.tokenizer else None

    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer's own files, by name; empty where the checkpoint came without."""
        return {name: self.path / TOKENIZER_DIRECTORY / name for name in self.manifest.tokenizer}

    @property
    def num_bytes(self) -> int:
        """Bytes in the weight files."""
        return sum(file.record.num_bytes for file in self.manifest.files.values())

    def matrix(self, name: str) -> LazyMatrix:
        """Parameter ``name`` as one matrix, however many ranks it is cut over; nothing is read yet.

        Raises:
            CheckpointError: when there is no such parameter.
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
            self._part(name, rank, count(rows), columns.stop - columns.start)
            for rank, (rows, columns) in enumerate(blocks)
        ]
        if spec.shard_dim >= spec.row_dims:
            return ConcatenatedColumns(parts)
        merged = ConcatenatedRows(parts)
        order = _merging_order([rows for rows, _ in blocks])
        return merged if order is None else RowsOf(merged, order)

    def read_local(self, name: str, spec: ParameterSpec, *, tp_size: int, tp_rank: int) -> Tensor:
        """The part of parameter ``name`` that rank ``tp_rank`` of ``tp_size`` holds, in memory of its own.

        Raises:
            CheckpointError: when there is no such parameter.
        """
        block = block_of(self.matrix(name), *spec.block(tp_size, tp_rank))
        local = block.read(slice(0, block.rows), slice(0, block.columns))
        return local.reshape(spec.local_shape(tp_size, tp_rank)).clone()

    def check_parameters(self, specs: Mapping[str, ParameterSpec]) -> None:
        """Refuse a checkpoint that does not hold exactly the parameters that a model has.

        Raises:
            CheckpointError: names the parameters that differ.
        """
        stored = self.manifest.specs
        differing = sorted(stored.keys() ^ specs.keys())
        differing += [name for name in stored.keys() & specs.keys() if not stored[name].is_same_parameter(specs[name])]
        if differing:
            listed = ", ".join(differing[:8]) + (" and more" if len(differing) > 8 else "")
            raise CheckpointError(
                f"{self.path} does not hold the parameters of its model: {listed} differ. "
                f"Was it made with another version of the plugin for {self.manifest.family}?"
            )

    def check(self, *, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read every file and compare it with the digest taken when it was written.

        Raises:
            CorruptCheckpointError: names every file that differs.
        """
        expected = {self.path / name: file.record.sha256 for name, file in self.manifest.files.items()}
        for name, digest in self.manifest.tokenizer.items():
            expected[self.path / TOKENIZER_DIRECTORY / name] = digest
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
        """What the file of ``tp_rank`` holds of ``name``; a parameter that is not cut is in the file of rank 0."""
        file_name = self._file_of.get((name, tp_rank))
        if file_name is None:
            raise CorruptCheckpointError(f"{self.path}: no file holds {name} of tp rank {tp_rank}; make it again")
        entry = self.manifest.parameters[name]
        shape = entry.spec.stored_shape(self.manifest.layout.tp, tp_rank)
        dtype = DTYPES[entry.dtype]
        return StoredMatrix(rows, columns, dtype, lambda: self._load(file_name, name, shape, dtype))

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """A box of tensor ``name`` of a training checkpoint, mapped and not yet read."""
        assert self.manifest.training is not None
        return read_chunk(self._open(chunk.file), name, self.manifest.training.tensors[name], chunk)

    def _open(self, file_name: str) -> SafetensorsFile:
        if file_name not in self._opened:
            self._opened[file_name] = SafetensorsFile(self.path / file_name)
        return self._opened[file_name]

    def _load(self, file_name: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Map a tensor of a weight file, opening the file if this is the first, and compare it with the manifest."""
        file = self._open(file_name)
        if name not in file.names or (file.shape(name), file.dtype(name)) != (shape, dtype):
            raise CorruptCheckpointError(
                f"{file.path} is damaged: its header does not say of {name} what the manifest does. Make it again"
            )
        return file.tensor(name)


def _merging_order(blocks: list[Rows]) -> Tensor | None:
    """For ranks whose rows lie one below the other, the order that sorts them into the whole; ``None`` if sorted."""
    if all(isinstance(rows, slice) for rows in blocks):
        return None
    return torch.cat(
        [rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop) for rows in blocks]
    ).argsort()


@contextmanager
def checked_meanwhile(checkpoint: Checkpoint) -> Iterator[Callable[[], None]]:
    """Check the digests of ``checkpoint`` in another thread while the block works on it.

    Yields a function that waits for the verdict and raises :class:`CorruptCheckpointError` if it is bad; to be called
    before the results of the block are made visible.
    """
    abandoned = False

    def stop_if_abandoned(num_bytes: int) -> None:
        if abandoned:
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(checkpoint.check, advance=stop_if_abandoned)
        try:
            yield verdict.result
        except BaseException:
            abandoned = True
            raise
