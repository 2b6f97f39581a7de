import json
import pickle
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards import mapped as mapped_module
from mtp_lightning.data.shards.index import write_index
from mtp_lightning.data.shards.manifest import Manifest, Split, load_manifest, manifest_text
from mtp_lightning.data.shards.writer import SplitWriter
from mtp_lightning.data.tokenizers.base import TokenArray
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, is_held_out, rows_by_hand, write_corpus

SPLITS: list[Split] = ["train", "validation"]


def held_out_or_not(documents: dict[str, bytes], split: Split) -> list[bytes]:
    return [text for name, text in documents.items() if is_held_out(name, 0.3) == (split == "validation")]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("seq_len", "num_offsets"), [(2, 1), (7, 3), (8, 4), (64, 1), (130, 5), (200, 8)])
def test_rows_are_documents_concatenated_and_cut(
    shards: Path, corpus: Path, split: Split, seq_len: int, num_offsets: int
) -> None:
    tokens, documents = rows_by_hand(
        held_out_or_not(write_corpus(corpus), split),
        load_manifest(shards),
        split,
        seq_len=seq_len,
        num_offsets=num_offsets,
    )
    rows = WindowDataset(shards, split, seq_len=seq_len, num_offsets=num_offsets)
    batch = rows.read(np.arange(len(rows)))
    assert batch["tokens"].tolist() == tokens
    assert batch["documents"].tolist() == documents
    assert max(map(max, documents)) > 0


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=60),
    seq_len=st.integers(2, 30),
    num_offsets=st.integers(1, 6),
    member_tokens=st.integers(1, 120),
    shard_bytes=st.sampled_from([1, 3000, 10**6]),
)
def test_rows_are_right_for_any_shape_of_shards(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    num_offsets: int,
    member_tokens: int,
    shard_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    texts = [(ascii_letters * 2)[number % 26 :][:length] for number, length in enumerate(lengths)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    held_out = [is_held_out(f"x.jsonl:{number}", 0.5) for number in range(1, len(lengths) + 1)]
    assume(len(set(held_out)) == 2)
    manifest = build_tiny(
        [str(folder / "x.jsonl")],
        folder / "shards",
        validation_fraction=0.5,
        member_tokens=member_tokens,
        shard_bytes=shard_bytes,
    )
    documents = [text.encode() for text, is_out in zip(texts, held_out, strict=True) if not is_out]
    cut = {"seq_len": seq_len, "num_offsets": num_offsets}
    tokens, numbers = rows_by_hand(documents, manifest, "train", **cut)
    if not tokens:
        with pytest.raises(DataError, match="tokens of one row"):
            WindowDataset(folder / "shards", "train", **cut)
        return
    order = np.random.default_rng(0).permutation(len(tokens))
    batch = WindowDataset(folder / "shards", "train", **cut).read(order)
    assert batch["tokens"].tolist() == [tokens[row] for row in order]
    assert batch["documents"].tolist() == [numbers[row] for row in order]


def test_row_that_crosses_members_is_read_from_all_of_them(tmp_path: Path, corpus: Path) -> None:
    members = build_tiny([str(corpus)], tmp_path / "shards", shard_bytes=10**6).shards[0].members
    first = members[0].num_tokens
    rows = WindowDataset(tmp_path / "shards", "train", seq_len=first, num_offsets=4)
    data = (tmp_path / "shards/train/00000.tar").read_bytes()
    both = [np.frombuffer(data, "<u2", member.num_tokens, member.tokens_at) for member in members[:2]]
    assert rows.read(np.array([0]))["tokens"][0].tolist() == np.concatenate(both)[: first + 4].tolist()
    assert rows.describe(1) == "train/00000.tar, member 1, token 0"


def test_wide_ids_are_read_as_they_were_written(tmp_path: Path) -> None:
    documents = {split: [np.array([70_000, 1, 2, 99_999], "<u4")] * 9 for split in SPLITS}
    manifest = write_wide(tmp_path, documents)
    rows = WindowDataset(tmp_path, "train", seq_len=5, num_offsets=2)
    assert manifest.dtype == "uint32"
    assert rows.read(np.array([1]))["tokens"].tolist() == [[1, 2, 99_999, 70_000, 1, 2, 99_999]]
    assert rows.read(np.array([1]))["documents"].tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def write_wide(folder: Path, documents: dict[Split, list[TokenArray]]) -> Manifest:
    """Write a folder as a tokenizer with 100,000 ids would have it."""
    shards = []
    for split in SPLITS:
        writer = SplitWriter(folder, split, member_tokens=10, shard_bytes=10**6)
        for document in documents[split]:
            writer.add(document)
        shards += writer.close()
    manifest = Manifest(
        dtype="uint32",
        tokenizer="wide",
        tokenizer_hash="",
        vocabulary=100_000,
        end_of_document=99_999,
        largest_token=99_999,
        validation_share=0.5,
        source_files=1,
        source_bytes=1,
        source_listing="",
        skipped_empty=0,
        skipped_binary=0,
        shards=shards,
    )
    write_index(folder, manifest)
    (folder / "manifest.json").write_text(manifest_text(manifest))
    return manifest


def test_too_few_tokens_for_a_row_are_refused(shards: Path) -> None:
    longest = max(shard.num_tokens for shard in load_manifest(shards).shards_of("train"))
    assert len(WindowDataset(shards, "train", seq_len=longest - 3, num_offsets=3)) == 1
    with pytest.raises(DataError, match=rf"the T \+ n = {longest + 1} tokens .* found {longest} tokens .* lower data"):
        WindowDataset(shards, "train", seq_len=longest - 2, num_offsets=3)


@pytest.mark.parametrize("wrong", [[-1], [10**6], [0, 10**6]])
def test_row_out_of_range_is_refused(shards: Path, wrong: list[int]) -> None:
    rows = WindowDataset(shards, "train", seq_len=8, num_offsets=3)
    with pytest.raises(DataError, match=r"a row of train must be in \[0, \d+\); found"):
        rows.read(np.array(wrong))


def test_copies_in_other_processes_map_anew(shards: Path) -> None:
    rows = WindowDataset(shards, "train", seq_len=8, num_offsets=3)
    numbers = np.arange(0, len(rows), 5)
    before = rows.read(numbers)
    pickled = pickle.dumps(rows)
    assert len(pickled) < (shards / "train/00000.tar").stat().st_size * 4
    after = pickle.loads(pickled).read(numbers)
    assert np.array_equal(before["tokens"], after["tokens"])


def test_no_more_shards_stay_mapped_than_allowed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = WindowDataset(shards, "train", seq_len=8, num_offsets=3)
    expected = rows.read(np.arange(len(rows)))["tokens"]
    monkeypatch.setattr(mapped_module, "MOST_MAPPED_SHARDS", 1)
    few = WindowDataset(shards, "train", seq_len=8, num_offsets=3)
    assert np.array_equal(few.read(np.arange(len(rows)))["tokens"], expected)
    assert len(few._maps._mapped) == 1
    assert len(rows._maps._mapped) > 1
