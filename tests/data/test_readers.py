"""What ``tokenize`` takes: files of several formats, several keys, malformed records; and how it ends."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from megacore.data import IndexedDataset, tokenize
from megacore.data.preprocess.readers import PIECE_BYTES, pieces
from megacore.errors import DataError, OutputError

TEXTS = ["one", "two ü", "three\nlines", "x" * 9] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte."""
    directory = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: number for number, character in enumerate(alphabet)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def lengths(tokenizer, tmp_path):
    """Tokenize and return how many bytes each document has."""

    def run(*inputs, **options) -> list[int]:
        options = {"new_tokens": False} | options
        tokenize(inputs, tokenizer=tokenizer, out=tmp_path / "out", **options)
        return IndexedDataset(tmp_path / "out").sizes.tolist()

    return run


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def num_bytes(texts: list[str]) -> list[int]:
    return [len(text.encode()) for text in texts]


@pytest.mark.parametrize("name", ["in.JSONL", "in.ndjson", "in.jsonl.GZ"])
def test_names_say_what_a_file_holds_whatever_their_case(lengths, tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(jsonl(TEXTS)) if name.endswith("GZ") else jsonl(TEXTS))
    assert lengths(tmp_path / name) == num_bytes(TEXTS)


@pytest.mark.parametrize("name", ["in.jsonl.bz2", "in.zip", "in.jsonl.XZ"])
def test_what_is_packed_in_a_way_that_is_not_read_is_no_text(lengths, tmp_path, name):
    (tmp_path / name).write_bytes(b"text, for all that can be seen")
    with pytest.raises(DataError, match=r"is not read: unpack it, or pack it as \.gz or \.zst instead"):
        lengths(tmp_path / name)


@pytest.mark.parametrize("num_zeros", [1000, 20_000])  # in one part of the file that is read at once, and in several
def test_zeros_that_fill_up_a_compressed_file_are_passed_over(lengths, tmp_path, num_zeros):
    content = gzip.compress(jsonl(TEXTS)) + bytes(num_zeros)
    assert gzip.decompress(content) == jsonl(TEXTS)
    (tmp_path / "in.jsonl.gz").write_bytes(content)
    advanced: list[int] = []
    assert lengths(tmp_path / "in.jsonl.gz", advance=advanced.append) == num_bytes(TEXTS)
    assert sum(advanced) == len(content)


def test_zeros_between_the_members_of_a_compressed_file_are_passed_over(lengths, tmp_path):
    content = (gzip.compress(jsonl(TEXTS)) + bytes(20_000)) * 2
    assert gzip.decompress(content) == jsonl(TEXTS) * 2
    (tmp_path / "in.jsonl.gz").write_bytes(content)
    assert lengths(tmp_path / "in.jsonl.gz") == num_bytes(TEXTS) * 2


def test_a_compressed_file_of_nothing_but_zeros_is_refused(lengths, tmp_path):
    # As a crash of the machine leaves it.
    (tmp_path / "in.jsonl.gz").write_bytes(bytes(20_000))
    with pytest.raises(DataError, match="is damaged, or not compressed as its name says"):
        lengths(tmp_path / "in.jsonl.gz")


@pytest.mark.parametrize("compress, name", [(gzip.compress, "in.jsonl.gz"), (zstandard.compress, "in.jsonl.zst")])
def test_a_compressed_file_of_lines_that_repeat_comes_in_pieces_of_a_few_mebibytes(tmp_path, compress, name):
    content = b'{"text": "abcdefgh"}\n' * 3_000_000
    (tmp_path / name).write_bytes(compress(content))
    found = [piece.content for piece in pieces(tmp_path / name)]
    assert b"".join(found) == content
    assert max(map(len, found)) < 10 << 20


def test_a_column_of_text_may_be_in_a_dictionary(lengths, tmp_path):
    column = pyarrow.array(TEXTS).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    assert lengths(tmp_path / "in.parquet") == num_bytes(TEXTS)


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.json.gz", "in.jsonl.zst"])
@pytest.mark.parametrize("num_members", [1, 2])
def test_compressed_lines_are_read_with_all_members_of_the_file(lengths, tmp_path, name, num_members):
    compress = gzip.compress if name.endswith(".gz") else zstandard.compress
    (tmp_path / name).write_bytes(compress(jsonl(TEXTS)) * num_members)
    assert lengths(tmp_path / name) == num_bytes(TEXTS) * num_members


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_lines_across_the_borders_of_pieces_are_read_once_and_in_order(lengths, tmp_path, name, workers):
    compress = gzip.compress if name.endswith(".gz") else zstandard.compress
    # Noise, which does not become so small that all of it is read at once.
    texts = [random.Random(size).randbytes(size).hex() for size in [*range(1, 1500), 2 * PIECE_BYTES + 5, 3, 7]]
    (tmp_path / name).write_bytes(compress(jsonl(texts).rstrip()))
    advanced: list[int] = []
    assert lengths(tmp_path / name, workers=workers, advance=advanced.append) == num_bytes(texts)
    assert len(advanced) > 3
    assert sum(advanced) == (tmp_path / name).stat().st_size


