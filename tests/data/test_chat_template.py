"""Chats become the text that transformers renders, inside a sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.data.tokenizers.chat import ChatTemplate
from mtp_lightning.errors import DataError

TURN = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 <é>"}]


def template(source: str, **variables: str) -> ChatTemplate:
    return ChatTemplate(templates={"default": source}, variables=variables, where="here")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ messages[0]['content'] ",
        "{{ messages[7]['content'] }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="the chat template of here must render the chat; found .*Error: .*"):
        template(source).render(TURN)


def test_files_come_before_the_config_and_names_are_chosen_by_tools(tmp_path: Path) -> None:
    config: dict[str, Any] = {"eos_token": {"content": "</s>"}, "chat_template": "config{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.from_folder(tmp_path)
    assert found
    assert found.render(TURN) == "config</s>"
    config["chat_template"] = [{"name": name, "template": name} for name in ("default", "tool_use")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = ChatTemplate.from_folder(tmp_path)
    assert named
    assert named.fingerprint() != found.fingerprint()
    assert [named.render(TURN), named.render(TURN, [{"name": "f"}])] == ["default", "tool_use"]
    (tmp_path / "chat_template.jinja").write_text("file")
    file = ChatTemplate.from_folder(tmp_path)
    assert file
    assert file.render(TURN) == "file"


def test_a_folder_without_a_template_has_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    for content in ("{", "[]", '{"chat_template": 3}', '{"chat_template": [{"name": "a"}]}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer_config.json must be as transformers writes it"):
            ChatTemplate.from_folder(tmp_path)


def test_what_the_model_is_to_learn_is_marked() -> None:
    source = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    text, spans = template(source).render_marked(TURN)
    assert [text[begin:end] for begin, end in spans] == ["2+2?", "4 <é>"]
    assert template(source).marks_learnt
    assert not template("{{ generation }}").marks_learnt


def test_the_date_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * 365))
    assert template("{{ strftime_now('%Y') }}").writes_date
    assert template("{{ strftime_now('%Y') }}").render(TURN) == "1971"


ENDLESS = {
    "rounds": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "blocks": "{% for m in messages * 60000 %}{{ m.nothing }}{% endfor %}",
    "characters": "{{ 'a' * 100 * 2000 }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_would_not_end_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_lightning.data.tokenizers.chat.MOST_CHARACTERS", 100_000)
    monkeypatch.setattr("mtp_lightning.data.tokenizers.chat.MOST_ROUNDS", 300_000)
    with pytest.raises(DataError, match=r"must render the chat; found OverflowError: .*more than [13]00,000"):
        template(ENDLESS[kind]).render(TURN)
