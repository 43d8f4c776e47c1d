"""The indexed dataset. The format's truth is a worked example made by Megatron's own writer, byte for byte."""

import errno
import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megacore.data import IndexedDataset, IndexedDatasetWriter, token_dtype
from megacore.data.datasets import indexed
from megacore.errors import DataError, DiskFullError, OutputError

DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
INDEX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000"
    "03000000 02000000 04000000"
    "0000000000000000 0600000000000000 0a00000000000000"
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
)
TOKENS = bytes.fromhex("0500 0600 0700 0800 0900 0a00 0b00 0c00 0d00")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "corpus.v1"


@pytest.fixture
def example(prefix: Path) -> Path:
    write_raw(prefix)
    return prefix


def write_raw(prefix: Path, index: bytes = INDEX, tokens: bytes = TOKENS) -> None:
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens)


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


# --- the format


def test_writes_the_worked_example_byte_for_byte(prefix):
    write(prefix, DOCUMENTS)
    assert Path(f"{prefix}.idx").read_bytes() == INDEX
    assert Path(f"{prefix}.bin").read_bytes() == TOKENS


def test_many_documents_at_once_are_written_as_one_after_the_other(prefix):
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_documents(np.array([5, 6, 7, 8, 9]), np.array([3, 2]))
        writer.add_documents(np.array([], np.int64), np.array([], np.int64))
        writer.add_documents(np.array([10, 11, 12, 13]), np.array([4]))
    assert Path(f"{prefix}.idx").read_bytes() == INDEX
    assert Path(f"{prefix}.bin").read_bytes() == TOKENS


@pytest.mark.parametrize("at_once", [False, True])
def test_a_sequence_beyond_what_the_format_can_say_is_refused(prefix, monkeypatch, at_once):
    monkeypatch.setattr("megacore.data.datasets.indexed._LONGEST_SEQUENCE", 3)

    beyond = pytest.raises(DataError, match="a sequence of 4 ids; the format ends at 3")
    with beyond, IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_documents(np.arange(7), np.array([3, 4])) if at_once else writer.add_document([5, 6, 7, 8])


def test_the_pointers_that_are_written_above_2_gib_do_not_wrap_around(prefix):
    # Without the tokens, which would take the room.
    writer, file, size = IndexedDatasetWriter(prefix, "uint16"), io.BytesIO(), 3 * 2**28
    writer._sizes.extend([size] * 4)
    writer._write_index(file)
    assert np.frombuffer(file.getvalue(), "<i8", 4, 34 + 4 * 4).tolist() == [0, 2 * size, 4 * size, 6 * size]


def test_reads_the_worked_example(example):
    dataset = IndexedDataset(example)
    assert len(dataset) == 3
    assert [dataset[i].tolist() for i in range(3)] == DOCUMENTS
    assert dataset.sizes.tolist() == [3, 2, 4]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.num_tokens == 9
    assert dataset.dtype == np.uint16


def test_reads_tokens_across_documents(example):
    dataset = IndexedDataset(example)
    assert dataset.tokens(2, 6).tolist() == [7, 8, 9, 10]
    assert dataset.tokens(0, 9).tolist() == list(range(5, 14))
    assert dataset.tokens(9, 9).tolist() == []


@pytest.mark.parametrize("start, stop", [(-1, 3), (0, 10), (5, 4)])
def test_tokens_outside_the_stream_are_an_index_error(example, start, stop):
    with pytest.raises(IndexError, match="which has 9"):
        IndexedDataset(example).tokens(start, stop)


def test_a_sequence_beyond_the_last_is_an_index_error(example):
    dataset = IndexedDataset(example)
    assert dataset[-1].tolist() == DOCUMENTS[-1]
    with pytest.raises(IndexError):
        dataset[3]


def test_ids_cannot_be_changed_through_a_dataset(example):
    with pytest.raises(ValueError, match="read-only"):
        IndexedDataset(example)[0][0] = 1


@pytest.mark.parametrize(
    "dtype, code", [("uint8", 1), ("int8", 2), ("int16", 3), ("int32", 4), ("int64", 5), ("uint16", 8)]
)
def test_every_integer_type_has_the_formats_code_and_comes_back(prefix, dtype, code):
    largest = int(np.iinfo(dtype).max)
    dataset = write(prefix, [[0, largest], [1]], dtype)
    assert Path(f"{prefix}.idx").read_bytes()[17] == code
    assert dataset.dtype == np.dtype(dtype)
    assert [dataset[0].tolist(), dataset[1].tolist()] == [[0, largest], [1]]


