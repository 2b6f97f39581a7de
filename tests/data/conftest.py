import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_lightning.data.shards.manifest import Manifest
from tests.data.corpora import build_tiny, write_corpus


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture
def shards(tmp_path: Path, corpus: Path) -> Path:
    """A folder with several shards per split and several members per shard."""
    manifest = build_tiny([str(corpus)], tmp_path / "shards")
    assert_many(manifest)
    return tmp_path / "shards"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1500 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_many(manifest: Manifest) -> None:
    assert len(manifest.shards_of("train")) >= 2
    assert len(manifest.shards_of("validation")) >= 1
    assert len(manifest.shards[0].members) >= 2
