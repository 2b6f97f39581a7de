"""Prompts are read and never learnt: from JSONL through shards to the rows of a batch."""

import json
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.data.loading.peek import row_table
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from mtp_lightning.recipe.schema.root import Recipe
from tests.data.corpora import END, build_tiny, is_held_out

T, N = 16, 3


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Sixty lines; every third is plain text without a prompt."""
    path = tmp_path / "chats.jsonl"
    rng = np.random.default_rng(0)
    lines = []
    for number in range(60):
        prompt, answer = "q" * int(rng.integers(1, 20)), "a" * int(rng.integers(1, 20))
        plain = {"text": "t" * int(rng.integers(1, 30))}
        lines.append(plain if number % 3 == 0 else {"prompt": prompt, "completion": answer})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_rows_carry_the_mask_of_their_documents(chats: Path, tmp_path: Path) -> None:
    manifest = build_tiny([str(chats)], tmp_path / "shards")
    rows = WindowDataset(tmp_path / "shards", "train", seq_len=T, num_offsets=N)
    batch = rows.read(np.arange(len(rows)))
    expected = batch["tokens"] != ord("q")
    assert (batch["tokens"] == END).any()
    assert not expected.all()
    np.testing.assert_array_equal(batch["loss_mask"], expected)
    has_mask = [member.mask_at is not None for shard in manifest.shards_of("train") for member in shard.members]
    assert any(has_mask)


def test_text_alone_has_no_mask(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": "t" * 40}) for _ in range(40)))
    build_tiny([str(path)], tmp_path / "shards")
    rows = WindowDataset(tmp_path / "shards", "train", seq_len=T, num_offsets=N)
    assert "loss_mask" not in rows.read(np.arange(3))


def test_a_changed_mask_is_found(chats: Path, tmp_path: Path) -> None:
    manifest = build_tiny([str(chats)], tmp_path / "shards")
    verify_shards(tmp_path / "shards")
    shard = manifest.shards_of("train")[0]
    member = next(member for member in shard.members if member.mask_at is not None)
    path = tmp_path / "shards" / shard.name
    content = bytearray(path.read_bytes())
    assert member.mask_at is not None
    content[member.mask_at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"member {member.key}.msk, byte {member.mask_at:,}"):
        verify_shards(tmp_path / "shards")


def test_peek_says_why_a_target_is_ignored(chats: Path, tmp_path: Path) -> None:
    build_tiny([str(chats)], tmp_path / "shards")
    rows = WindowDataset(tmp_path / "shards", "train", seq_len=T, num_offsets=N)
    recipe = Recipe.model_validate({"data": {"seq_len": T}, "heads": {"num_offsets": N}})
    batch = rows.read(np.arange(len(rows)))
    row = int(np.flatnonzero((~batch["loss_mask"][:, 1:T]).any(1) & (batch["documents"][:, T] > 0))[0])
    reasons = " ".join(str(cell) for cell in row_table(recipe, rows, row).columns[-1].cells)
    assert "prompt" in reasons
    assert "boundary" in reasons


@pytest.mark.parametrize("line", ['{"prompt": "q"}', '{"prompt": 3, "completion": "a"}', '{"completion": "a"}'])
def test_half_a_pair_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match="line 1"):
        build_tiny([str(path)], tmp_path / "shards")


def test_some_lines_are_held_out(chats: Path) -> None:
    names = [f"chats.jsonl:{number}" for number in range(1, 61)]
    assert 0 < sum(is_held_out(name, 0.3) for name in names) < 60