@pytest.mark.parametrize(
    "vocab_size, dtype", [(99, "uint16"), (32000, "uint16"), (65499, "uint16"), (65500, "int32"), (151936, "int32")]
)
def test_ids_are_stored_in_16_bits_below_a_vocabulary_of_65500(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_a_document_may_have_several_sequences(prefix):
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1, 2], [3])
        writer.add_document([4])
    dataset = IndexedDataset(prefix)
    assert dataset.sizes.tolist() == [2, 1, 1]
    assert dataset.document_indices.tolist() == [0, 2, 3]
    assert dataset.document_lengths().tolist() == [3, 1]


def test_empty_documents_are_kept_and_add_no_token(prefix):
    dataset = write(prefix, [[1], [], [2, 3], []])
    assert [dataset[i].tolist() for i in range(4)] == [[1], [], [2, 3], []]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.tokens(0, 3).tolist() == [1, 2, 3]
    assert dataset.document_lengths().tolist() == [1, 0, 2, 0]


def test_a_dataset_without_documents_can_be_written_and_read(prefix):
    dataset = write(prefix, [])
    assert (len(dataset), dataset.num_tokens) == (0, 0)
    assert dataset.tokens(0, 0).tolist() == []


def test_a_dataset_without_document_boundaries_is_read(prefix):
    # Megatron's instruction preprocessing writes such: sequences, but no document ever ends.
    write_raw(prefix, INDEX[:18] + struct.pack("<QQ", 3, 1) + INDEX[34:70] + struct.pack("<q", 0))
    dataset = IndexedDataset(prefix)
    assert len(dataset) == 3
    assert dataset.document_indices.tolist() == [0]
    assert dataset.document_lengths().tolist() == [3, 2, 4]


def test_what_follows_the_last_boundary_is_one_more_document(prefix):
    write_raw(prefix, INDEX[:18] + struct.pack("<QQ", 3, 2) + INDEX[34:70] + struct.pack("<2q", 0, 1))
    dataset = IndexedDataset(prefix)
    assert dataset.num_documents == 2
    assert [dataset.document_start(number) for number in range(3)] == [0, 3, 9]
    assert dataset.document_lengths().tolist() == [3, 6]
    assert dataset.document_starts(0, 9) == [0, 3]
    assert [[ids.tolist() for ids in document] for document in dataset.documents()] == [[[5, 6, 7]], DOCUMENTS[1:]]


@pytest.mark.parametrize("position, nearest", [(0, 0), (1, 0), (2, 3), (4, 3), (5, 5), (7, 5), (8, 9), (9, 9)])
def test_the_nearest_beginning_of_a_document_is_found_and_of_two_the_first(example, position, nearest):
    assert IndexedDataset(example).nearest_document_start(position) == nearest


def test_arrays_are_written_as_lists_are_whatever_their_type_and_strides(prefix):
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document(np.arange(5, 8))
        writer.add_document(np.array([8, 0, 9, 0], np.uint16)[::2])
        writer.add_document(np.arange(10, 14, dtype=">i4"))
    assert Path(f"{prefix}.bin").read_bytes() == TOKENS


def test_a_worker_process_receives_the_path_and_not_the_tokens(prefix):
    dataset = write(prefix, [list(range(1000))] * 10)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[9].tolist() == list(range(1000))


def test_the_index_of_a_dataset_above_2_gib_does_not_wrap_around(prefix):
    # Two sequences of 1.5 GiB; a sparse file of that size takes no room.
    size = 3 * 2**28
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 2, 3)
    index += struct.pack("<2i", size, size) + struct.pack("<2q", 0, 2 * size) + struct.pack("<3q", 0, 1, 2)
    Path(f"{prefix}.idx").write_bytes(index)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(4 * size)
        file.seek(4 * size - 2)
        file.write(b"\x2a\x00")
    dataset = IndexedDataset(prefix)
    assert dataset.num_tokens == 2 * size
    assert int(dataset[1][-1]) == 42


# --- what is refused in writing


@pytest.mark.parametrize("dtype, wrong", [("uint16", 65536), ("uint16", -1), ("int32", 2**31), ("uint8", 256)])
def test_an_id_that_does_not_fit_the_type_is_refused(prefix, dtype, wrong):
    with (
        pytest.raises(DataError, match=f"token id {wrong} does not fit {dtype}"),
        IndexedDatasetWriter(prefix, dtype) as writer,
    ):
        writer.add_document([1, wrong, 2])


@pytest.mark.parametrize("sequence", [[1.0, 2.0], [[1, 2], [3, 4]], ["a"], 5])
def test_what_is_no_list_of_integers_is_refused(prefix, sequence):
    with pytest.raises(DataError, match="a list of integers"), IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document(sequence)


