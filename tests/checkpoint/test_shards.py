import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_lightning.checkpoint.format import read_shards as shard_reader
from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.tensors import read_header, read_tensors, write_tensors
from mtp_lightning.checkpoint.format.write_shards import Piece, write_pieces
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.cutting import MOMENTS, STEP, cut, evenly, is_equal, moment_of, piece, write_ranks
from tests.checkpoint.savers import shards

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Tensor]:
    """Parameters of any shape and type, each value different."""
    forms = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=5))
    model, first = {}, 1
    for index, (shape, dtype) in enumerate(forms):
        model[f"layers.{index}.weight"] = torch.arange(first, first + math.prod(shape)).to(dtype).reshape(shape)
        first += math.prod(shape)
    return model


@given(models(), st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_cuts_every_interval_is_read_as_it_was(model: dict[str, Tensor], data: st.DataObject) -> None:
    total = sum(weight.numel() for weight in model.values())
    bounds = data.draw(st.lists(st.integers(0, total), max_size=4), label="bounds")
    frozen = data.draw(st.sets(st.sampled_from(sorted(model))), label="frozen")
    with tempfile.TemporaryDirectory() as folder:
        reader = ShardReader(write_ranks(Path(folder), cut(model, bounds, frozenset(frozen))))
        assert set(reader.names) == set(model)
        for name, weight in model.items():
            assert reader.shape(name) == tuple(weight.shape)
            assert reader.kinds(name) == ("weight", *(() if name in frozen else MOMENTS))
            assert reader.step(name) == (None if name in frozen else STEP)
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, weight.numel())] * 2), label=name))
            for kind in reader.kinds(name):
                values = weight.reshape(-1) if kind == "weight" else moment_of(weight.reshape(-1), kind)
                assert is_equal(reader.read(name, kind), values)
                assert is_equal(reader.read(name, kind, start, stop), values[start:stop])


def test_only_the_bytes_of_an_interval_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"a": torch.arange(1000.0), "b": torch.arange(10.0)}
    reader = ShardReader(write_ranks(tmp_path, evenly(model, 3)))
    intervals: list[tuple[int, int]] = []
    true_read_into = shard_reader.read_into

    def recorded(tensor: Tensor, file: object, position: int) -> None:
        intervals.append((position, tensor.nbytes))
        true_read_into(tensor, file, position)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_reader, "read_into", recorded)
    reader.read("a", "exp_avg", 300, 400)
    assert sum(num_bytes for _, num_bytes in intervals) == 400
    assert len(intervals) == 2, "the cut lies at 336"


def test_factors_of_moments_keep_their_own_shapes(tmp_path: Path) -> None:
    factors = {"row_var": torch.ones(2, 1), "col_var": torch.arange(3.0).view(1, 3)}
    whole = Piece("a", (2, 3), 0, torch.arange(6.0), {"average": torch.ones(6)}, STEP, factors)
    reader = ShardReader(write_ranks(tmp_path, [[whole, piece("b", torch.ones(4), 0, 4)]]))
    assert reader.kinds("a") == ("weight", "average", "col_var", "row_var")
    for kind, factor in factors.items():
        assert reader.shape_of("a", kind) == tuple(factor.shape)
        assert torch.equal(reader.read("a", kind), factor.view(-1))
    cut_off = whole._replace(weight=torch.arange(4.0), moments={})
    with pytest.raises(CheckpointError, match="factors row_var, col_var beside 4 values of 6"):
        write_pieces(tmp_path, [cut_off], 0, 1)


def test_values_that_are_no_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1, 0x7F800001], dtype=torch.int32)
    weight = bits.view(torch.float32)
    reader = ShardReader(write_ranks(tmp_path, [[piece("a", weight, 0, 2)], [piece("a", weight, 2, 5)]]))
    assert is_equal(reader.read("a"), weight)


def test_the_record_is_that_of_the_file(tmp_path: Path) -> None:
    records = write_pieces(tmp_path, [piece("a", torch.randn(50, 3))], 1, 4)
    assert list(records) == ["model-00002-of-00004.safetensors", "optimizer-00002-of-00004.safetensors"]
    for name, record in records.items():
        content = (tmp_path / name).read_bytes()
        assert record.size_bytes == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_shards_are_on_disk_before_they_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(f"{path.name} {path.stat().st_size}")

    monkeypatch.setattr(os, "fsync", recorded)
    records = write_pieces(tmp_path, [piece("a", torch.randn(50, 3))], 0, 1)
    assert synced == [f"{name} {record.size_bytes}" for name, record in records.items()]