def test_the_line_of_an_error_is_right_in_later_pieces_of_a_compressed_file_too(lengths, tmp_path):
    good = jsonl([random.Random(number).randbytes(500).hex() for number in range(3000)])
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(good + b"oops\n" + good))
    with pytest.raises(DataError, match=r"in\.jsonl\.gz:3001: is not JSON"):
        lengths(tmp_path / "in.jsonl.gz")


def test_a_window_as_large_as_zstd_long_writes_is_taken(lengths, tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "in.jsonl.zst").write_bytes(compressor.compress(jsonl(TEXTS)) + compressor.flush())
    assert lengths(tmp_path / "in.jsonl.zst") == num_bytes(TEXTS)


@pytest.mark.parametrize("compress, name", [(gzip.compress, "in.jsonl.gz"), (zstandard.compress, "in.jsonl.zst")])
def test_a_compressed_file_that_ends_too_early_is_refused_and_nothing_is_left(lengths, tmp_path, compress, name):
    (tmp_path / name).write_bytes(compress(jsonl([f"{number}" for number in range(9999)]))[:-9])
    with pytest.raises(DataError, match=rf"{name}: is truncated"):
        lengths(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(lengths, tmp_path, name):
    (tmp_path / name).write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match="is damaged, or not compressed as its name says"):
        lengths(tmp_path / name)


