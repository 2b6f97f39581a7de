import shutil
from pathlib import Path

import pytest

from mtp_lightning.data.shards.manifest import Manifest
from tests.data.corpora import build_tiny, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture(scope="session")
def built_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several shards per split and several members per shard, which nobody changes."""
    folder = tmp_path_factory.mktemp("built")
    write_corpus(folder / "corpus")
    assert_many(build_tiny([str(folder / "corpus")], folder / "shards"))
    return folder / "shards"


@pytest.fixture
def shards(tmp_path: Path, built_shards: Path) -> Path:
    """A copy of these: building them waits for the disk again and again."""
    return shutil.copytree(built_shards, tmp_path / "shards")


def assert_many(manifest: Manifest) -> None:
    assert len(manifest.shards_of("train")) >= 2
    assert len(manifest.shards_of("validation")) >= 1
    assert len(manifest.shards[0].members) >= 2
