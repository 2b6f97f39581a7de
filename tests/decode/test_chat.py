"""Chats by the model's own template, with transformers as the judge: its prompt, and its greedy answer, by id."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.carried_files import all_end_ids
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.cli.app import app
from mtp_lightning.cli.prompts import encode_prompts, read_chats, texts_of
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.decode import generate
from mtp_lightning.errors import DecodingError
from tests.data.text_tokenizers import write_tokenizer_json
from tests.decode.test_own_text import all_documents

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
REAL_MODEL = os.environ.get("MTP_REAL_MODEL")
TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a chat template, whose end ids are in two files."""
    folder = tmp_path_factory.mktemp("chat") / "hf"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=400, max_position_embeddings=256, eos_token_id=2, bos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    write_tokenizer_json(folder / "tokenizer.json", specials=SPECIALS)
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory):
    """The same model, with heads."""
    imported = tmp_path_factory.mktemp("chat") / "ours"
    import_folder(folder, imported, Wanted(num_offsets=2, kind="parallel", init="copy"))
    return imported


def mtp(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"])


def judged(folder, messages, num_tokens, **options):
    """The ids of a chat, and of the answer by transformers' own greedy decoding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    said = model.generate(torch.tensor([asked]), max_new_tokens=num_tokens, do_sample=False, **options)
    return asked, said[0, len(asked) :].tolist(), tokenizer


def assert_answers_as_judged(folder, ours, question, num_tokens, *, ends=None):
    """Same prompt, same ids with and without drafts, same text on the screen."""
    messages = [{"role": "user", "content": question}]
    asked, said, judge_tokenizer = judged(folder, messages, num_tokens)
    recipe, model = load_model(ours, dtype=torch.float32)
    tokenizer = recipe_tokenizer(recipe)
    prompts = encode_prompts(recipe, tokenizer, read_chats([question.encode()], None))
    assert prompts[0].tokens == asked
    stops = all_end_ids(recipe, tokenizer.end_of_document, ours)
    for options in ({"decoder": "greedy"}, {}, {"draft_length": "adaptive"}):
        made = generate(model, [asked], max_new_tokens=num_tokens, stop_tokens=stops, **options)
        assert made.tokens[0] == said
    result = mtp(ours, "--chat", "--prompt", question, "--max-new-tokens", num_tokens, "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    ids = said[:-1] if said[-1] in stops else said
    assert result.stdout == judge_tokenizer.decode(ids, skip_special_tokens=False) + "\n"
    return said


def test_a_chat_is_answered_as_by_transformers(folder, tmp_path):
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=3))
    said = assert_answers_as_judged(folder, tmp_path / "ours", "The quick fox: naïve <|im_start|>?", NUM_TOKENS)
    assert len(said) == NUM_TOKENS


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_any_end_id_ends_a_text(place, folder, tmp_path):
    messages = [{"role": "user", "content": "The fox"}]
    plain = judged(folder, messages, NUM_TOKENS)[1]
    end = plain[9]  # which may come earlier, too
    other = tmp_path / "hf"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / place).read_text()) if (other / place).exists() else {}
    (other / place).write_text(json.dumps(settings | {"eos_token_id": [2, 399, end]}))
    if place == "config.json":
        (other / "generation_config.json").unlink(missing_ok=True)
    import_folder(other, tmp_path / "ours", Wanted(num_offsets=2))
    said = assert_answers_as_judged(other, tmp_path / "ours", "The fox", NUM_TOKENS)
    assert said == plain[: plain.index(end) + 1]


def test_chats_come_from_files_and_with_a_system(folder, tmp_path):
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=1))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"prompt": "The fox"}))
    shown = mtp(tmp_path / "ours", "--chat", "--prompts", tmp_path / "chats.jsonl", "--max-new-tokens", 9).stdout
    alone = [
        mtp(tmp_path / "ours", "--chat", "--prompt", "The fox", "--max-new-tokens", 9, *more).stdout
        for more in (("--system", "Be brief."), ())
    ]
    assert shown == "".join(alone)
    for name, content in (("chat.json", chat), ("chats.json", [{"messages": chat}])):
        (tmp_path / name).write_text(json.dumps(content, indent=1))
        shown = mtp(tmp_path / "ours", "--chat", "--prompts", tmp_path / name, "--max-new-tokens", 9).stdout
        assert shown == alone[0]
    assert alone[0] != alone[1]


def test_special_tokens_in_a_prompt_are_parsed_where_asked(folder, tmp_path):
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=1))
    recipe = load_model(tmp_path / "ours")[0]
    tokenizer = recipe_tokenizer(recipe)
    text = b"<|im_start|>user"
    parsed = encode_prompts(recipe, tokenizer, [text], parse_special_tokens=True)[0].tokens
    assert parsed == transformers.AutoTokenizer.from_pretrained(folder).encode(text.decode())
    assert 1 not in encode_prompts(recipe, tokenizer, [text])[0].tokens
    asked = ("--prompt", text.decode(), "--max-new-tokens", 9)
    assert mtp(tmp_path / "ours", "--special-tokens", *asked).stdout != mtp(tmp_path / "ours", *asked).stdout


@pytest.mark.parametrize(
    ("name", "content", "more", "says"),
    [
        ("a.txt", b"\xff\xfea\n", [], "a prompt must be text in UTF-8"),
        ("a.txt", b"\xff\xfea\n", ["--chat"], "a prompt must be text in UTF-8"),
        ("a.jsonl", b'{"messages": []}', ["--chat"], "line 1 of"),
        ("a.jsonl", b'{"messages": ["x"]}', ["--chat"], "line 1 of"),
        ("a.json", b'[{"role": "user", "content": "x"}]', [], "member 1 of"),
        ("a.json", b"[3]", ["--chat"], "member 1 of"),
        ("a.json", b"[]", ["--chat"], "member 1 of"),
    ],
)
def test_what_is_no_prompt_is_refused(name, content, more, says, folder, tmp_path):
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=1))
    (tmp_path / name).write_bytes(content)
    result = mtp(tmp_path / "ours", "--prompts", tmp_path / name, *more)
    assert result.exit_code == 7, result.output
    assert says in " ".join(result.stderr.split())


def test_a_model_without_a_template_cannot_chat(folder, tmp_path):
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=1))
    (tmp_path / "ours/tokenizer_config.json").write_text("{}")
    result = mtp(tmp_path / "ours", "--chat", "--prompt", "x")
    assert result.exit_code == 7
    assert "--chat needs a chat template beside the model's tokenizer" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MODEL, reason="MTP_REAL_MODEL must name a chat model's folder of transformers")
def test_a_real_model_answers_as_by_transformers(tmp_path):
    real = Path(str(REAL_MODEL))
    import_folder(real, tmp_path / "ours", Wanted(num_offsets=2))
    for question in ("What is the capital of France?", "写一句关于猫的话。"):
        assert_answers_as_judged(real, tmp_path / "ours", question, NUM_TOKENS)
    export_model(tmp_path / "ours", tmp_path / "back", dtype="bf16")
    for path in real.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    before, after = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (real, tmp_path / "back"))
    assert after | {"_name_or_path": before["_name_or_path"]} == before
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (real, tmp_path / "back")]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_own_text_answers_chats_and_its_prompts_are_those_of_the_template(tmp_path, folder, ours):
    asked = ["Why?", "What is it?", "Who said so?"]
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    options = [
        "--chat",
        "--system",
        "Be brief.",
        "--max-new-tokens",
        "9",
        "--validation-fraction",
        "0.4",
        "--rows",
        "2",
        "--num-documents",
        "12",
    ]
    command = ["data", "generate", ours, "--prompts", tmp_path / "asked.txt", "--out", tmp_path / "own", *options]
    done = CliRunner().invoke(app, [*map(str, command), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in asked]
    wanted = {tuple(judge.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats}
    found = {
        tuple(token for token, is_learnt in zip(*document, strict=True) if not is_learnt)[: len(prompt)]
        for document in all_documents(tmp_path / "own")
        for prompt in wanted
        if tuple(document[0][: len(prompt)]) == prompt
    }
    assert found == wanted


@pytest.mark.parametrize("options", [["--system", "Be brief."], ["--chat"], ["--special-tokens"]])
def test_own_text_from_shards_is_told_nothing_of_chats(tmp_path, ours, options):
    command = ["data", "generate", ours, "--prompts", tmp_path, "--out", tmp_path / "own", *options]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 2
    assert not (tmp_path / "own").exists()


def test_prompts_are_utf8_also_where_the_locale_knows_ascii_only() -> None:
    """Python has undecoded bytes as surrogates then."""
    typed = "grüße"
    assert texts_of([typed.encode().decode("ascii", "surrogateescape"), typed]) == [typed.encode()] * 2
    with pytest.raises(DecodingError, match="must be text in UTF-8"):
        texts_of([typed.encode("latin-1").decode("ascii", "surrogateescape")])
