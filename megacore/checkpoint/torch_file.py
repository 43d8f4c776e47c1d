"""``.pt`` and ``.pth`` files of ``torch.save``, read lazily and written sequentially, without holding their tensors.

The writer is our own, since ``torch.save`` needs all tensors in memory. Such a file is a zip archive of uncompressed
entries: ``data.pkl`` is the pickled document, in which every tensor refers to one of the entries ``data/0``,
``data/1``, … with its elements. Reading maps the file with torch's restricted unpickler (``weights_only``), which
builds only what is on its allow-list and runs nothing else.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from megacore.checkpoint.input_files import require_readable
from megacore.checkpoint.matrix import as_matrix
from megacore.checkpoint.safetensors_file import DTYPES, OutputTensor, chunks_of
from megacore.errors import CheckpointError, CorruptCheckpointError

_ALIGNMENT = 64  # torch aligns the bytes of tensors like this
_LOCAL_HEADER_BYTES = 30
_PADDING_FIELD = 0x4246  # "FB", torch's id of the extra field that pads an entry to its alignment
_ZIP64_FIELD_BYTES = 20  # zipfile adds this field to the local header of an entry of more than 4 GB
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}

Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that a file may name, or ``(replacement, "module.name")``."""


class Foreign:
    """A stand-in for an object whose class is not installed: its arguments and state, and nothing else.

    It is written under the name of the original class.
    """

    qualified_name: ClassVar[str]
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def foreign(qualified_name: str) -> Allowed:
    """Return the allow-list entry that reads objects of class ``qualified_name`` as :class:`Foreign`."""
    return type(qualified_name.rpartition(".")[2], (Foreign,), {"qualified_name": qualified_name}), qualified_name


def read_torch_file(path: Path, *, allowed: Sequence[Allowed] = ()) -> Any:
    """Return the document in ``path``. Its tensors are mapped; elements are read when they are used.

    ``allowed`` are what the file may contain beside tensors, containers, numbers and strings.

    Raises:
        CheckpointError: when the file is missing or cannot be read, or contains something that is not allowed, which is
            not executed.
        CorruptCheckpointError: when it is truncated or was not written by ``torch.save``.
    """
    require_readable(path)
    if not zipfile.is_zipfile(path):
        raise CorruptCheckpointError(
            f"{path} is incomplete ({path.stat().st_size} bytes), or older than torch 1.6: fetch it "
            "again, or load and save it with a later torch"
        )
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, allowed)) from error
    except (RuntimeError, ValueError, TypeError, EOFError, KeyError, IndexError, AttributeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CorruptCheckpointError(
            f"{path} is damaged or incomplete ({path.stat().st_size} bytes): {reason}. Fetch it again"
        ) from error


def _refusal(path: Path, allowed: Sequence[Allowed]) -> str:
    """Return the reason why the restricted unpickler refused ``path``."""
    known = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in allowed}
    try:
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known
    except Exception:  # not even the names in the document can be listed
        named = set()
    found = f"names {', '.join(sorted(named))}" if named else "contains instructions"
    return (
        f"{path} {found}, which a file of weights does not need. It was not loaded and nothing in it was executed: "
        "a file like this can run any program. If you trust its author, ask for a file with the tensors alone"
    )


def output_tensor(name: str, tensor: Tensor) -> OutputTensor:
    """Return a mapped tensor of any shape as an output that writes it unchanged."""
    return OutputTensor(name, tuple(tensor.shape), tensor.dtype, as_matrix(tensor.reshape(-1)))


def write_torch_file(path: Path, document: Any, *, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write ``document`` to ``path`` in the format that ``torch.load`` reads, without flushing it to the disk.

    The document is nested dictionaries and lists of plain values. An :class:`OutputTensor` in it becomes a tensor,
    whose elements are written a few megabytes at a time. ``advance`` receives the bytes written since its last call.
    """
    buffer = BytesIO()
    pickler = _DocumentPickler(buffer)
    pickler.dump(document)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_entry(archive, "data.pkl", [buffer.getbuffer()])
        _write_entry(archive, "byteorder", [sys.byteorder.encode()])
        for key, tensor in enumerate(pickler.tensors):
            _write_entry(archive, f"data/{key}", _with_progress(chunks_of(tensor), advance), num_bytes=tensor.num_bytes)
        _write_entry(archive, "version", [b"3\n"])


@dataclass(frozen=True)
class _Storage:
    """The storage that a pickled tensor refers to, with the number of its entry."""

    key: int
    tensor: OutputTensor


# The Python pickler, since the one in C imports every class whose name it writes.
class _DocumentPickler(pickle._Pickler):
    """Pickles a document as ``torch.save`` does, and collects its tensors."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[OutputTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        return "storage", _STORAGES[tensor.dtype], str(obj.key), "cpu", tensor.num_bytes // tensor.dtype.itemsize

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Foreign):
            return _ForeignName(obj.qualified_name), obj.arguments, obj.state
        if isinstance(obj, Tensor):
            raise TypeError("a tensor must be an OutputTensor to be written")
        if not isinstance(obj, OutputTensor):
            return NotImplemented
        storage = _Storage(len(self.tensors), obj)
        self.tensors.append(obj)
        strides = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, OrderedDict())

    def save_foreign_name(self, name: _ForeignName) -> None:
        module, _, attribute = name.qualified_name.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _ForeignName:
    """The name of a class. It is callable because the pickler requires that of a constructor."""

    qualified_name: str

    def __call__(self) -> None:
        raise AssertionError("a name is only written, never called")


_DocumentPickler.dispatch[_ForeignName] = _DocumentPickler.save_foreign_name


def _with_progress(chunks: Iterable[memoryview], advance: Callable[[int], None]) -> Iterable[memoryview]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))


def _write_entry(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes | memoryview], num_bytes: int = 0) -> None:
    """Append an entry whose first byte is aligned. Every entry is written in zip64 form, whatever its size."""
    entry = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    entry.file_size = num_bytes
    start = archive.start_dir + _LOCAL_HEADER_BYTES + len(entry.filename) + _ZIP64_FIELD_BYTES + 4
    padding = -start % _ALIGNMENT
    entry.extra = _PADDING_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as file:
        for chunk in chunks:
            file.write(chunk)


def check_dtypes(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise :class:`CheckpointError` if a tensor has a dtype that no parameter may have (quantized weights do)."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            found = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: {name} has dtype {found}; parameters may be {', '.join(DTYPES)}")
