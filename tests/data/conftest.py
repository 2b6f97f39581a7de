from pathlib import Path

import pytest

from mtp_lightning.data.shards.manifest import Manifest
from tests.data.corpora import build_tiny, write_corpus


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


def assert_many(manifest: Manifest) -> None:
    assert len(manifest.shards_of("train")) >= 2
    assert len(manifest.shards_of("validation")) >= 1
    assert len(manifest.shards[0].members) >= 2
