"""What is trained on is, id for id, what transformers gives for the same folder: text, frames, chats, masks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from mtp_lightning.data.loading.factory import open_data
from mtp_lightning.data.shards import build
from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from mtp_lightning.data.shards.tokenize import learnt_tokens
from mtp_lightning.data.text.documents import Document
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import DataError
from mtp_lightning.recipe import Recipe
from tests.data.tokenizer_folders import FOLDERS, write_folder

transformers = pytest.importorskip("transformers")
REAL = os.environ.get("MTP_REAL_MODEL", "")
TEXTS = [
    "The quick fox said: naïve café!",
    "  two spaces, a tab\t and\n\nlines ",
    "地图 😀 Grüße",
    "<|im_start|>user\nhi<|im_end|> </s>x <lstrip>  y <rstrip>  z<single_word> <normalized>a <more> <new>",
]
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "2+2? <|im_end|>"},
    {"role": "assistant", "content": "It is 4 😀."},
    {"role": "user", "content": "And the small mouse number 7"},
    {"role": "assistant", "content": "naïve café", "reasoning": None},
]
CALL = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": "<2>"}}}]},
    {"role": "tool", "content": "4"},
    CHAT[3],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds & <adds>"}}]
PAIRS = [("The quick", " fox said"), ("two spaces  ", "zz"), ("The qui", "ck fox"), ("2+2= ", "4"), ("地", "图 😀")]


@pytest.fixture(scope="module", params=[*FOLDERS, *([REAL] if REAL else [])])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == REAL:
        return Path(REAL)
    return write_folder(tmp_path_factory.mktemp("folder") / "tokenizer", request.param)


@pytest.fixture(scope="module")
def judge(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def built(folder: Path, records: list[dict[str, Any]], out: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Return ids and mask of each document as they lie in shards, in the order of the records."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = [{"text": "held out"}] * 60  # some of which are, and none of the first
    (out / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, *held_out]))
    how = BuildOptions(tokenizer=str(folder), validation_fraction=0.035, **options)
    build_shards([str(out / "rows.jsonl")], out / "shards", how, show_progress=False)
    shard = ShardMaps(out / "shards", "train")[0]
    documents = []
    for start, length in zip(*(places.tolist() for places in shard.document_places()), strict=True):
        at = np.array([start])
        documents.append((shard.tokens(at, length)[0].tolist(), shard.loss_mask(at, length)[0].astype(int).tolist()))
    return documents[: len(records)]


def ended(ids: list[int], end: int) -> list[int]:
    return ids if ids[-1:] == [end] else [*ids, end]


def test_texts_are_tokenized_as_they_are(folder: Path, judge: Any, tmp_path: Path) -> None:
    end = judge.eos_token_id
    documents = built(folder, [{"text": text} for text in TEXTS], tmp_path)
    expected = [judge(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS]
    assert documents == [([*ids, end], [1] * (len(ids) + 1)) for ids in expected]


def test_special_tokens_are_parsed_and_added_where_that_is_asked_for(folder: Path, judge: Any, tmp_path: Path) -> None:
    end = judge.eos_token_id
    texts = [*TEXTS, f"a{judge.eos_token}"]
    parsed = built(folder, [{"text": text} for text in texts], tmp_path / "parsed", parse_special_tokens=True)
    assert [ids for ids, _ in parsed] == [
        ended(judge(text, add_special_tokens=False)["input_ids"], end) for text in texts
    ]
    both = {"parse_special_tokens": True, "add_special_tokens": True}
    framed = built(folder, [{"text": text} for text in TEXTS], tmp_path / "framed", **both)
    assert [ids for ids, _ in framed] == [ended(judge(text)["input_ids"], end) for text in TEXTS]


def test_chats_are_those_of_apply_chat_template(folder: Path, judge: Any, tmp_path: Path) -> None:
    calls = [CALL] if "tool_calls" in str(judge.chat_template) else []
    records = [{"messages": CHAT}, *({"messages": chat, "tools": TOOLS} for chat in calls)]
    documents = built(folder, records, tmp_path)
    for (ids, mask), record in zip(documents, records, strict=True):
        given = {"conversation": record["messages"], "tools": record.get("tools"), "return_dict": True}
        marked = "{% generation %}" in str(judge.chat_template)
        expected = judge.apply_chat_template(**given, return_assistant_tokens_mask=marked)
        wanted = expected["input_ids"]
        assert ids[: len(wanted)] == wanted
        assert ids[len(wanted) :] in ([], [judge.eos_token_id])
        if marked:
            assert mask[: len(wanted)] == expected["assistant_masks"]
        else:
            learnt = [token for token, flag in zip(ids, mask, strict=True) if flag]
            text = judge.decode(learnt).replace(" ", "").lower()
            assert "naïvecafé" in text or judge.unk_token_id in learnt
            assert 0 < len(learnt) < len(ids)


def test_a_completion_is_tokenized_with_its_prompt(folder: Path, judge: Any, tmp_path: Path) -> None:
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    for (ids, mask), (prompt, completion) in zip(built(folder, records, tmp_path), PAIRS, strict=True):
        whole = judge(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        assert ids == [*whole["input_ids"], judge.eos_token_id]
        beyond = [end > len(prompt) for _, end in whole["offset_mapping"]]
        assert mask == [*map(int, beyond), 1]


def test_of_a_chat_in_two_parts_the_prompt_is_only_read(folder: Path, judge: Any, tmp_path: Path) -> None:
    whole, pair = built(folder, [{"messages": CHAT}, {"prompt": CHAT[:3], "completion": CHAT[3:]}], tmp_path)
    prompt = judge.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert pair[0] == whole[0]
    assert not any(pair[1][: len(prompt) - 1])
    assert pair[1][len(prompt) :] == whole[1][len(prompt) :]


def test_a_token_with_a_learnt_character_is_learnt() -> None:
    document = Document(name="x", parts=(("éb".encode(), True), (b"cd", False), (b"ef", True)))
    offsets = np.array([[0, 1], [1, 3], [2, 4], [3, 5], [4, 4], [2, 2], [6, 6]])  # empty: some bytes of a character
    assert learnt_tokens(document, offsets, in_bytes=False).tolist() == [1, 1, 0, 1, 1, 0, 1]
    assert learnt_tokens(document, offsets, in_bytes=True).tolist() == [1, 1, 1, 0, 0, 1, 1]


def test_a_folder_and_its_file_are_one_tokenizer(folder: Path) -> None:
    one, other = open_tokenizer(str(folder)), open_tokenizer(str(folder / "tokenizer.json"))
    assert (one.fingerprint(), one.end_of_document) == (other.fingerprint(), other.end_of_document)


@pytest.mark.parametrize("files", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"], []])
def test_a_folder_without_a_tokenizer_json_is_refused_with_the_command_that_writes_one(
    tmp_path: Path, files: list[str]
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"must have a tokenizer.json; found .*Write a tokenizer.json once") as caught:
        open_tokenizer(str(tmp_path))
    assert all(name in caught.value.found for name in files[:1])


@pytest.mark.parametrize("lots", [{"dropout": 0.5}, {"alpha": 0.5, "nbest_size": -1}])
def test_two_builds_are_equal_though_the_tokenizer_draws_lots(tmp_path: Path, lots: dict[str, float]) -> None:
    folder = write_folder(tmp_path / "folder", "byte level, ChatML" if "dropout" in lots else "unigram")
    file = folder / "tokenizer.json"
    plain = [ids for ids, _ in built(folder, [{"text": text} for text in TEXTS], tmp_path / "plain")]
    content = json.loads(file.read_text())
    content["model"] |= lots
    file.write_text(json.dumps(content))
    assert [ids for ids, _ in built(folder, [{"text": text} for text in TEXTS], tmp_path / "lots")] == plain


def test_a_tokenizer_that_took_the_place_of_another_is_read_anew(tmp_path: Path) -> None:
    place, records, kinds = tmp_path / "folder", [{"text": text} for text in TEXTS], ["metaspace", "unigram"]
    apart = [built(write_folder(tmp_path / kind, kind), records, tmp_path / f"{kind} out") for kind in kinds]
    for number, kind in enumerate(kinds):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / kind, place)
        assert built(place, records, tmp_path / str(number)) == apart[number]


def test_a_tokenizer_may_not_change_while_shards_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "folder", "metaspace")
    cut = build.units.cut_into_blocks

    def changing(*args: Any) -> Any:
        shutil.copy(write_folder(tmp_path / "other", "unigram") / "tokenizer.json", folder)
        yield from cut(*args)

    monkeypatch.setattr(build.units, "cut_into_blocks", changing)
    with pytest.raises(DataError, match="must stay as they are while shards are built"):
        built(folder, [{"text": text} for text in TEXTS], tmp_path / "out")


def test_what_a_tokenizer_loses_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "folder", "word pieces")
    (tmp_path / "rows.jsonl").write_text('{"text": "The quick\\nfox \u5730\u5730"}\n{"text": "the quick fox"}\n' * 40)
    how = BuildOptions(tokenizer=str(folder), validation_fraction=0.1)
    build_shards([str(tmp_path / "rows.jsonl")], tmp_path / "out", how, processes=1)
    said = capsys.readouterr()
    line = "of 8 documents sampled, 50.0% change (50.0% in more than white space), and "
    assert line in " ".join((said.out + said.err).split())


def test_text_that_vanishes_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "\u5730\u56fe"}\n' * 60)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, [])).save(str(tmp_path / "a.json"))
    how = BuildOptions(tokenizer=str(tmp_path / "a.json"), validation_fraction=0.035)
    with pytest.raises(DataError, match=r"must know some of the text; found no token for any of 8 documents sampled"):
        build_shards([str(tmp_path / "rows.jsonl")], tmp_path / "out", how, show_progress=False)
    assert not (tmp_path / "out").exists()


def test_chats_need_a_template_or_the_wish_for_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "byte level, ChatML")
    alone = folder / "alone.json"
    (folder / "tokenizer.json").rename(alone)
    options: dict[str, Any] = {"end_of_document": 2}
    with pytest.raises(DataError, match=r"chats need a chat template.*rows.jsonl:1.*--chat-template"):
        built(alone, [{"messages": CHAT}], tmp_path / "none", **options)
    (ids, mask), *_ = built(alone, [{"messages": CHAT}], tmp_path / "plain", chat_template="plain", **options)
    text = open_tokenizer(str(alone), end_of_document=2).decode(np.array(ids)).decode()
    assert text.startswith("<|user|>\n2+2? <|im_end|>\n<|assistant|>\nIt is 4")
    assert 0 < sum(mask) < len(mask)
    (folder / "own.jinja").write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    options["chat_template"] = str(folder / "own.jinja")
    (ids, _), *_ = built(alone, [{"messages": CHAT}], tmp_path / "own", **options)
    assert tokenizers.Tokenizer.from_file(str(alone)).id_to_token(ids[-1]) == "<|im_end|>"


def test_a_template_that_refuses_a_chat_names_the_row(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "metaspace")
    bad = [{"role": "tool", "content": "x"}]
    with pytest.raises(DataError, match=r"must render the chat; found rows.jsonl:2: TemplateError: Only user and"):
        built(folder, [{"messages": CHAT}, {"messages": bad}], tmp_path / "out")


def test_turns_that_are_written_anew_when_more_follow_are_read_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "folder", "byte level, ChatML")
    thinks = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("}}{% if m.tool", "}}" + thinks + "{% if m.tool")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = tmp_path / "rows.jsonl"
    source.write_text((json.dumps({"messages": CHAT}) + "\n") * 60)
    build_shards([str(source)], tmp_path / "out", BuildOptions(tokenizer=str(folder), validation_fraction=0.035))
    said = " ".join(capsys.readouterr().out.split())
    assert "60 of 120 turns of assistants are only read, not learnt" in said


def test_templates_are_never_mixed(tmp_path: Path) -> None:
    shards = []
    for name in ("byte level, ChatML", "tools"):
        folder = write_folder(tmp_path / name, name)
        built(folder, [{"messages": CHAT}] * 5, tmp_path / f"out {name}")
        shards.append(tmp_path / f"out {name}" / "shards")
    assert len({load_manifest(folder).chat_template for folder in shards}) == 2
    fields = {"tokenizer": str(folder / "tokenizer.json"), "seq_len": 16, "shards": str(shards[0])}
    model = {"vocab_size": 600}
    recipe = Recipe.model_validate({"data": fields, "model": model})
    with pytest.raises(DataError, match="must be rendered with the chat template of the recipe"):
        open_data(recipe, "train")
    (tmp_path / "alone.json").write_bytes((folder / "tokenizer.json").read_bytes())
    fields |= {"tokenizer": str(tmp_path / "alone.json"), "end_of_document": 2, "shards": None}
    mixture = {str(folder): 1.0 for folder in shards}
    recipe = Recipe.model_validate({"data": {**fields, "mixture": mixture}, "model": model})
    with pytest.raises(DataError, match=r"chats in data.mixture must all be rendered with one chat template"):
        open_data(recipe, "train")


ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a flag that is a text": (
        {"added_tokens_decoder": {"600": {"content": "<new>", "lstrip": "yes"}}},
        r"lstrip of an added token must be true or false; found 'yes' of '<new>'",
    ),
    "a flag that is null": (
        {"extra_special_tokens": [{"content": "<new>", "rstrip": None}]},
        r"rstrip of an added token must be true or false; found None of '<new>'",
    ),
    "several ends": ({"eos_token": ["</s>", "<|im_end|>"]}, r"eos_token beside .* must be one token; found \['</s>'"),
    "an end by its id": ({"eos_token": 2}, r"eos_token beside .* must be one token; found 2\. .*--end-of-document"),
}


@pytest.mark.parametrize("kind", ODD_CONFIGS)
def test_a_config_that_transformers_refuses_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path / "folder", "byte level, ChatML")
    config, told = ODD_CONFIGS[kind]
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(TypeError):
        transformers.AutoTokenizer.from_pretrained(str(folder))
    with pytest.raises(DataError, match=told):
        open_tokenizer(str(folder))


def test_an_expression_that_gives_up_on_a_text_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", "byte level, ChatML")
    content = json.loads((folder / "tokenizer.json").read_text())
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "pre_tokenizer": endless}))
    with pytest.raises(DataError, match="must be a tokenizer.json that can encode any text; found .*retry-limit"):
        open_tokenizer(str(folder)).encode(b"a" * 300)
