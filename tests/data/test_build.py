import hashlib
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import END, build_tiny, is_held_out, write_corpus

BUILD = """
import sys
from pathlib import Path
from tests.data.corpora import build_tiny
sys.stdin.readline()
print(build_tiny([sys.argv[1]], Path(sys.argv[2])).fingerprint)
"""


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_equal_documents_give_equal_bytes(tmp_path: Path, corpus: Path) -> None:
    write_corpus(tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.txt"):
        os.utime(file, (1, 1))
    build_tiny([str(corpus)], tmp_path / "one")
    build_tiny([str(tmp_path / "copy")], tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) >= 5


def test_other_documents_give_another_fingerprint(tmp_path: Path, corpus: Path) -> None:
    before = build_tiny([str(corpus)], tmp_path / "one").fingerprint
    file = next(corpus.rglob("*.txt"))
    text = file.read_bytes()
    file.write_bytes(bytes([text[0] ^ 1]) + text[1:])
    assert build_tiny([str(corpus)], tmp_path / "two").fingerprint != before


def test_tar_headers_are_ustar_without_time_and_owner(shards: Path) -> None:
    assert (shards / "train/00000.tar").read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(shards / "train/00000.tar") as tar:
        headers = tar.getmembers()
    assert {(h.mtime, h.uid, h.gid, h.uname, h.mode) for h in headers} == {(0, 0, 0, "", 0o644)}
    assert [h.name for h in headers[:3]] == ["000000000.tok", "000000000.len", "000000001.tok"]


def test_members_are_whole_documents_of_about_the_size_asked_for(shards: Path) -> None:
    manifest = load_manifest(shards)
    for shard in manifest.shards:
        data = (shards / shard.name).read_bytes()
        for member in shard.members:
            tokens = np.frombuffer(data, "<u2", member.num_tokens, member.tokens_at)
            lengths = np.frombuffer(data, "<u4", member.num_documents, member.lengths_at)
            assert lengths.sum() == tokens.size
            assert np.flatnonzero(tokens == END).tolist() == (np.cumsum(lengths) - 1).tolist()
            assert tokens.size - lengths[-1] < 100
    full = manifest.shards_of("train")[:-1]
    assert all(shard.num_bytes >= 4000 for shard in full)
    assert all(member.num_tokens >= 100 for shard in full for member in shard.members)


def test_split_depends_on_names_only_and_survives_additions(tmp_path: Path, corpus: Path) -> None:
    documents = write_corpus(corpus)
    write_corpus(tmp_path / "more", num_documents=70, seed=9)
    manifest = build_tiny([str(tmp_path / "more")], tmp_path / "shards")
    assert manifest.num_documents("validation") == sum(
        is_held_out(path.relative_to(tmp_path / "more").as_posix(), 0.3) for path in (tmp_path / "more").rglob("*.txt")
    )
    held_out = [text for name, text in documents.items() if is_held_out(name, 0.3)]
    manifest = build_tiny([str(corpus)], tmp_path / "fewer")
    data = (tmp_path / "fewer/validation/00000.tar").read_bytes()
    member = manifest.shards_of("validation")[0].members[0]
    tokens = np.frombuffer(data, "<u2", member.num_tokens, member.tokens_at).tolist()
    assert tokens == [token for text in held_out[: member.num_documents] for token in (*text, END)]


def test_empty_and_binary_documents_are_counted(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "empty.txt").touch()
    (corpus / "binary.bin").write_bytes(b"\0\1")
    manifest = build_tiny([str(corpus)], tmp_path / "shards", show_progress=True)
    assert (manifest.skipped_empty, manifest.skipped_binary) == (1, 1)
    assert manifest.num_documents("train") + manifest.num_documents("validation") == 40
    assert "held out" in capsys.readouterr().out


def test_what_was_built_is_said_in_one_line(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "empty.txt").touch()
    build_tiny([str(corpus)], tmp_path / "shards", show_progress=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("built ")
    assert "1 empty skipped" in line
    assert line.endswith(str(tmp_path / "shards"))


def test_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/empty.txt").touch()
    with pytest.raises(DataError, match=r"at least one document with text; found 1 files with 1 empty.*Correct"):
        build_tiny([str(tmp_path / "corpus")], tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_folder_that_is_taken_is_refused_and_kept(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"must be new or empty; found a folder with 1 entry"):
        build_tiny([str(corpus)], tmp_path / "shards")
    assert (tmp_path / "shards/thesis.txt").read_text() == "mine"


def test_bad_line_leaves_nothing_behind(tmp_path: Path, corpus: Path) -> None:
    (corpus / "z.jsonl").write_text('{"text": "fine"}\n{"txt": "bad"}\n')
    with pytest.raises(DataError, match=r"z\.jsonl, line 2"):
        build_tiny([str(corpus)], tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_disk_that_refuses_leaves_nothing_behind(tmp_path: Path, corpus: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"writable; found .*/shards: File too large"):
            build_tiny([str(corpus)], tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_processes_that_build_at_once_all_succeed(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(corpus), str(tmp_path / "shards")]
    builds = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for _ in range(3)
    ]
    for build in builds:
        assert build.stdin is not None
        build.stdin.write("go\n")
        build.stdin.flush()
    fingerprints = {build.communicate()[0].strip() for build in builds}
    assert [build.returncode for build in builds] == [0, 0, 0]
    assert fingerprints == {verify_shards(tmp_path / "shards").fingerprint}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "shards"]


def test_build_of_the_same_again_keeps_what_is_there(tmp_path: Path, corpus: Path) -> None:
    first = build_tiny([str(corpus)], tmp_path / "shards")
    (tmp_path / "shards/manifest.json").touch()
    written_at = (tmp_path / "shards/manifest.json").stat().st_mtime_ns
    assert build_tiny([str(corpus)], tmp_path / "shards").fingerprint == first.fingerprint
    assert (tmp_path / "shards/manifest.json").stat().st_mtime_ns == written_at
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "shards"]


@pytest.mark.parametrize("changes_size", [True, False])
def test_build_of_other_documents_into_a_complete_folder_is_refused(
    tmp_path: Path, corpus: Path, changes_size: bool
) -> None:
    first = build_tiny([str(corpus)], tmp_path / "shards")
    file = next(corpus.rglob("*.txt"))
    file.write_bytes(bytes(file.stat().st_size + changes_size))
    with pytest.raises(DataError, match=r"must be new or empty; found (a folder with 4|shards of fingerprint)"):
        build_tiny([str(corpus)], tmp_path / "shards")
    assert verify_shards(tmp_path / "shards").fingerprint == first.fingerprint


def test_build_that_was_killed_is_pointed_out(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards.partial-123-abcd").mkdir()
    build_tiny([str(corpus)], tmp_path / "shards", show_progress=True)
    assert "shards.partial-123-abcd was left by a build that was killed" in capsys.readouterr().out
    assert (tmp_path / "shards.partial-123-abcd").exists()
