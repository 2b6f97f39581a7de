from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.loading.corpus import prepare_shards
from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.data.loading.peek import peek, targets_of_row
from mtp_lightning.errors import DataError
from mtp_lightning.recipe.schema.root import Recipe
from tests.data.corpora import tiny_recipe


@pytest.fixture
def text_corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(f"ab [{number:02d}]\n")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, text_corpus: Path) -> Recipe:
    return tiny_recipe(tmp_path / "cache", text_corpus, data={"document_mask": True})


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    num_offsets=st.integers(1, 5),
)
def test_targets_are_the_tokens_ahead_within_the_document(lengths: list[int], num_offsets: int) -> None:
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    tokens = [100 + position for position in range(len(documents))]
    targets = targets_of_row(tokens, documents, [True] * len(tokens), num_offsets=num_offsets)
    assert len(targets) == max(0, len(tokens) - num_offsets)
    ends = np.cumsum(lengths)
    for position, own in enumerate(targets):
        end = next(end for end in ends if end > position)
        inside = [100 + p for p in range(position + 1, position + 1 + num_offsets) if p < end]
        assert own == inside + [None] * (num_offsets - len(inside))


def printed(recipe: Recipe, row: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    prepare_shards(recipe)
    capsys.readouterr()
    peek(recipe, row=row, split="train")
    return capsys.readouterr().out.splitlines()


def test_row_is_shown_with_targets_and_boundaries(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_shards(recipe)
    tokens = open_rows(recipe, "train").read(np.array([0]))["tokens"][0].tolist()
    assert bytes(tokens[:8]).startswith(b"ab [")
    first, second = chr(tokens[4]), chr(tokens[5])
    lines = printed(recipe, 0, capsys)
    table = [line.split() for line in lines]
    assert ["0", "97", "a", "0", "0", "b", "␣", "["] in table
    assert ["2", "32", "␣", "0", "2", "[", first, second] in table
    assert ["6", "93", "]", "0", "6", "\\n", "<end>", "·", "+3:", "boundary"] in table
    assert ["7", "10", "\\n", "0", "7", "<end>", "·", "·", "+2…+3:", "boundary"] in table
    assert ["8", "256", "<end>", "0", "target", "only"] in table
    assert lines[0].startswith("train row 0 of ")
    assert any("train/00000.tar, member 0, token 0" in line for line in lines)
    rules = [number for number, line in enumerate(lines) if line.strip().startswith("───")]
    line_of = {cells[0]: number for number, cells in enumerate(table) if cells and cells[0].isdigit()}
    assert line_of["7"] + 1 in rules  # the window ends
    assert line_of["8"] + 1 in rules  # the document ends
    assert not {line_of[position] + 1 for position in "0123456"} & set(rules)
    assert max(map(len, lines)) <= 100


def test_rotary_positions_follow_the_recipe(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    window = recipe.model_copy(update={"data": recipe.data.model_copy(update={"document_mask": False})})
    columns = {}
    for name, one in (("document", recipe), ("window", window)):
        cells = [line.split() for line in printed(one, 1, capsys)]
        columns[name] = [(row[3], row[4]) for row in cells if row and row[0].isdigit() and int(row[0]) < 8]
    assert columns["document"] == [("0", "0"), *[("1", str(position)) for position in range(7)]]
    assert [rotary for _, rotary in columns["window"]] == [str(position) for position in range(8)]


def test_no_target_of_many_offsets_is_cut_off_when_piped(
    tmp_path: Path, text_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path / "cache", text_corpus, heads={"num_offsets": 24}, data={"seq_len": 25})
    lines = printed(recipe, 0, capsys)
    assert "…" not in "".join(line for line in lines if "boundary" not in line)
    assert any("+24" in line for line in lines)


def test_missing_row_is_refused(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"a row of validation must be in \[0, \d+\); found 100000"):
        peek(recipe, row=100_000, split="validation")