@pytest.mark.parametrize("dtype", ["float32", "uint32", "uint64", "bool"])
def test_a_type_that_the_format_has_no_code_for_is_refused(prefix, dtype):
    with pytest.raises(DataError, match=f"stored as one of uint8, .*, not {dtype}"):
        IndexedDatasetWriter(prefix, dtype)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_existing_output_is_refused_and_left_as_it_is(prefix, suffix):
    existing = Path(f"{prefix}{suffix}")
    existing.write_bytes(b"precious")
    with pytest.raises(OutputError, match=rf"corpus\.v1\{suffix} exists already\. Nothing is overwritten"):
        write(prefix, DOCUMENTS)
    assert existing.read_bytes() == b"precious"
    assert list(prefix.parent.iterdir()) == [existing]


def test_output_that_appears_during_the_writing_is_not_replaced(prefix):
    with pytest.raises(OutputError, match="exist"), IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1])
        write_raw(prefix)
    assert Path(f"{prefix}.bin").read_bytes() == TOKENS
    assert len(list(prefix.parent.iterdir())) == 2


def test_while_one_writes_a_dataset_another_that_would_is_refused(prefix):
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for ids in DOCUMENTS:
            writer.add_document(ids)
        with pytest.raises(OutputError, match=r"corpus\.v1 is being written by another process: wait for it, or name"):
            write(prefix, [[1]])
    assert Path(f"{prefix}.bin").read_bytes() == TOKENS
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["corpus.v1.bin", "corpus.v1.idx"]


def test_missing_directories_are_made(tmp_path):
    assert len(write(tmp_path / "a" / "b", DOCUMENTS)) == 3


