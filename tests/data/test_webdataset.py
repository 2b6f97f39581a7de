"""The shards stay webdataset shards: what the stock reader finds is what the rows are cut from."""

from pathlib import Path

import numpy as np
import pytest
import webdataset

from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.manifest import Split, load_manifest


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset 1.0.2 leaves files open
@pytest.mark.parametrize("split", ["train", "validation"])
def test_stock_webdataset_reads_the_same_tokens(shards: Path, split: Split) -> None:
    rows = WindowDataset(shards, split, seq_len=5, num_offsets=1)
    read = rows.read(np.arange(len(rows)))["tokens"][:, :5]
    first = 0
    for shard in load_manifest(shards).shards_of(split):
        samples = list(webdataset.WebDataset([str(shards / shard.name)], shardshuffle=False))
        tokens = np.concatenate([np.frombuffer(sample["tok"], "<u2") for sample in samples])
        lengths = np.concatenate([np.frombuffer(sample["len"], "<u4") for sample in samples])
        num_rows = (tokens.size - 6) // 5 + 1
        assert [sample["__key__"] for sample in samples] == [member.key for member in shard.members]
        assert np.array_equal(read[first : first + num_rows].ravel(), tokens[: num_rows * 5])
        assert lengths.sum() == tokens.size
        first += num_rows
    assert first == len(rows) > 10
