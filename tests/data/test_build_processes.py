"""Neither the number of processes nor a kill changes a byte of a build."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.staging import StagingFolder
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.data.text import blocks as units_module
from mtp_lightning.errors import DataError, LaunchError
from tests.data.corpora import build_tiny, write_corpus
from tests.data.test_build import contents
from tests.data.text_tokenizers import SENTENCES, write_sentencepiece, write_tokenizer_json
from tests.support.covering import some_of

ROOT = Path(__file__).parents[2]
SLOW_BUILD = """
import os, signal, sys, time
from pathlib import Path
from mtp_lightning.data.text import blocks as units
from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.data.shards.staging import StagingFolder
units.BLOCK_BYTES = 2000
kill_at = int(sys.argv[3])
note = StagingFolder.note_shard
def note_and_die(self, shard, largest_token):
    note(self, shard, largest_token)
    if self.num_written == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
StagingFolder.note_shard = note_and_die
options = BuildOptions(validation_fraction=0.2, member_tokens=500, shard_bytes=8000, deduplicate=True)
build_shards([sys.argv[1]], Path(sys.argv[2]), options, processes=1)
"""
OPTIONS = BuildOptions(validation_fraction=0.2, member_tokens=500, shard_bytes=8000, deduplicate=True)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A thousand documents, some empty, some doubled, some only partly learnt."""
    path = tmp_path / "lines.jsonl"
    records = []
    for number in range(1000):
        text = f"{number % 700} {SENTENCES[number % len(SENTENCES)]}" * (number % 3)
        is_pair = number % 5 == 0 and text
        records.append({"prompt": "Say it:", "completion": text} if is_pair else {"text": text})
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def kill_after(lines: Path, out: Path, num_shards: int) -> int:
    command = [sys.executable, "-c", SLOW_BUILD, str(lines), str(out), str(num_shards)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode


@pytest.mark.parametrize(
    "tokenizer", ["byte", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tokenizer.json", "pieces.model"))]
)
def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, lines: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units_module, "BLOCK_BYTES", 5000)
    makers = {"tokenizer.json": write_tokenizer_json, "pieces.model": write_sentencepiece}
    spec = str(makers[tokenizer](tmp_path / tokenizer)) if tokenizer in makers else tokenizer
    write_corpus(tmp_path / "files", num_documents=20)
    sources = [str(tmp_path / "files"), str(lines)]
    for processes in (1, 3):
        build_tiny(sources, tmp_path / f"by_{processes}", tokenizer=spec, processes=processes)
    assert contents(tmp_path / "by_1") == contents(tmp_path / "by_3")
    manifest = verify_shards(tmp_path / "by_3")
    assert manifest.tokenizer == tokenizer
    assert len(manifest.shards) > 10
    assert manifest.sources is not None
    assert [source.name for source in manifest.sources] == ["files", "lines.jsonl"]
    assert sum(source.num_tokens for source in manifest.sources) == sum(s.num_tokens for s in manifest.shards)
    assert sum(source.num_documents for source in manifest.sources) == sum(s.num_documents for s in manifest.shards)
    assert bool(manifest.skipped_not_utf8) == (tokenizer != "byte")


def test_killed_build_goes_on_to_the_same_bytes(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_shards([str(lines)], tmp_path / "whole", OPTIONS, show_progress=False)
    num_shards = len(load_manifest(tmp_path / "whole").shards)
    assert num_shards > 6
    out = tmp_path / "shards"
    for _ in range(2):
        assert kill_after(lines, out, num_shards // 3) == -signal.SIGKILL
    (partial,) = tmp_path.glob("shards.partial-*")
    inodes = {path.name: path.stat().st_ino for path in (partial / "train").glob("*.tar")}
    monkeypatch.setattr(units_module, "BLOCK_BYTES", 2000)
    build_shards([str(lines)], out, OPTIONS)
    assert f"going on with {2 * (num_shards // 3)} finished shards" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")
    kept = {path.name for path in (out / "train").glob("*.tar") if inodes.get(path.name) == path.stat().st_ino}
    assert len(kept) >= 2
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize("damage", some_of(["flip", "record", "journal"], one_in=3, first=1))
def test_what_a_kill_left_is_verified(
    tmp_path: Path, lines: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_shards([str(lines)], tmp_path / "whole", OPTIONS, show_progress=False)
    monkeypatch.setattr(units_module, "BLOCK_BYTES", 2000)
    assert kill_after(lines, tmp_path / "shards", 4) == -signal.SIGKILL
    (partial,) = tmp_path.glob("shards.partial-*")
    if damage == "flip":
        shard = partial / "train/00001.tar"
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    elif damage == "record":
        (partial / "train/00001.tar.json").write_text('{"shard"')
    else:
        journal = partial / "journal.jsonl"
        journal.write_text(journal.read_text()[:-5])
    build_shards([str(lines)], tmp_path / "shards", OPTIONS, show_progress=False)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_finished_documents_are_not_tokenized_again(tmp_path: Path, lines: Path) -> None:
    assert kill_after(lines, tmp_path / "shards", 4) == -signal.SIGKILL
    (folder,) = tmp_path.glob("shards.partial-*")
    partial = StagingFolder(folder)
    known = [partial.known(unit) for unit in range(200)]
    assert {"train"} <= known[0]
    assert known[-1] == frozenset()
    partial.abandon(is_kept=False)
    assert not folder.exists()


def test_other_options_do_not_take_over_what_a_kill_left(tmp_path: Path, lines: Path) -> None:
    assert kill_after(lines, tmp_path / "shards", 4) == -signal.SIGKILL
    build_tiny([str(lines)], tmp_path / "shards")
    assert len(list(tmp_path.glob("shards.partial-*"))) == 1
    verify_shards(tmp_path / "shards")


def test_no_process_outlives_a_killed_build(tmp_path: Path, lines: Path) -> None:
    command = """
import sys
from pathlib import Path
from mtp_lightning.data.shards.build import BuildOptions, build_shards
if __name__ == "__main__":
    options = BuildOptions(validation_fraction=0.2)
    build_shards([sys.argv[1]], Path(sys.argv[2]), options, processes=2)
"""
    (tmp_path / "build.py").write_text(command)
    os.mkfifo(tmp_path / "endless.jsonl")
    for number in range(8):
        (tmp_path / f"{number}.jsonl").write_bytes(lines.read_bytes())
    (tmp_path / "list").mkdir()
    build = subprocess.Popen(
        [sys.executable, "build.py", str(tmp_path / "[0-9e]*.jsonl"), str(tmp_path / "out")], cwd=tmp_path
    )
    deadline = time.monotonic() + 30
    while len(children := children_of(build.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    build.kill()
    build.wait()
    assert len(children) == 3  # two workers and the tracker of resources
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if is_alive(child)]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_equal_documents_are_left_out_once_asked_to(tmp_path: Path) -> None:
    texts = [f"text {number % 40}" for number in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    manifest = build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "shards", deduplicate=True)
    assert manifest.skipped_duplicates == 60
    assert sum(shard.num_documents for shard in manifest.shards) == 40
    assert build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "all").skipped_duplicates is None


def test_worker_that_is_ended_is_named(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_lightning.data.shards.encode._begin_worker", end_at_once)
    with pytest.raises(DataError, match=r"every process of a build must live .*fewer \(--processes\)"):
        build_tiny([str(lines)], tmp_path / "shards", processes=2)


def test_processes_that_cannot_start_are_told_from_documents(tmp_path: Path, lines: Path) -> None:
    """Where a user has as many files, processes or semaphores as they may have: here files."""
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, former)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, former[1]))
        with pytest.raises(LaunchError, match=r"must be able to start; found .*Too many open files.*--processes 1"):
            build_tiny([str(lines)], tmp_path / "shards", processes=2)


def end_at_once() -> None:
    os._exit(1)
