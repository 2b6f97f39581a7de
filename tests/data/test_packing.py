"""Best-fit packing: every pair of token and target of the documents once, in rows that are nearly full."""

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.factory import prepare_data
from mtp_lightning.data.loading.peek import targets_of_row
from mtp_lightning.data.sampling.packing import PackedRows, _best_fit, plan_packing, plan_path, prepare_plan
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from mtp_lightning.errors import CheckpointError, DataError
from tests.data.corpora import END, build_tiny, is_held_out, tiny_recipe, write_corpus

SHAPE = {"seq_len": 24, "num_offsets": 3}


def best_fit_by_hand(lengths: list[int], room: int) -> list[int]:
    rooms: list[int] = []
    rows = [0] * len(lengths)
    for piece in sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece)):
        fitting = [left for left in rooms if left >= lengths[piece]]
        if not fitting:
            rooms.append(room)
            fitting = [room]
        row = rooms.index(min(fitting))
        rooms[row] -= lengths[piece]
        rows[piece] = row
    return rows


@given(st.lists(st.integers(1, 30), max_size=80))
def test_best_fit_is_as_good_as_by_hand(lengths: list[int]) -> None:
    rows = _best_fit(np.array(lengths, dtype=np.int64), 30).tolist()
    filled = Counter()  # type: Counter[int]
    for row, length in zip(rows, lengths, strict=True):
        filled[row] += length
    by_hand = Counter()  # type: Counter[int]
    for row, length in zip(best_fit_by_hand(lengths, 30), lengths, strict=True):
        by_hand[row] += length
    assert sorted(filled.values()) == sorted(by_hand.values())
    assert set(filled) == set(range(len(filled)))


def prepared(tmp_path: Path, corpus: Path) -> PackedRows:
    prepare_plan(tmp_path / "shards", "train", tmp_path / "cache", **SHAPE)
    assert corpus.is_dir()
    return PackedRows(tmp_path / "shards", "train", tmp_path / "cache", **SHAPE)


def test_every_pair_of_token_and_target_is_in_one_row(tmp_path: Path, corpus: Path, shards: Path) -> None:
    documents = [[*text, END] for name, text in write_corpus(corpus).items() if not is_held_out(name, 0.3)]
    assert max(map(len, documents)) > 3 * SHAPE["seq_len"]
    expected: Counter[tuple[int, int, int]] = Counter()
    for tokens in documents:
        for position, offset in itertools.product(range(len(tokens)), (1, 2, 3)):
            if position + offset < len(tokens):
                expected[tokens[position], tokens[position + offset], offset] += 1
    rows = prepared(tmp_path, corpus)
    batch = rows.read(np.arange(len(rows)))
    assert batch["tokens"].shape == (len(rows), 27)
    found: Counter[tuple[int, int, int]] = Counter()
    for tokens, owners, mask in zip(
        *(batch[name].tolist() for name in ("tokens", "documents", "loss_mask")), strict=True
    ):
        for position, targets in enumerate(targets_of_row(tokens, owners, mask, num_offsets=3)):
            for offset, target in enumerate(targets, start=1):
                if target is not None:
                    found[tokens[position], target, offset] += 1
    assert found == expected


def test_rows_are_nearly_full(tmp_path: Path, corpus: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = prepared(tmp_path, corpus)
    mask = rows.read(np.arange(len(rows)))["loss_mask"][:, :24]
    assert mask.mean() > 0.9
    assert f"packed train into {len(rows)} rows of 24 tokens, {mask.mean():.2%} full" in capsys.readouterr().err


def test_prompts_stay_unlearnt(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "q" * (i % 9 + 1), "completion": "a" * (i % 7 + 1)}) for i in range(80)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "shards")
    prepare_plan(tmp_path / "shards", "train", tmp_path / "cache", **SHAPE)
    batch = PackedRows(tmp_path / "shards", "train", tmp_path / "cache", **SHAPE)
    read = batch.read(np.arange(len(batch)))
    assert not read["loss_mask"][read["tokens"] == ord("q")].any()
    assert read["loss_mask"][read["tokens"] == ord("a")].all()


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 and no more", None, "flip"])
def test_damaged_plan_is_refused(tmp_path: Path, corpus: Path, shards: Path, damage: bytes | str | None) -> None:
    prepared(tmp_path, corpus)
    path = plan_path(tmp_path / "cache", load_manifest(shards), "train", **SHAPE)
    content = path.read_bytes()
    path.unlink()
    if damage == "flip":
        plan = dict(np.load(_written(path, content)))
        plan["starts"][0] += 1
        with path.open("wb") as file:
            np.savez(file, **plan)
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    with pytest.raises(DataError, match="must be a plan of packed rows; found .* made again"):
        PackedRows(shards, "train", tmp_path / "cache", **SHAPE)


def _written(path: Path, content: bytes) -> Path:
    copy = path.with_name("copy.npz")
    copy.write_bytes(content)
    return copy


def build(cache: Path, corpus: Path, *, rank: int = 0, world_size: int = 1, packing: str = "best_fit") -> MtpDataModule:
    recipe = tiny_recipe(cache, corpus, data={"packing": packing, "seq_len": 24})
    prepare_data(recipe)
    module = MtpDataModule(recipe)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.setup("fit")
    return module


def test_packed_rows_are_shared_and_resumed_like_any_others(tmp_path: Path, corpus: Path) -> None:
    whole = [batch["tokens"] for batch in itertools.islice(build(tmp_path, corpus).train_dataloader(), 9)]
    rows = build(tmp_path, corpus).training_rows
    epoch = torch.cat(whole)[: len(rows)].tolist()
    assert sorted(epoch) == sorted(rows.read(np.arange(len(rows)))["tokens"].tolist())
    state = {**build(tmp_path, corpus).state_dict(), "rows_consumed": 24}
    parts = []
    for rank in range(2):
        module = build(tmp_path, corpus, rank=rank, world_size=2)
        module.load_state_dict(state)
        parts.append([batch["tokens"] for batch in itertools.islice(module.train_dataloader(), 3)])
    assert all(
        torch.equal(torch.cat(pair), one) for pair, one in zip(zip(*parts, strict=True), whole[3:6], strict=True)
    )
    with pytest.raises(CheckpointError, match="packing = None in the recipe; found packing = best_fit"):
        build(tmp_path, corpus, packing="cut").load_state_dict(state)


def test_plan_says_where_each_document_is(tmp_path: Path, corpus: Path, shards: Path) -> None:
    rows = prepared(tmp_path, corpus)
    plan = plan_packing(ShardMaps(shards, "train"), **SHAPE)
    number = int(np.argmax(np.diff(plan.first_pieces)))
    lines = rows.describe(number).splitlines()
    assert len(lines) == np.diff(plan.first_pieces)[number] > 1
    assert all("train/0000" in line and line.endswith("tokens") for line in lines)
