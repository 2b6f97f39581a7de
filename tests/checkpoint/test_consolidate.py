import hashlib
import json
import math
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from mtp_lightning.checkpoint.convert.consolidate import DTYPES, Advance, check_whole, consolidate, write_whole
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError, DtypeName
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.format.tensors import BLOCK_BYTES
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord
from tests.checkpoint.cutting import evenly, is_equal, write_ranks
from tests.checkpoint.runs import flip_a_byte, model_of_step, save_run
from tests.checkpoint.savers import forkserver, shards
from tests.structure.test_torch_free import loaded_by
from tests.support.tiny import tiny_recipe

RECIPE = tiny_recipe()
OWN_FILES = ["config.json", "model.safetensors", "recipe.yaml"]


def ignore(num_bytes: int) -> None:
    """Stand where progress is reported to."""


def mtp_export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_do_not_depend_on_the_ranks(tmp_path: Path, dtype: DtypeName) -> None:
    contents = []
    for num_ranks in (1, 2, 3, 5):
        save_run(tmp_path / f"run{num_ranks}", RECIPE, 7, num_ranks=num_ranks)
        consolidate(tmp_path / f"run{num_ranks}", tmp_path / f"out{num_ranks}", dtype=dtype)
        contents.append((tmp_path / f"out{num_ranks}" / WHOLE_MODEL).read_bytes())
    assert len(set(contents)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_sees_the_weights_in_the_type_asked_for(tmp_path: Path, dtype: DtypeName) -> None:
    save_run(tmp_path / "run", RECIPE, 7, num_ranks=3)
    consolidate(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OWN_FILES
    loaded = safetensors.torch.load_file(tmp_path / "out" / WHOLE_MODEL)
    expected = dict(model_of_step(RECIPE, 7).named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(is_equal(loaded[name], weight.detach().to(DTYPES[dtype])) for name, weight in expected.items())


def test_the_folder_describes_itself(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", RECIPE, 7, num_ranks=3)
    consolidate(path, tmp_path / "out", dtype="bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["format"], config["format_version"]) == ("mtp_lightning consolidated", 1)
    assert config["model"] == RECIPE.model.model_dump(mode="json")
    assert config["heads"] == RECIPE.heads.model_dump(mode="json")
    assert config["head_numbering"] == "offsets (next token included)"
    assert config["num_offsets"] == 4
    assert config["layers"] == {"trunk": 2, "heads": 4}
    assert (config["step"], config["tokens"], config["dtype"]) == (7, 448, "bf16")
    assert config["source_manifest_sha256"] == hashlib.sha256((path / "MANIFEST.json").read_bytes()).hexdigest()
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (path / "recipe.yaml").read_bytes()


def test_tensors_longer_than_a_block_are_written_whole(tmp_path: Path) -> None:
    numel = 2 * BLOCK_BYTES // 4 + 5
    model = {"long": torch.arange(numel, dtype=torch.int32).view(torch.float32), "short": torch.ones(3)}
    reader = ShardReader(write_ranks(tmp_path / "shards", evenly(model, 3)))
    reported: list[int] = []
    write_whole(reader, tmp_path / WHOLE_MODEL, torch.float32, reported.append)
    written = ShardReader(tmp_path)
    assert all(is_equal(written.read(name), weight) for name, weight in model.items())
    check_whole(reader, written, ignore)
    assert reported == [BLOCK_BYTES, BLOCK_BYTES, 20, 12]


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_written_tensor_that_differs_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    model = {name: torch.randn(40, 3) for name in ("a", "b", "c")}
    reader = ShardReader(write_ranks(tmp_path / "shards", evenly(model, 2)))
    write_whole(reader, tmp_path / WHOLE_MODEL, dtype, ignore)
    check_whole(reader, ShardReader(tmp_path), ignore)
    content = bytearray((tmp_path / WHOLE_MODEL).read_bytes())
    content[-120 * dtype.itemsize - 1] ^= 1  # the last byte of b
    (tmp_path / WHOLE_MODEL).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"another b in {tmp_path}"):
        check_whole(reader, ShardReader(tmp_path), ignore)


def test_a_written_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    reader = ShardReader(write_ranks(tmp_path / "shards", evenly({"a": torch.ones(4, 3)}, 2)))
    safetensors.torch.save_file({"a": torch.ones(3, 4)}, tmp_path / WHOLE_MODEL)
    with pytest.raises(CheckpointError, match=f"another a in {tmp_path}"):
        check_whole(reader, ShardReader(tmp_path), ignore)


def test_a_disk_that_loses_a_bit_spoils_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "run", RECIPE, 7)

    def damaging(reader: ShardReader, path: Path, dtype: torch.dtype, advance: Advance) -> FileRecord:
        record = write_whole(reader, path, dtype, advance)
        flip_a_byte(path)
        return record

    monkeypatch.setattr("mtp_lightning.checkpoint.convert.consolidate.write_whole", damaging)
    with pytest.raises(CheckpointError, match=r"another unembedding\..* in"):
        consolidate(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_beyond_the_type_are_refused(tmp_path: Path) -> None:
    model = model_of_step(RECIPE, 7)
    with torch.no_grad():
        model.trunk.embed_tokens.weight[3, 3] = 1e5
    save_run(tmp_path / "run", RECIPE, 7, model=model)
    consolidate(tmp_path / "run", tmp_path / "bf16", dtype="bf16")
    with pytest.raises(CheckpointError, match=r"trunk.embed_tokens.weight beyond the range of torch.float16"):
        consolidate(tmp_path / "run", tmp_path / "out", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "run"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    save_run(tmp_path / "run", RECIPE, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match=f"a folder with 1 entry: {tmp_path}/out"):
        consolidate(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"a file: {tmp_path}/out/notes"):
        consolidate(tmp_path / "run", tmp_path / "out" / "notes")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"a folder with 1 entry: {tmp_path}/new\.partial"):
        consolidate(tmp_path / "run", tmp_path / "new")
    assert (tmp_path / "out" / "notes").read_text() == (tmp_path / "new.partial" / "notes").read_text() == "mine"


def test_an_empty_folder_and_what_an_interrupted_export_left_are_taken(tmp_path: Path) -> None:
    save_run(tmp_path / "run", RECIPE, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / WHOLE_MODEL).write_bytes(b"half")
    consolidate(tmp_path / "run", tmp_path / "out")
    load_model(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_where_nothing_can_be_written_the_error_says_so(tmp_path: Path) -> None:
    save_run(tmp_path / "run", RECIPE, 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=f"must be written to {tmp_path}/file/out; found .*Not a directory"):
        consolidate(tmp_path / "run", tmp_path / "file" / "out")


def test_a_disk_without_room_is_said_so_before_writing(tmp_path: Path, small_disk: Path) -> None:
    recipe = tiny_recipe(model={"vocab_size": 13_000})
    save_run(tmp_path / "run", recipe, 1)
    with pytest.raises(CheckpointError, match=r"1\.\d MiB free there of 1\.\d MiB needed"):
        consolidate(tmp_path / "run", small_disk / "out")
    consolidate(tmp_path / "run", small_disk / "out", dtype="bf16")
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_checkpoint_of_another_recipe_is_not_exported(tmp_path: Path) -> None:
    save_run(tmp_path / "run", RECIPE, 1, model=model_of_step(tiny_recipe(model={"intermediate_size": 32}), 1))
    with pytest.raises(CheckpointError, match=r"of another shape: .*down_proj.weight \[16, 32\] instead of"):
        consolidate(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", shards(2)[:2])
def test_a_damaged_shard_is_named_and_another_checkpoint_offered(tmp_path: Path, shard: str) -> None:
    good, bad = (save_run(tmp_path / "run", RECIPE, step, num_ranks=2) for step in (1, 2))
    flip_a_byte(bad / shard)
    result = mtp_export(tmp_path / "run", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert str(bad / shard) in result.stderr
    assert f"The checkpoint before it is good: {good}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert mtp_export(good, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("shard", shards(2))
def test_a_lost_shard_is_named_and_another_checkpoint_offered(tmp_path: Path, shard: str) -> None:
    good, bad = (save_run(tmp_path / "run", RECIPE, step, num_ranks=2) for step in (1, 2))
    (bad / shard).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"no such file: {bad / shard}. The .* good: {good}$"):
        consolidate(bad, tmp_path / "out")


def test_an_export_is_not_exported_again(tmp_path: Path) -> None:
    save_run(tmp_path / "run", RECIPE, 1)
    consolidate(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"an exported folder, {tmp_path}/out"):
        consolidate(tmp_path / "out", tmp_path / "again")


def test_the_verb_exports(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", RECIPE, 7, num_ranks=3)
    result = mtp_export(tmp_path / "run", "--out", tmp_path / "out", "--format", "consolidated", "--dtype", "bf16")
    assert result.exit_code == 0
    assert result.stdout == f"Exported {path} to {tmp_path}/out: 0.0 MB of bf16 weights, checked\n"
    assert next(load_model(tmp_path / "out")[1].parameters()).dtype == torch.bfloat16


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from mtp_lightning.cli.app import main; sys.argv = ['mtp', 'export', '--help']\n"
    assert loaded_by(f"{code}\ntry:\n    main()\nexcept SystemExit:\n    pass\n") == "loaded:"


def _report_growth(pipe: Connection, warm_up: Path, run: Path, out: Path) -> None:
    torch.set_num_threads(1)
    consolidate(warm_up, out / "small", dtype="bf16")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for dtype in DTYPES:
        consolidate(run, out / dtype, dtype=dtype)
        (out / dtype / WHOLE_MODEL).unlink()
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.slow
def test_the_memory_needed_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    recipe = tiny_recipe(model={"hidden_size": 512, "vocab_size": 102_400, "tie_word_embeddings": True})
    weights = {name: torch.zeros(weight.shape) for name, weight in model_of_step(recipe, 1).named_parameters()}
    assert max(math.prod(weight.shape) for weight in weights.values()) * 4 == 200 * 2**20
    save_run(tmp_path / "small", RECIPE, 1)
    save_run(tmp_path / "run", recipe, 1, num_ranks=3)
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_report_growth, args=(sender, tmp_path / "small", tmp_path / "run", tmp_path / "out")
    )
    process.start()
    sender.close()
    assert receiver.poll(120)
    growth_mib = receiver.recv()
    process.join()
    assert growth_mib < 64, "blocks are 4 MiB, the tensor is 200"