# --- what is left behind when writing fails


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(prefix, error):
    with pytest.raises(error), IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1])
        writer.describe("{}")
        raise error
    assert list(prefix.parent.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing(prefix, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError, match=r"no room for .*corpus\.v1 \(No space left on device\)"):
        write(prefix, DOCUMENTS)
    assert list(prefix.parent.iterdir()) == []


def test_a_write_that_fails_on_the_way_is_reported_and_leaves_nothing(prefix):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError, match=r"no room for .*corpus\.v1 \(File too large\)"):
            write(prefix, [list(range(60000))] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(prefix.parent.iterdir()) == []


class FailingRename:
    """Renames files until the turn of ``number``, from 1 on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.remaining, self.rename = number, Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, target: self(path, target))

    def __call__(self, path: Path, target: Path) -> Path:
        self.remaining -= 1
        if self.remaining == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path), None, str(target))
        return self.rename(path, target)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_file_that_cannot_get_its_name_takes_away_those_that_have_theirs(prefix, monkeypatch, number):
    with monkeypatch.context() as patch:
        FailingRename(patch, number)
        message = r"corpus\.v1 could not be written: Input/output error \(.*corpus\.v1\.\w+\)"
        with pytest.raises(OutputError, match=message), IndexedDatasetWriter(prefix, "uint16") as writer:
            writer.describe("{}")
            writer.add_document([1])
    assert list(prefix.parent.iterdir()) == []
    write(prefix, DOCUMENTS)


def test_what_can_be_neither_finished_nor_removed_is_named(prefix, monkeypatch):
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".bin":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(path, missing_ok)

    FailingRename(monkeypatch, 2)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OutputError, match=r"Input/output error.* cannot be removed: delete .*/corpus\.v1\.bin$"):
        write(prefix, DOCUMENTS)
    assert [path.name for path in prefix.parent.iterdir()] == ["corpus.v1.bin"]


@pytest.mark.parametrize("moment", ["adding", "before rename 1", "before rename 2", "before rename 3"])
def test_a_kill_leaves_nothing_that_looks_like_a_dataset(prefix, moment):
    program = """if True:
        import os, pathlib, signal, sys
        from megacore.data import IndexedDatasetWriter

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        prefix, moment = sys.argv[1:]
        rename, num_renames = pathlib.Path.rename, 0
        def rename_or_die(*args):
            global num_renames
            num_renames += 1
            if moment == f"before rename {num_renames}":
                die()
            return rename(*args)
        pathlib.Path.rename = rename_or_die

        with IndexedDatasetWriter(prefix, "uint16") as writer:
            writer.describe("{}")
            for _ in range(100):
                writer.add_document(range(10000))
            if moment == "adding":
                die()
    """
    process = subprocess.run([sys.executable, "-c", program, str(prefix), moment], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"{prefix}.idx").exists()
    with pytest.raises(DataError, match=r"corpus\.v1\.idx: no such file"):
        IndexedDataset(prefix)


def test_what_a_killed_run_leaves_is_removed_by_the_next(prefix):
    program = """if True:
        import os, signal, sys
        from megacore.data import IndexedDatasetWriter

        with IndexedDatasetWriter(sys.argv[1], "uint16") as writer:
            for _ in range(200):
                writer.add_document(range(10000))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", program, str(prefix)], check=False)
    assert sum(path.stat().st_size for path in prefix.parent.rglob("*.bin")) > 1_000_000

    write(prefix, DOCUMENTS)

    assert sorted(path.name for path in prefix.parent.iterdir()) == ["corpus.v1.bin", "corpus.v1.idx"]
    assert Path(f"{prefix}.bin").read_bytes() == TOKENS


def test_memory_does_not_grow_with_the_tokens(prefix):
    import tracemalloc

    ids = np.arange(100_000, dtype=np.uint16)
    tracemalloc.start()
    try:
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            for _ in range(100):
                writer.add_document(ids)
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert Path(f"{prefix}.bin").stat().st_size == 20_000_000
    assert peak < 3_000_000


# --- what is refused in reading


def patched(offset: int, layout: str, value: int) -> bytes:
    return INDEX[:offset] + struct.pack(layout, value) + INDEX[offset + struct.calcsize(layout) :]


FOREIGN_INDEXES = {
    "empty": (b"", "is not the index of an indexed dataset"),
    "wrong magic": (b"PK\x03\x04" + INDEX[4:], r"is not the index .* begins with b'PK"),
    "old kind": (b"TNTIDX\x00\x00" + bytes(64), "old 'lazy' or 'cached' kind"),
    "header cut": (INDEX[:20], "is truncated: its header has 20 of 34 bytes"),
    "wrong version": (patched(9, "<Q", 2), "version 2 of the index format; only version 1"),
    "unknown dtype": (patched(17, "<B", 9), "dtype code 9 means an unknown type"),
    "floating point": (patched(17, "<B", 6), "dtype code 6 means floating point numbers, not token ids"),
    "cut": (INDEX[:-1], "is truncated: 101 bytes, but 3 sequences and 4 document boundaries take 102"),
    "too long": (INDEX + b"\x00", "is damaged: 103 bytes, but .* take 102"),
    "too many sequences": (patched(18, "<Q", 2**62), "is truncated: 102 bytes"),
    "negative size": (patched(38, "<i", -2), "is damaged: sequence 1 has a negative size"),
    "wrong size": (patched(38, "<i", 3), "is damaged: sequence 2 does not begin where the one before ends"),
    "wrong pointer": (patched(54, "<q", 8), "is damaged: sequence 1 does not begin where the one before ends"),
    "boundaries not from 0": (patched(70, "<q", 1), "boundaries do not ascend from 0"),
    "boundaries descend": (patched(86, "<q", 0), "boundaries do not ascend from 0"),
    "boundary beyond": (patched(94, "<q", 4), "a document ends at sequence 4 of 3"),
}


@pytest.mark.parametrize("index, message", FOREIGN_INDEXES.values(), ids=FOREIGN_INDEXES.keys())
def test_a_damaged_or_foreign_index_is_refused(prefix, index, message):
    write_raw(prefix, index=index)
    with pytest.raises(DataError, match=rf"corpus\.v1\.idx: .*{message}"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_index_is_checked_a_part_at_a_time(example, monkeypatch, at_once):
    monkeypatch.setattr(indexed, "_CHECK_BLOCK", at_once)
    assert IndexedDataset(example).num_tokens == 9
    for name in ("negative size", "wrong size", "wrong pointer", "boundaries not from 0", "boundaries descend"):
        index, message = FOREIGN_INDEXES[name]
        write_raw(example, index=index)
        with pytest.raises(DataError, match=message):
            IndexedDataset(example)


def test_memory_does_not_grow_with_the_documents_when_an_index_is_checked(prefix):
    import tracemalloc

    # Documents without a sequence; a sparse file takes no room.
    write_raw(prefix, struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 2**24), b"")
    os.truncate(f"{prefix}.idx", 34 + 8 * 2**24)
    tracemalloc.start()
    try:
        assert IndexedDataset(prefix).num_documents == 2**24 - 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize("tokens", [b"", TOKENS[:-1], TOKENS + b"\x00\x00"])
def test_a_bin_of_another_length_is_refused(prefix, tokens):
    write_raw(prefix, tokens=tokens)
    with pytest.raises(DataError, match=rf"corpus\.v1\.bin: {len(tokens)} bytes, but corpus\.v1\.idx describes 18"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_file_is_named(example, suffix):
    Path(f"{example}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"corpus\.v1\{suffix}: no such file; .* without its \.bin or \.idx"):
        IndexedDataset(example)