def test_compressed_plain_text_is_one_document(lengths, tmp_path):
    (tmp_path / "in.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert lengths(tmp_path / "in.txt.gz") == [7]


def test_a_parquet_file_is_read_row_group_by_row_group(lengths, tmp_path):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    assert lengths(tmp_path / "in.parquet", workers=2) == num_bytes(TEXTS)


@pytest.mark.parametrize(
    "column, message",
    [
        ({"content": ["a"]}, r"in\.parquet: has no column 'text' \(its columns: 'content'\)"),
        ({"text": [1]}, "column 'text' is of type int64, not string"),
        ({"text": ["a", None]}, "in.parquet: row 2: the value of 'text' is null"),
    ],
)
def test_a_parquet_file_without_texts_is_refused(lengths, tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=message):
        lengths(tmp_path / "in.parquet")


def test_a_damaged_parquet_file_is_refused(lengths, tmp_path):
    table = pyarrow.table({"text": [random.Random(number).randbytes(500).hex() for number in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    content = (tmp_path / "in.parquet").read_bytes()
    (tmp_path / "in.parquet").write_bytes(content[:1000] + b"\xff" * 9000 + content[10000:])
    with pytest.raises(DataError, match=r"in\.parquet: row group 1 is damaged"):
        lengths(tmp_path / "in.parquet")


def test_a_parquet_file_with_text_that_is_not_utf_8_is_refused(lengths, tmp_path):
    offsets, text = struct.pack("<2i", 0, 2), b"\xff\xfe"
    column = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(offsets), pyarrow.py_buffer(text))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet: row group 1 is damaged: .*0xff"):
        lengths(tmp_path / "in.parquet")


def test_the_row_of_an_error_is_right_in_later_row_groups_too(lengths, tmp_path):
    table = pyarrow.table({"text": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    with pytest.raises(DataError, match=rf"in\.parquet: row {len(TEXTS) + 1}: the value of 'text' is null"):
        lengths(tmp_path / "in.parquet")


def test_a_pattern_stands_for_its_files_sorted(lengths, tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name * (ord(name) - 96)]))
    assert lengths(tmp_path / "*.jsonl") == [1, 2, 3]


def test_a_pattern_that_matches_nothing_is_refused(lengths, tmp_path):
    with pytest.raises(DataError, match=r"\*\.jsonl: no file matches this pattern"):
        lengths(tmp_path / "*.jsonl")


@pytest.mark.parametrize("workers", [1, 3])
def test_lines_across_the_borders_of_pieces_are_read_once_and_in_order(lengths, tmp_path, workers):
    # Lines that end at, before and behind a border, and one that is longer than two pieces.
    line = len(jsonl([""]))
    sizes = [PIECE_BYTES - line, PIECE_BYTES - line - 1, 1, 2 * PIECE_BYTES + 5, 3, PIECE_BYTES // 3, 7]
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * size for size in sizes]).rstrip())
    assert lengths(tmp_path / "in.jsonl", workers=workers) == sizes


@pytest.mark.parametrize("workers", [1, 2])
def test_the_line_of_an_error_is_right_in_later_pieces_too(lengths, tmp_path, workers):
    good = jsonl(["x" * 999]) * 3000
    (tmp_path / "first.jsonl").write_bytes(good)
    (tmp_path / "in.jsonl").write_bytes(good + b"oops\n" + good)
    with pytest.raises(DataError, match=r"in\.jsonl:3001: is not JSON"):
        lengths(tmp_path / "first.jsonl", tmp_path / "in.jsonl", workers=workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.jsonl", "in.jsonl"]


def test_malformed_records_are_skipped_and_named_when_that_is_asked_for(tokenizer, tmp_path):
    bad = [b"oops", b'{"content": "a"}', b'{"text": 7}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[]", b"null"]
    (tmp_path / "in.jsonl").write_bytes(jsonl(["a"]) + b"\n".join(bad) + b"\n" + jsonl(["bb"]))
    summary = tokenize(tmp_path / "in.jsonl", tokenizer=tokenizer, out=tmp_path / "out", on_error="skip")
    assert IndexedDataset(tmp_path / "out").sizes.tolist() == [1, 2]
    assert summary.num_erroneous_documents == 7
    assert [error.split(": ")[0] for error in summary.first_errors] == [
        f"{tmp_path}/in.jsonl:{line}" for line in range(2, 7)
    ]


def test_each_of_several_keys_makes_a_dataset_of_its_own(tokenizer, tmp_path):
    records = [{"title": "a", "text": "one"}, {"title": "", "text": "two"}, {"title": "bb", "text": "x" * 9}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = tokenize(
        tmp_path / "in.jsonl", tokenizer=tokenizer, out=tmp_path / "out", json_key=["text", "title"], new_tokens=False
    )
    assert IndexedDataset(tmp_path / "out_text").sizes.tolist() == [3, 3, 9]
    assert IndexedDataset(tmp_path / "out_title").sizes.tolist() == [1, 2]
    assert summary.num_empty_documents == 1
    assert not (tmp_path / "out.bin").exists()


def test_a_dataset_of_one_of_several_keys_is_written_by_nobody_else_meanwhile(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"title": "a", "text": "one"}')

    def write_the_same(num_bytes: int) -> None:
        for name in ("out_title", "out"):
            with pytest.raises(OutputError, match=f"{name} is being written by another process"):
                tokenize(tmp_path / "in.jsonl", tokenizer=tokenizer, out=tmp_path / name, new_tokens=False)

    tokenize(
        tmp_path / "in.jsonl",
        tokenizer=tokenizer,
        out=tmp_path / "out",
        json_key=["text", "title"],
        new_tokens=False,
        advance=write_the_same,
    )
    names = [f"out_{key}.{suffix}" for key in ("text", "title") for suffix in ("bin", "idx", "json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", *names]


def test_a_key_that_no_file_can_be_named_after_is_refused_beside_others_and_taken_alone(lengths, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"a/b": "one", "c": "two"}')
    with pytest.raises(DataError, match=r"'a/b' cannot be a part of the name.*tokenize it alone"):
        lengths(tmp_path / "in.jsonl", json_key=["a/b", "c"])
    assert lengths(tmp_path / "in.jsonl", json_key=["a/b"]) == [3]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_input_that_the_system_cannot_read_is_named(lengths, tmp_path, workers):
    # A file whose first byte is none.
    with pytest.raises(DataError, match=r"^/proc/self/mem: cannot be read: Input/output error$"):
        lengths("/proc/self/mem", workers=workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["in.jsonl", "second.jsonl.gz"])
def test_an_input_that_vanishes_while_others_are_read_is_named(lengths, tmp_path, workers, name):
    (tmp_path / "in.jsonl").write_bytes(jsonl(["x" * 999]) * 20_000)
    (tmp_path / "second.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))

    def vanish(num_bytes: int) -> None:
        (tmp_path / name).unlink(missing_ok=True)

    with pytest.raises(DataError, match=rf"{name}: cannot be read: No such file or directory"):
        lengths(tmp_path / "in.jsonl", tmp_path / "second.jsonl.gz", workers=workers, advance=vanish)
    assert not list(tmp_path.glob("*out*"))


def test_a_name_that_no_file_can_have_is_an_error_that_says_it(lengths, tmp_path):
    with pytest.raises(DataError, match="xxx: cannot be read: File name too long"):
        lengths(tmp_path / ("x" * 300))


def test_a_pipe_is_refused_with_what_to_do(lengths, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        DataError, match=r"pipe: is not a regular file but a pipe or device.*: write it into a file first"
    ):
        lengths(tmp_path / "pipe")


def run_command(tokenizer: Path, *arguments: str | Path, **options) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megacore", "tokenize", "--no-new-tokens", "--tokenizer", tokenizer, *arguments]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, **options)


def test_ctrl_c_ends_all_processes_and_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(["some words " * 200]) * 30_000)
    process = run_command(
        tokenizer, "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--workers", "2", start_new_session=True
    )
    while not (staged := tmp_path / ".out.incomplete/out.bin").exists() or staged.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):  # soon nobody of the session is left
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_a_script_need_not_guard_itself_from_its_own_processes(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS))
    script = (
        f"from megacore.data import tokenize\ntokenize('in.jsonl', tokenizer={str(tokenizer)!r}, out='o', workers=2)"
    )
    (tmp_path / "script.py").write_text(script)
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(IndexedDataset(tmp_path / "o")) == len(TEXTS)


def test_a_process_that_dies_ends_the_command_with_what_to_do(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(["some words " * 200]) * 30_000)
    process = run_command(tokenizer, "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--workers", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (staged := tmp_path / ".out.incomplete/out.bin").exists() or staged.stat().st_size == 0:
        time.sleep(0.02)
    for child in children.read_text().split():
        if b"worker_pool import work" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"a tokenizing process ended with exit code -9" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
