"""Fields by the names that data sets give them, and rows that are none: counted by kind, named, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.data.loading.corpus import prepare_shards, shards_folder
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.render import render_chat
from mtp_lightning.data.text.records import Document, Reading, RowFault, document_of_record
from mtp_lightning.data.tokenizers.chat import PLAIN
from mtp_lightning.errors import DataError, RecipeError
from tests.data.corpora import build_tiny, tiny_recipe
from tests.data.test_reading import found, texts

SAID = b"<|user|>\nQ\n<|assistant|>\n"
PAIR = ((SAID, False), (b"A\n", True))
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SYSTEM = ((b"<|system|>\nS\n" + SAID, False), (b"A\n", True))
KNOWN: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({"text": "A", "id": 3, "meta": {}}, ((b"A", True),)),
    "text of Alpaca": ({"instruction": "Q", "input": "", "output": "A", "text": "A"}, ((b"A", True),)),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, ((b"Q", False), (b"A", True))),
    "messages": ({"messages": TURNS}, PAIR),
    "messages as a text": ({"messages": json.dumps(TURNS)}, PAIR),
    "messages in columns": ({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, PAIR),
    "messages in parts": ({"messages": [{**TURNS[0], "content": [{"type": "text", "text": "Q"}]}, TURNS[1]]}, PAIR),
    "ShareGPT": ({"conversations": SHAREGPT, "id": "x"}, PAIR),
    "ShareGPT, in one": ({"conversation": SHAREGPT}, PAIR),
    "roles under conversations": ({"conversations": TURNS}, PAIR),
    "ShareGPT with a system": ({"system": "S", "conversations": SHAREGPT}, SYSTEM),
    "pairs of chats": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, PAIR),
    "chats that are asked": ({"prompt": TURNS + TURNS[:1], "completion": TURNS[1:]},
                             ((SAID + b"A\n" + SAID, False), (b"A\n", True))),
    "Alpaca": ({"instruction": "Q", "input": "", "output": "A"}, PAIR),
    "Alpaca without": ({"instruction": "Q", "input": None, "output": "A", "text": None}, PAIR),
    "Alpaca with an input": ({"instruction": "I", "input": "Q", "output": "A"},
                             ((b"<|user|>\nI\nQ\n<|assistant|>\n", False), (b"A\n", True))),
    "Dolly": ({"instruction": "Q", "context": "", "response": "A", "category": "x"}, PAIR),
    "question and answer": ({"question": "Q", "answer": "A"}, PAIR),
    "Orca": ({"system_prompt": "S", "question": "Q", "response": "A", "id": "1"}, SYSTEM),
    "prompt and response": ({"prompt": "Q", "response": "A"}, PAIR),
    "query and response": ({"query": "Q", "response": "A"}, PAIR),
    "problem and solution": ({"problem": "Q", "solution": "A"}, PAIR),
    "input and output": ({"input": "Q", "output": "A"}, PAIR),
}  # fmt: skip


def parts_of(document: Document) -> Any:
    """Return the parts, of a chat in the plain layout."""
    return render_chat(document.chat, PLAIN).parts if document.chat else document.parts


@pytest.mark.parametrize("kind", KNOWN)
def test_known_fields_are_found(tmp_path: Path, kind: str) -> None:
    record, parts = KNOWN[kind]
    assert parts_of(document_of_record(record, "x", Reading())) == parts
    if kind == "messages in parts":
        return  # a column has one type
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([{key: value for key, value in record.items() if value != {}}]), path)
    (document,) = found(path)
    assert isinstance(document, Document)
    assert parts_of(document) == parts


def test_a_chat_is_kept_as_templates_take_it() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = document_of_record({"messages": TURNS, "tools": json.dumps(tools)}, "x", Reading()).chat
    assert chat is not None
    assert (chat.messages, chat.tools, chat.num_given) == (TURNS, tools, 0)
    chat = document_of_record({"prompt": TURNS[:1], "completion": TURNS[1:]}, "x", Reading()).chat
    assert chat is not None
    assert chat.num_given == 1


FAULTS: dict[str, tuple[dict[str, Any] | str, str, str]] = {
    "null": ({"text": None}, "no text under text", "'text' is null"),
    "number": ({"text": 12345}, "no text under text", "'text' is a int"),
    "object": ({"text": {"a": "b"}}, "no text under text", "'text' is a dict"),
    "other name": ({"content": "x"}, "no known field", r"data\.text_field=content \(--text-field\)"),
    "records within": ({"data": [{"text": "a"}]}, "no known field", "What lies under 'data' may be the records"),
    "no text": ({"id": 3}, "no known field", r"keys \['id'\]"),
    "answer alone": ({"completion": "x"}, "no known field", "template='{completion}'"),
    "preference": ({"prompt": "x", "chosen": "a", "rejected": "b"}, "no known field", "keys"),
    "two answers": ({"query": "x", "answer": "a", "solution": "b"}, "several", r"{query}\\n{answer}\\n{solution}"),
    "reading": ({"context": "c", "question": "x", "answer": "a"}, "several", "template="),
    "list": ("[1]", "no object", "a list"),
    "text alone": ('"a"', "no object", "a str"),
    "damaged": ('{"text": "x"', "damaged JSON", "Expecting"),
    "deep": ("[" * 200_000, "lists within lists", "recursion"),
    "deep within": ('{"text": ' + "[" * 200_000, "lists within lists", "recursion"),
    "digits": ('{"text": ' + "9" * 5000 + "}", "damaged JSON", "digits"),
    "no turns": ({"messages": []}, "chat without turns", "message 0"),
    "no roles": ({"messages": ["a"]}, "chat without turns", "message 0"),
    "messages of text": ({"messages": "hello"}, "chat without turns", "message 0"),
    "messages of damaged JSON": ({"messages": '[{"role"'}, "damaged JSON", "a chat that is a text but no JSON"),
    "unknown role": ({"conversations": [{"from": "alien", "value": "x"}]}, "chat of unknown roles", "'alien'"),
    "tools": ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "chat that", "calls tools"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "chat that", "no text"),
    "said by null": ({"messages": [{"role": "user", "content": None}]}, "chat that", "no text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_row_that_is_no_document_is_refused_or_counted(tmp_path: Path, kind: str) -> None:
    bad, counted, said = FAULTS[kind]
    lines = [json.dumps({"text": f"text {number}"}) for number in range(40)]
    lines[6] = bad if isinstance(bad, str) else json.dumps(bad)
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"x\.jsonl(, line |:)7: .*{said}"):
        build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "shards")
    manifest = build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "shards", reading=Reading(on_bad_row="skip"))
    assert manifest.num_documents("train") + manifest.num_documents("validation") == 39
    assert manifest.skipped_rows is not None
    ((name, count),) = manifest.skipped_rows.items()
    assert (name[: len(counted)], count) == (counted, 1)


def test_bytes_and_surrogates_that_are_no_text_are_counted(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n{"text": "\xff"}\n{"text": "\\ud83d"}\n\n{"text": ""}\n'
    (tmp_path / "x.jsonl").write_bytes(content)
    (tmp_path / "x.csv").write_bytes(b'id,text\n1,a\n2,\xff\n3,"a"b\n4\n5,b\n')
    kinds = ["a", "invalid UTF-8", "damaged row", "other number of cells", "b"]
    assert texts(tmp_path / "x.csv", Reading(on_bad_row="skip")) == kinds
    reading = Reading(on_bad_row="skip")
    (tmp_path / "y.jsonl").write_bytes(content.replace(b'{"text": "\\ud83d"}\n', b""))
    assert texts(tmp_path / "y.jsonl", reading) == ["a", "invalid UTF-8", ""]
    one = found(tmp_path / "x.jsonl", reading)[2]
    assert isinstance(one, Document)
    assert one.text == "\ud83d".encode("utf-8", "surrogatepass")  # for a tokenizer of bytes; others leave it out


def test_the_first_ten_are_named_on_the_screen(tmp_path: Path) -> None:
    lines = [json.dumps({"text": None if number % 2 else f"text {number}"}) for number in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "{"]))
    arguments = ["data", "build", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "shards")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 87
    done = CliRunner().invoke(app, [*arguments, "--on-bad-row", "skip", "--validation-fraction", "0.3"])
    assert done.exit_code == 0, done.output
    assert "left out 31 that are no documents: 30 no text under text, 1 damaged JSON" in done.output
    assert done.output.count("x.jsonl, line") == 10
    assert f"{tmp_path}/x.jsonl, line 2: 'text' is null" in done.output


def test_a_chat_in_a_field_that_is_named_keeps_what_stands_beside_it(tmp_path: Path) -> None:
    record = {"turns": SHAREGPT, "system": "S", "tools": [{"type": "function"}]}
    pa.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    for name in ("x.parquet", "x.jsonl"):
        (document,) = found(tmp_path / name, Reading(text_field="turns"))
        assert isinstance(document, Document)
        assert document.chat
        assert document.chat.tools == record["tools"]
        assert document.chat.messages == [{"role": "system", "content": "S"}, *TURNS]


def test_fields_can_be_named(tmp_path: Path) -> None:
    record = {"title": "T", "body": {"text": "B", "n": 3}, "a.b": "dotted", "no": None, "turns": SHAREGPT}
    cases = {
        "{title}: {body.text}": "T: B",
        r"# {title}\n\t{ body.n }": "# T\n\t3",
        "{{{title}}}": "{T}",
        "{a.b}": "dotted",
    }
    for template, expected in cases.items():
        assert document_of_record(record, "x", Reading(template=template)).text.decode() == expected
    assert document_of_record(record, "x", Reading(text_field="body.text")).text == b"B"
    assert parts_of(document_of_record(record, "x", Reading(text_field="turns"))) == PAIR
    for wrong in ("{no}", "{body}", "{missing}", "{title.__class__}", "{body.text.__len__}", "{0}"):
        with pytest.raises(RowFault):
            document_of_record(record, "x", Reading(template=wrong))


def test_fields_are_named_in_recipes_and_as_options(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table({"title": ["T"] * 60, "content": [f"text {n}" for n in range(60)]}), path)
    with pytest.raises(DataError, match=r"columns title, content\. Name the column: data\.text_field=title"):
        build_tiny([str(path)], tmp_path / "shards")
    arguments = ["data", "build", str(path), "--out", str(tmp_path / "shards"), "--template", "{title}{content}"]
    assert CliRunner().invoke(app, [*arguments, "--validation-fraction", "0.3"]).exit_code == 0
    by_option = load_manifest(tmp_path / "shards")
    recipe = tiny_recipe(tmp_path / "cache", path, data={"template": "{title}{content}", "validation_fraction": 0.3})
    assert load_manifest(prepare_shards(recipe)).num_tokens("train") == by_option.num_tokens("train")
    plain = tiny_recipe(tmp_path / "cache", path, data={"text_field": "content"})
    assert shards_folder(plain) != shards_folder(recipe)
    assert load_manifest(prepare_shards(plain)).num_tokens("train") < by_option.num_tokens("train")


@pytest.mark.parametrize(
    "options",
    [["--template", "no fields"], ["--template", "{a} {"], ["--template", "{}"], ["--encoding", "latin-99"],
     ["--encoding", "hex"], ["--template", "{a}", "--text-field", "a"]],
)  # fmt: skip
def test_wrong_options_are_refused_as_fields_and_as_options(tmp_path: Path, options: list[str]) -> None:
    from mtp_lightning.recipe.loading.load import load_recipe

    (tmp_path / "x.jsonl").write_text('{"a": "b"}')
    refused = CliRunner().invoke(app, ["data", "build", str(tmp_path), "--out", str(tmp_path / "o"), *options])
    assert refused.exit_code == 87, refused.output
    fields = [f"data.{name[2:].replace('-', '_')}={json.dumps(value)}"
              for name, value in zip(options[::2], options[1::2], strict=True)]  # fmt: skip
    with pytest.raises(RecipeError):
        load_recipe("recipes/debug/parallel.yaml", fields)


def test_nothing_is_left_out_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in/.git").mkdir(parents=True)
    for number in range(40):
        (tmp_path / f"in/{number}.txt").write_text(f"text {number}")
    (tmp_path / "in/package.json").write_text('{"name": "x"}')
    (tmp_path / "in/x.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "in/y.zip").write_bytes(b"PK\3\4\0")
    (tmp_path / "in/link").symlink_to(tmp_path / "in")
    build_tiny([str(tmp_path / "in")], tmp_path / "shards", show_progress=True)
    said = capsys.readouterr().out
    assert "2 binary skipped" in said
    assert "left out as no text: 1 PDF, 1 zip" in said
    assert "1 JSON file without records, read as text" in said
    assert "passed over: 1 hidden, 1 links to folders" in said


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"a.txt": "ab c".encode("utf-16-le"), "b.txt": "de f".encode("utf-16-le")}, "2 UTF-16 without .*--encoding"),
        ({"a.zip": b"PK\3\4", "b.pdf": b"%PDF-"}, "1 zip .*1 PDF"),
        ({"a.json": b'{"content": "a"}', "b.json": b'{"content": "b"}'}, "2 JSON file without records.*--text-field"),
        ({"a.txt": b"", "b.txt": b""}, "2 empty documents"),
        ({"a.png": b"a\0\1\2"}, "1 binary"),
    ],
)
def test_a_folder_of_no_documents_says_what_is_there(tmp_path: Path, contents: dict[str, bytes], said: str) -> None:
    (tmp_path / "in").mkdir()
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"at least one document with text; found {len(contents)} files with {said}"):
        build_tiny([str(tmp_path / "in")], tmp_path / "shards")