def test_pieces_may_be_made_one_by_one(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        for index in range(3):
            yield piece(str(index), torch.full((2, 2), float(index)))

    write_pieces(tmp_path, pieces(), 0, 1)
    assert ShardReader(tmp_path).names == ("0", "1", "2")


def test_a_whole_model_is_an_ordinary_state_dict_for_the_library(tmp_path: Path) -> None:
    model = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5).bfloat16(), "c": torch.randn(())}
    write_ranks(tmp_path, [[piece(name, weight) for name, weight in model.items()]])
    loaded = safetensors.torch.load_file(tmp_path / shards(1)[0])
    assert loaded.keys() == model.keys()
    assert all(is_equal(loaded[name], weight) for name, weight in model.items())
    moments = safetensors.torch.load_file(tmp_path / shards(1)[1])
    assert moments.keys() == {f"{kind}/{name}" for kind in MOMENTS for name in model}
    assert is_equal(moments["exp_avg_sq/a.weight"], moment_of(model["a.weight"], "exp_avg_sq"))


def test_the_library_sees_the_pieces_and_the_notes(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    write_ranks(tmp_path, [[piece("a", weight, 0, 5)], [], [piece("a", weight, 5, 12)]])
    with safetensors.safe_open(tmp_path / "model-00003-of-00003.safetensors", "pt") as file:
        assert list(file.keys()) == ["a@5"]
        assert is_equal(file.get_tensor("a@5"), weight.reshape(-1)[5:])
        notes = json.loads(file.metadata()["parameters"])
        assert notes == {"a": {"shape": [3, 4], "step": STEP, "kinds": ["exp_avg", "exp_avg_sq"]}}
    with safetensors.safe_open(tmp_path / "model-00002-of-00003.safetensors", "pt") as file:
        assert list(file.keys()) == []


def test_empty_pieces_and_parameters_are_allowed(tmp_path: Path) -> None:
    weight, empty = torch.arange(4.0), torch.empty(0, 3)
    ranks = [[piece("a", weight, 0, 0, frozen=True), piece("e", empty)], [piece("a", weight), piece("a", weight, 4, 4)]]
    reader = ShardReader(write_ranks(tmp_path, ranks))
    assert is_equal(reader.read("a"), weight)
    assert reader.shape("e") == (0, 3)
    assert is_equal(reader.read("e", "exp_avg"), torch.empty(0))


W = torch.arange(10.0)
FAULTY = {
    "no weight of a[4:6]": [[piece("a", W, 0, 4)], [piece("a", W, 6, 10)]],
    "no weight of a[0:2]": [[piece("a", W, 2, 10)], []],
    "no weight of a[8:10]": [[piece("a", W, 0, 4)], [piece("a", W, 4, 8)]],
    "weight of a[4:6] in both model-00001-of-00002.safetensors and model-00002-of-00002": [
        [piece("a", W, 0, 6)],
        [piece("a", W, 4, 10)],
    ],
    "weight of a[0:10] in both model-00001-of-00002.safetensors and model-00002-of-00002": [
        [piece("a", W)],
        [piece("a", W)],
    ],
    "a with shape [5, 2], step 3.0 and": [[piece("a", W, 0, 4)], [piece("a", W.reshape(5, 2), 4, 10)]],
    "step 4.0 and": [[piece("a", W, 0, 4)], [piece("a", W, 4, 10)._replace(step=4.0)]],
    "moments [] in": [[piece("a", W, 0, 4)], [piece("a", W, 4, 10)._replace(moments={})]],
    "weight of a in several types": [[piece("a", W, 0, 4)], [piece("a", W.bfloat16(), 4, 10)]],
}


@pytest.mark.parametrize("found", FAULTY)
def test_shards_that_do_not_fit_together_are_damage(tmp_path: Path, found: str) -> None:
    good = [[piece("first", W)], [piece("last", W)]]
    with pytest.raises(DamagedCheckpointError) as failure:
        ShardReader(write_ranks(tmp_path, [own + more for own, more in zip(FAULTY[found], good, strict=True)]))
    assert found in failure.value.found
    assert str(tmp_path) in failure.value.found
    assert "model-0000" in failure.value.found


def test_a_gap_in_a_moment_alone_is_damage(tmp_path: Path) -> None:
    write_ranks(tmp_path, evenly({"a": W}, 2))
    path = tmp_path / shards(2)[3]
    tensors, metadata = read_tensors(path), read_header(path).metadata
    del tensors["exp_avg_sq/a@5"]
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata)
    with pytest.raises(DamagedCheckpointError, match=r"no exp_avg_sq of a\[5:10\] in optimizer-00001-of-00002"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("lost", shards(3))
def test_a_lost_shard_is_named_even_if_it_held_nothing(tmp_path: Path, lost: str) -> None:
    write_ranks(tmp_path, [[piece("a", W)], [], []])
    (tmp_path / lost).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"no {lost} in {tmp_path}"):
        ShardReader(tmp_path)


