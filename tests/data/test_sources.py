import json
from pathlib import Path

import pytest

from mtp_lightning.data.text.blocks import cut_into_blocks
from mtp_lightning.data.text.records import Document, LeftOut
from mtp_lightning.data.text.sources import find_files
from mtp_lightning.errors import DataError


def names(*sources: str) -> list[str]:
    return [file.name for file in find_files(list(sources))]


def documents(*sources: str) -> list[Document | LeftOut]:
    return [document for block in cut_into_blocks(find_files(list(sources))) for document in block.documents()]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/z.txt", "a/y.md", "a/b/x.txt", ".hidden", "a/.git/object", "__pycache__/b.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_folder_means_its_files_that_are_not_hidden_by_name(tree: Path) -> None:
    assert names(str(tree)) == ["a/b/x.txt", "a/y.md", "a/z.txt", "b.txt"]


def test_file_is_named_by_its_last_part(tree: Path) -> None:
    assert names(str(tree / "a/z.txt")) == ["z.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.txt", ["a/b/x.txt", "a/z.txt", "b.txt"]),
        ("a/*.t?t", ["z.txt"]),
        ("?", ["a/b/x.txt", "a/y.md", "a/z.txt"]),
        ("**", ["a/b/x.txt", "a/y.md", "a/z.txt", "b.txt"]),
    ],
)
def test_glob_means_its_files_and_those_below_its_folders(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(f"{tree}/{pattern}") == expected


def test_sources_keep_their_order_and_a_file_counts_once(tree: Path) -> None:
    assert names(str(tree / "b.txt"), str(tree)) == ["b.txt", "a/b/x.txt", "a/y.md", "a/z.txt"]


def test_name_with_wildcard_characters_is_a_file_when_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(str(tmp_path / "a[1].txt")) == ["a[1].txt"]


def test_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert [document.text for document in documents(str(tmp_path))] == [b"caf\xe9"]


def test_binary_files_are_marked_unless_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"PNG\0\1")
    (tmp_path / "text.txt").write_bytes(b"PNG")
    assert [isinstance(found, LeftOut) for found in documents(str(tmp_path))] == [True, False]
    assert [isinstance(found, LeftOut) for found in documents(f"{tmp_path}/*")] == [True, False]
    assert [isinstance(found, LeftOut) for found in documents(str(tmp_path / "image.png"))] == [False]


def test_jsonl_has_a_document_per_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "é\n"}), "", json.dumps({"text": "", "id": 3})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    found = documents(str(tmp_path))
    assert [(document.name, document.text) for document in found] == [
        ("x.jsonl:1", "é\n".encode()),
        ("x.jsonl:3", b""),
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "x"', "Expecting"),
        ('["text"]', "a list"),
        ('{"txt": "x"}', r"keys \['txt'\]"),
        ('{"text": 3}', "'text' is a int"),
        ('{"text": null}', "'text' is null"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(
        DataError,
        match=f"must be an object.*x.jsonl, line 3: .*{found}.*(Correct or|Name the field)",
    ):
        documents(str(tmp_path / "x.jsonl"))


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: 'utf-8' codec"):
        documents(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("source", ["missing.txt", "missing/", "nowhere/*.txt"])
def test_source_that_names_nothing_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=rf"every entry of data\.corpus must .*{source.rstrip('/').replace('*', '.')}"):
        find_files(["stdlib:json", f"{tmp_path}/{source}"])


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must yield at least one file"):
        find_files([str(tmp_path)])


def test_stdlib_is_source_without_tests_tables_and_packages() -> None:
    files = find_files(["stdlib"])
    found = {file.name for file in files}
    assert {"json/decoder.py", "os.py", "asyncio/tasks.py"} <= found
    assert all(name.endswith(".py") for name in found)
    assert not any(part in {"test", "tests", "site-packages"} for name in found for part in name.split("/"))
    assert not any(name.startswith(("encodings/", "pydoc_data/")) for name in found)
    assert 5e6 < sum(file.num_bytes for file in files) < 40e6


def test_stdlib_module_is_a_part_with_the_same_names() -> None:
    whole = names("stdlib")
    assert names("stdlib:json") == [name for name in whole if name.startswith("json/")]
    assert names("stdlib:xml.dom") == [name for name in whole if name.startswith("xml/dom/")]
    assert names("stdlib:textwrap") == ["textwrap.py"]
    assert names("stdlib:encodings")


@pytest.mark.parametrize(("source", "near"), [("stdlib:jsn", "stdlib:json"), ("stdlib:../etc", "stdlib:")])
def test_unknown_stdlib_module_is_refused_with_near_names(source: str, near: str) -> None:
    with pytest.raises(DataError, match=f"written in Python; found .*Nearest are: .*{near}"):
        find_files([source])
