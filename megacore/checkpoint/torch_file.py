"""``.pt`` and ``.pth`` files of ``torch.save``, read lazily and written front to back, without holding their tensors.

Such a file is a zip archive whose entries are not compressed: ``data.pkl`` is the pickled document, in which every
tensor is a reference to one of the entries ``data/0``, ``data/1``, … with its elements. Reading maps the file, and the
unpickler is torch's restricted one (``weights_only``): it builds what is on its list and runs nothing else.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from megacore.checkpoint.matrix import LazyMatrix, StoredMatrix
from megacore.checkpoint.safetensors_file import DTYPES, OutputTensor, chunks_of
from megacore.errors import CheckpointError, CorruptCheckpointError
from megacore.parallel import Rows

_ALIGNMENT = 64  # of the tensors' bytes in the file, as torch writes them
_LOCAL_HEADER_BYTES = 30
_PADDING_FIELD = 0x4246  # of the extra field that moves an entry to its alignment; torch's own is "FB" too
_ZIP64_FIELD_BYTES = 20  # what zipfile adds to the local header of an entry that is to hold more than 4 GB
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}

Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that a file may name, or what is to be used in place of the one called ``"module.name"``."""


class Foreign:
    """Stands for an object of a class that is not installed here: what it was made of, and nothing else.

    It is written back under the name that it came with.
    """

    qualified_name: ClassVar[str]
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def foreign(qualified_name: str) -> Allowed:
    """An entry of an allow-list: objects of class ``qualified_name`` are read as :class:`Foreign`."""
    return type(qualified_name.rpartition(".")[2], (Foreign,), {"qualified_name": qualified_name}), qualified_name


def read_torch_file(path: Path, *, allowed: Sequence[Allowed] = ()) -> Any:
    """The document in ``path``. Its tensors are mapped; a block of one is read when it is looked at.

    Args:
        path: a file that ``torch.save`` wrote.
        allowed: what the file may contain beside tensors, containers, numbers and strings.

    Raises:
        CheckpointError: when the file is missing, or contains what is not allowed. Nothing of that is executed.
        CorruptCheckpointError: when it is truncated or was not written by ``torch.save``.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
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
    """Why the restricted unpickler refused ``path``."""
    known = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in allowed}
    try:
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known
    except Exception:  # the document is so odd that not even its names can be listed
        named = set()
    what = f"names {', '.join(sorted(named))}" if named else "holds instructions"
    return (
        f"{path} {what}, which a file of weights has no need of. It was not loaded and nothing in it was executed: "
        "a file like this can run any program. If you trust whoever wrote it, have them save the tensors alone"
    )


class MappedMatrix(LazyMatrix):
    """A tensor of one or two dimensions that lies in a mapped file, in whatever order of its elements."""

    def __init__(self, tensor: Tensor) -> None:
        matrix = tensor if tensor.dim() == 2 else tensor.unsqueeze(1)
        super().__init__(matrix.shape[0], matrix.shape[1], tensor.dtype)
        self._matrix = matrix

    def read(self, rows: Rows, columns: slice) -> Tensor:
        block = self._matrix[:, columns]
        return block[rows] if isinstance(rows, slice) else block.index_select(0, rows)


def output_tensor(name: str, tensor: Tensor) -> OutputTensor:
    """A mapped tensor of any shape, to be written again as it is."""
    flat = tensor.reshape(-1)
    return OutputTensor(name, tuple(tensor.shape), tensor.dtype, StoredMatrix(len(flat), 1, flat.dtype, lambda: flat))


def write_torch_file(path: Path, document: Any, *, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write ``document`` to ``path`` so that ``torch.load`` reads it. ``advance`` is told of every few bytes written.

    Args:
        path: the file; it is not flushed to the disk.
        document: nested dictionaries and lists of plain values; an :class:`OutputTensor` in it becomes a tensor, its
            elements are written a few at a time.
        advance: is told of every few bytes written.
    """
    buffer = BytesIO()
    pickler = _DocumentPickler(buffer)
    pickler.dump(document)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_entry(archive, "data.pkl", [buffer.getbuffer()])
        _write_entry(archive, "byteorder", [sys.byteorder.encode()])
        for key, tensor in enumerate(pickler.tensors):
            _write_entry(archive, f"data/{key}", _told(chunks_of(tensor), advance), num_bytes=tensor.num_bytes)
        _write_entry(archive, "version", [b"3\n"])


class _Storage:
    """Where the elements of a tensor are; what the pickled tensor refers to."""

    def __init__(self, key: int, tensor: OutputTensor) -> None:
        self.key = key
        self.tensor = tensor


# The pickler in Python, since the one in C would import what it writes the name of.
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


class _ForeignName:
    """A class by its name alone. Callable, since the pickler asks what it reduces to for that."""

    def __init__(self, qualified_name: str) -> None:
        self.qualified_name = qualified_name

    def __call__(self) -> None:
        raise AssertionError("is only ever written")


_DocumentPickler.dispatch[_ForeignName] = _DocumentPickler.save_foreign_name


def _told(chunks: Iterable[memoryview], advance: Callable[[int], None]) -> Iterable[memoryview]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))


def _write_entry(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes | memoryview], num_bytes: int = 0) -> None:
    """Append an entry, its first byte aligned. Every entry is written in zip64 form, whatever its size."""
    entry = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    entry.file_size = num_bytes
    start = archive.start_dir + _LOCAL_HEADER_BYTES + len(entry.filename) + _ZIP64_FIELD_BYTES + 4
    padding = -start % _ALIGNMENT
    entry.extra = _PADDING_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as file:
        for chunk in chunks:
            file.write(chunk)


def check_dtypes(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise :class:`CheckpointError` for a tensor whose dtype no parameter has (quantized weights, for example)."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            found = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: {name} has dtype {found}; parameters may be {', '.join(DTYPES)}")