def test_shards_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    write_ranks(write_ranks(tmp_path, evenly({"a": W}, 2)), evenly({"a": W}, 3))
    with pytest.raises(DamagedCheckpointError, match=r"shards of 2 and of 3 ranks"):
        ShardReader(tmp_path)


def test_a_folder_without_shards_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"shards of no ranks"):
        ShardReader(tmp_path)


def test_a_file_of_someone_else_is_damage(tmp_path: Path) -> None:
    for name in shards(1):
        safetensors.torch.save_file({"a": W}, tmp_path / name)
    with pytest.raises(DamagedCheckpointError, match=f"no notes on its parameters .* in {tmp_path}/{shards(1)[0]}"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("part", shards(1))
def test_tensors_without_a_note_are_damage(tmp_path: Path, part: str) -> None:
    write_ranks(tmp_path, [[piece("a", W)]])
    tensors, metadata = read_tensors(tmp_path / part), read_header(tmp_path / part).metadata
    with (tmp_path / part).open("wb") as file:
        write_tensors(file, {**tensors, "exp_avg/b@3": W}, metadata)
    with pytest.raises(DamagedCheckpointError, match=r"exp_avg/b@3 of shape \[10\], of which its notes know nothing"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({"a@0": W[:5], "a@5": torch.ones(7)}, r"weight of a\[10:12\], which has 10 values, in model-00001-of-00001"),
        ({"a": W.reshape(2, 5)}, r"a of shape \[2, 5\], of which its notes know nothing"),
    ],
)
def test_tensors_of_other_sizes_than_noted_are_damage(tmp_path: Path, stored: dict[str, Tensor], found: str) -> None:
    write_ranks(tmp_path, [[piece("a", W, frozen=True)]])
    path = tmp_path / shards(1)[0]
    metadata = read_header(path).metadata
    with path.open("wb") as file:
        write_tensors(file, stored, metadata)
    with pytest.raises(DamagedCheckpointError, match=found):
        ShardReader(tmp_path)


def test_what_is_not_there_is_an_error_in_three_parts(tmp_path: Path) -> None:
    reader = ShardReader(write_ranks(tmp_path, [[piece("a", W), piece("b", W, frozen=True)]]))
    with pytest.raises(CheckpointError, match=f"no exp_avg of b in {tmp_path}"):
        reader.read("b", "exp_avg")
    with pytest.raises(CheckpointError, match=f"no c in {tmp_path}"):
        reader.shape("c")
    with pytest.raises(IndexError, match=r"a\[4:11\] of 10 values"):
        reader.read("a", start=4, stop=11)


def test_a_shard_cut_short_after_it_was_opened_is_damage(tmp_path: Path) -> None:
    reader = ShardReader(write_ranks(tmp_path, [[piece("a", W)]]))
    path = tmp_path / shards(1)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=str(path)):
        reader.read("a")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ([piece("a", W)._replace(start=1)], "10 values from 1 on, of 10, for a of shape [10]"),
        ([piece("a", W)._replace(start=-1)], "10 values from -1 on"),
        ([piece("a", W)._replace(weight=W.reshape(5, 2))], "weight of shape [5, 2] beside 10 values"),
        ([piece("a", W)._replace(moments={"exp_avg": W[:9]})], "exp_avg of shape [9] beside 10 values"),
        ([piece("a", W, 0, 4), piece("a", W, 0, 4)], "given twice by one rank"),
    ],
)
def test_pieces_that_are_cut_wrongly_are_refused_before_writing(tmp_path: Path, wrong: list[Piece], found: str) -> None:
    with pytest.raises(CheckpointError) as failure:
        write_pieces(tmp_path, [piece("b", W), *wrong], 0, 1)
    assert found in failure.value.found
    assert list(tmp_path.iterdir()) == []
