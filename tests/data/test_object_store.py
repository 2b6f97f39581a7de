"""Shards in an object store: runs read them over the S3 protocol, through s3fs, from a real server process."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mtp_lightning.launch.rank_env import free_port
from tests.data.corpora import build_tiny, write_corpus
from tests.support.runs import ROOT, figures, mtp

MISSING = [package for package in ("s3fs", "moto") if find_spec(package) is None]
WAIT_S = 60


UPLOAD = "import s3fs, sys; to = s3fs.S3FileSystem(); to.mkdir('corpora'); to.put(*sys.argv[1:], recursive=True)"


@pytest.fixture
def store() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + WAIT_S
            while not answers(port):
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def _access(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; pip install -e '.[dev]'")
@pytest.mark.usefixtures("_access")
def test_a_run_reads_shards_from_an_object_store(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", num_documents=120)
    folder = tmp_path / "shards"
    manifest = build_tiny([str(tmp_path / "corpus")], folder, shard_bytes=3000)
    assert len(manifest.shards_of("train")) >= 8
    subprocess.run([sys.executable, "-c", UPLOAD, f"{folder}/", "corpora/python"], check=True)
    fields = ["run.steps=8", "run.validate_every_steps=4", "logging.every_steps=1", f"run.cache={tmp_path / 'cache'}"]
    train = ("train", str(ROOT / "recipes/debug/parallel.yaml"), *fields)

    there = mtp(*train, "data.shards=s3://corpora/python", "data.workers=1", "run.dir=there", cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    here = mtp(*train, f"data.shards={folder}", "run.dir=here", cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    assert figures(tmp_path / "there/metrics.csv") == figures(tmp_path / "here/metrics.csv") != []
    assert len(list((tmp_path / "cache/remote/shards").glob("*.tar"))) > 1

    missing = mtp("data", "peek", train[1], "data.shards=s3://corpora/nothing", fields[-1], cwd=tmp_path)
    assert missing.returncode != 0
    assert "s3://corpora/nothing/index.npz must be readable" in missing.stderr
