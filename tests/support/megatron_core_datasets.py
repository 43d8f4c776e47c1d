"""Datasets that megatron-core reads and writes; run in a process of its own by test_data_commands.py.

megatron-core changes what torch may load for the whole process.
"""

import numpy as np
import pytest
from test_data_commands import DOCUMENTS, call, write

from megacore.data import IndexedDataset


@pytest.fixture(scope="module")
def indexed_dataset():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core has no wheel for this")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8"])
def test_megatron_core_reads_what_megacore_writes(indexed_dataset, tmp_path, dtype):
    prefix = write(tmp_path / "d", DOCUMENTS, dtype)
    theirs = indexed_dataset.IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.sequence_lengths.tolist() == [3, 0, 2, 4]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs[0].dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megacore_reads_what_megatron_core_writes(indexed_dataset, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=dtype)
    for document in ([[5, 6, 7]], [[8, 9], [10]], [[11, 12, 13, 14]]):
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = IndexedDataset(tmp_path / "d")
    assert [[ids.tolist() for ids in document] for document in dataset.documents()] == [
        [[5, 6, 7]], [[8, 9], [10]], [[11, 12, 13, 14]],
    ]  # fmt: skip
    assert dataset.dtype == dtype


def test_megatron_core_reads_what_was_merged_as_what_it_merges_itself(indexed_dataset, tmp_path):
    one, two = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "two", [[1, 2], [3]])
    call("merge", one, two, "--out", tmp_path / "ours")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    builder.add_index(str(one))
    builder.add_index(str(two))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
