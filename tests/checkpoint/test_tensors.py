import io
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.tensors import NAME_OF_DTYPE, read_tensors, write_tensors
from tests.checkpoint.savers import forkserver


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with path.open("wb") as file:
        write_tensors(file, tensors)


def one_of_each_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(48, dtype=torch.uint8) % 2
    return {str(dtype): raw.view(dtype).reshape(2, -1) for dtype in NAME_OF_DTYPE}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = one_of_each_dtype() | {"scalar": torch.tensor(3), "empty": torch.empty(0, 2)}
    write(tmp_path / "x", tensors)
    read = safetensors.torch.load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in one_of_each_dtype().items()}
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    read = read_tensors(tmp_path / "x")
    assert all(torch.equal(read[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.arange(1000)})
    read = read_tensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    assert torch.equal(read["a"], torch.arange(1000))


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 30, 200, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, kept_bytes: int) -> None:
    write(tmp_path / "x", {"a": torch.arange(1000), "b": torch.ones(3)})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:kept_bytes])
    with pytest.raises(DamagedCheckpointError, match=str(tmp_path / "x")):
        read_tensors(tmp_path / "x")


def _report_growth(pipe: Connection, tensor_mib: int, count: int) -> None:
    torch.set_num_threads(1)
    strided = {str(index): torch.ones(2, tensor_mib * 2**17).T for index in range(count)}  # float32, not contiguous
    write_tensors(open("/dev/null", "wb"), {"first": torch.ones(2, 2).T})  # noqa: SIM115, PTH123
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_tensors(open("/dev/null", "wb"), strided)  # noqa: SIM115, PTH123
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def test_writing_holds_one_tensor_at_a_time() -> None:
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_growth, args=(sender, 16, 8))
    process.start()
    assert receiver.poll(60)
    growth_mib = receiver.recv()
    process.join()
    assert growth_mib < 72, "a copy of one tensor takes 16 MiB (the C library may keep two more), of all 128"


def test_equal_content_gives_equal_bytes() -> None:
    tensors = one_of_each_dtype()
    first, second = io.BytesIO(), io.BytesIO()
    write_tensors(first, tensors)
    write_tensors(second, dict(reversed(tensors.items())))
    assert first.getvalue() == second.getvalue()
