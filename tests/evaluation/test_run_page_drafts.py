"""Drafts on a page are those of a decoder at work, with the probabilities that a head has before it knows better."""

from pathlib import Path

import pytest
import torch

from mtp_lightning.decode import generate
from mtp_lightning.evaluation.run_page.drafts import drafts_of, places_of
from mtp_lightning.evaluation.run_page.runs import find_runs, read_runs
from mtp_lightning.evaluation.run_page.write import page_of
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support.covering import some_of
from tests.support.run_folders import write_run
from tests.support.runs import ROOT
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe

PROMPT = [1, 2, 3, 2, 1]
FEW_TOKENS = {"vocab_size": 4}  # that chance lets heads agree


def kept_by_step(places):
    """Count the drafts kept after each token of the main head."""
    steps = []
    for place in places:
        steps += [0] if place.role == "own" else []
        steps[-1] += place.role == "kept"
    return steps


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=2))
def test_drafts_are_kept_as_by_a_decoder(kind: str) -> None:
    model = tiny_model(tiny_recipe(heads=HEAD_KINDS[kind], model=FEW_TOKENS))
    roles = set()
    for prompt in (PROMPT, [0], [3, 3], [2, 0, 1]):
        made = generate(model, [prompt], max_new_tokens=40)
        places = places_of(model, prompt + made.tokens[0], len(prompt))
        assert [place.token for place in places if place.role != "rejected"] == made.tokens[0]
        accepted = made.statistics.accepted_by_row[0]
        assert kept_by_step(places)[: len(accepted) - 1] == accepted[:-1]  # the text may end amid the last
        roles |= {place.role for place in places}
    assert roles == {"own", "kept", "rejected"}


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=2, first=1))
def test_probabilities_are_those_before_the_next_tokens_are_known(kind: str) -> None:
    model = tiny_model(tiny_recipe(heads=HEAD_KINDS[kind], model=FEW_TOKENS))
    text = PROMPT + generate(model, [PROMPT], max_new_tokens=24).tokens[0]
    at, kept = len(PROMPT) - 2, 0  # what a step has read, and how much it keeps
    for place in places_of(model, text, len(PROMPT)):
        if place.role == "own":
            at, kept = at + 1 + kept, 0
        law = law_of(model, text[: at + place.offset], place.offset, at)
        assert float(law[place.token]) == pytest.approx(place.probability, abs=1e-9)
        assert float(law.max()) == pytest.approx(place.probability, abs=1e-9)
        kept += place.role == "kept"
    assert at + kept == len(text) - 2


@torch.no_grad()
def law_of(model, known, offset, at):
    tokens = torch.tensor([known + [0] * model.num_offsets])
    state = model.hidden_states(tokens, torch.zeros_like(tokens))[offset]
    return model.unembedding.logits(offset, state)[0, at].softmax(-1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    own = (f"run.dir={folder}/run", f"run.cache={folder}/cache", "run.steps=2", "run.validation_samples=2")
    assert train(load_recipe(ROOT / "recipes/debug/parallel.yaml", own)) == 0
    return folder / "run"


def drafts(*folders: Path, given: str | Path, length: int = 12):
    found = read_runs(find_runs([*folders]))
    return drafts_of(found, given, max_new_tokens=length, device=torch.device("cpu")), found


def test_a_prompt_is_gone_on_with_by_every_run_that_has_a_checkpoint(run: Path, tmp_path: Path) -> None:
    told, found = drafts(run, write_run(tmp_path / "none"), given="ä\n<b>")
    assert told[0]["given"] == "ä\n<b>"
    assert sum(token.role != "rejected" for token in told[0]["tokens"]) == 12
    assert told[1]["missing"] == "no checkpoint yet"
    page = page_of(found, drafts=told)
    assert page.count('tabindex="0"') == len(told[0]["tokens"])
    assert f'data-tip="{told[0]["tokens"][0].tip}"' in page
    assert "no checkpoint yet." in page


@pytest.mark.parametrize(
    ("given", "missing"),
    [("", "must hold a token"), ("long " * 1000, "leave room in the context")],
    ids=["an empty prompt", "a prompt beyond the context"],
)
def test_a_prompt_that_does_not_fit_is_told_on_the_page(given: str, missing: str, run: Path) -> None:
    assert missing in drafts(run, given=given)[0][0]["missing"]


def test_a_text_is_walked_along_and_cut_where_it_is_long(run: Path, tmp_path: Path) -> None:
    text = "€uro \n" * 500
    (tmp_path / "text.txt").write_text(text)
    told = drafts(run, given=tmp_path / "text.txt")[0][0]
    shown = [token.text for token in told["tokens"] if token.role != "rejected"]
    assert "".join(shown).replace("·", "").replace("↵", "").startswith("uro \n€uro \n")
    assert told["given"] == "€"
    assert 100 < len(shown) < 600
    assert told["tokens"][0].tip.startswith("main head, probability 0.")
