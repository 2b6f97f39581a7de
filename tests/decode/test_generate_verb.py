"""`mtp generate`, from a checkpoint to text on the screen."""

import io
import json
import os
import re
import time
from unittest import mock

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mtp_lightning
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.cli.app import app
from mtp_lightning.cli.generate_view import Writer
from mtp_lightning.data.tokenizers.base import ByteTokenizer
from mtp_lightning.decode import Settings, generate, static, stream
from mtp_lightning.decode.text_stream import text_stream
from mtp_lightning.errors import DecodingError
from tests.checkpoint.runs import save_run
from tests.support.tiny import tiny_recipe

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode") / "run"
    recipe = tiny_recipe(model={"vocab_size": 257, "initializer_range": 0.02}, run={"dir": str(folder)})
    save_run(folder, recipe, step=3)
    return folder


def mtp(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"])


def expected_text(run, prompt, **options):
    _, model = load_model(run)
    made = generate(model, [list(prompt)], max_new_tokens=NEW_TOKENS, stop_tokens=[256], **options)
    return (prompt + bytes(token for token in made.tokens[0] if token < 256)).decode(errors="replace")


@pytest.mark.parametrize("decoder", ["auto", "greedy", "blockwise"])
def test_text_is_that_of_the_python_api(run, decoder):
    result = mtp(run, "--prompt", "def f(", "--max-new-tokens", NEW_TOKENS, "--decoder", decoder)
    assert result.exit_code == 0
    assert result.stdout == expected_text(run, b"def f(") + "\n"
    assert re.search(rf"^{NEW_TOKENS} tokens in .* tokens/s", result.stderr, re.MULTILINE)
    assert ("verifying forwards, acceptance length" in result.stderr) == (decoder != "greedy")


def test_prompts_come_from_files(run, tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    (tmp_path / "notepad.txt").write_text("one\r\n\r\ntwo\r\n", encoding="utf-8-sig")
    (tmp_path / "notepad.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}', encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    shown = [
        mtp(run, "--prompts", tmp_path / name, "--max-new-tokens", NEW_TOKENS).stdout
        for name in ("lines.txt", "lines.jsonl", "notepad.txt", "notepad.jsonl")
    ]
    assert {*shown} == {"".join(expected_text(run, prompt) + "\n" for prompt in (b"one", b"two"))}


def test_drafting_is_compared_with_plain_decoding(run):
    shown = mtp(run, "--prompt", "x", "--max-new-tokens", NEW_TOKENS, "--compare").stderr
    gain = r"printing nothing, [\d,]+ and [\d,]+ tokens/s; drafting is \d+\.\d\d times as fast"
    assert re.search(r"without drafts: the same text; " + gain, shown)


@pytest.mark.slow
def test_the_time_of_the_compiler_is_told_apart(run):
    waits = [1.5]

    def compiled(*arguments):
        time.sleep(waits.pop() if waits else 0)
        return static._step(*arguments)

    with mock.patch.object(static, "_compiled", compiled):
        shown = mtp(run, "--prompt", "def", "--compile", "--compare")
    plain = mtp(run, "--prompt", "def")
    assert (shown.exit_code, shown.stdout) == (0, plain.stdout)
    assert float(re.search(r"compiled in ([0-9.]+) s", shown.stderr)[1]) >= 1.5
    assert float(re.search(r"tokens in ([0-9.]+) s", shown.stderr)[1]) < 1.5


def test_sampling_follows_the_seed(run):
    first, again, other = (
        mtp(run, "--prompt", "x", "--temperature", "1", "--top-k", "50", "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert first == again != other


def test_text_ends_at_a_stop_string(run):
    whole = expected_text(run, b"def f(")
    stop = next(character for character in whole[len("def f(") + 2 :] if character.isascii())
    shown = mtp(run, "--prompt", "def f(", "--max-new-tokens", NEW_TOKENS, "--stop", stop).stdout
    assert shown == whole[: whole.index(stop, len("def f(")) + 1] + "\n"


def test_as_many_are_drafted_as_pay_unless_a_number_is_given(run):
    asked = ("--prompt", "def f(", "--max-new-tokens", 80)
    paying, fixed = (mtp(run, *asked, *more) for more in ((), ("--draft-length", 3)))
    assert paying.stdout == fixed.stdout
    found = [float(re.search(r"([\d.]+) drafted in each", result.stderr)[1]) for result in (paying, fixed)]
    assert found[0] < 1.5  # these heads have learnt nothing
    assert found[1] == 3.0


def test_python_gives_the_text_up_to_its_stop_string(run):
    whole = mtp_lightning.generate(run, "def f(", max_new_tokens=NEW_TOKENS).text
    assert "def f(" + whole == expected_text(run, b"def f(")
    stop = next(character for character in whole[2:] if character.isascii())
    ended = mtp_lightning.generate(run, "def f(", max_new_tokens=NEW_TOKENS, stop=[stop])
    assert ended.text == whole[: whole.index(stop) + 1]
    with pytest.raises(DecodingError, match="a prompt must be text that UTF-8 can write"):
        mtp_lightning.generate(run, "\ud83d")


def test_a_model_of_bytes_chats_in_the_plain_layout(run):
    shown = mtp(run, "--chat", "--prompt", "hi", "--max-new-tokens", NEW_TOKENS).stdout
    asked = b"<|user|>\nhi\n<|assistant|>\n"
    assert asked.decode() + shown == expected_text(run, asked) + "\n"


class Say:
    """Steps of a text in which drafts are kept and rejected."""

    def __init__(self, drafts, accepted, block, kept):
        row = [[*map(ord, text)] for text in (drafts, block)]
        self.drafts, self.block = (torch.tensor([tokens]).reshape(1, -1) for tokens in row)
        self.accepted, self.kept = torch.tensor([accepted]), torch.tensor([kept])


STEPS = [("", 0, "a", 1), ("bcx", 2, "bcd ", 3), ("y", 0, "e ", 1), ("fgh", 3, "fghi", 2)]


def written(*, terminal, show_drafts):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None)
    tokenizer = ByteTokenizer()
    writer = Writer(console, tokenizer, text_stream(tokenizer, []), show_drafts=show_drafts)
    writer.write(b"> ", "prompt")
    for step in STEPS:
        writer.step(Say(*step))
    writer.end()
    return file.getvalue()


def test_drafts_are_coloured_on_a_terminal():
    shown = written(terminal=True, show_drafts=True)
    kept, rejected = re.findall("\x1b\\[32m(.*?)\x1b", shown), re.findall("\x1b\\[9;31m(.*?)\x1b", shown)
    assert kept == ["bc", "fg"]
    assert rejected == ["x", "y"]
    assert re.sub("\x1b\\[9;31m.*?\x1b\\[0m|\x1b\\[[0-9;]*m", "", shown) == "> abcdefg\n"


def test_drafts_are_marked_where_there_is_no_colour():
    assert written(terminal=False, show_drafts=True) == "> a{bc}~x~d~y~e{fg}\n"
    assert written(terminal=False, show_drafts=False) == "> abcdefg\n"


def test_steps_are_written_as_they_come(run):
    _, model = load_model(run)
    steps = stream(model, [[1, 2, 3]], Settings(max_new_tokens=5))
    assert int(next(steps).kept) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--prompt", ""], 7, "a prompt must hold a token"),
        (["--prompt", "x", "--prompt", ""], 7, "found prompt 2 of 2, which is empty"),
        (["--prompt", "x" * 5000], 7, "must fit the context, model.max_position_embeddings = 4,096"),
        (["--prompt", "x", "--draft-length", "4"], 7, "draft_length must lie in 1 to n - 1 = 3"),
        (["--prompt", "x", "--decoder", "chain"], 7, "decoder chain must fit the model's heads"),
        (["--prompt", "x", "--decoder", "tree"], 7, "decoder tree needs a tree"),
        (["--prompt", "x", "--decoder", "tree", "--tree", "nowhere.json"], 7, "as `mtp bench tree` writes"),
        (["--prompt", "x", "--top-k", "4"], 7, "need a temperature above 0"),
        (["--prompt", "x", "--temperature", "1e-300"], 7, "temperature must be 0, or a finite number from 1e-30 on"),
        (["--prompt", "x", "--seed", "1" + 30 * "0"], 7, "a seed must be a whole number of 64 bits"),
        (
            ["--prompt", "x", "--stop", ""],
            7,
            "hold a character found an empty one hint Give the text",
        ),
        (["--prompt", "a\ud83d"], 7, r"a prompt must be text in UTF-8 found prompt 1 of 1: a\ud83d hint Convert it"),
        (["--prompt", os.fsdecode(b"\xff\xfe")], 7, r"found prompt 1 of 1: \udcff\udcfe hint Convert it"),
        (["--prompt", "x", "--stop", "\udcff"], 7, "a stop string must be text in UTF-8"),
        (["--prompt", "x", "--special-tokens"], 87, "special tokens and chat templates need a tokenizer.json"),
        (["--prompt", "x", "--system", "y"], 2, "needs --chat"),
        (["--prompt", "x", "--decoder", "greedy", "--tree", "x.json"], 2, "needs --decoder tree"),
        (["--prompts", "nowhere.txt"], 7, "the file of prompts must be readable"),
        ([], 2, "give either --prompt TEXT or --prompts FILE"),
        (["--prompt", "x", "--prompts", "y"], 2, "give either"),
        (["--prompt", "x", "--draft-length", "long"], 2, "must be a whole number or adaptive"),
    ],
)
def test_wrong_requests_are_refused_before_any_text(run, arguments, code, says):
    result = mtp(run, *arguments)
    assert result.exit_code == code
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert not result.stdout


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "\n\n", "must hold one; found none"),
        ("a.jsonl", "{\n", "line 1 of"),
        ("a.jsonl", '{"prompt": "x"}\n{"question": "y"}\n', "line 2 of"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1 of"),
        ("a.jsonl", '{"prompt": "\\ud83d"}\n', "a prompt must be text in UTF-8; found line 1 of"),
        ("a.jsonl", "[" * 100_000, "line 1 of"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, says):
    from mtp_lightning.cli.prompts import read_prompts

    (tmp_path / name).write_text(content)
    with pytest.raises(DecodingError, match=says):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("numbers", [[1, 0], [0, 2], [-1], ["0"], [0.5], [True], [float("inf")], [[0]], "0", {"a": 1}])
def test_files_that_hold_no_tree_are_refused(run, tmp_path, numbers):
    (tmp_path / "tree.json").write_text(json.dumps({"parents": numbers, "ranks": [0] * len(numbers)}))
    result = mtp(run, "--prompt", "x", "--tree", tmp_path / "tree.json")
    assert result.exit_code == 7, result.output
    assert "Build a tree from this model with" in result.stderr or "Write one with `mtp bench tree`" in result.stderr
    assert not result.stdout


def test_a_tree_is_used_where_one_is_given(run, tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps({"parents": [0, 0, 1], "ranks": [0, 1, 0]}))
    result = mtp(run, "--prompt", "def f(", "--max-new-tokens", NEW_TOKENS, "--tree", tmp_path / "tree.json")
    assert result.stdout == expected_text(run, b"def f(") + "\n"
    assert "3.0 drafted in each" in result.stderr


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert mtp(tmp_path, "--prompt", "x").exit_code == 3
